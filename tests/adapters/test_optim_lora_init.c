/* (Linked up to optim: LoRA-FA trains.) First values of LoRA from data and from a quantiser against PEFT's own
 * functions, and LoRA-FA's steps: tests/golden/make_init.py. What a singular vector leaves open, its sign, is left open
 * here. Also what each of them must hold in any case: the base and its adapter together are the base that there was,
 * files apply to the original base. Mutation seen to be caught: dividing by the sum of all variances without the
 * batch's share in esp_eva_fit (n0 for n0 + n1) fails "eva". */
#include <math.h>

#include "adapter_fixture.h"
#include "optim/optim.h"

static const char *const names[] = {"q_proj", "v_proj", "gate_proj", "down_proj"};
enum { BATCHES = 4, TOKENS = 20, VOCAB = 45 };

static char base_dir[600];
static esp_st *gold;

static const float *want(const char *set, const char *what, const char *path, int64_t *n) {
  char key[700];
  snprintf(key, sizeof key, "%s%s%s", set, what, path);
  const esp_st_entry *e = esp_st_find(gold, key);
  if (!e) return NULL;
  float *copy = test_malloc((size_t)e->bytes);
  memcpy(copy, e->data, (size_t)e->bytes);
  if (n) *n = e->bytes / 4;
  return copy;
}

static void drop(const float *x) {
  test_free((void *)(uintptr_t)x);
}

typedef struct batch {
  int32_t ids[TOKENS], targets[TOKENS], positions[TOKENS], cu[2];
  float weights[TOKENS];
  esp_batch b;
} batch;

static void load_batch(int k, batch *f) {
  char name[32];
  snprintf(name, sizeof name, "%d", k);
  const float *ids = want("ids.", name, "", NULL), *targets = want("targets.", name, "", NULL);
  memcpy(f->ids, ids, sizeof f->ids);
  memcpy(f->targets, targets, sizeof f->targets);
  drop(ids);
  drop(targets);
  for (int i = 0; i < TOKENS; i++) {
    f->positions[i] = i;
    f->weights[i] = 1.0f;
  }
  f->cu[0] = 0;
  f->cu[1] = TOKENS;
  f->b = (esp_batch){.tokens = TOKENS,
                     .ids = f->ids,
                     .targets = f->targets,
                     .positions = f->positions,
                     .weights = f->weights,
                     .cu_seqlens = f->cu,
                     .n_seqs = 1};
}

static void logits_of(fx_run *r, float *out) {
  batch f;
  int32_t rows[TOKENS];
  load_batch(0, &f);
  for (int i = 0; i < TOKENS; i++) rows[i] = i;
  OK(esp_model_load_weights(r->m));
  OK(esp_model_logits(r->m, &r->stack, &f.b, rows, TOKENS, out));
}

static esp_adapter_cfg config(const char *init, int64_t r, double alpha) {
  return (esp_adapter_cfg){.type = "lora",
                           .r = r,
                           .alpha = alpha,
                           .init = init,
                           .target = names,
                           .n_target = 4,
                           .eva_adjust_alpha = true,
                           .init_batches = 1000};
}

/* Created, calibrated and made anew as a run does it. Answers the batches that were seen. */
static int started(fx_run *r, const esp_adapter_cfg *cfg, int batches, esp_adapter **out) {
  esp_adapter *a;
  bool gradients;
  int seen = 0;
  fx_open(r, base_dir, ESP_F32, false);
  OK(esp_adapter_create(r->m, cfg, "default", true, &a));
  OK(esp_adapters_activate(r->m, &a, 1));
  OK(esp_model_load_weights(r->m));
  for (; seen < batches && a->kind->wants_data(a, &gradients) > 0; seen++) {
    batch f;
    load_batch(seen % BATCHES, &f);
    OK(esp_adapter_calibrate(a, &r->stack, &f.b, ESP_CKPT_FULL));
  }
  esp_arena *arena = esp_arena_create(ESP_MEM_HOST);
  esp_adapter_cfg again;
  OK(a->kind->restart(a, arena, &again));
  esp_adapter_destroy(a);
  fx_close(r);
  fx_open(r, base_dir, ESP_F32, false);
  OK(esp_adapter_create(r->m, &again, "default", true, out));
  OK(esp_adapters_activate(r->m, out, 1));
  esp_arena_destroy(arena);
  return seen;
}

