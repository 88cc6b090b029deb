#include "eval/report.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "core/strbuf.h"
#include "eval/report_norms.h"
#include "eval/run_data.h"
#include "io/file.h"

/* ---- pieces of the page ---- */

static void text(esp_strbuf *b, const char *s) {
  for (; *s; s++) switch (*s) {
    case '<':
      esp_strbuf_puts(b, "&lt;");
      break;
    case '>':
      esp_strbuf_puts(b, "&gt;");
      break;
    case '&':
      esp_strbuf_puts(b, "&amp;");
      break;
    case '"':
      esp_strbuf_puts(b, "&quot;");
      break;
    default:
      esp_strbuf_putc(b, *s);
    }
}

static const char style[] =
    "<style>:root{color-scheme:light "
    "dark;--bg:#fff;--fg:#1c2024;--soft:#667;--line:#d9dde3;--ink:#2f6f4f;--mark:#b4572a;"
    "--card:#f7f8fa}@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e8ea;--soft:#9aa3ad;--line:#343a41;"
    "--ink:#7cc79d;--mark:#e89a6c;--card:#1c2024}}"
    "*{box-sizing:border-box}body{margin:0 auto;max-width:1000px;padding:24px 16px "
    "48px;background:var(--bg);color:var(--fg);"
    "font:15px/1.5 system-ui,sans-serif}h1{font-size:26px;margin:0 0 2px}h2{font-size:18px;margin:34px 0 8px}"
    "p,figcaption{color:var(--soft);margin:2px 0 10px}.facts{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0}"
    ".facts div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 14px;min-width:105px}"
    ".facts b{display:block;font-size:19px;font-variant-numeric:tabular-nums}.facts "
    "span{color:var(--soft);font-size:13px}"
    ".wide{overflow-x:auto}table{border-collapse:separate;border-spacing:3px;font-variant-numeric:tabular-nums}"
    "th{font-weight:500;color:var(--soft);padding:4px 10px;text-align:right;white-space:nowrap}th.row{text-align:left}"
    "td{padding:9px 14px;text-align:right;border-radius:5px;min-width:74px;color:#10231a}td.own{outline:2px solid "
    "var(--mark)}"
    "td.none{color:var(--soft)}figure{margin:0 0 18px}svg{width:100%;height:auto;display:block}"
    "svg text{fill:var(--soft);font:11px system-ui,sans-serif}.grid{stroke:var(--line);stroke-width:1}"
    ".curve{fill:none;stroke:var(--ink);stroke-width:1.6;stroke-linejoin:round}.faint{opacity:.28;stroke-width:1}"
    ".switch{stroke:var(--mark);stroke-width:1;stroke-dasharray:4 3}.bar{fill:var(--ink)}"
    "pre{background:var(--card);border:1px solid "
    "var(--line);border-radius:8px;padding:12px;overflow-x:auto;font-size:12.5px}"
    "</style>";

static void fact(esp_strbuf *b, const char *label, const char *value) {
  esp_strbuf_puts(b, "<div><b>");
  text(b, value);
  esp_strbuf_puts(b, "</b><span>");
  text(b, label);
  esp_strbuf_puts(b, "</span></div>");
}

static void fact_score(esp_strbuf *b, const char *label, double v, bool sign) {
  char s[32];
  if (isnan(v)) return;
  snprintf(s, sizeof s, sign ? "%+.3f" : "%.3f", v);
  fact(b, label, s);
}

/* Light to green by rank inside the column's range, so that columns of different metrics can stand side by side. */
static void heat(const esp_matrix *m, int set, double v, char *css, size_t n) {
  double lo = INFINITY, hi = -INFINITY;
  for (int r = 0; r <= m->tasks; r++) {
    double x = *esp_matrix_cell(m, r, set);
    if (isnan(x)) continue;
    lo = fmin(lo, x);
    hi = fmax(hi, x);
  }
  bool share = lo >= 0 && hi <= 1 && !m->smaller_better[set];
  double t = share ? v : hi > lo ? (v - lo) / (hi - lo) : 0.5;
  if (m->smaller_better[set]) t = 1 - t;
  snprintf(css, n, "background:hsl(%.0f 48%% %.0f%%)", 35 + 110 * t, 88 - 22 * t);
}

static void matrix_table(esp_strbuf *b, const esp_matrix *m) {
  esp_strbuf_puts(b, "<h2>Score matrix</h2><p>Rows: after training that task. Columns: evaluation sets. Outlined: a "
                     "task's own set right after it was trained.</p><div class=wide><table><tr><th class=row></th>");
  for (int s = 0; s < m->sets; s++) {
    esp_strbuf_puts(b, "<th>");
    text(b, m->set_name[s]);
    esp_strbuf_puts(b, "<br><small>");
    text(b, m->set_metric[s]);
    esp_strbuf_puts(b, m->smaller_better[s] ? " &darr;</small></th>" : "</small></th>");
  }
  for (int r = 0; r <= m->tasks; r++) {
    esp_strbuf_puts(b, "</tr><tr><th class=row>");
    if (r) esp_strbuf_printf(b, "%d ", r);
    text(b, r ? m->task_name[r - 1] : "base");
    esp_strbuf_puts(b, "</th>");
    for (int s = 0; s < m->sets; s++) {
      double v = *esp_matrix_cell(m, r, s);
      char css[96];
      if (isnan(v)) {
        esp_strbuf_puts(b, "<td class=none>&ndash;</td>");
        continue;
      }
      heat(m, s, v, css, sizeof css);
      bool own = r > 0 && m->column[r - 1] == s;
      esp_strbuf_printf(b, "<td%s style=\"%s\">%.3f</td>", own ? " class=own" : "", css, v);
    }
  }
  esp_strbuf_puts(b, "</tr></table></div>");
}

