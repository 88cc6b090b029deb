/* Changes that stay out of subspaces: observed rows against the model's own, bases against their definition, dW K0 = 0
 * for every kind of adapter with an optimizer that does not keep to gradients (AdamW with decay).
 * Mutation seen caught: `after_step` (gpm.c) left out, so that the gradient alone is projected. */
#include "core/linalg.h"
#include "strategy_fixture.h"
#include "tasks/internal.h"
#include "tasks/projection.h"

static const char *const target[] = {"all-linear"};
static const esp_adapter_cfg kinds[] = {
    {.type = "lora", .r = 4, .alpha = 8, .seed = 5, .target = target, .n_target = 1},
    {.type = "olora_cl", .r = 4, .alpha = 8, .seed = 5, .target = target, .n_target = 1, .tasks = SF_TASKS},
    {.type = "full"},
    {.type = "layers", .top_layers = 1},
};
enum { N_KINDS = sizeof kinds / sizeof kinds[0] };

/* fp32 weights as the product sees them. */
static float *effective(sf *f, esp_site *s) {
  float *w = malloc((size_t)(s->out * s->in) * sizeof *w);
  OK(esp_site_read_weight_rows(f->r.m, s, 0, s->out, w));
  OK(esp_adapter_effective_rows(f->a, s, 0, s->out, w));
  return w;
}

static void begin(sf *f, int task) {
  if (f->a->kind->task_begin) OK(f->a->kind->task_begin(f->a, task));
  sf_task(f, task);
}

static void train(sf *f, int steps) {
  for (int i = 0; i < steps; i++) sf_step(f, i, steps, 6);
}

static double largest(const float *x, int64_t n) {
  return fx_max_abs(x, n);
}

/* Inputs of the second task's end, of all matrices, before the last one begins; rows with the adapter as it stood. */
typedef struct kept {
  esp_trained *list;
  int n;
  esp_observed seen[2];
  float **w;
} kept;

static void look_at(sf *f, kept *k, int task, int64_t samples, int64_t tokens) {
  esp_sample *some;
  int64_t count;
  f->q.task = task;
  OK(esp_sequence_some(&f->q, samples, &some, &count));
  OK(esp_observe(&f->q, k->list, k->n, some, count, tokens, false, &k->seen[task]));
  esp_mem_free(some);
}

/* |(W_now - W_begin) x| for the rows x that the strategy itself took, in fp64; the largest over them. */
static double moved(sf *f, const kept *k, int i, int seen) {
  esp_site *s = k->list[i].site;
  float *now = effective(f, s);
  const float *x = k->seen[seen].x[s->group->index];
  double most = 0;
  for (int64_t row = 0; row < k->seen[seen].rows[s->group->index]; row++)
    for (int64_t o = 0; o < s->out; o++) {
      double d = 0;
      for (int64_t c = 0; c < s->in; c++)
        d += ((double)now[o * s->in + c] - (double)k->w[i][o * s->in + c]) * (double)x[row * s->in + c];
      most = fmax(most, fabs(d));
    }
  free(now);
  return most;
}

