/* rows.c: a row of JSONL becomes runs of text that are trained or not. */
#include <string.h>

#include "core/map.h"
#include "text/data_priv.h"
#include "text/template_priv.h"

static const char *const format_names[] = {"auto",           "prompt_completion", "alpaca",
                                           "text",           "messages",          "sharegpt",
                                           "classification", "cl_benchmark",      "natural_instructions"};

const char *esp_format_name(esp_data_format f) {
  return format_names[f];
}

esp_data_format esp_format_detect(const json_t *row) {
  if (json_object_get(row, "messages")) return ESP_FMT_MESSAGES;
  if (json_object_get(row, "conversations")) return ESP_FMT_SHAREGPT;
  if (json_object_get(row, "instruction")) return ESP_FMT_ALPACA;
  if (json_object_get(row, "prompt")) return ESP_FMT_PROMPT_COMPLETION;
  if (json_object_get(row, "text") && json_object_get(row, "label")) return ESP_FMT_CLASSIFICATION;
  if (json_object_get(row, "sentence") && json_object_get(row, "label")) return ESP_FMT_CL_BENCHMARK;
  if (json_object_get(row, "text")) return ESP_FMT_TEXT;
  return ESP_FMT_AUTO;
}

static esp_status add_run(esp_row *r, const char *text, size_t n, bool train, bool prompt, bool eos) {
  if (!n && !eos) return ESP_OK;
  if (r->n_runs == r->cap_runs) {
    int cap = r->cap_runs * 2 + 16;
    esp_run *grown = esp_arena_alloc(r->arena, sizeof *grown * (size_t)cap);
    if (!grown) return ESP_ERR_MEMORY;
    if (r->n_runs) memcpy(grown, r->runs, sizeof *grown * (size_t)r->n_runs);
    r->runs = grown;
    r->cap_runs = cap;
  }
  r->runs[r->n_runs++] = (esp_run){text, n, train, eos, prompt};
  return ESP_OK;
}

/* A string member; `required` 0: NULL stays NULL when absent or null. */
static esp_status text_of(const json_t *j, const char *key, const char *where, bool required, const char **out) {
  const json_t *v = json_object_get(j, key);
  if (!v || json_is_null(v)) {
    if (required) return esp_fail(ESP_ERR_DATA, "%s: missing key '%s'", where, key);
    return ESP_OK;
  }
  if (!json_is_string(v)) return esp_fail(ESP_ERR_DATA, "%s: key '%s' must be a string", where, key);
  *out = json_string_value(v);
  return ESP_OK;
}

static esp_status eos_run(const esp_source_ctx *c, const char *where, bool train, esp_row *r) {
  if (esp_tokenizer_eos(c->tok) < 0) {
    if (!train) return ESP_OK;
    return esp_fail(ESP_ERR_DATA,
                    "%s: the tokenizer has no EOS token, so the end of an answer cannot be trained (train_on_eos: none "
                    "trains without)",
                    where);
  }
  return add_run(r, NULL, 0, train, false, true);
}

/* prompt, answer, EOS: what four of the formats come down to. */
static esp_status prompt_answer(const esp_source_ctx *c, const char *prompt, const char *answer, const char *where,
                                esp_row *r) {
  bool all = c->cfg->train_on == ESP_TRAIN_ALL, end = c->eos_mode > 0;
  r->bos = c->cfg->add_bos;
  r->answer = answer;
  r->turns = 1;
  r->terminated = end;
  ESP_TRY(add_run(r, prompt, strlen(prompt), all, true, false));
  ESP_TRY(add_run(r, answer, strlen(answer), true, false, false));
  return end || esp_tokenizer_eos(c->tok) >= 0 ? eos_run(c, where, end, r) : ESP_OK;
}

static esp_status prompt_completion(const esp_source_ctx *c, const json_t *j, const char *where, esp_row *r) {
  const char *prompt = NULL, *completion = NULL;
  ESP_TRY(text_of(j, "prompt", where, true, &prompt));
  const json_t *references = json_object_get(j, "references");
  if (!json_object_get(j, "completion") && json_is_array(references)) { /* evaluation rows with several answers */
    completion = json_string_value(json_array_get(references, 0));
    if (!completion) return esp_fail(ESP_ERR_DATA, "%s: key 'references' must be a list of strings", where);
  } else {
    bool answer = !json_object_get(j, "completion") && json_object_get(j, "answer"); /* TRACE's word for it */
    ESP_TRY(text_of(j, answer ? "answer" : "completion", where, true, &completion));
  }
  return prompt_answer(c, prompt, completion, where, r);
}

