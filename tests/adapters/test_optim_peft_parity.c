/* (Linked up to optim: it trains.) PEFT's own adapters on the bases of tests/golden/models: they load strictly, give
 * PEFT's logits and gradients, train as PEFT trains (20 steps of AdamW), and its target matching is ours. Fixtures:
 * tests/golden/make_peft.py. With ESP_PEFT_OUT=<dir> every trained adapter is saved there with its logits for
 * tests/golden/check_peft.py. Mutation seen to be caught: alpha/r for rslora in new_site fails "parity" of `patterns`.
 */
#include <math.h>

#include "adapter_fixture.h"
#include "io/json.h"
#include "optim/optim.h"

static const struct {
  const char *name, *base;
} cases[] = {
    {"llama", "llama"},
    {"gpt2", "gpt2"},
    {"patterns", "mistral"},
    {"embedding", "qwen3"},
    {"modules_to_save", "qwen3"},
    {"tokens_tied", "llama"},
    {"tokens_untied", "mistral"},
    {"lora_bias", "llama_bias"},
    {"bias_lora_only", "qwen2"},
    {"layers", "llama"},
    {"pissa", "llama"},
    {"olora", "mistral"},
    {"dora", "llama"},
    {"dora_biases", "gpt2"},
    {"vera", "llama"},
    {"vera_seeded", "gpt2"},
    {"ia3", "llama"},
    {"ia3_biases", "gpt2"},
    {"ln_tuning", "qwen3"},
    {"ln_tuning_biases", "gpt2"},
    {"loha", "llama"},
    {"lokr", "qwen3"},
    {"lokr_both", "mistral"},
    {"adalora", "llama"},
    {"adalora_final", "qwen3"},
    {"miss", "llama"},
    {"miss_mini", "qwen3"},
    {"miss_bat", "mistral"},
    {"hra", "llama"},
    {"hra_gs", "qwen3"},
    {"oft", "llama"},
    {"oft_exact", "qwen3"},
    {"oft_shared", "mistral"},
    {"oft_blocks", "mistral"},
    {"coft", "llama"},
    {"prompt", "qwen3"},
    {"prompt_positions", "gpt2"},
    {"prefix", "llama"},
    {"prefix_norms", "qwen3"},
    {"prefix_positions", "gpt2"},
    {"prefix_window", "mistral"},
    {"prefix_projection", "qwen3"},
};

static const char *golden(const char *what, const char *name) {
  static char path[2][600];
  static int at;
  at = !at;
  snprintf(path[at], sizeof path[at], "%s/tests/golden/%s%s", ESP_SOURCE_DIR, what, name);
  return path[at];
}

static const void *tensor(esp_st *st, const char *prefix, const char *name, int64_t *n) {
  char key[600];
  snprintf(key, sizeof key, "%s%s", prefix, name);
  const esp_st_entry *e = esp_st_find(st, key);
  if (!e) fail_msg("no '%s' in the fixture", key);
  if (n) *n = e->bytes / 4;
  void *copy = test_malloc((size_t)e->bytes);
  memcpy(copy, e->data, (size_t)e->bytes);
  return copy;
}

typedef struct batch {
  esp_batch b;
  float scale;
} batch;

static void load_batch(esp_st *st, int k, batch *out) {
  char name[32];
  int64_t n, cu;
  snprintf(name, sizeof name, "%d", k);
  out->b = (esp_batch){0};
  out->b.ids = tensor(st, "ids.", name, &n);
  out->b.targets = tensor(st, "targets.", name, NULL);
  out->b.weights = tensor(st, "weights.", name, NULL);
  out->b.cu_seqlens = tensor(st, "cu", "", &cu);
  out->b.tokens = n;
  out->b.n_seqs = (int)cu - 1;
  int32_t *pos = test_malloc((size_t)n * sizeof *pos);
  for (int s = 0; s < out->b.n_seqs; s++)
    for (int32_t i = out->b.cu_seqlens[s]; i < out->b.cu_seqlens[s + 1]; i++) pos[i] = i - out->b.cu_seqlens[s];
  out->b.positions = pos;
  float sum = 0;
  for (int64_t i = 0; i < n; i++) sum += out->b.weights[i];
  out->scale = 1.0f / sum;
}