static float *param(const esp_adapter *a, const char *path, const char *leaf, int64_t *rows, int64_t *cols) {
  char name[300];
  snprintf(name, sizeof name, "base_model.model.%s.%s.weight", path, leaf);
  int i = esp_params_find(a->params, name);
  *rows = *cols = 0;
  if (i < 0) return NULL;
  *rows = a->params->list[i].shape[0];
  *cols = a->params->list[i].shape[1];
  float *x = test_malloc((size_t)a->params->list[i].numel * sizeof *x);
  esp_params_get(a->params, i, x);
  return x;
}

/* x [rows, cols], y: the vectors (rows, or columns when `cols_are`) are equal up to the sign of each. */
static double up_to_sign(const float *x, const float *y, int64_t rows, int64_t cols, bool cols_are) {
  double worst = 0, scale = fx_max_abs(y, rows * cols);
  int64_t vectors = cols_are ? cols : rows, n = cols_are ? rows : cols, step = cols_are ? cols : 1;
  for (int64_t v = 0; v < vectors; v++) {
    const float *p = x + (cols_are ? v : v * cols), *q = y + (cols_are ? v : v * cols);
    double same = 0, turned = 0;
    for (int64_t i = 0; i < n; i++) {
      same = fmax(same, fabs((double)p[i * step] - q[i * step]));
      turned = fmax(turned, fabs((double)p[i * step] + q[i * step]));
    }
    worst = fmax(worst, fmin(same, turned) / scale);
  }
  return worst;
}

static void compare(const esp_adapter *a, const char *set, double limit) {
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites), checked = 0;
  for (int i = 0; i < n; i++) {
    if (!a->targeted[i]) continue;
    int64_t r, in, out, k;
    float *A = param(a, sites[i]->path, "lora_A", &r, &in), *B = param(a, sites[i]->path, "lora_B", &out, &k);
    const float *wa = want(set, ".A.", sites[i]->path, NULL), *wb = want(set, ".B.", sites[i]->path, NULL);
    assert_non_null(wa);
    double da = up_to_sign(A, wa, r, in, false), db = up_to_sign(B, wb, out, r, true);
    if (!(da < limit && db < limit)) fail_msg("%s: %s: A %g, B %g away from PEFT's", set, sites[i]->path, da, db);
    test_free(A);
    test_free(B);
    drop(wa);
    drop(wb);
    checked++;
  }
  assert_int_equal(checked, 8);
}

/* The rewritten base and its adapter are the base; so is the file on the base as it was, and the merged weight. */
static void held(fx_run *r, esp_adapter *a, const char *set) {
  static float base[TOKENS * VOCAB], y[TOKENS * VOCAB];
  fx_run plain;
  esp_adapter *b;
  fx_open(&plain, base_dir, ESP_F32, false);
  logits_of(&plain, base);
  logits_of(r, y);
  double d = fx_rel(y, base, TOKENS * VOCAB);
  if (!(d < 4e-6)) fail_msg("%s: %g away from the base at the start", set, d);
  fx_shake(a, 0.05f, 3);
  logits_of(r, base);
  OK(esp_adapter_save(a, fx_path("saved")));
  OK(esp_adapter_load(plain.m, fx_path("saved"), "default", false, &b));
  OK(esp_adapters_activate(plain.m, &b, 1));
  logits_of(&plain, y);
  d = fx_rel(y, base, TOKENS * VOCAB);
  if (!(d < 4e-6)) fail_msg("%s: %g away after loading on the original base", set, d);
  esp_adapter_destroy(b);
  fx_close(&plain);
  OK(esp_remove_tree(fx_path("saved")));
}