static esp_status text_row(const esp_source_ctx *c, const json_t *j, const char *where, esp_row *r) {
  const char *text = NULL;
  ESP_TRY(text_of(j, "text", where, true, &text));
  r->bos = c->cfg->add_bos;
  r->answer = ""; /* there is no question; a copy of every text would only cost memory */
  r->turns = 1;
  r->terminated = c->eos_mode > 0;
  ESP_TRY(add_run(r, text, strlen(text), true, false, false));
  return c->eos_mode > 0 || esp_tokenizer_eos(c->tok) >= 0 ? eos_run(c, where, c->eos_mode > 0, r) : ESP_OK;
}

/* ---- classification ---- */
char *esp_classification_prompt(const esp_source_ctx *c, const char *text, esp_arena *a) {
  const char *form = c->src->prompt_template ? c->src->prompt_template : "{text}\n";
  esp_strbuf b;
  esp_strbuf_init(&b);
  while (*form) {
    if (!strncmp(form, "{text}", 6)) {
      esp_strbuf_puts(&b, text);
      form += 6;
    } else if (!strncmp(form, "{labels}", 8)) {
      esp_strbuf_puts(&b, c->labels_text);
      form += 8;
    } else if (!strncmp(form, "{definition}", 12) && c->definition) {
      esp_strbuf_puts(&b, c->definition);
      form += 12;
    } else {
      esp_strbuf_putc(&b, *form++);
    }
  }
  char *out = b.failed ? NULL : esp_arena_strndup(a, b.data ? b.data : "", b.len);
  esp_strbuf_deinit(&b);
  return out;
}

static esp_status classification(const esp_source_ctx *c, const json_t *j, const char *where, esp_row *r) {
  const char *text = NULL, *label = NULL;
  const esp_data_source *s = c->src;
  ESP_TRY(text_of(j, c->text_key, where, true, &text));
  const json_t *v = json_object_get(j, c->label_key);
  if (json_is_array(v)) { /* several right answers */
    if (!(label = json_string_value(json_array_get(v, 0))))
      return esp_fail(ESP_ERR_DATA, "%s: key '%s' must be a string or a list of strings", where, c->label_key);
  } else if (json_is_integer(v)) { /* an index into the labels, else its digits */
    int64_t k = json_integer_value(v);
    if (s->n_labels && k >= 0 && k < s->n_labels)
      label = s->labels[k];
    else if (!(label = esp_arena_printf(r->arena, "%lld", (long long)k)))
      return ESP_ERR_MEMORY;
  } else {
    ESP_TRY(text_of(j, c->label_key, where, true, &label));
  }
  /* "-": the annotators did not agree (MNLI). It stays, as no answer is right in the benchmark's own scores either. */
  bool known = s->n_labels == 0 || (c->published && !strcmp(label, "-"));
  for (int i = 0; i < s->n_labels; i++) known = known || !strcmp(label, s->labels[i]);
  if (!known) {
    const char *near = esp_closest(label, s->labels, s->n_labels);
    return esp_fail(ESP_ERR_DATA, "%s: label '%s' is not one of: %s%s%s%s", where, label, c->labels_text,
                    near ? " (did you mean '" : "", near ? near : "", near ? "'?)" : "");
  }
  char *prompt = esp_classification_prompt(c, text, r->arena);
  if (!prompt) return ESP_ERR_MEMORY;
  if (c->format == ESP_FMT_CLASSIFICATION) r->label = label;
  return prompt_answer(c, prompt, label, where, r);
}

/* ---- messages ---- */
static esp_status render(const esp_source_ctx *c, const esp_message *m, int n, const char *where, esp_row *r) {
  esp_rendered out;
  if (esp_template_render(c->chat, m, n, false, &out) != ESP_OK) return esp_fail_context(ESP_ERR_DATA, "%s", where);
  int last = -1; /* the last trained turn */
  bool all = c->cfg->train_on == ESP_TRAIN_ALL;
  bool *train = esp_arena_alloc(r->arena, (size_t)(n + 1));
  esp_status st = train ? ESP_OK : ESP_ERR_MEMORY;
  int last_assistant = -1;
  for (int i = 0; i < n; i++)
    if (!strcmp(m[i].role, "assistant")) last_assistant = i;
  for (int i = 0; i < n && train; i++) {
    bool by_role = !strcmp(m[i].role, "assistant") && (!c->cfg->mask_history || i == last_assistant);
    train[i] = m[i].train < 0 ? by_role : m[i].train;
    if (train[i]) last = i;
    r->turns += train[i];
  }
  bool in_prompt = last >= 0;
  for (int i = 0; i < out.n && st == ESP_OK; i++) {
    const esp_segment *s = &out.segments[i];
    bool mine = s->message >= 0 && train[s->message];
    bool trained = mine && s->content;
    if (s->terminator) {
      trained = mine && (c->eos_mode == 2 || (c->eos_mode == 1 && s->message == last));
      r->terminated += trained;
    }
    if (s->message == last && s->content) in_prompt = false;
    if (s->terminator && !s->len) {
      if (trained || esp_tokenizer_eos(c->tok) >= 0) st = eos_run(c, where, trained || all, r);
      continue;
    }
    char *copy = esp_arena_strndup(r->arena, s->text, s->len);
    st = copy ? add_run(r, copy, s->len, trained || all, in_prompt, false) : ESP_ERR_MEMORY;
  }
  r->bos = c->cfg->add_bos && !strcmp(c->chat, "alpaca");
  r->answer = last >= 0 ? m[last].content : "";
  esp_rendered_deinit(&out);
  return st;
}

