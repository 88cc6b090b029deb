/* matrix_text.c: the score matrix as text and as JSON, and back. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/error.h"
#include "io/file.h"
#include "io/json.h"
#include "tasks/matrix.h"

#define M(field) offsetof(esp_matrix_summary, field)
#define C(field) offsetof(esp_curve_summary, field)
#define R(field) offsetof(esp_reference_summary, field)
const esp_measure_row esp_measure_rows[] = {
    {"acc", "ACC", "1/T sum_t R[T][t]", M(acc), false, ESP_OF_MATRIX},
    {"bwt", "BWT", "1/(T-1) sum_{t<T} (R[T][t] - R[t][t])", M(bwt), true, ESP_OF_MATRIX},
    {"fwt", "FWT", "1/(T-1) sum_{t>1} (R[t-1][t] - R[0][t])", M(fwt), true, ESP_OF_MATRIX},
    {"forgetting", "forgetting", "1/(T-1) sum_{t<T} (max_{1<=i<T} R[i][t] - R[T][t])", M(forgetting), false,
     ESP_OF_MATRIX},
    {"learning_acc", "learning", "1/T sum_t R[t][t]", M(learning_acc), false, ESP_OF_MATRIX},
    {"lowest", "lowest", "min_t R[T][t]", M(lowest), false, ESP_OF_MATRIX},
    {"bwt_trace", "BWT (trace)", "1/T sum_{t<T} (R[T][t] - R[t][t])", M(bwt_trace), true, ESP_OF_MATRIX},
    {"bwt_rows", "BWT (rows)", "2/(T(T-1)) sum_{i>t} (R[i][t] - R[t][t])", M(bwt_rows), true, ESP_OF_MATRIX},
    {"forgetting_all", "forgetting (all rows)", "1/(T-1) sum_{t<T} (max_{1<=i<=T} R[i][t] - R[T][t])",
     M(forgetting_all), false, ESP_OF_MATRIX},
    {"fwt_unseen", "FWT (unseen)", "2/(T(T-1)) sum_{1<=i<t} R[i][t]", M(fwt_unseen), false, ESP_OF_MATRIX},
    {"anytime_acc", "anytime", "1/T sum_i 1/i sum_{t<=i} R[i][t]", M(anytime_acc), false, ESP_OF_MATRIX},
    {"min_acc", "min-ACC", "1/(T-1) sum_{t<T} min_{s>e_t} A_t(s)", C(min_acc), false, ESP_OF_CURVE},
    {"wc_acc", "WC-ACC", "R[T][T]/T + (1 - 1/T) min-ACC", C(wc_acc), false, ESP_OF_CURVE},
    {"wf", "WF", "1/T sum_t max_{s<u<=s+w, s>=e_(t-1)} (A_t(s) - A_t(u))", C(wf), false, ESP_OF_CURVE},
    {"wp", "WP", "1/T sum_t max_{s<u<=s+w, s>=e_(t-1)} (A_t(u) - A_t(s))", C(wp), false, ESP_OF_CURVE},
    {"gap", "stability gap", "2/(T(T-1)) sum_{t<i} (min(R[i-1][t], R[i][t]) - min_{e_(i-1)<=s<=e_i} A_t(s))", C(gap),
     false, ESP_OF_CURVE},
    {"learning_gap", "learning gap", "1/T sum_t (R[t][t] - S[t])", R(learning_gap), true, ESP_OF_REFERENCE},
    {"final_gap", "final gap", "1/T sum_t (R[T][t] - S[t])", R(final_gap), true, ESP_OF_REFERENCE},
};
const int esp_n_measure_rows = (int)(sizeof esp_measure_rows / sizeof *esp_measure_rows);

static const char legend[] = "R[i][t]: score on task t's own set after task i (row 0: the base), T tasks";
static const char curve_legend[] =
    "A_t(s): score on task t's own set at step s, evaluations only; e_t: last step of task t";
static const char reference_legend[] = "S[t]: score on that set in the runs compared with, at their ends";

static double value_of(const esp_measure_row *row, const void *summary) {
  return *(const double *)((const char *)summary + row->offset);
}

/* ---- text ---- */

typedef struct shape {
  int first, width;
} shape;

static shape measure(const esp_matrix *m) {
  shape s = {(int)strlen("after \\ on"), 8};
  for (int t = 0; t < m->tasks; t++) {
    int n = (int)strlen(m->task_name[t]) + 4;
    s.first = n > s.first ? n : s.first;
  }
  for (int k = 0; k < m->sets; k++)
    s.width = (int)strlen(m->set_name[k]) > s.width ? (int)strlen(m->set_name[k]) : s.width;
  return s;
}

