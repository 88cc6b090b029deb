/* describe.c: the schema for people and programs: text, JSON Schema, the docs page, and a recipe to start from. */
#include <stdio.h>
#include <string.h>

#include "recipe/bind.h"

static void limits(const esp_key *k, esp_strbuf *out) {
  if (k->min == 0 && k->max == 0) return;
  esp_strbuf_printf(out, ", %s %g", k->flags & ESP_K_ABOVE_MIN ? "above" : "at least", k->min);
  if (k->max < 1e15) esp_strbuf_printf(out, ", %s %.16g", k->flags & ESP_K_BELOW_MAX ? "below" : "at most", k->max);
}

static void type_text(const esp_key *k, esp_strbuf *out) {
  int n;
  const char *const *words = esp_key_words(k, &n);
  switch (k->type) {
  case ESP_T_BOOL:
    esp_strbuf_puts(out, "true or false");
    break;
  case ESP_T_INT:
  case ESP_T_INT32:
    esp_strbuf_puts(out, "integer");
    break;
  case ESP_T_SEED:
    esp_strbuf_puts(out, "integer, at least 0");
    return;
  case ESP_T_NUMBER:
    esp_strbuf_puts(out, "number");
    break;
  case ESP_T_SHARE:
    esp_strbuf_puts(out, "steps or percentage");
    return;
  case ESP_T_STRING:
    esp_strbuf_puts(out, "text");
    break;
  case ESP_T_NAME:
    esp_strbuf_puts(out, "name");
    break;
  case ESP_T_PATH:
  case ESP_T_RUN_PATH:
    esp_strbuf_puts(out, "path");
    break;
  case ESP_T_WORD:
  case ESP_T_ENUM:
  case ESP_T_SWITCH:
  case ESP_T_SINKS:
    if (k->type == ESP_T_SINKS) esp_strbuf_puts(out, "list of ");
    for (int i = 0; i < n; i++) esp_strbuf_printf(out, "%s%s", i ? " | " : "", words[i]);
    return;
  case ESP_T_STRINGS:
    esp_strbuf_puts(out, "list of texts");
    break;
  case ESP_T_INTS:
    esp_strbuf_puts(out, "list of integers");
    break;
  case ESP_T_NUMBERS:
    esp_strbuf_puts(out, "number or list of numbers");
    break;
  case ESP_T_PATTERNS:
    esp_strbuf_puts(out, "mapping of regular expression to number");
    break;
  case ESP_T_TARGET:
    esp_strbuf_puts(out, !strcmp(k->name, "target") ? "all-linear | list of names | regex:..."
                                                    : "list of names | regex:...");
    return;
  case ESP_T_BETAS:
    esp_strbuf_puts(out, "list of two numbers");
    break;
  case ESP_T_LIMIT:
    esp_strbuf_puts(out, "percentage or size");
    return;
  case ESP_T_KEEP_BEST:
    esp_strbuf_puts(out, "{metric, mode}");
    return;
  case ESP_T_EVAL_REFS:
    esp_strbuf_puts(out, "name or list of names");
    return;
  case ESP_T_VERSION:
    esp_strbuf_puts(out, "1");
    return;
  case ESP_T_OBJECTS:
  case ESP_T_TASK_DATA:
    esp_strbuf_printf(out, "list of %ss", k->object->name);
    return;
  case ESP_T_AFTER:
    esp_strbuf_puts(out, "list of ");
    for (int i = 0; i < k->object->n; i++) esp_strbuf_printf(out, "%s%s", i ? ", " : "", k->object->keys[i].name);
    return;
  default:
    esp_strbuf_puts(out, "mapping");
    return;
  }
  limits(k, out);
  if (k->word) esp_strbuf_printf(out, ", or %s", k->word);
}

static const char *default_text(const esp_key *k) {
  return k->flags & ESP_K_REQUIRED ? "required" : k->def ? k->def : "-";
}

/* Calls back for each object once, in the order in which a reader meets them. */
typedef void (*visit_fn)(const esp_object *o, const char *path, esp_strbuf *out);