static void corda(void **state) {
  for (int i = 0; i < 2; i++) {
    fx_run r;
    esp_adapter *a;
    esp_adapter_cfg cfg = config("corda", 4, 6);
    cfg.corda_method = i ? "kpm" : NULL;
    assert_int_equal(started(&r, &cfg, BATCHES, &a), BATCHES);
    compare(a, i ? "corda_kpm" : "corda_ipm", 2e-3);
    held(&r, a, "corda");
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

static void lora_ga(void **state) {
  static const char *const how[][3] = {{"ga_ArB2r", NULL, NULL},
                                       {"ga_A2rBr", "A2rBr", "weight_svd"},
                                       {"ga_ArBr", "ArBr", "gd_scale"},
                                       {NULL, "random", "unit"}};
  for (int i = 0; i < 4; i++) {
    fx_run r;
    esp_adapter *a;
    esp_adapter_cfg cfg = config("lora_ga", 3, 5);
    cfg.ga_direction = how[i][1];
    cfg.ga_scale = how[i][2];
    assert_int_equal(started(&r, &cfg, BATCHES, &a), BATCHES);
    if (how[i][0]) compare(a, how[i][0], 2e-3);
    held(&r, a, how[i][0] ? how[i][0] : "random");
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

static void eva(void **state) {
  for (int i = 0; i < 2; i++) {
    fx_run r;
    esp_adapter *a;
    int64_t n, total = 0;
    const char *set = i ? "eva_1." : "eva_3.";
    esp_adapter_cfg cfg = config("eva", i ? 1 : 3, 6);
    cfg.eva_rho = i ? 6 : 2;
    int seen = started(&r, &cfg, 200, &a), checked = 0;
    const int32_t *batches = (const int32_t *)want(set, "batches", "", NULL);
    assert_int_equal(seen, *batches);
    esp_site **sites;
    int n_sites = esp_model_sites(r.m, &sites);
    for (int k = 0; k < n_sites; k++) {
      const float *w = want(set, sites[k]->path, "", &n);
      int64_t rank, in;
      if (!w) continue;
      checked++;
      if (isnan(w[0])) {
        assert_false(a->targeted[k]);
        drop(w);
        continue;
      }
      float *A = param(a, sites[k]->path, "lora_A", &rank, &in);
      assert_non_null(A);
      if (rank * in != n) fail_msg("%s: rank %lld, PEFT %lld", sites[k]->path, (long long)rank, (long long)(n / in));
      double d = fx_rel(A, w, n);
      if (!(d < 1e-3)) fail_msg("%s%s: %g away from PEFT's", set, sites[k]->path, d);
      assert_true(fabs(esp_adapter_rank(a, sites[k]) - (double)rank) < 0.5);
      total += rank;
      test_free(A);
      drop(w);
    }
    assert_int_equal(checked, 8);
    assert_int_equal(total, 8 * cfg.r);
    held(&r, a, set);
    drop((const float *)batches);
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

/* The base that a step computes with, through what merging makes of a zero adapter. */
static void loftq(void **state) {
  static const struct {
    const char *set;
    int bits, rounds;
  } how[] = {{"loftq_4_1", 4, 1}, {"loftq_4_3", 4, 3}, {"loftq_8_2", 8, 2}};
  static const char *const paths[] = {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"};
  for (int i = 0; i < 3; i++)
    for (int k = 0; k < 2; k++) {
      fx_run r;
      esp_adapter *a, *b;
      esp_adapter_cfg cfg = config("loftq", 4, 4);
      cfg.loftq_bits = how[i].bits;
      cfg.loftq_iter = how[i].rounds;
      cfg.target = &paths[k];
      cfg.n_target = 1;
      fx_open(&r, base_dir, ESP_F32, false);
      OK(esp_adapter_create(r.m, &cfg, "default", true, &a));
      OK(esp_adapters_activate(r.m, &a, 1));
      esp_site *s = esp_model_find_site(r.m, paths[k]);
      int64_t rank, in, out, q, size = s->out * s->in;
      float *A = param(a, paths[k], "lora_A", &rank, &in), *B = param(a, paths[k], "lora_B", &out, &q);
      float *w = test_malloc((size_t)size * sizeof *w), *loss = test_malloc((size_t)size * sizeof *w);
      const float *ww = want(how[i].set, ".W.", paths[k], NULL), *wa = want(how[i].set, ".A.", paths[k], NULL);
      const float *wb = want(how[i].set, ".B.", paths[k], NULL);
      OK(esp_site_read_weight(r.m, s, loss));
      memcpy(w, loss, (size_t)size * sizeof *w);
      for (int64_t row = 0; row < s->out; row += 5) /* in pieces, as merging does */
        OK(a->kind->materialise(a, s, row, s->out - row < 5 ? s->out - row : 5, w + row * s->in));
      double left = 0, quantiser = 0;
      for (int64_t e = 0; e < size; e++) {
        double ba = 0;
        left += pow((double)w[e] - loss[e], 2);
        quantiser += pow((double)ww[e] - loss[e], 2);
        for (int64_t j = 0; j < rank; j++) ba += (double)B[e / in * rank + j] * A[j * in + e % in];
        w[e] = (float)(w[e] - ba);
      }
      double dw = fx_rel(w, ww, size), da = up_to_sign(A, wa, rank, in, false), db = up_to_sign(B, wb, out, rank, true);
      if (!(dw < 1e-5 && da < 1e-3 && db < 1e-3))
        fail_msg("%s: %s: W' %g, A %g, B %g away from PEFT's", how[i].set, paths[k], dw, da, db);
      assert_true(left < 0.8 * quantiser); /* the adapter takes back what the quantiser lost */
      assert_int_equal(a->kind->low_rank(a, s, NULL, NULL), 0);

      static float y[TOKENS * VOCAB], z[TOKENS * VOCAB];
      fx_run again;
      fx_shake(a, 0.05f, 3);
      logits_of(&r, y);
      OK(esp_adapter_save(a, fx_path("saved")));
      fx_open(&again, base_dir, ESP_F32, false);
      OK(esp_adapter_load(again.m, fx_path("saved"), "default", false, &b)); /* quantises the base again */
      OK(esp_adapters_activate(again.m, &b, 1));
      logits_of(&again, z);
      assert_memory_equal(y, z, sizeof y);
      esp_adapter_destroy(b);
      fx_close(&again);
      OK(esp_remove_tree(fx_path("saved")));
      test_free(A);
      test_free(B);
      test_free(w);
      test_free(loss);
      drop(ww);
      drop(wa);
      drop(wb);
      esp_adapter_destroy(a);
      fx_close(&r);
    }
}

static void lora_fa(void **state) {
  fx_run r;
  esp_adapter *a;
  esp_optim *o;
  esp_adapter_cfg cfg = config("default", 4, 6);
  cfg.lora_fa = true;
  fx_open(&r, base_dir, ESP_F32, false);
  OK(esp_adapter_create(r.m, &cfg, "default", true, &a));
  OK(esp_adapters_activate(r.m, &a, 1));
  OK(esp_model_load_weights(r.m));
  esp_site **sites;
  int n = esp_model_sites(r.m, &sites), checked = 0;
  for (int p = 0; p < a->params->count; p++) {
    char path[300];
    const char *name = a->params->list[p].name + strlen("base_model.model.");
    snprintf(path, sizeof path, "%.*s", (int)(strstr(name, ".lora_") - name), name);
    const float *w = want("fa", strstr(name, "lora_A") ? ".A." : ".B.", path, NULL);
    esp_params_set(a->params, p, w);
    drop(w);
  }
  float *first = fx_masters(a);
  esp_optim_cfg oc = {.name = "adamw", .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-12};
  OK(esp_optim_create(&oc, a->params, &o));
  const float *losses = want("fa.", "losses", "", NULL);
  for (int step = 0; step < 12; step++) {
    batch f;
    esp_loss_out out;
    load_batch(step % BATCHES, &f);
    esp_params_zero_grad(a->params);
    OK(esp_model_step(r.m, &r.stack, &f.b, ESP_CKPT_OFF, true, 1.0f / TOKENS, 1, step, &out, NULL));
    double loss = out.loss_sum / TOKENS;
    if (!(fabs(loss - losses[step]) <= 1e-4 * losses[step]))
      fail_msg("step %d: loss %.7g, PEFT %.7g", step, loss, (double)losses[step]);
    a->kind->before_step(a, step, 12);
    OK(a->params->be->sticky);
    esp_optim_step(o, oc.lr, 1.0f);
  }
  float *last = fx_masters(a);
  for (int p = 0; p < a->params->count; p++) { /* A does not move by a bit */
    const esp_param *q = &a->params->list[p];
    if (!strstr(q->name, "lora_A")) continue;
    assert_memory_equal(first + q->offset, last + q->offset, (size_t)q->numel * sizeof *first);
  }
  for (int i = 0; i < n; i++) {
    int64_t rows, cols;
    if (!a->targeted[i]) continue;
    float *B = param(a, sites[i]->path, "lora_B", &rows, &cols);
    const float *w = want("fa", ".end.", sites[i]->path, NULL);
    double d = fx_rel(B, w, rows * cols);
    if (!(d < 1e-3)) fail_msg("%s: B is %g away from PEFT's after 12 steps", sites[i]->path, d);
    test_free(B);
    drop(w);
    checked++;
  }
  assert_int_equal(checked, 8);
  free(first);
  free(last);
  drop(losses);
  esp_optim_destroy(o);
  esp_adapter_destroy(a);
  fx_close(&r);
}

static void refused(const char *message, esp_adapter_cfg cfg) {
  fx_run r;
  esp_adapter *a;
  fx_open(&r, base_dir, ESP_F32, false);
  assert_int_equal(esp_adapter_create(r.m, &cfg, "default", true, &a), ESP_ERR_RECIPE);
  if (!strstr(esp_error_message(), message)) fail_msg("'%s' does not say '%s'", esp_error_message(), message);
  fx_close(&r);
}

static void bad(void **state) {
  esp_adapter_cfg cfg = config("lora_ga", 7, 6);
  refused("lora_ga needs a rank of at most 6", cfg);
  cfg = config("corda", 30, 6);
  refused("corda needs a rank of at most", cfg);
  cfg = config("eva", 40, 6);
  refused("eva needs a rank of at most", cfg);
  cfg = config("loftq", 4, -1);
  refused("adapter.alpha: must be positive for init loftq", cfg);
  cfg = config("loftq", 4, 4);
  cfg.loftq_bits = 5;
  refused("adapter.loftq_bits: must be 4 or 8", cfg);
  cfg = config("default", 4, 4);
  cfg.lora_fa = true;
  cfg.target_regex = "model.embed_tokens";
  cfg.target = NULL;
  cfg.n_target = 0;
  refused("adapter.lora_fa: is for linear modules", cfg);
  fx_run r; /* batches with fewer tokens than components */
  esp_adapter *a;
  cfg = config("eva", 12, 6);
  fx_open(&r, base_dir, ESP_F32, false);
  OK(esp_adapter_create(r.m, &cfg, "default", true, &a));
  OK(esp_adapters_activate(r.m, &a, 1));
  OK(esp_model_load_weights(r.m));
  batch f;
  load_batch(0, &f);
  OK(esp_adapter_calibrate(a, &r.stack, &f.b, ESP_CKPT_OFF));
  esp_arena *arena = esp_arena_create(ESP_MEM_HOST);
  assert_int_equal(a->kind->restart(a, arena, &cfg), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "eva needs micro-batches of at least 24 trained tokens"));
  esp_arena_destroy(arena);
  esp_adapter_destroy(a);
  fx_close(&r);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(corda), cmocka_unit_test(lora_ga), cmocka_unit_test(eva),
      cmocka_unit_test(loftq), cmocka_unit_test(lora_fa), cmocka_unit_test(bad),
  };
  test_backend_or_exit();
  snprintf(base_dir, sizeof base_dir, "%s/tests/golden/models/llama", ESP_SOURCE_DIR);
  snprintf(fx_root, sizeof fx_root, "/tmp/esp-lora-init-XXXXXX");
  if (!mkdtemp(fx_root)) return 1;
  char path[700];
  snprintf(path, sizeof path, "%s/tests/golden/init.safetensors", ESP_SOURCE_DIR);
  if (esp_st_open(path, &gold) != ESP_OK) {
    fprintf(stderr, "%s\n", esp_error_message());
    return 1;
  }
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  esp_st_close(gold);
  fx_teardown();
  return failed;
}
