#include "eval/compare.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "eval/html.h"
#include "eval/run_data.h"
#include "io/file.h"

enum { SCORE, SIGNED, COUNT, BYTES, SECONDS };
static const struct {
  const char *key, *label;
  int unit;
} measures[ESP_MEASURES] = {
    [ESP_MEASURE_ACC] = {"acc", "ACC", SCORE},
    [ESP_MEASURE_BWT] = {"bwt", "BWT", SIGNED},
    [ESP_MEASURE_FWT] = {"fwt", "FWT", SIGNED},
    [ESP_MEASURE_FORGETTING] = {"forgetting", "forgetting", SCORE},
    [ESP_MEASURE_LEARNING] = {"learning_acc", "learning", SCORE},
    [ESP_MEASURE_LOWEST] = {"lowest", "lowest", SCORE},
    [ESP_MEASURE_BWT_TRACE] = {"bwt_trace", "BWT (trace)", SIGNED},
    [ESP_MEASURE_ANYTIME] = {"anytime_acc", "anytime", SCORE},
    [ESP_MEASURE_MIN_ACC] = {"min_acc", "min-ACC", SCORE},
    [ESP_MEASURE_WC_ACC] = {"wc_acc", "WC-ACC", SCORE},
    [ESP_MEASURE_WF] = {"wf", "WF", SCORE},
    [ESP_MEASURE_WP] = {"wp", "WP", SCORE},
    [ESP_MEASURE_GAP] = {"gap", "gap", SCORE},
    [ESP_MEASURE_TRAINED] = {"trainable", "trained", COUNT},
    [ESP_MEASURE_ADAPTER] = {"adapter_bytes", "adapter", BYTES},
    [ESP_MEASURE_OPTIM] = {"optim_bytes", "optimizer", BYTES},
    [ESP_MEASURE_STRATEGY] = {"strategy_bytes", "strategy", BYTES},
    [ESP_MEASURE_MEMORY] = {"memory_peak", "memory", BYTES},
    [ESP_MEASURE_STEP] = {"step_seconds", "step", SECONDS},
    [ESP_MEASURE_SECONDS] = {"seconds", "run", SECONDS},
};

const char *esp_measure_key(esp_measure m) {
  return measures[m].key;
}
const char *esp_measure_label(esp_measure m) {
  return measures[m].label;
}

esp_status esp_compared_read(esp_compared *run) {
  char path[PATH_MAX];
  esp_run_data d;
  esp_status st;
  run->finished = false;
  for (int m = 0; m < ESP_MEASURES; m++) run->value[m] = NAN;
  if (!esp_file_exists(esp_path_join(path, sizeof path, run->dir, "result.json"))) return ESP_OK;
  ESP_TRY(esp_run_data_read(run->dir, &d));
  run->finished = true;
  double *v = run->value, device = esp_run_data_result(&d, "device_peak");
  v[ESP_MEASURE_TRAINED] = esp_run_data_result(&d, "trainable");
  v[ESP_MEASURE_MEMORY] = device > 0 ? device : esp_run_data_result(&d, "memory_peak");
  v[ESP_MEASURE_ADAPTER] = esp_run_data_result(&d, "memory.params");
  v[ESP_MEASURE_OPTIM] = esp_run_data_result(&d, "memory.optim");
  v[ESP_MEASURE_STRATEGY] = esp_run_data_strategies(&d);
  v[ESP_MEASURE_STEP] = esp_run_data_step_seconds(&d);
  v[ESP_MEASURE_SECONDS] = esp_run_data_result(&d, "seconds");
  esp_curve_summary c;
  st = esp_run_data_inside(&d, ESP_RUN_WINDOW, &c);
  v[ESP_MEASURE_MIN_ACC] = c.min_acc;
  v[ESP_MEASURE_WC_ACC] = c.wc_acc;
  v[ESP_MEASURE_WF] = c.wf;
  v[ESP_MEASURE_WP] = c.wp;
  v[ESP_MEASURE_GAP] = c.gap;
  if (d.matrix) {
    esp_matrix_summary s;
    esp_matrix_summarise(d.matrix, &s);
    v[ESP_MEASURE_ACC] = s.acc;
    v[ESP_MEASURE_BWT] = s.bwt;
    v[ESP_MEASURE_FWT] = s.fwt;
    v[ESP_MEASURE_FORGETTING] = s.forgetting;
    v[ESP_MEASURE_LEARNING] = s.learning_acc;
    v[ESP_MEASURE_LOWEST] = s.lowest;
    v[ESP_MEASURE_BWT_TRACE] = s.bwt_trace;
    v[ESP_MEASURE_ANYTIME] = s.anytime_acc;
  }
  esp_run_data_deinit(&d);
  return st;
}