static void walk(const esp_object *o, const char *path, visit_fn visit, esp_strbuf *out) {
  visit(o, path, out);
  for (int i = 0; i < o->n; i++) {
    const esp_key *k = &o->keys[i];
    if (!k->object || k->type == ESP_T_OVERRIDE || !strcmp(k->name, "before")) continue; /* before: after has it */
    char inner[160];
    const char *list = k->type == ESP_T_OBJECT ? "" : "[]";
    snprintf(inner, sizeof inner, "%s%s%s%s", path, *path ? "." : "", k->name, list);
    walk(k->object, inner, visit, out);
  }
}

static void visit_text(const esp_object *o, const char *path, esp_strbuf *out) {
  esp_strbuf_printf(out, "%s%s\n", *path ? path : "top of the recipe", *path ? ":" : ":");
  if (*o->help) esp_strbuf_printf(out, "  (%s)\n", o->help);
  for (int i = 0; i < o->n; i++) {
    const esp_key *k = &o->keys[i];
    esp_strbuf type;
    esp_strbuf_init(&type);
    type_text(k, &type);
    if (type.failed) out->failed = true;
    const char *help = k->help ? k->help : k->object ? k->object->help : "";
    esp_strbuf_printf(out, "  %-28s %s\n      %s", k->name, type.data ? type.data : "", help);
    if (k->type != ESP_T_OBJECT && !(k->flags & ESP_K_INPUT_ONLY) && k->type != ESP_T_OVERRIDE)
      esp_strbuf_printf(out, " [%s]", default_text(k));
    esp_strbuf_putc(out, '\n');
    if (k->aliases) esp_strbuf_printf(out, "      also spelled: %s\n", k->aliases);
    esp_strbuf_deinit(&type);
  }
  esp_strbuf_putc(out, '\n');
}

static void cell(const char *s, esp_strbuf *out) {
  for (; *s; s++) {
    if (*s == '|') esp_strbuf_putc(out, '\\');
    esp_strbuf_putc(out, *s);
  }
}

static void visit_markdown(const esp_object *o, const char *path, esp_strbuf *out) {
  esp_strbuf_printf(out, "\n## %s\n\n", *path ? path : "Top of the recipe");
  if (*o->help) esp_strbuf_printf(out, "%s\n\n", o->help);
  esp_strbuf_puts(out, "| key | value | default | meaning | also spelled |\n|---|---|---|---|---|\n");
  for (int i = 0; i < o->n; i++) {
    const esp_key *k = &o->keys[i];
    esp_strbuf type;
    esp_strbuf_init(&type);
    type_text(k, &type);
    if (type.failed) out->failed = true;
    esp_strbuf_printf(out, "| `%s` | ", k->name);
    cell(type.data ? type.data : "", out);
    if (k->def || k->flags & ESP_K_REQUIRED)
      esp_strbuf_printf(out, " | %s%s%s | ", k->flags & ESP_K_REQUIRED ? "" : "`", default_text(k),
                        k->flags & ESP_K_REQUIRED ? "" : "`");
    else
      esp_strbuf_puts(out, " | | ");
    cell(k->help ? k->help : k->object ? k->object->help : "", out);
    esp_strbuf_printf(out, " | %s |\n", k->aliases ? k->aliases : "");
    esp_strbuf_deinit(&type);
  }
}

static const char markdown_head[] =
    "# The recipe\n\n"
    "Written by `espalier schema --format markdown` from the schema table; do not edit by hand.\n\n"
    "A recipe is one YAML file. A key that is not in these tables, a value of the wrong type or out of range, a\n"
    "repeated key and a name that refers to nothing are errors; all of them are shown in one pass, each with its line\n"
    "and column, and the exit code is 2. An empty value or `null` means the default. `1e-4` is a number, `on` and\n"
    "`yes` are texts. Anchors, aliases and `<<` work.\n\n"
    "Relative paths are relative to the folder of the recipe. `${name}` and `${seed}` are replaced in paths,\n"
    "and `${env:NAME}` or `${env:NAME:-text}` by a variable of the environment (text where it is not set). On the\n"
    "command line `key=value` overrides a value: `optim.lr=1e-4`, `tasks[1].train.epochs=2`, `tasks[math].eval=[a, "
    "b]`;\n"
    "relative paths there are relative to the working directory. A run keeps `resolved.yaml`, with the origin of each\n"
    "value behind it.\n";

