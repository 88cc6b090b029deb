/* html.h: pieces of the pages: text, style, charts of curves and of points, all inline: no script, no network. */
#ifndef ESP_EVAL_HTML_H
#define ESP_EVAL_HTML_H

#include <stdbool.h>
#include <stdint.h>

#include "core/strbuf.h"
#include "eval/run_data.h"

enum { ESP_HTML_COLORS = 8 };

void esp_html_begin(esp_strbuf *b, const char *title);
void esp_html_end(esp_strbuf *b);
void esp_html_text(esp_strbuf *b, const char *s);             /* escaped */
void esp_html_cut(esp_strbuf *b, const char *s, size_t most); /* at most so many bytes, whole characters, then "..." */
void esp_html_fact(esp_strbuf *b, const char *label, const char *value);
void esp_html_score(esp_strbuf *b, const char *label, double v, bool sign); /* nothing for NaN */

typedef struct esp_html_line {
  const char *name;
  const double *x, *y; /* NaN: a gap */
  int64_t n;
  int color;  /* 0 .. ESP_HTML_COLORS - 1 */
  bool faint; /* behind the others, not in the legend */
  bool dots;  /* a mark on each point */
} esp_html_line;
typedef struct esp_html_chart {
  const char *caption;
  const esp_html_line *lines;
  int n_lines;
  const esp_run_switch *switches; /* vertical lines with names, the first without a line */
  int n_switches;
  double lo, hi; /* of y; lo == hi: from the lines */
  bool legend;
  const char *x_name;
} esp_html_chart;
/* Nothing when no line has a point. */
void esp_html_chart_put(esp_strbuf *b, const esp_html_chart *c);

typedef struct esp_html_point {
  const char *name;
  double x, y, spread; /* spread: a whisker above and below; NaN: none */
  int color;
} esp_html_point;
void esp_html_scatter(esp_strbuf *b, const char *caption, const char *x_name, const char *y_name,
                      const esp_html_point *points, int n);
/* The matrix as a heat map. */
void esp_html_matrix(esp_strbuf *b, const esp_matrix *m);
/* The last part of a path. */
const char *esp_html_base_name(const char *path, char *buf, size_t n);

#endif
