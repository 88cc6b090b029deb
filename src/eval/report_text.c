/* report_text.c: a run for the terminal: matrix and numbers, scores and loss over steps as lines of blocks, layers,
 * memory, answers. */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "eval/report.h"
#include "eval/report_norms.h"
#include "eval/report_samples.h"
#include "eval/run_data.h"
#include "io/file.h"

enum { WIDTH = 64 };

static const char *const blocks[] = {"\u2581", "\u2582", "\u2583", "\u2584", "\u2585", "\u2586", "\u2587", "\u2588"};

static int block_of(double v, double lo, double hi) {
  int k = hi > lo ? (int)((v - lo) / (hi - lo) * 7.999) : 0;
  return k < 0 ? 0 : k > 7 ? 7 : k;
}

/* Columns of equal width in steps; each shows the last value in it, or the one before; `low`: the lowest, so that what
 * falls and recovers within a column is seen. A bar stands where a task begins. */
static void line(esp_strbuf *out, const esp_run_data *d, const char *name, const double *x, const double *y, int64_t n,
                 double x1, double lo, double hi, bool low) {
  double cell[WIDTH];
  bool begins[WIDTH] = {0};
  for (int k = 0; k < WIDTH; k++) cell[k] = NAN;
  for (int64_t i = 0; i < n; i++) {
    int k = x1 > 0 ? (int)(x[i] / x1 * (WIDTH - 1)) : 0;
    if (isnan(y[i]) || k < 0 || k >= WIDTH) continue;
    if (isnan(cell[k]) || !low || y[i] < cell[k]) cell[k] = y[i];
  }
  for (int s = 1; s < d->n_switches; s++) begins[x1 > 0 ? (int)(d->switches[s].step / x1 * (WIDTH - 1)) : 0] = true;
  esp_strbuf_printf(out, "%-16.16s ", name);
  double last = NAN;
  for (int k = 0; k < WIDTH; k++) {
    if (begins[k]) esp_strbuf_putc(out, '|');
    if (!isnan(cell[k])) last = cell[k];
    esp_strbuf_puts(out, isnan(last) ? " " : blocks[block_of(last, lo, hi)]);
  }
  esp_strbuf_printf(out, " %.4g to %.4g\n", lo, hi);
}

static void range(const double *y, int64_t n, double *lo, double *hi) {
  *lo = INFINITY, *hi = -INFINITY;
  for (int64_t i = 0; i < n; i++)
    if (!isnan(y[i])) *lo = fmin(*lo, y[i]), *hi = fmax(*hi, y[i]);
}

static void curves(esp_strbuf *out, const esp_run_data *d) {
  double lo, hi, x1 = d->n > 0 ? d->step[d->n - 1] : 0;
  if (d->n == 0) return;
  esp_strbuf_printf(out, "\nover %.0f steps (|: a task begins; scores: the lowest in each column)\n", x1);
  range(d->value[ESP_RUN_LOSS], d->n, &lo, &hi);
  if (hi >= lo) line(out, d, "loss", d->step, d->value[ESP_RUN_LOSS], d->n, x1, lo, hi, false);
  for (int c = 0; c < d->n_curves; c++) {
    const esp_run_curve *v = &d->curves[c];
    range(v->score, v->n, &lo, &hi);
    if (!(hi >= lo)) continue;
    if (lo >= 0 && hi <= 1) lo = 0, hi = 1;
    line(out, d, v->set, v->step, v->score, v->n, x1, lo, hi, true);
  }
}

static void layers(esp_strbuf *out, const char *run_dir) {
  esp_layer_norms norms;
  double hi = 0;
  if (esp_layer_norms_read(run_dir, &norms) != ESP_OK) return;
  for (int i = 0; i < norms.adapters * norms.layers; i++) hi = fmax(hi, norms.value[i]);
  esp_strbuf_printf(out, "\nchange per layer, 0 to %.3g\n", hi);
  for (int a = 0; a < norms.adapters; a++) {
    esp_strbuf_printf(out, "%-16.16s ", norms.name[a]);
    for (int l = 0; l < norms.layers; l++)
      esp_strbuf_puts(out, blocks[block_of(norms.value[a * norms.layers + l], 0, hi)]);
    esp_strbuf_putc(out, '\n');
  }
  esp_layer_norms_deinit(&norms);
}

/* One line of at most so many bytes. */
static void quoted(esp_strbuf *out, const char *label, const char *text) {
  size_t n = text ? strlen(text) : 0, most = 160;
  bool cut = n > most;
  if (!text) return;
  if (cut)
    for (n = most; n > 0 && ((unsigned char)text[n] & 0xC0) == 0x80;) n--;
  esp_strbuf_printf(out, "  %-10s ", label);
  for (size_t i = 0; i < n; i++) esp_strbuf_putc(out, (unsigned char)text[i] < 0x20 ? ' ' : text[i]);
  esp_strbuf_puts(out, cut ? "...\n" : "\n");
}

static esp_status samples(esp_strbuf *out, const char *run_dir, const esp_matrix *m) {
  esp_sample_rows s;
  if (!m) return ESP_OK;
  ESP_TRY(esp_sample_rows_read(run_dir, m->tasks, &s));
  for (int t = 0; t < m->tasks; t++)
    for (int i = 0; i < s.n; i++) {
      const char *set = esp_sample_text(&s, -1, i, "set");
      if (m->column[t] < 0 || !set || strcmp(set, m->set_name[m->column[t]]) != 0) continue;
      esp_strbuf_printf(out, "\n%s\n", m->task_name[t]);
      quoted(out, "prompt", esp_sample_text(&s, -1, i, "prompt"));
      quoted(out, "reference", esp_sample_text(&s, -1, i, "reference"));
      quoted(out, "before", esp_sample_text(&s, m->joint ? 0 : t, i, "answer"));
      quoted(out, "after", esp_sample_text(&s, esp_matrix_row_of(m, t), i, "answer"));
      quoted(out, "at the end", esp_sample_text(&s, m->tasks, i, "answer"));
    }
  esp_sample_rows_deinit(&s);
  return ESP_OK;
}

esp_status esp_report_text(const char *run_dir, esp_strbuf *out) {
  esp_status st;
  esp_run_data d = {0};
  esp_curve_summary inside;
  ESP_GOTO(esp_run_data_read(run_dir, &d));
  ESP_GOTO(esp_run_data_inside(&d, ESP_RUN_WINDOW, &inside));
  if (d.matrix) esp_matrix_render_text(d.matrix, &(esp_matrix_view){.curve = &inside, .window = ESP_RUN_WINDOW}, out);
  curves(out, &d);
  layers(out, run_dir);
  if (d.result && json_object_get(d.result, "memory")) {
    esp_strbuf_puts(out, "\nbytes held at most (strategies: at the end)\n");
    esp_run_data_memory(&d, out);
  }
  ESP_GOTO(samples(out, run_dir, d.matrix));
  if (out->failed) st = ESP_ERR_MEMORY;
out:
  esp_run_data_deinit(&d);
  return st;
}
