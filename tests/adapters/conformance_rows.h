/* conformance_rows.h: the kinds and configurations that every invariant of test_adapters_conformance.c is held for. A
 * new kind is one more row. */
#ifndef TESTS_CONFORMANCE_ROWS_H
#define TESTS_CONFORMANCE_ROWS_H

#include "adapter_fixture.h"

typedef struct row {
  const char *name, *base;
  esp_adapter_cfg cfg;
  bool rewrites; /* the base is W - s B A: identity up to rounding, no base mode */
} row;

#define NAMES(...)                                                                                                     \
  .target = (const char *const[]){__VA_ARGS__}, .n_target = sizeof((const char *[]){__VA_ARGS__}) / sizeof(char *)
#define LORA .type = "lora", .r = 4, .alpha = 6, .seed = 5

#define MORA .type = "mora", .r = 4, .seed = 5
#define SPARSE(kind) .type = kind, .r = 1, .seed = 5, .sparse_mask = "random"
#define S2FT .type = "s2ft", .r = 1, .seed = 5

#define LOHA .type = "loha", .r = 3, .alpha = 60, .seed = 5
#define LOTR .type = "lotr", .r = 3, .alpha = 2, .seed = 5
#define PMSS .type = "pmss", .r = 5, .alpha = 60, .seed = 5
#define PROMPT .type = "prompt", .seed = 5
#define PREFIX .type = "prefix", .seed = 5
#define HUT .type = "hut", .r = 3, .alpha = 6, .seed = 5
#define LOKR .type = "lokr", .r = 2, .alpha = 20, .seed = 5

#define DORA .type = "dora", .r = 4, .alpha = 6, .seed = 5
#define VERA .type = "vera", .r = 6, .projection_key = 3
#define IA3 .type = "ia3", .r = 1
#define LN .type = "ln_tuning", .r = 1
#define BITFIT .type = "bitfit", .r = 1
#define SAVED(...)                                                                                                     \
  .modules_to_save = (const char *const[]){__VA_ARGS__},                                                               \
  .n_modules_to_save = sizeof((const char *[]){__VA_ARGS__}) / sizeof(char *)
#define FF(...)                                                                                                        \
  .feedforward = (const char *const[]){__VA_ARGS__},                                                                   \
  .n_feedforward = sizeof((const char *[]){__VA_ARGS__}) / sizeof(char *)
#define LAYER_1 .layers = (const int[]){1}, .n_layers = 1

#define RANKS(kind)                                                                                                    \
  .type = kind, .r = 4, .alpha = 60, .seed = 5, .interval = 1, .beta1 = 0.85, .beta2 = 0.85, .orth_weight = 0.1
#define DYRANK .type = "dyrank", .r = 4, .alpha = 60, .seed = 5, .interval = 1, .beta1 = 0.85, .beta2 = 0.85
#define ADALORA                                                                                                        \
  .type = "adalora", .r = 4, .target_r = 2, .alpha = 60, .seed = 5, .interval = 1, .beta1 = 0.85, .beta2 = 0.85,       \
  .orth_weight = 0.5

#define TASKS(kind) .type = kind, .r = 2, .alpha = 6, .seed = 5, .tasks = 3, .task = 1

#define MISS .type = "miss", .r = 5
#define OFT .type = "oft", .r = 1
#define HRA .type = "hra", .seed = 5

#define TASKS(kind) .type = kind, .r = 2, .alpha = 6, .seed = 5, .tasks = 3, .task = 1

