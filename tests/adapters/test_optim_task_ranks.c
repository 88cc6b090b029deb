/* Kinds with factors per task (olora_cl, incremental_rank), trained on two and three tasks in a row: the penalty and
 * its gradient against the definition in fp64; bytes of earlier tasks stay; a new task begins where the last one ended;
 * an earlier task is returned to exactly, in memory and from the file; a file holds the tasks begun and no more; all
 * tasks so far are one LoRA, in logits and gradients, after a step of training and after values were set.
 * Mutations seen to be caught: a copy that is not made again after a step, after values were set, or in a new task; A
 * in the order of the store in it; the scale of a site left out; blocks between two sites, or of a task with itself,
 * left in the penalty; gradients of the last task not cleared in a new one. Bounds: two orders of fp32 sums, over every
 * instruction set and the kernels of OpenBLAS up to 2.5e-6 apart in logits and 8e-6 in gradients. */
#include <math.h>

#include "../adapters/adapter_fixture.h"
#include "adapters/task_ranks.h"
#include "optim/optim.h"

static const char *const sites_used[] = {"q_proj", "v_proj", "down_proj"};
#define CFG(kind)                                                                                                      \
  (esp_adapter_cfg) {                                                                                                  \
    .type = kind, .r = 3, .alpha = 6, .seed = 9, .tasks = 3, .target = sites_used, .n_target = 3,                      \
    .orthogonal_lambda = 0.25,                                                                                         \
  }

static void attach_in(fx_run *r, esp_dtype compute, const esp_adapter_cfg *cfg, esp_adapter **a) {
  fx_open(r, fx_path("qwen"), compute, false);
  OK(esp_adapter_create(r->m, cfg, "default", true, a));
  OK(esp_adapters_activate(r->m, a, 1));
}

static void attach(fx_run *r, const esp_adapter_cfg *cfg, esp_adapter **a) {
  attach_in(r, ESP_F32, cfg, a);
}

static float *values(const esp_adapter *a, int index) {
  float *x = malloc((size_t)a->params->list[index].numel * sizeof *x);
  esp_params_get(a->params, index, x);
  return x;
}

/* As in a step of training; the penalty. */
static double train_step(fx_run *r, esp_adapter *a, esp_optim *o, const esp_batch *b, int step) {
  esp_params_zero_grad(a->params);
  fx_loss(r, b, true, ESP_CKPT_OFF, step);
  double penalty = a->kind->before_step ? a->kind->before_step(a, step, 4) : 0;
  esp_optim_step(o, 1e-2, 1.0f);
  OK(esp_backend_sync(r->be));
  return penalty;
}

/* What forward and the penalty read. */
static float *read_values(const esp_adapter *a, int index) {
  float *x = values(a, index);
  if (a->params->shadow_dtype == ESP_BF16)
    for (int64_t k = 0; k < a->params->list[index].numel; k++) x[k] = esp_bf16_to_f32(esp_f32_to_bf16(x[k]));
  return x;
}

