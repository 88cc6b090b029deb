/* What is learnt from a teacher: the gradient of distillation and of distances of hidden states through the whole model
 * against finite differences; a teacher equal to the student teaches nothing; who the teacher is, task by task.
 * Mutation seen caught: twice the scale for `taught_states` (loss.c), and `task_begin` (lwf.c) taking the
 * base for the adapter of the task before. */
#include "strategy_fixture.h"
#include "tasks/teacher.h"

static const esp_strategy_cfg nothing = {0};

static esp_batch batch_of(const sf *f, int task, int n, esp_rows *rows) {
  esp_sample s[SF_SAMPLES];
  for (int i = 0; i < n; i++) s[i] = (esp_sample){task, i};
  OK(esp_sequence_rows(&f->q, s, n, rows));
  return esp_sequence_batch(rows);
}

static double taught(sf *f, const esp_batch *b, bool train, double scale) {
  esp_loss_out out;
  OK(esp_model_step(f->r.m, &f->r.stack, b, ESP_CKPT_OFF, train, (float)scale, 0, 0, &out, NULL));
  return out.loss_sum;
}

/* loss(theta + h v) - loss(theta - h v) against 2 h <g, v>, v the gradient itself. */
static void slopes(esp_teach teach, double tol) {
  sf f;
  esp_rows rows = {0};
  esp_teacher t = {0};
  sf_open(&f, NULL, &nothing);
  fx_shake(f.a, 0.05f, 4);
  int64_t n = f.a->params->total;
  esp_batch b = batch_of(&f, 0, 5, &rows);
  esp_tensor other = esp_flat(f.r.be->ops->alloc(f.r.be, ESP_MEM_HOST, n * 4), n);
  f.r.be->ops->axpby(f.r.be, other, 0.5f, esp_sequence_masters(&f.q), 0.0f);
  OK(esp_teacher_reserve(&t, &f.q, rows.tokens));
  t.teach = teach;
  float low[32], high[32], *bounds = f.r.be->ops->alloc(f.r.be, ESP_MEM_HOST, 64 * 4);
  for (int i = 0; i < 32; i++) low[i] = -0.6f + 0.01f * (float)i, high[i] = low[i] + 0.8f;
  f.r.be->ops->upload(f.r.be, bounds, low, sizeof low);
  f.r.be->ops->upload(f.r.be, bounds + 32, high, sizeof high);
  t.teach.low = bounds, t.teach.high = bounds + 32;
  double plain = taught(&f, &b, false, 1);
  OK(esp_teacher_ask(&t, &f.q, other, &b));
  double with = taught(&f, &b, false, 1);
  assert_true(with > plain + 1e-3);
  esp_params_zero_grad(f.a->params);
  assert_true(taught(&f, &b, true, 1) == with);
  float *g = fx_grads(f.a);
  double norm = 0, h;
  for (int64_t i = 0; i < n; i++) norm += (double)g[i] * (double)g[i];
  norm = sqrt(norm);
  h = 5e-5; /* the tiny base bends fast, and losses are rounded */
  esp_tensor grad = esp_sequence_gradient(&f.q), masters = esp_sequence_masters(&f.q);
  double side[2];
  for (int k = 0; k < 2; k++) {
    float step = (float)((k ? -1.0 : 1.0) * h / norm);
    f.r.be->ops->axpby(f.r.be, masters, step, grad, 1.0f);
    esp_params_refresh_shadow(f.a->params);
    side[k] = taught(&f, &b, false, 1);
    f.r.be->ops->axpby(f.r.be, masters, -step, grad, 1.0f);
  }
  double slope = (side[0] - side[1]) / (2 * h);
  if (!(fabs(slope - norm) <= tol * norm)) fail_msg("slope %g, gradient %g", slope, norm);
  free(g);
  f.r.be->ops->free(f.r.be, bounds);
  f.r.be->ops->free(f.r.be, other.data);
  esp_teacher_deinit(&t);
  esp_rows_deinit(&rows);
  sf_close(&f);
}

static void finite_differences(void **state) {
  slopes((esp_teach){.kl = 50, .temperature = 2}, 3e-3);
  slopes((esp_teach){.kl = 50, .temperature = 1}, 3e-3);
  for (int k = ESP_HIDDEN_L2; k <= ESP_HIDDEN_MARGIN; k++)
    slopes((esp_teach){.hidden = (esp_hidden_loss)k, .hidden_weight = 20}, k == ESP_HIDDEN_L2 ? 3e-3 : 2e-2);
  slopes((esp_teach){.kl = 5, .temperature = 2, .hidden = ESP_HIDDEN_L2, .hidden_weight = 5}, 3e-3);
}

