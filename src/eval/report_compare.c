/* report_compare.c: the page about several runs, and the runs of a sweep. */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "eval/html.h"
#include "eval/report.h"
#include "io/file.h"

/* ---- the runs of a sweep ---- */

void esp_sweep_deinit(esp_sweep *s) {
  for (int i = 0; s->dirs && i < s->n; i++) esp_mem_free(s->dirs[i]);
  esp_mem_free(s->dirs);
  esp_mem_free(s->runs);
  json_decref(s->json);
  *s = (esp_sweep){0};
}

esp_status esp_sweep_read(const char *dir, esp_sweep *out) {
  esp_status st;
  char path[PATH_MAX], moved[PATH_MAX], name[PATH_MAX];
  *out = (esp_sweep){0};
  esp_path_join(path, sizeof path, dir, "sweep.json");
  ESP_GOTO(esp_json_load(path, &out->json));
  json_t *runs = json_object_get(out->json, "runs");
  int n = (int)json_array_size(runs);
  if (n == 0) {
    st = esp_fail(ESP_ERR_DATA, "%s: names no runs", path);
    goto out;
  }
  out->dirs = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *out->dirs);
  out->runs = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *out->runs);
  if (!out->dirs || !out->runs) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  out->n = n;
  for (int i = 0; i < n; i++) {
    const json_t *r = json_array_get(runs, (size_t)i);
    const char *where, *variant, *order;
    int64_t seed;
    ESP_GOTO(esp_json_str(r, "dir", path, 1, &where));
    ESP_GOTO(esp_json_str(r, "variant", path, 1, &variant));
    ESP_GOTO(esp_json_str(r, "order", path, 1, &order));
    ESP_GOTO(esp_json_i64(r, "seed", path, 1, &seed));
    esp_path_join(moved, sizeof moved, dir, esp_html_base_name(where, name, sizeof name));
    out->dirs[i] = esp_mem_strdup(ESP_MEM_HOST, esp_dir_exists(moved) ? moved : where);
    if (!out->dirs[i]) {
      st = ESP_ERR_MEMORY;
      goto out;
    }
    out->runs[i] = (esp_compared){.dir = out->dirs[i], .variant = variant, .order = order, .seed = seed};
    ESP_GOTO(esp_compared_read(&out->runs[i]));
  }
out:
  if (st != ESP_OK) esp_sweep_deinit(out);
  return st;
}

/* ---- the page ---- */

typedef struct page {
  const esp_compared *runs;
  int n;
  esp_matrix **matrix; /* [n]; NULL: not finished, or none */
  int first[256];      /* the first run of each variant */
  int n_variants;
} page;

static bool same_variant(const page *p, int run, int variant) {
  return !strcmp(p->runs[run].variant, p->runs[p->first[variant]].variant);
}

static void find_variants(page *p) {
  for (int i = 0; i < p->n; i++) {
    bool known = false;
    for (int v = 0; v < p->n_variants; v++) known |= same_variant(p, i, v);
    if (!known && p->n_variants < 256) p->first[p->n_variants++] = i;
  }
}

static const char *variant_name(const page *p, int v) {
  return p->runs[p->first[v]].variant;
}

static double held(const esp_compared *r) {
  return (r->value[ESP_MEASURE_ADAPTER] + r->value[ESP_MEASURE_OPTIM] + r->value[ESP_MEASURE_STRATEGY]) / 1048576;
}

static void scatter(esp_strbuf *b, const page *p, esp_measure y, const char *caption) {
  esp_html_point points[256];
  for (int v = 0; v < p->n_variants; v++) {
    double bytes = 0;
    int n = 0;
    for (int i = 0; i < p->n; i++)
      if (same_variant(p, i, v) && p->runs[i].finished && !isnan(held(&p->runs[i]))) bytes += held(&p->runs[i]), n++;
    esp_spread s = esp_compare_spread(p->runs, p->n, variant_name(p, v), NULL, y);
    points[v] = (esp_html_point){variant_name(p, v), n ? bytes / n : NAN, s.mean, s.sd, v % ESP_HTML_COLORS};
  }
  esp_html_scatter(b, caption, "MiB of adapter, optimizer and strategies", esp_measure_label(y), points, p->n_variants);
}

