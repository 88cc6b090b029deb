/* source.c: from the path of a data source to the rows of a file. A path is a file or a folder that holds one per
 * split; a file holds a row per line, an array of rows, or an object with a list of `Instances`. The layouts of
 * continual learning are read as they are published:
 *
 *   TRACE (BeyonderXX/TRACE)        <task>/{train,eval,test}.json          [{prompt, answer}]
 *   O-LoRA (cmnfriend/O-LoRA)       <group>/<dataset>/{train,dev,test}.json [{sentence, label}], labels.json beside it
 *   SAPT, natural instructions      <group>/<task>/{train,dev,test}.json   {Definition, Instances: [{input, output}]}
 *
 * and get the prompts that those projects give them. */
#include <stdio.h>
#include <string.h>

#include "io/json.h"
#include "text/data_priv.h"
#include "text/json_scan.h"

/* ---- the file ---- */

/* `dev` and `eval` are two words for one split. */
static esp_status find_split(const esp_data_source *s, esp_arena *arena, const char **out) {
  const char *split = s->split ? s->split : "train";
  bool dev = !strcmp(split, "dev") || !strcmp(split, "eval");
  const char *const names[] = {split, dev ? "dev" : split, dev ? "eval" : split};
  static const char *const ends[] = {".json", ".jsonl"};
  for (int i = 0; i < 6; i++) {
    char *path = esp_arena_printf(arena, "%s/%s%s", s->path, names[i / 2], ends[i % 2]);
    if (!path) return ESP_ERR_MEMORY;
    *out = path;
    if (esp_file_exists(path)) return ESP_OK;
  }
  return esp_fail(ESP_ERR_DATA, "%s: this folder holds no %s.json and no %s.jsonl", s->path, split, split);
}

/* The last but `up` component of a path. */
static char *component(const char *path, int up, esp_arena *arena) {
  const char *end = path + strlen(path);
  for (;; up--) {
    const char *begin = end;
    while (begin > path && begin[-1] != '/') begin--;
    if (up == 0) return esp_arena_strndup(arena, begin, (size_t)(end - begin));
    end = begin;
    while (end > path && end[-1] == '/') end--;
  }
}

/* ---- rows ---- */

typedef struct finder {
  esp_source_file *f;
  int64_t cap, limit, line;
  const char *counted; /* lines are counted up to here */
} finder;

static bool full(const finder *w) {
  return w->limit > 0 && w->f->n_rows == w->limit;
}

static esp_status add_row(finder *w, const char *from, const char *to) {
  esp_source_file *f = w->f;
  while ((w->counted = memchr(w->counted, '\n', (size_t)(from - w->counted))) != NULL) w->counted++, w->line++;
  w->counted = from;
  if (f->n_rows == w->cap) {
    w->cap = w->cap * 2 + 1024;
    void *p = esp_mem_realloc(ESP_MEM_DATA, f->rows, (size_t)w->cap * sizeof *f->rows);
    if (!p) return ESP_ERR_MEMORY;
    f->rows = p;
  }
  f->rows[f->n_rows++] = (esp_row_ref){from, (size_t)(to - from), w->line};
  return ESP_OK;
}

static esp_status find_lines(finder *w, const char *p, const char *end) {
  while (p < end && !full(w)) {
    const char *nl = memchr(p, '\n', (size_t)(end - p)), *stop = nl ? nl : end;
    while (stop > p && strchr("\r \t", stop[-1])) stop--;
    if (stop > p) ESP_TRY(add_row(w, p, stop));
    p = nl ? nl + 1 : end;
  }
  return ESP_OK;
}

/* Rows of the array that begins at s->p. */
static esp_status find_elements(finder *w, esp_scan *s, bool last) {
  ESP_TRY(esp_scan_expect(s, '['));
  if (!esp_scan_take(s, ']')) {
    do {
      const char *from, *to;
      if (full(w)) return ESP_OK;
      ESP_TRY(esp_scan_skip(s, &from, &to));
      ESP_TRY(add_row(w, from, to));
    } while (esp_scan_take(s, ','));
    ESP_TRY(esp_scan_expect(s, ']'));
  }
  esp_scan_space(s);
  return last && s->p < s->end ? esp_scan_fail(s, "there is more behind the array of rows") : ESP_OK;
}

/* Definition and the place of Instances in the object at s->p; *instances NULL: it has none. */
static esp_status scan_object(esp_scan *s, esp_arena *arena, const char **definition, const char **instances) {
  ESP_TRY(esp_scan_expect(s, '{'));
  do {
    const char *from, *to, *key, *key_end;
    esp_scan_space(s);
    ESP_TRY(esp_scan_skip(s, &key, &key_end));
    ESP_TRY(esp_scan_expect(s, ':'));
    ESP_TRY(esp_scan_skip(s, &from, &to));
    size_t n = (size_t)(key_end - key);
    if (n == 11 && !memcmp(key, "\"Instances\"", n)) *instances = from;
    if (n != 12 || memcmp(key, "\"Definition\"", n)) continue;
    json_error_t error;
    json_t *j = json_loadb(from, (size_t)(to - from), JSON_DECODE_ANY, &error);
    const char *text = json_string_value(json_is_array(j) ? json_array_get(j, 0) : j);
    if (json_is_array(j) && json_array_size(j) == 0) text = "";
    if (text) {
      size_t a = strspn(text, " \t\r\n"), b = strlen(text);
      while (b > a && strchr(" \t\r\n", text[b - 1])) b--;
      *definition = esp_arena_strndup(arena, text + a, b - a);
    }
    json_decref(j);
    if (!text) return esp_scan_fail(s, "Definition is no text");
    if (!*definition) return ESP_ERR_MEMORY;
  } while (esp_scan_take(s, ','));
  return esp_scan_expect(s, '}');
}

