/* blocks.cu: products with small blocks, the gradients of the blocks, and their inverses, for every shape and mix of
 * types; what fills cuBLASLt's tiles does not come here (matmul_blocks.c). Blocks of up to 16 are bound by memory: x is
 * read and y written once. */
#include "backend/cuda/need_kinds.h"
#include "backend/cuda/view.cuh"

namespace {

enum {
  TOKENS = 32,       /* of one tile */
  COLS = 128,        /* of one tile */
  X_LD = TOKENS + 4, /* row stride of a transposed tile of x, of the results: 16-byte accesses stay aligned */
  Y_LD = COLS + 4,
  SMEM_FLOATS = 10240 /* 40 KiB: needs no opt-in, leaves room for two blocks of threads */
};

/* How a call is cut: a tile is `groups` blocks of q columns each, or `width` columns of one block; of the contraction
 * `depth` at a time. */
struct blocks_cut {
  int64_t tokens, p, q, x_step, y_step;    /* steps: elements from a group to the next */
  int blocks, groups, width, depth, along; /* along: tiles of one block's columns */
  bool shared, trans;
};

__device__ __forceinline__ int smaller(int64_t a, int64_t b) {
  return static_cast<int>(a < b ? a : b);
}

/* m of this tile, the contraction's rows [p0, p0 + pn), as fp32 [group][depth][width]. */
__device__ __forceinline__ void load_blocks(float *ms, const esp_view<void> &m, const blocks_cut &c, int64_t g0, int gn,
                                            int64_t j0, int jn, int64_t p0, int pn) {
  const int all = (c.shared ? 1 : gn) * pn * jn;
  for (int e = static_cast<int>(threadIdx.x); e < all; e += 256) {
    int fast = c.trans ? pn : jn, slow = c.trans ? jn : pn; /* as it lies in memory */
    int f = e % fast, s = e / fast % slow, g = e / (pn * jn);
    int i = c.trans ? f : s, j = c.trans ? s : f;
    int64_t block = c.shared ? 0 : g0 + g;
    float v[1];
    if (c.trans)
      m.load(v, block * c.q + j0 + j, p0 + i);
    else
      m.load(v, block * c.p + p0 + i, j0 + j);
    ms[(g * c.depth + i) * c.width + j] = v[0];
  }
}

/* Tokens [t0, t0 + TOKENS) of x, transposed: [group][depth][X_LD]. Two neighbouring accesses of one row go to
 * neighbouring threads, so that whole sectors are read, and 16 rows to the others, so that they store to different
 * banks. */
template <class T, int N>
__device__ __forceinline__ void load_tokens(float *xs, const esp_view<T> &x, const blocks_cut &c, int64_t g0, int gn,
                                            int64_t p0, int pn, int64_t t0) {
  const int per_group = pn / N, all = gn * per_group;
  for (int e = static_cast<int>(threadIdx.x); e < (all + 1) / 2 * 2 * TOKENS; e += 256) {
    int at = N == 1 ? e % all : e % 2 + e / (2 * TOKENS) * 2, t = N == 1 ? e / all : e / 2 % TOKENS;
    if (at >= all || t >= TOKENS) continue;
    int g = at / per_group, i = at % per_group * N;
    float v[N];
#pragma unroll
    for (int k = 0; k < N; k++) v[k] = 0.0f;
    if (t0 + t < c.tokens) x.load(v, t0 + t, (g0 + g) * c.x_step + p0 + i);
#pragma unroll
    for (int k = 0; k < N; k++) xs[(g * c.depth + i + k) * X_LD + t] = v[k];
  }
}

template <class T, int N>
__global__ void __launch_bounds__(256) blocks_kernel(esp_view<T> y, esp_view<T> x, esp_view<void> m, blocks_cut c,
                                                     int ms_floats, float alpha, float beta) {
  ESP_DYNAMIC_SMEM(float, smem);
  float *ms = smem, *xs = smem + ms_floats; /* xs also holds the results: [TOKENS][Y_LD] */
  const int64_t g0 = static_cast<int64_t>(blockIdx.x) / c.along * c.groups;
  const int64_t j0 = static_cast<int64_t>(blockIdx.x) % c.along * c.width;
  const int gn = smaller(c.groups, c.blocks - g0), jn = smaller(c.width, c.q - j0);
  const int col = static_cast<int>(threadIdx.x) % COLS, half = static_cast<int>(threadIdx.x) / COLS;
  const int g = col / c.width, j = col % c.width;
  const bool mine = g < gn && j < jn;
  const int64_t tiles = (c.tokens + TOKENS - 1) / TOKENS;
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    float acc[TOKENS / 2];
#pragma unroll
    for (int k = 0; k < TOKENS / 2; k++) acc[k] = 0.0f;
    for (int64_t p0 = 0; p0 < c.p; p0 += c.depth) {
      int pn = smaller(c.depth, c.p - p0);
      __syncthreads();
      if (c.depth < c.p || tile == blockIdx.y) load_blocks(ms, m, c, g0, gn, j0, jn, p0, pn);
      load_tokens<T, N>(xs, x, c, g0, gn, p0, pn, tile * TOKENS);
      __syncthreads();
      if (mine) {
        const float *mj = ms + (c.shared ? 0 : g) * c.depth * c.width + j;
        const float *xg = xs + g * c.depth * X_LD + half * (TOKENS / 2);
        for (int i = 0; i < pn; i++) {
          float w = mj[i * c.width];
#pragma unroll
          for (int k = 0; k < TOKENS / 2; k += 4) {
            float v[4];
            load_vec<float, 4>(v, xg + i * X_LD + k);
#pragma unroll
            for (int n = 0; n < 4; n++) acc[k + n] = fmaf(v[n], w, acc[k + n]);
          }
        }
      }
    }
    __syncthreads();
    if (mine) {
#pragma unroll
      for (int k = 0; k < TOKENS / 2; k++) xs[(half * (TOKENS / 2) + k) * Y_LD + col] = alpha * acc[k];
    }
    __syncthreads();
    const int per_group = jn / N, all = gn * per_group;
    for (int e = static_cast<int>(threadIdx.x); e < all * TOKENS; e += 256) {
      int at = e % all, t = e / all, group = at / per_group, k0 = at % per_group * N;
      int64_t row = tile * TOKENS + t, column = (g0 + group) * c.y_step + j0 + k0;
      if (row >= c.tokens) continue;
      float v[N];
#pragma unroll
      for (int k = 0; k < N; k++) v[k] = xs[t * Y_LD + group * c.width + k0 + k];
      if (beta != 0.0f) {
        float old[N];
        y.load(old, row, column);
#pragma unroll
        for (int k = 0; k < N; k++) v[k] += beta * old[k];
      }
      y.store(row, column, v);
    }
  }
}