/* ---- JSON Schema (2020-12) ---- */

static void json_object(const esp_object *o, bool per_task, const char *section, esp_strbuf *out);

static void json_words(const esp_key *k, esp_strbuf *out) {
  int n;
  const char *const *words = esp_key_words(k, &n);
  esp_strbuf_puts(out, "\"enum\": [");
  for (int i = 0; i < n; i++) {
    if (i) esp_strbuf_puts(out, ", ");
    esp_strbuf_json(out, words[i], strlen(words[i]));
  }
  esp_strbuf_putc(out, ']');
}

static void json_number(const esp_key *k, const char *type, esp_strbuf *out) {
  esp_strbuf_printf(out, "{\"type\": \"%s\"", type);
  if (k->min != 0 || k->max != 0) {
    esp_strbuf_printf(out, ", \"%s\": %.17g", k->flags & ESP_K_ABOVE_MIN ? "exclusiveMinimum" : "minimum", k->min);
    esp_strbuf_printf(out, ", \"%s\": %.17g", k->flags & ESP_K_BELOW_MAX ? "exclusiveMaximum" : "maximum", k->max);
  }
  esp_strbuf_putc(out, '}');
}

static void json_type(const esp_key *k, esp_strbuf *out) {
  switch (k->type) {
  case ESP_T_BOOL:
    esp_strbuf_puts(out, "{\"type\": \"boolean\"}");
    break;
  case ESP_T_INT:
  case ESP_T_INT32:
    json_number(k, "integer", out);
    break;
  case ESP_T_SEED:
    esp_strbuf_puts(out, "{\"type\": \"integer\", \"minimum\": 0}");
    break;
  case ESP_T_NUMBER:
    json_number(k, "number", out);
    break;
  case ESP_T_SHARE:
    esp_strbuf_puts(out, "{\"type\": \"number\", \"minimum\": 0}, {\"type\": \"string\", \"pattern\": \"%$\"}");
    break;
  case ESP_T_LIMIT:
    esp_strbuf_puts(out, "{\"type\": \"integer\"}, {\"type\": \"string\"}");
    break;
  case ESP_T_WORD:
  case ESP_T_ENUM:
  case ESP_T_SWITCH:
    esp_strbuf_putc(out, '{');
    json_words(k, out);
    esp_strbuf_putc(out, '}');
    break;
  case ESP_T_SINKS:
    esp_strbuf_puts(out, "{\"type\": \"array\", \"items\": {");
    json_words(k, out);
    esp_strbuf_puts(out, "}}");
    break;
  case ESP_T_INTS:
    esp_strbuf_puts(out, "{\"type\": \"array\", \"items\": {\"type\": \"integer\"}}");
    break;
  case ESP_T_NUMBERS:
    esp_strbuf_puts(out, "{\"type\": \"number\"}, {\"type\": \"array\", \"items\": {\"type\": \"number\"}}");
    break;
  case ESP_T_STRINGS:
    esp_strbuf_puts(out, "{\"type\": \"array\", \"items\": {\"type\": \"string\"}}");
    break;
  case ESP_T_TARGET:
  case ESP_T_EVAL_REFS:
    esp_strbuf_puts(out, "{\"type\": \"string\"}, {\"type\": \"array\", \"items\": {\"type\": \"string\"}}");
    break;
  case ESP_T_PATTERNS:
    esp_strbuf_puts(out, "{\"type\": \"object\", \"additionalProperties\": {\"type\": \"number\"}}");
    break;
  case ESP_T_BETAS:
    esp_strbuf_puts(out, "{\"type\": \"array\", \"items\": {\"type\": \"number\"}, \"minItems\": 2, \"maxItems\": 2}");
    break;
  case ESP_T_KEEP_BEST:
    esp_strbuf_puts(out,
                    "{\"type\": \"object\", \"properties\": {\"metric\": {\"type\": \"string\"}, \"mode\": {\"enum\": "
                    "[\"min\", \"max\"]}}, \"required\": [\"metric\"], \"additionalProperties\": false}");
    break;
  case ESP_T_VERSION:
    esp_strbuf_puts(out, "{\"const\": 1}");
    break;
  case ESP_T_OBJECT:
    json_object(k->object, false, NULL, out);
    break;
  case ESP_T_OVERRIDE:
    json_object(k->object, true, k->name, out);
    break;
  case ESP_T_OBJECTS:
  case ESP_T_TASK_DATA:
    esp_strbuf_puts(out, "{\"type\": \"array\", \"items\": ");
    json_object(k->object, false, NULL, out);
    esp_strbuf_putc(out, '}');
    if (k->type == ESP_T_TASK_DATA) /* the mapping form is described by the text */
      esp_strbuf_puts(out, ", {\"type\": \"object\", \"required\": [\"sources\"]}");
    break;
  case ESP_T_AFTER:
    esp_strbuf_puts(out, "{\"type\": \"array\", \"items\": ");
    json_object(k->object, false, NULL, out);
    esp_strbuf_putc(out, '}');
    break;
  default:
    esp_strbuf_puts(out, "{\"type\": \"string\"}");
    break;
  }
}

