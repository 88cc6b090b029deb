/* values.c: one value of the tree into its field, by the type of its row. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <errno.h>
#include <inttypes.h>
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/map.h"
#include "recipe/bind.h"

#define FIELD(type) (*(type *)esp_field(base, k->offset))
#define COUNT_FIELD (*(int *)esp_field(base, k->count_offset))
#define REGEX_FIELD (*(const char **)esp_field(base, k->regex_offset))

const char *esp_node_show(const esp_node *n, char *buf, size_t size) {
  if (n->kind == ESP_NODE_LIST) return "a list";
  if (n->kind == ESP_NODE_MAP) return "a mapping";
  if (esp_node_is_null(n)) return "nothing";
  size_t w = 0;
  buf[w++] = '\'';
  for (const char *p = n->text; *p && w < 44 && w + 6 < size; p++)
    buf[w++] = (unsigned char)*p < 0x20 || (unsigned char)*p == 0x7f ? '?' : *p;
  if (w >= 44) { /* cut between characters, not inside one */
    while (w > 1 && ((unsigned char)buf[w - 1] & 0xc0) == 0x80) w--;
    if (w > 1 && (unsigned char)buf[w - 1] >= 0xc0) w--;
    w += (size_t)snprintf(buf + w, size - w, "...");
  }
  snprintf(buf + w, size - w, "'");
  return buf;
}

const char *esp_suggest(const char *word, const char *const *names, int n, char *buf, size_t size) {
  const char *near = strlen(word) > 64 ? NULL : esp_closest(word, names, n);
  if (!near) return "";
  snprintf(buf, size, " (did you mean '%s'?)", near);
  return buf;
}

bool esp_text_is_integer(const char *s) {
  if (*s == '-' || *s == '+') s++;
  if (!*s) return false;
  for (; *s; s++)
    if (*s < '0' || *s > '9') return false;
  return true;
}

/* YAML 1.2 core schema, without .inf and .nan: 1e-4 is a number. */
bool esp_text_is_number(const char *s) {
  int digits = 0;
  if (*s == '-' || *s == '+') s++;
  for (; *s >= '0' && *s <= '9'; s++) digits++;
  if (*s == '.')
    for (s++; *s >= '0' && *s <= '9'; s++) digits++;
  if (!digits) return false;
  if (*s == 'e' || *s == 'E') return esp_text_is_integer(s + 1);
  return !*s;
}

static bool expected(esp_binder *b, const esp_node *n, const char *path, const char *what) {
  char buf[80];
  const char *quoted = n->kind == ESP_NODE_SCALAR && !n->plain ? " in quotes" : "";
  esp_bind_error(b, n, "%s: expected %s, got %s%s", path, what, esp_node_show(n, buf, sizeof buf), quoted);
  return false;
}

static bool in_range(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, double v) {
  if (k->min == 0 && k->max == 0) return true;
  bool low = k->flags & ESP_K_ABOVE_MIN ? v <= k->min : v < k->min;
  bool high = k->flags & ESP_K_BELOW_MAX ? v >= k->max : v > k->max;
  if (!low && !high) return true;
  esp_bind_error(b, n, "%s: %s is out of range (%s %g, %s %.16g)", path, n->text,
                 k->flags & ESP_K_ABOVE_MIN ? "above" : "at least", k->min,
                 k->flags & ESP_K_BELOW_MAX ? "below" : "at most", k->max);
  return false;
}

static bool is_scalar(const esp_node *n, bool plain) {
  return n->kind == ESP_NODE_SCALAR && (n->plain || !plain) && !esp_node_is_null(n);
}

static bool get_bool(esp_binder *b, const esp_node *n, const char *path, bool *out) {
  if (is_scalar(n, true)) {
    if (!strcmp(n->text, "true") || !strcmp(n->text, "True") || !strcmp(n->text, "TRUE")) return *out = true, true;
    if (!strcmp(n->text, "false") || !strcmp(n->text, "False") || !strcmp(n->text, "FALSE")) return *out = false, true;
  }
  return expected(b, n, path, "true or false");
}

