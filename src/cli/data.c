/* data.c: `espalier data`: the tokens as the model will see them, marked by what is trained. */
#include <string.h>

#include "cli/cli.h"

static const cli_option options[] = {
    {"show", "N", 'n', false, "samples of each task to show (default 3)"},
    {"task", "NAME", 0, false, "only this task"},
    {"ids", NULL, 0, false, "token ids beside the text"},
    {"color", "WHEN", 0, false, "auto, always or never"},
    {"set", "KEY=VALUE", 0, false, "override a value of the recipe; as a plain argument too"},
};

typedef struct view {
  bool json, color, ids;
  const char *task;
} view;

/* Control bytes of the data must not reach the terminal. */
static void show_text(const char *s) {
  for (const unsigned char *p = (const unsigned char *)s; *p; p++) {
    if (*p == '\n')
      fputs("\\n", stdout);
    else if (*p == '\t')
      fputs("\\t", stdout);
    else if (*p < 0x20 || *p == 0x7f)
      printf("\\x%02x", *p);
    else
      putchar(*p);
  }
}

static void show_json(const esp_data_sample *s) {
  fputs("{\"task\": ", stdout);
  cli_json_string(stdout, s->task);
  fputs(", \"origin\": ", stdout);
  cli_json_string(stdout, s->origin);
  printf(", \"index\": %lld, \"total\": %lld, \"tokens\": [", (long long)s->index, (long long)s->total);
  for (int64_t i = 0; i < s->n; i++) {
    printf("%s{\"id\": %d, \"weight\": %.9g, \"text\": ", i ? ", " : "", s->tokens[i].id, s->tokens[i].weight);
    cli_json_string(stdout, s->tokens[i].text ? s->tokens[i].text : "");
    putchar('}');
  }
  puts("]}");
}

static void show(void *ctx, const esp_data_sample *s) {
  view *v = ctx;
  if (v->json) {
    show_json(s);
    return;
  }
  int64_t trained = 0;
  for (int64_t i = 0; i < s->n; i++) trained += s->tokens[i].weight != 0;
  printf("%s== %s %lld of %lld, %s: %lld tokens, %lld trained%s\n", v->color ? "\033[1m" : "", s->task,
         (long long)s->index + 1, (long long)s->total, s->origin, (long long)s->n, (long long)trained,
         v->color ? "\033[0m" : "");
  bool inside = false;
  for (int64_t i = 0; i < s->n; i++) {
    const esp_data_token *t = &s->tokens[i];
    bool on = t->weight != 0;
    if (v->color) /* trained: green; neighbouring tokens differ by underline */
      printf("\033[0;%s%sm", on ? "32" : "90", i & 1 ? ";4" : "");
    else if (on != inside)
      putchar(on ? '[' : ']');
    inside = on;
    show_text(t->text ? t->text : "");
    if (v->ids) printf("<%d>", t->id);
    if (v->color) fputs("\033[0m", stdout);
    if (t->text && strchr(t->text, '\n')) putchar('\n'); /* breaks where the text does */
  }
  if (inside && !v->color) putchar(']');
  putchar('\n');
}

static int data(cli_args *a) {
  esp_job *job;
  int code;
  int64_t count = 3;
  view v = {.json = a->json, .ids = cli_flag(a, "ids"), .task = cli_value(a, "task")};
  const char *color = cli_value(a, "color");
  if (!cli_integer(a, "show", 1, 1000000, &count)) return ESP_ERR_RECIPE;
  if (color && strcmp(color, "auto") && strcmp(color, "always") && strcmp(color, "never"))
    return cli_usage_error(a->verb, "--color: '%s' is not one of auto, always, never", color);
  v.color = color && strcmp(color, "auto") ? !strcmp(color, "always") : cli_color(stdout);
  if (!cli_open_job(a, &job, &code)) return code;
  esp_status st = esp_job_data(job, v.task, count, show, &v);
  code = st == ESP_OK ? 0 : cli_fail(st);
  esp_job_close(job);
  return code;
}

const cli_verb cli_data = {
    "data",
    NULL,
    "RECIPE [key=value ...]",
    1,
    1,
    true,
    "show the tokens with their loss mask",
    "Tokenises as in training. On a terminal trained tokens are green and the others grey, every second token\n"
    "underlined; elsewhere trained runs stand in [brackets].",
    CLI_OPTIONS(options),
    data};
