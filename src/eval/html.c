#include "eval/html.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static void put(esp_strbuf *b, char c) {
  switch (c) {
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
    esp_strbuf_putc(b, c);
  }
}

void esp_html_text(esp_strbuf *b, const char *s) {
  for (; *s; s++) put(b, *s);
}

void esp_html_cut(esp_strbuf *b, const char *s, size_t most) {
  size_t n = strlen(s);
  bool cut = n > most;
  if (cut)
    for (n = most; n > 0 && ((unsigned char)s[n] & 0xC0) == 0x80;) n--;
  for (size_t i = 0; i < n; i++) put(b, s[i]);
  if (cut) esp_strbuf_puts(b, "&hellip;");
}

static const char style[] =
    "<style>:root{color-scheme:light "
    "dark;--bg:#fff;--fg:#1c2024;--soft:#667;--line:#d9dde3;--ink:#2f6f4f;--mark:#b4572a;--card:#f7f8fa;"
    "--c0:#2f6f4f;--c1:#c2571a;--c2:#3b62b5;--c3:#a23b72;--c4:#8a7a12;--c5:#1f8a99;--c6:#7a4fc0;--c7:#6b6f76}"
    "@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e8ea;--soft:#9aa3ad;--line:#343a41;"
    "--ink:#7cc79d;--mark:#e89a6c;--card:#1c2024;"
    "--c0:#7cc79d;--c1:#f0a06a;--c2:#8fb0f5;--c3:#e58dbc;--c4:#d8c65a;--c5:#6fd0dd;--c6:#bfa0f5;--c7:#a9b0b8}}"
    "*{box-sizing:border-box}body{margin:0 auto;max-width:1000px;padding:24px 16px "
    "48px;background:var(--bg);color:var(--fg);"
    "font:15px/1.5 system-ui,sans-serif}h1{font-size:26px;margin:0 0 2px;overflow-wrap:anywhere}"
    "h2{font-size:18px;margin:34px 0 8px}h3{font-size:15px;margin:20px 0 4px}"
    "p,figcaption{color:var(--soft);margin:2px 0 10px}.facts{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0}"
    ".facts div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px 14px;min-width:105px}"
    ".facts b{display:block;font-size:19px;font-variant-numeric:tabular-nums}.facts "
    "span{color:var(--soft);font-size:13px}"
    ".wide{overflow-x:auto}table{border-collapse:separate;border-spacing:3px;font-variant-numeric:tabular-nums}"
    "th{font-weight:500;color:var(--soft);padding:4px 10px;text-align:right;white-space:nowrap}th.row{text-align:left}"
    ".heat td{padding:9px 14px;text-align:right;border-radius:5px;min-width:74px;color:#10231a}"
    ".heat td.own{outline:2px solid var(--mark)}.heat td.none{color:var(--soft)}"
    ".plain{border-collapse:collapse;font-size:14px}.plain th,.plain td{border-bottom:1px solid "
    "var(--line);padding:5px "
    "10px;text-align:right;white-space:nowrap;vertical-align:top}.plain .l{text-align:left}.plain "
    ".t{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;min-width:120px;max-width:340px}"
    "figure{margin:0 0 18px}.chart{overflow-x:auto}svg{width:100%;min-width:620px;height:auto;display:block}"
    "svg text{fill:var(--soft);font:11px system-ui,sans-serif}.grid{stroke:var(--line);stroke-width:1}"
    ".curve{fill:none;stroke-width:1.7;stroke-linejoin:round}.faint{opacity:.28;stroke-width:1}"
    ".switch{stroke:var(--mark);stroke-width:1;stroke-dasharray:4 3}.bar{fill:var(--ink)}"
    ".legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;color:var(--soft)}"
    ".legend i{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle}"
    "pre{background:var(--card);border:1px solid "
    "var(--line);border-radius:8px;padding:12px;overflow-x:auto;font-size:12.5px}"
    "@media(max-width:600px){svg{min-width:720px}svg text{font-size:14px}}"
    "</style>";

void esp_html_begin(esp_strbuf *b, const char *title) {
  esp_strbuf_puts(b, "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport "
                     "content=\"width=device-width,initial-scale=1\"><title>");
  esp_html_text(b, title);
  esp_strbuf_puts(b, " - espalier</title>");
  esp_strbuf_puts(b, style);
  esp_strbuf_puts(b, "</head><body><h1>");
  esp_html_text(b, title);
  esp_strbuf_puts(b, "</h1><p>espalier " ESP_VERSION "</p>");
}