static void penalty(void **state) {
  for (int form = 0; form < 4; form++)
    for (int task = 0; task < 3; task++) {
      fx_run r;
      esp_adapter *a;
      esp_adapter_cfg cfg = CFG("olora_cl");
      cfg.orthogonal = form & 1 ? "frobenius" : "l1";
      attach_in(&r, form & 2 ? ESP_BF16 : ESP_F32, &cfg, &a);
      double most = form == 3 ? 1e-2 : 1e-6; /* its derivative, not that of l1, is rounded to bf16 */
      fx_shake(a, 0.1f, 31);
      for (int t = 1; t <= task; t++) OK(a->kind->task_begin(a, t));
      esp_params_zero_grad(a->params);
      double got = a->kind->before_step(a, 0, 1), want = 0;
      OK(esp_backend_sync(r.be));
      float *grad = fx_grads(a);
      esp_site **sites;
      int n = esp_model_sites(r.m, &sites), seen = 0;
      for (int i = 0; i < n; i++) {
        if (!a->targeted[i]) continue;
        const esp_task_site *ts = a->site_state[i];
        int64_t in = sites[i]->in;
        float *now = read_values(a, ts->a[task]);
        double *g = calloc((size_t)(ts->r * in), sizeof *g);
        for (int t = 0; t < task; t++) {
          float *old = read_values(a, ts->a[t]);
          for (int64_t p = 0; p < ts->r; p++)
            for (int64_t q = 0; q < ts->r; q++) {
              double o = 0;
              for (int64_t c = 0; c < in; c++) o += (double)old[p * in + c] * now[q * in + c];
              want += 0.25 * (form & 1 ? o * o : fabs(o));
              double d = 0.25 * (form & 1 ? 2 * o : o > 0 ? 1 : -1);
              for (int64_t c = 0; c < in; c++) g[q * in + c] += d * old[p * in + c];
            }
          free(old);
        }
        const float *have = grad + a->params->list[ts->a[task]].offset;
        for (int64_t k = 0; k < ts->r * in; k++)
          if (!(fabs(have[k] - g[k]) <= most)) fail_msg("%s: gradient %g, not %g", sites[i]->path, have[k], g[k]);
        for (int t = 0; t < 3; t++) { /* and no other parameter has one */
          const esp_param *pa = &a->params->list[ts->a[t]], *pb = &a->params->list[ts->b[t]];
          if (t != task) assert_true(fx_max_abs(grad + pa->offset, pa->numel) == 0);
          assert_true(fx_max_abs(grad + pb->offset, pb->numel) == 0);
        }
        seen++;
        free(now);
        free(g);
      }
      assert_int_equal(seen, 6);
      if (!(fabs(got - want) <= 1e-6 * (want > 1 ? want : 1)) || (task > 0) != (want > 0.1))
        fail_msg("form %d, task %d: penalty %.9g, by definition %.9g", form, task, got, want);
      free(grad);
      esp_adapter_destroy(a);
      fx_close(&r);
    }
}

