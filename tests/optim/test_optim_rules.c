/* test_optim_rules.c: AdamW and SGD against fp64 scalar traces and the published 1000-step AdamW trajectory; groups,
 * freezing, decay switches, clipping scale, shadow; schedules; the layout of the parameter store; the counting
 * backend's books against the real ones. All on the backend that backend_env.h names.
 * Seen to catch: weight decay coupled into AdamW's gradient instead of applied to the parameter; the cool-down of
 * the infinite schedule ten steps too short. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "backend/stack.h"
#include "backend_env.h"
#include "core/cpu.h"
#include "core/rng.h"
#include "core/threads.h"
#include "io/safetensors.h"
#include "optim/optim.h"

#define MUST(expr) assert_int_equal((expr), ESP_OK)

static esp_backend *be;

static void close_to(double got, double want, double tol) {
  if (!(fabs(got - want) <= tol * (fabs(want) + 0.5))) fail_msg("got %.9g, want %.9g", got, want);
}

typedef struct trace { /* one element in fp64, as torch.optim writes it */
  double p, m, v;
} trace;
static void adamw_ref(trace *t, double g, const esp_optim_cfg *c, double lr, int64_t step, bool decay) {
  if (decay) t->p *= 1 - lr * c->weight_decay;
  t->m = c->beta1 * t->m + (1 - c->beta1) * g;
  t->v = c->beta2 * t->v + (1 - c->beta2) * g * g;
  double mh = t->m / (1 - pow(c->beta1, (double)step)), vh = t->v / (1 - pow(c->beta2, (double)step));
  t->p -= lr * mh / (sqrt(vh) + c->eps);
}
static void sgd_ref(trace *t, double g, const esp_optim_cfg *c, double lr, bool decay) {
  if (decay) g += c->weight_decay * t->p;
  t->m = c->momentum * t->m + g;
  t->p -= lr * (c->nesterov ? g + c->momentum * t->m : t->m);
}

/* Four parameters: plain, not decayed, group 1, frozen; odd sizes so that padding lies between. */
static void run_trace(const esp_optim_cfg *cfg, esp_dtype shadow) {
  enum { N = 4, STEPS = 40 };
  static const int64_t shapes[N][2] = {{3, 7}, {1, 5}, {37, 31}, {2, 2}};
  esp_params *ps;
  esp_optim *o;
  MUST(esp_params_create(be, &ps));
  for (int i = 0; i < N; i++) {
    char name[16];
    snprintf(name, sizeof name, "p%d", i);
    assert_int_equal(esp_params_add(ps, name, 2, shapes[i], true), i);
  }
  MUST(esp_params_finalize(ps, shadow, true));
  ps->list[1].decay = false;
  ps->list[2].group = 1;
  ps->list[3].frozen = true;
  trace *t = calloc((size_t)ps->total, sizeof *t);
  float host[37 * 31];
  for (int i = 0; i < N; i++) {
    for (int64_t e = 0; e < ps->list[i].numel; e++) {
      host[e] = esp_rng_normal(5, (uint64_t)i, (uint64_t)e);
      t[ps->list[i].offset + e].p = host[e];
    }
    esp_params_set(ps, i, host);
  }
  MUST(esp_optim_create(cfg, ps, &o));
  for (int64_t step = 1; step <= STEPS; step++) {
    esp_params_zero_grad(ps);
    double lr = cfg->lr * (1 + 0.1 * (double)step), norm = 0;
    float *grad = calloc((size_t)ps->total, sizeof *grad);
    for (int i = 0; i < N; i++)
      for (int64_t e = 0; e < ps->list[i].numel; e++) {
        float g = esp_rng_normal(9, (uint64_t)(step * N + i), (uint64_t)e);
        grad[ps->list[i].offset + e] = g;
        if (i != 3) norm += (double)g * g;
        double gs = 0.5 * g, rate = i == 2 ? lr * cfg->lora_plus_ratio : lr;
        if (cfg->n_lr_factors && (i == 0 || i == 2)) rate *= i == 0 ? 0.25 : 3; /* test_traces */
        if (i == 3) continue;
        if (!strcmp(cfg->name, "adamw"))
          adamw_ref(&t[ps->list[i].offset + e], gs, cfg, rate, step, i != 1);
        else
          sgd_ref(&t[ps->list[i].offset + e], gs, cfg, rate, i != 1);
      }
    be->ops->upload(be, ps->grad, grad, ps->total * 4);
    free(grad);
    close_to(esp_optim_grad_norm(o), sqrt(norm), 1e-12);
    esp_optim_step(o, lr, 0.5f);
  }
  for (int i = 0; i < N; i++) {
    esp_params_get(ps, i, host);
    esp_tensor s = esp_param_shadow(ps, i);
    uint16_t *h = test_read(be, s.data, esp_tensor_bytes(&s));
    for (int64_t e = 0; e < ps->list[i].numel; e++) {
      close_to(host[e], t[ps->list[i].offset + e].p, 5e-6);
      if (shadow == ESP_BF16)
        assert_int_equal(h[e], esp_f32_to_bf16(host[e]));
      else
        assert_ptr_equal(s.data, ps->master + ps->list[i].offset);
    }
    free(h);
  }
  float *all = test_read(be, ps->master, ps->total * 4);
  for (int64_t e = 21; e < 32; e++) assert_float_equal(all[e], 0, 0); /* padding stays zero */
  free(all);
  esp_optim_reset(o);
  assert_int_equal(o->step, 0);
  for (int s = 0; s < o->kind->n_states; s++) {
    float *v = test_read(be, o->state[s], ps->total * 4);
    for (int64_t e = 0; e < ps->total; e++) assert_float_equal(v[e], 0, 0);
    free(v);
  }
  esp_optim_destroy(o);
  esp_params_destroy(ps);
  free(t);
}