/* Nice round step for about four grid lines. */
static double grid_step(double range) {
  double raw = range / 4, p = pow(10, floor(log10(raw > 0 ? raw : 1)));
  double f = raw / p;
  return (f < 1.5 ? 1 : f < 3.5 ? 2 : f < 7.5 ? 5 : 10) * p;
}

static void polyline(esp_strbuf *b, const esp_run_data *s, const double *v, const char *cls, double x0, double x1,
                     double lo, double hi, int64_t smooth) {
  esp_strbuf_printf(b, "<polyline class=\"%s\" points=\"", cls);
  int64_t stride = s->n > 1600 ? s->n / 800 : 1;
  for (int64_t i = 0; i < s->n; i += stride) {
    int64_t a = i - smooth < 0 ? 0 : i - smooth, z = i + smooth >= s->n ? s->n - 1 : i + smooth;
    double sum = 0;
    for (int64_t k = a; k <= z; k++) sum += v[k];
    double y = (sum / (double)(z - a + 1) - lo) / (hi - lo);
    double x = x1 > x0 ? (s->step[i] - x0) / (x1 - x0) : 0.5;
    esp_strbuf_printf(b, "%.1f,%.1f ", 48 + x * 940, 190 - y * 170);
  }
  esp_strbuf_puts(b, "\"/>");
}

static void chart(esp_strbuf *b, const esp_run_data *s, int which, const char *caption) {
  const double *v = s->value[which];
  double lo = INFINITY, hi = -INFINITY, x0 = s->step[0], x1 = s->step[s->n - 1];
  for (int64_t i = 0; i < s->n; i++) {
    if (isnan(v[i])) return;
    lo = fmin(lo, v[i]);
    hi = fmax(hi, v[i]);
  }
  if (which != 0 || lo < 0.35 * hi) lo = fmin(lo, 0);
  if (hi <= lo) hi = lo + (lo != 0 ? fabs(lo) : 1);
  esp_strbuf_printf(b, "<figure><svg viewBox=\"0 0 1000 222\" role=img aria-label=\"%s over steps\">", caption);
  double step = grid_step(hi - lo);
  for (double g = ceil(lo / step) * step; g <= hi + 1e-12; g += step) {
    double y = 190 - (g - lo) / (hi - lo) * 170;
    esp_strbuf_printf(b,
                      "<line class=grid x1=48 x2=988 y1=%.1f y2=%.1f /><text x=42 y=%.1f text-anchor=end>%.3g</text>",
                      y, y, y + 4, fabs(g) < 1e-12 * (hi - lo) ? 0.0 : g);
  }
  for (int k = 0; k < s->n_switches; k++) {
    double x = 48 + (x1 > x0 ? (s->switches[k].step - x0) / (x1 - x0) : 0) * 940;
    if (k) esp_strbuf_printf(b, "<line class=switch x1=%.1f x2=%.1f y1=14 y2=190 />", x, x);
    esp_strbuf_printf(b, "<text x=%.1f y=12>", x + 3);
    text(b, s->switches[k].name);
    esp_strbuf_puts(b, "</text>");
  }
  int64_t smooth = which == 1 ? 0 : s->n / 60;
  if (smooth > 0) polyline(b, s, v, "curve faint", x0, x1, lo, hi, 0);
  polyline(b, s, v, "curve", x0, x1, lo, hi, smooth);
  esp_strbuf_printf(b, "<text x=48 y=208>step %.0f</text><text x=988 y=208 text-anchor=end>%.0f</text></svg>", x0, x1);
  esp_strbuf_printf(b, "<figcaption>%s%s</figcaption></figure>", caption,
                    smooth > 0 ? " (faint: each step; line: running mean)" : "");
}

