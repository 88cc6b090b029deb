/* blend_model.c: models, adapters and stored differences against one base become one model by a method. Two openings of
 * every tensor at most: OPCM's factor is one of the whole model, so its sums wait in an unnamed file for it. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <string.h>
#include <unistd.h>

#include "io/file.h"
#include "merge/sources.h"

typedef struct blending {
  const esp_method *m;
  esp_sources s;
  esp_out_model out;
  esp_blend open; /* of the tensor that is written */
  bool opened;
  double model_scale;
  int fd;      /* sums that wait, -1: none */
  int64_t *at; /* [n]: where in the file */
} blending;

static esp_status begin(void *ctx, const esp_out_tensor *t) {
  blending *g = ctx;
  if (g->fd >= 0) return ESP_OK;
  esp_vectors v = esp_sources_vectors(&g->s, t);
  ESP_TRY(esp_blend_open(g->m, &v, &g->open));
  g->opened = true;
  return ESP_OK;
}

static void end(void *ctx, const esp_out_tensor *t) {
  blending *g = ctx;
  if (g->opened) esp_blend_close(&g->open);
  g->opened = false;
  esp_sources_drop(&g->s, t);
}

static esp_status move(const blending *g, bool out, float *x, int64_t bytes, int64_t at) {
  for (int64_t done = 0; done < bytes;) {
    char *p = (char *)x + done;
    ssize_t k =
        out ? pwrite(g->fd, p, (size_t)(bytes - done), at + done) : pread(g->fd, p, (size_t)(bytes - done), at + done);
    if (k < 0 && errno == EINTR) continue;
    if (k <= 0)
      return esp_fail(ESP_ERR_DATA, "%s: sums of the merge: %s", g->out.out, k < 0 ? strerror(errno) : "short");
    done += k;
  }
  return ESP_OK;
}

static esp_status rows(void *ctx, const esp_out_tensor *t, int64_t r0, int64_t n, float *base, float *made) {
  blending *g = ctx;
  int64_t cols = esp_out_cols(t), len = n * cols;
  if (g->fd >= 0)
    ESP_TRY(move(g, false, made, len * 4, g->at[t - g->out.list] + r0 * cols * 4));
  else
    ESP_TRY(esp_blend_rows(&g->open, r0, n, made));
  esp_stored_rows(t->stored, r0, n, cols, base);
  esp_stored_drop(t->stored, r0, n, cols);
  for (int64_t i = 0; i < len; i++) made[i] = (float)(base[i] + g->model_scale * made[i]);
  return ESP_OK;
}

/* A file beside the output that no name leads to. */
static esp_status open_unnamed(blending *g) {
  char dir[PATH_MAX], path[PATH_MAX];
  ESP_TRY(esp_dir_stage(g->out.out, dir, sizeof dir));
  g->fd = open(esp_path_join(path, sizeof path, dir, "sums"), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  int error = errno;
  esp_status st = esp_remove_tree(dir);
  if (g->fd < 0) return esp_fail(ESP_ERR_DATA, "%s: cannot be made: %s", path, strerror(error));
  return st;
}

static esp_status save_sums(blending *g, const esp_out_tensor *t, int64_t *at, double *own, double *each) {
  esp_status st = ESP_OK;
  int64_t cols = esp_out_cols(t), rows_of = esp_out_rows(t), step = esp_out_step(t);
  float *made = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(step * cols) * 4);
  esp_vectors v = esp_sources_vectors(&g->s, t);
  if (!made) return ESP_ERR_MEMORY;
  ESP_GOTO(esp_blend_open(g->m, &v, &g->open));
  g->opened = true;
  for (int64_t r = 0; r < rows_of; r += step) {
    int64_t n = r + step <= rows_of ? step : rows_of - r;
    ESP_GOTO(esp_blend_rows(&g->open, r, n, made));
    ESP_GOTO(move(g, true, made, n * cols * 4, *at));
    *at += n * cols * 4;
  }
  *own += g->open.own_squares;
  for (int i = 0; i < g->m->n; i++) each[i] += g->open.each_squares[i];
out:
  end(g, t);
  esp_mem_free(made);
  esp_mem_trim();
  return st;
}

/* l of opcm.c. */
static esp_status sum_first(blending *g) {
  double own = 0, each[ESP_MERGE_MOST] = {0}, mean = 0;
  int64_t at = 0;
  g->at = esp_mem_alloc(ESP_MEM_HOST, (size_t)(g->out.n + 1) * sizeof *g->at);
  if (!g->at) return ESP_ERR_MEMORY;
  ESP_TRY(open_unnamed(g));
  for (int i = 0; i < g->out.n; i++) {
    g->at[i] = at;
    if (g->out.list[i].changed) ESP_TRY(save_sums(g, &g->out.list[i], &at, &own, each));
  }
  for (int i = 0; i < g->m->n; i++) mean += sqrt(each[i]) / g->m->n;
  g->model_scale = own > 0 ? mean / sqrt(own) : 1;
  return ESP_OK;
}

static esp_status settle(const esp_blend_spec *spec, int *dtype, esp_method *m) {
  const esp_method_kind *kind = esp_method_find(spec->method->name);
  if (!kind) return esp_method_unknown(spec->method->name, esp_method_names);
  ESP_TRY(esp_out_dtype(spec->dtype, dtype));
  return esp_method_settle(spec->method, kind, spec->weights, spec->n, 0, m);
}

esp_status esp_blend_check(const esp_blend_spec *spec) {
  esp_method m;
  int dtype;
  return settle(spec, &dtype, &m);
}

esp_status esp_blend_write(const esp_blend_spec *spec, esp_merge_stats *stats) {
  esp_status st;
  esp_method m;
  blending g = {.m = &m, .model_scale = 1, .fd = -1};
  g.out = (esp_out_model){.base = spec->base, .out = spec->out, .begin = begin, .end = end, .rows = rows, .ctx = &g};
  ESP_TRY(settle(spec, &g.out.dtype, &m)); /* before anything is opened */
  ESP_GOTO(esp_sources_open(spec->base, spec->inputs, spec->n, &g.s));
  m.layers = esp_model_describe(g.s.in.model)->layers;
  ESP_GOTO(esp_sources_list(&g.s, g.out.dtype, &g.out.list, &g.out.n));
  if (m.kind->join == ESP_JOIN_OPCM) ESP_GOTO(sum_first(&g));
  st = esp_out_write(&g.out, stats);
out:
  if (g.fd >= 0) close(g.fd);
  esp_mem_free(g.at);
  esp_mem_free(g.out.list);
  esp_sources_close(&g.s);
  return st;
}
