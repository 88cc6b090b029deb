/* report.c: the page about one run. */
#include "eval/report.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "eval/html.h"
#include "eval/report_norms.h"
#include "eval/report_samples.h"
#include "eval/run_data.h"
#include "io/file.h"

static void facts(esp_strbuf *b, const esp_run_data *d, const esp_curve_summary *inside) {
  char v[48];
  esp_strbuf_puts(b, "<div class=facts>");
  snprintf(v, sizeof v, "%lld", (long long)d->n);
  esp_html_fact(b, "optimizer steps", v);
  if (d->n > 0) {
    snprintf(v, sizeof v, "%.4f", d->value[ESP_RUN_LOSS][d->n - 1]);
    esp_html_fact(b, "last loss", v);
  }
  if (d->tokens_per_second > 0) {
    snprintf(v, sizeof v, "%.0f", d->tokens_per_second);
    esp_html_fact(b, "tokens per second", v);
  }
  if (d->seconds > 0) {
    int t = (int)(d->seconds + 0.5);
    snprintf(v, sizeof v, "%02d:%02d:%02d", t / 3600, t / 60 % 60, t % 60);
    esp_html_fact(b, "training time", v);
  }
  if (d->memory > 0) {
    snprintf(v, sizeof v, "%.1f MiB", d->memory / (1 << 20));
    esp_html_fact(b, "peak memory", v);
  }
  if (d->matrix) {
    esp_matrix_summary x;
    esp_matrix_summarise(d->matrix, &x);
    esp_html_score(b, "ACC", x.acc, false);
    esp_html_score(b, "BWT", x.bwt, true);
    esp_html_score(b, "FWT", x.fwt, true);
    esp_html_score(b, "forgetting", x.forgetting, false);
    esp_html_score(b, "lowest", x.lowest, false);
    if (inside->inside > 0) {
      esp_html_score(b, "WC-ACC", inside->wc_acc, false);
      esp_html_score(b, "stability gap", inside->gap, false);
    }
  }
  esp_strbuf_puts(b, "</div>");
}

/* ---- scores over steps ---- */

static bool is_share(const esp_run_curve *c) {
  for (int64_t i = 0; i < c->n; i++)
    if (c->score[i] < 0 || c->score[i] > 1) return false;
  return true;
}

static esp_html_line line_of(const esp_run_curve *c, int color) {
  return (esp_html_line){.name = c->set, .x = c->step, .y = c->score, .n = c->n, .color = color, .dots = true};
}

static void score_charts(esp_strbuf *b, const esp_run_data *d) {
  esp_html_line lines[64];
  int n = 0;
  const esp_matrix *m = d->matrix;
  if (!m || d->n_curves == 0) return;
  esp_strbuf_puts(b, "<h2>Scores over steps</h2><p>Each mark is an evaluation; dashed: a new task begins. What falls "
                     "behind a switch and comes back is the stability gap.</p>");
  for (int t = 0; t < m->tasks && n < 64; t++) {
    const char *set = m->column[t] >= 0 ? m->set_name[m->column[t]] : NULL;
    const esp_run_curve *c = set ? esp_run_data_curve(d, set, m->set_metric[m->column[t]]) : NULL;
    if (c && !m->smaller_better[m->column[t]] && is_share(c)) lines[n++] = line_of(c, t % ESP_HTML_COLORS);
  }
  esp_html_chart chart = {.caption = "Score on each task's own set",
                          .lines = lines,
                          .n_lines = n,
                          .switches = d->switches,
                          .n_switches = d->n_switches,
                          .lo = 0,
                          .hi = 1,
                          .legend = true};
  esp_html_chart_put(b, &chart);
  for (int i = 0; i < d->n_curves; i++) {
    const esp_run_curve *c = &d->curves[i];
    bool shown = false;
    for (int k = 0; k < n; k++) shown |= lines[k].x == c->step;
    if (shown) continue;
    char caption[2 * ESP_MATRIX_NAME + 8];
    snprintf(caption, sizeof caption, "%s (%s)", c->set, c->metric);
    esp_html_line one = line_of(c, i % ESP_HTML_COLORS);
    esp_html_chart other = {
        .caption = caption, .lines = &one, .n_lines = 1, .switches = d->switches, .n_switches = d->n_switches};
    esp_html_chart_put(b, &other);
  }
}

