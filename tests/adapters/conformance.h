/* conformance.h: what the conformance suites share: the table of kinds and configurations (conformance_rows.h) and how
 * a row is set up. Every statement is held for every row that it can be held for. The statements, numbered as PEFT's
 * own test suite was surveyed, and where each is held:
 *
 *   1  the start is the base                                    test_adapters_conformance.c: identity
 *   2  forward == merged, fp32 and bf16                         test_adapters_conformance.c: merged;
 *                                                               test_merge_conformance.c: types
 *   3  checked merge == merge                                   merging is always checked; test_merge_conformance.c:
 * twice 4  what is not finite is not merged, nothing is written     test_merge_conformance.c: not_finite 5  merged
 * twice = once; without it the base, to the bit     test_merge_conformance.c: twice; test_adapters_conformance_life.c:
 * base_mode 6  several merged one by one == at once                     test_merge_conformance.c: one_by_one 7  a row
 * of a mixed batch has its own adapter               test_merge_composition.c: rows_are_their_adapters 8  saved and
 * loaded: the same logits                        test_adapters_conformance_files.c: round_trip 9  the names in the
 * file; no other name in it; same bytes   test_adapters_conformance_files.c: keys, round_trip 10  switched off, 11
 * destroyed: the base, to the bit         test_adapters_conformance_life.c: base_mode 12  only the adapter moves
 * test_adapters_conformance_train.c: only_adapter_moves 13  gradients by finite differences
 * test_adapters_conformance_train.c: gradients 14  recomputed blocks: the same gradients, to the bit
 * test_adapters_conformance_train.c: recomputed 15  a rewritten base with its adapter is the base            identity,
 * round_trip; test_optim_lora_init.c: held 16  rotations, orthogonal starts test_adapters_conformance.c: rotations,
 * orthogonal_starts 17  distributions of the starts                              test_adapters_conformance_life.c:
 * distributions 18  two ways to read a base: the same logits                 test_model_weights.c: test_other_layouts
 * (an adapter's file is read in one way) 19  types of compute and of storage test_adapters_conformance_train.c: types;
 *                                                               test_merge_conformance.c: types
 *  20  who has gradients                                        test_adapters_conformance_life.c: gradients_of_whom
 *  21  names that contain each other; names with dots           test_adapters_conformance_life.c: names_apart
 *  22  destroyed: the others stay, the memory is free           test_adapters_conformance_life.c: destroyed
 *  23  targets as PEFT resolves them                            test_optim_peft_parity.c: matching;
 * test_adapters_target.c 24  configurations that cannot be                            test_adapters_target.c: errors;
 * tests/e2e/bad_input.sh 25  another adapter in its place == a fresh load test_adapters_conformance_files.c: exchanged
 *  26  combinations of adapters                                 test_merge_combine.c
 *  27  shared projections, bit for bit                          test_optim_peft_parity.c: projections
 *  28  the schedule of adalora, rank 0 in a file                test_optim_peft_parity.c: parity (trace)
 *  29  any kind as a LoRA: the best of its rank                 test_merge_kinds.c: told_error_is_the_error
 *  30  a quantised base                                         there is none; the init loftq: test_optim_lora_init.c
 *  31  files that are damaged                                   test_adapters_conformance_files.c: damaged
 *  32  no token sees later ones, no sequence another            test_adapters_conformance.c: causal_and_independent
 *  33  several active: forward == merged                        sum_of_several; test_merge_composition.c: pairs
 */
#ifndef TESTS_CONFORMANCE_H
#define TESTS_CONFORMANCE_H

#include <math.h>

#include "adapter_fixture.h"
#include "conformance_rows.h"

enum { N_ROWS = sizeof rows / sizeof rows[0], N_LOGITS = FX_T * FX_VOCAB };

static inline bool whole(const row *w) {
  return strcmp(w->cfg.type, "full") == 0;
}

static inline bool copies(const row *w) { /* modules of the base trained in full: products of their own */
  return w->cfg.n_modules_to_save || strcmp(w->cfg.type, "layers") == 0;
}

static inline esp_adapter *attach(fx_run *r, const row *w, const char *name, bool trainable) {
  esp_adapter *a;
  OK(esp_adapter_create(r->m, &w->cfg, name, trainable, &a));
  OK(esp_adapters_activate(r->m, &a, 1));
  return a;
}

static inline void base_logits(const char *dir, const esp_batch *b, float *out) {
  fx_run r;
  fx_open(&r, dir, ESP_F32, false);
  fx_logits(&r, b, out);
  fx_close(&r);
}

static inline bool quantised(const row *w) {
  return w->cfg.init && strcmp(w->cfg.init, "loftq") == 0;
}

/* On a simulated device (ESP_TEST_QUICK) what has little to do with the device is held for one row of each kind. */
static inline bool left_out(int i) {
  bool first = i == 0 || strcmp(rows[i - 1].cfg.type, rows[i].cfg.type) != 0;
  return test_quick() && !first;
}

/* Matrices take its place. */
static inline bool merges(const row *w) {
  return esp_adapter_find(w->cfg.type)->mergeable;
}

/* A plain LoRA for the same base. */
static inline const row *lora_of(const row *w) {
  for (int i = 0; i < N_ROWS; i++) {
    const row *l = &rows[i];
    if (strcmp(l->cfg.type, "lora") == 0 && strcmp(l->base, w->base) == 0 && !l->rewrites && !l->cfg.dropout &&
        !l->cfg.n_modules_to_save && !l->cfg.n_trainable_tokens)
      return l;
  }
  return NULL;
}

static inline void same_file(const char *a, const char *b, const char *name) {
  char *x, *y;
  size_t n, m;
  OK(esp_file_read(a, &x, &n));
  OK(esp_file_read(b, &y, &m));
  if (n != m || memcmp(x, y, n) != 0) fail_msg("%s: the second save differs from the first", name);
  esp_mem_free(x);
  esp_mem_free(y);
}

#endif