/* After task k, the mean over its tasks so far and over the variant's runs. */
static void anytime_chart(esp_strbuf *b, const page *p) {
  esp_html_line lines[256];
  double(*x)[64] = esp_mem_alloc(ESP_MEM_HOST, (size_t)p->n_variants * sizeof *x);
  double(*y)[64] = esp_mem_alloc(ESP_MEM_HOST, (size_t)p->n_variants * sizeof *y);
  for (int v = 0; x && y && v < p->n_variants; v++) {
    int most = 0;
    for (int i = 0; i < p->n; i++)
      if (same_variant(p, i, v) && p->matrix[i] && p->matrix[i]->tasks > most) most = p->matrix[i]->tasks;
    if (most > 64) most = 64;
    for (int k = 0; k < most; k++) {
      double sum = 0;
      int n = 0;
      for (int i = 0; i < p->n; i++) {
        const esp_matrix *m = same_variant(p, i, v) ? p->matrix[i] : NULL;
        for (int t = 0; m && k < m->tasks && t <= k; t++) sum += esp_matrix_own(m, k + 1, t), n++;
      }
      x[v][k] = k + 1;
      y[v][k] = n ? sum / n : NAN;
    }
    lines[v] = (esp_html_line){
        .name = variant_name(p, v), .x = x[v], .y = y[v], .n = most, .color = v % ESP_HTML_COLORS, .dots = true};
  }
  esp_html_chart chart = {.caption = "Mean score on the tasks so far, after each task (mean over the runs)",
                          .lines = lines,
                          .n_lines = p->n_variants,
                          .legend = true,
                          .x_name = "task"};
  if (x && y)
    esp_html_chart_put(b, &chart);
  else
    b->failed = true;
  esp_mem_free(x);
  esp_mem_free(y);
}

static bool same_shape(const esp_matrix *a, const esp_matrix *b) {
  bool same = a->tasks == b->tasks && a->sets == b->sets && a->joint == b->joint;
  for (int t = 0; same && t < a->tasks; t++) same = !strcmp(a->task_name[t], b->task_name[t]);
  for (int s = 0; same && s < a->sets; s++) same = !strcmp(a->set_name[s], b->set_name[s]);
  return same;
}

/* The mean matrix of a variant over the runs of its first order. */
static void mean_matrix(esp_strbuf *b, const page *p, int v) {
  int first = -1, n = 0;
  for (int i = 0; i < p->n && first < 0; i++)
    if (same_variant(p, i, v) && p->matrix[i]) first = i;
  if (first < 0) return;
  esp_matrix *mean;
  const esp_matrix *like = p->matrix[first];
  if (esp_matrix_like(like, &mean) != ESP_OK) {
    b->failed = true;
    return;
  }
  int cells = (like->tasks + 1) * like->sets;
  for (int k = 0; k < cells; k++) mean->score[k] = 0;
  for (int i = 0; i < p->n; i++) {
    if (!same_variant(p, i, v) || !p->matrix[i] || !same_shape(p->matrix[i], like)) continue;
    for (int k = 0; k < cells; k++) mean->score[k] += p->matrix[i]->score[k];
    n++;
  }
  for (int k = 0; k < cells; k++) mean->score[k] /= n;
  esp_strbuf_puts(b, "<h3>");
  esp_html_text(b, variant_name(p, v));
  esp_strbuf_puts(b, "</h3><p>");
  if (*p->runs[first].order) {
    esp_strbuf_puts(b, "order ");
    esp_html_text(b, p->runs[first].order);
    esp_strbuf_puts(b, ", ");
  }
  esp_strbuf_printf(b, "mean of %d run%s</p>", n, n == 1 ? "" : "s");
  esp_html_matrix(b, mean);
  esp_matrix_destroy(mean);
}

esp_status esp_report_compare_write(const esp_compared *runs, int n, const char *title, const char *out) {
  esp_status st = ESP_OK;
  page p = {.runs = runs, .n = n};
  char path[PATH_MAX], count[32];
  int finished = 0;
  esp_strbuf b;
  esp_strbuf_init(&b);
  p.matrix = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *p.matrix);
  if (!p.matrix) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  find_variants(&p);
  for (int i = 0; i < n; i++) {
    finished += runs[i].finished;
    if (runs[i].finished && esp_file_exists(esp_path_join(path, sizeof path, runs[i].dir, "matrix.json")))
      ESP_GOTO(esp_matrix_load(path, &p.matrix[i]));
  }
  esp_html_begin(&b, title);
  esp_strbuf_puts(&b, "<div class=facts>");
  snprintf(count, sizeof count, "%d", p.n_variants);
  esp_html_fact(&b, "variants", count);
  snprintf(count, sizeof count, finished == n ? "%d" : "%d of %d", finished, n);
  esp_html_fact(&b, "runs finished", count);
  esp_strbuf_puts(&b, "</div><h2>Variants</h2>");
  esp_compare_html(runs, n, &b);
  esp_strbuf_puts(&b, "<h2>Forgetting against memory</h2>");
  scatter(&b, &p, ESP_MEASURE_FORGETTING, "Forgetting (lower is better); whiskers: sample standard deviation");
  scatter(&b, &p, ESP_MEASURE_ACC, "ACC (higher is better)");
  esp_strbuf_puts(&b, "<h2>After each task</h2>");
  anytime_chart(&b, &p);
  esp_strbuf_puts(&b, "<h2>Score matrices</h2>");
  for (int v = 0; v < p.n_variants; v++) mean_matrix(&b, &p, v);
  esp_html_end(&b);
  st = b.failed ? ESP_ERR_MEMORY : esp_file_write_atomic(out, b.data, b.len);
out:
  for (int i = 0; p.matrix && i < n; i++) esp_matrix_destroy(p.matrix[i]);
  esp_mem_free(p.matrix);
  esp_strbuf_deinit(&b);
  return st;
}