/* ---- training ---- */

/* Means over `reach` steps to each side. */
static void smooth(const double *v, int64_t n, int64_t reach, double *out) {
  for (int64_t i = 0; i < n; i++) {
    int64_t a = i - reach < 0 ? 0 : i - reach, z = i + reach >= n ? n - 1 : i + reach;
    double sum = 0;
    for (int64_t k = a; k <= z; k++) sum += v[k];
    out[i] = sum / (double)(z - a + 1);
  }
}

static esp_status training_charts(esp_strbuf *b, const esp_run_data *d) {
  static const struct {
    int value;
    const char *caption;
  } charts[] = {{ESP_RUN_LOSS, "Loss per trained token"},
                {ESP_RUN_LR, "Learning rate"},
                {ESP_RUN_GRAD_NORM, "Gradient norm before clipping"}};
  if (d->n == 0) return ESP_OK;
  double *mean = esp_mem_alloc(ESP_MEM_HOST, (size_t)d->n * sizeof *mean);
  if (!mean) return ESP_ERR_MEMORY;
  esp_strbuf_puts(b, "<h2>Training</h2>");
  for (size_t i = 0; i < sizeof charts / sizeof *charts; i++) {
    const double *v = d->value[charts[i].value];
    int64_t reach = charts[i].value == ESP_RUN_LR ? 0 : d->n / 60;
    char caption[96];
    smooth(v, d->n, reach, mean);
    snprintf(caption, sizeof caption, "%s%s", charts[i].caption,
             reach > 0 ? " (faint: each step; line: running mean)" : "");
    esp_html_line lines[] = {{.name = "", .x = d->step, .y = v, .n = d->n, .faint = true},
                             {.name = "", .x = d->step, .y = mean, .n = d->n}};
    esp_html_chart chart = {.caption = caption,
                            .lines = reach > 0 ? lines : lines + 1,
                            .n_lines = reach > 0 ? 2 : 1,
                            .switches = d->switches,
                            .n_switches = d->n_switches};
    esp_html_chart_put(b, &chart);
  }
  esp_mem_free(mean);
  return ESP_OK;
}

/* ---- layers ---- */

static void norms_chart(esp_strbuf *b, const char *run_dir) {
  esp_layer_norms norms;
  if (esp_layer_norms_read(run_dir, &norms) != ESP_OK) return; /* no low-rank adapters in this run */
  esp_strbuf_puts(b, "<h2>Change per layer</h2><p>Frobenius norm of the adapter's weight change, all sites of a layer "
                     "together, after each task.</p>");
  double hi = 0;
  for (int i = 0; i < norms.adapters * norms.layers; i++) hi = fmax(hi, norms.value[i]);
  for (int a = 0; a < norms.adapters && hi > 0; a++) {
    esp_strbuf_puts(b, "<figure><div class=chart><svg viewBox=\"0 0 1000 92\" role=img aria-label=\"norm per layer\">");
    double w = 936.0 / norms.layers;
    for (int l = 0; l < norms.layers; l++) {
      double h = norms.value[a * norms.layers + l] / hi * 62;
      esp_strbuf_printf(
          b, "<rect class=bar x=%.1f y=%.1f width=%.1f height=%.1f rx=2><title>layer %d: %.4g</title></rect>",
          52 + l * w + w * 0.1, 68 - h, w * 0.8, h, l, norms.value[a * norms.layers + l]);
      if (norms.layers <= 40 || l % 10 == 0)
        esp_strbuf_printf(b, "<text x=%.1f y=84 text-anchor=middle>%d</text>", 52 + l * w + w / 2, l);
    }
    esp_strbuf_printf(b,
                      "<line class=grid x1=52 x2=988 y1=68 y2=68 /><text x=46 y=12 text-anchor=end>%.2g</text>"
                      "</svg></div><figcaption>",
                      hi);
    esp_html_text(b, norms.name[a]);
    esp_strbuf_puts(b, "</figcaption></figure>");
  }
  esp_layer_norms_deinit(&norms);
}

/* ---- samples ---- */

