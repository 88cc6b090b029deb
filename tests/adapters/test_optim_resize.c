/* (Linked up to optim.) Ranks that leave and come: every element of the masters, of the optimizer's state and of the
 * kind's statistics moves with its rank, what is new is zero, memory is given back; ranks that do nothing leave without
 * a trace in the logits; a state written as JSON brings another adapter to the same shapes. Mutation seen to be caught:
 * `remap` (resize.c) stepping through the old columns with the new width fails "moved". */
#include <math.h>

#include "adapter_fixture.h"
#include "adapters/triplets.h"
#include "io/json.h"
#include "optim/optim.h"

static const esp_adapter_cfg cfg = {.type = "increlora",
                                    .r = 4,
                                    .target_r = 6,
                                    .alpha = 60,
                                    .seed = 5,
                                    .interval = 1,
                                    .beta1 = 0.85,
                                    .beta2 = 0.85,
                                    .target = (const char *const[]){"q_proj", "v_proj", "down_proj"},
                                    .n_target = 3};
static const esp_optim_cfg adamw = {
    .name = "adamw", .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0};

typedef struct world {
  fx_run r;
  esp_adapter *a;
  esp_optim *o;
} world;

static void open_world(world *w) {
  fx_open(&w->r, fx_path("qwen"), ESP_BF16, false);
  OK(esp_adapter_create(w->r.m, &cfg, "default", true, &w->a));
  OK(esp_adapters_activate(w->r.m, &w->a, 1));
  OK(esp_optim_create(&adamw, w->a->params, &w->o));
}

static void close_world(world *w) {
  esp_optim_destroy(w->o);
  esp_adapter_destroy(w->a);
  fx_close(&w->r);
}

enum { BUFFERS = 5 }; /* masters, two of AdamW, two of the kind */
static float **buffer(world *w, int b) {
  return b == 0 ? &w->a->params->master : b < 3 ? &w->o->state[b - 1] : &w->a->state[b - 3];
}

/* A number of its own for each element: exact in fp32. */
static float mark(int b, int param, int64_t row, int64_t col) {
  return (float)(1 + b + 5 * (param + 64 * (row + 128 * col)));
}

static void fill(world *w) {
  const esp_params *ps = w->a->params;
  for (int b = 0; b < BUFFERS; b++) {
    float *x = calloc((size_t)ps->total, sizeof *x);
    for (int i = 0; i < ps->count; i++)
      for (int64_t k = 0; k < ps->list[i].numel; k++)
        x[ps->list[i].offset + k] = mark(b, i, k / ps->list[i].shape[1], k % ps->list[i].shape[1]);
    ps->be->ops->upload(ps->be, *buffer(w, b), x, ps->total * 4);
    free(x);
  }
}

static void moved(void **state) {
  world w;
  open_world(&w);
  esp_params *ps = w.a->params;
  esp_triplet_site *t = w.a->site_state[((esp_triplets *)w.a->impl)->sites[1]->index];
  int64_t before = ps->total;
  uint64_t revision = w.a->revision;
  fill(&w);
  /* one module loses ranks 0 and 2 and gets one; every other parameter stays, at another place */
  static const int32_t from[] = {1, 3, -1};
  const esp_resize list[] = {{t->l.a, 0, 3, from}, {t->e, 0, 3, from}, {t->l.b, 1, 3, from}};
  OK(esp_adapter_resize(w.a, list, 3));
  assert_true(ps->total < before && w.a->revision == revision + 1 && t->l.r == 3);
  for (int b = 0; b < BUFFERS; b++) {
    float *x = test_read(ps->be, *buffer(&w, b), ps->total * (int64_t)sizeof(float));
    for (int i = 0; i < ps->count; i++) {
      const esp_param *p = &ps->list[i];
      int axis = i == t->l.a || i == t->e ? 0 : i == t->l.b ? 1 : -1;
      for (int64_t k = 0; k < p->numel; k++) {
        int64_t row = k / p->shape[1], col = k % p->shape[1];
        int64_t r0 = axis == 0 ? from[row] : row, c0 = axis == 1 ? from[col] : col;
        float want = r0 < 0 || c0 < 0 ? 0.0f : mark(b, i, r0, c0), have = x[p->offset + k];
        if (have != want)
          fail_msg("buffer %d, %s [%d, %d]: %g, not %g", b, p->name, (int)row, (int)col, (double)have, (double)want);
      }
    }
    free(x);
  }
  float *g = test_read(ps->be, ps->grad, ps->total * (int64_t)sizeof(float));
  for (int64_t k = 0; k < ps->total; k++) assert_true(g[k] == 0.0f);
  free(g);
  close_world(&w);
}

