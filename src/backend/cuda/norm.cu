/* norm.cu: RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450) with the residual addition fused into the
 * forward pass. Bound by memory: a row is read once and held in registers, in its storage type, between the passes
 * over it; forward with residual moves 8 bytes per element in bf16, backward 6 (8 when it accumulates).
 *
 * A row belongs to a group of threads: a power of two up to a warp for narrow rows (heads), so that a warp takes
 * several of them, or a whole block for wide ones. Rows whose width or types do not fit take the kernels that read the
 * row again in each pass. */
#include "backend/cuda/columns.cuh"

namespace {

constexpr int HELD = 4;          /* accesses of one thread to its row, at most */
constexpr int BLOCK_MOST = 512;  /* threads */
constexpr int SMALL_BLOCK = 128; /* of kernels that take several rows */

template <bool BLOCK> __device__ __forceinline__ float group_sum(float v, int group, float *part) {
  if constexpr (BLOCK) {
    (void)group;
    return block_sum(v, part);
  } else {
    (void)part;
    for (int o = group >> 1; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
  }
}

template <bool BLOCK> __device__ __forceinline__ int64_t group_row(int group) {
  if constexpr (BLOCK) return blockIdx.x;
  return static_cast<int64_t>(blockIdx.x) * (SMALL_BLOCK / group) + static_cast<int>(threadIdx.x) / group;
}
template <bool BLOCK> __device__ __forceinline__ int group_lane(int group) {
  return BLOCK ? static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x) % group;
}

template <class T> struct norm_fwd {
  esp_view<T> x, residual, r_out, y;
  esp_view<void> w, b;
  float *rstd, *mean;
  float eps, offset;
  int64_t rows;
  int cols, group;
  bool layer;
};

template <class T, int N, int K, bool BLOCK>
__global__ void __launch_bounds__(BLOCK ? BLOCK_MOST : SMALL_BLOCK) norm_kernel(norm_fwd<T> a) {
  __shared__ float part[2][BLOCK_MOST / 32];
  const int lane = group_lane<BLOCK>(a.group);
  const int64_t row = group_row<BLOCK>(a.group);
  const bool live = row < a.rows; /* the others stay for the sums of their warp */
  esp_vec<T, N> held[K];
  float s0 = 0.0f, s1 = 0.0f;
#pragma unroll
  for (int k = 0; k < K; k++) {
    int c = (k * a.group + lane) * N;
    if (live && c < a.cols) held[k] = *reinterpret_cast<const esp_vec<T, N> *>(a.x.data + row * a.x.ld + c);
  }
  if (a.residual.data) {
    esp_vec<T, N> other[K];
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = (k * a.group + lane) * N;
      if (live && c < a.cols)
        other[k] = *reinterpret_cast<const esp_vec<T, N> *>(a.residual.data + row * a.residual.ld + c);
    }
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = (k * a.group + lane) * N;
      if (!live || c >= a.cols) continue;
#pragma unroll
      for (int i = 0; i < N; i++) /* statistics of the rounded sum: what backward will read */
        held[k].v[i] = from_float<T>(to_float(held[k].v[i]) + to_float(other[k].v[i]));
      store_whole(a.r_out.data + row * a.r_out.ld + c, held[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < K; k++) {
    if (!live || (k * a.group + lane) * N >= a.cols) continue;
#pragma unroll
    for (int i = 0; i < N; i++) {
      float v = to_float(held[k].v[i]);
      s0 += v;
      s1 += v * v;
    }
  }
  const float n = static_cast<float>(a.cols);
  float mean = 0.0f, var;
  if (a.layer) {
    mean = group_sum<BLOCK>(s0, a.group, part[0]) / n;
    float q = 0.0f;
#pragma unroll
    for (int k = 0; k < K; k++) {
      if (!live || (k * a.group + lane) * N >= a.cols) continue;
#pragma unroll
      for (int i = 0; i < N; i++) {
        float v = to_float(held[k].v[i]) - mean;
        q += v * v;
      }
    }
    var = group_sum<BLOCK>(q, a.group, part[1]) / n;
  } else {
    var = group_sum<BLOCK>(s1, a.group, part[0]) / n;
  }
  if (!live) return;
  const float rstd = 1.0f / sqrtf(var + a.eps);
  if (lane == 0) {
    if (a.rstd) a.rstd[row] = rstd;
    if (a.mean) a.mean[row] = mean;
  }
#pragma unroll
  for (int k = 0; k < K; k++) {
    int c = (k * a.group + lane) * N;
    if (c >= a.cols) continue;
    float w[N], b[N], y[N];
    a.w.load(w, 0, c);
#pragma unroll
    for (int i = 0; i < N; i++) y[i] = (to_float(held[k].v[i]) - mean) * rstd * (w[i] + a.offset);
    if (a.b.data) {
      a.b.load(b, 0, c);
#pragma unroll
      for (int i = 0; i < N; i++) y[i] += b[i];
    }
    a.y.store(row, c, y);
  }
}

/* Any types, any width: a block per row, which each pass reads again. */
__global__ void __launch_bounds__(256) norm_any_kernel(norm_fwd<void> a) {
  __shared__ float part[2][8];
  const int64_t row = blockIdx.x;
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  esp_view<void> in = a.x;
  float s0 = 0.0f, s1 = 0.0f, v[1], u[1];
  if (a.residual.data) {
    for (int c = first; c < a.cols; c += step) {
      a.x.load(v, row, c);
      a.residual.load(u, row, c);
      v[0] += u[0];
      a.r_out.store(row, c, v);
    }
    in = a.r_out; /* rounded; a thread reads again only what it wrote */
  }
  for (int c = first; c < a.cols; c += step) {
    in.load(v, row, c);
    s0 += v[0];
    s1 += v[0] * v[0];
  }
  const float n = static_cast<float>(a.cols);
  float mean = 0.0f, var;
  if (a.layer) {
    mean = block_sum(s0, part[0]) / n;
    float q = 0.0f;
    for (int c = first; c < a.cols; c += step) {
      in.load(v, row, c);
      q += (v[0] - mean) * (v[0] - mean);
    }
    var = block_sum(q, part[1]) / n;
  } else {
    var = block_sum(s1, part[0]) / n;
  }
  const float rstd = 1.0f / sqrtf(var + a.eps);
  if (first == 0) {
    if (a.rstd) a.rstd[row] = rstd;
    if (a.mean) a.mean[row] = mean;
  }
  for (int c = first; c < a.cols; c += step) {
    in.load(v, row, c);
    a.w.load(u, 0, c);
    v[0] = (v[0] - mean) * rstd * (u[0] + a.offset);
    if (a.b.data) {
      a.b.load(u, 0, c);
      v[0] += u[0];
    }
    a.y.store(row, c, v);
  }
}

template <class T> struct norm_grad {
  esp_view<T> r, dy, dx;
  esp_view<void> w;
  const float *rstd, *mean;
  float offset;
  int64_t rows;
  int cols, group;
  bool layer, accumulate;
};

/* With g = dy (w + offset) and z = (r - mean) rstd:  dx = rstd (g - mean(g) [LAYER] - z mean(g z)). */
template <class T, int N, int K, bool BLOCK>
__global__ void __launch_bounds__(BLOCK ? BLOCK_MOST : SMALL_BLOCK) norm_bwd_kernel(norm_grad<T> a) {
  __shared__ float part[2][BLOCK_MOST / 32];
  const int lane = group_lane<BLOCK>(a.group);
  const int64_t row = group_row<BLOCK>(a.group);
  const bool live = row < a.rows;
  const float rstd = live ? a.rstd[row] : 0.0f, mean = live && a.layer ? a.mean[row] : 0.0f;
  esp_vec<T, N> r[K], dy[K];
#pragma unroll
  for (int k = 0; k < K; k++) {
    int c = (k * a.group + lane) * N;
    if (!live || c >= a.cols) continue;
    r[k] = *reinterpret_cast<const esp_vec<T, N> *>(a.r.data + row * a.r.ld + c);
    dy[k] = *reinterpret_cast<const esp_vec<T, N> *>(a.dy.data + row * a.dy.ld + c);
  }
  float s0 = 0.0f, s1 = 0.0f;
#pragma unroll
  for (int k = 0; k < K; k++) {
    int c = (k * a.group + lane) * N;
    if (!live || c >= a.cols) continue;
    float w[N];
    a.w.load(w, 0, c);
#pragma unroll
    for (int i = 0; i < N; i++) {
      float g = to_float(dy[k].v[i]) * (w[i] + a.offset);
      s0 += g;
      s1 += g * ((to_float(r[k].v[i]) - mean) * rstd);
    }
  }
  const float n = static_cast<float>(a.cols);
  const float c1 = group_sum<BLOCK>(s1, a.group, part[0]) / n;
  const float c0 = a.layer ? group_sum<BLOCK>(s0, a.group, part[1]) / n : 0.0f;
  if (!live) return;
#pragma unroll
  for (int k = 0; k < K; k++) {
    int c = (k * a.group + lane) * N;
    if (c >= a.cols) continue;
    float w[N], d[N];
    a.w.load(w, 0, c); /* from cache */
#pragma unroll
    for (int i = 0; i < N; i++) {
      float g = to_float(dy[k].v[i]) * (w[i] + a.offset);
      d[i] = rstd * (g - c0 - (to_float(r[k].v[i]) - mean) * rstd * c1);
    }
    if (a.accumulate) {
      float old[N];
      a.dx.load(old, row, c);
#pragma unroll
      for (int i = 0; i < N; i++) d[i] += old[i];
    }
    a.dx.store(row, c, d);
  }
}

/* dx may be dy: a thread writes only what it alone reads, after the sums. */
__global__ void __launch_bounds__(256) norm_bwd_any_kernel(norm_grad<void> a) {
  __shared__ float part[2][8];
  const int64_t row = blockIdx.x;
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  const float rstd = a.rstd[row], mean = a.layer ? a.mean[row] : 0.0f;
  float s0 = 0.0f, s1 = 0.0f, r[1], w[1], d[1];
  for (int c = first; c < a.cols; c += step) {
    a.r.load(r, row, c);
    a.dy.load(d, row, c);
    a.w.load(w, 0, c);
    float g = d[0] * (w[0] + a.offset);
    s0 += g;
    s1 += g * ((r[0] - mean) * rstd);
  }
  const float n = static_cast<float>(a.cols);
  const float c1 = block_sum(s1, part[0]) / n;
  const float c0 = a.layer ? block_sum(s0, part[1]) / n : 0.0f;
  for (int c = first; c < a.cols; c += step) {
    a.r.load(r, row, c);
    a.dy.load(d, row, c);
    a.w.load(w, 0, c);
    d[0] = rstd * (d[0] * (w[0] + a.offset) - c0 - (r[0] - mean) * rstd * c1);
    if (a.accumulate) {
      a.dx.load(w, row, c);
      d[0] += w[0];
    }
    a.dx.store(row, c, d);
  }
}

/* dw = sum_t dy z, db = sum_t dy */
template <class T, int N> struct norm_columns {
  static constexpr int n = N, sums = 2;
  esp_view<T> r, dy;
  const float *rstd, *mean; /* mean NULL: RMS */

  __device__ __forceinline__ void add(float (&acc)[2][N], int64_t row, int64_t col) const {
    float x[N], g[N], m = mean ? mean[row] : 0.0f, k = rstd[row];
    r.load(x, row, col);
    dy.load(g, row, col);
#pragma unroll
    for (int i = 0; i < N; i++) {
      acc[0][i] += g[i] * ((x[i] - m) * k);
      acc[1][i] += g[i];
    }
  }
};

/* The group of threads of a row, or 0 when the row does not fit into the registers of one. */
struct norm_shape {
  int group, held;
  bool block;
};
norm_shape shape_of(int64_t cols, int n) {
  int64_t vecs = cols / n;
  norm_shape s = {1, 1, false};
  if (vecs <= 32) {
    while (s.group < vecs) s.group *= 2;
    return s;
  }
  s.held = HELD;
  if (vecs <= 32 * HELD) {
    s.group = 32;
    return s;
  }
  s.block = true;
  int64_t threads = (vecs + HELD - 1) / HELD;
  s.group = threads <= BLOCK_MOST ? static_cast<int>((threads + 31) / 32 * 32) : 0;
  return s;
}
dim3 grid_of(const norm_shape &s, int64_t rows) {
  int64_t per_block = s.block ? 1 : SMALL_BLOCK / s.group;
  return dim3(static_cast<unsigned>((rows + per_block - 1) / per_block));
}
dim3 block_of_any(int64_t cols) {
  int64_t threads = (cols + 127) / 128 * 32; /* four elements each, until there are 256 */
  return dim3(static_cast<unsigned>(threads < 256 ? threads : 256));
}
/* Weights are read 8 (or 4) at a time whatever their type. */
bool weight_aligned(const esp_tensor &w, int n) {
  return !w.data || reinterpret_cast<uintptr_t>(w.data) % (static_cast<size_t>(n) * esp_dtype_size(w.dtype)) == 0;
}

/* Calls held(instance) with bf16 by 8 or fp32 by 4, or answers false. */
template <class F> bool by_held(esp_access access, F held) {
  if (access == ESP_BY_BF16X8)
    held(esp_instance<bf16, 8>());
  else if (access == ESP_BY_F32X4)
    held(esp_instance<float, 4>());
  return access == ESP_BY_BF16X8 || access == ESP_BY_F32X4;
}

template <class T> norm_fwd<T> norm_args_of(const esp_norm_args *a, int group) {
  norm_fwd<T> k = {};
  k.x = esp_view_of<T>(a->x);
  if (a->residual.data) {
    k.residual = esp_view_of<T>(a->residual);
    k.r_out = esp_view_of<T>(a->r_out);
  }
  k.y = esp_view_of<T>(a->y);
  k.w = esp_view_of<void>(a->w);
  k.b = esp_view_of<void>(a->b);
  k.rstd = a->rstd;
  k.mean = a->mean;
  k.eps = a->eps;
  k.offset = a->offset;
  k.rows = esp_tensor_rows(&a->x);
  k.cols = static_cast<int>(esp_tensor_cols(&a->x));
  k.group = group;
  k.layer = a->kind == ESP_NORM_LAYER;
  return k;
}
template <class T> norm_grad<T> norm_grad_of(const esp_norm_bwd_args *a, int group) {
  norm_grad<T> k = {};
  k.r = esp_view_of<T>(a->r);
  k.dy = esp_view_of<T>(a->dy);
  k.dx = esp_view_of<T>(a->dx);
  k.w = esp_view_of<void>(a->w);
  k.rstd = a->rstd;
  k.mean = a->mean;
  k.offset = a->offset;
  k.rows = esp_tensor_rows(&a->r);
  k.cols = static_cast<int>(esp_tensor_cols(&a->r));
  k.group = group;
  k.layer = a->kind == ESP_NORM_LAYER;
  k.accumulate = a->accumulate;
  return k;
}

void norm_bwd_columns(esp_backend *be, const esp_norm_bwd_args *a) {
  int64_t rows = esp_tensor_rows(&a->r), cols = esp_tensor_cols(&a->r), slices = esp_cuda_col_slices(rows, cols);
  float *part = static_cast<float *>(esp_cuda_scratch(be, esp_cuda_need_norm_bwd(a)));
  if (!part) return;
  esp_by_access(esp_access_of({&a->r, &a->dy}), [&](auto i) {
    using T = typename decltype(i)::type;
    norm_columns<T, decltype(i)::n> body = {esp_view_of<T>(a->r), esp_view_of<T>(a->dy), a->rstd,
                                            a->kind == ESP_NORM_LAYER ? a->mean : nullptr};
    esp_sum_slices(be, "norm_bwd columns", body, part, rows, cols);
  });
  if (a->dw) esp_cuda_add_slices(be, a->dw, part, slices, 2 * cols, cols);
  if (a->db) esp_cuda_add_slices(be, a->db, part + cols, slices, 2 * cols, cols);
}

} // namespace

void esp_cuda_norm(esp_backend *be, const esp_norm_args *a) {
  if (esp_idle(be, a->x)) return;
  int64_t rows = esp_tensor_rows(&a->x), cols = esp_tensor_cols(&a->x);
  esp_access access =
      a->residual.data ? esp_access_of({&a->x, &a->residual, &a->r_out, &a->y}) : esp_access_of({&a->x, &a->y});
  bool held = by_held(access, [&](auto i) {
    using T = typename decltype(i)::type;
    constexpr int N = decltype(i)::n;
    norm_shape s = shape_of(cols, N);
    if (s.group == 0 || !weight_aligned(a->w, N) || !weight_aligned(a->b, N)) {
      access = ESP_BY_ONE;
      return;
    }
    norm_fwd<T> k = norm_args_of<T>(a, s.group);
    auto narrow = norm_kernel<T, N, 1, false>, warp = norm_kernel<T, N, HELD, false>,
         wide = norm_kernel<T, N, HELD, true>;
    dim3 grid = grid_of(s, rows);
    if (s.block)
      ESP_LAUNCH(be, "norm", wide, grid, dim3(static_cast<unsigned>(s.group)), 0, k);
    else if (s.held > 1)
      ESP_LAUNCH(be, "norm", warp, grid, dim3(SMALL_BLOCK), 0, k);
    else
      ESP_LAUNCH(be, "norm", narrow, grid, dim3(SMALL_BLOCK), 0, k);
  });
  if (held && access != ESP_BY_ONE) return;
  ESP_LAUNCH(be, "norm", norm_any_kernel, dim3(static_cast<unsigned>(rows)), block_of_any(cols), 0,
             norm_args_of<void>(a, 0));
}

void esp_cuda_norm_bwd(esp_backend *be, const esp_norm_bwd_args *a) {
  if (esp_idle(be, a->r)) return;
  int64_t rows = esp_tensor_rows(&a->r), cols = esp_tensor_cols(&a->r);
  if (a->dw || a->db) norm_bwd_columns(be, a); /* first: dx may be the same memory as dy */
  if (!a->dx.data) return;
  esp_access access = esp_access_of({&a->r, &a->dy, &a->dx});
  bool held = by_held(access, [&](auto i) {
    using T = typename decltype(i)::type;
    constexpr int N = decltype(i)::n;
    norm_shape s = shape_of(cols, N);
    if (s.group == 0 || !weight_aligned(a->w, N)) {
      access = ESP_BY_ONE;
      return;
    }
    norm_grad<T> k = norm_grad_of<T>(a, s.group);
    auto narrow = norm_bwd_kernel<T, N, 1, false>, warp = norm_bwd_kernel<T, N, HELD, false>,
         wide = norm_bwd_kernel<T, N, HELD, true>;
    dim3 grid = grid_of(s, rows);
    if (s.block)
      ESP_LAUNCH(be, "norm_bwd", wide, grid, dim3(static_cast<unsigned>(s.group)), 0, k);
    else if (s.held > 1)
      ESP_LAUNCH(be, "norm_bwd", warp, grid, dim3(SMALL_BLOCK), 0, k);
    else
      ESP_LAUNCH(be, "norm_bwd", narrow, grid, dim3(SMALL_BLOCK), 0, k);
  });
  if (held && access != ESP_BY_ONE) return;
  ESP_LAUNCH(be, "norm_bwd", norm_bwd_any_kernel, dim3(static_cast<unsigned>(rows)), block_of_any(cols), 0,
             norm_grad_of<void>(a, 0));
}
