/* gem.c: the step may not raise the loss on samples of earlier tasks, to first order.
 *
 * gem: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning" (2017). With g the gradient of the step
 * and g_k that of the mean loss over the remembered samples of task k, z = argmin 1/2 |g - z|^2 with <z, g_k> >= 0 for
 * all k < t is z = g + G^T v, where v = argmin 1/2 v^T G G^T v + (G g)^T v, v >= margin. The gradient is left as it is
 * where no <g, g_k> is negative. margin is the authors' "memory strength", 0.5 in their code.
 *
 * agem: Chaudhry et al., "Efficient Lifelong Learning with A-GEM" (2019). One constraint, on the mean loss of a batch
 * drawn from the memory of all earlier tasks: z = g - min(<g, r>, 0) / |r|^2 r.
 *
 * Both go through what they remember in passes of their own: the step's own gradient is not touched before it is
 * compared with theirs. */
#include <math.h>
#include <string.h>

#include "tasks/internal.h"
#include "tasks/memory.h"

/* ---- the quadratic programme ---- */

/* P_SS z = -d_S by Cholesky; false: P_SS is not positive definite. */
static bool solve_passive(int n, const double *p, const double *d, const int *set, int m, double *l, double *z) {
  for (int i = 0; i < m; i++) {
    for (int j = 0; j <= i; j++) {
      double s = p[set[i] * n + set[j]];
      for (int k = 0; k < j; k++) s -= l[i * n + k] * l[j * n + k];
      if (i == j && !(s > 1e-13 * p[set[i] * n + set[i]])) return false;
      l[i * n + j] = i == j ? sqrt(s) : s / l[j * n + j];
    }
  }
  for (int i = 0; i < m; i++) {
    z[i] = -d[set[i]];
    for (int k = 0; k < i; k++) z[i] -= l[i * n + k] * z[k];
    z[i] /= l[i * n + i];
  }
  for (int i = m - 1; i >= 0; i--) {
    for (int k = i + 1; k < m; k++) z[i] -= l[k * n + i] * z[k];
    z[i] /= l[i * n + i];
  }
  return true;
}

/* The variable whose growth lowers the objective most, of those that are zero and not barred; -1: none. */
static int steepest(int n, const double *p, const double *d, const double *u, const char *state) {
  int best = -1;
  double most = 0;
  for (int i = 0; i < n; i++) {
    double w = -d[i], size = fabs(d[i]);
    for (int k = 0; k < n; k++) w -= p[i * n + k] * u[k], size += fabs(p[i * n + k] * u[k]);
    if (state[i] == 0 && w > 1e-12 * size && w > most) most = w, best = i;
  }
  return best;
}

/* Lawson and Hanson's active sets on the normal equations (Bro and de Jong 1997). A variable that the passive ones
 * already span is barred: with it the solution is not unique, without it the objective is the same. */
esp_status esp_gem_solve(int n, const double *p, const double *c, double margin, double *v) {
  size_t size = (size_t)n;
  double *d = esp_mem_alloc(ESP_MEM_HOST, (size * size + 3 * size + 1) * sizeof *d), *z = d + n, *u = z + n, *l = u + n;
  int *set = esp_mem_alloc(ESP_MEM_HOST, (size + 1) * sizeof *set);
  char *state = esp_mem_alloc(ESP_MEM_HOST, size + 1); /* 0: at zero, 1: passive, 2: barred */
  esp_status st = d && set && state ? ESP_OK : ESP_ERR_MEMORY;
  if (st) goto out;
  for (int i = 0; i < n; i++) {
    d[i] = c[i];
    for (int k = 0; k < n; k++) d[i] += margin * p[i * n + k];
  }
  int rounds = 0, add;
  while ((add = steepest(n, p, d, u, state)) >= 0 && rounds++ < 100 * n) {
    state[add] = 1;
    for (bool inside = false; !inside;) {
      int m = 0;
      double step = 1;
      for (int i = 0; i < n; i++)
        if (state[i] == 1) set[m++] = i;
      if (!solve_passive(n, p, d, set, m, l, z)) {
        state[state[add] == 1 ? add : set[m - 1]] = 2;
        continue;
      }
      for (int i = 0; i < m; i++)
        if (z[i] <= 0 && u[set[i]] / (u[set[i]] - z[i]) < step) step = u[set[i]] / (u[set[i]] - z[i]);
      inside = true;
      for (int i = 0; i < m; i++) {
        double from = u[set[i]], to = from + step * (z[i] - from);
        bool leaves = z[i] <= 0 && to <= 1e-14 * (from + fabs(z[i]));
        inside &= z[i] > 0;
        u[set[i]] = leaves ? 0 : to;
        if (leaves) state[set[i]] = 0;
      }
    }
    bool moved = state[add] == 1;
    for (int i = 0; moved && i < n; i++)
      if (state[i] == 2) state[i] = 0;
    if (!moved) state[add] = 2;
  }
  if (rounds > 100 * n) st = esp_fail(ESP_ERR_INTERNAL, "gem: the quadratic programme of %d tasks has no end", n);
  for (int i = 0; i < n; i++) v[i] = u[i] + margin;
out:
  esp_mem_free(d);
  esp_mem_free(set);
  esp_mem_free(state);
  return st;
}

