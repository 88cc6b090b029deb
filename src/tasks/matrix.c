#include "tasks/matrix.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/error.h"
#include "core/mem.h"
#include "io/file.h"
#include "io/json.h"

esp_status esp_matrix_create(int tasks, int sets, esp_matrix **out) {
  *out = NULL;
  esp_matrix *m = esp_mem_alloc(ESP_MEM_HOST, sizeof *m);
  if (!m) return ESP_ERR_MEMORY;
  m->tasks = tasks;
  m->sets = sets;
  m->task_name = esp_mem_alloc(ESP_MEM_HOST, (size_t)tasks * ESP_MATRIX_NAME);
  m->set_name = esp_mem_alloc(ESP_MEM_HOST, (size_t)sets * ESP_MATRIX_NAME);
  m->set_metric = esp_mem_alloc(ESP_MEM_HOST, (size_t)sets * ESP_MATRIX_NAME);
  m->smaller_better = esp_mem_alloc(ESP_MEM_HOST, (size_t)sets * sizeof(bool));
  m->column = esp_mem_alloc(ESP_MEM_HOST, (size_t)tasks * sizeof(int));
  m->score = esp_mem_alloc(ESP_MEM_HOST, (size_t)(tasks + 1) * (size_t)sets * sizeof(double));
  if (!m->task_name || !m->set_name || !m->set_metric || !m->smaller_better || !m->column || !m->score) {
    esp_matrix_destroy(m);
    return ESP_ERR_MEMORY;
  }
  for (int t = 0; t < tasks; t++) m->column[t] = -1;
  for (int i = 0; i < (tasks + 1) * sets; i++) m->score[i] = NAN;
  *out = m;
  return ESP_OK;
}

void esp_matrix_destroy(esp_matrix *m) {
  if (!m) return;
  esp_mem_free(m->task_name);
  esp_mem_free(m->set_name);
  esp_mem_free(m->set_metric);
  esp_mem_free(m->smaller_better);
  esp_mem_free(m->column);
  esp_mem_free(m->score);
  esp_mem_free(m);
}

/* The score of task t's own set in a row, larger better; NaN when the task has none. */
static double own(const esp_matrix *m, int row, int task) {
  int c = m->column[task];
  if (c < 0) return NAN;
  double v = *esp_matrix_cell(m, row, c);
  return m->smaller_better[c] ? -v : v;
}

void esp_matrix_summarise(const esp_matrix *m, esp_matrix_summary *out) {
  int T = m->tasks;
  double acc = 0, bwt = 0, forgetting = 0, fwt = 0, least = INFINITY, learning = 0;
  for (int t = 0; t < T; t++) {
    double last = own(m, T, t), best = -INFINITY;
    acc += last;
    learning += own(m, t + 1, t);
    if (!(last >= least)) least = last; /* NaN stays */
    if (t + 1 < T) {
      bwt += last - own(m, t + 1, t);
      for (int i = 1; i < T; i++) best = own(m, i, t) > best ? own(m, i, t) : best;
      forgetting += best - last;
    }
    if (t > 0) fwt += own(m, t, t) - own(m, 0, t);
  }
  out->acc = T ? acc / T : NAN;
  out->learning_acc = T ? learning / T : NAN;
  out->min_acc = T ? least : NAN;
  out->bwt = T > 1 ? bwt / (T - 1) : NAN;
  out->forgetting = T > 1 && isfinite(forgetting) ? forgetting / (T - 1) : NAN;
  out->fwt = T > 1 ? fwt / (T - 1) : NAN;
}

static void put_number(esp_strbuf *out, const char *name, double v) {
  if (isnan(v))
    esp_strbuf_printf(out, "%s -", name);
  else
    esp_strbuf_printf(out, "%s %.3f", name, v);
}

static bool is_own_column(const esp_matrix *m, int set) {
  for (int t = 0; t < m->tasks; t++)
    if (m->column[t] == set) return true;
  return false;
}

void esp_matrix_render_text(const esp_matrix *m, bool formulas, esp_strbuf *out) {
  int first = (int)strlen("after \\ on"), width = 8;
  for (int t = 0; t < m->tasks; t++) {
    int n = (int)strlen(m->task_name[t]) + 4;
    first = n > first ? n : first;
  }
  for (int s = 0; s < m->sets; s++) width = (int)strlen(m->set_name[s]) > width ? (int)strlen(m->set_name[s]) : width;
  esp_strbuf_printf(out, "%-*s", first, "after \\ on");
  for (int s = 0; s < m->sets; s++)
    esp_strbuf_printf(out, " %s%*s", is_own_column(m, s) ? "" : "| ", width, m->set_name[s]);
  esp_strbuf_putc(out, '\n');
  for (int row = 0; row <= m->tasks; row++) {
    bool any = false;
    for (int s = 0; s < m->sets; s++) any |= !isnan(*esp_matrix_cell(m, row, s));
    if (!any) continue;
    char name[ESP_MATRIX_NAME + 16];
    if (row == 0)
      snprintf(name, sizeof name, "base");
    else
      snprintf(name, sizeof name, "%d %s", row, m->task_name[row - 1]);
    esp_strbuf_printf(out, "%-*s", first, name);
    for (int s = 0; s < m->sets; s++) {
      double v = *esp_matrix_cell(m, row, s);
      esp_strbuf_puts(out, is_own_column(m, s) ? " " : " | ");
      if (isnan(v))
        esp_strbuf_printf(out, "%*s", width, "-");
      else
        esp_strbuf_printf(out, "%*.3f", width, v);
    }
    esp_strbuf_putc(out, '\n');
  }
  esp_matrix_summary x;
  esp_matrix_summarise(m, &x);
  put_number(out, "ACC", x.acc);
  put_number(out, "   BWT", x.bwt);
  put_number(out, "   FWT", x.fwt);
  put_number(out, "   forgetting", x.forgetting);
  put_number(out, "   learning", x.learning_acc);
  put_number(out, "   min-ACC", x.min_acc);
  esp_strbuf_putc(out, '\n');
  if (!formulas) return;
  esp_strbuf_puts(
      out, "R[i][j]: score on set j after task i (row 0: base); c(t): task t's own set; T tasks\n"
           "ACC = 1/T sum_t R[T][c(t)]            learning = 1/T sum_t R[t][c(t)]      min-ACC = min_t R[T][c(t)]\n"
           "BWT = 1/(T-1) sum_{t<T} (R[T][c(t)] - R[t][c(t)])\n"
           "FWT = 1/(T-1) sum_{t>1} (R[t-1][c(t)] - R[0][c(t)])\n"
           "forgetting = 1/(T-1) sum_{t<T} (max_{1<=i<T} R[i][c(t)] - R[T][c(t)])\n");
  for (int s = 0; s < m->sets; s++)
    esp_strbuf_printf(out, "%s: %s%s%s\n", m->set_name[s], m->set_metric[s],
                      m->smaller_better[s] ? " (smaller is better: enters the formulas with its sign turned)" : "",
                      is_own_column(m, s) ? "" : " (probe: in no formula)");
}

