/* lowrank.c: weight differences as LoRA factors: extract and export. */
#include "merge/factors.h"

static esp_status difference(const esp_model *a, const esp_model *b, const esp_site *sa, const esp_site *sb,
                             float *delta, float *scratch) {
  ESP_TRY(esp_site_read_weight(b, sb, delta));
  ESP_TRY(esp_site_read_weight(a, sa, scratch));
  for (int64_t i = 0; i < sa->out * sa->in; i++) delta[i] -= scratch[i];
  return ESP_OK;
}

esp_status esp_extract_write(const char *base, const char *tuned, const char *out, int64_t rank, const char *target,
                             esp_svd_stats *stats) {
  esp_status st;
  esp_merge_inputs x = {0}, y = {0};
  esp_factors *f = NULL;
  float *delta = NULL, *scratch = NULL;
  int n = 0, sites = 0;
  *stats = (esp_svd_stats){0};
  if (rank < 1) return esp_fail(ESP_ERR_RECIPE, "extract: rank must be at least 1");
  esp_merge_spec a = {.base = base}, b = {.base = tuned};
  ESP_GOTO(esp_merge_open(&a, ESP_F32, false, &x));
  ESP_GOTO(esp_merge_open(&b, ESP_F32, false, &y));
  esp_adapter_cfg match = {.target_regex = target ? target : "all-linear"};
  esp_site **list;
  sites = esp_model_sites(x.model, &list);
  f = esp_mem_alloc(ESP_MEM_HOST, (size_t)(sites + 1) * sizeof *f);
  int64_t largest = 0;
  for (int i = 0; i < sites; i++)
    if (list[i]->out * list[i]->in > largest) largest = list[i]->out * list[i]->in;
  delta = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)largest * 4);
  scratch = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)largest * 4);
  if (!f || !delta || !scratch) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int i = 0; i < sites; i++) {
    esp_site *s = list[i], *t = esp_model_find_site(y.model, s->path);
    if (s->kind != ESP_SITE_LINEAR || !esp_adapter_matches(&match, s)) continue;
    if (!t || t->out != s->out || t->in != s->in) {
      st = esp_fail(ESP_ERR_DATA, "%s: module '%s' [%lld, %lld] of %s is missing here or has another shape", tuned,
                    s->path, (long long)s->out, (long long)s->in, base);
      goto out;
    }
    ESP_GOTO(difference(x.model, y.model, s, t, delta, scratch));
    ESP_GOTO(esp_factors_truncate(&f[n++], s, delta, rank, stats));
  }
  if (n == 0) {
    st = esp_fail(ESP_ERR_RECIPE, "extract: target '%s' matches no linear module of %s", match.target_regex, base);
    goto out;
  }
  stats->mean_error /= n;
  stats->rank = rank;
  st = esp_factors_write(base, f, n, rank, out);
out:
  esp_factors_deinit(f, sites);
  esp_mem_free(delta);
  esp_mem_free(scratch);
  esp_merge_close(&x);
  esp_merge_close(&y);
  return st;
}

/* Of a kind whose change is no matrix: with all the ranks it has. */
static esp_status export_near(esp_adapter *a, esp_site *s, int64_t rank, esp_factors *f, esp_svd_stats *stats) {
  double error;
  int64_t r = a->kind->near_low_rank(a, s, NULL, NULL, &error);
  if (r < 0) return ESP_ERR_RECIPE;
  if (rank > 0 && rank < r)
    return esp_fail(ESP_ERR_RECIPE, "export: type %s on '%s' is near to a LoRA of rank %lld; give at least that rank",
                    a->kind->name, s->path, (long long)r);
  ESP_TRY(esp_factors_init(f, s, r));
  if (a->kind->near_low_rank(a, s, f->a, f->b, NULL) < 0) return ESP_ERR_MEMORY;
  esp_factors_count(stats, error);
  return ESP_OK;
}

/* The site's change as factors: exact where the kind has a low-rank form that fits `rank`, else truncated. */
static esp_status export_site(esp_merge_inputs *in, esp_site *s, int64_t rank, esp_factors *f, esp_svd_stats *stats) {
  esp_adapter *a = in->adapters[0];
  if (!a->kind->mergeable) return export_near(a, s, rank, f, stats);
  int64_t exact = a->kind->low_rank ? a->kind->low_rank(a, s, NULL, NULL) : 0;
  if (exact > 0 && (rank == 0 || exact <= rank)) {
    ESP_TRY(esp_factors_init(f, s, exact));
    a->kind->low_rank(a, s, f->a, f->b);
    stats->sites++;
    return ESP_OK;
  }
  if (rank == 0)
    return esp_fail(ESP_ERR_RECIPE, "export: type %s has no exact low-rank form on '%s'; give a rank", a->kind->name,
                    s->path);
  float *delta = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(s->out * s->in) * 4);
  if (!delta) return ESP_ERR_MEMORY;
  esp_status st = esp_site_delta(in, 0, s, 0, s->out, delta);
  if (st == ESP_OK) st = esp_factors_truncate(f, s, delta, rank, stats);
  esp_mem_free(delta);
  return st;
}

esp_status esp_export_write(const char *base, const char *adapter, const char *out, bool as_lora, bool for_vllm,
                            int64_t rank, esp_svd_stats *stats) {
  esp_status st;
  esp_merge_inputs in = {0};
  esp_factors *f = NULL;
  int n = 0, sites = 0;
  *stats = (esp_svd_stats){0};
  esp_merge_spec spec = {.base = base, .adapters = &adapter, .n_adapters = 1};
  ESP_GOTO(esp_merge_open(&spec, ESP_F32, false, &in));
  if (!as_lora && !for_vllm) {
    st = esp_adapter_save(in.adapters[0], out);
    goto out;
  }
  ESP_GOTO(esp_lora_carries(&in, 0, adapter, true));
  esp_site **list;
  sites = esp_model_sites(in.model, &list);
  f = esp_mem_alloc(ESP_MEM_HOST, (size_t)(sites + 1) * sizeof *f);
  if (!f) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  int64_t widest = 0;
  for (int i = 0; i < sites; i++) {
    if (!esp_adapter_changes(in.adapters[0], list[i])) continue;
    ESP_GOTO(export_site(&in, list[i], rank, &f[n], stats));
    widest = f[n].rank > widest ? f[n].rank : widest;
    n++;
  }
  if (n == 0) {
    st = esp_fail(ESP_ERR_DATA, "%s: the adapter changes no module", adapter);
    goto out;
  }
  stats->mean_error /= n;
  if (for_vllm) { /* the ranks that vLLM accepts as max_lora_rank */
    int64_t r = 8;
    while (r < widest) r *= 2;
    widest = r;
    if (r > 512) {
      st = esp_fail(ESP_ERR_RECIPE, "export: rank %lld, vLLM loads 512 at most; give a rank", (long long)r);
      goto out;
    }
  }
  stats->rank = widest;
  st = esp_factors_write(base, f, n, widest, out);
out:
  esp_factors_deinit(f, sites);
  esp_merge_close(&in);
  return st;
}