/* ---- gem ---- */

static esp_tensor row(esp_tensor g, int64_t i) {
  int64_t n = esp_tensor_cols(&g);
  return esp_flat((float *)g.data + i * n, n);
}

static esp_status gem_gradients(esp_strategy *s, const esp_sequence *q, esp_tensor g) {
  int64_t n = esp_memory_count(s);
  esp_sample *list = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * sizeof *list);
  esp_status st = list ? ESP_OK : ESP_ERR_MEMORY;
  for (int k = 0; st == ESP_OK && k < q->task; k++) {
    int64_t m = 0;
    for (int64_t i = 0; i < n; i++) {
      list[m] = esp_memory_at(s, i);
      m += list[m].task == k;
    }
    st = esp_sequence_gradient_of(q, list, m, row(g, k), NULL);
  }
  esp_mem_free(list);
  return st;
}

static esp_status gem_project(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  (void)t;
  int n = q->task;
  bool violated = false;
  if (n == 0) return ESP_OK;
  esp_status st = ESP_OK;
  int64_t mark = esp_stack_mark(q->stack);
  esp_tensor g = esp_sequence_gradient(q), all = esp_stack_tensor(q->stack, ESP_F32, n, q->adapter->params->total);
  double *p = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n * n + 2 * n) * sizeof *p), *c = p + n * n, *v = c + n;
  if (!p) return ESP_ERR_MEMORY;
  ESP_GOTO(gem_gradients(s, q, all));
  for (int i = 0; i < n; i++) {
    c[i] = esp_sequence_dot(q, row(all, i), g);
    violated |= c[i] < 0;
  }
  if (!violated) goto out;
  for (int i = 0; i < n; i++)
    for (int k = 0; k <= i; k++) p[i * n + k] = p[k * n + i] = esp_sequence_dot(q, row(all, i), row(all, k));
  ESP_GOTO(esp_gem_solve(n, p, c, s->cfg->gem.margin, v));
  for (int i = 0; i < n; i++)
    if (v[i] > 0) q->be->ops->axpby(q->be, g, (float)v[i], row(all, i), 1.0f);
out:
  esp_mem_free(p);
  esp_stack_release(q->stack, mark);
  return st;
}

static esp_status check_buffer(const char *name, double b, int n_tasks) {
  if (b > 1 && b != floor(b))
    return esp_fail(ESP_ERR_RECIPE, "continual.%s.buffer: must be a whole number of samples or a share, is %g", name,
                    b);
  if (n_tasks < 2) return esp_fail(ESP_ERR_RECIPE, "continual.strategy: %s has nothing to do with one task", name);
  return ESP_OK;
}

static esp_status gem_check(const esp_strategy_cfg *c, int n_tasks) {
  return check_buffer("gem", c->gem.buffer, n_tasks);
}

static esp_status gem_hand_over(esp_strategy *s, const esp_sequence *q) {
  esp_memory_cfg c = {s->cfg->gem.buffer, 0, s->cfg->gem.sampler};
  return esp_memory_add(s, q, &c);
}

const esp_strategy_kind esp_strategy_gem = {
    .name = "gem",
    .summary = "the gradient may not point against that of any earlier task's samples (Lopez-Paz and Ranzato 2017)",
    .check = gem_check,
    .hand_over = gem_hand_over,
    .project = gem_project,
    .held = esp_memory_bytes,
};

/* ---- agem ---- */

static esp_status agem_check(const esp_strategy_cfg *c, int n_tasks) {
  return check_buffer("agem", c->agem.buffer, n_tasks);
}

static esp_status agem_project(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  int64_t n = esp_memory_count(s) < s->cfg->agem.batch ? esp_memory_count(s) : s->cfg->agem.batch;
  if (q->task == 0 || n == 0) return ESP_OK;
  esp_status st = ESP_OK;
  int64_t mark = esp_stack_mark(q->stack);
  esp_tensor g = esp_sequence_gradient(q), r = esp_stack_tensor(q->stack, ESP_F32, 1, q->adapter->params->total);
  esp_sample *batch = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *batch);
  if (!batch) return ESP_ERR_MEMORY;
  ESP_GOTO(esp_memory_draw(s, q, t->task_step * n, n, batch));
  ESP_GOTO(esp_sequence_gradient_of(q, batch, n, r, NULL));
  double along = esp_sequence_dot(q, g, r), size = esp_sequence_dot(q, r, r);
  if (along < 0 && size > 0) q->be->ops->axpby(q->be, g, (float)(-along / size), r, 1.0f);
out:
  esp_mem_free(batch);
  esp_stack_release(q->stack, mark);
  return st;
}

static esp_status agem_hand_over(esp_strategy *s, const esp_sequence *q) {
  esp_memory_cfg c = {s->cfg->agem.buffer, 0, s->cfg->agem.sampler};
  return esp_memory_add(s, q, &c);
}

const esp_strategy_kind esp_strategy_agem = {
    .name = "agem",
    .summary = "the gradient may not point against that of a batch of earlier tasks' samples (Chaudhry et al. 2019)",
    .check = agem_check,
    .hand_over = agem_hand_over,
    .project = agem_project,
    .held = esp_memory_bytes,
};