static void test_traces(void **state) {
  (void)state;
  esp_optim_cfg rows[] = {
      {.name = "adamw", .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.1},
      {.name = "adamw", .lr = 1e-3, .beta1 = 0.8, .beta2 = 0.95, .eps = 1e-6},
      {.name = "sgd", .lr = 1e-2, .momentum = 0.9, .weight_decay = 0.01},
      {.name = "sgd", .lr = 1e-2, .momentum = 0.9, .nesterov = true},
      {.name = "sgd", .lr = 1e-2},
  };
  esp_isa last = test_on_cpu() ? esp_cpu_isa_available() : ESP_ISA_PLAIN; /* a device has one */
  for (esp_isa isa = ESP_ISA_PLAIN; isa <= last; isa++)
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
      esp_cpu_isa_set(isa);
      static const esp_pattern factors[] = {{"0$", 0.25}, {"p[02]", 3}}; /* p0: the first counts; p2: LoRA+ as well */
      rows[i].lora_plus_ratio = 4;
      rows[i].lr_factors = factors;
      rows[i].n_lr_factors = i % 2 ? 2 : 0;
      run_trace(&rows[i], i % 2 ? ESP_F32 : ESP_BF16);
    }
  esp_cpu_isa_set(esp_cpu_isa_available());
}

/* Factors follow a new configuration, as between two tasks; a key that fits nothing is refused. */
static void test_lr_factors(void **state) {
  (void)state;
  esp_params *ps;
  esp_optim *o;
  MUST(esp_params_create(be, &ps));
  assert_int_equal(esp_params_add(ps, "model.layers.0.q_proj.lora_A.weight", 1, (int64_t[]){4}, true), 0);
  assert_int_equal(esp_params_add(ps, "lm_head.weight", 1, (int64_t[]){4}, true), 1);
  MUST(esp_params_finalize(ps, ESP_F32, true));
  esp_pattern slow = {"layers\\.", 0.01}, none = {"score", 2};
  esp_optim_cfg cfg = {.name = "sgd", .lr = 1, .lr_factors = &slow, .n_lr_factors = 1};
  MUST(esp_optim_create(&cfg, ps, &o));
  float one[4] = {1, 1, 1, 1};
  for (int k = 0; k < 2; k++) {
    be->ops->upload(be, ps->grad, one, sizeof one);
    be->ops->upload(be, ps->grad + ps->list[1].offset, one, sizeof one);
    esp_params_set(ps, 0, one);
    esp_params_set(ps, 1, one);
    esp_optim_step(o, 0.5, 1);
    float got[4];
    esp_params_get(ps, 0, got);
    close_to(got[0], k ? 0.5 : 1 - 0.005, 1e-7);
    esp_params_get(ps, 1, got);
    close_to(got[3], 0.5, 1e-7);
    MUST(esp_optim_configure(o, &(esp_optim_cfg){.name = "sgd", .lr = 1}));
  }
  esp_optim_destroy(o);
  cfg.lr_factors = &none;
  assert_int_equal(esp_optim_create(&cfg, ps, &o), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "optim.lr_factors: 'score' is in the name of no trained parameter"));
  esp_error_clear();
  esp_params_destroy(ps);
}

