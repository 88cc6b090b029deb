/* features.h: what the frozen base makes of a prompt, as one vector: the mean over its tokens of the final normed
 * hidden state, adapters off. Functions of base and text alone, so that what was learnt from them stays true whatever
 * is trained later. */
#ifndef ESP_TASKS_FEATURES_H
#define ESP_TASKS_FEATURES_H

#include "tasks/strategy.h"

int64_t esp_features_width(const esp_sequence *q);
/* Of the first prompt[i] tokens of each sequence; out: host [n_seqs, width]. Sequences that begin with the same prompt
 * as the one before them are not computed again. */
esp_status esp_features_of_batch(const esp_sequence *q, const esp_batch *b, const int32_t *prompt, float *out);
/* Of samples of the present task (their prompts; the whole row where there is none); out: host [n, width]. All ranks
 * get all of them. */
esp_status esp_features_of_samples(const esp_sequence *q, const int64_t *index, int64_t n, float *out);

/* Lloyd's algorithm from the seeding of k-means++ (Arthur & Vassilvitskii 2007), in fp64, until nothing moves: x [n,
 * d], centroids [k, d]. n >= 1; where there are fewer different points than k, centroids repeat. */
esp_status esp_kmeans(const float *x, int64_t n, int64_t d, int64_t k, uint64_t seed, uint64_t stream,
                      float *centroids);

#endif