static bool any_in(const esp_matrix *m, const double *values, int row) {
  for (int s = 0; s < m->sets; s++)
    if (!isnan(values[row * m->sets + s])) return true;
  return false;
}

static void table(const esp_matrix *m, const double *values, const char *corner, esp_strbuf *out) {
  shape at = measure(m);
  esp_strbuf_printf(out, "%-*s", at.first, corner);
  for (int s = 0; s < m->sets; s++)
    esp_strbuf_printf(out, " %s%*s", esp_matrix_is_probe(m, s) ? "| " : "", at.width, m->set_name[s]);
  esp_strbuf_putc(out, '\n');
  for (int row = 0; row <= m->tasks; row++) {
    if (!any_in(m, values, row)) continue;
    char name[ESP_MATRIX_NAME + 16];
    if (row == 0 || m->joint)
      snprintf(name, sizeof name, "%s", esp_matrix_row_name(m, row));
    else
      snprintf(name, sizeof name, "%d %s", row, esp_matrix_row_name(m, row));
    esp_strbuf_printf(out, "%-*s", at.first, name);
    for (int s = 0; s < m->sets; s++) {
      double v = values[row * m->sets + s];
      esp_strbuf_puts(out, esp_matrix_is_probe(m, s) ? " | " : " ");
      if (isnan(v))
        esp_strbuf_printf(out, "%*s", at.width, "-");
      else
        esp_strbuf_printf(out, "%*.3f", at.width, v);
    }
    esp_strbuf_putc(out, '\n');
  }
}

static void put_number(esp_strbuf *out, const esp_measure_row *row, double v, bool first) {
  esp_strbuf_puts(out, first ? "" : "   ");
  if (isnan(v))
    esp_strbuf_printf(out, "%s -", row->label);
  else
    esp_strbuf_printf(out, row->sign ? "%s %+.3f" : "%s %.3f", row->label, v);
}

static const esp_measure_row *row_of(const char *key) {
  for (int i = 0; i < esp_n_measure_rows; i++)
    if (!strcmp(esp_measure_rows[i].key, key)) return &esp_measure_rows[i];
  return NULL;
}

static void line(esp_strbuf *out, const char *const *keys, int n, const void *summary) {
  for (int i = 0; i < n; i++) put_number(out, row_of(keys[i]), value_of(row_of(keys[i]), summary), i == 0);
}

static void numbers(const esp_matrix *m, const esp_matrix_view *v, esp_strbuf *out) {
  static const char *const gem[] = {"acc", "bwt", "fwt", "forgetting", "learning_acc", "lowest"};
  static const char *const trace[] = {"acc", "bwt_trace", "fwt", "forgetting", "learning_acc", "lowest"};
  static const char *const more[] = {"anytime_acc", "bwt_rows", "forgetting_all", "fwt_unseen"};
  static const char *const inside[] = {"min_acc", "wc_acc", "wf", "wp", "gap"};
  static const char *const against[] = {"learning_gap", "final_gap"};
  esp_matrix_summary x;
  esp_matrix_summarise(m, &x);
  line(out, v->bwt_trace ? trace : gem, 6, &x);
  esp_strbuf_putc(out, '\n');
  if (v->formulas) {
    line(out, more, 4, &x);
    put_number(out, row_of(v->bwt_trace ? "bwt" : "bwt_trace"), v->bwt_trace ? x.bwt : x.bwt_trace, false);
    esp_strbuf_putc(out, '\n');
  }
  if (v->curve) {
    line(out, inside, 5, v->curve);
    esp_strbuf_printf(out, "   (%lld evaluations inside tasks, w %.0f steps)\n", (long long)v->curve->inside,
                      v->window);
  }
  if (v->reference) {
    line(out, against, 2, v->reference);
    esp_strbuf_putc(out, '\n');
  }
  for (int s = 0; s < m->sets; s++) {
    double last = *esp_matrix_cell(m, m->tasks, s), first = *esp_matrix_cell(m, 0, s);
    if (!esp_matrix_is_probe(m, s) || isnan(last)) continue;
    esp_strbuf_printf(out, "probe %s %.3f", m->set_name[s], last);
    if (!isnan(first)) esp_strbuf_printf(out, " (%+.3f against the base)", last - first);
    esp_strbuf_putc(out, '\n');
  }
}