/* The widest access, when groups of p and of q columns are whole numbers of it. */
esp_access blocks_access(const esp_tensor &a, const esp_tensor &b, int64_t p, int64_t q, int64_t depth) {
  esp_access access = esp_access_of({&a, &b});
  int64_t n = access == ESP_BY_F32X4 ? 4 : access == ESP_BY_ONE ? 1 : 8;
  return p % n || q % n || depth % n ? ESP_BY_ONE : access;
}

} // namespace

void esp_cuda_blocks_own(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor m, int blocks, bool shared, bool trans,
                         float alpha, float beta) {
  blocks_cut c = {esp_block_tokens(&x),
                  esp_block_width(&x, blocks),
                  esp_block_width(&y, blocks),
                  esp_block_step(&x, blocks),
                  esp_block_step(&y, blocks),
                  blocks,
                  1,
                  0,
                  0,
                  1,
                  shared,
                  trans};
  c.width = static_cast<int>(c.q < COLS ? c.q : static_cast<int64_t>(COLS));
  c.along = static_cast<int>((c.q + c.width - 1) / c.width);
  if (c.along == 1) c.groups = COLS / c.width < blocks ? COLS / c.width : blocks;
  int kept = shared ? 1 : c.groups;
  int64_t most = SMEM_FLOATS / (kept * c.width + c.groups * X_LD);
  c.depth = static_cast<int>(c.p <= most ? c.p : most >= 8 ? most / 8 * 8 : most);
  int ms_floats = (kept * c.depth * c.width + 3) / 4 * 4, xs_floats = c.groups * c.depth * X_LD;
  if (xs_floats < TOKENS * Y_LD) xs_floats = TOKENS * Y_LD;
  size_t bytes = static_cast<size_t>(ms_floats + xs_floats) * sizeof(float);
  /* The blocks stay in shared memory over up to eight tiles of tokens, where there are enough of these. */
  int64_t across = (blocks + c.groups - 1) / c.groups * c.along, tiles = (c.tokens + TOKENS - 1) / TOKENS;
  int64_t down = (tiles + 7) / 8, busy = (1024 + across - 1) / across;
  if (down < busy) down = busy < tiles ? busy : tiles;
  if (down > 65535) down = 65535;
  esp_by_access(blocks_access(x, y, c.p, c.q, c.depth), [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = blocks_kernel<T, decltype(i)::n>;
    if (!esp_allow_smem(be, kernel, bytes)) return;
    ESP_LAUNCH(be, "block_matmul", kernel, dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), dim3(256),
               bytes, esp_view_of<T>(y), esp_view_of<T>(x), esp_view_of<void>(m), c, ms_floats, alpha, beta);
  });
}