/* Ranks whose e is zero leave: the same logits but for the order of sums; then others come with e = 0: the same bits.
 */
static void unseen(void **state) {
  static float y[3][FX_T * FX_VOCAB];
  world w;
  fx_batch f;
  fx_fill(&f);
  open_world(&w);
  esp_triplets *all = w.a->impl;
  fx_shake(w.a, 0.1f, 40);
  int64_t n = all->ranks, left = 0;
  float *mask = test_malloc((size_t)n * sizeof *mask);
  uint8_t *keep = test_malloc((size_t)n);
  for (int64_t k = 0; k < n; k++) left += keep[k] = k % 3 != 1;
  for (int64_t k = 0; k < n; k++) mask[k] = keep[k];
  OK(esp_triplets_mask(w.a, mask));
  fx_logits(&w.r, &f.b, y[0]);
  OK(esp_triplets_move(w.a, keep, NULL, 0));
  assert_int_equal(all->ranks, left);
  fx_logits(&w.r, &f.b, y[1]);
  double d = fx_rel(y[1], y[0], FX_T * FX_VOCAB);
  if (!(d <= 0.01)) fail_msg("ranks without effect left a trace of %g", d); /* bf16 products over fewer columns */
  int64_t *more = test_malloc((size_t)all->n_sites * sizeof *more);
  for (int i = 0; i < all->n_sites; i++) more[i] = i % 2 + 1;
  memset(keep, 1, (size_t)left);
  OK(esp_triplets_move(w.a, keep, more, 0));
  fx_logits(&w.r, &f.b, y[2]);
  d = fx_rel(y[2], y[1], FX_T * FX_VOCAB);
  if (!(d <= 0.01)) fail_msg("new ranks with e = 0 changed the logits by %g", d);
  test_free(mask);
  test_free(keep);
  test_free(more);
  close_world(&w);
}

static void restored(void **state) {
  world w, v;
  open_world(&w);
  open_world(&v);
  esp_triplets *all = w.a->impl;
  int64_t *more = test_malloc((size_t)all->n_sites * sizeof *more);
  uint8_t *keep = test_malloc((size_t)all->ranks);
  for (int64_t k = 0; k < all->ranks; k++) keep[k] = k % 4 != 2;
  for (int i = 0; i < all->n_sites; i++) more[i] = i % 3;
  OK(esp_triplets_move(w.a, keep, more, 1e-5f));
  json_t *j = esp_adapter_state_json(w.a);
  assert_non_null(j);
  OK(esp_adapter_state_restore(v.a, j, "state"));
  json_decref(j);
  assert_int_equal(w.a->params->total, v.a->params->total);
  for (int i = 0; i < w.a->params->count; i++) {
    const esp_param *p = &w.a->params->list[i], *q = &v.a->params->list[i];
    assert_true(p->shape[0] == q->shape[0] && p->shape[1] == q->shape[1] && p->offset == q->offset);
  }
  json_t *bad = json_pack("{s:[[i,i]],s:{}}", "shapes", 1, 1, "kind");
  assert_int_equal(esp_adapter_state_restore(v.a, bad, "state"), ESP_ERR_DATA);
  json_decref(bad);
  test_free(more);
  test_free(keep);
  close_world(&w);
  close_world(&v);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(moved), cmocka_unit_test(unseen), cmocka_unit_test(restored)};
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