static bool get_integer(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, int64_t *out) {
  char what[64] = "an integer";
  if (k->word) snprintf(what, sizeof what, "an integer or '%s'", k->word);
  if (!is_scalar(n, !k->word)) return expected(b, n, path, what);
  if (k->word && !strcmp(n->text, k->word)) return *out = (int64_t)k->word_value, true;
  if (!n->plain || !esp_text_is_integer(n->text)) return expected(b, n, path, what);
  /* 0 says what the word says, so that a resolved recipe and a hand-written one may use either */
  errno = 0;
  long long v = strtoll(n->text, NULL, 10);
  if (errno == ERANGE) {
    esp_bind_error(b, n, "%s: %.40s does not fit in 64 bits", path, n->text);
    return false;
  }
  if (k->word && (double)v == k->word_value) return *out = v, true;
  *out = v;
  return in_range(b, k, n, path, (double)v);
}

static bool get_number(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, double *out) {
  char what[64] = "a number";
  if (k->word) snprintf(what, sizeof what, "a number or '%s'", k->word);
  if (!is_scalar(n, !k->word)) return expected(b, n, path, what);
  if (k->word && !strcmp(n->text, k->word)) return *out = k->word_value, true;
  if (!n->plain || !esp_text_is_number(n->text)) return expected(b, n, path, what);
  double v = strtod(n->text, NULL);
  if (v != v || v - v != 0) {
    esp_bind_error(b, n, "%s: %.40s is too large", path, n->text);
    return false;
  }
  if (v == 0) v = 0; /* not -0 */
  *out = v;
  return (k->word && v == k->word_value) || in_range(b, k, n, path, v);
}

/* "3%" or steps. */
static bool get_share(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, double *out) {
  char digits[64];
  size_t len = is_scalar(n, false) ? strlen(n->text) : 0;
  if (len > 1 && len < sizeof digits && n->text[len - 1] == '%') {
    memcpy(digits, n->text, len - 1);
    digits[len - 1] = 0;
    if (esp_text_is_number(digits)) {
      double v = strtod(digits, NULL);
      if (v >= 0 && v < 100) return *out = v / 100, true;
      esp_bind_error(b, n, "%s: %.40s is out of range (at least 0%%, below 100%%)", path, n->text);
      return false;
    }
  }
  if (!is_scalar(n, true) || !esp_text_is_number(n->text)) return expected(b, n, path, "steps or a percentage");
  return get_number(b, k, n, path, out);
}

static bool get_limit(esp_binder *b, const esp_node *n, const char *path, esp_recipe *r) {
  static const struct {
    const char *unit;
    double bytes;
  } units[] = {{"", 1},     {"B", 1},    {"KiB", 1024}, {"MiB", 1048576}, {"GiB", 1073741824.}, {"TiB", 1099511627776.},
               {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9},   {"TB", 1e12}};
  const char *what = "a percentage or a size such as 12GiB";
  if (!is_scalar(n, false)) return expected(b, n, path, what);
  char digits[64];
  size_t w = strspn(n->text, "0123456789.");
  if (!w || w >= sizeof digits) return expected(b, n, path, what);
  memcpy(digits, n->text, w);
  digits[w] = 0;
  const char *unit = n->text + w + strspn(n->text + w, " ");
  if (!esp_text_is_number(digits)) return expected(b, n, path, what);
  double v = strtod(digits, NULL);
  if (!strcmp(unit, "%")) {
    if (v <= 0 || v > 100) {
      esp_bind_error(b, n, "%s: %.40s is out of range (above 0%%, at most 100%%)", path, n->text);
      return false;
    }
    r->memory.limit_share = v / 100;
    r->memory.limit_bytes = 0;
    return true;
  }
  for (size_t i = 0; i < sizeof units / sizeof *units; i++)
    if (!strcmp(unit, units[i].unit)) {
      if (v * units[i].bytes < 1 || v * units[i].bytes > 9e15) {
        esp_bind_error(b, n, "%s: %.40s is out of range", path, n->text);
        return false;
      }
      r->memory.limit_bytes = (int64_t)(v * units[i].bytes);
      return true;
    }
  return expected(b, n, path, what);
}