void esp_html_end(esp_strbuf *b) {
  esp_strbuf_puts(b, "</body></html>\n");
}

void esp_html_fact(esp_strbuf *b, const char *label, const char *value) {
  esp_strbuf_puts(b, "<div><b>");
  esp_html_text(b, value);
  esp_strbuf_puts(b, "</b><span>");
  esp_html_text(b, label);
  esp_strbuf_puts(b, "</span></div>");
}

void esp_html_score(esp_strbuf *b, const char *label, double v, bool sign) {
  char s[32];
  if (isnan(v)) return;
  snprintf(s, sizeof s, sign ? "%+.3f" : "%.3f", v);
  esp_html_fact(b, label, s);
}

const char *esp_html_base_name(const char *path, char *buf, size_t n) {
  snprintf(buf, n, "%s", path);
  size_t len = strlen(buf);
  while (len > 1 && buf[len - 1] == '/') buf[--len] = 0;
  char *slash = strrchr(buf, '/');
  return slash && slash[1] ? slash + 1 : buf;
}

/* ---- the matrix ---- */

/* Light to green by place inside the column's range, so that columns of different metrics can stand side by side. */
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

void esp_html_matrix(esp_strbuf *b, const esp_matrix *m) {
  esp_strbuf_puts(b, "<div class=wide><table class=heat><tr><th class=row></th>");
  for (int s = 0; s < m->sets; s++) {
    esp_strbuf_puts(b, "<th>");
    esp_html_text(b, m->set_name[s]);
    esp_strbuf_puts(b, "<br><small>");
    esp_html_text(b, m->set_metric[s]);
    esp_strbuf_puts(b, m->smaller_better[s] ? " &darr;" : "");
    esp_strbuf_puts(b, esp_matrix_is_probe(m, s) ? ", probe</small></th>" : "</small></th>");
  }
  for (int r = 0; r <= m->tasks; r++) {
    if (m->joint && r > 0 && r < m->tasks) continue; /* never trained on their own */
    esp_strbuf_puts(b, "</tr><tr><th class=row>");
    if (r && !m->joint) esp_strbuf_printf(b, "%d ", r);
    esp_html_text(b, esp_matrix_row_name(m, r));
    esp_strbuf_puts(b, "</th>");
    for (int s = 0; s < m->sets; s++) {
      double v = *esp_matrix_cell(m, r, s), malformed = *esp_matrix_malformed(m, r, s);
      char css[96];
      if (isnan(v)) {
        esp_strbuf_puts(b, "<td class=none>&ndash;</td>");
        continue;
      }
      heat(m, s, v, css, sizeof css);
      bool own = m->joint ? r > 0 && !esp_matrix_is_probe(m, s) : r > 0 && m->column[r - 1] == s;
      esp_strbuf_printf(b, "<td%s style=\"%s\">%.3f", own ? " class=own" : "", css, v);
      if (malformed > 0) esp_strbuf_printf(b, "<br><small>%.0f%% no label</small>", 100 * malformed);
      esp_strbuf_puts(b, "</td>");
    }
  }
  esp_strbuf_puts(b, "</tr></table></div>");
}

/* ---- charts ---- */

typedef struct frame { /* the range shown, in a box from (52, 20) to (988, 196) */
  double x0, x1, lo, hi;
} frame;

static double at_x(const frame *f, double x) {
  return 52 + (f->x1 > f->x0 ? (x - f->x0) / (f->x1 - f->x0) : 0.5) * 936;
}
static double at_y(const frame *f, double y) {
  return 196 - (y - f->lo) / (f->hi - f->lo) * 176;
}

/* Nice round step for about four grid lines. */
static double grid_step(double range) {
  double raw = range / 4, p = pow(10, floor(log10(raw > 0 ? raw : 1)));
  double f = raw / p;
  return (f < 1.5 ? 1 : f < 3.5 ? 2 : f < 7.5 ? 5 : 10) * p;
}

static void grid_y(esp_strbuf *b, const frame *f) {
  double step = grid_step(f->hi - f->lo);
  for (double g = ceil(f->lo / step - 1e-9) * step; g <= f->hi + 1e-9 * step; g += step)
    esp_strbuf_printf(b,
                      "<line class=grid x1=52 x2=988 y1=%.1f y2=%.1f /><text x=46 y=%.1f text-anchor=end>%.3g</text>",
                      at_y(f, g), at_y(f, g), at_y(f, g) + 4, fabs(g) < 1e-9 * step ? 0.0 : g);
}

