/* schema_projections.c: the keys of the strategies that change gradients and updates rather than the loss. */
#include "recipe/schema_rows.h"

static const esp_key gem_keys[] = {
    {"buffer", ESP_T_SHARE, AT(continual.strategy.gem.buffer), .def = "1%", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e9),
     .help = "samples kept of all finished tasks together, or a percentage of each one's; a step goes through all"},
    {"sampler", ESP_T_WORD, AT(continual.strategy.gem.sampler), .def = "balanced",
     WORDS("reservoir", "balanced", "loss", "herding"), .help = "which are kept, as in replay"},
    {"margin", ESP_T_NUMBER, AT(continual.strategy.gem.margin), .def = "0.5", RANGE(0, 1e6),
     .help = "least multiplier of every earlier task once one is violated (memory strength)"},
};
STRATEGY(gem, "Strategy gem: no step against the gradient of an earlier task's samples.");

static const esp_key agem_keys[] = {
    {"buffer", ESP_T_SHARE, AT(continual.strategy.agem.buffer), .def = "1%", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e9),
     .help = "samples kept of all finished tasks together, or a percentage of each one's"},
    {"sampler", ESP_T_WORD, AT(continual.strategy.agem.sampler), .def = "balanced",
     WORDS("reservoir", "balanced", "loss", "herding"), .help = "which are kept, as in replay"},
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

static const esp_key osf_keys[] = {
    {"retain", ESP_T_NUMBER, AT(continual.strategy.osf.retain), .def = "0.5",
     .flags = ESP_K_ABOVE_MIN | ESP_K_BELOW_MAX, RANGE(0, 1),
     .help = "share of a matrix's singular triples that stay as they are"},
    {"retain_min", ESP_T_NUMBER, AT(continual.strategy.osf.retain_min), .def = "off", .flags = ESP_K_ABOVE_MIN,
     RANGE(0, 1), .word = "off",
     .help = "of a layer without importance: the share is retain_min + importance (retain - retain_min)"},
};
STRATEGY(osf, "Strategy osf: what a task adds to a weight is orthogonal to its leading singular directions.");

static const esp_key migu_keys[] = {
    {"threshold", ESP_T_NUMBER, AT(continual.strategy.migu.threshold), .def = "0.7",
     .flags = ESP_K_ABOVE_MIN | ESP_K_BELOW_MAX, RANGE(0, 1),
     .help = "share of a matrix's rows, those of the smallest output, that get no gradient"},
    {"mask", ESP_T_WORD, AT(continual.strategy.migu.mask), .def = "magnitude", WORDS("magnitude", "random"),
     .help = "which rows: by their outputs, or as many at random, for comparison"},
    {"interval", ESP_T_INT, AT(continual.strategy.migu.interval), .def = "50", RANGE(1, BIG),
     .help = "steps between two measurements of the outputs"},
    {"samples", ESP_T_INT, AT(continual.strategy.migu.samples), .def = "8", RANGE(1, BIG),
     .help = "of the task that are looked at each time"},
    {"tokens", ESP_T_INT, AT(continual.strategy.migu.tokens), .def = "128", RANGE(1, BIG),
     .help = "rows of each layer's output that are taken from them"},
};
STRATEGY(migu, "Strategy migu: only rows of large output magnitude get a gradient.");

static const esp_key ogd_keys[] = {
    {"samples", ESP_T_INT, AT(continual.strategy.ogd.samples), .def = "32", RANGE(1, 4096),
     .help = "of a finished task whose gradients are taken"},
    {"directions", ESP_T_INT, AT(continual.strategy.ogd.directions), .def = "16", RANGE(1, 4096),
     .help = "principal directions of them that are kept; as many as samples: all (OGD)"},
};
STRATEGY(ogd, "Strategy ogd: steps are orthogonal to the gradients of earlier tasks' samples.");

static const esp_key refactor_keys[] = {
    {"interval", ESP_T_INT, AT(continual.strategy.refactor.interval), .def = "off", RANGE(1, BIG), .word = "off",
     .help = "steps from one to the next, beside that when a task begins"},
};
STRATEGY(refactor, "Strategy refactor: low-rank factors are balanced anew and the optimizer's moments reset.");

static const esp_key perturb_keys[] = {
    {"when", ESP_T_WORD, AT(continual.strategy.perturb.when), .def = "step", WORDS("step", "task"),
     .help = "after each step, or when a later task begins"},
    {"weight", ESP_T_NUMBER, AT(continual.strategy.perturb.weight), .def = "0.1", RANGE(0, 1e6),
     .help = "parameters shrink by lr weight each step, by weight at a task"},
    {"noise", ESP_T_NUMBER, AT(continual.strategy.perturb.noise), .def = "1e-2", RANGE(0, 1e6),
     .help = "standard deviation of what is added: lr noise each step, noise at a task"},
};
STRATEGY(perturb, "Strategy perturb: parameters shrink and are perturbed.");

static const esp_key upgd_keys[] = {
    {"beta", ESP_T_NUMBER, AT(continual.strategy.upgd.beta), .def = "0.99", .flags = ESP_K_BELOW_MAX, RANGE(0, 1),
     .help = "of the running mean of utilities"},
    {"noise", ESP_T_NUMBER, AT(continual.strategy.upgd.noise), .def = "1e-2", RANGE(0, 1e6),
     .help = "standard deviation of the perturbation of the gradient"},
};
STRATEGY(upgd, "Strategy upgd: useful parameters move less, the others are perturbed more.");