static void nullspace(void **state) {
  static const char *const names[] = {"nullspace"};
  const int64_t samples = 3, tokens = 9; /* few rows: room is left in 32 dimensions after two tasks */
  esp_strategy_cfg cfg = {.names = names, .n = 1, .nullspace = {.energy = 1, .samples = samples, .tokens = tokens}};
  for (int kind = 0; kind < N_KINDS; kind++) {
    sf f;
    kept k = {0};
    sf_open(&f, &kinds[kind], &cfg);
    f.optim->cfg.weight_decay = 0.1;
    for (int t = 0; t < 2; t++) {
      begin(&f, t);
      train(&f, 3);
      if (t == 0) OK(esp_trained_list(&f.set.list[0], &f.q, &k.list, &k.n));
      look_at(&f, &k, t, samples, tokens);
      sf_end(&f);
    }
    esp_mem_free(k.list);
    begin(&f, 2);
    OK(esp_trained_list(&f.set.list[0], &f.q, &k.list, &k.n));
    assert_true(k.n == (kinds[kind].top_layers ? 7 : 14));
    k.w = malloc((size_t)k.n * sizeof *k.w);
    for (int i = 0; i < k.n; i++) k.w[i] = effective(&f, k.list[i].site);
    train(&f, 5);
    double worst = 0, change = 1;
    for (int i = 0; i < k.n; i++) {
      esp_site *s = k.list[i].site;
      for (int t = 0; t < 2; t++)
        worst = fmax(worst, moved(&f, &k, i, t) / largest(k.seen[t].x[s->group->index], tokens * s->in));
      float *now = effective(&f, s);
      for (int64_t c = 0; c < s->out * s->in; c++) now[c] -= k.w[i][c];
      change = fmin(change, largest(now, s->out * s->in));
      free(now);
    }
    if (!(worst <= 1e-6 && change > 1e-4)) fail_msg("%s: %g moved, weights by %g", kinds[kind].type, worst, change);
    for (int i = 0; i < k.n; i++) free(k.w[i]);
    free(k.w);
    esp_mem_free(k.list);
    for (int t = 0; t < 2; t++) esp_observed_deinit(&k.seen[t]);
    sf_close(&f);
  }
}

/* The basis is orthonormal, holds the energy it should and not a direction more; what it held stays in it. */
static void bases(void **state) {
  enum { WIDTH = 24, ROWS = 10 };
  static const char *const names[] = {"gpm"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .gpm = {.energy = 0.9, .samples = 3, .tokens = 9}};
  sf f;
  sf_open(&f, NULL, &cfg);
  esp_strategy *s = &f.set.list[0];
  float *before = NULL;
  int64_t k_before = 0;
  for (int round = 0; round < 3; round++) {
    float x[ROWS * WIDTH];
    double total = 0, inside = 0, without = 0;
    for (int64_t i = 0; i < ROWS * WIDTH; i++) {
      x[i] = esp_rng_normal(3, (uint64_t)round, (uint64_t)i) * expf(-0.5f * (float)(i / WIDTH));
      total += (double)x[i] * (double)x[i];
    }
    OK(esp_basis_grow(s, "inputs.0", WIDTH, x, ROWS, 0.9));
    esp_tensor basis = esp_basis(s, "inputs.0", WIDTH);
    int64_t k = esp_tensor_rows(&basis);
    assert_true(k > k_before && k - k_before < ROWS && esp_tensor_cols(&basis) == WIDTH);
    float *m = test_read(f.r.be, basis.data, k * WIDTH * 4);
    for (int64_t i = 0; i < k; i++)
      for (int64_t j = 0; j < k; j++) {
        double d = 0;
        for (int c = 0; c < WIDTH; c++) d += (double)m[i * WIDTH + c] * (double)m[j * WIDTH + c];
        assert_true(fabs(d - (i == j)) <= 1e-6);
        if (i < k_before) { /* what was inside is inside */
          double in = 0;
          for (int64_t b = 0; b < k; b++) {
            d = 0;
            for (int c = 0; c < WIDTH; c++) d += (double)m[b * WIDTH + c] * (double)before[i * WIDTH + c];
            in += d * d;
          }
          assert_true(fabs(in - 1) <= 1e-5);
        }
      }
    for (int64_t i = 0; i < k; i++) /* the last direction was needed */
      for (int r = 0; r < ROWS; r++) {
        double d = 0;
        for (int c = 0; c < WIDTH; c++) d += (double)m[i * WIDTH + c] * (double)x[r * WIDTH + c];
        inside += d * d;
        if (i + 1 < k) without += d * d;
      }
    assert_true(inside >= 0.9 * total * (1 - 1e-6) && without < 0.9 * total);
    free(before);
    before = m;
    k_before = k;
  }
  free(before);
  sf_close(&f);
}

/* What is observed: the first group's input is the normed embedding of the tokens, seen here through a base with its
 * own norm weights; the outputs are W x + b of the rows. */