static void test_published_adamw_trajectory(void **state) {
  (void)state;
  const char *path = ESP_SHARED_DIR "/data/golden/cs336/adamw_linear_1000steps.safetensors";
  esp_st *st;
  if (esp_st_open(path, &st) != ESP_OK) {
    print_message("skipped: %s\n", esp_error_message());
    skip();
  }
  const float *init = esp_st_find(st, "init_weight")->data, *x = esp_st_find(st, "x")->data;
  const float *final_ = esp_st_find(st, "expected_final_weight")->data;
  const double *path64 = esp_st_find(st, "f64_traj_decay_before_torch_order")->data;
  esp_optim_cfg cfg = {.name = "adamw", .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.01};
  esp_params *ps;
  esp_optim *o;
  MUST(esp_params_create(be, &ps));
  assert_int_equal(esp_params_add(ps, "w", 2, (int64_t[]){2, 3}, true), 0);
  MUST(esp_params_finalize(ps, ESP_F32, true));
  esp_params_set(ps, 0, init);
  MUST(esp_optim_create(&cfg, ps, &o));
  float w[6], grad[6];
  esp_params_get(ps, 0, w);
  for (int s = 0; s < 1000; s++) {
    const float *in = x + 3 * s;
    float want[2] = {in[0] + in[1], -in[2]};
    for (int r = 0; r < 2; r++) {
      float err = w[3 * r] * in[0] + w[3 * r + 1] * in[1] + w[3 * r + 2] * in[2] - want[r];
      for (int c = 0; c < 3; c++) grad[3 * r + c] = 2 * err * in[c];
    }
    be->ops->upload(be, ps->grad, grad, sizeof grad);
    esp_optim_step(o, cfg.lr, 1);
    esp_params_get(ps, 0, w);
    for (int e = 0; e < 6; e++)
      if (fabs(w[e] - path64[s * 6 + e]) > 2e-5) fail_msg("step %d, element %d", s, e);
  }
  for (int e = 0; e < 6; e++) assert_float_equal(w[e], final_[e], 2e-5);
  esp_optim_destroy(o);
  esp_params_destroy(ps);
  esp_st_close(st);
}

static void test_schedules(void **state) {
  (void)state;
  esp_schedule lin = {.name = ESP_SCHED_LINEAR, .warmup_steps = 10};
  close_to(esp_schedule_factor(&lin, 0, 110), 0.1, 1e-12);
  close_to(esp_schedule_factor(&lin, 9, 110), 1, 1e-12);
  close_to(esp_schedule_factor(&lin, 10, 110), 1, 1e-12);
  close_to(esp_schedule_factor(&lin, 60, 110), 0.5, 1e-12);
  close_to(esp_schedule_factor(&lin, 109, 110), 0.01, 1e-9);
  esp_schedule cosine = {.name = ESP_SCHED_COSINE, .warmup_steps = 0.1, .min_lr_ratio = 0.1};
  close_to(esp_schedule_factor(&cosine, 4, 100), 0.5, 1e-12);
  close_to(esp_schedule_factor(&cosine, 55, 100), 0.55, 1e-9);
  close_to(esp_schedule_factor(&cosine, 40, 100), 0.1 + 0.9 * 0.75, 1e-9); /* a third of the way: cos 60 degrees */
  esp_schedule wsd = {.name = ESP_SCHED_WSD, .warmup_steps = 5, .decay_share = 0.2};
  close_to(esp_schedule_factor(&wsd, 4, 100), 1, 1e-12);
  close_to(esp_schedule_factor(&wsd, 79, 100), 1, 1e-12);
  close_to(esp_schedule_factor(&wsd, 80, 100), 1, 1e-12);
  close_to(esp_schedule_factor(&wsd, 85, 100), 0.5, 1e-12); /* 1 - sqrt(5/20) */
  esp_schedule flat = {.name = ESP_SCHED_CONSTANT, .warmup_steps = 2};
  close_to(esp_schedule_factor(&flat, 0, 10), 0.5, 1e-12);
  close_to(esp_schedule_factor(&flat, 9, 10), 1, 1e-12);
  close_to(esp_schedule_factor(&lin, 0, 1), 0.1, 1e-12); /* all warm-up */
  assert_int_equal(esp_schedule_parse("cosine"), ESP_SCHED_COSINE);
  assert_int_equal(esp_schedule_parse("wsd"), ESP_SCHED_WSD);
  assert_int_equal(esp_schedule_parse("cosnie"), -1);
}