static void norms_chart(esp_strbuf *b, const char *run_dir) {
  esp_layer_norms norms;
  if (esp_layer_norms_read(run_dir, &norms) != ESP_OK) return; /* no low-rank adapters in this run */
  esp_strbuf_puts(b, "<h2>Change per layer</h2><p>Frobenius norm of the adapter's weight change, all sites of a layer "
                     "together, after each task.</p>");
  double hi = 0;
  for (int i = 0; i < norms.adapters * norms.layers; i++) hi = fmax(hi, norms.value[i]);
  for (int a = 0; a < norms.adapters && hi > 0; a++) {
    esp_strbuf_puts(b, "<figure><svg viewBox=\"0 0 1000 92\" role=img aria-label=\"norm per layer\">");
    double w = 940.0 / norms.layers;
    for (int l = 0; l < norms.layers; l++) {
      double h = norms.value[a * norms.layers + l] / hi * 62;
      esp_strbuf_printf(
          b, "<rect class=bar x=%.1f y=%.1f width=%.1f height=%.1f rx=2><title>layer %d: %.4g</title></rect>",
          48 + l * w + w * 0.1, 68 - h, w * 0.8, h, l, norms.value[a * norms.layers + l]);
      if (norms.layers <= 40 || l % 10 == 0)
        esp_strbuf_printf(b, "<text x=%.1f y=84 text-anchor=middle>%d</text>", 48 + l * w + w / 2, l);
    }
    esp_strbuf_printf(
        b, "<line class=grid x1=48 x2=988 y1=68 y2=68 /><text x=42 y=12 text-anchor=end>%.2g</text></svg>", hi);
    esp_strbuf_puts(b, "<figcaption>");
    text(b, norms.name[a]);
    esp_strbuf_puts(b, "</figcaption></figure>");
  }
  esp_layer_norms_deinit(&norms);
}

static void facts(esp_strbuf *b, const esp_run_data *s, const esp_matrix *m) {
  char v[48];
  esp_strbuf_puts(b, "<div class=facts>");
  snprintf(v, sizeof v, "%lld", (long long)s->n);
  fact(b, "optimizer steps", v);
  if (s->n > 0) {
    snprintf(v, sizeof v, "%.4f", s->value[0][s->n - 1]);
    fact(b, "last loss", v);
  }
  if (s->tokens_per_second > 0) {
    snprintf(v, sizeof v, "%.0f", s->tokens_per_second);
    fact(b, "tokens per second", v);
  }
  if (s->seconds > 0) {
    int t = (int)(s->seconds + 0.5);
    snprintf(v, sizeof v, "%02d:%02d:%02d", t / 3600, t / 60 % 60, t % 60);
    fact(b, "training time", v);
  }
  if (s->memory > 0) {
    snprintf(v, sizeof v, "%.1f MiB", s->memory / (1 << 20));
    fact(b, "peak memory", v);
  }
  if (m) {
    esp_matrix_summary x;
    esp_matrix_summarise(m, &x);
    fact_score(b, "ACC", x.acc, false);
    fact_score(b, "BWT", x.bwt, true);
    fact_score(b, "FWT", x.fwt, true);
    fact_score(b, "forgetting", x.forgetting, false);
    fact_score(b, "lowest", x.lowest, false);
  }
  esp_strbuf_puts(b, "</div>");
}

static const char *last_part(const char *path, char *buf, size_t n) {
  snprintf(buf, n, "%s", path);
  size_t len = strlen(buf);
  while (len > 1 && buf[len - 1] == '/') buf[--len] = 0;
  char *slash = strrchr(buf, '/');
  return slash ? slash + 1 : buf;
}

esp_status esp_report_write(const char *run_dir, const char *out) {
  esp_status st;
  esp_run_data s;
  esp_strbuf b;
  char path[PATH_MAX], name[PATH_MAX];
  esp_strbuf_init(&b);
  ESP_GOTO(esp_run_data_read(run_dir, &s));
  const esp_matrix *m = s.matrix;
  esp_strbuf_puts(&b, "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport "
                      "content=\"width=device-width,initial-scale=1\"><title>");
  text(&b, last_part(run_dir, name, sizeof name));
  esp_strbuf_puts(&b, " - espalier</title>");
  esp_strbuf_puts(&b, style);
  esp_strbuf_puts(&b, "</head><body><h1>");
  text(&b, last_part(run_dir, name, sizeof name));
  esp_strbuf_puts(&b, "</h1><p>espalier " ESP_VERSION "</p>");
  facts(&b, &s, m);
  if (m) matrix_table(&b, m);
  if (s.n > 0) {
    esp_strbuf_puts(&b, "<h2>Training</h2>");
    chart(&b, &s, 0, "Loss per trained token");
    chart(&b, &s, 1, "Learning rate");
    chart(&b, &s, 2, "Gradient norm before clipping");
  }
  norms_chart(&b, run_dir);
  if (m) {
    esp_strbuf plain;
    esp_strbuf_init(&plain);
    esp_matrix_render_text(m, &(esp_matrix_view){.formulas = true}, &plain);
    esp_strbuf_puts(&b, "<h2>Numbers and their formulas</h2><pre>");
    if (plain.data) text(&b, plain.data);
    esp_strbuf_puts(&b, "</pre>");
    esp_strbuf_deinit(&plain);
  }
  esp_strbuf_puts(&b, "</body></html>\n");
  if (b.failed) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  st = esp_file_write_atomic(out ? out : esp_path_join(path, sizeof path, run_dir, "report.html"), b.data, b.len);
out:
  esp_strbuf_deinit(&b);
  esp_run_data_deinit(&s);
  return st;
}