static void observed(void **state) {
  esp_strategy_cfg none = {0};
  sf f;
  esp_trained *list;
  esp_observed o;
  int n;
  sf_open(&f, NULL, &none);
  fx_shake(f.a, 0.05f, 4);
  esp_strategy who = {.kind = &esp_strategy_gpm};
  OK(esp_trained_list(&who, &f.q, &list, &n));
  assert_int_equal(n, 14);
  esp_sample s[5];
  for (int i = 0; i < 5; i++) s[i] = (esp_sample){1, i};
  OK(esp_observe(&f.q, list, n, s, 5, 12, true, &o));
  for (int i = 0; i < n; i++) {
    esp_site *site = list[i].site;
    esp_group *g = site->group;
    assert_int_equal(o.rows[g->index], 12);
    float *w = effective(&f, site);
    double worst = 0;
    for (int r = 0; r < 12; r++)
      for (int64_t j = 0; j < site->out; j++) {
        double y = 0;
        for (int64_t c = 0; c < site->in; c++)
          y += (double)w[j * site->in + c] * (double)o.x[g->index][r * site->in + c];
        worst = fmax(worst, fabs(y - (double)o.y[g->index][r * g->out + site->col0 + j]));
      }
    assert_true(worst <= 1e-4);
    free(w);
  }
  esp_observed_deinit(&o);
  esp_mem_free(list);
  sf_close(&f);
}

/* GPM on one LoRA: A moves only outside of the span, B is free, the first task is as without. */
static void gpm(void **state) {
  static const char *const names[] = {"gpm"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .gpm = {.energy = 0.95, .samples = 3, .tokens = 9}};
  sf f;
  sf_open(&f, NULL, &cfg);
  for (int t = 0; t < 2; t++) {
    begin(&f, t);
    if (t == 0) {
      train(&f, 3);
      sf_end(&f);
    }
  }
  float *was = fx_masters(f.a), *now;
  train(&f, 4);
  now = fx_masters(f.a);
  esp_trained *list;
  int n;
  OK(esp_trained_list(&f.set.list[0], &f.q, &list, &n));
  for (int i = 0; i < n; i++) {
    const esp_param *a = &f.a->params->list[list[i].a], *b = &f.a->params->list[list[i].b];
    char name[32];
    snprintf(name, sizeof name, "inputs.%d", list[i].site->group->index);
    int64_t in = list[i].site->in;
    esp_tensor basis = esp_basis(&f.set.list[0], name, in);
    int64_t k = esp_tensor_rows(&basis);
    assert_true(k > 0 && k < 9);
    float *m = test_read(f.r.be, basis.data, k * in * 4);
    double size = 0, b_moved = 0;
    for (int64_t c = 0; c < b->numel; c++)
      b_moved = fmax(b_moved, fabs((double)now[b->offset + c] - (double)was[b->offset + c]));
    for (int64_t row = 0; row < a->shape[0]; row++) {
      for (int64_t j = 0; j < k; j++) {
        double d = 0;
        for (int64_t c = 0; c < in; c++) {
          double e = (double)now[a->offset + row * in + c] - (double)was[a->offset + row * in + c];
          d += e * (double)m[j * in + c];
          size = fmax(size, fabs(e));
        }
        assert_true(fabs(d) <= 1e-6);
      }
    }
    assert_true(size > 1e-3 && b_moved > 1e-3);
    free(m);
  }
  free(was);
  free(now);
  esp_mem_free(list);
  sf_close(&f);
}

/* U_high^T dW = 0 and dW V_high = 0 against a decomposition made here, in the first task and in the second, whose
 * weights hold what the first has added. */