static void widen(frame *f) {
  if (!(f->hi > f->lo)) f->hi = f->lo + (f->lo != 0 ? fabs(f->lo) : 1);
}

static bool frame_of(const esp_html_chart *c, frame *f) {
  *f = (frame){INFINITY, -INFINITY, INFINITY, -INFINITY};
  for (int k = 0; k < c->n_lines; k++)
    for (int64_t i = 0; i < c->lines[k].n; i++) {
      double x = c->lines[k].x[i], y = c->lines[k].y[i];
      if (isnan(y)) continue;
      f->x0 = fmin(f->x0, x), f->x1 = fmax(f->x1, x);
      f->lo = fmin(f->lo, y), f->hi = fmax(f->hi, y);
    }
  if (!isfinite(f->lo) || !isfinite(f->hi)) return false;
  if (c->hi > c->lo) f->lo = c->lo, f->hi = c->hi;
  widen(f);
  return true;
}

static void line_put(esp_strbuf *b, const frame *f, const esp_html_line *l) {
  int64_t stride = l->n > 1600 ? l->n / 800 : 1;
  bool open = false;
  for (int64_t i = 0; i < l->n; i += stride) {
    if (isnan(l->y[i])) {
      if (open) esp_strbuf_puts(b, "\"/>");
      open = false;
      continue;
    }
    if (!open)
      esp_strbuf_printf(b, "<polyline class=\"curve%s\" style=\"stroke:var(--c%d)\" points=\"",
                        l->faint ? " faint" : "", l->color);
    open = true;
    esp_strbuf_printf(b, "%.1f,%.1f ", at_x(f, l->x[i]), at_y(f, l->y[i]));
  }
  if (open) esp_strbuf_puts(b, "\"/>");
  for (int64_t i = 0; l->dots && l->n <= 400 && i < l->n; i++)
    if (!isnan(l->y[i]))
      esp_strbuf_printf(b,
                        "<circle cx=%.1f cy=%.1f r=2.2 style=\"fill:var(--c%d)\"><title>%s %.6g: %.4g</title></circle>",
                        at_x(f, l->x[i]), at_y(f, l->y[i]), l->color, "step", l->x[i], l->y[i]);
}

void esp_html_chart_put(esp_strbuf *b, const esp_html_chart *c) {
  frame f;
  double last = -INFINITY;
  if (!frame_of(c, &f)) return;
  esp_strbuf_puts(b, "<figure><div class=chart><svg viewBox=\"0 0 1000 218\" role=img aria-label=\"");
  esp_html_text(b, c->caption);
  esp_strbuf_puts(b, "\">");
  grid_y(b, &f);
  for (int k = 0; k < c->n_switches; k++) {
    double x = at_x(&f, fmax(c->switches[k].step, f.x0));
    if (k) esp_strbuf_printf(b, "<line class=switch x1=%.1f x2=%.1f y1=16 y2=196 />", x, x);
    if (x < last + 44) continue; /* no room for its name */
    esp_strbuf_printf(b, "<text x=%.1f y=12>", x + 3);
    esp_html_text(b, c->switches[k].name);
    esp_strbuf_puts(b, "</text>");
    last = x;
  }
  for (int k = 0; k < c->n_lines; k++) line_put(b, &f, &c->lines[k]);
  const char *x = c->x_name ? c->x_name : "step";
  esp_strbuf_printf(b, "<text x=52 y=213>%s %.6g</text><text x=988 y=213 text-anchor=end>%.6g</text></svg></div>", x,
                    f.x0, f.x1);
  if (c->legend) {
    esp_strbuf_puts(b, "<div class=legend>");
    for (int k = 0; k < c->n_lines; k++) {
      if (c->lines[k].faint || c->lines[k].n == 0) continue;
      esp_strbuf_printf(b, "<span><i style=\"background:var(--c%d)\"></i>", c->lines[k].color);
      esp_html_text(b, c->lines[k].name);
      esp_strbuf_puts(b, "</span>");
    }
    esp_strbuf_puts(b, "</div>");
  }
  esp_strbuf_puts(b, "<figcaption>");
  esp_html_text(b, c->caption);
  esp_strbuf_puts(b, "</figcaption></figure>");
}

typedef struct box {
  double x0, x1, y0, y1;
} box;

