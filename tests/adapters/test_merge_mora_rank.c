/* Ranks that gate themselves (mora_rank): even gates are a plain LoRA; ranks of earlier tasks stay as they are and in
 * the pool, an earlier task is returned to exactly, in memory and from the file; the nearest LoRA is exact where the
 * gates are constant, else nearer than the base and its told error is that of the summed tokens; sums survive a
 * checkpoint; what cannot be done is refused in one line.
 * Mutation seen to be caught: sums of z t taken from t t (col_dot of tg->t with itself) fails "nearest". */
#include <math.h>

#include "adapter_fixture.h"
#include "adapters/task_ranks.h"
#include "io/json.h"
#include "merge/merge.h"

static const char *const sites_used[] = {"q_proj", "v_proj", "down_proj"};
#define CFG(kind)                                                                                                      \
  (esp_adapter_cfg) {                                                                                                  \
    .type = kind, .r = 3, .alpha = 6, .seed = 9, .target = sites_used, .n_target = 3                                   \
  }

static float y[FX_T * FX_VOCAB], z[FX_T * FX_VOCAB], base[FX_T * FX_VOCAB];

static void attach(fx_run *r, const esp_adapter_cfg *cfg, esp_adapter **a) {
  fx_open(r, fx_path("qwen"), ESP_F32, false);
  OK(esp_adapter_create(r->m, cfg, "default", true, a));
  OK(esp_adapters_activate(r->m, a, 1));
}

static void step(fx_run *r, esp_adapter *a, const esp_batch *b, int64_t draw) {
  esp_params_zero_grad(a->params);
  fx_loss(r, b, true, ESP_CKPT_OFF, draw);
  a->kind->before_step(a, draw, 8);
  for (int i = 0; i < a->params->count; i++) {
    const esp_param *p = &a->params->list[i];
    if (!p->frozen)
      r->be->ops->axpby(r->be, esp_param_master(a->params, i), -0.05f, esp_param_grad(a->params, i), 1.0f);
  }
  esp_params_refresh_shadow(a->params);
}

static void even_gates(void **state) {
  (void)state;
  fx_batch f;
  fx_fill(&f);
  fx_run r;
  esp_adapter *a, *lora;
  esp_adapter_cfg cfg = CFG("mora_rank"), plain = CFG("lora");
  cfg.gate_temperature = 1e6;
  attach(&r, &cfg, &a);
  fx_shake(a, 0.1f, 41);
  fx_logits(&r, &f.b, y);
  OK(esp_adapter_create(r.m, &plain, "plain", false, &lora));
  assert_int_equal(lora->params->total, a->params->total);
  for (int i = 0; i < a->params->count; i++) { /* q_proj.lora_A.0.weight is q_proj.lora_A.weight */
    char name[256];
    const char *at = strstr(a->params->list[i].name, ".0.weight");
    assert_non_null(at);
    snprintf(name, sizeof name, "%.*s.weight", (int)(at - a->params->list[i].name), a->params->list[i].name);
    float *x = malloc((size_t)a->params->list[i].numel * sizeof *x);
    esp_params_get(a->params, i, x);
    esp_params_set(lora->params, esp_params_find(lora->params, name), x);
    free(x);
  }
  OK(esp_adapters_activate(r.m, &lora, 1));
  fx_logits(&r, &f.b, z);
  double d = fx_rel(z, y, FX_T * FX_VOCAB);
  if (!(d < 2e-5)) fail_msg("even gates and a LoRA differ by %g", d);
  esp_adapter_destroy(lora);
  esp_adapter_destroy(a);
  fx_close(&r);
}