/* ---- spread ---- */

typedef struct sums { /* Welford, so that equal values have spread 0 exactly */
  int n;
  double mean, m2;
} sums;

static void add(sums *s, double v) {
  if (isnan(v)) return;
  double delta = v - s->mean;
  s->n++;
  s->mean += delta / s->n;
  s->m2 += delta * (v - s->mean);
}

static esp_spread spread(const sums *s) {
  return (esp_spread){s->n, s->n > 0 ? s->mean : NAN, s->n > 1 ? sqrt(s->m2 / (s->n - 1)) : NAN};
}

esp_spread esp_compare_spread(const esp_compared *runs, int n, const char *variant, const char *order, esp_measure m) {
  sums s = {0};
  for (int i = 0; i < n; i++)
    if (runs[i].finished && !strcmp(runs[i].variant, variant) && (!order || !strcmp(runs[i].order, order)))
      add(&s, runs[i].value[m]);
  return spread(&s);
}

esp_spread esp_compare_pairs(const esp_compared *runs, int n, const char *variant, const char *base, esp_measure m) {
  sums s = {0};
  for (int i = 0; i < n; i++) {
    if (!runs[i].finished || strcmp(runs[i].variant, variant) != 0) continue;
    for (int k = 0; k < n; k++)
      if (runs[k].finished && !strcmp(runs[k].variant, base) && !strcmp(runs[k].order, runs[i].order) &&
          runs[k].seed == runs[i].seed)
        add(&s, runs[i].value[m] - runs[k].value[m]);
  }
  return spread(&s);
}

/* Whether run i is the first of its variant (or order). */
static bool first_variant(const esp_compared *runs, int i) {
  for (int k = 0; k < i; k++)
    if (!strcmp(runs[k].variant, runs[i].variant)) return false;
  return true;
}
static bool first_order(const esp_compared *runs, int i) {
  for (int k = 0; k < i; k++)
    if (!strcmp(runs[k].order, runs[i].order)) return false;
  return true;
}

/* ---- tables: cells of text, then aligned or with bars ---- */

enum { MAX_COLUMNS = ESP_MEASURES + 6, CELL = 64 };
typedef struct table {
  char (*cell)[MAX_COLUMNS][CELL]; /* [rows], row 0: the head */
  int rows, columns, names;        /* names: the first columns are text, to the left */
} table;

static void show(char out[CELL], const esp_spread *s, int unit, bool difference) {
  double scale = 1;
  const char *suffix = "";
  int digits = 3;
  if (s->n == 0) {
    snprintf(out, CELL, "-");
    return;
  }
  double size = fabs(s->mean);
  if (unit == BYTES)
    scale = 1.0 / 1048576, suffix = " MiB", digits = 2;
  else if (unit == COUNT)
    digits = 0;
  else if (unit == SECONDS && size < 1)
    scale = 1e3, suffix = " ms", digits = 2;
  else if (unit == SECONDS)
    suffix = " s", digits = 2;
  const char *sign = (difference || unit == SIGNED) && s->mean >= 0 ? "+" : "";
  if (isnan(s->sd) || (unit == COUNT && s->sd == 0) || unit == BYTES)
    snprintf(out, CELL, "%s%.*f%s", sign, digits, s->mean * scale, suffix);
  else
    snprintf(out, CELL, "%s%.*f ±%.*f%s", sign, digits, s->mean * scale, digits, s->sd * scale, suffix);
}

/* Characters, not bytes: the cells hold "±" and names in UTF-8. */
static int width_of(const char *s) {
  int n = 0;
  for (; *s; s++) n += ((unsigned char)*s & 0xC0) != 0x80;
  return n;
}

enum { PLAIN, MARKDOWN, HTML };

static void render_html(const table *t, esp_strbuf *out) {
  esp_strbuf_puts(out, "<div class=wide><table class=plain>");
  for (int r = 0; r < t->rows; r++) {
    esp_strbuf_puts(out, "<tr>");
    for (int c = 0; c < t->columns; c++) {
      esp_strbuf_puts(out, r == 0 ? "<th" : "<td");
      esp_strbuf_puts(out, c < t->names ? " class=l>" : ">");
      esp_html_text(out, t->cell[r][c]);
      esp_strbuf_puts(out, r == 0 ? "</th>" : "</td>");
    }
    esp_strbuf_puts(out, "</tr>");
  }
  esp_strbuf_puts(out, "</table></div>");
}