static void free_batch(batch *b) {
  test_free((void *)(uintptr_t)b->b.ids);
  test_free((void *)(uintptr_t)b->b.targets);
  test_free((void *)(uintptr_t)b->b.weights);
  test_free((void *)(uintptr_t)b->b.cu_seqlens);
  test_free((void *)(uintptr_t)b->b.positions);
}

/* Parameter i (master or gradient) in the file's orientation: the A of an embedding and LoHa's right factors are stored
 * turned. */
static void in_file_order(const esp_adapter *a, int i, const float *flat, float *out) {
  const esp_param *p = &a->params->list[i];
  const float *x = flat + p->offset;
  bool turned = strstr(p->name, "lora_embedding_A") || strstr(p->name, "hada_w1_b") || strstr(p->name, "hada_w2_b") ||
                strstr(p->name, "hra_u") || (strstr(p->name, "miss_block") && p->ndim == 2);
  for (int64_t k = 0; k < p->numel; k++) out[turned ? (k % p->shape[1]) * p->shape[0] + k / p->shape[1] : k] = x[k];
}

static double worst(const esp_adapter *a, esp_st *st, const char *prefix, const float *flat, const char **where) {
  double most = 0;
  for (int i = 0; i < a->params->count; i++) {
    const esp_param *p = &a->params->list[i];
    int64_t n;
    if (p->frozen) continue; /* not a parameter in PEFT */
    const float *want = tensor(st, prefix, p->name, &n);
    float *have = test_malloc((size_t)p->numel * sizeof *have);
    assert_int_equal(n, p->numel);
    in_file_order(a, i, flat, have);
    double d = n ? fx_rel(have, want, n) : 0; /* none: a module without a rank */
    if (!(d <= most)) {
      most = d;
      *where = p->name;
    }
    test_free(have);
    test_free((void *)(uintptr_t)want);
  }
  return most;
}

static void logits_of(fx_run *r, const esp_batch *b, float *out) {
  int32_t rows[64];
  for (int i = 0; i < (int)b->tokens; i++) rows[i] = i;
  OK(esp_model_load_weights(r->m));
  OK(esp_model_logits(r->m, &r->stack, b, rows, (int)b->tokens, out));
}

static void save_for_peft(fx_run *r, const esp_adapter *a, int i, const esp_batch *b) {
  const char *out = getenv("ESP_PEFT_OUT");
  if (!out) return;
  char dir[600], path[700];
  static float y[64 * 64];
  snprintf(dir, sizeof dir, "%s/%s", out, cases[i].name);
  OK(esp_adapter_save(a, dir));
  logits_of(r, b, y);
  snprintf(path, sizeof path, "%s/%s.logits.safetensors", out, cases[i].name);
  esp_st_writer *w;
  OK(esp_st_writer_create(path, &w));
  int64_t vocab = esp_model_describe(r->m)->vocab, shape[2] = {b->tokens, vocab};
  OK(esp_st_writer_declare(w, "logits", ESP_F32, 2, shape));
  OK(esp_st_writer_put(w, "logits", y, b->tokens * vocab * 4));
  OK(esp_st_writer_commit(w));
}

/* Ranks that move: budget and ranks in force after each step are PEFT's, exactly. */
static void same_trace(const esp_adapter *a, const int32_t *trace, int step, const char *name) {
  const int32_t *want = trace + (ptrdiff_t)3 * step;
  if (a->budget != want[1] || a->ranks != want[2])
    fail_msg("%s: step %d: budget %lld, %lld ranks kept; PEFT %d and %d", name, want[0], (long long)a->budget,
             (long long)a->ranks, want[1], want[2]);
}

