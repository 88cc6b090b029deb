/* compare.h: runs beside each other: variants of a recipe, each over orders of tasks and seeds. A variant's numbers are
 * the mean and the sample standard deviation over its finished runs; the difference to the first variant is taken pair
 * by pair, between runs of the same order and seed, so that what an order or a seed does to both does not count. */
#ifndef ESP_EVAL_COMPARE_H
#define ESP_EVAL_COMPARE_H

#include "core/strbuf.h"
#include "io/json.h"

typedef enum esp_measure {
  ESP_MEASURE_ACC,
  ESP_MEASURE_BWT,
  ESP_MEASURE_FWT,
  ESP_MEASURE_FORGETTING,
  ESP_MEASURE_LEARNING,
  ESP_MEASURE_LOWEST,
  ESP_MEASURE_BWT_TRACE,
  ESP_MEASURE_ANYTIME,
  ESP_MEASURE_MIN_ACC, /* these five: from the evaluations inside tasks, windows of 10 steps */
  ESP_MEASURE_WC_ACC,
  ESP_MEASURE_WF,
  ESP_MEASURE_WP,
  ESP_MEASURE_GAP,
  ESP_MEASURE_TRAINED, /* parameters */
  ESP_MEASURE_ADAPTER, /* peak bytes of trained parameters, of optimizer state, what the strategies hold at the end */
  ESP_MEASURE_OPTIM,
  ESP_MEASURE_STRATEGY,
  ESP_MEASURE_MEMORY,  /* peak bytes: of the device where one was used, else of the host */
  ESP_MEASURE_STEP,    /* seconds of the median step */
  ESP_MEASURE_SECONDS, /* of the run */
  ESP_MEASURES
} esp_measure;
const char *esp_measure_key(esp_measure m);   /* in JSON */
const char *esp_measure_label(esp_measure m); /* in tables */

typedef struct esp_compared {
  const char *dir, *variant, *order; /* order "": the only one */
  int64_t seed;
  bool finished;
  double value[ESP_MEASURES]; /* NaN: not there */
} esp_compared;
/* Fills in `finished` and the values from the run's directory; one that has not finished is no error. */
esp_status esp_compared_read(esp_compared *run);

typedef struct esp_spread {
  int n;
  double mean, sd; /* NaN below 1 and 2 values */
} esp_spread;
/* Over the finished runs of a variant (order NULL: of all orders). */
esp_spread esp_compare_spread(const esp_compared *runs, int n, const char *variant, const char *order, esp_measure m);
/* Of variant minus base over the pairs of one order and seed. */
esp_spread esp_compare_pairs(const esp_compared *runs, int n, const char *variant, const char *base, esp_measure m);

/* Variants as rows; with several orders, a table per order follows. */
void esp_compare_table(const esp_compared *runs, int n, bool markdown, esp_strbuf *out);
void esp_compare_html(const esp_compared *runs, int n, esp_strbuf *out);
/* {"runs": [...], "variants": [...]}; NULL: out of memory. */
json_t *esp_compare_json(const esp_compared *runs, int n);

#endif