static bool get_string(esp_binder *b, const esp_node *n, const char *path, const char **out) {
  if (!is_scalar(n, false)) return expected(b, n, path, "a text");
  *out = n->text;
  return true;
}

static bool get_name(esp_binder *b, const esp_node *n, const char *path, const char **out) {
  if (!get_string(b, n, path, out)) return false;
  size_t good = strspn(n->text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-");
  if (good && !n->text[good] && n->text[0] != '.' && good < 64) return true;
  return expected(b, n, path, "a name of up to 63 letters, digits, '.', '_' and '-'");
}

/* ${env:NAME} or ${env:NAME:-WITHOUT}; what stands between "env:" and the brace is [p, end). */
static bool put_variable(esp_binder *b, const esp_node *n, const char *path, const char *p, const char *end,
                         esp_strbuf *out) {
  char name[128];
  size_t len = strcspn(p, ":}");
  const char *without = p + len;
  bool has = !strncmp(without, ":-", 2);
  if (len == 0 || len >= sizeof name || (without != end && !has)) {
    esp_bind_error(b, n, "%s: expected ${env:NAME} or ${env:NAME:-text}", path);
    return false;
  }
  snprintf(name, sizeof name, "%.*s", (int)len, p);
  const char *value = getenv(name);
  if (value && *value) {
    esp_strbuf_puts(out, value);
  } else if (has) {
    esp_strbuf_add(out, without + 2, (size_t)(end - without - 2));
  } else {
    esp_bind_error(b, n, "%s: the environment variable %s is not set", path, name);
    return false;
  }
  return true;
}

/* ${name}, ${seed} and variables of the environment inside a path. */
static const char *expand(esp_binder *b, const esp_node *n, const char *text, const char *path) {
  if (!strstr(text, "${")) return text;
  esp_strbuf out;
  esp_strbuf_init(&out);
  const char *p = text, *result = NULL;
  while (*p) {
    if (p[0] != '$' || p[1] != '{') {
      esp_strbuf_putc(&out, *p++);
      continue;
    }
    const char *end = strchr(p, '}');
    if (end && end - p == 6 && !memcmp(p + 2, "name", 4)) {
      esp_strbuf_puts(&out, b->recipe->name);
    } else if (end && end - p == 6 && !memcmp(p + 2, "seed", 4)) {
      esp_strbuf_printf(&out, "%" PRIu64, b->recipe->seed);
    } else if (end && !strncmp(p + 2, "env:", 4)) {
      if (!put_variable(b, n, path, p + 6, end, &out)) {
        esp_strbuf_deinit(&out);
        return NULL;
      }
    } else {
      char buf[80];
      esp_bind_error(b, n, "%s: unknown variable in %s (there are ${name}, ${seed} and ${env:NAME})", path,
                     esp_node_show(n, buf, sizeof buf));
      esp_strbuf_deinit(&out);
      return NULL;
    }
    p = end + 1;
  }
  if (out.failed)
    b->oom = true;
  else
    result = esp_arena_strdup(b->arena, out.data ? out.data : "");
  esp_strbuf_deinit(&out);
  if (!result) b->oom = true;
  return result;
}

const char *esp_value_path(esp_binder *b, const esp_node *n, const char *text, const char *path) {
  text = expand(b, n, text, path);
  if (!text) return NULL;
  bool from_file = n && !n->override && n->line;
  if (!from_file || text[0] == '/' || !b->dir[0]) return text;
  const char *joined = esp_arena_printf(b->arena, "%s%s%s", b->dir, b->dir[strlen(b->dir) - 1] == '/' ? "" : "/", text);
  if (!joined) b->oom = true;
  return joined;
}

static bool get_word(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, int *index,
                     const char **word) {
  int count;
  const char *const *words = esp_key_words(k, &count);
  char list[400] = "", hint[100], shown[80];
  if (is_scalar(n, false))
    for (int i = 0; i < count; i++)
      if (!strcmp(words[i], n->text)) {
        *index = i;
        *word = words[i];
        return true;
      }
  size_t w = 0;
  for (int i = 0; i < count && w < sizeof list; i++)
    w += (size_t)snprintf(list + w, sizeof list - w, "%s%s", i ? ", " : "", words[i]);
  const char *what = esp_node_show(n, shown, sizeof shown);
  if (!is_scalar(n, false))
    esp_bind_error(b, n, "%s: expected one of %s, got %s", path, list, what);
  else
    esp_bind_error(b, n, "%s: %s is not one of %s%s", path, what, list,
                   esp_suggest(n->text, words, count, hint, sizeof hint));
  return false;
}

static bool compiles(esp_binder *b, const esp_node *n, const char *path, const char *regex) {
  int code;
  PCRE2_SIZE offset;
  pcre2_code *re = pcre2_compile((PCRE2_SPTR)regex, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C, &code,
                                 &offset, NULL);
  if (re) {
    pcre2_code_free(re);
    return true;
  }
  char why[160] = "", shown[80];
  pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof why);
  esp_bind_error(b, n, "%s: %s is not a regular expression: %s at character %zu", path,
                 esp_node_show(n, shown, sizeof shown), why, (size_t)offset + 1);
  return false;
}

