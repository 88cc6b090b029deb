/* generate.c: `espalier generate`: completions from a model, with or without an adapter. */
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"

static const cli_option options[] = {
    {"model", "DIR", 'm', true, "Hugging Face model directory"},
    {"adapter", "DIR", 'a', false, "PEFT adapter directory"},
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

static int generate(cli_args *a) {
  enum { MAX_PROMPTS = 256 };
  const char *prompts[MAX_PROMPTS];
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
  const char *device = cli_value(a, "device");
  if (device && !cli_override(a, "parallel.device", device)) return ESP_ERR_MEMORY;
  esp_status st = threads ? esp_set_threads((int)threads) : ESP_OK;
  if (st == ESP_OK) st = esp_session_open(cli_value(a, "model"), a->overrides, a->n_overrides, &s);
  if (st == ESP_OK && cli_value(a, "adapter")) st = esp_session_attach(s, cli_value(a, "adapter"));
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
  int code = st == ESP_OK ? 0 : cli_fail(st);
  for (int i = 0; i < n; i++) esp_free(texts[i]);
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
    "All prompts form one batch with a key-value cache. Greedy unless --temperature is given.",
    CLI_OPTIONS(options),
    generate};
