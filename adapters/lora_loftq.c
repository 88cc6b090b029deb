/* lora_loftq.c: init loftq (LoftQ, Li et al. 2023, arXiv:2310.08659, as peft/utils/loftq_utils.py has it): the base is
 * replaced by what a quantiser keeps of it, and the adapter starts as the best rank-r correction:
 *   Q_0 = 0; repeat: W' = q(W - s B A), (A, B) = best rank r of (W - W') / s
 * There is no quantised storage here: W' is the dequantised matrix, so that training sees the base that the adapter
 * will be used on. PEFT leaves out s, which is right for alpha = r only. 4 bits  NF4 (QLoRA, arXiv:2305.14314): blocks
 * of 64 in row-major order, scaled by their largest absolute value, to the nearest of 16 quantiles of the normal
 * distribution 8 bits  rows scaled by their largest absolute value, 127 steps to either side W' is a function of W and
 * of the A, B that were taken out of it last, so that merging makes it again.
 */
#include <math.h>
#include <string.h>

#include "adapters/internal.h"
#include "core/linalg.h"

enum { BLOCK = 64 };

static const float nf4[16] = {-1.0f,
                              -0.6961928009986877f,
                              -0.5250730514526367f,
                              -0.39491748809814453f,
                              -0.28444138169288635f,
                              -0.18477343022823334f,
                              -0.09105003625154495f,
                              0.0f,
                              0.07958029955625534f,
                              0.16093020141124725f,
                              0.24611230194568634f,
                              0.33791524171829224f,
                              0.44070982933044434f,
                              0.5626170039176941f,
                              0.7229568362236023f,
                              1.0f};

static float largest(const float *x, int64_t n) {
  float most = 0;
  for (int64_t i = 0; i < n; i++) most = fmaxf(most, fabsf(x[i]));
  return most;
}

static float nearest_nf4(float x) {
  int lo = 0;
  for (int step = 8; step; step /= 2) /* values above the middle between two neighbours go up */
    if (x > 0.5f * (nf4[lo + step - 1] + nf4[lo + step])) lo += step;
  return nf4[lo];
}

static void quantise_block(float *x, int64_t n) {
  float scale = largest(x, n), inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < n; i++) x[i] = nearest_nf4(x[i] * inverse) * scale;
}

static void quantise_row(float *x, int64_t n) {
  float scale = largest(x, n);
  for (int64_t i = 0; i < n; i++) x[i] = scale > 0 ? rintf(x[i] * (127.0f / scale)) * (scale / 127.0f) : 0.0f;
}

/* rows [n, in], in place; they begin at a block. */
static void quantise(int64_t bits, float *rows, int64_t n, int64_t in) {
  int64_t size = n * in, unit = bits == 8 ? in : BLOCK;
  for (int64_t i = 0; i < size; i += unit) {
    if (bits == 8)
      quantise_row(rows + i, in);
    else
      quantise_block(rows + i, size - i < BLOCK ? size - i : BLOCK);
  }
}

static int64_t bits_of(const esp_adapter *a) {
  return a->cfg.loftq_bits ? a->cfg.loftq_bits : 4;
}

/* W' - W of rows r0 .. r0+n is added to w. Blocks of 64 may cross rows: the rows that share one are read too. */
esp_status esp_loftq_add(esp_adapter *a, esp_site *s, const esp_lora_site *ls, int64_t r0, int64_t n, float *w) {
  int64_t first = r0, last = r0 + n;
  if (bits_of(a) == 4) {
    first = r0 * s->in / BLOCK * BLOCK / s->in;
    while (first * s->in % BLOCK) first--; /* 0 at the latest */
    while (last < s->out && last * s->in % BLOCK) last++;
  }
  int64_t rows = last - first;
  float *q = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * rows * s->in) * sizeof *q);
  if (!q || esp_backend_counts(a->params->be)) {
    esp_mem_free(q);
    return q ? ESP_OK : ESP_ERR_MEMORY;
  }
  float *base = q + rows * s->in;
  esp_status st = esp_site_read_weight_rows(a->model, s, first, rows, base);
  if (st == ESP_OK) {
    memcpy(q, base, (size_t)(rows * s->in) * sizeof *q);
    if (ls->A0) esp_lowrank_add(q, rows, s->in, ls->A0, ls->B0 + first * ls->r, ls->r, -ls->s);
    quantise(bits_of(a), q, rows, s->in);
    const float *from = q + (r0 - first) * s->in, *was = base + (r0 - first) * s->in;
    for (int64_t i = 0; i < n * s->in; i++) w[i] += from[i] - was[i];
  }
  esp_mem_free(q);
  return st;
}

esp_status esp_loftq_init(esp_adapter *a, esp_site *s, esp_lora_site *ls, float *A, float *B) {
  int64_t r = ls->r, m = s->out, n = s->in, k = m < n ? m : n, rounds = a->cfg.loftq_iter ? a->cfg.loftq_iter : 1;
  bool counts = esp_backend_counts(a->params->be);
  esp_status st = ESP_OK;
  ls->quantised = true;
  float *left = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m * n) * sizeof *left); /* W - W' */
  float *u = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m * k) * sizeof *u);
  float *sv = esp_mem_alloc(ESP_MEM_HOST, (size_t)k * sizeof *sv);
  float *vt = esp_mem_alloc(ESP_MEM_HOST, (size_t)(k * n) * sizeof *vt);
  if (rounds > 1) ESP_GOTO(esp_lora_keep(ls, s, A, B));
  st = left && u && sv && vt ? ESP_OK : ESP_ERR_MEMORY;
  if (st) goto out;
  for (int64_t i = 0; i < rounds; i++) {
    if (rounds > 1) { /* zeros at first */
      memcpy(ls->A0, A, (size_t)(r * n) * sizeof *A);
      memcpy(ls->B0, B, (size_t)(m * r) * sizeof *B);
    }
    memset(left, 0, counts ? 0 : (size_t)(m * n) * sizeof *left);
    ESP_GOTO(esp_loftq_add(a, s, ls, 0, m, left));
    for (int64_t j = 0; j < m * n && !counts; j++) left[j] = -left[j];
    ESP_GOTO(esp_linalg_svd(m, n, counts ? NULL : left, u, sv, vt));
    if (counts) break;
    for (int64_t j = 0; j < r; j++) {
      float root = sqrtf(sv[j] / ls->s);
      for (int64_t c = 0; c < n; c++) A[j * n + c] = root * vt[j * n + c];
      for (int64_t o = 0; o < m; o++) B[o * r + j] = root * u[o * k + j];
    }
  }
  if (!counts) {
    memset(left, 0, (size_t)(m * n) * sizeof *left);
    ESP_GOTO(esp_loftq_add(a, s, ls, 0, m, left));
  }
  st = esp_site_add_delta(a->model, s, left);
out:
  esp_mem_free(left);
  esp_mem_free(u);
  esp_mem_free(sv);
  esp_mem_free(vt);
  return st;
}
