/* sweep_jobs.c: the runs of a sweep as processes of this program: a run that fails or is killed takes none with it, and
 * each starts from the same state of the process. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cli/sweep.h"

typedef struct job {
  pid_t pid; /* 0: free */
  int run;
  double began;
} job;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static const char *name_of(const sweep_run *r) {
  const char *slash = strrchr(r->dir, '/');
  return slash ? slash + 1 : r->dir;
}

/* What the process says, beside the run's folder: the folder does not stand until the recipe has been checked. */
static void log_path(const sweep_run *r, char out[SWEEP_PATH]) {
  snprintf(out, SWEEP_PATH, "%.*s.log", SWEEP_PATH - 8, r->dir);
}

static void child(const sweep *s, const sweep_run *r, int slot) {
  const char *argv[2 * SWEEP_OVERRIDES + 2 * CLI_MAX_ARGS + 16];
  char path[SWEEP_PATH], threads[24];
  int n = 0;
  argv[n++] = "espalier";
  argv[n++] = r->found == ESP_FOUND_UNFINISHED ? "resume" : "run";
  argv[n++] = r->found == ESP_FOUND_UNFINISHED ? r->dir : r->recipe;
  argv[n++] = "--quiet";
  if (s->n_devices > 0) {
    argv[n++] = "--device";
    argv[n++] = s->devices[slot % s->n_devices];
  }
  if (r->found != ESP_FOUND_UNFINISHED) {
    argv[n++] = "--output";
    argv[n++] = r->dir;
    if (s->threads > 0) {
      snprintf(threads, sizeof threads, "%lld", (long long)s->threads);
      argv[n++] = "--threads";
      argv[n++] = threads;
    }
    for (int i = 0; i < s->args->n_overrides; i++)
      if (!strchr(s->args->overrides[i], '|')) argv[n++] = "--set", argv[n++] = s->args->overrides[i];
    for (int i = 0; i < r->n_overrides; i++) argv[n++] = "--set", argv[n++] = r->overrides[i];
  }
  argv[n] = NULL;
  prctl(PR_SET_PDEATHSIG, SIGTERM); /* nothing trains on for a sweep that is gone */
  log_path(r, path);
  int log = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666), none = open("/dev/null", O_RDONLY);
  if (log < 0 || none < 0 || dup2(none, 0) < 0 || dup2(log, 1) < 0 || dup2(log, 2) < 0) _exit(ESP_ERR_INTERNAL);
  execv("/proc/self/exe", (char **)(uintptr_t)argv);
  dprintf(2, "espalier sweep: cannot start a run: %s\n", strerror(errno));
  _exit(ESP_ERR_INTERNAL);
}

/* The last line of the log is why a run failed. */
static void last_line(const sweep_run *r, char *out, size_t n) {
  char path[SWEEP_PATH], line[1024];
  log_path(r, path);
  FILE *f = fopen(path, "r");
  *out = 0;
  while (f && fgets(line, sizeof line, f))
    if (line[0] != '\n') snprintf(out, n, "%s", line);
  if (f) fclose(f);
  out[strcspn(out, "\n")] = 0;
}

static void tell(const sweep *s, const sweep_run *r, const char *what, double seconds) {
  char text[24] = "";
  if (s->args->quiet || s->args->json) return;
  if (seconds >= 0) cli_duration(seconds, text, sizeof text);
  printf("[%d/%d] %s: %s%s%s\n", (int)(r - s->runs) + 1, s->n, name_of(r), what, *text ? " in " : "", text);
  fflush(stdout);
}

static void ended(sweep *s, sweep_run *r, int status, double seconds) {
  char path[SWEEP_PATH], why[1024];
  struct stat info;
  r->code = WIFEXITED(status) ? WEXITSTATUS(status) : ESP_ERR_INTERNAL;
  log_path(r, path);
  if (r->code == 0) {
    r->found = ESP_FOUND_FINISHED;
    tell(s, r, "finished", seconds);
    if (stat(path, &info) == 0 && info.st_size == 0) remove(path);
  } else if (r->code == ESP_ERR_INTERRUPTED) {
    tell(s, r, "interrupted", seconds);
  } else if (WIFSIGNALED(status)) {
    fprintf(stderr, "%s: killed by signal %d\n", r->dir, WTERMSIG(status));
  } else {
    last_line(r, why, sizeof why);
    fprintf(stderr, "%s: exit code %d: %s\n", r->dir, r->code, *why ? why : path);
  }
}

static int start(sweep *s, job *slots, int slot, int next) {
  sweep_run *r = &s->runs[next];
  tell(s, r, r->found == ESP_FOUND_UNFINISHED ? "resumed" : "started", -1);
  fflush(NULL);
  pid_t pid = fork();
  if (pid == 0) child(s, r, slot);
  if (pid < 0) {
    fprintf(stderr, "espalier sweep: cannot start a process: %s\n", strerror(errno));
    return ESP_ERR_INTERNAL;
  }
  slots[slot] = (job){pid, next, now()};
  return 0;
}

int sweep_train(sweep *s, void (*done)(sweep *s)) {
  job slots[64] = {0};
  int next = 0, running = 0, code = 0;
  bool told = false;
  cli_catch_signals();
  for (;;) {
    for (int i = 0; i < s->jobs && code != ESP_ERR_INTERNAL && !esp_stop_requested(); i++) {
      while (next < s->n && s->runs[next].found == ESP_FOUND_FINISHED)
        tell(s, &s->runs[next++], "already finished", -1);
      if (slots[i].pid || next == s->n) continue;
      code = start(s, slots, i, next++) ? ESP_ERR_INTERNAL : code;
      running += slots[i].pid != 0;
    }
    if (running == 0) break;
    if (esp_stop_requested() && !told) { /* from a terminal they have it already; twice does no harm */
      told = true;
      for (int i = 0; i < s->jobs; i++)
        if (slots[i].pid) kill(slots[i].pid, SIGTERM);
    }
    nanosleep(&(struct timespec){0, 50000000}, NULL);
    for (int i = 0; i < s->jobs; i++) {
      int status;
      if (!slots[i].pid || waitpid(slots[i].pid, &status, WNOHANG) != slots[i].pid) continue;
      sweep_run *r = &s->runs[slots[i].run];
      ended(s, r, status, now() - slots[i].began);
      if (r->code && !code) code = r->code;
      slots[i].pid = 0;
      running--;
      done(s);
    }
  }
  return esp_stop_requested() ? ESP_ERR_INTERRUPTED : code;
}