static void render(const table *t, int form, esp_strbuf *out) {
  bool markdown = form == MARKDOWN;
  if (form == HTML) {
    render_html(t, out);
    return;
  }
  int width[MAX_COLUMNS] = {0};
  for (int c = 0; c < t->columns; c++)
    for (int r = 0; r < t->rows; r++)
      width[c] = width_of(t->cell[r][c]) > width[c] ? width_of(t->cell[r][c]) : width[c];
  for (int r = 0; r < t->rows; r++) {
    for (int c = 0; c < t->columns; c++) {
      const char *cell = t->cell[r][c];
      int pad = width[c] - width_of(cell);
      esp_strbuf_puts(out, markdown ? (c ? " | " : "| ") : c ? "  " : "");
      if (c < t->names) esp_strbuf_puts(out, cell);
      esp_strbuf_printf(out, "%*s", pad, "");
      if (c >= t->names) esp_strbuf_puts(out, cell);
    }
    esp_strbuf_puts(out, markdown ? " |\n" : "\n");
    if (r > 0 || !markdown) continue;
    for (int c = 0; c < t->columns; c++) esp_strbuf_printf(out, "%s%s", c ? "" : "|", c < t->names ? "---|" : "---:|");
    esp_strbuf_putc(out, '\n');
  }
}

static char *next_cell(table *t, int row) {
  return t->cell[row][t->columns++];
}

static void by_variant(const esp_compared *runs, int n, table *t) {
  static const esp_measure shown[] = {
      ESP_MEASURE_ACC,      ESP_MEASURE_BWT,     ESP_MEASURE_FWT,    ESP_MEASURE_FORGETTING, ESP_MEASURE_LEARNING,
      ESP_MEASURE_LOWEST,   ESP_MEASURE_WC_ACC,  ESP_MEASURE_MEMORY, ESP_MEASURE_ADAPTER,    ESP_MEASURE_OPTIM,
      ESP_MEASURE_STRATEGY, ESP_MEASURE_TRAINED, ESP_MEASURE_STEP};
  t->rows = 1;
  t->names = 1;
  for (int i = 0; i < n; i++) {
    if (!first_variant(runs, i)) continue;
    const char *variant = runs[i].variant, *base = runs[0].variant;
    for (int row = t->rows == 1 ? 0 : t->rows; row <= t->rows; row++) { /* the head beside the first */
      bool head = row == 0;
      int done = 0, all = 0;
      t->columns = 0;
      for (int k = 0; k < n; k++)
        if (!strcmp(runs[k].variant, variant)) all++, done += runs[k].finished;
      snprintf(next_cell(t, row), CELL, "%.60s", head ? "variant" : variant);
      if (head)
        snprintf(next_cell(t, row), CELL, "runs");
      else
        snprintf(next_cell(t, row), CELL, done == all ? "%d" : "%d of %d", done, all);
      for (size_t c = 0; c < sizeof shown / sizeof *shown; c++) {
        esp_spread s = esp_compare_spread(runs, n, variant, NULL, shown[c]);
        char *cell = next_cell(t, row);
        if (head)
          snprintf(cell, CELL, "%s", measures[shown[c]].label);
        else
          show(cell, &s, measures[shown[c]].unit, false);
        if (shown[c] == ESP_MEASURE_ACC) {
          s = esp_compare_pairs(runs, n, variant, base, ESP_MEASURE_ACC);
          cell = next_cell(t, row);
          if (head)
            snprintf(cell, CELL, "paired ACC");
          else if (!strcmp(variant, base))
            snprintf(cell, CELL, "-");
          else
            show(cell, &s, SCORE, true);
        }
        if (shown[c] == ESP_MEASURE_STEP) {
          double own = s.mean, first = esp_compare_spread(runs, n, base, NULL, ESP_MEASURE_STEP).mean;
          cell = next_cell(t, row);
          if (head)
            snprintf(cell, CELL, "step x");
          else if (isnan(own / first))
            snprintf(cell, CELL, "-");
          else
            snprintf(cell, CELL, "%.3f", own / first);
        }
      }
    }
    t->rows++;
  }
}

