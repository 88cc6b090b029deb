/* render.c: the resolved recipe as text, and its hash. Both walk the schema, so a new key is in both by being there. */
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "recipe/bind.h"

#define FIELD(type) (*(const type *)esp_field(base, k->offset))
#define COUNT_FIELD (*(const int *)esp_field(base, k->count_offset))

static bool is_safe_plain(const char *s) {
  if (!*s || strlen(s) > 200) return false;
  if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_/.", *s)) return false;
  if (s[strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-")]) return false;
  static const char *const taken[] = {"null", "true", "false"}; /* in any case, to be safe with other readers */
  for (int i = 0; i < 3; i++)
    if (!strcasecmp(s, taken[i])) return false;
  return strcmp(s, "...") && !esp_text_is_number(s);
}

/* Plain where that is safe, else double quotes with YAML's escapes for what a YAML reader does not take raw. */
void esp_render_string(esp_strbuf *out, const char *s) {
  if (is_safe_plain(s)) {
    esp_strbuf_puts(out, s);
    return;
  }
  esp_strbuf_putc(out, '"');
  for (const unsigned char *p = (const unsigned char *)s; *p; p++) {
    if (*p == '"' || *p == '\\') {
      esp_strbuf_putc(out, '\\');
      esp_strbuf_putc(out, (char)*p);
    } else if (*p == '\n') {
      esp_strbuf_puts(out, "\\n");
    } else if (*p < 0x20 || *p == 0x7f) {
      esp_strbuf_printf(out, "\\x%02x", *p);
    } else if (*p == 0xc2 && p[1] >= 0x80 && p[1] < 0xa0) { /* C1 controls */
      esp_strbuf_printf(out, "\\x%02x", *++p);
    } else if ((*p & 0xf0) == 0xe0 && p[1] && p[2]) {
      unsigned c = (unsigned)(*p & 15) << 12 | (unsigned)(p[1] & 63) << 6 | (unsigned)(p[2] & 63);
      if (c == 0x2028 || c == 0x2029 || c == 0xfeff || c >= 0xfffe)
        esp_strbuf_printf(out, "\\u%04x", c);
      else
        esp_strbuf_add(out, (const char *)p, 3);
      p += 2;
    } else {
      esp_strbuf_putc(out, (char)*p);
    }
  }
  esp_strbuf_putc(out, '"');
}

static void number(esp_strbuf *out, double v) {
  char text[40];
  if (v > -1e15 && v < 1e15 && v == (double)(int64_t)v) {
    esp_strbuf_printf(out, "%" PRId64, (int64_t)v);
    return;
  }
  for (int digits = 1; digits <= 17; digits++) { /* the shortest that reads back the same */
    snprintf(text, sizeof text, "%.*g", digits, v);
    if (strtod(text, NULL) == v) break;
  }
  esp_strbuf_puts(out, text);
}

static void maybe_word(const esp_key *k, double v, esp_strbuf *out) {
  if (k->word && v == k->word_value)
    esp_strbuf_puts(out, k->word);
  else
    number(out, v);
}

static void path_text(const char *s, bool for_hash, esp_strbuf *out) {
  if (for_hash) {           /* a moved folder is the same recipe: files are known by their content, see checkpoints */
    size_t end = strlen(s); /* "models/base/" is "models/base" */
    while (end > 1 && s[end - 1] == '/') end--;
    size_t start = end;
    while (start > 0 && s[start - 1] != '/') start--;
    esp_strbuf_add(out, s + start, end - start);
    return;
  }
  char cwd[PATH_MAX];
  if (s[0] == '/' || !getcwd(cwd, sizeof cwd)) {
    esp_render_string(out, s);
    return;
  }
  esp_strbuf full;
  esp_strbuf_init(&full);
  esp_strbuf_printf(&full, "%s/%s", cwd, s);
  if (full.failed)
    out->failed = true;
  else
    esp_render_string(out, full.data);
  esp_strbuf_deinit(&full);
}

static void strings(const char *const *list, int n, esp_strbuf *out) {
  esp_strbuf_putc(out, '[');
  for (int i = 0; i < n; i++) {
    if (i) esp_strbuf_puts(out, ", ");
    esp_render_string(out, list[i]);
  }
  esp_strbuf_putc(out, ']');
}

static void keep_best(const esp_recipe *r, esp_strbuf *out) {
  esp_strbuf_puts(out, "{metric: ");
  esp_render_string(out, r->checkpoint.keep_best_metric);
  esp_strbuf_printf(out, ", mode: %s}", r->checkpoint.keep_best_max ? "max" : "min");
}

void esp_value_render(const esp_recipe *r, const esp_key *k, const void *base, bool for_hash, esp_strbuf *out) {
  int n;
  switch (k->type) {
  case ESP_T_BOOL:
    esp_strbuf_puts(out, FIELD(bool) ? "true" : "false");
    break;
  case ESP_T_INT:
    if (k->word && (double)FIELD(int64_t) == k->word_value)
      esp_strbuf_puts(out, k->word);
    else
      esp_strbuf_printf(out, "%" PRId64, FIELD(int64_t));
    break;
  case ESP_T_INT32:
    maybe_word(k, FIELD(int), out);
    break;
  case ESP_T_SEED:
    esp_strbuf_printf(out, "%" PRIu64, FIELD(uint64_t));
    break;
  case ESP_T_NUMBER:
    maybe_word(k, FIELD(double), out);
    break;
  case ESP_T_SHARE:
    if (FIELD(double) > 0 && FIELD(double) < 1) {
      char text[40];
      for (int digits = 2; digits <= 18; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, FIELD(double) * 100);
        if (strtod(text, NULL) / 100 == FIELD(double)) break;
      }
      esp_strbuf_printf(out, "%s%%", text);
    } else {
      number(out, FIELD(double));
    }
    break;
  case ESP_T_STRING:
  case ESP_T_NAME:
  case ESP_T_WORD:
    if (FIELD(char *))
      esp_render_string(out, FIELD(char *));
    else
      esp_strbuf_puts(out, "null");
    break;
  case ESP_T_RUN_PATH: { /* below the run's folder it moves with it */
    size_t dir = r->checkpoint.output_dir ? strlen(r->checkpoint.output_dir) : 0;
    const char *text = FIELD(char *);
    if (text && dir && !strncmp(text, r->checkpoint.output_dir, dir) && text[dir] == '/' && text[dir + 1] &&
        text[dir + 1] != '/')
      esp_render_string(out, text + dir + 1);
    else if (text)
      path_text(text, for_hash, out);
    else
      esp_strbuf_puts(out, "null");
    break;
  }
  case ESP_T_PATH:
    if (FIELD(char *))
      path_text(FIELD(char *), for_hash, out);
    else
      esp_strbuf_puts(out, "null");
    break;
  case ESP_T_ENUM:
  case ESP_T_SWITCH: {
    int v = k->type == ESP_T_SWITCH ? FIELD(bool) : FIELD(int);
    const char *const *words = esp_key_words(k, &n);
    for (int i = 0; i < n; i++)
      if ((k->values ? k->values[i] : i) == v) esp_strbuf_puts(out, words[i]);
    break;
  }
  case ESP_T_STRINGS:
    strings(FIELD(char *const *), COUNT_FIELD, out);
    break;
  case ESP_T_INTS:
    esp_strbuf_putc(out, '[');
    for (int i = 0; i < COUNT_FIELD; i++) esp_strbuf_printf(out, "%s%d", i ? ", " : "", FIELD(int *)[i]);
    esp_strbuf_putc(out, ']');
    break;
  case ESP_T_NUMBERS:
    esp_strbuf_putc(out, '[');
    for (int i = 0; i < COUNT_FIELD; i++) {
      if (i) esp_strbuf_puts(out, ", ");
      number(out, FIELD(double *)[i]);
    }
    esp_strbuf_putc(out, ']');
    break;
  case ESP_T_PATTERNS:
    esp_strbuf_putc(out, '{');
    for (int i = 0; i < COUNT_FIELD; i++) {
      const esp_pattern *p = &FIELD(esp_pattern *)[i];
      if (i) esp_strbuf_puts(out, ", ");
      esp_render_string(out, p->key);
      esp_strbuf_puts(out, ": ");
      number(out, p->value);
    }
    esp_strbuf_putc(out, '}');
    break;
  case ESP_T_TARGET: {
    const char *regex = *(const char *const *)esp_field(base, k->regex_offset);
    if (regex) {
      esp_strbuf full;
      esp_strbuf_init(&full);
      esp_strbuf_printf(&full, "regex:%s", regex);
      if (full.failed)
        out->failed = true;
      else
        esp_render_string(out, full.data);
      esp_strbuf_deinit(&full);
    } else if (COUNT_FIELD == 1 && !strcmp(FIELD(char *const *)[0], "all-linear")) {
      esp_strbuf_puts(out, "all-linear");
    } else {
      strings(FIELD(char *const *), COUNT_FIELD, out);
    }
    break;
  }
  case ESP_T_LIMIT:
    if (r->memory.limit_bytes) {
      esp_strbuf_printf(out, "%" PRId64, r->memory.limit_bytes);
    } else {
      number(out, r->memory.limit_share * 100);
      esp_strbuf_putc(out, '%');
    }
    break;
  case ESP_T_SINKS: {
    const char *on[3];
    n = 0;
    if (r->log.stdout_on) on[n++] = "stdout";
    if (r->log.jsonl) on[n++] = "jsonl";
    if (r->log.tensorboard) on[n++] = "tensorboard";
    strings(on, n, out);
    break;
  }
  case ESP_T_KEEP_BEST:
    if (r->checkpoint.keep_best_metric)
      keep_best(r, out);
    else
      esp_strbuf_puts(out, "null");
    break;
  default:
    break;
  }
}

typedef struct writer {
  const esp_recipe *r;
  esp_strbuf *out;
  bool for_hash;
} writer;

static void write_object(writer *w, const esp_object *o, const void *base, int indent, const esp_section *only_given,
                         bool first_inline);

static void origin_comment(writer *w, const void *field, const char *fallback) {
  const esp_origin *o = esp_origin_get(w->r, field);
  if (!o) {
    esp_strbuf_printf(w->out, " # %s\n", fallback);
  } else if (o->override) {
    esp_strbuf_puts(w->out, o->override[0] == '+' ? " # appended " : " # override ");
    for (const char *p = o->override; *p; p++) /* the comment must end where it ends */
      esp_strbuf_putc(w->out, (unsigned char)*p < 0x20 || (unsigned char)*p >= 0x7f ? '?' : *p);
    esp_strbuf_putc(w->out, '\n');
  } else {
    esp_strbuf_printf(w->out, " # line %d\n", o->line);
  }
}

static void indent_to(writer *w, int indent) {
  for (int i = 0; i < indent; i++) esp_strbuf_putc(w->out, ' ');
}

/* The section's keys that the task itself gave; nothing when there are none. */
static bool section_given(writer *w, const esp_object *o, const esp_section *s, const void *base) {
  for (int i = 0; i < o->n; i++)
    if (esp_key_per_task(&o->keys[i], s) && esp_origin_get(w->r, esp_field(base, o->keys[i].offset))) return true;
  return false;
}

static const esp_object *section_object(const char *name) {
  return esp_schema_find(&esp_schema_root, name)->object;
}

static void write_list(writer *w, const esp_key *k, const void *base, int indent) {
  const char *items = *(const char *const *)esp_field(base, k->offset);
  int n = *(const int *)esp_field(base, k->count_offset);
  if (!n) esp_strbuf_puts(w->out, " []");
  esp_strbuf_putc(w->out, '\n');
  for (int i = 0; i < n; i++) {
    indent_to(w, indent + 2);
    esp_strbuf_puts(w->out, "- ");
    write_object(w, k->object, items + (size_t)i * k->object->size, indent + 4, NULL, true);
  }
}

static void write_task_data(writer *w, const esp_key *k, const void *task, int indent) {
  const esp_section *s = esp_schema_section("data");
  const void *base = (const void *)((uintptr_t)task + s->task_offset - s->recipe_offset);
  const esp_object *data = section_object("data");
  if (w->for_hash || !section_given(w, data, s, base)) {
    write_list(w, k, task, indent);
    return;
  }
  esp_strbuf_putc(w->out, '\n');
  indent_to(w, indent + 2);
  esp_strbuf_puts(w->out, "sources:");
  write_list(w, k, task, indent + 2);
  write_object(w, data, base, indent + 2, s, false);
}

static void write_after(writer *w, const esp_key *k, const void *base, int indent) {
  const esp_after_step *steps = *(const esp_after_step *const *)esp_field(base, k->offset);
  int n = *(const int *)esp_field(base, k->count_offset);
  if (!n) esp_strbuf_puts(w->out, " []");
  esp_strbuf_putc(w->out, '\n');
  for (int i = 0; i < n; i++) {
    const esp_key *kind = &k->object->keys[k->object->n > 1 ? (int)steps[i].kind : 0];
    indent_to(w, indent + 2);
    esp_strbuf_printf(w->out, "- %s:\n", kind->name);
    write_object(w, kind->object, &steps[i], indent + 6, NULL, false);
  }
}

static void write_object(writer *w, const esp_object *o, const void *base, int indent, const esp_section *only_given,
                         bool first_inline) {
  const esp_key *epochs = esp_schema_find(o, "epochs"), *steps = esp_schema_find(o, "max_steps");
  for (int i = 0; i < o->n; i++) {
    const esp_key *k = &o->keys[i];
    const void *field = esp_field(base, k->offset);
    if (k->flags & ESP_K_INPUT_ONLY) continue;
    if (k == epochs && *(const int64_t *)esp_field(base, steps->offset)) continue; /* only one of them can hold */
    if (w->for_hash && (k->flags & ESP_K_NOHASH || k->type == ESP_T_OVERRIDE)) continue;
    if (w->for_hash && k->type == ESP_T_RUN_PATH) continue;
    if (k->type == ESP_T_AFTER && !*(void *const *)field) continue; /* not given: [] would mean something */
    if (only_given && !(esp_key_per_task(k, only_given) && esp_origin_get(w->r, field))) continue;
    const esp_section *s = k->type == ESP_T_OVERRIDE ? esp_schema_section(k->name) : NULL;
    const void *moved = s ? (const void *)((uintptr_t)base + s->task_offset - s->recipe_offset) : base;
    if (s && !section_given(w, k->object, s, moved)) continue;
    if (!first_inline) indent_to(w, indent);
    first_inline = false;
    esp_strbuf_printf(w->out, "%s:", k->name);
    switch (k->type) {
    case ESP_T_OBJECT:
      esp_strbuf_putc(w->out, '\n');
      write_object(w, k->object, base, indent + 2, NULL, false);
      break;
    case ESP_T_OBJECTS:
      write_list(w, k, base, indent);
      break;
    case ESP_T_TASK_DATA:
      write_task_data(w, k, base, indent);
      break;
    case ESP_T_AFTER:
      write_after(w, k, base, indent);
      break;
    case ESP_T_OVERRIDE:
      esp_strbuf_putc(w->out, '\n');
      write_object(w, k->object, moved, indent + 2, s, false);
      break;
    case ESP_T_EVAL_REFS: {
      const int *refs = *(const int *const *)field;
      esp_strbuf_puts(w->out, " [");
      for (int e = 0; e < *(const int *)esp_field(base, k->count_offset); e++) {
        if (e) esp_strbuf_puts(w->out, ", ");
        esp_render_string(w->out, w->r->eval.sets[refs[e]].name);
      }
      esp_strbuf_puts(w->out, "]\n");
      break;
    }
    default:
      esp_strbuf_putc(w->out, ' ');
      esp_value_render(w->r, k, base, w->for_hash, w->out);
      if (w->for_hash)
        esp_strbuf_putc(w->out, '\n');
      else
        origin_comment(w, field, "default");
    }
  }
}

char *esp_recipe_resolved(const esp_recipe *r) {
  if (r->whole) r = r->whole;
  esp_strbuf out;
  esp_strbuf_init(&out);
  esp_strbuf_puts(&out, "# Resolved from ");
  for (const char *p = r->path; *p; p++) esp_strbuf_putc(&out, (unsigned char)*p < 0x20 ? '?' : *p);
  esp_strbuf_puts(&out, ". Behind each value stands where it came from.\nversion: 1\n");
  writer w = {r, &out, false};
  write_object(&w, &esp_schema_root, r, 0, NULL, false);
  return esp_strbuf_take(&out);
}

/* Sections with all values of each task, whether they were written there or above: two recipes that mean the same have
 * the same hash. */
void esp_recipe_hash(const esp_recipe *r, char out[33]) {
  if (r->whole) r = r->whole;
  esp_strbuf text;
  esp_strbuf_init(&text);
  writer w = {r, &text, true};
  for (int i = 0; i < esp_schema_root.n; i++) {
    const esp_key *k = &esp_schema_root.keys[i];
    if (k->flags & (ESP_K_NOHASH | ESP_K_INPUT_ONLY)) continue;
    if (k->type == ESP_T_OBJECT && esp_schema_section(k->name)) {
      if (!strcmp(k->name, "schedule")) esp_strbuf_printf(&text, "restart: %d\n", r->schedule_restart);
      continue;
    }
    esp_strbuf_printf(&text, "%s:", k->name);
    if (k->type == ESP_T_OBJECT) {
      write_object(&w, k->object, r, 2, NULL, false);
    } else if (k->type == ESP_T_OBJECTS) {
      write_list(&w, k, r, 0);
    } else {
      esp_value_render(r, k, r, true, &text);
      esp_strbuf_putc(&text, '\n');
    }
  }
  for (int t = 0; t < r->n_tasks; t++) {
    if (r->tasks[t].start) {
      esp_strbuf_printf(&text, "%d before:\n", t);
      write_object(&w, section_object("before")->keys[0].object, r->tasks[t].start, 2, NULL, false);
    }
    for (int s = 0; s < esp_schema_n_sections; s++) {
      const esp_section *sec = &esp_schema_sections[s];
      const esp_object *o = section_object(sec->name);
      const void *base = (const void *)((uintptr_t)&r->tasks[t] + sec->task_offset - sec->recipe_offset);
      for (int i = 0; i < o->n; i++) {
        if ((o->keys[i].flags & (ESP_K_NOHASH | ESP_K_INPUT_ONLY)) || !esp_key_per_task(&o->keys[i], sec)) continue;
        esp_strbuf_printf(&text, "%d %s.%s: ", t, sec->name, o->keys[i].name);
        esp_value_render(r, &o->keys[i], base, true, &text);
        esp_strbuf_putc(&text, '\n');
      }
    }
  }
  XXH128_hash_t h = XXH3_128bits(text.data ? text.data : "", text.len);
  snprintf(out, 33, "%016" PRIx64 "%016" PRIx64, h.high64, h.low64);
  esp_strbuf_deinit(&text);
}

void esp_recipe_hash_first(const esp_recipe *r, int tasks, int sets, char out[33]) {
  esp_recipe first = *r;
  if (tasks < first.n_tasks) first.n_tasks = tasks;
  if (sets < first.eval.n_sets) first.eval.n_sets = sets;
  esp_recipe_hash(&first, out);
}