static void pool(void **state) {
  (void)state;
  static float after[3][FX_T * FX_VOCAB];
  fx_batch f;
  fx_fill(&f);
  fx_run r;
  esp_adapter *a;
  esp_adapter_cfg cfg = CFG("mora_rank");
  cfg.tasks = 3;
  cfg.gate_top_k = 4;
  attach(&r, &cfg, &a);
  for (int task = 0; task < 3; task++) {
    OK(a->kind->task_begin(a, task));
    f.ids[3] = 5 + 3 * task;
    float *before = fx_masters(a);
    for (int k = 0; k < 4; k++) step(&r, a, &f.b, k);
    fx_fill(&f);
    float *now = fx_masters(a);
    for (int i = 0; i < a->params->count; i++) {
      const esp_param *p = &a->params->list[i];
      char mine[16];
      snprintf(mine, sizeof mine, ".%d.weight", task);
      bool own = strstr(p->name, mine) != NULL,
           same = !memcmp(before + p->offset, now + p->offset, (size_t)p->numel * 4);
      if (own == same || own == p->frozen) fail_msg("task %d: %s %s", task, p->name, same ? "did not move" : "moved");
    }
    free(before);
    free(now);
    fx_logits(&r, &f.b, after[task]);
    if (task > 0 && !(fx_rel(after[task], after[task - 1], FX_T * FX_VOCAB) > 1e-3))
      fail_msg("task %d learned nothing", task);
  }
  OK(esp_adapter_save(a, fx_path("all")));
  for (int task = 0; task < 3; task++) {
    OK(a->kind->task_begin(a, task));
    fx_logits(&r, &f.b, y);
    if (memcmp(y, after[task], sizeof y)) fail_msg("task %d is not what it was", task);
  }
  esp_adapter_destroy(a);
  for (int task = 2; task >= 0; task--) {
    OK(esp_adapter_load(r.m, fx_path("all"), "again", false, &a));
    OK(a->kind->task_begin(a, task));
    OK(esp_adapters_activate(r.m, &a, 1));
    fx_logits(&r, &f.b, y);
    if (memcmp(y, after[task], sizeof y)) fail_msg("task %d from the file is not what it was", task);
    assert_int_equal(a->kind->task_begin(a, 3), ESP_ERR_DATA);
    esp_adapter_destroy(a);
  }
  fx_close(&r);
  OK(esp_remove_tree(fx_path("all")));
}

static void refused(esp_status st, const char *says) {
  const char *text = esp_error_message();
  if (st != ESP_ERR_RECIPE || strchr(text, '\n') || !strstr(text, says)) fail_msg("%d: %s", (int)st, text);
  if (esp_dir_exists(fx_path("out"))) fail_msg("%s: something was written", says);
}

/* Logits of the base with what the directory holds. */
static void logits_of(const char *dir, const esp_batch *b, float *out) {
  fx_run r;
  esp_adapter *a = NULL;
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  if (dir) {
    OK(esp_adapter_load(r.m, dir, "default", false, &a));
    OK(esp_adapters_activate(r.m, &a, 1));
  }
  fx_logits(&r, b, out);
  esp_adapter_destroy(a);
  fx_close(&r);
}

