#include "eval/run_data.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/strbuf.h"
#include "io/file.h"

static const char *const value_key[ESP_RUN_VALUES] = {"loss", "lr", "grad_norm", "seconds"};

void esp_run_data_deinit(esp_run_data *d) {
  esp_mem_free(d->step);
  for (int k = 0; k < ESP_RUN_VALUES; k++) esp_mem_free(d->value[k]);
  for (int c = 0; c < d->n_curves; c++) {
    esp_mem_free(d->curves[c].step);
    esp_mem_free(d->curves[c].score);
    esp_mem_free(d->curves[c].task);
  }
  esp_mem_free(d->names);
  esp_mem_free(d->curves);
  esp_mem_free(d->switches);
  esp_matrix_destroy(d->matrix);
  json_decref(d->result);
  *d = (esp_run_data){0};
}

static esp_status grow(double **arrays[], int n_arrays, int64_t n, int64_t *cap) {
  if (n < *cap) return ESP_OK;
  int64_t more = *cap ? 2 * *cap : 256;
  for (int k = 0; k < n_arrays; k++) {
    double *p = esp_mem_realloc(ESP_MEM_HOST, *arrays[k], (size_t)more * sizeof *p);
    if (!p) return ESP_ERR_MEMORY;
    *arrays[k] = p;
  }
  *cap = more;
  return ESP_OK;
}

static double number(const json_t *row, const char *key) {
  const json_t *v = json_object_get(row, key);
  return json_is_number(v) ? json_number_value(v) : NAN;
}

static esp_status name_index(esp_run_data *d, const char *name, int *out) {
  for (*out = 0; *out < d->n_names; ++*out)
    if (!strcmp(d->names[*out], name)) return ESP_OK;
  void *p = esp_mem_realloc(ESP_MEM_HOST, d->names, (size_t)(d->n_names + 1) * sizeof *d->names);
  if (!p) return ESP_ERR_MEMORY;
  d->names = p;
  snprintf(d->names[d->n_names++], ESP_MATRIX_NAME, "%s", name);
  return ESP_OK;
}

static esp_status add_step(esp_run_data *d, const json_t *row) {
  double **arrays[ESP_RUN_VALUES + 1] = {&d->step};
  for (int k = 0; k < ESP_RUN_VALUES; k++) arrays[k + 1] = &d->value[k];
  ESP_TRY(grow(arrays, ESP_RUN_VALUES + 1, d->n, &d->cap));
  d->step[d->n] = number(row, "step");
  for (int k = 0; k < ESP_RUN_VALUES; k++) d->value[k][d->n] = number(row, value_key[k]);
  const char *task = json_string_value(json_object_get(row, "task"));
  if (task && (d->n_switches == 0 || strcmp(d->switches[d->n_switches - 1].name, task) != 0)) {
    esp_run_switch *s = esp_mem_realloc(ESP_MEM_HOST, d->switches, (size_t)(d->n_switches + 1) * sizeof *d->switches);
    if (!s) return ESP_ERR_MEMORY;
    d->switches = s;
    s[d->n_switches].step = d->step[d->n];
    snprintf(s[d->n_switches++].name, ESP_MATRIX_NAME, "%s", task);
  }
  double speed = number(row, "tokens_per_second"), seconds = number(row, "seconds");
  double memory = number(row, "memory_peak");
  if (!isnan(speed)) d->tokens_per_second += speed;
  if (!isnan(seconds)) d->seconds += seconds;
  if (memory > d->memory) d->memory = memory;
  d->n++;
  return ESP_OK;
}

static esp_status add_score(esp_run_data *d, const char *set, const char *metric, int task, double step, double score) {
  esp_run_curve *c = NULL;
  for (int i = 0; i < d->n_curves && !c; i++)
    if (!strcmp(d->curves[i].set, set) && !strcmp(d->curves[i].metric, metric)) c = &d->curves[i];
  if (!c) {
    esp_run_curve *p = esp_mem_realloc(ESP_MEM_HOST, d->curves, (size_t)(d->n_curves + 1) * sizeof *p);
    if (!p) return ESP_ERR_MEMORY;
    d->curves = p;
    c = &p[d->n_curves++];
    snprintf(c->set, sizeof c->set, "%s", set);
    snprintf(c->metric, sizeof c->metric, "%s", metric);
  }
  double **arrays[] = {&c->step, &c->score, &c->task};
  ESP_TRY(grow(arrays, 3, c->n, &c->cap));
  c->step[c->n] = step;
  c->task[c->n] = task;
  c->score[c->n++] = score;
  return ESP_OK;
}

static esp_status add_line(esp_run_data *d, const json_t *row) {
  const char *set = json_string_value(json_object_get(row, "eval"));
  const char *metric = json_string_value(json_object_get(row, "metric"));
  const char *name = json_string_value(json_object_get(row, "task"));
  double step = number(row, "step");
  int task = 0;
  if (isnan(step)) return ESP_OK;
  if (name) ESP_TRY(name_index(d, name, &task));
  if (set && metric) return add_score(d, set, metric, task, step, number(row, "score"));
  return json_object_get(row, "loss") ? add_step(d, row) : ESP_OK;
}