/* Of words, where the key has them: then one alone needs no list. */
static bool get_strings(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, const char *const **out,
                        int *count) {
  int n_words, index;
  bool words = esp_key_words(k, &n_words) != NULL, one = words && n->kind == ESP_NODE_SCALAR && !esp_node_is_null(n);
  if (n->kind != ESP_NODE_LIST && !one) return expected(b, n, path, "a list of texts");
  int items = one ? 1 : n->n;
  const char **list = esp_bind_alloc(b, (size_t)(items + 1) * sizeof *list);
  if (!list) return false;
  for (int i = 0; i < items; i++) {
    const esp_node *item = one ? n : n->items[i];
    if (words ? !get_word(b, k, item, path, &index, &list[i]) : !get_string(b, item, path, &list[i])) return false;
  }
  *out = list;
  *count = items;
  return true;
}

static bool get_ints(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, const int **out,
                     int *count) {
  if (n->kind != ESP_NODE_LIST) return expected(b, n, path, "a list of integers");
  int *list = esp_bind_alloc(b, (size_t)(n->n + 1) * sizeof *list);
  if (!list) return false;
  for (int i = 0; i < n->n; i++) {
    int64_t v;
    if (!get_integer(b, k, n->items[i], path, &v)) return false;
    list[i] = (int)v;
  }
  *out = list;
  *count = n->n;
  return true;
}

static bool get_numbers(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, const double **out,
                        int *count) {
  const esp_node *one = n;
  const esp_node *const *items = n->kind == ESP_NODE_LIST ? (const esp_node *const *)n->items : &one;
  int many = n->kind == ESP_NODE_LIST ? n->n : 1;
  double *list = esp_bind_alloc(b, (size_t)(many + 1) * sizeof *list);
  if (!list) return false;
  for (int i = 0; i < many; i++)
    if (!get_number(b, k, items[i], path, &list[i])) return false;
  *out = list;
  *count = many;
  return true;
}

static bool get_patterns(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, const esp_pattern **out,
                         int *count) {
  if (n->kind != ESP_NODE_MAP) return expected(b, n, path, "a mapping of regular expressions to numbers");
  esp_pattern *list = esp_bind_alloc(b, (size_t)(n->n + 1) * sizeof *list);
  if (!list) return false;
  bool ranks = k->min == 1;
  for (int i = 0; i < n->n; i++) {
    list[i].key = n->keys[i]->text;
    if (!compiles(b, n->keys[i], path, list[i].key)) return false;
    int64_t v = 0;
    if (ranks ? !get_integer(b, k, n->items[i], path, &v) : !get_number(b, k, n->items[i], path, &list[i].value))
      return false;
    if (ranks) list[i].value = (double)v;
  }
  *out = list;
  *count = n->n;
  return true;
}

