/* Conformance of adapter kinds (conformance.h has all statements): what a kind computes. A new kind is one more row.
 * Mutation seen to be caught: s left out of the tail in lora_tails (scale 1) fails "identity" for the rewritten bases.
 */
#include "conformance.h"

/* A kind is not registered without a row. `none` has nothing to hold. */
static void every_kind_has_a_row(void **state) {
  int n;
  const char *const *names = esp_adapter_names(&n);
  for (int k = 0; k < n; k++) {
    const esp_adapter_kind *kind = esp_adapter_find(names[k]);
    bool found = strcmp(kind->name, "none") == 0;
    for (int i = 0; i < N_ROWS && !found; i++) found = esp_adapter_find(rows[i].cfg.type) == kind;
    if (!found) fail_msg("%s: no row in conformance_rows.h", names[k]);
  }
}

static void identity(void **state) {
  static float base[FX_T * FX_VOCAB], y[FX_T * FX_VOCAB];
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++) {
    base_logits(fx_path(rows[i].base), &f.b, base);
    fx_run r;
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    esp_adapter *a = attach(&r, &rows[i], "default", true);
    fx_logits(&r, &f.b, y);
    double d = fx_rel(y, base, FX_T * FX_VOCAB), limit = rows[i].rewrites || whole(&rows[i]) ? 4e-6
                                                         : copies(&rows[i])                  ? 2e-6
                                                                            : 0.0;     /* a split product */
    if (rows[i].cfg.init && strcmp(rows[i].cfg.init, "orthogonal") == 0) limit = 2e-6; /* B A = 0 up to rounding */
    /* products cut in another way; pairs of reflections */
    if (a->kind->product != ESP_PRODUCT_BASE || strcmp(rows[i].cfg.type, "hra") == 0) limit = 2e-6;
    if (rows[i].cfg.apply_gs) { /* no reflection of a subspace is the identity */
      assert_true(d > 1e-3);
      d = 0;
    }
    if (a->kind->virtual_tokens) { /* no row in front of a sequence is nothing */
      assert_true(d > 1e-3);
      d = 0;
    }
    if (quantised(&rows[i])) limit = 0.2;
    if (!(d <= limit)) fail_msg("%s: %g away from the base at the start", rows[i].name, d);
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

/* A model directory with the effective weights of the adapters, made from the public pieces that merge uses. */
static void write_merged(fx_run *r, esp_adapter **list, int n, const char *dir, bool tied) {
  esp_site **sites;
  int n_sites = esp_model_sites(r->m, &sites);
  OK(esp_mkdirs(dir));
  char path[300];
  snprintf(path, sizeof path, "%s/config.json", dir);
  OK(esp_model_desc_write(esp_model_describe(r->m), path));
  snprintf(path, sizeof path, "%s/model.safetensors", dir);
  esp_st_writer *w;
  OK(esp_st_writer_create(path, &w));
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < n_sites; i++) {
      esp_site *s = sites[i];
      if (s->is_head && tied) continue;
      int64_t rows_ = s->kind == ESP_SITE_EMBED ? s->in : s->kind == ESP_SITE_NORM ? 1 : s->out;
      int64_t cols = s->kind == ESP_SITE_LINEAR ? s->in : s->out, shape[2] = {rows_, cols};
      if (s->transposed) {
        shape[0] = cols;
        shape[1] = rows_;
      }
      if (pass == 0) {
        if (s->kind == ESP_SITE_NORM) shape[0] = s->out;
        OK(esp_st_writer_declare(w, s->tensor, ESP_F32, s->kind == ESP_SITE_NORM ? 1 : 2, shape));
        if (s->bias_tensor) OK(esp_st_writer_declare(w, s->bias_tensor, ESP_F32, 1, &s->out));
        continue;
      }
      float *x = malloc((size_t)(2 * rows_ * cols) * sizeof *x), *t = x + rows_ * cols;
      OK(esp_site_read_weight(r->m, s, x));
      for (int k = 0; k < n; k++)
        if (esp_adapter_changes(list[k], s)) OK(esp_adapter_effective_rows(list[k], s, 0, rows_, x));
      for (int64_t a = 0; s->transposed && a < rows_; a++)
        for (int64_t b = 0; b < cols; b++) t[b * rows_ + a] = x[a * cols + b];
      OK(esp_st_writer_put(w, s->tensor, s->transposed ? t : x, rows_ * cols * 4));
      free(x);
      if (!s->bias_tensor) continue;
      float *b = malloc((size_t)s->out * sizeof *b);
      OK(esp_site_read_bias(r->m, s, b));
      for (int k = 0; k < n; k++)
        if (esp_adapter_changes_bias(list[k], s)) OK(esp_adapter_effective_bias(list[k], s, b));
      OK(esp_st_writer_put(w, s->bias_tensor, b, s->out * 4));
      free(b);
    }
  OK(esp_st_writer_commit(w));
}