static void answer(esp_strbuf *b, const esp_sample_rows *s, int row, int i) {
  esp_strbuf_puts(b, "<td class=t>");
  const char *text = esp_sample_text(s, row, i, "answer");
  if (text)
    esp_html_cut(b, text, 300);
  else
    esp_strbuf_puts(b, "&ndash;");
  esp_strbuf_puts(b, "</td>");
}

static esp_status samples(esp_strbuf *b, const char *run_dir, const esp_matrix *m) {
  esp_sample_rows s;
  if (!m) return ESP_OK;
  ESP_TRY(esp_sample_rows_read(run_dir, m->tasks, &s));
  if (s.n == 0) goto out;
  esp_strbuf_puts(b, "<h2>Samples</h2><p>What the model answers, greedily, before and after each task and at the end."
                     "</p>");
  for (int t = 0; t < m->tasks; t++) {
    if (m->column[t] < 0) continue;
    bool head = false;
    for (int i = 0; i < s.n; i++) {
      const char *set = esp_sample_text(&s, -1, i, "set");
      if (!set || strcmp(set, m->set_name[m->column[t]]) != 0) continue;
      if (!head) {
        esp_strbuf_puts(b, "<h3>");
        esp_html_text(b, m->task_name[t]);
        esp_strbuf_puts(b, "</h3><div class=wide><table class=plain><tr><th class=l>prompt<th class=l>reference<th "
                           "class=l>before<th class=l>after<th class=l>at the end</tr>");
        head = true;
      }
      esp_strbuf_puts(b, "<tr><td class=t>");
      esp_html_cut(b, esp_sample_text(&s, -1, i, "prompt"), 400);
      esp_strbuf_puts(b, "</td><td class=t>");
      esp_html_cut(b, esp_sample_text(&s, -1, i, "reference"), 300);
      esp_strbuf_puts(b, "</td>");
      answer(b, &s, m->joint ? 0 : t, i);
      answer(b, &s, esp_matrix_row_of(m, t), i);
      answer(b, &s, m->tasks, i);
      esp_strbuf_puts(b, "</tr>");
    }
    if (head) esp_strbuf_puts(b, "</table></div>");
  }
out:
  esp_sample_rows_deinit(&s);
  return ESP_OK;
}

static void pre(esp_strbuf *b, const char *title, const esp_strbuf *text) {
  if (text->len == 0) return;
  esp_strbuf_puts(b, "<h2>");
  esp_html_text(b, title);
  esp_strbuf_puts(b, "</h2><pre>");
  esp_html_text(b, text->data);
  esp_strbuf_puts(b, "</pre>");
}

esp_status esp_report_write(const char *run_dir, const char *out) {
  esp_status st;
  esp_run_data d = {0};
  esp_curve_summary inside;
  esp_strbuf b, part;
  char path[PATH_MAX], name[PATH_MAX];
  esp_strbuf_init(&b);
  esp_strbuf_init(&part);
  ESP_GOTO(esp_run_data_read(run_dir, &d));
  ESP_GOTO(esp_run_data_inside(&d, ESP_RUN_WINDOW, &inside));
  esp_html_begin(&b, esp_html_base_name(run_dir, name, sizeof name));
  facts(&b, &d, &inside);
  if (d.matrix) {
    esp_strbuf_puts(&b, "<h2>Score matrix</h2><p>Rows: after training that task. Columns: evaluation sets. Outlined: a "
                        "task's own set right after it was trained.</p>");
    esp_html_matrix(&b, d.matrix);
  }
  score_charts(&b, &d);
  ESP_GOTO(training_charts(&b, &d));
  norms_chart(&b, run_dir);
  ESP_GOTO(samples(&b, run_dir, d.matrix));
  esp_run_data_memory(&d, &part);
  pre(&b, "Bytes held at most", &part);
  esp_strbuf_clear(&part);
  if (d.matrix)
    esp_matrix_render_text(d.matrix, &(esp_matrix_view){.formulas = true, .curve = &inside, .window = ESP_RUN_WINDOW},
                           &part);
  pre(&b, "Numbers and their formulas", &part);
  esp_html_end(&b);
  if (b.failed || part.failed) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  st = esp_file_write_atomic(out ? out : esp_path_join(path, sizeof path, run_dir, "report.html"), b.data, b.len);
out:
  esp_strbuf_deinit(&b);
  esp_strbuf_deinit(&part);
  esp_run_data_deinit(&d);
  return st;
}