static void osf(void **state) {
  static const char *const names[] = {"osf"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .osf = {.retain = 0.5}};
  for (int kind = 0; kind < N_KINDS; kind++) {
    sf f;
    bool lora = kind == 0;
    if (lora) { /* one task alone, or an adapter for each */
      esp_strategy_cfg none = {0};
      sf_open(&f, &kinds[kind], &none);
      f.cfg = cfg;
      f.q.one_adapter = false;
      OK(esp_strategies_create(&f.cfg, f.r.be, &f.set));
      OK(esp_strategies_open(&f.set, &f.q));
    } else {
      sf_open(&f, &kinds[kind], &cfg);
    }
    f.optim->cfg.weight_decay = lora || kind == 1 ? 0.1 : 0;
    for (int t = 0; t < (lora ? 1 : 2); t++) {
      begin(&f, t);
      esp_trained *list;
      int n;
      OK(esp_trained_list(&f.set.list[0], &f.q, &list, &n));
      float **was = malloc((size_t)n * sizeof *was);
      for (int i = 0; i < n; i++) was[i] = effective(&f, list[i].site);
      train(&f, 4);
      double worst = 0, change = 1;
      for (int i = 0; i < n; i++) {
        int64_t out = list[i].site->out, in = list[i].site->in, least = out < in ? out : in;
        float *d = effective(&f, list[i].site), *u = malloc((size_t)(out * least) * sizeof *u);
        float *sv = malloc((size_t)least * sizeof *sv), *vt = malloc((size_t)(least * in) * sizeof *vt);
        for (int64_t c = 0; c < out * in; c++) d[c] -= was[i][c];
        change = fmin(change, largest(d, out * in));
        OK(esp_linalg_svd(out, in, was[i], u, sv, vt));
        for (int64_t k = 0; k < least / 2; k++) {
          for (int64_t c = 0; c < in; c++) {
            double sum = 0;
            for (int64_t o = 0; o < out; o++) sum += (double)u[o * least + k] * (double)d[o * in + c];
            worst = fmax(worst, fabs(sum));
          }
          for (int64_t o = 0; o < out; o++) {
            double sum = 0;
            for (int64_t c = 0; c < in; c++) sum += (double)vt[k * in + c] * (double)d[o * in + c];
            worst = fmax(worst, fabs(sum));
          }
        }
        free(d), free(u), free(sv), free(vt), free(was[i]);
      }
      if (!(worst <= 1e-6 && change > 1e-4)) fail_msg("%s: %g along, weights by %g", kinds[kind].type, worst, change);
      free(was);
      esp_mem_free(list);
    }
    sf_close(&f);
  }
}

/* What stays of a layer against its importance, the mean cosine of x and W x relative to the other layer's, in fp64. */
static void osf_importance(void **state) {
  static const char *const names[] = {"osf"};
  static const esp_adapter_cfg full = {.type = "full"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .osf = {.retain = 0.5, .retain_min = 0.2}};
  sf f;
  esp_trained *list;
  esp_observed o;
  esp_sample *some;
  int64_t count;
  int n, squares[2] = {0};
  double mean[2] = {0};
  sf_open(&f, &full, &cfg);
  begin(&f, 0);
  OK(esp_trained_list(&f.set.list[0], &f.q, &list, &n));
  OK(esp_sequence_some(&f.q, 16, &some, &count));
  OK(esp_observe(&f.q, list, n, some, count, 128, true, &o));
  for (int i = 0; i < n; i++) {
    const esp_site *s = list[i].site;
    int64_t rows = o.rows[s->group->index];
    if (s->in != s->out) continue;
    squares[s->layer]++;
    for (int64_t r = 0; r < rows; r++) {
      const float *x = o.x[s->group->index] + r * s->in, *y = o.y[s->group->index] + r * s->group->out + s->col0;
      double xy = 0, xx = 0, yy = 0;
      for (int64_t c = 0; c < s->in; c++)
        xy += (double)x[c] * (double)y[c], xx += (double)x[c] * (double)x[c], yy += (double)y[c] * (double)y[c];
      mean[s->layer] += xy / sqrt(xx * yy) / (double)rows;
    }
  }
  assert_true(squares[0] == 2 && squares[1] == 2);
  for (int i = 0; i < n; i++) {
    const esp_site *s = list[i].site;
    double share = 0.2 + 2 * mean[s->layer] / (mean[0] + mean[1]) * (0.5 - 0.2);
    char name[32];
    snprintf(name, sizeof name, "v.%d", s->index);
    esp_tensor v = esp_basis(&f.set.list[0], name, s->in);
    double least = s->out < s->in ? (double)s->out : (double)s->in;
    share = fmin(1, fmax(0.2, mean[0] + mean[1] > 0 ? share : 0.5));
    assert_true(fabs((double)esp_tensor_rows(&v) - share * least) <= 0.51);
  }
  esp_observed_deinit(&o);
  esp_mem_free(some);
  esp_mem_free(list);
  sf_close(&f);
}