static void formulas(const esp_matrix *m, const esp_matrix_view *v, esp_strbuf *out) {
  esp_strbuf_printf(out, "%s\n", legend);
  if (v->curve) esp_strbuf_printf(out, "%s\n", curve_legend);
  if (v->reference) esp_strbuf_printf(out, "%s\n", reference_legend);
  for (int i = 0; i < esp_n_measure_rows; i++) {
    const esp_measure_row *row = &esp_measure_rows[i];
    if ((row->of == ESP_OF_CURVE && !v->curve) || (row->of == ESP_OF_REFERENCE && !v->reference)) continue;
    esp_strbuf_printf(out, "%s = %s\n", row->label, row->formula);
  }
  for (int s = 0; s < m->sets; s++)
    esp_strbuf_printf(out, "%s: %s%s%s\n", m->set_name[s], m->set_metric[s],
                      m->smaller_better[s] ? " (smaller is better: enters the formulas with its sign turned)" : "",
                      esp_matrix_is_probe(m, s) ? " (probe: in no formula)" : "");
}

void esp_matrix_render_text(const esp_matrix *m, const esp_matrix_view *view, esp_strbuf *out) {
  static const esp_matrix_view plain = {0};
  const esp_matrix_view *v = view ? view : &plain;
  table(m, m->score, "after \\ on", out);
  bool malformed = false;
  for (int row = 0; row <= m->tasks; row++) malformed |= any_in(m, m->malformed, row);
  if (malformed) {
    esp_strbuf_puts(out, "share of answers that are none of the labels (counted as wrong above):\n");
    table(m, m->malformed, "after \\ on", out);
  }
  numbers(m, v, out);
  if (v->formulas) formulas(m, v, out);
}

/* ---- JSON ---- */

static void json_number(esp_strbuf *out, double v) {
  if (isfinite(v))
    esp_strbuf_printf(out, "%.17g", v);
  else
    esp_strbuf_puts(out, "null");
}

static void json_rows(const esp_matrix *m, const double *values, esp_strbuf *out) {
  for (int row = 0; row <= m->tasks; row++) {
    esp_strbuf_puts(out, row ? ",\n    [" : "\n    [");
    for (int s = 0; s < m->sets; s++) {
      esp_strbuf_puts(out, s ? ", " : "");
      json_number(out, values[row * m->sets + s]);
    }
    esp_strbuf_putc(out, ']');
  }
}

void esp_matrix_render_json(const esp_matrix *m, const esp_matrix_view *view, esp_strbuf *out) {
  esp_strbuf_puts(out, "{\n  \"tasks\": [");
  for (int t = 0; t < m->tasks; t++) {
    esp_strbuf_puts(out, t ? ", " : "");
    esp_strbuf_puts(out, "{\"name\": ");
    esp_strbuf_json(out, m->task_name[t], strlen(m->task_name[t]));
    esp_strbuf_printf(out, ", \"column\": %d}", m->column[t]);
  }
  esp_strbuf_puts(out, m->joint ? "],\n  \"joint\": true,\n  \"sets\": [" : "],\n  \"sets\": [");
  for (int s = 0; s < m->sets; s++) {
    esp_strbuf_puts(out, s ? ", " : "");
    esp_strbuf_puts(out, "{\"name\": ");
    esp_strbuf_json(out, m->set_name[s], strlen(m->set_name[s]));
    esp_strbuf_puts(out, ", \"metric\": ");
    esp_strbuf_json(out, m->set_metric[s], strlen(m->set_metric[s]));
    esp_strbuf_printf(out, ", \"smaller_better\": %s}", m->smaller_better[s] ? "true" : "false");
  }
  esp_strbuf_puts(out, "],\n  \"rows\": [");
  json_rows(m, m->score, out);
  bool malformed = false;
  for (int row = 0; row <= m->tasks; row++) malformed |= any_in(m, m->malformed, row);
  if (malformed) {
    esp_strbuf_puts(out, "\n  ],\n  \"malformed\": [");
    json_rows(m, m->malformed, out);
  }
  esp_strbuf_puts(out, "\n  ]");
  esp_matrix_summary x;
  esp_matrix_summarise(m, &x);
  for (int i = 0; i < esp_n_measure_rows; i++) {
    const esp_measure_row *row = &esp_measure_rows[i];
    const void *from = row->of == ESP_OF_MATRIX  ? (const void *)&x
                       : !view                   ? NULL
                       : row->of == ESP_OF_CURVE ? (const void *)view->curve
                                                 : (const void *)view->reference;
    if (!from) continue;
    esp_strbuf_printf(out, ",\n  \"%s\": ", row->key);
    json_number(out, value_of(row, from));
  }
  if (view && view->curve)
    esp_strbuf_printf(out, ",\n  \"window\": %.17g,\n  \"evaluations_inside\": %lld", view->window,
                      (long long)view->curve->inside);
  esp_strbuf_puts(out, "\n}\n");
}

