/* elalora.c: ElaLoRA (Chang et al. 2025, arXiv:2504.00254): ranks of y += c P diag(e) Q x leave where they matter least
 * and come where they matter most, in one run. Three phases: warm-up (tinit), adjustment, stabilisation (tfinal).
 *
 * The catalogue has the paper's outline; this is the form chosen. The budget is r per module throughout. Every
 * `interval` steps of the adjustment b ranks move,
 *   b(t) = round(elastic_share * all ranks * (1 - (t - tinit)/(T - tfinal - tinit))^3),
 * the b with the lowest importance (AdaLoRA's, over all modules; a module keeps its last rank) leave, and as many new
 * ones, p and q ~ N(0, 0.02^2) and e = 0, so that the model stays what it is, go one by one to the modules with the
 * highest mean importance per rank that have lost none. A rank that has just come has no statistics: it is judged from
 * the adjustment after the next on, so `interval` should span 1 / (1 - beta) steps. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/triplets.h"
#include "io/json.h"

static esp_status open(esp_adapter *a) {
  ESP_TRY(esp_triplets_open(a));
  esp_triplets *all = a->impl;
  all->grows = all->trades = true;
  a->cfg.target_r = a->cfg.r; /* the budget is the same at the end */
  return ESP_OK;
}

static esp_status check(const esp_adapter_cfg *c) {
  if (!(c->elastic_share > 0 && c->elastic_share <= 0.5))
    return esp_fail(ESP_ERR_RECIPE, "adapter.elastic_share: must be above 0 and at most 0.5");
  return esp_triplets_check(c);
}

static double before_step(esp_adapter *a, int64_t step, int64_t total) {
  esp_triplets_no_decay(a);
  return esp_triplets_orthogonal(a, a->cfg.orth_weight);
}

typedef struct ranked {
  float score;
  int32_t at, site;
} ranked;

static int lowest_first(const void *a, const void *b) { /* equals in order of modules: the same on every machine */
  const ranked *x = a, *y = b;
  if (x->score != y->score) return x->score > y->score ? 1 : -1;
  return x->at - y->at;
}

static esp_status adjust(esp_adapter *a, int64_t b) {
  esp_triplets *all = a->impl;
  int n = all->n_sites;
  int64_t ranks = all->ranks, at = 0, left = b;
  esp_status st = ESP_OK;
  float *score = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ranks + 1) * sizeof *score);
  double *mean = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * sizeof *mean);
  ranked *order = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ranks + 1) * sizeof *order);
  uint8_t *keep = esp_mem_alloc(ESP_MEM_HOST, (size_t)ranks + 1);
  int64_t *rest = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * n + 1) * sizeof *rest), *more = rest + n;
  if (!score || !mean || !order || !keep || !rest) ESP_GOTO(ESP_ERR_MEMORY);
  ESP_GOTO(esp_triplets_scores(a, score));
  for (int i = 0; i < n; i++) {
    const esp_triplet_site *t = a->site_state[all->sites[i]->index];
    rest[i] = t->l.r;
    for (int64_t k = 0; k < t->l.r; k++, at++) {
      order[at] = (ranked){score[at], (int32_t)at, i};
      mean[i] += (double)score[at] / (double)t->l.r;
    }
  }
  memset(keep, 1, (size_t)ranks);
  qsort(order, (size_t)ranks, sizeof *order, lowest_first);
  for (int64_t k = 0; k < ranks && left > 0; k++) {
    int i = order[k].site;
    if (rest[i] == 1) continue;
    rest[i]--;
    keep[order[k].at] = 0;
    mean[i] = -1; /* has lost one: gets none */
    left--;
  }
  for (int64_t need = b - left, round = 0; need > 0; round++)
    for (int taken = 0; taken < n && need > 0; taken++) {
      int best = -1;
      for (int i = 0; i < n; i++)
        if (mean[i] >= 0 && more[i] == round && (best < 0 || mean[i] > mean[best])) best = i;
      if (best < 0) break;
      more[best]++;
      need--;
    }
  bool any = false;
  for (int i = 0; i < n; i++) any |= more[i] > 0;
  if (any) ESP_GOTO(esp_triplets_move(a, keep, more, 0)); /* else every module has lost one: nobody to give them to */
out:
  esp_mem_free(score);
  esp_mem_free(mean);
  esp_mem_free(order);
  esp_mem_free(keep);
  esp_mem_free(rest);
  return st;
}

static esp_status after_step(esp_adapter *a, int64_t step, int64_t total) {
  esp_triplets *all = a->impl;
  int64_t begin, end;
  ESP_TRY(esp_triplets_span(a, total, &begin, &end));
  a->ranks = a->budget = all->ranks;
  if (step > end) return ESP_OK;
  esp_triplets_sense(a);
  if (step <= begin || (step - begin) % a->cfg.interval != 0) return ESP_OK;
  double rest = 1 - (double)(step - begin) / (double)(end - begin);
  int64_t b = (int64_t)floor(a->cfg.elastic_share * (double)all->ranks * rest * rest * rest + 0.5);
  return b > 0 ? adjust(a, b) : ESP_OK;
}

static void config_write(const esp_adapter *a, json_t *j) {
  esp_triplets_config_write(a, j);
  json_object_set_new(j, "elastic_share", json_real(a->cfg.elastic_share));
  json_object_set_new(j, "rank_pattern", esp_triplets_ranks_write(a));
}

static esp_status config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  c->elastic_share = 0.1;
  ESP_TRY(esp_triplets_config_read(j, path, c));
  ESP_TRY(esp_json_f64(j, "elastic_share", path, 0, &c->elastic_share));
  return esp_json_read_patterns(j, "rank_pattern", path, arena, &c->rank_pattern, &c->n_rank_pattern);
}

const esp_adapter_kind esp_kind_elalora = {
    .name = "elalora",
    .peft_type = "ELALORA",
    .summary = "y = W x + c P diag(e) Q x, ranks leave and come at one budget (Chang et al. 2025, arXiv:2504.00254)",
    ESP_TRIPLETS,
    ESP_TRIPLETS_STATE,
    .open = open,
    .init = esp_triplets_init_normal,
    .before_step = before_step,
    .after_step = after_step,
    ESP_TRIPLETS_STATISTICS,
    .config_write = config_write,
    .config_read = config_read,
    .config_check = check,
};