namespace {

enum { GRAD_TILE = 64, GRAD_THREADS = 256 };

/* A block of threads sums one slice of the tokens for `groups` blocks, or for one tile of at most 64 x 64 of one block;
 * each thread 4 x 4 of them. */
struct grad_cut {
  int64_t tokens, per_slice, p, q, x_step, y_step;
  int blocks, groups, pt, qt, down, along; /* pt, qt: the tile, multiples of 4; down, along: tiles of one block */
};

template <class T, int N>
__device__ __forceinline__ void load_rows(float *to, int ld, const esp_view<T> &x, int64_t g0, int gn, int64_t step,
                                          int64_t i0, int in, int tile, int64_t t0, int64_t end) {
  const int per_group = in / N, all = gn * per_group;
  for (int e = static_cast<int>(threadIdx.x); e < all * TOKENS; e += GRAD_THREADS) {
    int at = e % all, t = e / all, g = at / per_group, i = at % per_group * N;
    float v[N];
#pragma unroll
    for (int k = 0; k < N; k++) v[k] = 0.0f;
    if (t0 + t < end) x.load(v, t0 + t, (g0 + g) * step + i0 + i);
#pragma unroll
    for (int k = 0; k < N; k++) to[t * ld + g * tile + i + k] = v[k];
  }
}

/* part: [slices, blocks, p, q] */
template <class T, int N>
__global__ void __launch_bounds__(GRAD_THREADS)
    block_grad_kernel(float *part, esp_view<T> x, esp_view<T> dy, grad_cut c) {
  ESP_DYNAMIC_SMEM(float, smem);
  const int x_ld = c.groups * c.pt, d_ld = c.groups * c.qt;
  float *xs = smem, *ds = smem + TOKENS * x_ld;
  const int64_t tile = static_cast<int64_t>(blockIdx.x), per_block = static_cast<int64_t>(c.down) * c.along;
  const int64_t g0 = tile / per_block * c.groups;
  const int64_t i0 = tile % per_block / c.along * c.pt, j0 = tile % c.along * c.qt;
  const int gn = smaller(c.groups, c.blocks - g0), in = smaller(c.pt, c.p - i0), jn = smaller(c.qt, c.q - j0);
  const int across = c.qt / 4, patches = c.pt / 4 * across;
  const int g = static_cast<int>(threadIdx.x) / patches, patch = static_cast<int>(threadIdx.x) % patches;
  const int i4 = patch / across * 4, j4 = patch % across * 4;
  const bool mine = g < gn;
  const int64_t begin = blockIdx.y * c.per_slice;
  const int64_t end = begin + c.per_slice < c.tokens ? begin + c.per_slice : c.tokens;
  float acc[4][4];
#pragma unroll
  for (int a = 0; a < 4; a++)
#pragma unroll
    for (int b = 0; b < 4; b++) acc[a][b] = 0.0f;
  for (int64_t t0 = begin; t0 < end; t0 += TOKENS) {
    __syncthreads();
    load_rows<T, N>(xs, x_ld, x, g0, gn, c.x_step, i0, in, c.pt, t0, end);
    load_rows<T, N>(ds, d_ld, dy, g0, gn, c.y_step, j0, jn, c.qt, t0, end);
    __syncthreads();
    if (mine)
      for (int t = 0; t < TOKENS; t++) {
        float u[4], v[4]; /* past the edge of a block: whatever lies there, for sums that are not stored */
        load_vec<float, 4>(u, xs + t * x_ld + g * c.pt + i4);
        load_vec<float, 4>(v, ds + t * d_ld + g * c.qt + j4);
#pragma unroll
        for (int a = 0; a < 4; a++)
#pragma unroll
          for (int b = 0; b < 4; b++) acc[a][b] = fmaf(u[a], v[b], acc[a][b]);
      }
  }
  if (!mine) return;
  float *out = part + ((static_cast<int64_t>(blockIdx.y) * c.blocks + g0 + g) * c.p + i0) * c.q + j0;
#pragma unroll
  for (int a = 0; a < 4; a++)
#pragma unroll
    for (int b = 0; b < 4; b++)
      if (i4 + a < in && j4 + b < jn) out[(i4 + a) * c.q + j4 + b] = acc[a][b];
}

/* dm += alpha * the sum over `count` of part, in order. */
__global__ void __launch_bounds__(256) block_grad_sum_kernel(float *dm, int64_t ld, const float *part, int64_t count,
                                                             int64_t elements, int64_t q, float alpha) {
  int64_t e = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (e >= elements) return;
  float sum = 0.0f;
  for (int64_t s = 0; s < count; s++) sum += part[s * elements + e];
  dm[e / q * ld + e % q] += alpha * sum;
}

int round4(int64_t n) {
  return static_cast<int>((n + 3) / 4 * 4);
}

} // namespace