static bool get_target(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, void *base) {
  const char *const *list = NULL;
  const char *regex = NULL;
  int count = 0;
  if (n->kind == ESP_NODE_SCALAR && is_scalar(n, false)) {
    if (!strncmp(n->text, "regex:", 6)) {
      regex = n->text + 6;
      if (!compiles(b, n, path, regex)) return false;
    } else if (!strcmp(k->name, "target") && !strcmp(n->text, "all-linear")) {
      const char **one = esp_bind_alloc(b, 2 * sizeof *one);
      if (!one) return false;
      one[0] = n->text;
      list = one;
      count = 1;
    } else {
      char shown[80];
      esp_bind_error(b, n, "%s: expected %sa list of names or regex:EXPRESSION, got %s", path,
                     !strcmp(k->name, "target") ? "all-linear, " : "", esp_node_show(n, shown, sizeof shown));
      return false;
    }
  } else {
    if (n->kind != ESP_NODE_LIST) return expected(b, n, path, "a list of names or regex:EXPRESSION");
    if (!get_strings(b, k, n, path, &list, &count)) return false;
    if (!count && !strcmp(k->name, "target")) {
      esp_bind_error(b, n, "%s: an empty list matches nothing", path);
      return false;
    }
    for (int i = 0; i < count; i++)
      if (count > 1 && !strcmp(list[i], "all-linear")) {
        esp_bind_error(b, n, "%s: all-linear stands alone, not in a list with other names", path);
        return false;
      }
  }
  FIELD(const char *const *) = list;
  COUNT_FIELD = count;
  REGEX_FIELD = regex;
  return true;
}

static bool get_betas(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, double *out) {
  if (n->kind != ESP_NODE_LIST || n->n != 2) return expected(b, n, path, "a list of two numbers");
  return get_number(b, k, n->items[0], path, &out[0]) && get_number(b, k, n->items[1], path, &out[1]);
}

static bool get_sinks(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, esp_recipe *r) {
  if (n->kind != ESP_NODE_LIST) return expected(b, n, path, "a list of stdout, jsonl and tensorboard");
  bool on[3] = {false, false, false};
  for (int i = 0; i < n->n; i++) {
    int index;
    const char *word;
    if (!get_word(b, k, n->items[i], path, &index, &word)) return false;
    on[index] = true;
  }
  r->log.stdout_on = on[0];
  r->log.jsonl = on[1];
  r->log.tensorboard = on[2];
  return true;
}

static bool get_keep_best(esp_binder *b, const esp_node *n, const char *path, esp_recipe *r) {
  static const char *const names[] = {"metric", "mode"};
  char hint[100], shown[80];
  if (n->kind != ESP_NODE_MAP) return expected(b, n, path, "{metric: NAME, mode: min or max}");
  for (int i = 0; i < n->n; i++)
    if (strcmp(n->keys[i]->text, "metric") && strcmp(n->keys[i]->text, "mode"))
      esp_bind_error(b, n->keys[i], "unknown key %s in %s%s", esp_node_show(n->keys[i], shown, sizeof shown), path,
                     esp_suggest(n->keys[i]->text, names, 2, hint, sizeof hint));
  const esp_node *metric = esp_node_get(n, "metric", NULL), *mode = esp_node_get(n, "mode", NULL);
  if (!metric) {
    esp_bind_error(b, n, "missing key '%s.metric' (loss or the name of an evaluation set)", path);
    return false;
  }
  if (!get_string(b, metric, path, &r->checkpoint.keep_best_metric)) return false;
  if (!mode || esp_node_is_null(mode)) return true; /* check.c decides by the metric */
  if (!is_scalar(mode, false) || (strcmp(mode->text, "min") && strcmp(mode->text, "max")))
    return expected(b, mode, path, "mode min or max");
  r->checkpoint.keep_best_max = !strcmp(mode->text, "max");
  return true;
}