static void nearest(void **state) {
  (void)state;
  static const struct {
    int r, tasks, top;
    double temperature;
    bool exact;
  } forms[] = {
      {1, 1, 0, 0.2, true}, {4, 1, 0, 1e5, true}, {2, 2, 0, 1e5, true}, {4, 1, 0, 0.3, false}, {3, 2, 4, 0.2, false}};
  fx_batch f;
  fx_fill(&f);
  char from[256], to[256], qwen[256];
  snprintf(from, sizeof from, "%s", fx_path("mora"));
  snprintf(to, sizeof to, "%s", fx_path("out"));
  snprintf(qwen, sizeof qwen, "%s", fx_path("qwen"));
  logits_of(NULL, &f.b, base);
  for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
    fx_run r;
    esp_adapter *a;
    esp_svd_stats stats;
    esp_adapter_cfg cfg = CFG("mora_rank");
    cfg.r = forms[i].r, cfg.tasks = forms[i].tasks, cfg.gate_top_k = forms[i].top;
    cfg.gate_temperature = forms[i].temperature;
    attach(&r, &cfg, &a);
    fx_shake(a, 0.1f, 43);
    OK(a->kind->task_begin(a, forms[i].tasks - 1));
    OK(esp_adapter_save(a, from));
    refused(esp_export_write(qwen, from, to, true, false, 0, &stats), "no mean gates");
    OK(esp_remove_tree(from));
    fx_loss(&r, &f.b, true, ESP_CKPT_FULL, 1); /* sums, with the values as they are */
    a->kind->before_step(a, 0, 1);
    OK(esp_adapter_save(a, from));
    esp_adapter_destroy(a);
    fx_close(&r);
    esp_merge_spec merge = {.base = qwen, .adapters = (const char *const[]){from}, .n_adapters = 1, .out = to};
    refused(esp_merge_write(&merge, NULL), "export --as lora");
    esp_merge_method linear = ESP_MERGE_METHOD;
    linear.name = "linear";
    esp_combine_spec sum = {.base = qwen, .adapters = merge.adapters, .n_adapters = 1, .out = to, .method = &linear};
    refused(esp_combine_write(&sum, &stats), "mora_rank");
    OK(esp_export_write(qwen, from, to, true, i == 1, 0, &stats));
    logits_of(from, &f.b, y);
    logits_of(to, &f.b, z);
    double d = fx_rel(z, y, FX_T * FX_VOCAB), far = fx_rel(base, y, FX_T * FX_VOCAB);
    if (forms[i].exact && !(d < 1e-4 && stats.max_error < 1e-2))
      fail_msg("form %zu: %g away, told %g", i, d, stats.max_error);
    if (!forms[i].exact && !(d < 0.9 * far && stats.mean_error > 0.01 && stats.max_error < 1))
      fail_msg("form %zu: %g away, the base %g, told %g", i, d, far, stats.mean_error);
    assert_int_equal(stats.sites, 6);
    OK(esp_remove_tree(to));
    if (forms[i].r * forms[i].tasks > 1)
      refused(esp_export_write(qwen, from, to, true, false, 1, &stats), "give at least that rank");
    OK(esp_remove_tree(from));
  }
}

/* What is told, against the sums of the definition in fp64 on the first module, whose input is the base's. */
static void told_error(void **state) {
  (void)state;
  fx_batch f;
  fx_fill(&f);
  fx_run r;
  esp_adapter *a;
  esp_adapter_cfg cfg = CFG("mora_rank");
  cfg.target = NULL, cfg.n_target = 0, cfg.target_regex = "model\\.layers\\.0\\.self_attn\\.q_proj";
  cfg.gate_temperature = 0.3;
  attach(&r, &cfg, &a);
  fx_shake(a, 0.1f, 44);
  fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 1);
  a->kind->before_step(a, 0, 1);
  OK(esp_adapter_save(a, fx_path("mora")));
  /* x of that module: norm of the embedding, as the model computes it */
  esp_site **sites;
  int n = esp_model_sites(r.m, &sites);
  esp_site *q = NULL, *embed = NULL, *norm = NULL;
  for (int i = 0; i < n; i++) {
    if (a->targeted[i]) q = sites[i];
    if (sites[i]->kind == ESP_SITE_EMBED && !embed) embed = sites[i];
    if (strstr(sites[i]->path, "layers.0.input_layernorm")) norm = sites[i];
  }
  assert_true(q && embed && norm);
  int64_t in = q->in;
  float *table = malloc((size_t)(embed->in * in) * 4), *w = malloc((size_t)in * 4);
  float *A = malloc((size_t)(3 * in) * 4), *B = malloc((size_t)(3 * q->out) * 4);
  OK(esp_site_read_weight(r.m, embed, table));
  OK(esp_site_read_weight(r.m, norm, w));
  const esp_task_site *ts = a->site_state[q->index];
  esp_params_get(a->params, ts->a[0], A);
  esp_params_get(a->params, ts->b[0], B);
  double zt[3] = {0}, tt[3] = {0}, zz[3] = {0}, lost = 0, all = 0;
  for (int t = 0; t < FX_T; t++) {
    const float *e = table + f.ids[t] * in;
    double ms = 0, act[3], square = 0, sum = 0;
    for (int64_t c = 0; c < in; c++) ms += (double)e[c] * e[c];
    double rstd = 1 / sqrt(ms / (double)in + 1e-5);
    for (int k = 0; k < 3; k++) {
      act[k] = 0;
      for (int64_t c = 0; c < in; c++) act[k] += (double)A[k * in + c] * e[c] * rstd * w[c];
      square += act[k] * act[k];
    }
    for (int k = 0; k < 3; k++) sum += exp(act[k] / sqrt(square) / 0.3);
    for (int k = 0; k < 3; k++) {
      double out = 6 * exp(act[k] / sqrt(square) / 0.3) / sum * act[k];
      zt[k] += out * act[k], tt[k] += act[k] * act[k], zz[k] += out * out;
    }
  }
  json_t *j;
  char config[300];
  snprintf(config, sizeof config, "%s/adapter_config.json", fx_path("mora"));
  OK(esp_json_load(config, &j));
  json_t *one = json_object_get(json_object_get(j, "mean_gates"), q->path);
  for (int k = 0; k < 3; k++) {
    double size = 0, got = json_number_value(json_array_get(json_object_get(one, "gates"), (size_t)k));
    for (int64_t o = 0; o < q->out; o++) size += (double)B[o * 3 + k] * B[o * 3 + k];
    all += size * zz[k];
    lost += size * (zz[k] - zt[k] * zt[k] / tt[k]);
    if (!(fabs(got - zt[k] / tt[k]) < 1e-4 * fabs(got))) fail_msg("gate %d is %g, not %g", k, got, zt[k] / tt[k]);
  }
  double told = json_number_value(json_object_get(one, "error"));
  if (!(fabs(told - sqrt(lost / all)) < 1e-3 * told)) fail_msg("told %g, is %g", told, sqrt(lost / all));
  json_decref(j);
  free(table), free(w), free(A), free(B);
  esp_adapter_destroy(a);
  fx_close(&r);
  OK(esp_remove_tree(fx_path("mora")));
}

