/* progress.c: what a run shows. On a terminal a bar on stderr that is drawn over itself, with finished things as lines
 * on stdout; elsewhere plain lines; with --json one object per event. */
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "cli/cli.h"

struct cli_progress {
  bool json, quiet, live, drawn, utf8, color, active;
  int64_t every;
  double last_draw;
  char phase[24];
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

cli_progress *cli_progress_create(const cli_args *a, const esp_job *job) {
  cli_progress *p = calloc(1, sizeof *p);
  if (!p) return NULL;
  int prints = 1;
  p->every = 1;
  if (job) prints = esp_job_prints(job, &p->every);
  p->json = a->json;
  p->quiet = !a->json && (a->quiet || !prints);
  p->live = !p->json && !p->quiet && isatty(STDERR_FILENO);
  p->utf8 = cli_utf8();
  p->color = cli_color(stdout);
  setvbuf(stdout, NULL, _IOLBF, 0); /* a log that is followed gets its lines as they come */
  return p;
}

static void clear_bar(cli_progress *p) {
  if (!p->drawn) return;
  fputs("\r\033[K", stderr);
  fflush(stderr);
  p->drawn = false;
}

bool cli_progress_active(const cli_progress *p) {
  return p && p->active;
}

void cli_progress_destroy(cli_progress *p) {
  if (!p) return;
  clear_bar(p);
  fflush(stdout);
  free(p);
}

static int terminal_width(void) {
  struct winsize w;
  if (!ioctl(STDERR_FILENO, TIOCGWINSZ, &w) && w.ws_col > 0) return w.ws_col;
  return 80;
}

/* `cells` columns, filled to `share`; eighths of a column where the terminal has them. */
static void bar_text(const cli_progress *p, double share, int cells, char *out) {
  static const char *const parts[] = {" ", "▏", "▎", "▍", "▌", "▋", "▊", "▉", "█"};
  if (share < 0) share = 0;
  if (share > 1) share = 1;
  int eighths = (int)(share * cells * 8 + 0.5);
  *out = 0;
  for (int i = 0; i < cells; i++) {
    int here = eighths - 8 * i;
    if (here < 0) here = 0;
    if (here > 8) here = 8;
    strcat(out, p->utf8 ? parts[here] : here >= 4 ? "#" : ".");
  }
}

static void draw(cli_progress *p, const esp_event *e) {
  double t = now();
  if (p->drawn && t - p->last_draw < 0.1 && e->step != e->total_steps) return;
  p->last_draw = t;
  char rate[24], eta[24], memory[24], tail[160], head[96], bar[400];
  snprintf(head, sizeof head, "%.24s %d/%d ", e->task, e->task_index + 1, e->n_tasks);
  snprintf(tail, sizeof tail, " %lld/%lld  loss %.4f  %s tok/s  ETA %s  %s", (long long)e->step,
           (long long)e->total_steps, e->loss, cli_count(e->tokens_per_second, rate, sizeof rate),
           cli_duration(e->eta_seconds, eta, sizeof eta), cli_bytes((double)e->memory_now, memory, sizeof memory));
  int width = terminal_width() - 1;
  int cells = width - (int)strlen(head) - (int)strlen(tail) - 2;
  if (cells > 100) cells = 100;
  double share = e->total_steps ? (double)e->step / (double)e->total_steps : 0;
  if (cells < 4) { /* too narrow for a bar: the numbers, cut to the line */
    fprintf(stderr, "\r\033[K%.*s", width > 0 ? width : 1, tail + 1);
  } else {
    bar_text(p, share, cells, bar);
    fprintf(stderr, "\r\033[K%s%s%s%s%s", head, p->utf8 ? "▕" : "[", bar, p->utf8 ? "▏" : "]", tail);
  }
  fflush(stderr);
  p->drawn = true;
}

static void step_line(const cli_progress *p, const esp_event *e) {
  char rate[24], eta[24], memory[24];
  if (p->every > 1 && e->step % p->every && e->step != e->total_steps) return;
  printf("step %lld/%lld  %s %lld/%lld  loss %.4f  lr %.3g  grad %.3g  %s tok/s  ETA %s  %s\n", (long long)e->step,
         (long long)e->total_steps, e->task, (long long)e->task_step, (long long)e->task_steps, e->loss, e->lr,
         e->grad_norm, cli_count(e->tokens_per_second, rate, sizeof rate),
         cli_duration(e->eta_seconds, eta, sizeof eta), cli_bytes((double)e->memory_now, memory, sizeof memory));
}

static void json_event(const esp_event *e) {
  static const char *const names[] = {"phase",      "task_begin", "step",    "eval",
                                      "checkpoint", "task_end",   "run_end", "note"};
  FILE *f = stdout;
  fprintf(f, "{\"event\": \"%s\", \"phase\": ", names[e->kind]);
  cli_json_string(f, e->phase);
  if (e->task && *e->task) {
    fputs(", \"task\": ", f);
    cli_json_string(f, e->task);
    fprintf(f, ", \"task_index\": %d, \"tasks\": %d", e->task_index, e->n_tasks);
  }
  if (e->kind != ESP_EVENT_PHASE && e->kind != ESP_EVENT_NOTE)
    fprintf(f, ", \"step\": %lld, \"total_steps\": %lld", (long long)e->step, (long long)e->total_steps);
  if (e->kind == ESP_EVENT_STEP) {
    const struct {
      const char *name;
      double value;
    } numbers[] = {{"loss", e->loss},
                   {"accuracy", e->accuracy},
                   {"lr", e->lr},
                   {"grad_norm", e->grad_norm},
                   {"epoch", e->epoch},
                   {"trained_tokens", e->trained_tokens},
                   {"tokens_per_second", e->tokens_per_second},
                   {"step_seconds", e->step_seconds},
                   {"eta_seconds", e->eta_seconds}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
      fprintf(f, ", \"%s\": ", numbers[i].name);
      cli_json_number(f, numbers[i].value);
    }
    fprintf(f, ", \"task_step\": %lld, \"task_steps\": %lld, \"tokens\": %lld", (long long)e->task_step,
            (long long)e->task_steps, (long long)e->tokens);
    fprintf(f, ", \"memory_now\": %lld, \"memory_peak\": %lld", (long long)e->memory_now, (long long)e->memory_peak);
  }
  if (e->kind == ESP_EVENT_EVAL) {
    fputs(", \"set\": ", f);
    cli_json_string(f, e->set);
    fputs(", \"metric\": ", f);
    cli_json_string(f, e->metric);
    fputs(", \"score\": ", f);
    cli_json_number(f, e->score);
    if (e->has_malformed) {
      fputs(", \"malformed\": ", f);
      cli_json_number(f, e->malformed);
    }
  }
  if (e->path && *e->path) {
    fputs(", \"path\": ", f);
    cli_json_string(f, e->path);
  }
  if (e->text && *e->text) {
    fputs(", \"text\": ", f);
    cli_json_string(f, e->text);
  }
  fputs("}\n", f);
  fflush(f);
}

void cli_progress_event(void *progress, const esp_event *e) {
  cli_progress *p = progress;
  p->active = true;
  if (p->json) {
    json_event(e);
    return;
  }
  if (p->quiet) return;
  if (e->kind == ESP_EVENT_STEP) {
    if (p->live)
      draw(p, e);
    else
      step_line(p, e);
    return;
  }
  const char *bold = p->color ? "\033[1m" : "", *plain = p->color ? "\033[0m" : "";
  if (e->kind == ESP_EVENT_PHASE) {
    if (!p->live || !strcmp(e->phase, "train")) return;
    clear_bar(p);
    fprintf(stderr, "%s...", e->phase);
    fflush(stderr);
    p->drawn = true;
    return;
  }
  clear_bar(p);
  switch (e->kind) {
  case ESP_EVENT_TASK_BEGIN:
    printf("%stask %s%s (%d of %d): %lld steps\n", bold, e->task, plain, e->task_index + 1, e->n_tasks,
           (long long)e->task_steps);
    break;
  case ESP_EVENT_EVAL:
    printf("  %s: %s %.4f\n", e->set, e->metric, e->score);
    break;
  case ESP_EVENT_CHECKPOINT:
    if (!p->live) printf("checkpoint %s\n", e->path);
    break;
  case ESP_EVENT_TASK_END:
    printf("adapter %s\n", e->path);
    break;
  case ESP_EVENT_RUN_END:
    printf("%srun %s%s\n", bold, e->path, plain);
    break;
  case ESP_EVENT_NOTE:
    printf("%s\n", e->text);
    break;
  default:
    break;
  }
  fflush(stdout);
}
