#include "tasks/matrix.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/error.h"
#include "core/mem.h"

esp_status esp_matrix_create(int tasks, int sets, esp_matrix **out) {
  *out = NULL;
  esp_matrix *m = esp_mem_alloc(ESP_MEM_HOST, sizeof *m);
  if (!m) return ESP_ERR_MEMORY;
  size_t cells = (size_t)(tasks + 1) * (size_t)sets;
  m->tasks = tasks;
  m->sets = sets;
  m->task_name = esp_mem_alloc(ESP_MEM_HOST, (size_t)tasks * ESP_MATRIX_NAME);
  m->set_name = esp_mem_alloc(ESP_MEM_HOST, (size_t)sets * ESP_MATRIX_NAME);
  m->set_metric = esp_mem_alloc(ESP_MEM_HOST, (size_t)sets * ESP_MATRIX_NAME);
  m->smaller_better = esp_mem_alloc(ESP_MEM_HOST, (size_t)sets * sizeof(bool));
  m->column = esp_mem_alloc(ESP_MEM_HOST, (size_t)tasks * sizeof(int));
  m->score = esp_mem_alloc(ESP_MEM_HOST, cells * sizeof(double));
  m->malformed = esp_mem_alloc(ESP_MEM_HOST, cells * sizeof(double));
  if (!m->task_name || !m->set_name || !m->set_metric || !m->smaller_better || !m->column || !m->score ||
      !m->malformed) {
    esp_matrix_destroy(m);
    return ESP_ERR_MEMORY;
  }
  for (int t = 0; t < tasks; t++) m->column[t] = -1;
  for (size_t i = 0; i < cells; i++) m->score[i] = m->malformed[i] = NAN;
  *out = m;
  return ESP_OK;
}

void esp_matrix_destroy(esp_matrix *m) {
  if (!m) return;
  esp_mem_free(m->task_name);
  esp_mem_free(m->set_name);
  esp_mem_free(m->set_metric);
  esp_mem_free(m->smaller_better);
  esp_mem_free(m->column);
  esp_mem_free(m->score);
  esp_mem_free(m->malformed);
  esp_mem_free(m);
}

esp_status esp_matrix_like(const esp_matrix *m, esp_matrix **out) {
  ESP_TRY(esp_matrix_create(m->tasks, m->sets, out));
  size_t tasks = (size_t)m->tasks, sets = (size_t)m->sets;
  memcpy((*out)->task_name, m->task_name, tasks * sizeof *m->task_name);
  memcpy((*out)->set_name, m->set_name, sets * sizeof *m->set_name);
  memcpy((*out)->set_metric, m->set_metric, sets * sizeof *m->set_metric);
  memcpy((*out)->smaller_better, m->smaller_better, sets * sizeof *m->smaller_better);
  memcpy((*out)->column, m->column, tasks * sizeof *m->column);
  (*out)->joint = m->joint;
  return ESP_OK;
}

const char *esp_matrix_row_name(const esp_matrix *m, int row) {
  return row == 0 ? "base" : m->joint && row == m->tasks ? "joint" : m->task_name[row - 1];
}

int esp_matrix_row_of(const esp_matrix *m, int task) {
  return m->joint ? m->tasks : task + 1;
}

void esp_matrix_copy_cells(esp_matrix *to, const esp_matrix *from) {
  size_t bytes = (size_t)(from->tasks + 1) * (size_t)from->sets * sizeof(double);
  memcpy(to->score, from->score, bytes);
  memcpy(to->malformed, from->malformed, bytes);
}

double esp_matrix_own(const esp_matrix *m, int row, int task) {
  int c = m->column[task];
  if (c < 0) return NAN;
  double v = *esp_matrix_cell(m, row, c);
  return m->smaller_better[c] ? -v : v;
}

bool esp_matrix_is_probe(const esp_matrix *m, int set) {
  for (int t = 0; t < m->tasks; t++)
    if (m->column[t] == set) return false;
  return true;
}

/* max over rows 1..last; -inf where none was measured. */
static double best(const esp_matrix *m, int last, int task) {
  double v = -INFINITY;
  for (int i = 1; i <= last; i++) v = esp_matrix_own(m, i, task) > v ? esp_matrix_own(m, i, task) : v;
  return v;
}

void esp_matrix_summarise(const esp_matrix *m, esp_matrix_summary *out) {
  int T = m->tasks;
  double acc = 0, bwt = 0, forgetting = 0, all = 0, fwt = 0, least = INFINITY, learning = 0;
  double rows = 0, unseen = 0, anytime = 0, pairs = T * (T - 1) / 2.0;
  for (int t = 0; t < T; t++) { /* row t + 1 is after task t */
    double last = esp_matrix_own(m, T, t), learned = esp_matrix_own(m, t + 1, t);
    acc += last;
    learning += learned;
    if (!(last >= least)) least = last; /* NaN stays */
    if (t + 1 < T) {
      bwt += last - learned;
      forgetting += best(m, T - 1, t) - last;
      all += isnan(learned) ? NAN : best(m, T, t) - last;
    }
    if (t > 0) fwt += esp_matrix_own(m, t, t) - esp_matrix_own(m, 0, t);
    for (int i = t + 2; i <= T; i++) rows += esp_matrix_own(m, i, t) - learned;
    for (int i = 1; i <= t; i++) unseen += esp_matrix_own(m, i, t);
    double seen = 0;
    for (int k = 0; k <= t; k++) seen += esp_matrix_own(m, t + 1, k);
    anytime += seen / (t + 1);
  }
  out->acc = T ? acc / T : NAN;
  out->learning_acc = T ? learning / T : NAN;
  out->anytime_acc = T ? anytime / T : NAN;
  out->lowest = T ? least : NAN;
  out->bwt = T > 1 ? bwt / (T - 1) : NAN;
  out->bwt_trace = T > 1 ? bwt / T : NAN;
  out->bwt_rows = T > 1 ? rows / pairs : NAN;
  out->forgetting = T > 1 && isfinite(forgetting) ? forgetting / (T - 1) : NAN;
  out->forgetting_all = T > 1 && isfinite(all) ? all / (T - 1) : NAN;
  out->fwt = T > 1 ? fwt / (T - 1) : NAN;
  out->fwt_unseen = T > 1 ? unseen / pairs : NAN;
}