static void json_key(const esp_key *k, const char *name, esp_strbuf *out) {
  const char *help = k->help ? k->help : k->object ? k->object->help : "";
  esp_strbuf_json(out, name, strlen(name));
  esp_strbuf_puts(out, ": {\"description\": ");
  esp_strbuf_json(out, help, strlen(help));
  if (k->def && strcmp(k->def, "[]") && strcmp(k->def, "{}") && k->type != ESP_T_SINKS) {
    esp_strbuf_puts(out, ", \"default\": ");
    if (k->type == ESP_T_BOOL || esp_text_is_number(k->def))
      esp_strbuf_puts(out, k->def);
    else
      esp_strbuf_json(out, k->def, strlen(k->def));
  }
  esp_strbuf_puts(out, ", \"anyOf\": [");
  json_type(k, out);
  if (k->word) {
    esp_strbuf_puts(out, ", {\"const\": ");
    esp_strbuf_json(out, k->word, strlen(k->word));
    esp_strbuf_putc(out, '}');
  }
  if (!(k->flags & ESP_K_REQUIRED)) esp_strbuf_puts(out, ", {\"type\": \"null\"}");
  esp_strbuf_puts(out, "]}");
}

static void json_object(const esp_object *o, bool per_task, const char *section, esp_strbuf *out) {
  const esp_section *s = per_task ? esp_schema_section(section) : NULL;
  bool first = true;
  esp_strbuf_puts(out, "{\"type\": \"object\", \"additionalProperties\": false, \"properties\": {");
  for (int i = 0; i < o->n; i++) {
    const esp_key *k = &o->keys[i];
    if (s && !esp_key_per_task(k, s)) continue;
    if (!first) esp_strbuf_puts(out, ", ");
    first = false;
    json_key(k, k->name, out);
    for (const char *p = k->aliases; p && *p;) {
      char alias[64];
      size_t w = strcspn(p, " ");
      snprintf(alias, sizeof alias, "%.*s", (int)w, p);
      esp_strbuf_puts(out, ", ");
      json_key(k, alias, out);
      p += w + (p[w] == ' ');
    }
  }
  esp_strbuf_puts(out, "}");
  if (!per_task) { /* a required key may stand under any of its spellings */
    first = true;
    for (int i = 0; i < o->n; i++) {
      const esp_key *k = &o->keys[i];
      if (!(k->flags & ESP_K_REQUIRED)) continue;
      esp_strbuf_puts(out, first ? ", \"allOf\": [" : ", ");
      first = false;
      esp_strbuf_printf(out, "{\"anyOf\": [{\"required\": [\"%s\"]}", k->name);
      for (const char *p = k->aliases; p && *p;) {
        size_t w = strcspn(p, " ");
        esp_strbuf_printf(out, ", {\"required\": [\"%.*s\"]}", (int)w, p);
        p += w + (p[w] == ' ');
      }
      esp_strbuf_puts(out, "]}");
    }
    if (!first) esp_strbuf_putc(out, ']');
  }
  esp_strbuf_putc(out, '}');
}