void esp_cuda_block_grad_own(esp_backend *be, esp_tensor dm, esp_tensor x, esp_tensor dy, int blocks, bool shared,
                             float alpha) {
  grad_cut c = {esp_block_tokens(&x),
                0,
                esp_block_width(&x, blocks),
                esp_block_width(&dy, blocks),
                esp_block_step(&x, blocks),
                esp_block_step(&dy, blocks),
                blocks,
                1,
                0,
                0,
                0,
                0};
  int64_t slices = esp_cuda_block_grad_slices(c.tokens, blocks, c.p, c.q);
  c.per_slice = (c.tokens + slices - 1) / slices;
  c.pt = c.p < GRAD_TILE ? round4(c.p) : GRAD_TILE;
  c.qt = c.q < GRAD_TILE ? round4(c.q) : GRAD_TILE;
  c.down = static_cast<int>((c.p + c.pt - 1) / c.pt);
  c.along = static_cast<int>((c.q + c.qt - 1) / c.qt);
  if (c.down == 1 && c.along == 1) {
    int patches = c.pt / 4 * (c.qt / 4), most = SMEM_FLOATS / (TOKENS * (c.pt + c.qt));
    c.groups = GRAD_THREADS / patches < most ? GRAD_THREADS / patches : most;
    if (c.groups > blocks) c.groups = blocks;
  }
  float *part = static_cast<float *>(esp_cuda_scratch(be, slices * blocks * c.p * c.q * 4));
  if (!part) return;
  size_t bytes = static_cast<size_t>(TOKENS * c.groups * (c.pt + c.qt)) * sizeof(float);
  int64_t across = static_cast<int64_t>((blocks + c.groups - 1) / c.groups) * c.down * c.along;
  esp_by_access(blocks_access(x, dy, c.p, c.q, 0), [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = block_grad_kernel<T, decltype(i)::n>;
    ESP_LAUNCH(be, "block_grad", kernel, dim3(static_cast<unsigned>(across), static_cast<unsigned>(slices)),
               dim3(GRAD_THREADS), bytes, part, esp_view_of<T>(x), esp_view_of<T>(dy), c);
  });
  int64_t elements = c.p * c.q * (shared ? 1 : blocks), count = shared ? slices * blocks : slices;
  ESP_LAUNCH(be, "block_grad sum", block_grad_sum_kernel, dim3(static_cast<unsigned>((elements + 255) / 256)),
             dim3(256), 0, static_cast<float *>(dm.data), dm.ld, static_cast<const float *>(part), count, elements, c.q,
             alpha);
}