/* Trained alone, the penalty turns the new rows out of the old space. */
static void penalty_is_followed(void **state) {
  for (int form = 0; form < 2; form++) {
    fx_run r;
    esp_adapter *a;
    esp_optim *o;
    esp_adapter_cfg cfg = CFG("olora_cl");
    cfg.orthogonal = form ? "frobenius" : "l1";
    attach(&r, &cfg, &a);
    OK(a->kind->task_begin(a, 1));
    OK(esp_optim_create(&(esp_optim_cfg){.name = "adamw", .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8},
                        a->params, &o));
    double first = 0, last = 0;
    for (int step = 0; step < 60; step++) {
      esp_params_zero_grad(a->params);
      last = a->kind->before_step(a, step, 60);
      if (step == 0) first = last;
      esp_optim_step(o, 3e-3, 1.0f);
    }
    if (!(last < 0.2 * first)) fail_msg("form %d: penalty %g, at first %g", form, last, first);
    esp_optim_destroy(o);
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

static void frozen_and_recalled(void **state) {
  static const char *const kinds[] = {"olora_cl", "incremental_rank"};
  static float after[3][FX_T * FX_VOCAB], y[FX_T * FX_VOCAB];
  fx_batch f;
  fx_fill(&f);
  for (int k = 0; k < 2; k++) {
    fx_run r;
    esp_adapter *a;
    esp_optim *o;
    esp_adapter_cfg cfg = CFG(kinds[k]);
    attach(&r, &cfg, &a);
    OK(esp_optim_create(
        &(esp_optim_cfg){.name = "adamw", .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.1},
        a->params, &o));
    for (int task = 0; task < 3; task++) {
      OK(a->kind->task_begin(a, task));
      fx_logits(&r, &f.b, y);
      if (task > 0 && !(fx_rel(y, after[task - 1], FX_T * FX_VOCAB) < 1e-5)) /* wider products: other rounding */
        fail_msg("%s: task %d does not begin where the last one ended", kinds[k], task);
      f.ids[3] = 5 + 3 * task;         /* other data */
      esp_params_zero_grad(a->params); /* nothing of the last task is left in it */
      float *g = fx_grads(a), *before = fx_masters(a);
      assert_true(fx_max_abs(g, a->params->total) == 0);
      free(g);
      for (int step = 0; step < 4; step++) {
        double p = train_step(&r, a, o, &f.b, step);
        assert_true((p > 0) == (k == 0 && task > 0));
      }
      fx_fill(&f);
      float *now = fx_masters(a);
      for (int i = 0; i < a->params->count; i++) {
        const esp_param *p = &a->params->list[i];
        char mine[8];
        snprintf(mine, sizeof mine, ".%d.", task);
        bool own = strstr(p->name + strlen(p->name) - 9, mine) != NULL,
             same = !memcmp(before + p->offset, now + p->offset, (size_t)p->numel * 4);
        if (own == same || own == p->frozen)
          fail_msg("%s, task %d: %s %s", kinds[k], task, p->name, same ? "did not move" : "moved");
      }
      free(before);
      free(now);
      fx_logits(&r, &f.b, after[task]);
      if (task > 0 && !(fx_rel(after[task], after[task - 1], FX_T * FX_VOCAB) > 1e-3))
        fail_msg("%s: task %d learned nothing", kinds[k], task);
    }
    OK(esp_adapter_save(a, fx_path("all")));
    for (int task = 0; task < 3; task++) {
      OK(a->kind->task_begin(a, task));
      fx_logits(&r, &f.b, y);
      if (memcmp(y, after[task], sizeof y)) fail_msg("%s: task %d is not what it was", kinds[k], task);
    }
    /* a file of the first two tasks; then their directory beside that of all three */
    OK(a->kind->task_begin(a, 1));
    OK(esp_adapter_save(a, fx_path("two")));
    int count = a->params->count;
    esp_optim_destroy(o);
    esp_adapter_destroy(a);
    for (int task = 0; task < 3; task++) {
      OK(esp_adapter_load(r.m, fx_path(task < 2 ? "two" : "all"), "again", false, &a));
      assert_int_equal(a->params->count, task < 2 ? (count + 1) / 3 * 2 : count);
      OK(a->kind->task_begin(a, task));
      OK(esp_adapters_activate(r.m, &a, 1));
      fx_logits(&r, &f.b, y);
      if (memcmp(y, after[task], sizeof y)) fail_msg("%s: task %d from the file is not what it was", kinds[k], task);
      assert_int_equal(a->kind->task_begin(a, 3), ESP_ERR_DATA);
      esp_adapter_destroy(a);
    }
    fx_close(&r);
    OK(esp_remove_tree(fx_path("all")));
    OK(esp_remove_tree(fx_path("two")));
  }
}

/* ---- tasks so far as one LoRA ---- */

static bool near(const float *got, const float *want, int64_t n, double most) {
  return fx_rel(got, want, n) <= most;
}

/* `a`, at its task, against `lora`, which gets the values of all tasks so far: logits and, through `lora`, gradients.
 */
static void compare(fx_run *r, esp_adapter *a, fx_run *lr, esp_adapter *lora, const char *what) {
  static float y[FX_T * FX_VOCAB], z[FX_T * FX_VOCAB];
  fx_batch f;
  fx_fill(&f);
  esp_site **sites;
  int n = esp_model_sites(r->m, &sites), task = a->cfg.task;
  for (int i = 0; i < n; i++) {
    if (!a->targeted[i]) continue;
    const esp_task_site *ts = a->site_state[i];
    int ia, ib;
    assert_true(lora->kind->factors(lora, sites[i], &ia, &ib)); /* the sites of two models of one base */
    float *A = malloc((size_t)(ts->rank * (sites[i]->in + sites[i]->out)) * sizeof *A),
          *B = A + ts->rank * sites[i]->in;
    assert_int_equal(lora->params->list[ia].shape[0], ts->rank);
    assert_int_equal(a->kind->low_rank(a, sites[i], A, B), ts->rank);
    esp_params_set(lora->params, ia, A);
    esp_params_set(lora->params, ib, B);
    free(A);
  }
  fx_logits(r, &f.b, y);
  fx_logits(lr, &f.b, z);
  if (!near(y, z, FX_T * FX_VOCAB, 1e-5)) fail_msg("%s: logits", what);
  esp_params_zero_grad(a->params);
  esp_params_zero_grad(lora->params);
  fx_loss(r, &f.b, true, ESP_CKPT_OFF, 5);
  fx_loss(lr, &f.b, true, ESP_CKPT_OFF, 5);
  float *mine = fx_grads(a), *one = fx_grads(lora);
  for (int i = 0; i < n; i++) {
    if (!a->targeted[i]) continue;
    const esp_task_site *ts = a->site_state[i];
    int64_t in = sites[i]->in, out = sites[i]->out;
    int ia, ib;
    lora->kind->factors(lora, sites[i], &ia, &ib);
    const float *A = one + lora->params->list[ia].offset + task * ts->r * in, *B = one + lora->params->list[ib].offset;
    if (!near(mine + a->params->list[ts->a[task]].offset, A, ts->r * in, 5e-5))
      fail_msg("%s: dA of %s", what, sites[i]->path);
    float *sel = NULL, *b = values(a, ts->b[task]), *want = calloc((size_t)(out * ts->r), sizeof *want);
    if (ts->sel) sel = values(a, ts->sel[task]);
    for (int64_t o = 0; o < out; o++)
      for (int64_t k = 0; k < ts->r; k++)
        want[o * ts->r + k] = ts->s * (sel ? sel[task * ts->r + k] : 1) * B[o * ts->rank + task * ts->r + k];
    if (!near(mine + a->params->list[ts->b[task]].offset, want, out * ts->r, 5e-5))
      fail_msg("%s: dB of %s", what, sites[i]->path);
    free(want);
    free(b);
    for (int64_t k = 0; sel && k < ts->rank; k++) {
      double d = 0;
      b = values(a, ts->b[k / ts->r]);
      for (int64_t o = 0; o < out; o++) d += (double)ts->s * b[o * ts->r + k % ts->r] * B[o * ts->rank + k];
      sel[k] = (float)d;
      free(b);
    }
    if (sel && !near(mine + a->params->list[ts->sel[task]].offset, sel, ts->rank, 5e-5))
      fail_msg("%s: dS of %s", what, sites[i]->path);
    free(sel);
  }
  free(mine);
  free(one);
}

/* With ranks and scales that differ between the sites of a group, with dropout; after a step of training, and after
 * values of an earlier task were set. */
static void one_lora(void **state) {
  static const char *const kinds[] = {"olora_cl", "incremental_rank"};
  static const char *const more[] = {"q_proj", "k_proj", "v_proj", "down_proj"};
  for (int form = 0; form < 8; form++) {
    fx_run r, lr;
    esp_adapter *a, *lora;
    esp_optim *o;
    bool even = form & 2;
    esp_pattern rank[] = {{"v_proj", 5}}, alpha[] = {{"q_proj", 2}};
    esp_adapter_cfg cfg = CFG(kinds[form & 1]);
    cfg.target = more;
    cfg.n_target = 4;
    cfg.dropout = form & 4 ? 0.3 : 0;
    if (!even) cfg.rank_pattern = rank, cfg.n_rank_pattern = 1, cfg.alpha_pattern = alpha, cfg.n_alpha_pattern = 1;
    attach(&r, &cfg, &a);
    OK(esp_optim_create(&(esp_optim_cfg){.name = "adamw", .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8},
                        a->params, &o));
    for (int task = 0; task < 3; task++) {
      char what[64];
      int64_t ranks = 3 * (task + 1);
      esp_pattern wide[] = {{"v_proj", 5 * (task + 1)}};
      esp_adapter_cfg plain = {.type = "lora",
                               .r = ranks,
                               .alpha = (double)ranks,
                               .seed = 9,
                               .target = more,
                               .n_target = 4,
                               .dropout = cfg.dropout};
      if (!even) plain.rank_pattern = plain.alpha_pattern = wide, plain.n_rank_pattern = plain.n_alpha_pattern = 1;
      attach(&lr, &plain, &lora);
      OK(a->kind->task_begin(a, task));
      fx_shake(a, 0.1f, 40 + (uint64_t)task);
      snprintf(what, sizeof what, "form %d, task %d", form, task);
      compare(&r, a, &lr, lora, what);
      esp_optim_step(o, 1e-2, 1.0f);
      compare(&r, a, &lr, lora, what);
      fx_shake(a, 0.1f, 50 + (uint64_t)task);
      compare(&r, a, &lr, lora, what);
      esp_adapter_destroy(lora);
      fx_close(&lr);
    }
    esp_optim_destroy(o);
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(penalty),
      cmocka_unit_test(penalty_is_followed),
      cmocka_unit_test(frozen_and_recalled),
      cmocka_unit_test(one_lora),
  };
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