/* ---- inside tasks ---- */

static double turned(const esp_matrix *m, int task, double score) {
  return m->smaller_better[m->column[task]] ? -score : score;
}

int64_t esp_matrix_points(const esp_matrix *m, int task, esp_score_point *at) {
  int64_t n = 0;
  for (int row = 0; row <= m->tasks && m->column[task] >= 0; row++) {
    double v = *esp_matrix_cell(m, row, m->column[task]);
    if (!isnan(v)) at[n++] = (esp_score_point){row ? row - 1 : 0, row, v};
  }
  return n;
}

/* Largest rise of sign * score within `window` steps, from the state in which the task begins; NaN without a pair. */
static double largest_move(const esp_matrix *m, const esp_score_points *c, int task, double window, int sign) {
  double most = NAN;
  int64_t first = 0;
  while (first < c->n && c->at[first].task < task) first++;
  if (first > 0) first--; /* the end of the task before: what this one starts from */
  for (int64_t i = first; i < c->n; i++)
    for (int64_t k = i + 1; k < c->n && c->at[k].step - c->at[i].step <= window; k++) {
      double move = sign * (turned(m, task, c->at[k].score) - turned(m, task, c->at[i].score));
      if (!isnan(move) && !(move <= most)) most = move;
    }
  return most < 0 ? 0 : most;
}

/* min of A_t over the evaluations while tasks [from, to] were trained; NaN without one. */
static double least_in(const esp_matrix *m, const esp_score_points *c, int task, int from, int to) {
  double least = NAN;
  for (int64_t i = 0; i < c->n; i++)
    if (c->at[i].task >= from && c->at[i].task <= to && !(turned(m, task, c->at[i].score) >= least))
      least = turned(m, task, c->at[i].score);
  return least;
}

static double lesser(double a, double b) {
  return isnan(a) || isnan(b) ? NAN : a < b ? a : b;
}

void esp_curve_summarise(const esp_matrix *m, const esp_score_points *curves, double window, esp_curve_summary *out) {
  int T = m->tasks;
  double min_acc = 0, wf = 0, wp = 0, gap = 0;
  *out = (esp_curve_summary){NAN, NAN, NAN, NAN, NAN, 0};
  for (int t = 0; t < T; t++)
    if (m->column[t] < 0) return;
  for (int t = 0; t < T; t++) {
    const esp_score_points *c = &curves[t];
    if (t + 1 < T) min_acc += least_in(m, c, t, t + 1, T - 1);
    wf += largest_move(m, c, t, window, -1);
    wp += largest_move(m, c, t, window, 1);
    for (int i = t + 1; i < T; i++) { /* row i is the state before task i, row i + 1 after it */
      double ends = lesser(esp_matrix_own(m, i, t), esp_matrix_own(m, i + 1, t));
      gap += ends - lesser(ends, least_in(m, c, t, i, i));
    }
    for (int64_t i = 0; i < c->n; i++) out->inside += i + 1 < c->n && c->at[i].task == c->at[i + 1].task;
    out->inside -= c->n > 1 && c->at[0].step == 0 && c->at[1].task == 0; /* row 0 */
  }
  if (T == 0) return;
  out->wf = wf / T;
  out->wp = wp / T;
  if (T < 2) return;
  out->min_acc = min_acc / (T - 1);
  out->wc_acc = esp_matrix_own(m, T, T - 1) / T + (1 - 1.0 / T) * out->min_acc;
  out->gap = gap / (T * (T - 1) / 2.0);
}

/* ---- against other runs ---- */

static double reference(const esp_matrix *m, int task, const esp_matrix *const *others, int n) {
  const char *name = m->set_name[m->column[task]];
  double found = NAN;
  for (int pass = 0; pass < 2 && isnan(found); pass++) /* first where it is a task's own set */
    for (int o = 0; o < n && isnan(found); o++)
      for (int s = 0; s < others[o]->sets && isnan(found); s++)
        if (!strcmp(others[o]->set_name[s], name) && (pass || !esp_matrix_is_probe(others[o], s)))
          found = *esp_matrix_cell(others[o], others[o]->tasks, s);
  return turned(m, task, found);
}

void esp_reference_summarise(const esp_matrix *m, const esp_matrix *const *others, int n, esp_reference_summary *out) {
  double learning = 0, last = 0;
  for (int t = 0; t < m->tasks; t++) {
    double s = m->column[t] >= 0 ? reference(m, t, others, n) : NAN;
    learning += esp_matrix_own(m, t + 1, t) - s;
    last += esp_matrix_own(m, m->tasks, t) - s;
  }
  out->learning_gap = m->tasks ? learning / m->tasks : NAN;
  out->final_gap = m->tasks ? last / m->tasks : NAN;
}