bool esp_value_set(esp_binder *b, const esp_key *k, const esp_node *n, const char *path, void *base) {
  int index;
  int64_t integer;
  const char *text;
  switch (k->type) {
  case ESP_T_BOOL:
    return get_bool(b, n, path, &FIELD(bool));
  case ESP_T_INT:
    return get_integer(b, k, n, path, &FIELD(int64_t));
  case ESP_T_INT32:
    if (!get_integer(b, k, n, path, &integer)) return false;
    FIELD(int) = (int)integer;
    return true;
  case ESP_T_SEED:
    if (!is_scalar(n, true) || !esp_text_is_integer(n->text) || n->text[0] == '-')
      return expected(b, n, path, "an integer from 0");
    errno = 0;
    FIELD(uint64_t) = strtoull(n->text, NULL, 10);
    if (errno != ERANGE) return true;
    esp_bind_error(b, n, "%s: %.40s does not fit in 64 bits", path, n->text);
    return false;
  case ESP_T_NUMBER:
    return get_number(b, k, n, path, &FIELD(double));
  case ESP_T_SHARE:
    return get_share(b, k, n, path, &FIELD(double));
  case ESP_T_STRING:
    return get_string(b, n, path, &FIELD(const char *));
  case ESP_T_NAME:
    return get_name(b, n, path, &FIELD(const char *));
  case ESP_T_PATH:
  case ESP_T_RUN_PATH:
    if (!get_string(b, n, path, &text)) return false;
    if (!text[0]) return expected(b, n, path, "a path");
    text = k->type == ESP_T_PATH ? esp_value_path(b, n, text, path) : expand(b, n, text, path);
    if (!text) return false;
    FIELD(const char *) = text;
    return true;
  case ESP_T_WORD:
    return get_word(b, k, n, path, &index, &FIELD(const char *));
  case ESP_T_ENUM:
    if (!get_word(b, k, n, path, &index, &text)) return false;
    FIELD(int) = k->values ? k->values[index] : index;
    return true;
  case ESP_T_SWITCH:
    if (!get_word(b, k, n, path, &index, &text)) return false;
    FIELD(bool) = index == 1;
    return true;
  case ESP_T_STRINGS:
    return get_strings(b, k, n, path, &FIELD(const char *const *), &COUNT_FIELD);
  case ESP_T_INTS:
    return get_ints(b, k, n, path, &FIELD(const int *), &COUNT_FIELD);
  case ESP_T_NUMBERS:
    return get_numbers(b, k, n, path, &FIELD(const double *), &COUNT_FIELD);
  case ESP_T_PATTERNS:
    return get_patterns(b, k, n, path, &FIELD(const esp_pattern *), &COUNT_FIELD);
  case ESP_T_TARGET:
    return get_target(b, k, n, path, base);
  case ESP_T_BETAS:
    return get_betas(b, k, n, path, &FIELD(double));
  case ESP_T_LIMIT:
    return get_limit(b, n, path, base);
  case ESP_T_SINKS:
    return get_sinks(b, k, n, path, base);
  case ESP_T_KEEP_BEST:
    return get_keep_best(b, n, path, base);
  case ESP_T_VERSION:
    if (is_scalar(n, true) && !strcmp(n->text, "1")) return true;
    return expected(b, n, path, "1");
  default:
    return true; /* objects: bind.c */
  }
}

bool esp_value_default(esp_binder *b, const esp_key *k, void *base) {
  if (!k->def || (k->flags & ESP_K_INPUT_ONLY)) return true;
  if (!strcmp(k->def, "{}") || (!strcmp(k->def, "[]") && k->type != ESP_T_TARGET)) return true; /* zero already */
  if (k->def[0] != '[') {
    esp_node scalar = {.kind = ESP_NODE_SCALAR, .plain = true, .text = esp_arena_strdup(b->arena, k->def)};
    if (!scalar.text) return b->oom = true, false;
    return esp_value_set(b, k, &scalar, k->name, base);
  }
  esp_node items[8] = {0}, *list[8];
  esp_node node = {.kind = ESP_NODE_LIST, .items = list};
  char *text = esp_arena_strdup(b->arena, k->def + 1); /* the recipe keeps pointers into it */
  if (!text) return b->oom = true, false;
  for (char *save, *w = strtok_r(text, ", ]", &save); w && node.n < 8; w = strtok_r(NULL, ", ]", &save)) {
    items[node.n] = (esp_node){.kind = ESP_NODE_SCALAR, .plain = true, .text = w};
    list[node.n] = &items[node.n];
    node.n++;
  }
  if (!node.n) return true; /* exclude: nothing */
  return esp_value_set(b, k, &node, k->name, base);
}
