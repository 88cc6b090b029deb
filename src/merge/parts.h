/* parts.h: what merging methods are made of: which entries stay, and how several vectors become one. Everything works
 * on blocks of a vector that come in order, so that no vector has to be in memory as a whole.
 *
 * cut:    the k entries of largest magnitude, of equals the first; found by counting the bits of the magnitudes in two
 *         passes, exactly.
 * draw:   Bernoulli masks, a function of (seed, vector, part, name, element): the same on any number of threads.
 * elect:  TIES' sign election (Yadav et al. 2023, arXiv:2306.01708) and the mean of those who agree. */
#ifndef ESP_MERGE_PARTS_H
#define ESP_MERGE_PARTS_H

#include <stdbool.h>
#include <stdint.h>

#include "core/error.h"

enum { ESP_CUTS = 2 };

typedef struct esp_cut { /* the `k` largest of n */
  int64_t k;
  float limit;           /* the magnitude at rank k */
  int64_t equal, passed; /* how many of the entries at the limit are inside; how many went by */
} esp_cut;

/* Up to ESP_CUTS cuts of one vector: begin, feed all of it, turn, feed all of it again, end. */
typedef struct esp_cutter {
  esp_cut *cut[ESP_CUTS];
  int n;
  int64_t total;
  int64_t *high, *low[ESP_CUTS]; /* counts */
  uint32_t bin[ESP_CUTS];        /* of the high bits in which the limit lies */
  int64_t above[ESP_CUTS];       /* entries above that bin */
  bool second;
} esp_cutter;
esp_status esp_cutter_init(esp_cutter *c, esp_cut *const *cuts, int n);
void esp_cutter_feed(esp_cutter *c, const float *x, int64_t n);
void esp_cutter_turn(esp_cutter *c);
void esp_cutter_end(esp_cutter *c); /* the cuts are ready; frees */
/* Entries in order: is this one among the k largest? */
bool esp_cut_inside(esp_cut *c, float x);
/* int(share * n), at most n. */
int64_t esp_share_of(double share, int64_t n);

/* Only the int(density * n) largest stay: the whole vector at once. */
esp_status esp_keep_largest(float *x, int64_t n, double density);

typedef struct esp_draw {
  uint64_t seed, stream;
  double density;
} esp_draw;
esp_draw esp_draw_of(uint64_t seed, int vector, int part, const char *name, double density);
/* Entries from `at` on: those that are not drawn become zero, the others are multiplied by `scale`. */
void esp_draw_keep(const esp_draw *d, float *x, int64_t at, int64_t n, double scale);

typedef struct esp_election {
  bool frequency; /* signs are counted, else values are added */
  bool weighted;  /* weights take part in the vote and in the divisor (mergekit), else only in the sum (PEFT) */
  bool normalize; /* the sum is divided by the weights (the number, when not weighted) of those who agree */
} esp_election;
/* y_i = w_i x_i; sign of the vote, 0 counts as +; out = sum of the y_i that agree, over their divisor. out may be one
 * of the x. */
void esp_elect(const esp_election *e, const float *const *x, const double *w, int n, int64_t len, float *out);

#endif