/* No step along the directions of earlier tasks: orthonormal over all tasks, orthogonal to what the masters have
 * changed by, and with as many as samples the samples' own gradients lie in their span. */
static void ogd(void **state) {
  static const char *const names[] = {"ogd"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .ogd = {.samples = 5, .directions = 5}};
  sf f;
  sf_open(&f, NULL, &cfg);
  f.optim->cfg.weight_decay = 0.1;
  int64_t p = f.a->params->total, k[2];
  float *u[2], *own[2];
  for (int t = 0; t < 2; t++) {
    char name[32];
    esp_sample *some;
    int64_t count;
    begin(&f, t);
    train(&f, 3);
    OK(esp_sequence_some(&f.q, 5, &some, &count));
    esp_tensor g = esp_flat(f.r.be->ops->alloc(f.r.be, ESP_MEM_HOST, p * 4), p);
    OK(esp_sequence_gradient_of(&f.q, &some[4], 1, g, NULL));
    own[t] = test_read(f.r.be, g.data, p * 4);
    f.r.be->ops->free(f.r.be, g.data);
    sf_end(&f);
    snprintf(name, sizeof name, "directions.%d", t);
    esp_tensor basis = esp_basis(&f.set.list[0], name, p);
    k[t] = esp_tensor_rows(&basis);
    assert_int_equal(k[t], 5);
    u[t] = test_read(f.r.be, basis.data, k[t] * p * 4);
    esp_mem_free(some);
  }
  for (int a = 0; a < 10; a++)
    for (int b = 0; b <= a; b++) {
      double d = 0;
      for (int64_t i = 0; i < p; i++) d += (double)u[a / 5][a % 5 * p + i] * (double)u[b / 5][b % 5 * p + i];
      assert_true(fabs(d - (a == b)) <= 2e-6);
    }
  begin(&f, 2);
  float *was = fx_masters(f.a), *now;
  train(&f, 4);
  now = fx_masters(f.a);
  double moved = 0;
  for (int64_t i = 0; i < p; i++) moved += pow((double)now[i] - (double)was[i], 2);
  assert_true(sqrt(moved) > 0.1);
  for (int t = 0; t < 2; t++) {
    double along = 0, size = 0;
    for (int64_t i = 0; i < p; i++) {
      along += ((double)now[i] - (double)was[i]) * (double)own[t][i];
      size += (double)own[t][i] * (double)own[t][i];
    }
    assert_true(fabs(along) <= 1e-4 * sqrt(size * moved));
    for (int64_t d = 0; d < k[t]; d++) {
      along = 0;
      for (int64_t i = 0; i < p; i++) along += ((double)now[i] - (double)was[i]) * (double)u[t][d * p + i];
      assert_true(fabs(along) <= 1e-6);
    }
    free(u[t]);
    free(own[t]);
  }
  free(was);
  free(now);
  sf_close(&f);
}