/* Sums are part of a checkpoint, and belong to their task. */
static void sums_are_kept(void **state) {
  (void)state;
  fx_batch f;
  fx_fill(&f);
  fx_run r;
  esp_adapter *a, *b;
  esp_adapter_cfg cfg = CFG("mora_rank");
  cfg.tasks = 2;
  attach(&r, &cfg, &a);
  for (int k = 0; k < 2; k++) step(&r, a, &f.b, k);
  json_t *j = esp_adapter_state_json(a);
  OK(esp_adapter_create(r.m, &cfg, "again", true, &b));
  float *x = fx_masters(a);
  r.be->ops->upload(r.be, b->params->master, x, a->params->total * 4);
  esp_params_refresh_shadow(b->params);
  OK(esp_adapter_state_restore(b, j, "state.json"));
  OK(esp_adapter_save(a, fx_path("one")));
  OK(esp_adapter_save(b, fx_path("two")));
  char *p, *q;
  size_t n, m;
  OK(esp_file_read(fx_path("one/adapter_config.json"), &p, &n));
  OK(esp_file_read(fx_path("two/adapter_config.json"), &q, &m));
  assert_true(n == m && memcmp(p, q, n) == 0 && strstr(p, "\"gates\""));
  esp_mem_free(p);
  esp_mem_free(q);
  OK(esp_remove_tree(fx_path("two")));
  OK(a->kind->task_begin(a, 1));
  OK(esp_adapter_save(a, fx_path("two")));
  OK(esp_file_read(fx_path("two/adapter_config.json"), &q, &m));
  assert_null(strstr(q, "\"gates\""));
  esp_mem_free(q);
  json_object_set_new(json_object_get(j, "kind"), "gate_sums", json_array());
  assert_int_equal(esp_adapter_state_restore(b, j, "state.json"), ESP_ERR_DATA);
  json_decref(j);
  free(x);
  esp_adapter_destroy(b);
  esp_adapter_destroy(a);
  fx_close(&r);
  OK(esp_remove_tree(fx_path("one")));
  OK(esp_remove_tree(fx_path("two")));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(even_gates), cmocka_unit_test(pool),          cmocka_unit_test(nearest),
      cmocka_unit_test(told_error), cmocka_unit_test(sums_are_kept),
  };
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