/* ---- formats ---- */

static esp_data_format format_of(const char *text, size_t n) {
  json_t *j = json_loadb(text, n, 0, NULL);
  esp_data_format f = json_is_object(j) ? esp_format_detect(j) : ESP_FMT_AUTO;
  json_decref(j);
  return f;
}

/* What no format has: said by the row reader, with the place. */
static esp_status unrecognised(esp_source_ctx *c, const esp_row_ref *row) {
  esp_row none = {0};
  json_t *empty = json_object();
  char where[1200];
  snprintf(where, sizeof where, "%s:%lld", c->src->path, (long long)row->line);
  esp_status st = empty ? esp_row_build(c, empty, where, &none) : ESP_ERR_MEMORY;
  json_decref(empty);
  return st;
}

/* O-LoRA's instructions by the group's name (configs/instruction_config.json); its own prompt is
 * "Task:<group>\nDataset:<dataset>\n<instruction>Option: <labels> \n<sentence>\nAnswer:". */
static esp_status cl_benchmark_prompt(esp_data_source *s, const char *path, esp_arena *arena) {
  static const char *const instructions[][2] = {
      {"NLI", "What is the logical relationship between the \"sentence 1\" and the \"sentence 2\"? Choose one from the "
              "option.\n"},
      {"QQP", "Whether the \"first sentence\" and the \"second sentence\" have the same meaning? Choose one from the "
              "option.\n"},
      {"SC", "What is the sentiment of the following paragraph? Choose one from the option.\n"},
      {"TC", "What is the topic of the following paragraph? Choose one from the option.\n"},
      {"BoolQA", "According to the following passage, is the question true or false? Choose one from the option.\n"},
      {"MultiRC",
       "According to the following passage and question, is the candidate answer true or false? Choose one from the "
       "option.\n"},
      {"WiC",
       "Given a word and two sentences, whether the word is used with the same sense in both sentence? Choose one from "
       "the option.\n"},
      {"COPA", NULL}};
  const char *group = component(path, 2, arena), *name = component(path, 1, arena);
  if (!group || !name) return ESP_ERR_MEMORY;
  for (size_t i = 0; i < sizeof instructions / sizeof *instructions; i++) {
    if (strcmp(group, instructions[i][0])) continue;
    const char *say = instructions[i][1];
    s->prompt_template = esp_arena_printf(arena, "Task:%s\nDataset:%s\n%s%s{text}\nAnswer:", group, name,
                                          say ? say : "", say ? "Option: {labels} \n" : "");
    return s->prompt_template ? ESP_OK : ESP_ERR_MEMORY;
  }
  return esp_fail(ESP_ERR_DATA,
                  "%s: is in no folder SC, TC, NLI, QQP, BoolQA, MultiRC, WiC or COPA/<dataset>/, so that its question "
                  "is not known: prompt_template must say it",
                  path);
}

/* labels.json beside the file, where the recipe names none. */
static esp_status read_labels(esp_data_source *s, esp_arena *arena) {
  const char *slash = strrchr(s->path, '/');
  char *path = slash ? esp_arena_printf(arena, "%.*s/labels.json", (int)(slash - s->path), s->path)
                     : esp_arena_strdup(arena, "labels.json");
  if (!path) return ESP_ERR_MEMORY;
  if (s->n_labels || !esp_file_exists(path)) return ESP_OK;
  esp_status st = ESP_OK;
  json_t *j = NULL;
  ESP_TRY(esp_json_load(path, &j));
  size_t n = json_array_size(j);
  const char **labels = esp_arena_alloc(arena, sizeof *labels * (n + 1));
  if (!json_is_array(j)) ESP_GOTO(esp_fail(ESP_ERR_DATA, "%s: must be a list of labels", path));
  for (size_t i = 0; labels && i < n; i++) {
    const char *text = json_string_value(json_array_get(j, i));
    if (!text) ESP_GOTO(esp_fail(ESP_ERR_DATA, "%s: label %zu is no text", path, i + 1));
    if (!(labels[i] = esp_arena_strdup(arena, text))) ESP_GOTO(ESP_ERR_MEMORY);
  }
  if (!labels) ESP_GOTO(ESP_ERR_MEMORY);
  s->labels = labels;
  s->n_labels = (int)n;
out:
  json_decref(j);
  return st;
}

