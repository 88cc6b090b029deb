/* distill.cu: losses against a teacher. A block owns a row; its sums are in a fixed order, and both rows of logits go
 * through the same operations, so that equal rows give exactly 0. Three readings of each row of logits, the second and
 * third from the L2 cache as far as the rows in flight fit there. */
#include "backend/cuda/device.cuh"
#include "backend/cuda/need_flash.h"
#include "backend/cuda/view.cuh"

namespace {

struct distill_args {
  const float *student, *teacher;
  float *d;
  int64_t student_ld, teacher_ld, d_ld;
  int width;
  const float *weights;
  float temperature, factor, scale, softcap;
  double *rows; /* [n, 2] */
};

__device__ __forceinline__ float tempered(float x, float cap, float inv) {
  return (cap > 0 ? cap * tanhf(x / cap) : x) * inv;
}
template <int THREADS> __device__ __forceinline__ float block_max(float v, float *part) {
  v = warp_max(v);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
  __syncthreads();
  float m = part[0];
  for (int w = 1; w < THREADS / 32; w++) m = fmaxf(m, part[w]);
  __syncthreads();
  return m;
}
template <int THREADS>
__device__ __forceinline__ double tempered_lse(const float *x, int n, float cap, float inv, float *best,
                                               double *total) {
  float top = -INFINITY, sum = 0;
  for (int j = threadIdx.x; j < n; j += THREADS) top = fmaxf(top, tempered(x[j], cap, inv));
  top = block_max<THREADS>(top, best);
  for (int j = threadIdx.x; j < n; j += THREADS) sum += expf(tempered(x[j], cap, inv) - top);
  double all = block_sum(static_cast<double>(sum), total);
  __syncthreads();
  return static_cast<double>(top) + log(all);
}

template <int THREADS> __global__ void __launch_bounds__(THREADS) distill_kernel(distill_args a) {
  __shared__ float best[THREADS / 32];
  __shared__ double total[THREADS / 32];
  const int64_t r = blockIdx.x;
  const float *s = a.student + r * a.student_ld, *t = a.teacher + r * a.teacher_ld;
  float *d = a.d ? a.d + r * a.d_ld : nullptr;
  const float cap = a.softcap, inv = 1.0f / a.temperature;
  const double ls = tempered_lse<THREADS>(s, a.width, cap, inv, best, total);
  const double lt = tempered_lse<THREADS>(t, a.width, cap, inv, best, total);
  const float fs = static_cast<float>(ls), ft = static_cast<float>(lt), k = a.scale * a.factor * a.weights[r] * inv;
  float sum = 0;
  for (int j = threadIdx.x; j < a.width; j += THREADS) { /* d may be the teacher: an element is its thread's own */
    float zs = tempered(s[j], cap, inv), zt = tempered(t[j], cap, inv), p = expf(zt - ft);
    float g = k * (expf(zs - fs) - p);
    sum += p * (zt - zs);
    if (cap > 0) {
      float y = zs * (a.temperature / cap);
      g *= 1.0f - y * y;
    }
    if (d) d[j] = g;
  }
  double all = block_sum(static_cast<double>(sum), total);
  if (threadIdx.x == 0) {
    a.rows[2 * r] = static_cast<double>(a.weights[r]) * static_cast<double>(a.factor) * (all - (lt - ls));
    a.rows[2 * r + 1] = 0;
  }
}

struct hidden_args {
  esp_hidden_loss kind;
  esp_view<void> x, teacher, d;
  int width;
  const float *low, *high, *weights;
  float factor, scale;
  double *rows;
};

/* The loss of one element before it is divided, and its slope. */
__device__ __forceinline__ float hidden_element(const hidden_args &a, int64_t r, int j, float *slope) {
  float x[1], h[1];
  a.x.load(x, r, j);
  a.teacher.load(h, r, j);
  float e = x[0] - h[0];
  *slope = 0;
  if (a.kind == ESP_HIDDEN_L2 || a.kind == ESP_HIDDEN_BELOW) {
    if (a.kind == ESP_HIDDEN_BELOW && e > 0) return 0;
    *slope = 2 * e;
    return e * e;
  }
  if (a.kind == ESP_HIDDEN_L1) {
    *slope = e > 0 ? 1.0f : e < 0 ? -1.0f : 0.0f;
    return fabsf(e);
  }
  float over = x[0] - a.high[j], under = a.low[j] - x[0];
  if (h[0] < a.low[j]) {
    *slope = under < 0 ? 1.0f : 0.0f;
    return under < 0 ? -under : under > 0 ? 0.0f : under;
  }
  if (h[0] > a.high[j]) {
    *slope = over < 0 ? -1.0f : 0.0f;
    return over < 0 ? -over : over > 0 ? 0.0f : over;
  }
  *slope = over > 0 ? 1.0f : under > 0 ? -1.0f : 0.0f;
  return over > 0 ? over : under > 0 ? under : 0.0f;
}

enum { HIDDEN_THREADS = 256 };
__global__ void __launch_bounds__(HIDDEN_THREADS) hidden_kernel(hidden_args a) {
  __shared__ double part[2][HIDDEN_THREADS / 32];
  const int64_t r = blockIdx.x;
  double sum = 0, violated = 0;
  float slope;
  for (int j = threadIdx.x; j < a.width; j += HIDDEN_THREADS) {
    sum += static_cast<double>(hidden_element(a, r, j, &slope));
    violated += slope != 0 ? 1.0 : 0.0;
  }
  sum = block_sum(sum, part[0]);
  violated = block_sum(violated, part[1]);
  if (a.kind != ESP_HIDDEN_MARGIN) violated = a.width;
  const float weight = a.weights[r];
  if (threadIdx.x == 0) {
    double mean = violated > 0 ? sum / violated : sum;
    a.rows[2 * r] = static_cast<double>(weight) * static_cast<double>(a.factor) * mean;
    a.rows[2 * r + 1] = 0;
  }
  if (!a.d.data || violated == 0) return;
  const float k = a.scale * a.factor * weight / static_cast<float>(violated);
  for (int j = threadIdx.x; j < a.width; j += HIDDEN_THREADS) {
    float y[1];
    hidden_element(a, r, j, &slope);
    a.d.load(y, r, j);
    y[0] += k * slope;
    a.d.store(r, j, y);
  }
}

} // namespace