static void train_20(fx_run *r, esp_adapter *a, esp_st *st, int i) {
  esp_optim_cfg cfg = {.name = "adamw", .lr = 5e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-4, .weight_decay = 0.1};
  esp_optim *o;
  OK(esp_optim_create(&cfg, a->params, &o));
  const float *losses = tensor(st, "losses", "", NULL);
  const int32_t *trace = esp_st_find(st, "trace") ? tensor(st, "trace", "", NULL) : NULL;
  for (int step = 0; step < 20; step++) {
    batch b;
    esp_loss_out out;
    load_batch(st, step % 4, &b);
    esp_params_zero_grad(a->params);
    OK(esp_model_step(r->m, &r->stack, &b.b, ESP_CKPT_OFF, true, b.scale, 1, step, &out, NULL));
    double loss = out.loss_sum * b.scale;
    if (!(fabs(loss - losses[step]) <= 1e-4 * fabs(losses[step])))
      fail_msg("%s: step %d: loss %.7g, PEFT %.7g", cases[i].name, step, loss, losses[step]);
    if (a->kind->before_step) a->kind->before_step(a, step, 20);
    esp_optim_step(o, cfg.lr, 1.0f);
    /* PEFT brings coft back in the next forward, here after the step: not after the last */
    if (a->kind->after_step && !(a->cfg.coft && step == 19)) OK(a->kind->after_step(a, step + 1, 20));
    if (trace) same_trace(a, trace, step, cases[i].name);
    free_batch(&b);
  }
  const char *where = "";
  float *end = fx_masters(a);
  double d = worst(a, st, "end.", end, &where);
  free(end);
  if (!(d <= 1e-3)) fail_msg("%s: %s is %g away from PEFT's after 20 steps", cases[i].name, where, d);
  if (a->cfg.coft) OK(a->kind->after_step(a, 20, 20));
  print_message("    after 20 steps: worst %.2g (%s)\n", d, where);
  test_free((void *)(uintptr_t)losses);
  if (trace) test_free((void *)(uintptr_t)trace);
  esp_optim_destroy(o);
}

/* A prefix that is trained through a network: the file holds what the network gives, the fixture what it is. */
static void unfold(fx_run *r, esp_st *st, esp_adapter **a) {
  esp_adapter_cfg cfg = {.type = "prefix", .virtual_tokens = (*a)->cfg.virtual_tokens, .prefix_projection = true};
  cfg.encoder_hidden = esp_st_find(st, "start.prompt_encoder.transform.0.weight")->shape[0];
  esp_adapter_destroy(*a);
  OK(esp_adapter_create(r->m, &cfg, "default", true, a));
  OK(esp_adapters_activate(r->m, a, 1));
  for (int i = 0; i < (*a)->params->count; i++) {
    int64_t n;
    if ((*a)->params->list[i].frozen) continue;
    const float *value = tensor(st, "start.", (*a)->params->list[i].name, &n);
    assert_int_equal(n, (*a)->params->list[i].numel);
    esp_params_set((*a)->params, i, value);
    test_free((void *)(uintptr_t)value);
  }
}

