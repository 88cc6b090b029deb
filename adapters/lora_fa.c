/* lora_fa.c: LoRA-FA (Zhang et al. 2023, arXiv:2308.03303) as PEFT's create_lorafa_optimizer has it: A stays as it
 * began, and before each step the gradient of B becomes
 *   g_B (A A^T)^-1 / s^2
 * the change of B whose s B A comes nearest to the gradient of W. A does not move, so that the inverse is made once.
 * PEFT makes the product in bf16 where the machine has it; here it is fp32.
 */
#include <math.h>
#include <string.h>

#include "adapters/internal.h"
#include "core/linalg.h"

/* Pseudo-inverse, through the SVD: A may be of lower rank than r. out: [r, r]. */
static esp_status invert(const esp_adapter *a, const esp_site *s, const esp_lora_site *ls, float *out) {
  int64_t r = ls->r;
  esp_status st = ESP_OK;
  float *A = esp_mem_alloc(ESP_MEM_HOST, (size_t)(r * s->in) * sizeof *A);
  float *u = esp_mem_alloc(ESP_MEM_HOST, (size_t)(3 * r * r + r) * sizeof *u);
  if (!A || !u) ESP_GOTO(ESP_ERR_MEMORY);
  float *vt = u + r * r, *gram = vt + r * r, *sv = gram + r * r;
  esp_params_get(a->params, ls->a, A);
  esp_linalg_gemm(false, true, r, r, s->in, 1.0f, A, s->in, A, s->in, 0.0f, gram, r);
  for (int64_t i = 0; i < r; i++) gram[i * r + i] += 1e-8f;
  ESP_GOTO(esp_linalg_svd(r, r, gram, u, sv, vt));
  for (int64_t i = 0; i < r; i++)
    for (int64_t j = 0; j < r; j++) {
      double sum = 0;
      for (int64_t k = 0; k < r; k++)
        if (sv[k] > sv[0] * (float)r * 0x1p-23f) sum += (double)vt[k * r + i] * u[j * r + k] / sv[k];
      out[i * r + j] = (float)(sum / ((double)ls->s * ls->s));
    }
out:
  esp_mem_free(A);
  esp_mem_free(u);
  return st;
}

static esp_status prepare(esp_adapter *a, const esp_site *s, esp_lora_site *ls) {
  esp_backend *be = a->params->be;
  int64_t bytes = ls->r * ls->r * (int64_t)sizeof(float);
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)bytes);
  esp_status st = host ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK && !esp_backend_counts(be)) st = invert(a, s, ls, host);
  if (st == ESP_OK && !(ls->inverse = be->ops->alloc(be, ESP_MEM_PARAMS, bytes))) st = esp_backend_why_null(be);
  if (st == ESP_OK) be->ops->upload(be, ls->inverse, host, bytes);
  esp_mem_free(host);
  return st;
}

double esp_lora_fa_before_step(esp_adapter *a, int64_t step, int64_t total) {
  esp_site **sites;
  esp_backend *be = a->params->be;
  int n = esp_model_sites(a->model, &sites);
  int64_t most = 0;
  if (!a->cfg.lora_fa) return 0;
  for (int i = 0; i < n; i++) {
    esp_lora_site *ls = a->targeted[i] ? a->site_state[i] : NULL;
    if (ls && !ls->inverse && be->sticky == ESP_OK) be->sticky = prepare(a, sites[i], ls);
    if (ls && sites[i]->out * ls->r > most) most = sites[i]->out * ls->r;
  }
  float *copy = be->ops->alloc(be, ESP_MEM_WORKSPACE, most * (int64_t)sizeof *copy);
  if (!copy && be->sticky == ESP_OK) be->sticky = ESP_ERR_MEMORY;
  for (int i = 0; i < n && be->sticky == ESP_OK; i++) {
    const esp_lora_site *ls = a->targeted[i] ? a->site_state[i] : NULL;
    if (!ls) continue;
    esp_tensor g = esp_param_grad(a->params, ls->b), old = esp_tensor_2d(copy, ESP_F32, sites[i]->out, ls->r);
    be->ops->axpby(be, old, 1.0f, g, 0.0f);
    be->ops->matmul(be, g, old, false, esp_tensor_2d(ls->inverse, ESP_F32, ls->r, ls->r), false, 1.0f, 0.0f);
  }
  if (copy) be->ops->free(be, copy);
  return 0;
}
