/* after.c: what a recipe wants once all tasks are trained. */
#include <stdarg.h>
#include <stdio.h>

#include "api/api.h"
#include "eval/report.h"
#include "merge/merge.h"

static void note(const esp_run_options *opt, const char *path, const char *fmt, ...) ESP_PRINTF(3, 4);
static void note(const esp_run_options *opt, const char *path, const char *fmt, ...) {
  char text[1024];
  va_list args;
  if (!opt || !opt->on_event) return;
  va_start(args, fmt);
  vsnprintf(text, sizeof text, fmt, args);
  va_end(args);
  esp_event e = {
      .kind = ESP_EVENT_NOTE, .phase = "after", .task = "", .set = "", .metric = "", .path = path, .text = text};
  opt->on_event(opt->ctx, &e);
}

static esp_status merge_all(const esp_after_step *a, const esp_merge_spec *spec, const esp_run_options *opt) {
  esp_merge_stats m;
  ESP_TRY(esp_merge_write(spec, &m));
  note(opt, a->out, "merged into %s: %lld tensors, %lld changed", a->out, (long long)m.tensors, (long long)m.changed);
  if (a->verify <= 0) return ESP_OK;
  esp_verify_stats v;
  ESP_TRY(esp_merge_verify(spec, a->verify, &v));
  note(opt, a->out,
       "merged against unmerged on %lld rows: largest logit difference %.3g (%.3g of the largest logit), same top "
       "token on %.2f%%",
       (long long)v.rows, v.max_abs, v.max_rel, 100 * v.top1_agreement);
  return ESP_OK;
}

/* The last adapter, or all of them where the policy stacks them. */
static esp_status after_merge(const esp_recipe *r, const esp_after_step *a, const char *base,
                              const esp_run_options *opt) {
  int first = r->continual.policy == ESP_POLICY_STACK ? 0 : r->n_tasks - 1, n = r->n_tasks - first;
  const char **adapters = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *adapters);
  char *paths = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * ESP_PATH);
  esp_status st = adapters && paths ? ESP_OK : ESP_ERR_MEMORY;
  for (int i = 0; st == ESP_OK && i < n; i++)
    adapters[i] = esp_train_adapter(r, first + i, paths + (size_t)i * ESP_PATH);
  esp_merge_spec spec = {.base = base, .adapters = adapters, .n_adapters = n, .out = a->out, .dtype = a->dtype};
  if (st == ESP_OK) st = merge_all(a, &spec, opt);
  esp_mem_free(adapters);
  esp_mem_free(paths);
  return st;
}

static esp_status after_export(const esp_after_step *a, const char *base, const char *adapter,
                               const esp_run_options *opt) {
  esp_svd_stats s = {0};
  ESP_TRY(esp_export_write(base, adapter, a->out, a->target != NULL, a->target != NULL, 0, &s));
  if (s.max_error > 0)
    note(opt, a->out, "adapter exported to %s, rank %lld, relative error: mean %.3g, largest %.3g", a->out,
         (long long)s.rank, s.mean_error, s.max_error);
  else
    note(opt, a->out, "adapter exported to %s", a->out);
  return ESP_OK;
}

esp_status esp_api_after(const esp_recipe *r, const esp_run_options *opt) {
  char base[ESP_PATH], adapter[ESP_PATH];
  ESP_TRY(esp_train_last(r, base, adapter));
  for (int i = 0; i < r->n_after; i++) {
    const esp_after_step *a = &r->after[i];
    switch (a->kind) {
    case ESP_AFTER_MERGE:
      ESP_TRY(after_merge(r, a, base, opt));
      break;
    case ESP_AFTER_MERGE_TASKS:
      ESP_TRY(esp_api_merge_tasks(r, i));
      note(opt, a->out, "%d tasks merged by %s into %s", r->n_tasks, a->method.name, a->out);
      break;
    case ESP_AFTER_EXPORT:
      ESP_TRY(after_export(a, base, adapter, opt));
      break;
    case ESP_AFTER_REPORT:
      ESP_TRY(esp_report_write(r->checkpoint.output_dir, a->out));
      note(opt, a->out, "report written to %s", a->out);
      break;
    }
  }
  return ESP_OK;
}