static esp_status read_metrics(const char *path, esp_run_data *d) {
  esp_status st;
  char *text = NULL;
  size_t n;
  ESP_GOTO(esp_file_read(path, &text, &n));
  int line = 1;
  for (char *p = text; *p; line++) {
    char *end = strchr(p, '\n');
    size_t len = end ? (size_t)(end - p) : strlen(p);
    json_t *row = NULL;
    char place[PATH_MAX + 16];
    snprintf(place, sizeof place, "%s:%d", path, line);
    if (len > 0) {
      ESP_GOTO(esp_json_parse(p, len, place, &row));
      st = add_line(d, row);
      json_decref(row);
      if (st != ESP_OK) goto out;
    }
    p += len + (end ? 1 : 0);
  }
  if (d->n > 0) d->tokens_per_second /= (double)d->n;
out:
  esp_mem_free(text);
  return st;
}

esp_status esp_run_data_read(const char *run_dir, esp_run_data *out) {
  esp_status st;
  char path[PATH_MAX];
  *out = (esp_run_data){0};
  ESP_GOTO(read_metrics(esp_path_join(path, sizeof path, run_dir, "metrics.jsonl"), out));
  if (esp_file_exists(esp_path_join(path, sizeof path, run_dir, "matrix.json")))
    ESP_GOTO(esp_matrix_load(path, &out->matrix));
  if (esp_file_exists(esp_path_join(path, sizeof path, run_dir, "result.json")))
    ESP_GOTO(esp_json_load(path, &out->result));
out:
  if (st != ESP_OK) esp_run_data_deinit(out);
  return st;
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

double esp_run_data_step_seconds(const esp_run_data *d) {
  if (d->n == 0) return NAN;
  double *v = esp_mem_alloc(ESP_MEM_HOST, (size_t)d->n * sizeof *v), median = NAN;
  if (!v) return NAN;
  int64_t n = 0;
  for (int64_t i = 0; i < d->n; i++)
    if (!isnan(d->value[ESP_RUN_SECONDS][i])) v[n++] = d->value[ESP_RUN_SECONDS][i];
  qsort(v, (size_t)n, sizeof *v, by_value);
  if (n > 0) median = n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
  esp_mem_free(v);
  return median;
}

const esp_run_curve *esp_run_data_curve(const esp_run_data *d, const char *set, const char *metric) {
  for (int i = 0; i < d->n_curves; i++)
    if (!strcmp(d->curves[i].set, set) && !strcmp(d->curves[i].metric, metric)) return &d->curves[i];
  return NULL;
}

static int task_of(const esp_matrix *m, const char *name) {
  for (int t = 0; t < m->tasks; t++)
    if (!strcmp(m->task_name[t], name)) return t;
  return 0;
}

esp_status esp_run_data_inside(const esp_run_data *d, double window, esp_curve_summary *out) {
  esp_status st = ESP_OK;
  const esp_matrix *m = d->matrix;
  *out = (esp_curve_summary){NAN, NAN, NAN, NAN, NAN, 0};
  if (!m) return ESP_OK;
  esp_score_points *points = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m->tasks + 1) * sizeof *points);
  if (!points) return ESP_ERR_MEMORY;
  bool curves = d->n > 0; /* without steps all points have one */
  for (int t = 0; t < m->tasks; t++)
    curves =
        curves && m->column[t] >= 0 && esp_run_data_curve(d, m->set_name[m->column[t]], m->set_metric[m->column[t]]);
  for (int t = 0; t < m->tasks && m->column[t] >= 0; t++) {
    const esp_run_curve *c = esp_run_data_curve(d, m->set_name[m->column[t]], m->set_metric[m->column[t]]);
    points[t].at = esp_mem_alloc(ESP_MEM_HOST, (size_t)(curves ? c->n : m->tasks + 1) * sizeof *points[t].at);
    if (!points[t].at) {
      st = ESP_ERR_MEMORY;
      goto out;
    }
    if (!curves) points[t].n = esp_matrix_points(m, t, points[t].at);
    for (int64_t i = 0; curves && i < c->n; i++)
      if (!isnan(c->score[i]))
        points[t].at[points[t].n++] = (esp_score_point){task_of(m, d->names[(int)c->task[i]]), c->step[i], c->score[i]};
  }
  esp_curve_summarise(m, points, curves ? window : 0, out);
out:
  for (int t = 0; t < m->tasks; t++) esp_mem_free(points[t].at);
  esp_mem_free(points);
  return st;
}

double esp_run_data_result(const esp_run_data *d, const char *key) {
  const json_t *at = d->result;
  const char *dot = strchr(key, '.');
  char head[64];
  if (dot) {
    snprintf(head, sizeof head, "%.*s", (int)(dot - key), key);
    at = json_object_get(at, head);
    key = dot + 1;
  }
  return number(at, key);
}

double esp_run_data_strategies(const esp_run_data *d) {
  const char *key;
  json_t *v;
  double sum = 0;
  if (!d->result) return NAN;
  json_object_foreach(json_object_get(d->result, "strategies"), key, v) sum += json_number_value(v);
  return sum;
}

void esp_run_data_memory(const esp_run_data *d, esp_strbuf *out) {
  static const struct {
    const char *key, *label;
  } rows[] = {{"weights", "frozen base"},
              {"params", "adapter (values, gradients)"},
              {"optim", "optimizer"},
              {"activations", "activations"},
              {"workspace", "workspace"}};
  const char *key;
  json_t *v, *memory = d->result ? json_object_get(d->result, "memory") : NULL;
  if (!memory) return;
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
    esp_strbuf_printf(out, "%-28s %10.2f MiB\n", rows[i].label, number(memory, rows[i].key) / 1048576);
  json_object_foreach(json_object_get(d->result, "strategies"), key, v)
      esp_strbuf_printf(out, "strategy %-19s %10.2f MiB\n", key, json_number_value(v) / 1048576);
}