namespace {

/* Gauss-Jordan in place, one block of threads per matrix, which stays in shared memory where it fits (`inside`). After
 * step k the first k columns are those of the inverse. */
__global__ void __launch_bounds__(256)
    block_inverse_kernel(float *inv, int64_t inv_ld, const float *m, int64_t m_ld, int n, bool inside) {
  ESP_DYNAMIC_SMEM(float, smem);
  float *row = smem, *col = smem + n;
  float *out = inv + static_cast<int64_t>(blockIdx.x) * n * inv_ld;
  float *a = inside ? smem + 2 * n : out;
  const int64_t ld = inside ? n : inv_ld;
  const float *from = m + static_cast<int64_t>(blockIdx.x) * n * m_ld;
  const int64_t all = static_cast<int64_t>(n) * n;
  for (int64_t e = threadIdx.x; e < all; e += 256) a[e / n * ld + e % n] = from[e / n * m_ld + e % n];
  for (int k = 0; k < n; k++) {
    __syncthreads();
    const float pivot = 1.0f / a[k * ld + k];
    for (int i = static_cast<int>(threadIdx.x); i < n; i += 256) {
      row[i] = (i == k ? 1.0f : a[k * ld + i]) * pivot;
      col[i] = a[i * ld + k];
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < all; e += 256) {
      int i = static_cast<int>(e / n), j = static_cast<int>(e % n);
      float old = j == k ? 0.0f : a[i * ld + j];
      a[i * ld + j] = i == k ? row[j] : old - col[i] * row[j];
    }
  }
  if (!inside) return;
  __syncthreads();
  for (int64_t e = threadIdx.x; e < all; e += 256) out[e / n * inv_ld + e % n] = a[e];
}

} // namespace

void esp_cuda_block_inverse(esp_backend *be, esp_tensor inv, esp_tensor m, int blocks) {
  if (esp_idle(be, m)) return;
  int64_t n = esp_tensor_cols(&m);
  bool inside = n * (n + 2) <= SMEM_FLOATS;
  size_t bytes = static_cast<size_t>(inside ? n * (n + 2) : 2 * n) * sizeof(float);
  if (!esp_allow_smem(be, block_inverse_kernel, bytes)) return;
  ESP_LAUNCH(be, "block_inverse", block_inverse_kernel, dim3(static_cast<unsigned>(blocks)), dim3(256), bytes,
             static_cast<float *>(inv.data), inv.ld, static_cast<const float *>(m.data), m.ld, static_cast<int>(n),
             inside);
}
