/* schema_projections.c: the keys of the strategies that change gradients and updates rather than the loss. */
#include "recipe/schema_rows.h"

static const esp_key gem_keys[] = {
    {"buffer", ESP_T_SHARE, AT(continual.strategy.gem.buffer), .def = "1%", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e9),
     .help = "samples kept of all finished tasks together, or a percentage of each one's; a step goes through all"},
    {"sampler", ESP_T_WORD, AT(continual.strategy.gem.sampler), .def = "balanced",
     WORDS("reservoir", "balanced", "loss"), .help = "which are kept, as in replay"},
    {"margin", ESP_T_NUMBER, AT(continual.strategy.gem.margin), .def = "0.5", RANGE(0, 1e6),
     .help = "least multiplier of every earlier task once one is violated (memory strength)"},
};
STRATEGY(gem, "Strategy gem: no step against the gradient of an earlier task's samples.");

static const esp_key agem_keys[] = {
    {"buffer", ESP_T_SHARE, AT(continual.strategy.agem.buffer), .def = "1%", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e9),
     .help = "samples kept of all finished tasks together, or a percentage of each one's"},
    {"sampler", ESP_T_WORD, AT(continual.strategy.agem.sampler), .def = "balanced",
     WORDS("reservoir", "balanced", "loss"), .help = "which are kept, as in replay"},
    {"batch", ESP_T_INT, AT(continual.strategy.agem.batch), .def = "32", RANGE(1, BIG),
     .help = "samples of them that a step goes through"},
};
STRATEGY(agem, "Strategy agem: no step against the mean gradient of a batch of earlier tasks' samples.");

/* clang-format off */
#define SUBSPACE_KEYS(n, most)                                                                                         \
  {"energy", ESP_T_NUMBER, AT(continual.strategy.n.energy), .def = most, .flags = ESP_K_ABOVE_MIN, RANGE(0, 1),        \
   .help = "share of the squared length of a layer's inputs that its basis holds"},                                    \
      {"samples", ESP_T_INT, AT(continual.strategy.n.samples), .def = "64", RANGE(1, BIG),                             \
       .help = "of a finished task that are looked at"},                                                               \
      {"tokens", ESP_T_INT, AT(continual.strategy.n.tokens), .def = "256", RANGE(1, BIG),                              \
       .help = "rows of each layer's input that are taken from them: a task adds at most so many directions"},
/* clang-format on */

static const esp_key gpm_keys[] = {SUBSPACE_KEYS(gpm, "0.97")};
STRATEGY(gpm, "Strategy gpm: gradients leave the span of earlier tasks' layer inputs alone.");
static const esp_key nullspace_keys[] = {SUBSPACE_KEYS(nullspace, "0.99")};
STRATEGY(nullspace, "Strategy nullspace: what a task adds to a weight is zero on earlier tasks' layer inputs.");
