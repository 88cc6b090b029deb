/* common.c: opening a recipe, signals, and the ways numbers are shown. */
#include <langinfo.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"

int cli_fail(esp_status st) {
  const char *message = esp_error_message();
  const char *rank = getenv("OMPI_COMM_WORLD_RANK");
  if (!rank) rank = getenv("PMI_RANK");
  fflush(stdout);
  if (rank && strcmp(rank, "0") != 0) fprintf(stderr, "rank %s: ", rank);
  fprintf(stderr, "%s\n", *message ? message : "espalier: failed without a message");
  return (int)st;
}

int cli_print_text(esp_status st, char *text) {
  if (st != ESP_OK) {
    esp_free(text);
    return cli_fail(st);
  }
  size_t n = text ? strlen(text) : 0;
  fwrite(text, 1, n, stdout);
  if (n && text[n - 1] != '\n') putchar('\n');
  esp_free(text);
  return 0;
}

static void log_line(void *ctx, int level, const char *line) {
  const cli_args *a = ctx;
  if (level >= 2 ? !a->quiet : a->verbose) fprintf(stderr, "%s\n", line);
}

bool cli_open_job(cli_args *a, esp_job **job, int *code) {
  const char *output = cli_value(a, "output");
  int64_t threads = 0;
  if (!cli_integer(a, "threads", 1, 4096, &threads)) return *code = ESP_ERR_RECIPE, false;
  if (output && !cli_override(a, "checkpoint.output_dir", output)) return *code = ESP_ERR_MEMORY, false;
  const char *device = cli_value(a, "device");
  if (device && !cli_override(a, "parallel.device", device)) return *code = ESP_ERR_MEMORY, false;
  char text[24];
  snprintf(text, sizeof text, "%lld", (long long)threads);
  if (threads && !cli_override_plain(a, "parallel.threads", text)) return *code = ESP_ERR_MEMORY, false;
  esp_set_log(log_line, a);
  esp_status st = esp_job_open(a->positional[0], a->overrides, a->n_overrides, job);
  if (st == ESP_OK) return true;
  *code = cli_fail(st);
  return false;
}

static void on_signal(int signal_number) {
  if (signal_number == SIGINT && esp_stop_requested()) { /* the second one means now */
    signal(SIGINT, SIG_DFL);
    raise(SIGINT);
    return;
  }
  esp_request_stop();
}

void cli_catch_signals(void) {
  struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, NULL);
  sigaction(SIGTERM, &action, NULL);
  sigaction(SIGUSR1, &action, NULL);
}

void cli_json_string(FILE *f, const char *s) {
  fputc('"', f);
  for (const unsigned char *p = (const unsigned char *)s; *p; p++) {
    if (*p == '"' || *p == '\\')
      fprintf(f, "\\%c", *p);
    else if (*p < 0x20)
      fprintf(f, "\\u%04x", *p);
    else
      fputc(*p, f);
  }
  fputc('"', f);
}

void cli_json_number(FILE *f, double v) {
  if (isfinite(v))
    fprintf(f, "%.9g", v);
  else
    fputs("null", f);
}

const char *cli_bytes(double bytes, char *buf, size_t n) {
  static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int u = 0;
  while (bytes >= 1024 && u < 4) bytes /= 1024, u++;
  snprintf(buf, n, "%.*f %s", u && bytes < 100 ? 1 : 0, bytes, units[u]);
  return buf;
}

const char *cli_duration(double seconds, char *buf, size_t n) {
  if (!(seconds >= 0) || seconds > 3.6e9) {
    snprintf(buf, n, "-");
    return buf;
  }
  long long s = (long long)(seconds + 0.5);
  if (s >= 3600)
    snprintf(buf, n, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
  else
    snprintf(buf, n, "%lld:%02lld", s / 60, s % 60);
  return buf;
}

const char *cli_count(double v, char *buf, size_t n) {
  static const char *const units[] = {"", "k", "M", "G", "T", "P", "E"};
  int u = 0;
  while (fabs(v) >= 1000 && u < 6) v /= 1000, u++;
  snprintf(buf, n, "%.*f%s", u && fabs(v) < 100 ? 1 : 0, v, units[u]);
  return buf;
}

bool cli_color(FILE *f) {
  const char *none = getenv("NO_COLOR"), *term = getenv("TERM");
  return isatty(fileno(f)) && !(none && *none) && !(term && !strcmp(term, "dumb"));
}

bool cli_utf8(void) {
  return !strcmp(nl_langinfo(CODESET), "UTF-8");
}
