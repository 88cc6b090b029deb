#include "eval/report_samples.h"

#include <limits.h>
#include <stdio.h>

#include "core/mem.h"
#include "io/file.h"

esp_status esp_sample_rows_read(const char *run_dir, int tasks, esp_sample_rows *out) {
  esp_status st = ESP_OK;
  char dir[PATH_MAX], path[PATH_MAX], name[32];
  *out = (esp_sample_rows){.rows = tasks + 1};
  out->row = esp_mem_alloc(ESP_MEM_HOST, (size_t)out->rows * sizeof *out->row);
  if (!out->row) return ESP_ERR_MEMORY;
  esp_path_join(dir, sizeof dir, run_dir, "samples");
  for (int r = 0; r < out->rows; r++) {
    snprintf(name, sizeof name, "%d.json", r);
    if (!esp_file_exists(esp_path_join(path, sizeof path, dir, name))) continue;
    ESP_GOTO(esp_json_load(path, &out->row[r]));
    int n = (int)json_array_size(out->row[r]);
    if (!json_is_array(out->row[r]) || (out->n > 0 && n != out->n)) {
      st = esp_fail(ESP_ERR_DATA, "%s: not the samples of this run", path);
      goto out;
    }
    out->n = n;
  }
out:
  if (st != ESP_OK) esp_sample_rows_deinit(out);
  return st;
}

void esp_sample_rows_deinit(esp_sample_rows *s) {
  for (int r = 0; s->row && r < s->rows; r++) json_decref(s->row[r]);
  esp_mem_free(s->row);
  *s = (esp_sample_rows){0};
}

const char *esp_sample_text(const esp_sample_rows *s, int row, int i, const char *key) {
  for (int r = row < 0 ? 0 : row; r < s->rows; r++) {
    const char *text = json_string_value(json_object_get(json_array_get(s->row[r], (size_t)i), key));
    if (text || row >= 0) return text;
  }
  return NULL;
}
