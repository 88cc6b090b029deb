/* report.c: pages and text about runs and sweeps. */
#include <stdio.h>
#include <string.h>

#include "api/api.h"
#include "core/strbuf.h"
#include "eval/html.h"
#include "eval/report.h"
#include "io/file.h"

static bool is_sweep(const char *dir) {
  char path[ESP_PATH];
  return esp_file_exists(esp_path_join(path, sizeof path, dir, "sweep.json"));
}

/* Directories as runs, each a variant of its own by its name. */
static esp_status several(const char *const *dirs, int n, esp_sweep *out) {
  esp_status st = ESP_OK;
  char path[ESP_PATH], name[ESP_PATH];
  *out = (esp_sweep){.dirs = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *out->dirs),
                     .runs = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *out->runs),
                     .n = n};
  if (!out->dirs || !out->runs) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int i = 0; i < n; i++) {
    if (!esp_file_exists(esp_path_join(path, sizeof path, dirs[i], "metrics.jsonl"))) {
      st = esp_fail(ESP_ERR_DATA, "%s: holds no run (no metrics.jsonl)", dirs[i]);
      goto out;
    }
    out->dirs[i] = esp_mem_strdup(ESP_MEM_HOST, esp_html_base_name(dirs[i], name, sizeof name));
    if (!out->dirs[i]) {
      st = ESP_ERR_MEMORY;
      goto out;
    }
    out->runs[i] = (esp_compared){.dir = dirs[i], .variant = out->dirs[i], .order = ""};
    for (int k = 0; k < i; k++) /* two of one name: by their paths */
      if (!strcmp(out->dirs[k], out->dirs[i])) out->runs[i].variant = dirs[i];
    ESP_GOTO(esp_compared_read(&out->runs[i]));
  }
out:
  if (st != ESP_OK) esp_sweep_deinit(out);
  return st;
}

static esp_status gather(const char *const *dirs, int n, esp_sweep *out) {
  return n == 1 ? esp_sweep_read(dirs[0], out) : several(dirs, n, out);
}

esp_status esp_run_report(const char *const *dirs, int n, const char *out) {
  char path[ESP_PATH], name[ESP_PATH];
  esp_sweep sweep;
  if (n == 1 && !is_sweep(dirs[0])) return esp_report_write(dirs[0], out);
  if (!out && n > 1) return esp_fail(ESP_ERR_RECIPE, "report: several runs need a file to write to");
  ESP_TRY(gather(dirs, n, &sweep));
  snprintf(name, sizeof name, "%d runs", n);
  esp_status st =
      esp_report_compare_write(sweep.runs, sweep.n, n == 1 ? esp_html_base_name(dirs[0], name, sizeof name) : name,
                               out ? out : esp_path_join(path, sizeof path, dirs[0], "report.html"));
  esp_sweep_deinit(&sweep);
  return st;
}

esp_status esp_run_report_text(const char *const *dirs, int n, char **text) {
  esp_status st;
  esp_sweep sweep = {0};
  esp_strbuf b;
  esp_strbuf_init(&b);
  *text = NULL;
  if (n == 1 && !is_sweep(dirs[0])) {
    ESP_GOTO(esp_report_text(dirs[0], &b));
  } else {
    ESP_GOTO(gather(dirs, n, &sweep));
    esp_compare_table(sweep.runs, sweep.n, false, &b);
  }
  *text = esp_strbuf_take(&b);
  st = *text ? ESP_OK : ESP_ERR_MEMORY;
out:
  esp_sweep_deinit(&sweep);
  esp_strbuf_deinit(&b);
  return st;
}