static esp_status content_of(const json_t *m, const char *key, const char *where, esp_arena *a, const char **out) {
  const json_t *v = json_object_get(m, key);
  if (!json_is_array(v)) return text_of(m, key, where, true, out);
  esp_strbuf b; /* a list of parts: text only */
  esp_strbuf_init(&b);
  esp_status st = ESP_OK;
  for (size_t i = 0; i < json_array_size(v) && st == ESP_OK; i++) {
    const json_t *part = json_array_get(v, i);
    const char *text = json_string_value(json_object_get(part, "text"));
    if (text)
      esp_strbuf_puts(&b, text);
    else
      st = esp_fail(ESP_ERR_DATA, "%s: content part %zu is not text", where, i + 1);
  }
  if (st == ESP_OK && !(*out = esp_arena_strdup(a, b.data ? b.data : ""))) st = ESP_ERR_MEMORY;
  esp_strbuf_deinit(&b);
  return st;
}

static int train_flag(const json_t *m) {
  static const char *const keys[] = {"train", "training", "weight"};
  for (int i = 0; i < 3; i++) {
    const json_t *v = json_object_get(m, keys[i]);
    if (json_is_boolean(v)) return json_is_true(v);
    if (json_is_number(v)) return json_number_value(v) != 0;
  }
  return -1;
}

static esp_status conversation(const esp_source_ctx *c, const json_t *j, const char *where, esp_row *r) {
  static const char *const map[][2] = {{"human", "user"},
                                       {"user", "user"},
                                       {"gpt", "assistant"},
                                       {"assistant", "assistant"},
                                       {"chatgpt", "assistant"},
                                       {"model", "assistant"},
                                       {"system", "system"},
                                       {"tool", "tool"},
                                       {"observation", "tool"},
                                       {"function_response", "tool"},
                                       {"function_call", "assistant"}};
  bool sharegpt = c->format == ESP_FMT_SHAREGPT;
  const char *list_key = sharegpt ? "conversations" : "messages", *role_key = sharegpt ? "from" : "role";
  const json_t *list = json_object_get(j, list_key);
  const char *system = NULL;
  if (!list) return esp_fail(ESP_ERR_DATA, "%s: missing key '%s'", where, list_key);
  if (!json_is_array(list)) return esp_fail(ESP_ERR_DATA, "%s: key '%s' must be a list", where, list_key);
  if (json_array_size(list) == 0) return esp_fail(ESP_ERR_DATA, "%s: '%s' is empty", where, list_key);
  if (sharegpt) ESP_TRY(text_of(j, "system", where, false, &system));
  int n = 0;
  esp_message *m = esp_arena_alloc(r->arena, sizeof *m * (json_array_size(list) + 1));
  if (!m) return ESP_ERR_MEMORY;
  if (system && *system) m[n++] = (esp_message){"system", system, -1};
  for (size_t i = 0; i < json_array_size(list); i++) {
    const json_t *item = json_array_get(list, i);
    const char *role = NULL, *known = NULL;
    if (!json_is_object(item)) return esp_fail(ESP_ERR_DATA, "%s: message %zu must be an object", where, i + 1);
    ESP_TRY(text_of(item, role_key, where, true, &role));
    if (json_is_array(json_object_get(item, "tool_calls")))
      return esp_fail(ESP_ERR_DATA, "%s: message %zu: tool_calls are not supported", where, i + 1);
    for (size_t k = 0; k < sizeof map / sizeof *map && !known; k++)
      if (!strcmp(role, map[k][0]) && (sharegpt || !strcmp(map[k][0], map[k][1]))) known = map[k][1];
    if (!known)
      return esp_fail(ESP_ERR_DATA, "%s: message %zu: unknown role '%s' (%s)", where, i + 1, role,
                      sharegpt ? "human, gpt, system, tool" : "system, user, assistant, tool");
    m[n].role = known;
    ESP_TRY(content_of(item, sharegpt ? "value" : "content", where, r->arena, &m[n].content));
    m[n++].train = train_flag(item);
  }
  return render(c, m, n, where, r);
}

