#include "eval/run_data.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "io/file.h"

static const char *const value_key[ESP_RUN_VALUES] = {"loss", "lr", "grad_norm", "seconds"};

void esp_run_data_deinit(esp_run_data *d) {
  esp_mem_free(d->step);
  for (int k = 0; k < ESP_RUN_VALUES; k++) esp_mem_free(d->value[k]);
  for (int c = 0; c < d->n_curves; c++) {
    esp_mem_free(d->curves[c].step);
    esp_mem_free(d->curves[c].score);
  }
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

static esp_status add_score(esp_run_data *d, const char *set, const char *metric, double step, double score) {
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
  double **arrays[] = {&c->step, &c->score};
  ESP_TRY(grow(arrays, 2, c->n, &c->cap));
  c->step[c->n] = step;
  c->score[c->n++] = score;
  return ESP_OK;
}

static esp_status add_line(esp_run_data *d, const json_t *row) {
  const char *set = json_string_value(json_object_get(row, "eval"));
  const char *metric = json_string_value(json_object_get(row, "metric"));
  double step = number(row, "step");
  if (isnan(step)) return ESP_OK;
  if (set && metric) return add_score(d, set, metric, step, number(row, "score"));
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
