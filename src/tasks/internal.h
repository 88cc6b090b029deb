/* internal.h: the strategies that registry.c lists. */
#ifndef ESP_TASKS_INTERNAL_H
#define ESP_TASKS_INTERNAL_H

#include "tasks/strategy.h"

extern const esp_strategy_kind esp_strategy_agem;
extern const esp_strategy_kind esp_strategy_branch;
extern const esp_strategy_kind esp_strategy_bank;
extern const esp_strategy_kind esp_strategy_ewc;
extern const esp_strategy_kind esp_strategy_gem;
extern const esp_strategy_kind esp_strategy_group_lasso;
extern const esp_strategy_kind esp_strategy_l2;
extern const esp_strategy_kind esp_strategy_lwf;
extern const esp_strategy_kind esp_strategy_gpm;
extern const esp_strategy_kind esp_strategy_ncm;
extern const esp_strategy_kind esp_strategy_nullspace;
extern const esp_strategy_kind esp_strategy_osf;
extern const esp_strategy_kind esp_strategy_ogd;
extern const esp_strategy_kind esp_strategy_refactor;
extern const esp_strategy_kind esp_strategy_perturb;
extern const esp_strategy_kind esp_strategy_upgd;
extern const esp_strategy_kind esp_strategy_migu;
extern const esp_strategy_kind esp_strategy_reglora;
extern const esp_strategy_kind esp_strategy_replay;
extern const esp_strategy_kind esp_strategy_si;

/* plasticity.c: out [1, n] becomes noise of mean 0 and variance 1, a function of (seed, step). */
esp_status esp_noise(esp_strategy *s, const esp_sequence *q, int64_t step, esp_tensor out);
/* refactor.c: A [r, in] and B [out, r] become balanced factors of the same product. */
esp_status esp_refactor(int64_t out, int64_t in, int64_t r, float *a, float *b);
/* gem.c: v = argmin 1/2 v^T P v + c^T v with v >= margin; P [n, n] symmetric and positive semidefinite. */
esp_status esp_gem_solve(int n, const double *p, const double *c, double margin, double *v);
extern const esp_strategy_kind esp_strategy_lwf;
extern const esp_strategy_kind esp_strategy_seqkd;
extern const esp_strategy_kind esp_strategy_gere;
extern const esp_strategy_kind esp_strategy_lae, esp_strategy_ilora, esp_strategy_coin_ema, esp_strategy_mos;

#endif