esp_status esp_matrix_save(const esp_matrix *m, const char *path) {
  esp_strbuf b;
  esp_strbuf_init(&b);
  esp_matrix_render_json(m, NULL, &b);
  esp_status st = b.failed ? ESP_ERR_MEMORY : esp_file_write_atomic(path, b.data, b.len);
  esp_strbuf_deinit(&b);
  return st;
}

static void copy_name(char *dst, const char *src) {
  snprintf(dst, ESP_MATRIX_NAME, "%s", src);
}

static esp_status read_columns(const char *path, json_t *tasks, json_t *sets, esp_matrix *m) {
  for (int t = 0; t < m->tasks; t++) {
    const char *name;
    int64_t column;
    ESP_TRY(esp_json_str(json_array_get(tasks, (size_t)t), "name", path, 1, &name));
    ESP_TRY(esp_json_i64(json_array_get(tasks, (size_t)t), "column", path, 1, &column));
    if (column < -1 || column >= m->sets) return esp_fail(ESP_ERR_DATA, "%s: task %d has no such column", path, t);
    copy_name(m->task_name[t], name);
    m->column[t] = (int)column;
  }
  for (int s = 0; s < m->sets; s++) {
    const char *name, *metric;
    int smaller;
    ESP_TRY(esp_json_str(json_array_get(sets, (size_t)s), "name", path, 1, &name));
    ESP_TRY(esp_json_str(json_array_get(sets, (size_t)s), "metric", path, 1, &metric));
    ESP_TRY(esp_json_bool(json_array_get(sets, (size_t)s), "smaller_better", path, 1, &smaller));
    copy_name(m->set_name[s], name);
    copy_name(m->set_metric[s], metric);
    m->smaller_better[s] = smaller != 0;
  }
  return ESP_OK;
}

static esp_status read_rows(const char *path, const esp_matrix *m, json_t *rows, double *out) {
  if (!json_is_array(rows) || (int)json_array_size(rows) != m->tasks + 1)
    return esp_fail(ESP_ERR_DATA, "%s: not a score matrix (%d rows expected)", path, m->tasks + 1);
  for (int row = 0; row <= m->tasks; row++) {
    json_t *r = json_array_get(rows, (size_t)row);
    if (!json_is_array(r) || (int)json_array_size(r) != m->sets)
      return esp_fail(ESP_ERR_DATA, "%s: row %d must have %d cells", path, row, m->sets);
    for (int s = 0; s < m->sets; s++) {
      json_t *v = json_array_get(r, (size_t)s);
      if (json_is_number(v)) out[row * m->sets + s] = json_number_value(v);
    }
  }
  return ESP_OK;
}

esp_status esp_matrix_load(const char *path, esp_matrix **out) {
  esp_status st;
  json_t *j = NULL;
  esp_matrix *m = NULL;
  *out = NULL;
  ESP_GOTO(esp_json_load(path, &j));
  json_t *tasks = json_object_get(j, "tasks"), *sets = json_object_get(j, "sets");
  json_t *malformed = json_object_get(j, "malformed");
  if (!json_is_array(tasks) || !json_is_array(sets) || json_array_size(tasks) > 100000 ||
      json_array_size(sets) > 100000) {
    st = esp_fail(ESP_ERR_DATA, "%s: not a score matrix (tasks, sets and tasks+1 rows expected)", path);
    goto out;
  }
  ESP_GOTO(esp_matrix_create((int)json_array_size(tasks), (int)json_array_size(sets), &m));
  m->joint = json_is_true(json_object_get(j, "joint"));
  ESP_GOTO(read_columns(path, tasks, sets, m));
  ESP_GOTO(read_rows(path, m, json_object_get(j, "rows"), m->score));
  if (malformed) ESP_GOTO(read_rows(path, m, malformed, m->malformed));
  *out = m;
  m = NULL;
out:
  esp_matrix_destroy(m);
  json_decref(j);
  return st;
}
