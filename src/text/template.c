/* template.c: the built-in chat templates. Byte for byte what the Jinja templates that the models ship with print:
 *   chatml   Qwen1.5 and others: no default system message
 *   llama3   Meta-Llama-3-Instruct: contents trimmed
 *   mistral  Mistral-7B-Instruct v0.1 and v0.2 (tokenizer V1): the system message joins the first user message
 *   gemma    gemma-it: contents trimmed, assistant is called model, no system message
 *   alpaca   Stanford's headings, each answer ended by the tokenizer's EOS (an empty terminator segment)
 * The blank that Mistral's template prints between [/INST] and an answer belongs to the answer: a generating model has
 * to produce it, and in the tokenizer it is part of the answer's first word. */
#include "text/template.h"

#include <string.h>

#include "core/arena.h"
#include "text/template_priv.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

typedef struct builder {
  esp_rendered *out;
  esp_arena *arena;
  int cap;
  bool failed;
} builder;

static void add(builder *b, const char *text, size_t len, int message, bool content, bool terminator) {
  if (b->out->n == b->cap) {
    int cap = b->cap * 2 + 32;
    esp_segment *grown = esp_arena_alloc(b->arena, sizeof *grown * (size_t)cap);
    if (!grown) {
      b->failed = true;
      return;
    }
    if (b->out->n) memcpy(grown, b->out->segments, sizeof *grown * (size_t)b->out->n);
    b->out->segments = grown;
    b->cap = cap;
  }
  b->out->segments[b->out->n++] = (esp_segment){text, len, message, content, terminator};
}

static void literal(builder *b, const char *text, int message) {
  add(b, text, strlen(text), message, false, false);
}
static void terminator(builder *b, const char *text, int message) {
  add(b, text, strlen(text), message, false, true);
}

/* Python's str.strip(): Unicode white space, and the four ASCII separators. */
static bool strips(uint32_t cp) {
  return esp_cp_space(cp) || (cp >= 0x1C && cp <= 0x1F);
}

static void content(builder *b, const char *text, int message, bool trim) {
  size_t n = strlen(text), from = 0;
  int len;
  if (trim && esp_utf8_valid(text, n) == n) {
    while (from < n && strips(esp_utf8_get(text + from, &len))) from += (size_t)len;
    while (n > from && strips(esp_utf8_get(text + n - esp_utf8_back(text + n), &len)))
      n -= (size_t)esp_utf8_back(text + n);
  }
  add(b, text + from, n - from, message, true, false);
}

static bool is(const esp_message *m, const char *role) {
  return !strcmp(m->role, role);
}

static esp_status chatml(builder *b, const esp_message *m, int n, bool generation) {
  for (int i = 0; i < n; i++) {
    literal(b, "<|im_start|>", i);
    literal(b, m[i].role, i);
    literal(b, "\n", i);
    content(b, m[i].content, i, false);
    terminator(b, "<|im_end|>", i);
    literal(b, "\n", -1);
  }
  if (generation) literal(b, "<|im_start|>assistant\n", -1);
  return ESP_OK;
}

static esp_status llama3(builder *b, const esp_message *m, int n, bool generation) {
  for (int i = 0; i < n; i++) {
    if (i == 0) literal(b, "<|begin_of_text|>", -1);
    literal(b, "<|start_header_id|>", i);
    literal(b, m[i].role, i);
    literal(b, "<|end_header_id|>\n\n", i);
    content(b, m[i].content, i, true);
    terminator(b, "<|eot_id|>", i);
  }
  if (generation) literal(b, "<|start_header_id|>assistant<|end_header_id|>\n\n", -1);
  return ESP_OK;
}

/* Turns after the optional system message must alternate, user first. */
static esp_status alternate(const char *name, const esp_message *m, int n, int first) {
  for (int i = first; i < n; i++) {
    if (!is(&m[i], "user") && !is(&m[i], "assistant"))
      return esp_fail(ESP_ERR_DATA, "message %d: template %s has no role '%s'", i + 1, name, m[i].role);
    if (is(&m[i], "user") != ((i - first) % 2 == 0))
      return esp_fail(ESP_ERR_DATA, "message %d: template %s needs user and assistant in turn, user first", i + 1,
                      name);
  }
  return ESP_OK;
}