/* The baseline nearest to y on which a name from x0 to x1 covers nothing that is there already. */
static double free_baseline(const box *taken, int n, double x0, double x1, double y) {
  for (int k = 0; k < 32; k++) {
    double at = y + 6.5 * (k % 2 ? (k + 1) / 2 : -k / 2);
    int i = 0;
    while (i < n && (taken[i].y1 < at - 9 || at + 2 < taken[i].y0 || taken[i].x1 < x0 || x1 < taken[i].x0)) i++;
    if (i == n && at > 10 && at < 200) return at;
  }
  return y;
}

void esp_html_scatter(esp_strbuf *b, const char *caption, const char *x_name, const char *y_name,
                      const esp_html_point *points, int n) {
  frame f = {INFINITY, -INFINITY, INFINITY, -INFINITY};
  for (int i = 0; i < n; i++) {
    double spread = isnan(points[i].spread) ? 0 : points[i].spread;
    if (isnan(points[i].x) || isnan(points[i].y)) continue;
    f.x0 = fmin(f.x0, points[i].x), f.x1 = fmax(f.x1, points[i].x);
    f.lo = fmin(f.lo, points[i].y - spread);
    f.hi = fmax(f.hi, points[i].y + spread);
  }
  if (!isfinite(f.lo)) return;
  f.lo = fmin(f.lo, 0);
  widen(&f);
  double room = f.x1 > f.x0 ? 0.12 * (f.x1 - f.x0) : f.x1 > 0 ? f.x1 / 2 : 1; /* for names */
  f.x0 = f.x0 > f.x1 / 2 ? f.x0 - room : 0;
  f.x1 += room;
  f.hi += 0.08 * (f.hi - f.lo);
  esp_strbuf_puts(b, "<figure><div class=chart><svg viewBox=\"0 0 1000 240\" role=img aria-label=\"");
  esp_html_text(b, caption);
  esp_strbuf_puts(b, "\">");
  grid_y(b, &f);
  double step = grid_step(f.x1 - f.x0);
  for (double g = ceil(f.x0 / step) * step; g <= f.x1; g += step)
    esp_strbuf_printf(b, "<text x=%.1f y=213 text-anchor=middle>%.3g</text>", at_x(&f, g), g);
  esp_strbuf_puts(b, "<text x=988 y=232 text-anchor=end>");
  esp_html_text(b, x_name);
  esp_strbuf_puts(b, "</text><text x=52 y=12>");
  esp_html_text(b, y_name);
  esp_strbuf_puts(b, "</text>");
  box taken[128];
  int m = 0;
  for (int i = 0; i < n && m < 64; i++) {
    double x = at_x(&f, points[i].x), y = at_y(&f, points[i].y);
    if (!isnan(x) && !isnan(y)) taken[m++] = (box){x - 5, x + 5, y - 5, y + 5};
  }
  for (int i = 0; i < n; i++) {
    double x = at_x(&f, points[i].x), y = at_y(&f, points[i].y);
    if (isnan(x) || isnan(y)) continue;
    if (!isnan(points[i].spread))
      esp_strbuf_printf(b, "<line x1=%.1f x2=%.1f y1=%.1f y2=%.1f style=\"stroke:var(--c%d);stroke-width:1.4\"/>", x, x,
                        at_y(&f, points[i].y - points[i].spread), at_y(&f, points[i].y + points[i].spread),
                        points[i].color);
    esp_strbuf_printf(b, "<circle cx=%.1f cy=%.1f r=5 style=\"fill:var(--c%d)\"><title>", x, y, points[i].color);
    esp_html_text(b, points[i].name);
    bool left = x > 800;
    double width = 7.0 * (double)strlen(points[i].name), from = left ? x - 9 - width : x + 9;
    double height = free_baseline(taken, m, from, from + width, y - 5);
    if (m < 128) taken[m++] = (box){from, from + width, height - 9, height + 2};
    esp_strbuf_printf(b, "</title></circle><text x=%.1f y=%.1f%s style=\"fill:var(--c%d)\">", left ? x - 9 : x + 9,
                      height, left ? " text-anchor=end" : "", points[i].color);
    esp_html_text(b, points[i].name);
    esp_strbuf_puts(b, "</text>");
  }
  esp_strbuf_puts(b, "</svg></div><figcaption>");
  esp_html_text(b, caption);
  esp_strbuf_puts(b, "</figcaption></figure>");
}