static void parity(void **state) {
  static float y[64 * 64];
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    char dir[600];
    fx_run r;
    esp_st *st;
    esp_adapter *a;
    batch b;
    snprintf(dir, sizeof dir, "%s/expect.safetensors", golden("peft/", cases[i].name));
    OK(esp_st_open(dir, &st));
    fx_open(&r, golden("models/", cases[i].base), ESP_F32, false);
    snprintf(dir, sizeof dir, "%s/start", golden("peft/", cases[i].name));
    OK(esp_adapter_load(r.m, dir, "default", true, &a));
    OK(esp_adapters_activate(r.m, &a, 1));
    load_batch(st, 0, &b);
    int64_t n;
    const float *want = tensor(st, "logits", "", &n);
    logits_of(&r, &b.b, y);
    double dl = fx_rel(y, want, n);
    if (!(dl <= 1e-4)) fail_msg("%s: logits %g away from PEFT's", cases[i].name, dl);
    if (esp_st_find(st, "start.prompt_encoder.embedding.weight")) unfold(&r, st, &a);
    esp_loss_out out;
    OK(esp_model_step(r.m, &r.stack, &b.b, ESP_CKPT_OFF, true, b.scale, 1, 0, &out, NULL));
    const char *where = "";
    float *grad = fx_grads(a);
    double dg = worst(a, st, "grad.", grad, &where);
    free(grad);
    if (!(dg <= 1e-4)) fail_msg("%s: gradient of %s is %g away from PEFT's", cases[i].name, where, dg);
    print_message("  %-16s logits %.2g, gradients %.2g\n", cases[i].name, dl, dg);
    train_20(&r, a, st, (int)i);
    save_for_peft(&r, a, (int)i, &b.b);
    test_free((void *)(uintptr_t)want);
    free_batch(&b);
    esp_adapter_destroy(a);
    fx_close(&r);
    esp_st_close(st);
  }
}

/* The shared projections of VeRA are torch's draws, bit for bit. */
static void projections(void **state) {
  fx_run r;
  esp_st *st;
  esp_adapter *a;
  esp_adapter_cfg cfg = {.type = "vera", .r = 6, .projection_key = 3, .target_regex = "all-linear"};
  OK(esp_st_open(golden("peft/", "vera/start/adapter_model.safetensors"), &st));
  fx_open(&r, golden("models/", "llama"), ESP_F32, false);
  OK(esp_adapter_create(r.m, &cfg, "default", false, &a));
  float *have = fx_masters(a);
  for (int i = 0; i < 2; i++) {
    const char *name = i ? "base_model.vera_B" : "base_model.vera_A";
    const esp_param *p = &a->params->list[esp_params_find(a->params, name)];
    int64_t n;
    const float *want = tensor(st, name, "", &n);
    assert_int_equal(n, p->numel);
    assert_memory_equal(have + p->offset, want, (size_t)n * sizeof *want);
    test_free((void *)(uintptr_t)want);
  }
  free(have);
  esp_adapter_destroy(a);
  fx_close(&r);
  esp_st_close(st);
}

/* One string as target is a regex, a list is names; the configuration travels through adapter_config.json's reader. */
static void matching(void **state) {
  json_t *j, *c, *hit;
  OK(esp_json_load(golden("peft/", "targets.json"), &j));
  const json_t *paths = json_object_get(j, "paths"), *list = json_object_get(j, "cases");
  char dir[64] = "/tmp/esp-targets-XXXXXX", file[100];
  assert_non_null(mkdtemp(dir));
  snprintf(file, sizeof file, "%s/adapter_config.json", dir);
  size_t i, k;
  int checked = 0;
  json_array_foreach(list, i, c) {
    json_t *config = json_deep_copy(json_object_get(c, "config"));
    json_object_set_new(config, "peft_type", json_string("LORA"));
    OK(esp_json_save(file, config, 1));
    esp_arena *arena = esp_arena_create(ESP_MEM_HOST);
    esp_adapter_cfg cfg;
    OK(esp_adapter_cfg_load(dir, arena, &cfg));
    json_array_foreach(json_object_get(c, "hits"), k, hit) {
      esp_site s = {.kind = ESP_SITE_LINEAR, .path = json_string_value(json_array_get(paths, k))};
      bool want = json_integer_value(hit) != 0, have = esp_adapter_matches(&cfg, &s);
      if (want != have) fail_msg("case %zu: %s: PEFT says %d", i, s.path, (int)want);
      checked++;
    }
    esp_arena_destroy(arena);
    json_decref(config);
  }
  assert_true(checked > 300);
  json_decref(j);
  OK(esp_remove_tree(dir));
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(parity), cmocka_unit_test(projections),
                                     cmocka_unit_test(matching)};
  test_backend_or_exit();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