static const row rows[] = {
    {"lora qv", "qwen", {LORA, NAMES("q_proj", "v_proj")}, false},
    {"lora all-linear", "qwen", {LORA, NAMES("all-linear")}, false},
    {"lora conv1d", "gpt2", {LORA, NAMES("c_attn", "c_proj", "c_fc")}, false},
    {"lora rslora gaussian",
     "llama",
     {LORA, .rslora = true, .init = "gaussian", .target_regex = ".*mlp\\.(gate|up|down)_proj"},
     false},
    {"lora orthogonal", "qwen", {LORA, .init = "orthogonal", NAMES("k_proj", "o_proj")}, false},
    {"lora patterns",
     "qwen",
     {LORA, NAMES("q_proj", "k_proj", "v_proj"),
      .rank_pattern = (const esp_pattern[]){{"k_proj", 2}, {"layers.1.self_attn.q_proj", 7}}, .n_rank_pattern = 2,
      .alpha_pattern = (const esp_pattern[]){{"v_proj", 3}, {"layers.1.self_attn.v_proj", 9}}, .n_alpha_pattern = 2},
     false},
    {"lora layer 1 and head",
     "qwen",
     {LORA, NAMES("q_proj", "lm_head"), .exclude = (const char *const[]){"model.layers.0.self_attn.q_proj"},
      .n_exclude = 1},
     false},
    {"lora embedding", "qwen", {LORA, NAMES("embed_tokens", "v_proj")}, false},
    {"lora embedding gpt2", "gpt2", {LORA, NAMES("wpe", "c_fc")}, false},
    {"lora dropout", "qwen", {LORA, .dropout = 0.3, NAMES("all-linear")}, false},
    {"lora bias", "qwen", {LORA, .lora_bias = true, NAMES("q_proj", "k_proj")}, false},
    {"lora bias all", "gpt2", {LORA, .bias = "all", NAMES("c_attn")}, false},
    {"lora bias lora_only", "qwen", {LORA, .bias = "lora_only", NAMES("q_proj", "v_proj")}, false},
    {"lora modules_to_save",
     "qwen",
     {LORA, NAMES("q_proj"),
      .modules_to_save = (const char *const[]){"lm_head", "embed_tokens", "norm", "layers.1.mlp.up_proj"},
      .n_modules_to_save = 4},
     false},
    {"lora modules_to_save conv1d",
     "gpt2",
     {LORA, NAMES("c_attn"), .modules_to_save = (const char *const[]){"h.0.mlp.c_fc", "ln_f"}, .n_modules_to_save = 2},
     false},
    {"lora trainable tokens",
     "qwen",
     {LORA, NAMES("q_proj"), .trainable_tokens = (const int32_t[]){30, 3, 12}, .n_trainable_tokens = 3},
     false},
    {"lora trainable tokens tied",
     "llama",
     {LORA, NAMES("q_proj"), .trainable_tokens = (const int32_t[]){30, 3, 12}, .n_trainable_tokens = 3},
     false},
    {"lora pissa", "qwen", {LORA, .init = "pissa", NAMES("q_proj", "down_proj")}, true},
    {"lora pissa niter", "gpt2", {LORA, .init = "pissa_niter_4", NAMES("c_attn")}, true},
    {"lora olora rslora", "llama", {LORA, .init = "olora", .rslora = true, NAMES("q_proj", "up_proj")}, true},
    {"lora loftq", "qwen", {LORA, .init = "loftq", .loftq_iter = 2, NAMES("all-linear")}, true},
    {"lora loftq rows", "llama", {LORA, .init = "loftq", .loftq_bits = 8, NAMES("v_proj", "down_proj")}, true},
    {"lora fixed A", "qwen", {LORA, .lora_fa = true, NAMES("q_proj", "up_proj", "down_proj")}, false},
    {"mora", "qwen", {MORA, NAMES("all-linear")}, false},
    {"mora one site, dropout", "qwen", {MORA, .dropout = 0.3, NAMES("k_proj", "v_proj", "up_proj")}, false},
    {"mora conv1d", "gpt2", {MORA, NAMES("c_attn", "c_proj", "c_fc")}, false},
    {"mora rotation", "qwen", {MORA, .mora_type = "rotation", NAMES("all-linear")}, false},
    {"mora rotation, cut and repeated",
     "gpt2",
     {.type = "mora", .r = 2, .seed = 5, .mora_type = "rotation", .dropout = 0.2, NAMES("c_attn", "c_proj", "c_fc")},
     false},
    {"loha", "qwen", {LOHA, NAMES("all-linear")}, false},
    {"loha conv1d", "gpt2", {LOHA, NAMES("c_attn", "c_proj", "c_fc")}, false},
    {"loha patterns",
     "qwen",
     {LOHA, NAMES("q_proj", "v_proj", "gate_proj"), .rank_pattern = (const esp_pattern[]){{"v_proj", 2}},
      .n_rank_pattern = 1, .alpha_pattern = (const esp_pattern[]){{"q_proj", 90}}, .n_alpha_pattern = 1},
     false},
    {"lokr", "qwen", {LOKR, NAMES("all-linear")}, false},
    {"lokr whole",
     "qwen",
     {.type = "lokr", .r = 8, .alpha = 20, .seed = 5, NAMES("q_proj", "v_proj", "down_proj")},
     false},
    {"lokr both", "gpt2", {LOKR, .decompose_both = true, NAMES("c_attn", "c_proj", "c_fc")}, false},
    {"lokr factor", "qwen", {LOKR, .decompose_factor = 4, NAMES("k_proj", "up_proj", "down_proj")}, false},
    {"ia3 all-linear", "qwen", {IA3, NAMES("all-linear"), FF("down_proj")}, false},
    {"ia3 input forms", "gpt2", {IA3, NAMES("c_attn", "c_fc", "c_proj"), FF("c_attn", "mlp.c_proj")}, false},
    {"ia3 layer 1", "llama", {IA3, NAMES("k_proj", "o_proj"), .feedforward_regex = ".*o_proj", LAYER_1}, false},
    {"increlora", "qwen", {RANKS("increlora"), .target_r = 6, NAMES("all-linear")}, false},
    {"increlora conv1d", "gpt2", {RANKS("increlora"), .target_r = 5, NAMES("c_attn", "c_fc")}, false},
    {"increlora of uneven ranks",
     "llama",
     {RANKS("increlora"), .target_r = 6, NAMES("q_proj", "k_proj", "v_proj"),
      .rank_pattern = (const esp_pattern[]){{"k_proj", 2}, {"layers.1.self_attn.q_proj", 7}}, .n_rank_pattern = 2},
     false},
    {"elalora", "qwen", {RANKS("elalora"), .elastic_share = 0.1, .dropout = 0.2, NAMES("all-linear")}, false},
    {"elalora conv1d", "gpt2", {RANKS("elalora"), .elastic_share = 0.1, NAMES("c_attn", "c_fc")}, false},
    {"dyrank", "qwen", {DYRANK, .threshold = 0.01, NAMES("all-linear")}, false},
    {"dyrank conv1d", "gpt2", {DYRANK, .threshold = 0.01, NAMES("c_attn", "c_fc")}, false},
    {"adalora all-linear", "qwen", {ADALORA, NAMES("all-linear")}, false},
    {"adalora conv1d", "gpt2", {ADALORA, NAMES("c_attn", "c_proj", "c_fc")}, false},
    {"adalora dropout, bias, head",
     "llama",
     {ADALORA, .dropout = 0.3, .bias = "all", NAMES("q_proj", "v_proj", "down_proj")},
     false},
    {"adalora with ranks taken out",
     "qwen",
     {ADALORA, NAMES("q_proj", "k_proj", "v_proj", "o_proj"),
      .kept = (const esp_kept[]){{"model.layers.0.self_attn.q_proj", 4, (const uint8_t[]){0, 1, 0, 1}},
                                 {"model.layers.0.self_attn.k_proj", 4, (const uint8_t[]){0, 0, 0, 0}},
                                 {"model.layers.1.self_attn.o_proj", 4, (const uint8_t[]){0, 0, 0, 0}}},
      .n_kept = 3},
     false},
    {"olora_cl", "qwen", {TASKS("olora_cl"), NAMES("all-linear")}, false},
    {"olora_cl one task, conv1d",
     "gpt2",
     {.type = "o-lora", .r = 3, .alpha = 6, .seed = 5, NAMES("c_attn", "c_fc")},
     false},
    {"olora_cl patterns, dropout",
     "qwen",
     {TASKS("olora_cl"), .dropout = 0.3, NAMES("q_proj", "v_proj"), .orthogonal = "frobenius",
      .rank_pattern = (const esp_pattern[]){{"v_proj", 2}}, .n_rank_pattern = 1},
     false},
    {"incremental_rank", "qwen", {TASKS("incremental_rank"), NAMES("all-linear")}, false},
    {"incremental_rank patterns, dropout",
     "qwen",
     {TASKS("incremental_rank"), .dropout = 0.3, .rslora = true, NAMES("q_proj", "v_proj", "down_proj"),
      .rank_pattern = (const esp_pattern[]){{"v_proj", 3}}, .n_rank_pattern = 1},
     false},
    {"mora_rank", "qwen", {TASKS("mora_rank"), .gate_temperature = 0.5, NAMES("all-linear")}, false},
    {"mora_rank one task, conv1d",
     "gpt2",
     {.type = "mora_rank", .r = 5, .alpha = 6, .seed = 5, .gate_temperature = 0.5, NAMES("c_attn", "c_fc")},
     false},
    {"mora_rank budget, patterns, dropout",
     "qwen",
     {.type = "mora_rank",
      .r = 4,
      .alpha = 6,
      .seed = 5,
      .tasks = 2,
      .task = 1,
      .dropout = 0.3,
      .gate_top_k = 6,
      NAMES("q_proj", "v_proj", "down_proj"),
      .rank_pattern = (const esp_pattern[]){{"v_proj", 3}},
      .n_rank_pattern = 1,
      .alpha_pattern = (const esp_pattern[]){{"q_proj", 9}},
      .n_alpha_pattern = 1},
     false},
    {"miss all-linear", "qwen", {MISS, NAMES("all-linear")}, false},
    {"miss conv1d", "gpt2", {MISS, NAMES("c_attn", "c_proj", "c_fc")}, false},
    {"miss gap, dropout", "qwen", {MISS, .dropout = 0.3, NAMES("q_proj", "v_proj", "gate_proj")}, false},
    {"miss mini", "qwen", {MISS, .miss_type = "mini", .mini_r = 4, NAMES("all-linear")}, false},
    {"bat all-linear", "qwen", {.type = "bat", .r = 8, NAMES("all-linear")}, false},
    {"bat conv1d", "gpt2", {.type = "bat", .r = 16, NAMES("c_attn", "c_proj", "c_fc")}, false},
    {"bat k and up", "llama", {.type = "bat", .r = 4, NAMES("k_proj", "up_proj")}, false},
    {"oft all-linear", "qwen", {OFT, .oft_block_size = 8, .cayley_terms = 5, NAMES("all-linear")}, false},
    {"oft exact", "qwen", {OFT, .oft_block_size = 16, NAMES("all-linear")}, false},
    {"oft exact shared conv1d",
     "gpt2",
     {OFT, .oft_block_size = 8, .oft_block_share = true, NAMES("c_attn", "c_proj", "c_fc")},
     false},
    {"oft blocks, three terms",
     "llama",
     {OFT, .oft_blocks = 4, .cayley_terms = 3, NAMES("k_proj", "down_proj")},
     false},
    {"oft two terms, shared",
     "qwen",
     {OFT, .oft_block_size = 4, .oft_block_share = true, .cayley_terms = 2, NAMES("q_proj", "v_proj", "lm_head")},
     false},
    {"hra all-linear", "qwen", {HRA, .r = 4, NAMES("all-linear")}, false},
    {"hra conv1d", "gpt2", {HRA, .r = 4, NAMES("c_attn", "c_proj", "c_fc")}, false},
    {"hra gram-schmidt", "qwen", {HRA, .r = 3, .apply_gs = true, NAMES("q_proj", "down_proj", "up_proj")}, false},
    {"hra gap", "qwen", {HRA, .r = 4, NAMES("q_proj", "v_proj", "up_proj")}, false},
    {"lotr", "qwen", {LOTR, NAMES("all-linear")}, false},
    {"lotr conv1d", "gpt2", {LOTR, NAMES("c_attn", "c_proj", "c_fc")}, false},
    {"lotr factors that lie apart",
     "qwen",
     {LOTR, .target_regex = "(.*layers\\.0\\.self_attn\\.v_proj)|(.*layers\\.1\\.self_attn\\.[qkv]_proj)|lm_head",
      .rank_pattern = (const esp_pattern[]){{"q_proj", 2}}, .n_rank_pattern = 1,
      .alpha_pattern = (const esp_pattern[]){{"k_proj", 9}}, .n_alpha_pattern = 1},
     false},
    {"dora all-linear", "qwen", {DORA, NAMES("all-linear")}, false},
    {"dora conv1d bias", "gpt2", {DORA, NAMES("c_attn", "c_proj", "c_fc"), .bias = "lora_only"}, false},
    {"dora rslora patterns",
     "llama",
     {DORA, NAMES("q_proj", "v_proj", "up_proj"), .rslora = true, .init = "gaussian",
      .rank_pattern = (const esp_pattern[]){{"v_proj", 2}}, .n_rank_pattern = 1},
     false},
    {"dora orthogonal", "qwen", {DORA, .init = "orthogonal", NAMES("k_proj", "lm_head")}, false},
    {"dora dropout", "qwen", {DORA, .dropout = 0.3, NAMES("q_proj", "k_proj", "gate_proj", "down_proj")}, false},
    {"vera all-linear", "qwen", {VERA, .save_projection = true, NAMES("all-linear")}, false},
    {"vera conv1d seeded", "gpt2", {VERA, NAMES("c_attn", "c_fc"), .bias = "lora_only"}, false},
    {"vera parts of groups", "llama", {VERA, NAMES("q_proj", "v_proj", "up_proj"), LAYER_1}, false},
    {"vera dropout", "qwen", {VERA, .dropout = 0.3, NAMES("k_proj", "gate_proj", "down_proj", "lm_head")}, false},
    {"ln_tuning", "qwen", {LN, NAMES("all-linear")}, false},
    {"ln_tuning named", "llama", {LN, NAMES("input_layernorm", "model.norm"), LAYER_1}, false},
    {"ln_tuning biases", "gpt2", {LN, NAMES("ln_1", "ln_f"), SAVED("h.0.mlp.c_fc")}, false},
    {"bitfit", "gpt2", {BITFIT, NAMES("all-linear")}, false},
    {"bitfit qv", "qwen", {BITFIT, NAMES("q_proj", "v_proj")}, false},
    {"pmss", "qwen", {PMSS, NAMES("all-linear")}, false},
    {"pmss norm, conv1d", "gpt2", {PMSS, .pmss_select = "norm", NAMES("c_attn", "c_proj", "c_fc")}, false},
    {"pmss uniform, patterns",
     "qwen",
     {PMSS, .pmss_select = "uniform", NAMES("q_proj", "v_proj", "down_proj"),
      .rank_pattern = (const esp_pattern[]){{"v_proj", 2}}, .n_rank_pattern = 1},
     false},
    {"prompt", "qwen", {PROMPT, .virtual_tokens = 5}, false},
    {"prompt before positions", "gpt2", {PROMPT, .prompt_init = "random", .virtual_tokens = 3}, false},
    {"prompt of a text, tied",
     "llama",
     {PROMPT, .prompt_text = "x", .prompt_ids = (const int32_t[]){7, 30, 2}, .n_prompt_ids = 3},
     false},
    {"prefix", "qwen", {PREFIX, .virtual_tokens = 5}, false},
    {"prefix before positions", "gpt2", {PREFIX, .virtual_tokens = 3}, false},
    {"prefix, tied", "llama", {PREFIX}, false},
    {"prefix through a network", "qwen", {PREFIX, .virtual_tokens = 5, .prefix_projection = true}, false},
    {"prefix through a wide network",
     "gpt2",
     {PREFIX, .virtual_tokens = 3, .prefix_projection = true, .encoder_hidden = 40},
     false},
    {"hut", "qwen", {HUT, NAMES("all-linear")}, false},
    {"hut conv1d", "gpt2", {HUT, NAMES("c_attn", "c_proj", "c_fc")}, false},
    {"hut k and up",
     "qwen",
     {HUT, NAMES("k_proj", "up_proj"), .rank_pattern = (const esp_pattern[]){{"up_proj", 5}}, .n_rank_pattern = 1},
     false},
    {"full", "qwen", {.type = "full"}, false},
    {"full tied", "llama", {.type = "full"}, false},
    {"full gpt2", "gpt2", {.type = "full"}, false},
    {"s2ft all", "qwen", {S2FT, .s2ft_heads = 3, .s2ft_channels = 20, NAMES("all-linear")}, false},
    {"s2ft columns", "llama", {S2FT, .s2ft_heads = 1, .s2ft_channels = 16, NAMES("o_proj", "down_proj")}, false},
    {"s2ft conv1d", "gpt2", {S2FT, .s2ft_heads = 2, .s2ft_channels = 9, NAMES("c_attn", "c_proj", "c_fc")}, false},
    {"fish", "qwen", {SPARSE("fish"), .sparse_density = 0.05, NAMES("all-linear")}, false},
    {"fish sparser than rows", "llama", {SPARSE("fish"), .sparse_density = 0.01, NAMES("q_proj", "down_proj")}, false},
    {"spu", "qwen", {SPARSE("spu"), .bias = "lora_only", NAMES("q_proj", "up_proj")}, false},
    {"spu conv1d", "gpt2", {SPARSE("spu"), NAMES("c_attn", "c_fc", "c_proj")}, false},
    {"layers top", "qwen", {.type = "layers", .top_layers = 1}, false},
    {"layers named gpt2", "gpt2", {.type = "layers", .layers = (const int[]){0}, .n_layers = 1}, false},
    {"layers and head",
     "qwen",
     {.type = "layers",
      .top_layers = 1,
      .modules_to_save = (const char *const[]){"lm_head", "model.norm"},
      .n_modules_to_save = 2},
     false},
};

#endif