static const char *const lwf_only[] = {"lwf"};
static esp_strategy_cfg with_lwf(const char *teacher, double kl, double hidden) {
  esp_strategy_cfg c = {.names = lwf_only, .n = 1};
  c.lwf.teacher = teacher, c.lwf.kl = kl, c.lwf.temperature = 2, c.lwf.hidden = hidden, c.lwf.hidden_loss = "l2";
  return c;
}

/* The gradient that a micro-batch leaves, with and without `teach`; the losses. */
static float *gradient(sf *f, const esp_batch *plain, bool teach, double *loss) {
  esp_strategy_step t = {.scale = 1};
  esp_batch b = *plain;
  esp_params_zero_grad(f->a->params);
  if (teach) OK(esp_strategies_teach(&f->set, &f->q, &t, &b));
  *loss = taught(f, &b, true, 1);
  return fx_grads(f->a);
}

/* At the first step of a task teacher and student are the same: loss and gradient are those of the labels, to the bit.
 */
static void equal_teaches_nothing(void **state) {
  for (int k = 0; k < 2; k++) {
    sf f;
    esp_rows rows = {0};
    esp_strategy_cfg c = with_lwf("previous", 100, k ? 100 : 0);
    double loss[2];
    sf_open(&f, NULL, &c);
    fx_shake(f.a, 0.05f, 4);
    sf_task(&f, 0);
    sf_task(&f, 1);
    esp_batch b = batch_of(&f, 1, 4, &rows);
    float *plain = gradient(&f, &b, false, &loss[0]), *with = gradient(&f, &b, true, &loss[1]);
    assert_memory_equal(plain, with, (size_t)f.a->params->total * 4);
    assert_true(loss[0] == loss[1] && fx_max_abs(plain, f.a->params->total) > 0);
    free(with);
    fx_shake(f.a, 0.05f, 5); /* and something as soon as they differ */
    with = gradient(&f, &b, true, &loss[1]);
    free(plain);
    plain = gradient(&f, &b, false, &loss[0]);
    assert_true(loss[1] > loss[0] && fx_rel(with, plain, f.a->params->total) > 1e-3);
    free(plain);
    free(with);
    esp_rows_deinit(&rows);
    sf_close(&f);
  }
}

/* The loss over that of the labels, of the present values against the adapter at `from`. */
static double distance(sf *f, int task) {
  esp_rows rows = {0};
  double loss[2];
  esp_batch b = batch_of(f, task, 4, &rows);
  free(gradient(f, &b, false, &loss[0]));
  free(gradient(f, &b, true, &loss[1]));
  esp_rows_deinit(&rows);
  return loss[1] - loss[0];
}

static void who_teaches(void **state) {
  sf f;
  esp_strategy_cfg c = with_lwf("previous", 1, 1);
  sf_open(&f, NULL, &c);
  sf_task(&f, 0);
  fx_shake(f.a, 0.05f, 4);
  assert_true(distance(&f, 0) == 0); /* nobody in the first task */
  sf_task(&f, 1);
  assert_true(distance(&f, 1) == 0);
  fx_shake(f.a, 0.05f, 5);
  assert_true(distance(&f, 1) > 1e-4);
  sf_task(&f, 2);
  assert_true(distance(&f, 2) == 0);
  sf_close(&f);
  c = with_lwf("base", 1, 1);
  sf_open(&f, NULL, &c);
  sf_task(&f, 0);
  assert_true(distance(&f, 0) == 0);
  fx_shake(f.a, 0.05f, 4);
  double first = distance(&f, 0);
  assert_true(first > 1e-4);
  sf_task(&f, 1);
  assert_true(distance(&f, 0) == first);
  sf_close(&f);
}

static void head_must_be_frozen(void **state) {
  static const char *const target[] = {"q_proj"}, *const save[] = {"lm_head"};
  esp_adapter_cfg a = {.type = "lora", .r = 4, .alpha = 8, .seed = 5, .target = target, .n_target = 1};
  a.modules_to_save = save, a.n_modules_to_save = 1;
  sf f;
  sf_open(&f, &a, &nothing);
  esp_strategy s = {.kind = esp_strategy_find("lwf")};
  assert_int_equal(esp_sequence_frozen_head(&s, &f.q), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "the adapter changes lm_head"));
  sf_close(&f);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(finite_differences), cmocka_unit_test(equal_teaches_nothing),
                                     cmocka_unit_test(who_teaches), cmocka_unit_test(head_must_be_frozen)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