static void by_order(const esp_compared *runs, int n, table *t) {
  static const esp_measure shown[] = {ESP_MEASURE_ACC, ESP_MEASURE_BWT, ESP_MEASURE_FORGETTING};
  t->rows = 1;
  t->names = 2;
  for (int o = 0; o < n; o++)
    for (int i = 0; i < n && first_order(runs, o); i++) {
      if (!first_variant(runs, i)) continue;
      for (int row = t->rows == 1 ? 0 : t->rows; row <= t->rows; row++) {
        t->columns = 0;
        snprintf(next_cell(t, row), CELL, "%.60s", row ? runs[o].order : "order");
        snprintf(next_cell(t, row), CELL, "%.60s", row ? runs[i].variant : "variant");
        for (size_t c = 0; c < sizeof shown / sizeof *shown; c++) {
          esp_spread s = esp_compare_spread(runs, n, runs[i].variant, runs[o].order, shown[c]);
          char *cell = next_cell(t, row);
          if (row)
            show(cell, &s, measures[shown[c]].unit, false);
          else
            snprintf(cell, CELL, "%s", measures[shown[c]].label);
        }
      }
      t->rows++;
    }
}

static void tables(const esp_compared *runs, int n, int form, esp_strbuf *out) {
  int variants = 0, orders = 0;
  for (int i = 0; i < n; i++) variants += first_variant(runs, i), orders += first_order(runs, i);
  if (n == 0) return;
  table t = {.cell = esp_mem_alloc(ESP_MEM_HOST, (size_t)(variants * orders + 1) * sizeof *t.cell)};
  if (!t.cell) {
    out->failed = true;
    return;
  }
  by_variant(runs, n, &t);
  render(&t, form, out);
  esp_strbuf_puts(out, form == HTML ? "<p>" : form == MARKDOWN ? "\n" : "");
  esp_strbuf_puts(out, "mean ± sample standard deviation over the runs; paired: to ");
  if (form == HTML)
    esp_html_text(out, runs[0].variant);
  else
    esp_strbuf_puts(out, runs[0].variant);
  esp_strbuf_puts(out, ", run by run of the same order and seed; step: median of a run");
  esp_strbuf_puts(out, form == HTML ? "</p>" : "\n");
  if (orders > 1) {
    if (form != HTML) esp_strbuf_putc(out, '\n');
    by_order(runs, n, &t);
    render(&t, form, out);
  }
  esp_mem_free(t.cell);
}

void esp_compare_table(const esp_compared *runs, int n, bool markdown, esp_strbuf *out) {
  tables(runs, n, markdown ? MARKDOWN : PLAIN, out);
}

void esp_compare_html(const esp_compared *runs, int n, esp_strbuf *out) {
  tables(runs, n, HTML, out);
}

/* ---- JSON ---- */

static json_t *real(double v) {
  return isfinite(v) ? json_real(v) : json_null();
}

static json_t *spread_json(const esp_spread *s) {
  return json_pack("{s:i,s:o,s:o}", "n", s->n, "mean", real(s->mean), "sd", real(s->sd));
}

json_t *esp_compare_json(const esp_compared *runs, int n) {
  json_t *all = json_array(), *variants = json_array(), *j = json_object();
  for (int i = 0; i < n; i++) {
    const esp_compared *r = &runs[i];
    json_t *run = json_pack("{s:s,s:s,s:s,s:I,s:b}", "dir", r->dir, "variant", r->variant, "order", r->order, "seed",
                            (json_int_t)r->seed, "finished", (int)r->finished);
    for (int m = 0; m < ESP_MEASURES && r->finished; m++) json_object_set_new(run, measures[m].key, real(r->value[m]));
    json_array_append_new(all, run);
    if (!first_variant(runs, i)) continue;
    json_t *v = json_pack("{s:s}", "name", r->variant), *paired = json_object();
    for (int m = 0; m < ESP_MEASURES; m++) {
      esp_spread s = esp_compare_spread(runs, n, r->variant, NULL, m);
      json_object_set_new(v, measures[m].key, spread_json(&s));
      s = esp_compare_pairs(runs, n, r->variant, runs[0].variant, m);
      json_object_set_new(paired, measures[m].key, spread_json(&s));
    }
    json_object_set_new(v, "paired", paired);
    json_array_append_new(variants, v);
  }
  json_object_set_new(j, "runs", all);
  if (json_object_set_new(j, "variants", variants) != 0 || json_array_size(all) != (size_t)n) {
    json_decref(j);
    return NULL;
  }
  return j;
}