static esp_status mistral(builder *b, const esp_message *m, int n, bool generation) {
  int first = n > 0 && is(&m[0], "system");
  ESP_TRY(alternate("mistral", m, n, first));
  literal(b, "<s>", -1);
  for (int i = first; i < n; i++) {
    if (is(&m[i], "user")) {
      literal(b, " [INST] ", i);
      if (first && i == first) {
        content(b, m[0].content, 0, false);
        literal(b, "\n\n", i);
      }
      content(b, m[i].content, i, false);
      literal(b, " [/INST]", i);
    } else {
      add(b, " ", 1, i, true, false);
      content(b, m[i].content, i, false);
      terminator(b, "</s>", i);
    }
  }
  return ESP_OK;
}

static esp_status gemma(builder *b, const esp_message *m, int n, bool generation) {
  if (n > 0 && is(&m[0], "system")) return esp_fail(ESP_ERR_DATA, "message 1: template gemma has no system role");
  ESP_TRY(alternate("gemma", m, n, 0));
  literal(b, "<bos>", -1);
  for (int i = 0; i < n; i++) {
    literal(b, "<start_of_turn>", i);
    literal(b, is(&m[i], "assistant") ? "model" : m[i].role, i);
    literal(b, "\n", i);
    content(b, m[i].content, i, true);
    terminator(b, "<end_of_turn>", i);
    literal(b, "\n", -1);
  }
  if (generation) literal(b, "<start_of_turn>model\n", -1);
  return ESP_OK;
}

static esp_status alpaca(builder *b, const esp_message *m, int n, bool generation) {
  int first = n > 0 && is(&m[0], "system");
  ESP_TRY(alternate("alpaca", m, n, first));
  if (first)
    content(b, m[0].content, 0, false);
  else
    literal(b, ESP_ALPACA_INTRO, -1);
  literal(b, "\n\n", -1);
  for (int i = first; i < n; i++) {
    literal(b, is(&m[i], "user") ? "### Instruction:\n" : "### Response:\n", i);
    content(b, m[i].content, i, false);
    if (is(&m[i], "assistant")) terminator(b, "", i);
    literal(b, "\n\n", -1);
  }
  if (generation) literal(b, "### Response:\n", -1);
  return ESP_OK;
}

static const char *const names[] = {"chatml", "llama3", "mistral", "gemma", "alpaca"};
static esp_status (*const renders[])(builder *, const esp_message *, int, bool) = {chatml, llama3, mistral, gemma,
                                                                                   alpaca};
enum { N_TEMPLATES = sizeof names / sizeof *names };

const char *const *esp_template_names(int *n) {
  *n = N_TEMPLATES;
  return names;
}

const char *const *esp_template_tokens(const char *name) {
  static const char *const tokens[N_TEMPLATES][5] = {
      {"<|im_end|>", "<|im_start|>"},
      {"<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"},
      {"</s>", "<s>"},
      {"<end_of_turn>", "<bos>", "<start_of_turn>"},
      {NULL}};
  for (int i = 0; i < N_TEMPLATES; i++)
    if (!strcmp(names[i], name)) return tokens[i];
  return NULL;
}

esp_status esp_template_render(const char *name, const esp_message *messages, int n, bool generation_prompt,
                               esp_rendered *out) {
  memset(out, 0, sizeof *out);
  int k = 0;
  while (k < N_TEMPLATES && strcmp(names[k], name)) k++;
  if (k == N_TEMPLATES) return esp_fail(ESP_ERR_RECIPE, "no built-in chat template '%s'", name);
  builder b = {out, esp_arena_create(ESP_MEM_DATA), 0, false};
  if (!b.arena) return ESP_ERR_MEMORY;
  out->owner = b.arena;
  esp_status st = renders[k](&b, messages, n, generation_prompt);
  if (st == ESP_OK && b.failed) st = ESP_ERR_MEMORY;
  if (st != ESP_OK) esp_rendered_deinit(out);
  return st;
}

void esp_rendered_deinit(esp_rendered *r) {
  esp_arena_destroy(r->owner);
  memset(r, 0, sizeof *r);
}

const char *esp_template_suggest(const struct esp_tokenizer *t) {
  for (int i = 0; i + 1 < N_TEMPLATES; i++) { /* alpaca needs no tokens, so it tells nothing */
    bool all = true;
    for (const char *const *token = esp_template_tokens(names[i]); *token; token++)
      all = all && esp_tokenizer_id(t, *token) >= 0;
    /* "<s>" and "</s>" alone are in every Llama-2 vocabulary: Mistral's marks must be there as well. */
    if (all && !strcmp(names[i], "mistral")) all = esp_tokenizer_id(t, "[INST]") >= 0;
    if (all) return names[i];
  }
  return NULL;
}