/* The four phases of `infinite` (arXiv 2503.02844, eq. 1) at points where they are known by hand: 10 steps of warm-up,
 * 40 of cosine to 0.4, constant, 20 of decay to 0.1. */
static void test_infinite_schedule(void **state) {
  (void)state;
  esp_schedule s = {.name = ESP_SCHED_INFINITE,
                    .warmup_steps = 10,
                    .cooldown_steps = 40,
                    .constant_ratio = 0.4,
                    .anneal_steps = 20,
                    .min_lr_ratio = 0.1};
  close_to(esp_schedule_factor(&s, 4, 200), 0.5, 1e-12);
  close_to(esp_schedule_factor(&s, 9, 200), 1, 1e-12);
  close_to(esp_schedule_factor(&s, 10, 200), 1, 1e-12);
  close_to(esp_schedule_factor(&s, 20, 200), 0.4 + 0.3 * (1 + sqrt(0.5)), 1e-12); /* cos 45 degrees */
  close_to(esp_schedule_factor(&s, 30, 200), 0.7, 1e-12);
  close_to(esp_schedule_factor(&s, 45, 200), 0.4 + 0.3 * (1 - sqrt(2 + sqrt(2)) / 2), 1e-12); /* cos 157.5 degrees */
  close_to(esp_schedule_factor(&s, 50, 200), 0.4, 1e-12);
  close_to(esp_schedule_factor(&s, 180, 200), 0.4, 1e-12);
  close_to(esp_schedule_factor(&s, 190, 200), 0.2, 1e-12); /* half way: the geometric mean of 0.4 and 0.1 */
  close_to(esp_schedule_factor(&s, 195, 200), 0.4 * pow(0.25, 0.75), 1e-12);
  assert_int_equal(esp_schedule_decay_steps(&s, 200), 20);
  assert_int_equal(esp_schedule_decay_steps(&s, 12), 12);
  /* It has no budget: further tasks move nothing but the last decay. */
  for (int i = 0; i < 180; i++) assert_true(esp_schedule_factor(&s, i, 200) == esp_schedule_factor(&s, i, 100000));
  /* Over tasks of 100 steps: the phases run on, and each task ends with a decay. */
  close_to(esp_schedule_run_factor(&s, 30, 300, 30, 100), 0.7, 1e-12);
  close_to(esp_schedule_run_factor(&s, 90, 300, 90, 100), 0.2, 1e-12);
  close_to(esp_schedule_run_factor(&s, 100, 300, 0, 100), 0.4, 1e-12); /* no warm-up again */
  close_to(esp_schedule_run_factor(&s, 189, 300, 89, 100), 0.4 * pow(0.25, 9.0 / 20), 1e-12);
  close_to(esp_schedule_run_factor(&s, 200, 300, 0, 100), 0.4, 1e-12);
  close_to(esp_schedule_run_factor(&s, 295, 300, 95, 100), 0.4 * pow(0.25, 0.75), 1e-12);
  s.anneal_steps = 0.5; /* of a task that ends in the cosine: from where that stood, 0.7, not from the constant rate */
  close_to(esp_schedule_run_factor(&s, 45, 60, 45, 60), 0.7 * sqrt(1 / 7.0), 1e-12);
  s.anneal_steps = 0;
  close_to(esp_schedule_run_factor(&s, 299, 300, 99, 100), 0.4, 1e-12);
  /* The others know nothing of tasks. */
  esp_schedule cosine = {.name = ESP_SCHED_COSINE};
  close_to(esp_schedule_run_factor(&cosine, 50, 100, 0, 50), 0.5, 1e-12);
  assert_int_equal(esp_schedule_parse("infinite"), ESP_SCHED_INFINITE);
}