/* ---- alpaca ---- */
static esp_status alpaca(const esp_source_ctx *c, const json_t *j, const char *where, esp_row *r) {
  const char *instruction = NULL, *input = NULL, *output = NULL, *system = NULL;
  ESP_TRY(text_of(j, "instruction", where, true, &instruction));
  ESP_TRY(text_of(j, "input", where, false, &input));
  ESP_TRY(text_of(j, "output", where, true, &output));
  ESP_TRY(text_of(j, "system", where, false, &system));
  bool has_input = input && *input, has_system = system && *system;
  if (c->chat && strcmp(c->chat, "alpaca")) { /* a chat template was chosen: the row is one exchange */
    esp_message m[3];
    int n = 0;
    char *user =
        has_input ? esp_arena_printf(r->arena, "%s\n%s", instruction, input) : esp_arena_strdup(r->arena, instruction);
    if (!user) return ESP_ERR_MEMORY;
    if (has_system) m[n++] = (esp_message){"system", system, -1};
    m[n++] = (esp_message){"user", user, -1};
    m[n++] = (esp_message){"assistant", output, -1};
    return render(c, m, n, where, r);
  }
  const char *intro = has_system ? system : has_input ? ESP_ALPACA_INTRO_INPUT : ESP_ALPACA_INTRO;
  char *prompt = has_input
                     ? esp_arena_printf(r->arena, "%s\n\n### Instruction:\n%s\n\n### Input:\n%s\n\n### Response:\n",
                                        intro, instruction, input)
                     : esp_arena_printf(r->arena, "%s\n\n### Instruction:\n%s\n\n### Response:\n", intro, instruction);
  if (!prompt) return ESP_ERR_MEMORY;
  return prompt_answer(c, prompt, output, where, r);
}

esp_status esp_row_check_template(const esp_source_ctx *c, const char *where) {
  if (!c->chat) {
    const char *suggest = esp_template_suggest(c->tok);
    return esp_fail(ESP_ERR_DATA,
                    "%s: chat_template: auto: %s; choose one of builtin:chatml, llama3, mistral, gemma, alpaca "
                    "(this tokenizer's special tokens fit %s%s)",
                    where,
                    esp_tokenizer_has_chat_template(c->tok) ? "the model's own template cannot be rendered yet"
                                                            : "the model has no template",
                    suggest ? "builtin:" : "only builtin:alpaca", suggest ? suggest : "");
  }
  for (const char *const *t = esp_template_tokens(c->chat); *t; t++)
    if (esp_tokenizer_id(c->tok, *t) < 0) {
      const char *suggest = esp_template_suggest(c->tok);
      return esp_fail(ESP_ERR_DATA,
                      "%s: chat_template builtin:%s needs the token '%s', which the tokenizer lacks (try "
                      "builtin:%s)",
                      where, c->chat, *t, suggest ? suggest : "alpaca");
    }
  return ESP_OK;
}

esp_status esp_row_build(const esp_source_ctx *c, const json_t *j, const char *where, esp_row *row) {
  if (!json_is_object(j)) return esp_fail(ESP_ERR_DATA, "%s: a row must be a JSON object", where);
  switch (c->format) {
  case ESP_FMT_PROMPT_COMPLETION:
    return prompt_completion(c, j, where, row);
  case ESP_FMT_ALPACA:
    return alpaca(c, j, where, row);
  case ESP_FMT_TEXT:
    return text_row(c, j, where, row);
  case ESP_FMT_MESSAGES:
  case ESP_FMT_SHAREGPT:
    return conversation(c, j, where, row);
  case ESP_FMT_CLASSIFICATION:
  case ESP_FMT_CL_BENCHMARK:
  case ESP_FMT_NATURAL_INSTRUCTIONS: /* without labels: the output is free text */
    return classification(c, j, where, row);
  case ESP_FMT_AUTO:
    break;
  }
  return esp_fail(ESP_ERR_DATA,
                  "%s: the format is not recognisable: expected the keys messages, conversations, instruction, "
                  "prompt+completion, prompt+answer, text+label, sentence+label or text",
                  where);
}
