/* generate.c: `espalier generate`: completions from a model, with or without an adapter. */
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"

static const cli_option options[] = {
    {"model", "DIR", 'm', true, "Hugging Face model directory"},
    {"adapter", "DIR[:W]", 'a', false, "PEFT adapter directory, with a weight (default 1); may be repeated: their sum"},
    {"use", "N", 'u', false, "the one adapter of a prompt, counted from 1, 0 for the base; once for each prompt"},
    {"prompt", "TEXT", 'p', false, "prompt; may be repeated: one batch. Without it the standard input is the prompt"},
    {"max-new-tokens", "N", 'n', false, "tokens to make at most (default 64)"},
    {"temperature", "T", 0, false, "0: greedy (default)"},
    {"top-p", "P", 0, false, "sample from the likeliest tokens that hold this much probability"},
    {"top-k", "K", 0, false, "sample from the K likeliest tokens"},
    {"seed", "N", 0, false, "of the sampling (default 0)"},
    {"raw", NULL, 0, false, "the prompt as it is, without BOS"},
    {"threads", "N", 't', false, "threads of this process"},
    {"device", "NAME", 'd', false, "auto, cpu, cuda or cuda:N"},
    {"set", "KEY=VALUE", 0, false, "a setting, e.g. model.dtype=fp32; as a plain argument too"},
};

static char *read_stdin(void) {
  size_t n = 0, cap = 4096;
  char *text = malloc(cap + 1);
  for (size_t got; text && (got = fread(text + n, 1, cap - n, stdin)) > 0;) {
    n += got;
    if (n < cap) continue;
    char *more = realloc(text, 2 * cap + 1);
    if (!more) free(text);
    text = more;
    cap *= 2;
  }
  if (!text) return NULL;
  while (n && (text[n - 1] == '\n' || text[n - 1] == '\r')) n--; /* the shell's line end is not part of the prompt */
  text[n] = 0;
  return text;
}

enum { MAX_PROMPTS = 256, MAX_ADAPTERS = 63 };

/* One adapter per prompt; NULL in *list: all of them for all. */
static bool choices(const cli_args *a, int prompts, int adapters, int32_t *use, const int32_t **list) {
  const char *values[MAX_PROMPTS];
  int n = cli_values(a, "use", values, MAX_PROMPTS);
  *list = n ? use : NULL;
  if (n && n != prompts) {
    cli_usage_error(a->verb, "--use: %d for %d prompts", n, prompts);
    return false;
  }
  for (int i = 0; i < n; i++) {
    char *end;
    long k = strtol(values[i], &end, 10);
    if (end == values[i] || *end || k < 0 || k > adapters) {
      cli_usage_error(a->verb, "--use: '%s' is none of the adapters 1 to %d, or 0 for the base", values[i], adapters);
      return false;
    }
    use[i] = (int32_t)k - 1;
  }
  return true;
}

typedef struct adapters {
  int n;
  char *dirs[MAX_ADAPTERS];
  double weights[MAX_ADAPTERS];
} adapters;

static bool read_adapters(const cli_args *a, adapters *list) {
  const char *values[MAX_ADAPTERS];
  list->n = cli_values(a, "adapter", values, MAX_ADAPTERS);
  for (int i = 0; i < list->n; i++)
    if (!cli_weighted(a->verb, values[i], &list->dirs[i], &list->weights[i])) return false;
  return true;
}

/* The first is attached, so that a base that it replaces is never loaded. */
static esp_status add_adapters(esp_session *s, const adapters *list) {
  for (int i = 0; i < list->n; i++) {
    bool attach = i == 0 && list->weights[i] == 1;
    esp_status st = attach ? esp_session_attach(s, list->dirs[i]) : esp_session_add(s, list->dirs[i], list->weights[i]);
    if (st != ESP_OK) return st;
  }
  return ESP_OK;
}

static int generate(cli_args *a) {
  const char *prompts[MAX_PROMPTS];
  adapters list = {0};
  int32_t use[MAX_PROMPTS];
  char *texts[MAX_PROMPTS] = {0}, *from_stdin = NULL;
  esp_generate_options o = {.max_new_tokens = 64};
  int64_t top_k = 0, seed = 0, threads = 0;
  esp_session *s = NULL;
  if (!cli_integer(a, "max-new-tokens", 1, 1 << 20, &o.max_new_tokens) ||
      !cli_integer(a, "top-k", 0, 1 << 30, &top_k) || !cli_integer(a, "seed", 0, INT64_MAX, &seed) ||
      !cli_integer(a, "threads", 1, 4096, &threads) || !cli_number(a, "temperature", 0, 100, &o.temperature) ||
      !cli_number(a, "top-p", 0, 1, &o.top_p))
    return ESP_ERR_RECIPE;
  if ((top_k || o.top_p > 0) && o.temperature == 0)
    return cli_usage_error(a->verb, "--top-k and --top-p need --temperature above 0");
  o.top_k = (int)top_k;
  o.seed = (uint64_t)seed;
  o.raw = cli_flag(a, "raw");
  int n = cli_values(a, "prompt", prompts, MAX_PROMPTS);
  if (!n) {
    from_stdin = read_stdin();
    if (!from_stdin) return cli_usage_error(a->verb, "cannot read the standard input");
    prompts[n++] = from_stdin;
  }
  int code = ESP_ERR_RECIPE;
  if (!read_adapters(a, &list) || !choices(a, n, list.n, use, &o.adapters)) goto out;
  const char *device = cli_value(a, "device");
  if (device && !cli_override(a, "parallel.device", device)) goto out;
  esp_status st = threads ? esp_set_threads((int)threads) : ESP_OK;
  if (st == ESP_OK) st = esp_session_open(cli_value(a, "model"), a->overrides, a->n_overrides, &s);
  if (st == ESP_OK) st = add_adapters(s, &list);
  if (st == ESP_OK) st = esp_session_generate(s, prompts, n, &o, texts);
  for (int i = 0; st == ESP_OK && i < n; i++) {
    if (a->json) {
      fputs("{\"prompt\": ", stdout);
      cli_json_string(stdout, prompts[i]);
      fputs(", \"text\": ", stdout);
      cli_json_string(stdout, texts[i]);
      puts("}");
    } else {
      printf("%s%s\n", n > 1 && i ? "---\n" : "", texts[i]);
    }
  }
  code = st == ESP_OK ? 0 : cli_fail(st);
out:
  for (int i = 0; i < n; i++) esp_free(texts[i]);
  for (int i = 0; i < list.n; i++) free(list.dirs[i]);
  free(from_stdin);
  esp_session_close(s);
  return code;
}

const cli_verb cli_generate = {
    "generate",
    NULL,
    "[key=value ...]",
    0,
    0,
    true,
    "complete prompts with a model and an adapter",
    "All prompts form one batch with a key-value cache. Greedy unless --temperature is given. Several adapters add\n"
    "up, or each prompt uses one of them (--use).",
    CLI_OPTIONS(options),
    generate};