static void test_store_layout(void **state) {
  (void)state;
  esp_params *ps;
  MUST(esp_params_create(be, &ps));
  assert_int_equal(esp_params_add(ps, "a", 2, (int64_t[]){3, 5}, true), 0);
  assert_int_equal(esp_params_add(ps, "q", 2, (int64_t[]){2, 7}, true), 1);
  assert_int_equal(esp_params_add(ps, "k", 2, (int64_t[]){1, 7}, false), 2);
  assert_int_equal(esp_params_add(ps, "v", 2, (int64_t[]){3, 7}, false), 3);
  assert_int_equal(esp_params_add(ps, "bias", 1, (int64_t[]){9}, true), 4);
  MUST(esp_params_finalize(ps, ESP_BF16, true));
  assert_int_equal(esp_params_add(ps, "late", 1, (int64_t[]){1}, true), -1);
  assert_int_equal(ps->list[1].offset, 16);
  assert_int_equal(ps->list[2].offset, 30);
  assert_int_equal(ps->list[3].offset, 37);
  assert_int_equal(ps->list[4].offset, 64);
  assert_int_equal(ps->total, 80);
  esp_tensor s = esp_params_stacked(ps, 1, 3, 1);
  assert_int_equal(s.shape[0], 6);
  assert_int_equal(s.shape[1], 7);
  float v[21];
  for (int i = 0; i < 21; i++) v[i] = (float)i + 0.5f;
  esp_params_set(ps, 3, v);
  esp_tensor h = esp_params_stacked(ps, 1, 3, 0);
  float *s_host = test_read(be, s.data, esp_tensor_bytes(&s));
  uint16_t *h_host = test_read(be, h.data, esp_tensor_bytes(&h));
  assert_float_equal(s_host[3 * 7 + 20], 20.5f, 0);
  assert_int_equal(h_host[3 * 7 + 4], esp_f32_to_bf16(4.5f));
  free(s_host);
  free(h_host);
  assert_int_equal(esp_params_find(ps, "v"), 3);
  assert_int_equal(esp_params_find(ps, "w"), -1);
  esp_tensor b = esp_param_grad(ps, 4);
  assert_int_equal(b.shape[0], 1);
  assert_int_equal(b.shape[1], 9);
  esp_params_destroy(ps);
}