char *esp_schema_render(const char *format) {
  esp_strbuf out;
  esp_strbuf_init(&out);
  if (!strcmp(format, "text")) {
    walk(&esp_schema_root, "", visit_text, &out);
  } else if (!strcmp(format, "markdown")) {
    esp_strbuf_puts(&out, markdown_head);
    walk(&esp_schema_root, "", visit_markdown, &out);
  } else if (!strcmp(format, "json")) {
    esp_strbuf_puts(&out, "{\"$schema\": \"https://json-schema.org/draft/2020-12/schema\", \"title\": \"espalier "
                          "recipe\", \"anyOf\": [");
    json_object(&esp_schema_root, false, NULL, &out);
    esp_strbuf_puts(&out, "]}\n");
  } else {
    (void)esp_fail(ESP_ERR_RECIPE, "schema: format '%s' is not one of text, json, markdown", format);
    return NULL;
  }
  return esp_strbuf_take(&out);
}

/* ---- a recipe to start from ---- */

static const char template_eval[] =
    "# What is measured: the columns of the score matrix. Metrics: perplexity, choice, exact_match, rouge_l.\n"
    "eval:\n"
    "  sets: []\n"
    "  # sets:\n"
    "  #   - {name: first-dev, path: data/first_dev.jsonl, metric: perplexity}\n\n";
static const char template_tasks[] =
    "# The tasks, trained in this order. A task may set keys of adapter, optim, schedule and train again. With an\n"
    "# evaluation set of its own (eval: first-dev) it has a column in the score matrix.\n"
    "tasks:\n"
    "  - name: first\n"
    "    data:\n"
    "      - {path: data/first.jsonl, format: auto}\n"
    "  # - name: second\n"
    "  #   data:\n"
    "  #     - {path: data/second.jsonl}\n"
    "  #   optim: {lr: 1e-4}\n\n";
static const char template_after[] = "# What is made once all tasks are trained.\n"
                                     "after:\n"
                                     "  - report: {out: report.html}\n"
                                     "  # - merge: {out: merged, verify: 32}\n\n";

static void template_section(const esp_key *section, const char *base_model, esp_strbuf *out) {
  const esp_object *o = section->object;
  esp_strbuf_printf(out, "# %s\n%s:\n", o->help, section->name);
  for (int i = 0; i < o->n; i++) {
    const esp_key *k = &o->keys[i];
    if (!(k->flags & ESP_K_COMMON)) continue;
    esp_strbuf value;
    esp_strbuf_init(&value);
    if (!strcmp(k->name, "base_model"))
      esp_render_string(&value, base_model);
    else
      esp_strbuf_puts(&value, !strcmp(k->name, "output_dir") ? "runs/${name}" : k->def);
    if (value.failed) out->failed = true;
    esp_strbuf_printf(out, "  %s: %s", k->name, value.data ? value.data : "");
    int used = (int)(strlen(k->name) + value.len) + 2;
    esp_strbuf_printf(out, "%*s# ", used < 34 ? 34 - used : 1, "");
    int n;
    if (esp_key_words(k, &n) && k->type != ESP_T_SINKS) {
      type_text(k, out);
      esp_strbuf_puts(out, "; ");
    }
    esp_strbuf_printf(out, "%s\n", !strcmp(k->name, "output_dir") ? "the run's folder" : k->help);
    esp_strbuf_deinit(&value);
  }
  esp_strbuf_putc(out, '\n');
}

char *esp_recipe_template(const char *base_model) {
  esp_strbuf out;
  esp_strbuf_init(&out);
  esp_strbuf_puts(
      &out, "# A recipe for espalier. `espalier check` says what is wrong with it, `espalier plan` what it takes,\n"
            "# `espalier run` trains it; `espalier schema` lists all keys.\n"
            "name: my-run\nseed: 42\n\n");
  for (int i = 0; i < esp_schema_root.n; i++) {
    const esp_key *k = &esp_schema_root.keys[i];
    if (!(k->flags & ESP_K_COMMON)) continue;
    if (!strcmp(k->name, "eval"))
      esp_strbuf_puts(&out, template_eval);
    else if (!strcmp(k->name, "tasks"))
      esp_strbuf_puts(&out, template_tasks);
    else if (!strcmp(k->name, "after"))
      esp_strbuf_puts(&out, template_after);
    else if (k->type == ESP_T_OBJECT)
      template_section(k, base_model, &out);
  }
  return esp_strbuf_take(&out);
}