static void json_number(esp_strbuf *out, double v) {
  if (isfinite(v))
    esp_strbuf_printf(out, "%.17g", v);
  else
    esp_strbuf_puts(out, "null");
}

void esp_matrix_render_json(const esp_matrix *m, esp_strbuf *out) {
  esp_strbuf_puts(out, "{\n  \"tasks\": [");
  for (int t = 0; t < m->tasks; t++) {
    esp_strbuf_puts(out, t ? ", " : "");
    esp_strbuf_puts(out, "{\"name\": ");
    esp_strbuf_json(out, m->task_name[t], strlen(m->task_name[t]));
    esp_strbuf_printf(out, ", \"column\": %d}", m->column[t]);
  }
  esp_strbuf_puts(out, "],\n  \"sets\": [");
  for (int s = 0; s < m->sets; s++) {
    esp_strbuf_puts(out, s ? ", " : "");
    esp_strbuf_puts(out, "{\"name\": ");
    esp_strbuf_json(out, m->set_name[s], strlen(m->set_name[s]));
    esp_strbuf_puts(out, ", \"metric\": ");
    esp_strbuf_json(out, m->set_metric[s], strlen(m->set_metric[s]));
    esp_strbuf_printf(out, ", \"smaller_better\": %s}", m->smaller_better[s] ? "true" : "false");
  }
  esp_strbuf_puts(out, "],\n  \"rows\": [");
  for (int row = 0; row <= m->tasks; row++) {
    esp_strbuf_puts(out, row ? ",\n    [" : "\n    [");
    for (int s = 0; s < m->sets; s++) {
      esp_strbuf_puts(out, s ? ", " : "");
      json_number(out, *esp_matrix_cell(m, row, s));
    }
    esp_strbuf_putc(out, ']');
  }
  esp_matrix_summary x;
  esp_matrix_summarise(m, &x);
  const char *names[] = {"acc", "bwt", "fwt", "forgetting", "learning_acc", "min_acc"};
  double values[] = {x.acc, x.bwt, x.fwt, x.forgetting, x.learning_acc, x.min_acc};
  esp_strbuf_puts(out, "\n  ]");
  for (int i = 0; i < 6; i++) {
    esp_strbuf_printf(out, ",\n  \"%s\": ", names[i]);
    json_number(out, values[i]);
  }
  esp_strbuf_puts(out, "\n}\n");
}

esp_status esp_matrix_save(const esp_matrix *m, const char *path) {
  esp_strbuf b;
  esp_strbuf_init(&b);
  esp_matrix_render_json(m, &b);
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

esp_status esp_matrix_load(const char *path, esp_matrix **out) {
  esp_status st;
  json_t *j = NULL;
  esp_matrix *m = NULL;
  *out = NULL;
  ESP_GOTO(esp_json_load(path, &j));
  json_t *tasks = json_object_get(j, "tasks"), *sets = json_object_get(j, "sets"), *rows = json_object_get(j, "rows");
  if (!json_is_array(tasks) || !json_is_array(sets) || !json_is_array(rows) ||
      json_array_size(rows) != json_array_size(tasks) + 1 || json_array_size(tasks) > 100000 ||
      json_array_size(sets) > 100000) {
    st = esp_fail(ESP_ERR_DATA, "%s: not a score matrix (tasks, sets and tasks+1 rows expected)", path);
    goto out;
  }
  ESP_GOTO(esp_matrix_create((int)json_array_size(tasks), (int)json_array_size(sets), &m));
  ESP_GOTO(read_columns(path, tasks, sets, m));
  for (int row = 0; row <= m->tasks; row++) {
    json_t *r = json_array_get(rows, (size_t)row);
    if (!json_is_array(r) || (int)json_array_size(r) != m->sets) {
      st = esp_fail(ESP_ERR_DATA, "%s: row %d must have %d cells", path, row, m->sets);
      goto out;
    }
    for (int s = 0; s < m->sets; s++) {
      json_t *v = json_array_get(r, (size_t)s);
      if (json_is_number(v)) *esp_matrix_cell(m, row, s) = json_number_value(v);
    }
  }
  *out = m;
  m = NULL;
out:
  esp_matrix_destroy(m);
  json_decref(j);
  return st;
}