/* The two benchmark formats become classification or prompt and completion, with other keys. */
static esp_status settle_format(esp_source_ctx *c, esp_data_source *s, esp_arena *arena) {
  c->text_key = "text", c->label_key = "label";
  c->published = c->format == ESP_FMT_CL_BENCHMARK || c->format == ESP_FMT_NATURAL_INSTRUCTIONS;
  if (c->format == ESP_FMT_CL_BENCHMARK) {
    ESP_TRY(read_labels(s, arena));
    if (!s->prompt_template) ESP_TRY(cl_benchmark_prompt(s, s->path, arena));
    c->text_key = "sentence";
    c->format = ESP_FMT_CLASSIFICATION;
  } else if (c->format == ESP_FMT_NATURAL_INSTRUCTIONS) {
    const char *group = component(s->path, 2, arena);
    ESP_TRY(read_labels(s, arena));
    if (!s->prompt_template) /* Tk-Instruct's prompt without examples; SAPT's shorter one for its long sequence */
      s->prompt_template = group && !strcmp(group, "Long_Sequence")
                               ? "{definition}\n{text}\nOutput: "
                               : "Definition: {definition}\n\nNow complete the following example -\nInput: {text}\n"
                                 "Output: ";
    c->text_key = "input", c->label_key = "output";
    if (s->n_labels) c->format = ESP_FMT_CLASSIFICATION;
  }
  return ESP_OK;
}

static esp_status list_labels(esp_source_ctx *c, esp_arena *arena) {
  esp_strbuf b; /* as {labels} and the messages show them */
  esp_strbuf_init(&b);
  for (int i = 0; i < c->src->n_labels; i++) esp_strbuf_printf(&b, "%s%s", i ? ", " : "", c->src->labels[i]);
  c->labels_text = b.failed ? NULL : esp_arena_strdup(arena, b.data ? b.data : "");
  esp_strbuf_deinit(&b);
  return c->labels_text ? ESP_OK : ESP_ERR_MEMORY;
}

esp_status esp_source_open(esp_source_ctx *c, esp_arena *arena, esp_source_file *out) {
  esp_data_source *s = esp_arena_alloc(arena, sizeof *s);
  if (!s) return ESP_ERR_MEMORY;
  *s = *c->src;
  *out = (esp_source_file){0};
  if (esp_dir_exists(s->path)) ESP_TRY(find_split(c->src, arena, &s->path));
  c->src = s;
  c->format = s->format;
  ESP_TRY(esp_file_map(s->path, &out->map));
  const char *text = out->map.data ? out->map.data : "", *end = text + out->map.size;
  esp_scan scan = {text, text, end, s->path};
  if (out->map.size >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3)) scan.p += 3; /* byte order mark */
  const char *begin = scan.p, *instances = NULL;
  esp_scan_space(&scan);
  finder w = {.f = out, .limit = s->limit, .line = 1, .counted = text};
  const char *first = scan.p, *nl = memchr(first, '\n', (size_t)(end - first));
  bool instructions = c->format == ESP_FMT_NATURAL_INSTRUCTIONS, array = first < end && *first == '[';
  if (c->format == ESP_FMT_AUTO && first < end && *first == '{') { /* one object over many lines, or one per line */
    json_t *j = json_loadb(first, (size_t)((nl ? nl : end) - first), 0, NULL);
    instructions =
        j ? json_is_array(json_object_get(j, "Instances")) : !memchr(first, '}', (size_t)((nl ? nl : end) - first));
    json_decref(j);
  }
  if (instructions && !array) {
    esp_status st = scan_object(&scan, arena, &c->definition, &instances);
    if (st != ESP_OK) {
      if (c->format != ESP_FMT_AUTO || c->definition || instances) return st;
      esp_error_clear(); /* a row in a line of its own that is no JSON: the row reader says so */
    }
    if (instances) c->format = ESP_FMT_NATURAL_INSTRUCTIONS;
    if (!instances && c->format == ESP_FMT_NATURAL_INSTRUCTIONS)
      return esp_fail(ESP_ERR_DATA, "%s: has no Instances", s->path);
  }
  if (instances) scan.p = instances;
  if (array || instances)
    ESP_TRY(find_elements(&w, &scan, array));
  else
    ESP_TRY(find_lines(&w, begin, end));
  if (!out->n_rows) return esp_fail(ESP_ERR_DATA, "%s: the dataset is empty", s->path);
  const esp_row_ref *row = &out->rows[0];
  if (c->format == ESP_FMT_AUTO) c->format = format_of(row->text, row->n);
  if (c->format == ESP_FMT_AUTO) {
    json_t *j = json_loadb(row->text, row->n, 0, NULL);
    bool object = json_is_object(j);
    json_decref(j);
    if (object) return unrecognised(c, row);
    c->format = ESP_FMT_TEXT; /* no JSON object at all: the row reader says so, with the place */
  }
  ESP_TRY(settle_format(c, s, arena));
  return list_labels(c, arena);
}

void esp_source_close(esp_source_file *f) {
  if (f->map.data) esp_file_unmap(&f->map);
  esp_mem_free(f->rows);
  *f = (esp_source_file){0};
}