/* B A stays to rounding, factors have equal Gram matrices, lost ranks come back with B zero. */
static void refactored(void **state) {
  enum { OUT = 20, IN = 14, R = 5 };
  for (int lost = 0; lost < 3; lost++) {
    float a[R * IN], b[OUT * R], a0[R * IN], b0[OUT * R];
    for (int i = 0; i < R * IN; i++) a[i] = esp_rng_normal(2, 1, (uint64_t)i);
    for (int i = 0; i < OUT * R; i++) b[i] = i % R < lost ? 0 : 0.01f * esp_rng_normal(2, 2, (uint64_t)i);
    memcpy(a0, a, sizeof a);
    memcpy(b0, b, sizeof b);
    OK(esp_refactor(OUT, IN, R, a, b));
    double most = 0, worst = 0;
    for (int o = 0; o < OUT; o++)
      for (int i = 0; i < IN; i++) {
        double x = 0, y = 0;
        for (int k = 0; k < R; k++) {
          x += (double)b0[o * R + k] * (double)a0[k * IN + i];
          y += (double)b[o * R + k] * (double)a[k * IN + i];
        }
        most = fmax(most, fabs(x));
        worst = fmax(worst, fabs(x - y));
      }
    assert_true(worst <= 1e-6 * most);
    for (int j = 0; j < R; j++)
      for (int k = 0; k < R; k++) {
        double aa = 0, bb = 0;
        for (int i = 0; i < IN; i++) aa += (double)a[j * IN + i] * (double)a[k * IN + i];
        for (int o = 0; o < OUT; o++) bb += (double)b[o * R + j] * (double)b[o * R + k];
        bool gone = k == j && j >= R - lost;
        assert_true(gone ? bb == 0 && fabs(aa - 1.0 / 3) <= 1e-6 : fabs(aa - bb) <= 2e-6 * most * OUT);
        if (j != k) assert_true(fabs(bb) <= 2e-6 * most * OUT);
      }
  }
  float a[R * IN], b[OUT * R] = {0}, a0[R * IN];
  for (int i = 0; i < R * IN; i++) a0[i] = a[i] = esp_rng_normal(2, 1, (uint64_t)i);
  OK(esp_refactor(OUT, IN, R, a, b));
  assert_memory_equal(a, a0, sizeof a);
}

/* In a run: the weights stay, the moments are zero; with an interval also within a task. */
static void refactor_in_run(void **state) {
  static const char *const names[] = {"refactor"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .refactor = {.interval = 3}};
  sf f;
  sf_open(&f, NULL, &cfg);
  begin(&f, 0);
  train(&f, 2);
  assert_int_equal(f.optim->step, 2);
  esp_trained *list;
  int n;
  OK(esp_trained_list(&f.set.list[0], &f.q, &list, &n));
  float *was = effective(&f, list[3].site), *before = fx_masters(f.a);
  begin(&f, 1);
  float *now = effective(&f, list[3].site), *after = fx_masters(f.a);
  int64_t size = list[3].site->out * list[3].site->in;
  assert_true(fx_rel(now, was, size) <= 1e-6 && fx_rel(after, before, f.a->params->total) > 1e-2);
  assert_int_equal(f.optim->step, 0);
  train(&f, 3);
  assert_int_equal(f.optim->step, 0);
  float *m = test_read(f.r.be, f.optim->state[0], f.a->params->total * 4);
  assert_true(fx_max_abs(m, f.a->params->total) == 0);
  free(m);
  free(was);
  free(now);
  free(before);
  free(after);
  esp_mem_free(list);
  sf_close(&f);
}

static void refused(void **state) {
  static const char *const names[] = {"gpm"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .gpm = {.energy = 0.95, .samples = 3, .tokens = 9}};
  assert_int_equal(esp_strategies_check(&cfg, &(esp_strategy_facts){.n_tasks = 1, .one_adapter = true}),
                   ESP_ERR_RECIPE);
  esp_adapter_cfg ia3 = {.type = "ia3", .r = 1, .alpha = 1, .target = target, .n_target = 1};
  sf f;
  esp_strategy_cfg none = {0};
  sf_open(&f, &ia3, &none);
  f.cfg = cfg;
  OK(esp_strategies_create(&f.cfg, f.r.be, &f.set));
  assert_int_equal(esp_strategies_open(&f.set, &f.q), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "gpm is for lora"));
  sf_close(&f);
  static const char *const osf_only[] = {"osf"};
  sf_open(&f, &kinds[0], &none);
  f.cfg = (esp_strategy_cfg){.names = osf_only, .n = 1, .osf = {.retain = 0.5}};
  OK(esp_strategies_create(&f.cfg, f.r.be, &f.set));
  assert_int_equal(esp_strategies_open(&f.set, &f.q), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "osf wants factors of its own"));
  sf_close(&f);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(observed), cmocka_unit_test(bases),      cmocka_unit_test(nullspace),
      cmocka_unit_test(gpm),      cmocka_unit_test(osf),        cmocka_unit_test(osf_importance),
      cmocka_unit_test(ogd),      cmocka_unit_test(refactored), cmocka_unit_test(refactor_in_run),
      cmocka_unit_test(refused)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