static void merged(void **state) {
  static float y[FX_T * FX_VOCAB], z[FX_T * FX_VOCAB];
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++) {
    if (!merges(&rows[i])) continue; /* no matrix has their effect */
    fx_run r;
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    esp_adapter *a = attach(&r, &rows[i], "default", true);
    fx_shake(a, 0.1f, 17);
    fx_logits(&r, &f.b, y);
    write_merged(&r, &a, 1, fx_path("merged"), esp_model_describe(r.m)->tied);
    esp_adapter_destroy(a);
    fx_close(&r);
    base_logits(fx_path("merged"), &f.b, z);
    double d = fx_rel(y, z, FX_T * FX_VOCAB);
    if (!(d < 4e-6)) fail_msg("%s: forward and merged differ by %g", rows[i].name, d);
    OK(esp_remove_tree(fx_path("merged")));
  }
}

static void causal_and_independent(void **state) {
  static float y[FX_T * FX_VOCAB], z[FX_T * FX_VOCAB];
  fx_batch f, g;
  for (int i = 0; i < N_ROWS; i++) {
    fx_run r;
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    esp_adapter *a = attach(&r, &rows[i], "default", false);
    fx_shake(a, 0.1f, 21);
    fx_fill(&f);
    fx_fill(&g);
    fx_logits(&r, &f.b, y);
    g.ids[FX_T - 1] = 33;
    g.ids[8] = 34; /* last of the first sequence */
    fx_logits(&r, &g.b, z);
    for (int t = 0; t < FX_T; t++) {
      bool changed = memcmp(y + t * FX_VOCAB, z + t * FX_VOCAB, FX_VOCAB * sizeof(float)) != 0;
      if (changed != (t == 8 || t == FX_T - 1))
        fail_msg("%s: token %d %s", rows[i].name, t, changed ? "saw the future" : "did not change");
    }
    esp_batch second = f.b; /* the second sequence alone */
    int32_t cu[2] = {0, FX_T - 9};
    second.tokens = FX_T - 9;
    second.ids += 9;
    second.positions += 9;
    second.cu_seqlens = cu;
    second.n_seqs = 1;
    fx_logits(&r, &second, z);
    double d = fx_rel(z, y + 9 * FX_VOCAB, (FX_T - 9) * FX_VOCAB);
    if (!(d < 2e-6)) fail_msg("%s: a packed sequence differs from itself alone by %g", rows[i].name, d);
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

static void sum_of_several(void **state) {
  static float y[FX_T * FX_VOCAB], z[FX_T * FX_VOCAB];
  fx_batch f;
  fx_fill(&f);
  const row *const pick[] = {&rows[1], &rows[5], &rows[7]};
  for (int many = 0; many < 2; many++) { /* 13 adapters do not fit into the tails of a product */
    fx_run r;
    esp_adapter *list[13];
    int n = many ? 13 : 3;
    fx_open(&r, fx_path("qwen"), ESP_F32, false);
    for (int i = 0; i < n; i++) {
      char name[16];
      snprintf(name, sizeof name, "a%d", i);
      list[i] = attach(&r, pick[i % 3], name, i % 2 == 0);
      list[i]->weight = 0.3 + 0.1 * i;
      fx_shake(list[i], 0.05f, 30 + (uint64_t)i);
    }
    OK(esp_adapters_activate(r.m, list, n));
    fx_logits(&r, &f.b, y);
    write_merged(&r, list, n, fx_path("merged"), false);
    for (int i = 0; i < n; i++) esp_adapter_destroy(list[i]);
    assert_null(esp_model_hooks(r.m));
    fx_close(&r);
    base_logits(fx_path("merged"), &f.b, z);
    double d = fx_rel(y, z, FX_T * FX_VOCAB);
    if (!(d < 4e-6)) fail_msg("sum of %d adapters and their merge differ by %g", n, d);
    OK(esp_remove_tree(fx_path("merged")));
  }
}

/* low_rank is the same change as materialise. */
static void low_rank(void **state) {
  for (int i = 0; i < N_ROWS; i++) {
    if (!esp_adapter_find(rows[i].cfg.type)->low_rank) continue;
    fx_run r;
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    esp_adapter *a = attach(&r, &rows[i], "default", false);
    fx_shake(a, 0.1f, 22);
    esp_site **sites;
    int n = esp_model_sites(r.m, &sites);
    for (int k = 0; k < n; k++) {
      esp_site *s = sites[k];
      if (!a->targeted[k]) continue;
      int64_t rank = a->kind->low_rank(a, s, NULL, NULL), size = s->out * s->in;
      if (rank == 0 && a->kind->resized && esp_adapter_changes(a, s))
        fail_msg("%s: %s has no rank and changes", rows[i].name, s->path);
      if (rank == 0 && quantised(&rows[i])) continue; /* the change is the base's own */
      assert_int_equal(rank, esp_adapter_rank(a, s) * (rows[i].rewrites ? 2 : 1));
      if (rank == 0) continue; /* a form of the kind that has none */
      float *A = malloc((size_t)(rank * s->in) * sizeof *A), *B = malloc((size_t)(rank * s->out) * sizeof *B);
      float *w = calloc((size_t)(2 * size), sizeof *w), *ba = w + size;
      assert_int_equal(a->kind->low_rank(a, s, A, B), rank);
      /* changes that depend on the base are taken as differences */
      if (a->kind->alone) OK(esp_site_read_weight(r.m, s, w));
      OK(a->kind->materialise(a, s, 0, s->kind == ESP_SITE_EMBED ? s->in : s->out, w));
      if (a->kind->alone) OK(esp_site_read_weight(r.m, s, ba));
      for (int64_t q = 0; q < size; q++) w[q] -= ba[q];
      for (int64_t o = 0; o < s->out; o++)
        for (int64_t c = 0; c < s->in; c++) {
          double sum = 0;
          for (int64_t q = 0; q < rank; q++) sum += (double)B[o * rank + q] * A[q * s->in + c];
          ba[s->kind == ESP_SITE_EMBED ? c * s->out + o : o * s->in + c] = (float)sum;
        }
      double d = fx_rel(w, ba, size);
      if (!(d < 2e-6)) fail_msg("%s: %s: low rank form off by %g", rows[i].name, s->path, d);
      free(A);
      free(B);
      free(w);
    }
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

/* Kinds that only turn the input keep every angle between rows: W' W'^T = W W^T. The series of oft, which is cut off,
 * is no rotation. */
static void rotations(void **state) {
  int checked = 0;
  for (int i = 0; i < N_ROWS; i++) {
    bool hra = strcmp(rows[i].cfg.type, "hra") == 0, oft = strcmp(rows[i].cfg.type, "oft") == 0;
    if (!hra && !(oft && rows[i].cfg.cayley_terms == 0)) continue;
    fx_run r;
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    esp_adapter *a = attach(&r, &rows[i], "default", false);
    fx_shake(a, 0.5f, 24);
    esp_site **sites;
    int n = esp_model_sites(r.m, &sites);
    for (int k = 0; k < n; k++) {
      const esp_site *s = sites[k];
      if (!a->targeted[k]) continue;
      int64_t size = s->out * s->in, grams = s->out * s->out;
      float *w = malloc((size_t)size * sizeof *w), *g = malloc((size_t)(2 * grams) * sizeof *g);
      OK(esp_site_read_weight(r.m, s, w));
      for (int side = 0; side < 2; side++) {
        if (side) OK(a->kind->materialise(a, sites[k], 0, s->out, w));
        for (int64_t p = 0; p < grams; p++) {
          double sum = 0;
          for (int64_t c = 0; c < s->in; c++) sum += (double)w[p / s->out * s->in + c] * w[p % s->out * s->in + c];
          g[side * grams + p] = (float)sum;
        }
      }
      double d = fx_rel(g + grams, g, grams);
      if (!(d < 1e-5)) fail_msg("%s: %s: angles change by %g", rows[i].name, s->path, d);
      checked++;
      free(w);
      free(g);
    }
    esp_adapter_destroy(a);
    fx_close(&r);
  }
  assert_true(checked > 20);
}

/* olora: B is orthonormal; orthogonal: B A = 0. */
static void orthogonal_starts(void **state) {
  int checked = 0;
  for (int i = 0; i < N_ROWS; i++) {
    const char *init = rows[i].cfg.init ? rows[i].cfg.init : "";
    bool olora = strcmp(init, "olora") == 0;
    if (!olora && strcmp(init, "orthogonal") != 0) continue;
    fx_run r;
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    esp_adapter *a = attach(&r, &rows[i], "default", false);
    for (int p = 0; p < a->params->count; p++) {
      const esp_param *pa = &a->params->list[p];
      const char *leaf = strstr(pa->name, "lora_A");
      if (!leaf) continue;
      char name[400];
      snprintf(name, sizeof name, "%.*slora_B.weight", (int)(leaf - pa->name), pa->name);
      int b = esp_params_find(a->params, name);
      int64_t k = pa->shape[0], in = pa->shape[1], out = a->params->list[b].shape[0], n = olora ? k : in;
      float *A = malloc((size_t)(k * in) * sizeof *A), *B = malloc((size_t)(out * k) * sizeof *B);
      esp_params_get(a->params, p, A);
      esp_params_get(a->params, b, B);
      for (int64_t x = 0; x < (olora ? k : out); x++)
        for (int64_t y = 0; y < n; y++) {
          double sum = 0;
          for (int64_t q = 0; q < (olora ? out : k); q++)
            sum += olora ? (double)B[q * k + x] * B[q * k + y] : (double)B[x * k + q] * A[q * in + y];
          if (!(fabs(sum - (olora && x == y)) < 1e-5)) fail_msg("%s: %s: %g", rows[i].name, name, sum);
        }
      free(A);
      free(B);
      checked++;
    }
    esp_adapter_destroy(a);
    fx_close(&r);
  }
  assert_true(checked >= 8);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(orthogonal_starts), cmocka_unit_test(rotations), cmocka_unit_test(every_kind_has_a_row),
      cmocka_unit_test(identity),          cmocka_unit_test(merged),    cmocka_unit_test(causal_and_independent),
      cmocka_unit_test(sum_of_several),    cmocka_unit_test(low_rank),
  };
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