/* The same store and optimizer on `count`: the same bytes in the books, no memory touched. */
static void use_store(esp_backend *on, esp_mem_stats *peak) {
  esp_params *ps;
  esp_optim *o;
  esp_stack st;
  esp_optim_cfg cfg = {.name = "adamw", .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8};
  MUST(esp_params_create(on, &ps));
  esp_params_add(ps, "w", 2, (int64_t[]){300, 77}, true);
  MUST(esp_params_finalize(ps, ESP_BF16, true));
  MUST(esp_optim_create(&cfg, ps, &o));
  MUST(esp_stack_init(&st, on, esp_backend_counts(on) ? 0 : 64 * 12));
  esp_stack_tensor(&st, ESP_BF16, 3, 11);
  int64_t mark = esp_stack_mark(&st);
  assert_int_equal(mark, 128);
  esp_stack_push(&st, 640);
  esp_stack_release(&st, mark);
  esp_stack_push(&st, 1);
  assert_int_equal(st.high, 768);
  if (esp_backend_counts(on)) { /* what measures a height is in no book: a stack of that height is */
    esp_stack_deinit(&st);
    MUST(esp_stack_init(&st, on, 768));
  }
  esp_optim_step(o, 1e-3, 1);
  /* packed weights and the scratch of products, attention and the loss */
  static float w[96 * 64];
  esp_tensor wt = esp_tensor_2d(esp_backend_counts(on) ? NULL : w, ESP_F32, 96, 64);
  esp_wview view = {.out = 96, .in = 64, .packed = on->ops->pack(on, &wt, 1, false, ESP_BF16)};
  esp_tensor x = esp_tensor_2d(on->ops->alloc(on, ESP_MEM_ACTIVATIONS, 70 * 64 * 2), ESP_BF16, 70, 64);
  esp_tensor y = esp_tensor_2d(on->ops->alloc(on, ESP_MEM_ACTIVATIONS, 70 * 96 * 2), ESP_BF16, 70, 96);
  esp_tensor g = esp_tensor_2d(on->ops->alloc(on, ESP_MEM_ACTIVATIONS, 96 * 64 * 4), ESP_F32, 96, 64), none = {0};
  on->ops->linear(on, y, x, &view, none, NULL, 0, 0);
  on->ops->linear_dx(on, x, y, &view, NULL, 0, 0);
  on->ops->matmul(on, g, y, true, x, false, 1, 1);
  static const int32_t cu[] = {0, 30, 70};
  esp_tensor q = esp_tensor_cols_view(&y, 0, 64), k = esp_tensor_cols_view(&y, 64, 32);
  esp_tensor dy = esp_tensor_2d(on->ops->alloc(on, ESP_MEM_ACTIVATIONS, 70 * 128 * 2), ESP_BF16, 70, 128);
  esp_tensor dx = esp_tensor_2d(on->ops->alloc(on, ESP_MEM_ACTIVATIONS, 70 * 64 * 2), ESP_BF16, 70, 64);
  esp_attn_args a = {.q = q,
                     .k = k,
                     .v = k,
                     .o = x,
                     .lse = on->ops->alloc(on, ESP_MEM_ACTIVATIONS, 2 * 70 * 4),
                     .cu_seqlens = cu,
                     .n_seqs = 2,
                     .heads = 2,
                     .kv_heads = 1,
                     .head_dim = 32,
                     .scale = 0.1f,
                     .causal = true,
                     .d_o = dx,
                     .d_q = esp_tensor_cols_view(&dy, 0, 64),
                     .d_k = esp_tensor_cols_view(&dy, 64, 32),
                     .d_v = esp_tensor_cols_view(&dy, 96, 32)};
  on->ops->attn_begin(on, cu, 2);
  on->ops->attn(on, &a);
  on->ops->attn_bwd(on, &a);
  MUST(esp_backend_sync(on));
  esp_mem_stats_get(peak);
  on->ops->pack_free(on, (void *)view.packed);
  on->ops->free(on, x.data);
  on->ops->free(on, y.data);
  on->ops->free(on, g.data);
  on->ops->free(on, dx.data);
  on->ops->free(on, dy.data);
  on->ops->free(on, a.lse);
  esp_stack_deinit(&st);
  esp_optim_destroy(o);
  esp_params_destroy(ps);
}
static void test_count_keeps_the_same_books(void **state) {
  (void)state;
  esp_backend *count;
  esp_mem_stats before, real, counted, after;
  esp_mem_stats_get(&before);
  esp_backend *own; /* a fresh one: no scratch yet */
  MUST(esp_backend_create(test_backend_name(), &own));
  use_store(own, &real);
  esp_backend_destroy(own);
  MUST(esp_backend_create(test_count_name(), &count)); /* a backend holds memory of its own from the start */
  use_store(count, &counted);
  for (int k = 0; k < ESP_MEM_KINDS; k++) {
    int64_t slack = k == ESP_MEM_WEIGHTS || k == ESP_MEM_WORKSPACE ? 512 : 0; /* small bookkeeping structs */
    int64_t apart = real.now[k] - counted.now[k];
    /* What a device's attention needs is counted for the library's kernels, which may leave a shape to our own. */
    bool bound = !test_on_cpu() && k == ESP_MEM_WORKSPACE && apart < 0 && -apart < counted.now[k] / 50;
    if (k != ESP_MEM_HOST && !bound && (apart < -slack || apart > slack))
      fail_msg("%s: %ld bytes, counted %ld", esp_mem_kind_name((esp_mem_kind)k), (long)real.now[k],
               (long)counted.now[k]);
  }
  int64_t apart = counted.now_device - real.now_device;
  assert_true(apart >= 0 && apart <= counted.now_device / 50);
  assert_true(count->stats.launches > 0 && count->stats.bytes > 0 && count->stats.flops > 0);
  esp_backend_destroy(count);
  esp_mem_stats_get(&after);
  for (int k = 0; k < ESP_MEM_KINDS; k++)
    if (k != ESP_MEM_HOST) assert_int_equal(before.now[k], after.now[k]);
  assert_int_equal(before.now_device, after.now_device);
}
static void test_stack_overflow_is_sticky(void **state) {
  (void)state;
  esp_backend *own;
  esp_stack st;
  MUST(esp_backend_create(test_backend_name(), &own));
  MUST(esp_stack_init(&st, own, 128));
  assert_non_null(esp_stack_push(&st, 128));
  assert_ptr_equal(esp_stack_push(&st, 1), st.base);
  assert_int_equal(esp_backend_sync(own), ESP_ERR_MEMORY);
  esp_stack_deinit(&st);
  esp_backend_destroy(own);
}

static int setup(void **state) {
  (void)state;
  test_backend_or_exit();
  return esp_backend_create(test_backend_name(), &be) == ESP_OK ? 0 : -1;
}
static int teardown(void **state) {
  (void)state;
  esp_backend_destroy(be);
  esp_threads_shutdown();
  return 0;
}
int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_traces),
                                     cmocka_unit_test(test_lr_factors),
                                     cmocka_unit_test(test_published_adamw_trajectory),
                                     cmocka_unit_test(test_schedules),
                                     cmocka_unit_test(test_infinite_schedule),
                                     cmocka_unit_test(test_store_layout),
                                     cmocka_unit_test(test_count_keeps_the_same_books),
                                     cmocka_unit_test(test_stack_overflow_is_sticky)};
  return cmocka_run_group_tests_name("optimizers", tests, setup, teardown);
}