void esp_cuda_distill(esp_backend *be, const esp_distill_args *a) {
  int64_t n = esp_tensor_rows(&a->student);
  if (be->sticky != ESP_OK || n == 0) return;
  distill_args p = {};
  p.student = static_cast<const float *>(a->student.data);
  p.teacher = static_cast<const float *>(a->teacher.data);
  p.d = static_cast<float *>(a->d.data);
  p.student_ld = a->student.ld;
  p.teacher_ld = a->teacher.ld;
  p.d_ld = a->d.ld;
  p.width = static_cast<int>(esp_tensor_cols(&a->student));
  p.weights = a->weights;
  p.temperature = a->temperature;
  p.factor = a->factor;
  p.scale = a->scale;
  p.softcap = a->softcap;
  p.rows = static_cast<double *>(esp_cuda_scratch(be, esp_cuda_need_loss_rows(&a->student)));
  if (!p.rows) return;
  if (p.width > 8192)
    ESP_LAUNCH(be, "distill", distill_kernel<1024>, dim3(static_cast<unsigned>(n)), dim3(1024), 0, p);
  else
    ESP_LAUNCH(be, "distill", distill_kernel<128>, dim3(static_cast<unsigned>(n)), dim3(128), 0, p);
  esp_cuda_sum_losses(be, p.rows, n, a->sums);
}

void esp_cuda_hidden_loss(esp_backend *be, const esp_hidden_args *a) {
  int64_t n = esp_tensor_rows(&a->x);
  if (be->sticky != ESP_OK || n == 0) return;
  hidden_args p = {};
  p.kind = a->kind;
  p.x = esp_view_of<void>(a->x);
  p.teacher = esp_view_of<void>(a->teacher);
  p.d = esp_view_of<void>(a->d);
  p.width = static_cast<int>(esp_tensor_cols(&a->x));
  p.low = a->low;
  p.high = a->high;
  p.weights = a->weights;
  p.factor = a->factor;
  p.scale = a->scale;
  p.rows = static_cast<double *>(esp_cuda_scratch(be, esp_cuda_need_loss_rows(&a->x)));
  if (!p.rows) return;
  ESP_LAUNCH(be, "hidden loss", hidden_kernel, dim3(static_cast<unsigned>(n)), dim3(HIDDEN_THREADS), 0, p);
  esp_cuda_sum_losses(be, p.rows, n, a->sums);
}
