/* schema.c: the table itself. */
#include "recipe/schema_rows.h"

#include <string.h>

#include "text/template.h"

static const int dtype_values[] = {ESP_BF16, ESP_F32};

static const esp_key model_keys[] = {
    {"base_model", ESP_T_PATH, AT(model.base_model), .flags = ESP_K_REQUIRED | ESP_K_COMMON,
     .aliases = "model_name_or_path base path",
     .help = "directory of a Hugging Face model: config.json, *.safetensors, tokenizer.json"},
    {"dtype", ESP_T_ENUM, AT(model.dtype), .def = "bf16", .flags = ESP_K_COMMON, WORDS("bf16", "fp32"),
     .values = dtype_values, .aliases = "torch_dtype", .help = "type of weights and activations in the computation"},
    {"random_init", ESP_T_BOOL, AT(model.random_init), .def = "false",
     .help = "make a new base from config.json alone instead of reading weights"},
    {"tokenizer", ESP_T_PATH, AT(model.tokenizer), .aliases = "tokenizer_path",
     .help = "directory of tokenizer.json, when it is not the model's"},
};

static const esp_key adapter_keys[] = {
    {"type", ESP_T_WORD, AT(adapter.type), .def = "lora", .flags = ESP_K_COMMON, .names = esp_adapter_names,
     .aliases = "adapter finetuning_type peft_type", .help = "kind of adapter; full trains the base itself"},
    {"r", ESP_T_INT, AT(adapter.r), .def = "16", .flags = ESP_K_COMMON, RANGE(1, 65536),
     .aliases = "rank lora_r lora_rank", .help = "rank"},
    {"alpha", ESP_T_NUMBER, AT(adapter.alpha), .def = "32", .flags = ESP_K_COMMON | ESP_K_ABOVE_MIN, RANGE(0, 1e6),
     .aliases = "lora_alpha", .help = "scale: the adapter's effect is multiplied by alpha / r"},
    {"dropout", ESP_T_NUMBER, AT(adapter.dropout), .def = "0", .flags = ESP_K_COMMON | ESP_K_BELOW_MAX, RANGE(0, 1),
     .aliases = "lora_dropout", .help = "share of the adapter's inputs that are zeroed in training"},
    {"target", ESP_T_TARGET, LIST(adapter.target, adapter.n_target),
     .regex_offset = offsetof(esp_recipe, adapter.target_regex), .def = "all-linear", .flags = ESP_K_COMMON,
     .aliases = "target_modules lora_target lora_target_modules",
     .help = "all-linear, a list of module names, or regex:EXPRESSION matched against the whole path"},
    {"exclude", ESP_T_TARGET, LIST(adapter.exclude, adapter.n_exclude),
     .regex_offset = offsetof(esp_recipe, adapter.exclude_regex), .def = "[]", .aliases = "exclude_modules",
     .help = "modules left out of target: a list of names or regex:EXPRESSION"},
    {"layers", ESP_T_INTS, LIST(adapter.layers, adapter.n_layers), .def = "[]", RANGE(0, 100000),
     .aliases = "layers_to_transform", .help = "only these layers; empty: all"},
    {"layers_pattern", ESP_T_STRING, AT(adapter.layers_pattern), .help = "name of the list of layers in module paths"},
    {"rslora", ESP_T_BOOL, AT(adapter.rslora), .def = "false", .aliases = "use_rslora peft_use_rslora",
     .help = "scale by alpha / sqrt(r) instead of alpha / r"},
    {"init", ESP_T_WORD, AT(adapter.init), .def = "default",
     WORDS("default", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "lora_ga", "loftq"),
     .aliases = "init_lora_weights peft_init_lora_weights",
     .help = "first values of the adapter; pissa and olora take them from the base and change it to match, eva, corda "
             "and lora_ga from the task's first micro-batches, loftq from what 4 bits lose of the base"},
    {"init_batches", ESP_T_INT, AT(adapter.init_batches), .def = "32", RANGE(1, 1e6), .of = "lora",
     .help = "lora, with init eva, corda or lora_ga: micro-batches to take it from; eva stops when nothing changes"},
    {"eva_rho", ESP_T_NUMBER, AT(adapter.eva_rho), .def = "2", RANGE(1, 1e6), .of = "lora",
     .help = "lora, with init eva: a module gets at most this many times r ranks; 1: ranks stay"},
    {"eva_tau", ESP_T_NUMBER, AT(adapter.eva_tau), .def = "0.99", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1), .of = "lora",
     .help = "lora, with init eva: cosine between batches at which a component stands"},
    {"eva_whiten", ESP_T_BOOL, AT(adapter.eva_whiten), .def = "false", .of = "lora",
     .help = "lora, with init eva: components are divided by the roots of their singular values"},
    {"eva_adjust_alpha", ESP_T_BOOL, AT(adapter.eva_adjust_alpha), .def = "true", .of = "lora",
     .help = "lora, with init eva: alpha changes with the rank of a module, so that the scale stays"},
    {"corda_method", ESP_T_WORD, AT(adapter.corda_method), .def = "ipm", WORDS("ipm", "kpm"), .of = "lora",
     .help = "lora, with init corda: the directions that the data uses most, or (kpm) least"},
    {"ga_direction", ESP_T_WORD, AT(adapter.ga_direction), .def = "ArB2r", WORDS("ArB2r", "A2rBr", "ArBr", "random"),
     .of = "lora", .help = "lora, with init lora_ga: which directions of the gradient A and B take"},
    {"ga_scale", ESP_T_WORD, AT(adapter.ga_scale), .def = "stable", WORDS("stable", "weight_svd", "gd_scale", "unit"),
     .of = "lora", .help = "lora, with init lora_ga: how B is scaled"},
    {"ga_gamma", ESP_T_NUMBER, AT(adapter.ga_gamma), .def = "16", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e6), .of = "lora",
     .help = "lora, with init lora_ga: of the scale stable"},
    {"loftq_bits", ESP_T_INT, AT(adapter.loftq_bits), .def = "4", RANGE(4, 8), .of = "lora",
     .help = "lora, with init loftq: 4 (NF4) or 8"},
    {"loftq_iter", ESP_T_INT, AT(adapter.loftq_iter), .def = "1", RANGE(1, 100), .of = "lora",
     .help = "lora, with init loftq: rounds of quantising and correcting"},
    {"lora_fa", ESP_T_BOOL, AT(adapter.lora_fa), .def = "false", .of = "lora",
     .help = "lora: A stays as it began, the gradient of B is projected (LoRA-FA)"},
    {"bias", ESP_T_WORD, AT(adapter.bias), .def = "none", WORDS("none", "all", "lora_only"),
     .help = "which biases of the base are trained"},
    {"lora_bias", ESP_T_BOOL, AT(adapter.lora_bias), .def = "false", .help = "a bias behind the B matrices"},
    {"rank_pattern", ESP_T_PATTERNS, LIST(adapter.rank_pattern, adapter.n_rank_pattern), .def = "{}", RANGE(1, 65536),
     .help = "other ranks where a module path ends in a match of the key, a regular expression"},
    {"alpha_pattern", ESP_T_PATTERNS, LIST(adapter.alpha_pattern, adapter.n_alpha_pattern), .def = "{}",
     .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e6), .help = "other alphas where a module path ends in a match of the key"},
    {"modules_to_save", ESP_T_STRINGS, LIST(adapter.modules_to_save, adapter.n_modules_to_save), .def = "[]",
     .aliases = "lora_modules_to_save additional_target",
     .help = "modules trained in full and saved with the adapter, e.g. [lm_head]"},
    {"trainable_tokens", ESP_T_INTS, LIST(adapter.trainable_tokens, adapter.n_trainable_tokens), .def = "[]",
     RANGE(0, 2147483647), .aliases = "trainable_token_indices peft_trainable_token_indices",
     .help = "token ids whose rows of the input embedding are trained"},
    {"projection_key", ESP_T_INT, AT(adapter.projection_key), .def = "0", RANGE(0, 4294967295.0),
     .aliases = "projection_prng_key", .of = "vera",
     .help = "vera: seed of the shared random projections, which are torch's"},
    {"save_projection", ESP_T_BOOL, AT(adapter.save_projection), .def = "true", .of = "vera",
     .help = "vera: the projections are in the file too; false: they are drawn again from projection_key"},
    {"d_initial", ESP_T_NUMBER, AT(adapter.d_initial), .def = "0.1", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e6),
     .of = "vera", .help = "vera: first value of lambda_d"},
    {"feedforward", ESP_T_TARGET, LIST(adapter.feedforward, adapter.n_feedforward),
     .regex_offset = offsetof(esp_recipe, adapter.feedforward_regex), .def = "[down_proj, mlp.c_proj]",
     .aliases = "feedforward_modules", .of = "ia3",
     .help = "ia3: targeted modules whose input is scaled, in the place of the output"},
    {"decompose_both", ESP_T_BOOL, AT(adapter.decompose_both), .def = "false", .of = "lokr",
     .help = "lokr: the left matrix of the Kronecker product is of low rank too, where that saves parameters"},
    {"decompose_factor", ESP_T_INT, AT(adapter.decompose_factor), .def = "auto", RANGE(1, 65536), .word = "auto",
     .of = "lokr",
     .help = "lokr: the divisor of both widths that the left matrix takes; auto: the nearest to their roots"},
    {"pmss_select", ESP_T_WORD, AT(adapter.pmss_select), .def = "pivot", WORDS("pivot", "norm", "uniform"),
     .of = "pmss",
     .help = "pmss: which rows and columns are taken: farthest from the span of the others, longest, random"},
    {"top_layers", ESP_T_INT, AT(adapter.top_layers), .def = "0", RANGE(0, 100000), .of = "layers",
     .help = "layers: the last so many blocks are trained; 0: those that `layers` names"},
    {"sparse_density", ESP_T_NUMBER, AT(adapter.sparse_density), .def = "0", RANGE(0, 0.5), .of = "fish spu",
     .help = "fish, spu: share of the entries of the targeted matrices that is trained; 0: 0.005 (fish), 0.1 (spu)"},
    {"sparse_mask", ESP_T_WORD, AT(adapter.sparse_mask), .def = "data", WORDS("data", "random"), .of = "fish spu",
     .help = "fish, spu: entries of largest score on the task's first micro-batches, or any"},
    {"sparse_batches", ESP_T_INT, AT(adapter.sparse_batches), .def = "8", RANGE(1, 1e6), .of = "fish spu",
     .help = "fish, spu: micro-batches that the mask is chosen from"},
    {"s2ft_heads", ESP_T_INT, AT(adapter.s2ft_heads), .def = "1", RANGE(1, 65536), .of = "s2ft",
     .help = "s2ft: attention heads per block whose part of q, k, v and o is trained"},
    {"s2ft_channels", ESP_T_INT, AT(adapter.s2ft_channels), .def = "32", RANGE(1, 1e9), .of = "s2ft",
     .help = "s2ft: channels per block whose part of gate, up and down is trained"},
    {"miss_type", ESP_T_WORD, AT(adapter.miss_type), .def = "default", WORDS("default", "mini"), .of = "miss",
     .help = "miss: mini repeats a matrix of mini_r columns over the outputs"},
    {"mini_r", ESP_T_INT, AT(adapter.mini_r), .def = "1", RANGE(1, 1048576), .of = "miss",
     .help = "miss, with miss_type mini: columns of the repeated matrix; must divide the outputs"},
    {"oft_block_size", ESP_T_INT, AT(adapter.oft_block_size), .def = "32", RANGE(2, 65536), .of = "oft",
     .help = "oft: width of the blocks that are turned; must divide the inputs"},
    {"oft_blocks", ESP_T_INT, AT(adapter.oft_blocks), .def = "0", RANGE(0, 65536), .of = "oft",
     .help = "oft: this many blocks per module in the place of oft_block_size; 0: by size"},
    {"oft_block_share", ESP_T_BOOL, AT(adapter.oft_block_share), .def = "false", .aliases = "block_share", .of = "oft",
     .help = "oft: one rotation for all blocks of a module"},
    {"cayley_terms", ESP_T_INT, AT(adapter.cayley_terms), .def = "5", RANGE(0, 32),
     .aliases = "num_cayley_neumann_terms", .of = "oft",
     .help = "oft: terms of the series for the rotation; 0: the exact Cayley transform"},
    {"coft", ESP_T_BOOL, AT(adapter.coft), .def = "false", .of = "oft",
     .help = "oft: the parameters of each block stay within coft_eps / sqrt(number of blocks)"},
    {"coft_eps", ESP_T_NUMBER, AT(adapter.coft_eps), .def = "6e-5", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e6),
     .of = "oft", .help = "oft, with coft: how far a rotation may go"},
    {"apply_gs", ESP_T_BOOL, AT(adapter.apply_gs), .def = "false", .aliases = "apply_GS", .of = "hra",
     .help = "hra: Gram-Schmidt before the reflections; training does not start at the base then"},
    {"mora_type", ESP_T_WORD, AT(adapter.mora_type), .def = "sharing", WORDS("sharing", "rotation"), .of = "mora",
     .help = "mora: how x is shrunk to the square matrix and its result grown again"},
    {"orthogonal", ESP_T_WORD, AT(adapter.orthogonal), .def = "l1", WORDS("l1", "frobenius"), .of = "olora_cl",
     .help =
         "olora_cl: penalty on the products of rows of A with those of earlier tasks: their sizes, or their squares"},
    {"orthogonal_lambda", ESP_T_NUMBER, AT(adapter.orthogonal_lambda), .def = "0.5", RANGE(0, 1e6), .of = "olora_cl",
     .help = "olora_cl: weight of that penalty"},
    {"virtual_tokens", ESP_T_INT, AT(adapter.virtual_tokens), .def = "20", RANGE(1, 65536),
     .aliases = "num_virtual_tokens", .of = "prompt prefix",
     .help = "prompt, prefix: trained rows in front of every sequence; they take positions of the base"},
    {"prompt_init", ESP_T_WORD, AT(adapter.prompt_init), .def = "default",
     WORDS("default", "vocab", "text", "random", "zero"), .aliases = "prompt_tuning_init", .of = "prompt prefix",
     .help = "first values; prompt: embeddings of random tokens (default), of prompt_text, or N(0, 1); prefix: random "
             "(default) or zero"},
    {"prefix_projection", ESP_T_BOOL, AT(adapter.prefix_projection), .def = "false", .of = "prefix",
     .help = "prefix: trained through a network of one hidden layer, which the file does not hold"},
    {"encoder_hidden", ESP_T_INT, AT(adapter.encoder_hidden), .def = "auto", RANGE(1, 1048576), .word = "auto",
     .aliases = "encoder_hidden_size", .of = "prefix",
     .help = "prefix, with prefix_projection: width of its hidden layer; auto: that of a layer's keys"},
    {"prompt_text", ESP_T_STRING, AT(adapter.prompt_text), .aliases = "prompt_tuning_init_text", .of = "prompt",
     .help = "prompt: the text that the rows start as, repeated or cut to virtual_tokens tokens"},
    {"gate_temperature", ESP_T_NUMBER, AT(adapter.gate_temperature), .def = "0.2", .flags = ESP_K_ABOVE_MIN,
     RANGE(0, 1e6), .of = "mora_rank",
     .help = "mora_rank: of the softmax over the activations of the ranks; high: all weigh the same"},
    {"gate_top_k", ESP_T_INT, AT(adapter.gate_top_k), .def = "0", RANGE(0, 1024), .of = "mora_rank",
     .help = "mora_rank: so many ranks of a module take part in a token; 0: all"},
    {"gate_threshold", ESP_T_NUMBER, AT(adapter.gate_threshold), .def = "0", .flags = ESP_K_BELOW_MAX, RANGE(0, 1),
     .of = "mora_rank",
     .help = "mora_rank: those whose share of the norm of all activations is below take no part; 0: any takes part"},
    {"target_r", ESP_T_INT, AT(adapter.target_r), .def = "8", RANGE(1, 65536), .of = "adalora increlora",
     .help = "adalora, increlora: ranks per module at the end, on average; r is what each starts with"},
    {"tinit", ESP_T_SHARE, AT(adapter.tinit), .def = "10%", RANGE(0, BIG), .of = "adalora increlora elalora dyrank",
     .help = "kinds that move ranks: first steps, or share of them, in which none is moved"},
    {"tfinal", ESP_T_SHARE, AT(adapter.tfinal), .def = "30%", RANGE(0, BIG), .of = "adalora increlora elalora dyrank",
     .help = "kinds that move ranks: last steps, or share of them, in which they stay as they are"},
    {"interval", ESP_T_INT, AT(adapter.interval), .def = "10", RANGE(1, 1e9), .aliases = "deltaT",
     .of = "adalora increlora elalora dyrank", .help = "kinds that move ranks: steps from one move to the next"},
    {"importance_beta1", ESP_T_NUMBER, AT(adapter.beta1), .def = "0.85", .flags = ESP_K_ABOVE_MIN | ESP_K_BELOW_MAX,
     RANGE(0, 1), .of = "adalora increlora elalora dyrank",
     .help = "kinds that move ranks: smoothing of the sensitivity of an element"},
    {"importance_beta2", ESP_T_NUMBER, AT(adapter.beta2), .def = "0.85", .flags = ESP_K_ABOVE_MIN | ESP_K_BELOW_MAX,
     RANGE(0, 1), .of = "adalora increlora elalora dyrank",
     .help = "kinds that move ranks: smoothing of its uncertainty"},
    {"orth_weight", ESP_T_NUMBER, AT(adapter.orth_weight), .def = "0.5", RANGE(0, 1e6), .aliases = "orth_reg_weight",
     .of = "adalora increlora elalora",
     .help = "adalora, increlora, elalora: weight of the penalty on P and Q that are not orthogonal"},
    {"elastic_share", ESP_T_NUMBER, AT(adapter.elastic_share), .def = "0.1", .flags = ESP_K_ABOVE_MIN, RANGE(0, 0.5),
     .of = "elalora",
     .help = "elalora: share of all ranks that is moved at the first adjustment; less and less at the later ones"},
    {"threshold", ESP_T_NUMBER, AT(adapter.threshold), .def = "0.5", RANGE(0, 1e6), .of = "dyrank",
     .help = "dyrank: by how much the importance of every rank shrinks in a step, in learning rates"},
};

static const esp_key data_keys[] = {
    {"sequence_len", ESP_T_INT, AT(data.sequence_len), .def = "1024", .flags = ESP_K_COMMON, RANGE(2, 1048576),
     .aliases = "cutoff_len max_seq_len max_length max_seq_length", .help = "tokens of a row"},
    {"packing", ESP_T_ENUM, AT(data.packing), .def = "bfd", .flags = ESP_K_COMMON, WORDS("off", "bfd"),
     .aliases = "sample_packing neat_packing packed",
     .help = "bfd: whole samples share a row, best fit first, and do not see each other; off: one sample per row"},
    {"overlong", ESP_T_ENUM, AT(data.overlong), .def = "drop",
     WORDS("drop", "truncate_end", "truncate_start", "split", "error"), .aliases = "excess_length_strategy truncation",
     .help = "what happens to a sample longer than sequence_len; counted and printed"},
    {"train_on", ESP_T_ENUM, AT(data.train_on), .def = "assistant", .flags = ESP_K_COMMON, WORDS("assistant", "all"),
     .help = "assistant: answers only (completions, labels); all: every token"},
    {"train_on_eos", ESP_T_WORD, AT(data.train_on_eos), .def = "turn", WORDS("turn", "last", "none"),
     .help = "which trained turns end with a trained terminator"},
    {"mask_history", ESP_T_BOOL, AT(data.mask_history), .def = "false",
     .help = "only the last assistant turn is trained"},
    {"chat_template", ESP_T_STRING, AT(data.chat_template), .def = "auto", .aliases = "template",
     .help =
         "for messages and sharegpt: builtin:chatml, llama3, mistral, gemma or alpaca; auto names the one to choose"},
    {"cache_dir", ESP_T_PATH, AT(data.cache_dir), .flags = ESP_K_NOHASH,
     .aliases = "dataset_prepared_path tokenized_path",
     .help = "folder for tokenised data, keyed by content; null: none"},
    {"shuffle", ESP_T_BOOL, AT(data.shuffle), .def = "true", .aliases = "shuffle_merged_datasets",
     .help = "another order of samples in each epoch, a function of seed and epoch"},
    {"add_bos", ESP_T_BOOL, AT(data.add_bos), .def = "true",
     .help = "text, prompts and classification begin with BOS where the tokenizer has one"},
};

static const esp_key optim_keys[] = {
    {"name", ESP_T_WORD, AT(optim.name), .def = "adamw", .flags = ESP_K_COMMON, .names = esp_optim_names,
     .aliases = "optimizer optim", .help = "optimizer"},
    {"lr", ESP_T_NUMBER, AT(optim.lr), .def = "2e-4", .flags = ESP_K_COMMON | ESP_K_ABOVE_MIN, RANGE(0, 100),
     .aliases = "learning_rate", .help = "highest learning rate"},
    {"beta1", ESP_T_NUMBER, AT(optim.beta1), .def = "0.9", .flags = ESP_K_BELOW_MAX, RANGE(0, 1),
     .aliases = "adam_beta1", .help = "decay of the mean of gradients"},
    {"beta2", ESP_T_NUMBER, AT(optim.beta2), .def = "0.999", .flags = ESP_K_BELOW_MAX, RANGE(0, 1),
     .aliases = "adam_beta2", .help = "decay of the mean of squared gradients"},
    {"betas", ESP_T_BETAS, AT(optim.beta1), .flags = ESP_K_INPUT_ONLY | ESP_K_BELOW_MAX, RANGE(0, 1),
     .help = "[beta1, beta2]"},
    {"eps", ESP_T_NUMBER, AT(optim.eps), .def = "1e-8", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1),
     .aliases = "adam_epsilon epsilon", .help = "added to the root of the second moment"},
    {"weight_decay", ESP_T_NUMBER, AT(optim.weight_decay), .def = "0", .flags = ESP_K_COMMON, RANGE(0, 10),
     .help = "decoupled from the gradient, times the learning rate"},
    {"momentum", ESP_T_NUMBER, AT(optim.momentum), .def = "0", .flags = ESP_K_BELOW_MAX, RANGE(0, 1), .help = "of sgd"},
    {"nesterov", ESP_T_BOOL, AT(optim.nesterov), .def = "false", .help = "of sgd; needs momentum"},
    {"max_grad_norm", ESP_T_NUMBER, AT(optim.max_grad_norm), .def = "1", .flags = ESP_K_COMMON, RANGE(0, 1e9),
     .word = "off", .aliases = "clip_grad_norm", .help = "gradients are scaled down to this norm; off: never"},
    {"lora_plus_ratio", ESP_T_NUMBER, AT(optim.lora_plus_ratio), .def = "off", RANGE(0, 1e6), .word = "off",
     .aliases = "loraplus_lr_ratio", .help = "LoRA+: the B matrices learn this many times faster"},
    {"lr_factors", ESP_T_PATTERNS, LIST(optim.lr_factors, optim.n_lr_factors), .def = "{}", .flags = ESP_K_ABOVE_MIN,
     RANGE(0, 1e6),
     .help = "lr of parameters in whose names the key, a regular expression, is found is multiplied; the first counts"},
};

static const esp_key schedule_keys[] = {
    {"name", ESP_T_ENUM, AT(schedule.name), .def = "cosine", .flags = ESP_K_COMMON,
     WORDS("constant", "linear", "cosine", "wsd", "infinite"), .aliases = "lr_scheduler lr_scheduler_type type",
     .help = "course of the learning rate after warm-up"},
    {"warmup", ESP_T_SHARE, AT(schedule.warmup_steps), .def = "3%", .flags = ESP_K_COMMON, RANGE(0, BIG),
     .aliases = "warmup_steps num_warmup_steps", .help = "steps, or a percentage of all steps, from 0 to lr"},
    {"min_lr_ratio", ESP_T_NUMBER, AT(schedule.min_lr_ratio), .def = "0.1", RANGE(0, 1),
     .aliases = "cosine_min_lr_ratio", .help = "lowest learning rate as a share of lr"},
    {"decay_share", ESP_T_NUMBER, AT(schedule.decay_share), .def = "0.2", RANGE(0, 1),
     .help = "wsd: share of the steps in the final decay"},
    {"cooldown", ESP_T_SHARE, AT(schedule.cooldown_steps), .def = "20%", RANGE(0, BIG),
     .help = "infinite: steps, or a percentage of all steps, of the cosine from lr to the constant rate"},
    {"constant_ratio", ESP_T_NUMBER, AT(schedule.constant_ratio), .def = "0.5", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1),
     .help = "infinite: the constant rate as a share of lr"},
    {"anneal", ESP_T_SHARE, AT(schedule.anneal_steps), .def = "10%", RANGE(0, BIG),
     .help =
         "infinite: last steps of a task, or percentage of them, that decay exponentially to min_lr_ratio; 0: none"},
    {"restart", ESP_T_SWITCH, AT(schedule_restart), .def = "per_task", WORDS("continuous", "per_task"),
     .help = "per_task: warm-up and decay in each task; continuous: once over all (infinite: the last decay in each)"},
};

static const esp_key train_keys[] = {
    {"epochs", ESP_T_NUMBER, AT(train.epochs), .def = "1", .flags = ESP_K_COMMON | ESP_K_ABOVE_MIN, RANGE(0, 1e6),
     .aliases = "num_epochs num_train_epochs", .help = "passes over the task's data"},
    {"max_steps", ESP_T_INT, AT(train.max_steps), .def = "off", RANGE(1, BIG), .word = "off",
     .help = "optimizer steps of the task, instead of epochs"},
    {"micro_batch_size", ESP_T_INT, AT(train.micro_batch_size), .def = "2", .flags = ESP_K_COMMON, RANGE(1, 1048576),
     .aliases = "per_device_train_batch_size batch_size", .help = "rows that a rank computes at once"},
    {"gradient_accumulation_steps", ESP_T_INT, AT(train.gradient_accumulation_steps), .def = "1", .flags = ESP_K_COMMON,
     RANGE(1, 1048576), .aliases = "accumulate", .help = "micro-batches of an optimizer step"},
};

static const esp_key memory_keys[] = {
    {"activation_checkpointing", ESP_T_ENUM, AT(memory.activation_checkpointing), .def = "off",
     .flags = ESP_K_NOHASH | ESP_K_COMMON, WORDS("off", "full"),
     .aliases = "gradient_checkpointing enable_activation_checkpointing",
     .help = "full: only the input of each block is kept, the block is computed again in backward"},
    {"limit", ESP_T_LIMIT, AT(memory.limit_bytes), .def = "95%", .flags = ESP_K_NOHASH,
     .help = "a run that needs more is refused: a percentage of the machine's memory or a size (12GiB); with a GPU, of "
             "its memory"},
    {"offload_base", ESP_T_BOOL, AT(memory.offload_base), .def = "false", .flags = ESP_K_NOHASH,
     .help = "frozen weights stay in host memory and are streamed to the GPU a layer ahead: for bases larger than it"},
};

static const esp_key parallel_keys[] = {
    {"comm", ESP_T_WORD, AT(parallel.comm), .def = "auto", .flags = ESP_K_NOHASH, WORDS("auto", "self", "mpi"),
     .help = "how ranks talk; auto: mpi under mpirun or srun, else self"},
    {"threads", ESP_T_INT32, AT(parallel.threads), .def = "auto", .flags = ESP_K_NOHASH, RANGE(1, 4096), .word = "auto",
     .help = "threads of this process; auto: the processors it may use"},
    {"device", ESP_T_STRING, AT(parallel.device), .def = "auto", .flags = ESP_K_NOHASH | ESP_K_COMMON,
     .help = "auto, cpu, cuda or cuda:N; auto: a GPU where there is one, ranks take one each"},
    {"tf32", ESP_T_BOOL, AT(parallel.tf32), .def = "false",
     .help = "products of dtype fp32 may round their operands to 10 bits of mantissa on a GPU"},
};

#define SET(field) .offset = offsetof(esp_eval_set, field)
static const esp_key set_keys[] = {
    {"name", ESP_T_NAME, SET(name), .flags = ESP_K_REQUIRED, .help = "how tasks refer to it"},
    {"path", ESP_T_PATH, SET(source.path), .flags = ESP_K_REQUIRED, .help = "JSONL or JSON file, or a folder of them"},
    {"split", ESP_T_WORD, SET(source.split), .def = "test", WORDS("train", "dev", "eval", "test"),
     .help = "which file of a folder"},
    {"format", ESP_T_ENUM, SET(source.format), .def = "auto",
     WORDS("auto", "prompt_completion", "alpaca", "text", "messages", "sharegpt", "classification", "cl_benchmark",
           "natural_instructions"),
     .help = "shape of a row; auto: judged from the first row's keys"},
    {"metric", ESP_T_ENUM, SET(metric), .flags = ESP_K_REQUIRED,
     WORDS("perplexity", "choice", "exact_match", "rouge_l", "base_xent", "base_kl"),
     .help = "choice: the most likely label; exact_match, rouge_l: of generated text; base_xent, base_kl: against the "
             "base"},
    {"max_new_tokens", ESP_T_INT, SET(max_new_tokens), .def = "64", RANGE(1, 1048576), .help = "for generated text"},
    {"limit", ESP_T_INT, SET(limit), .def = "all", RANGE(1, BIG), .word = "all", .help = "only the first rows"},
    {"prompt_template", ESP_T_STRING, SET(source.prompt_template),
     .help = "classification: the prompt, {text} is replaced"},
    {"labels", ESP_T_STRINGS, SET(source.labels), .count_offset = offsetof(esp_eval_set, source.n_labels), .def = "[]",
     .help = "classification: the labels to choose from; empty: those in the data"},
};
static const esp_object set_object = {"evaluation set", "", set_keys, COUNT(set_keys), sizeof(esp_eval_set)};

#define SRC(field) .offset = offsetof(esp_data_source, field)
static const esp_key source_keys[] = {
    {"path", ESP_T_PATH, SRC(path), .flags = ESP_K_REQUIRED | ESP_K_COMMON,
     .help = "JSONL or JSON file, or a folder of them"},
    {"split", ESP_T_WORD, SRC(split), .def = "train", WORDS("train", "dev", "eval", "test"),
     .help = "which file of a folder"},
    {"format", ESP_T_ENUM, SRC(format), .def = "auto", .flags = ESP_K_COMMON,
     WORDS("auto", "prompt_completion", "alpaca", "text", "messages", "sharegpt", "classification", "cl_benchmark",
           "natural_instructions"),
     .aliases = "type", .help = "shape of a row; auto: judged from the first row's keys"},
    {"weight", ESP_T_NUMBER, SRC(weight), .def = "1", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e6),
     .help = "how often its samples are drawn, relative to their number"},
    {"limit", ESP_T_INT, SRC(limit), .def = "all", RANGE(1, BIG), .word = "all", .help = "only the first rows"},
    {"prompt_template", ESP_T_STRING, SRC(prompt_template), .help = "classification: the prompt, {text} is replaced"},
    {"labels", ESP_T_STRINGS, SRC(labels), .count_offset = offsetof(esp_data_source, n_labels), .def = "[]",
     .help = "classification: the labels there may be; empty: those in the data"},
};
static const esp_object source_object = {"data source", "", source_keys, COUNT(source_keys), sizeof(esp_data_source)};

static const esp_key eval_keys[] = {
    {"every", ESP_T_INT, AT(eval.every), .def = "task", .flags = ESP_K_NOHASH, RANGE(1, BIG), .word = "task",
     .aliases = "eval_steps", .help = "steps between evaluations inside a task; task: at task ends only"},
    {"midway", ESP_T_ENUM, AT(eval.midway), .def = "own", .flags = ESP_K_NOHASH, WORDS("own", "seen", "all"),
     .help = "what is evaluated inside a task: its own sets, those of the tasks so far, or all"},
    {"dense_steps", ESP_T_INT, AT(eval.dense_steps), .def = "0", .flags = ESP_K_NOHASH, RANGE(0, BIG),
     .help = "the first steps of each task, in which is evaluated every dense_every: what happens at a task switch"},
    {"dense_every", ESP_T_INT, AT(eval.dense_every), .def = "1", .flags = ESP_K_NOHASH, RANGE(1, BIG),
     .help = "steps between evaluations in the first dense_steps of each task"},
    {"samples", ESP_T_INT, AT(eval.samples), .def = "0", .flags = ESP_K_NOHASH, RANGE(0, 64),
     .help = "completions of the first rows of each set that are kept before and after each task (samples/)"},
    {"batch_tokens", ESP_T_INT, AT(eval.batch_tokens), .def = "4096", .flags = ESP_K_NOHASH, RANGE(1, 16777216),
     .help = "tokens computed at once in evaluation"},
    {"sets", ESP_T_OBJECTS, LIST(eval.sets, eval.n_sets), .flags = ESP_K_COMMON, .object = &set_object,
     .help = "the columns of the score matrix"},
};

static const esp_key continual_keys[] = {
    {"policy", ESP_T_ENUM, AT(continual.policy), .def = "continue", .flags = ESP_K_COMMON,
     WORDS("continue", "new_per_task", "merge_then_new", "stack", "joint"), .aliases = "adapter_policy",
     .help = "what the next task trains: the same adapter, a new one, a new one on the base with the last merged in, a "
             "new one on top of the earlier ones; joint: all tasks at once, the upper bound"},
    {"order", ESP_T_STRINGS, LIST(continual.order, continual.n_order), .def = "[]", .flags = ESP_K_NOHASH,
     .help = "names of tasks: only these are trained, in this order; empty: all, as they stand"},
    {"baseline", ESP_T_BOOL, AT(continual.baseline), .def = "true", .flags = ESP_K_NOHASH,
     .help = "row 0 of the matrix: the untouched base; needed for forward transfer"},
    {"reset_optimizer", ESP_T_BOOL, AT(continual.reset_optimizer), .def = "true",
     .help = "optimizer state starts anew with each task"},
    {"strategy", ESP_T_STRINGS, LIST(continual.strategy.names, continual.strategy.n), .def = "[]",
     .flags = ESP_K_COMMON, .names = esp_strategy_names, .aliases = "strategies",
     .help = "what is done against forgetting, one or several that act in this order"},
    {"bank", ESP_T_OBJECT, .object = &esp_schema_bank},
    {"ncm", ESP_T_OBJECT, .object = &esp_schema_ncm},
    {"replay", ESP_T_OBJECT, .object = &esp_schema_replay},
    {"l2", ESP_T_OBJECT, .object = &esp_schema_l2},
    {"gem", ESP_T_OBJECT, .object = &esp_schema_gem},
    {"agem", ESP_T_OBJECT, .object = &esp_schema_agem},
    {"ewc", ESP_T_OBJECT, .object = &esp_schema_ewc},
    {"si", ESP_T_OBJECT, .object = &esp_schema_si},
    {"group_lasso", ESP_T_OBJECT, .object = &esp_schema_group_lasso},
    {"reglora", ESP_T_OBJECT, .object = &esp_schema_reglora},
    {"lwf", ESP_T_OBJECT, .object = &esp_schema_lwf},
    {"gpm", ESP_T_OBJECT, .object = &esp_schema_gpm},
    {"nullspace", ESP_T_OBJECT, .object = &esp_schema_nullspace},
    {"seqkd", ESP_T_OBJECT, .object = &esp_schema_seqkd},
    {"gere", ESP_T_OBJECT, .object = &esp_schema_gere},
    {"lae", ESP_T_OBJECT, .object = &esp_schema_lae},
    {"ilora", ESP_T_OBJECT, .object = &esp_schema_ilora},
    {"mos", ESP_T_OBJECT, .object = &esp_schema_mos},
    {"osf", ESP_T_OBJECT, .object = &esp_schema_osf},
    {"ogd", ESP_T_OBJECT, .object = &esp_schema_ogd},
    {"refactor", ESP_T_OBJECT, .object = &esp_schema_refactor},
    {"perturb", ESP_T_OBJECT, .object = &esp_schema_perturb},
    {"upgd", ESP_T_OBJECT, .object = &esp_schema_upgd},
    {"migu", ESP_T_OBJECT, .object = &esp_schema_migu},
};

SECTION_OBJECT(model, "The frozen base.");
SECTION_OBJECT(adapter, "What is trained. A task may set any key again.");
SECTION_OBJECT(data,
               "How rows become tokens. A task may set any key again: data: {sources: [...], sequence_len: 512}.");
SECTION_OBJECT(optim, "The optimizer. A task may set any key again.");
SECTION_OBJECT(schedule, "The learning rate over the steps. A task may set any key but restart again.");
SECTION_OBJECT(train, "Batches and length. A task may set any key again.");
SECTION_OBJECT(memory, "What the run may use.");
SECTION_OBJECT(parallel, "Ranks and threads.");
SECTION_OBJECT(eval, "What is measured, and when.");
SECTION_OBJECT(continual, "What happens between tasks.");

static const esp_key before_keys[] = {
    {"merge_tasks", ESP_T_OBJECT, .object = &esp_schema_merge_tasks,
     .help = "start from the merge of what the earlier tasks learned, by a method; out stays as it is"},
};
static const esp_object before_object = {"before", "What a task starts from, docs/merging.md.", before_keys,
                                         COUNT(before_keys), sizeof(esp_after_step)};

#define TASK(field) .offset = offsetof(esp_recipe_task, field)
static const esp_key task_keys[] = {
    {"name", ESP_T_NAME, TASK(name), .flags = ESP_K_REQUIRED | ESP_K_COMMON, .help = "names its adapter's folder"},
    {"data", ESP_T_TASK_DATA, TASK(data), .count_offset = offsetof(esp_recipe_task, n_data),
     .flags = ESP_K_REQUIRED | ESP_K_COMMON | ESP_K_NONEMPTY, .object = &source_object, .aliases = "datasets",
     .help = "list of data sources; or a mapping with sources and keys of data that hold for this task"},
    {"eval", ESP_T_EVAL_REFS, TASK(eval), .count_offset = offsetof(esp_recipe_task, n_eval), .flags = ESP_K_COMMON,
     .help = "name, or list of names, of evaluation sets; the first is the task's column of the matrix"},
    {"adapter", ESP_T_OVERRIDE, .object = &adapter_object, .help = "keys of adapter for this task"},
    {"optim", ESP_T_OVERRIDE, .object = &optim_object, .help = "keys of optim for this task"},
    {"schedule", ESP_T_OVERRIDE, .object = &schedule_object, .help = "keys of schedule for this task"},
    {"train", ESP_T_OVERRIDE, .object = &train_object, .help = "keys of train for this task"},
    {"before", ESP_T_AFTER, TASK(before), .count_offset = offsetof(esp_recipe_task, n_before), .flags = ESP_K_NOHASH,
     .object = &before_object, .help = "in the place of the recipe's before; []: it starts from no merge"},
};
static const esp_object task_object = {"task", "The tasks, trained in this order.", task_keys, COUNT(task_keys),
                                       sizeof(esp_recipe_task)};

#define STEP(field) .offset = offsetof(esp_after_step, field)
static const esp_key merge_keys[] = {
    {"out", ESP_T_RUN_PATH, STEP(out), .def = "merged", .help = "folder, relative to checkpoint.output_dir"},
    {"dtype", ESP_T_WORD, STEP(dtype), WORDS("bf16", "fp16", "fp32"), .help = "null: as stored"},
    {"verify", ESP_T_INT, STEP(verify), .def = "0", RANGE(0, 1048576),
     .help = "samples on which merged and unmerged logits are compared"},
};
static const esp_key export_keys[] = {
    {"out", ESP_T_RUN_PATH, STEP(out), .def = "export", .help = "folder, relative to checkpoint.output_dir"},
    {"target", ESP_T_WORD, STEP(target), WORDS("vllm"), .help = "vllm: only what vLLM loads, checked; null: PEFT"},
};
static const esp_key report_keys[] = {
    {"out", ESP_T_RUN_PATH, STEP(out), .def = "report.html", .help = "file, relative to checkpoint.output_dir"},
};
SECTION_OBJECT(merge, "Merges the adapter into the base: a Hugging Face model folder.");
SECTION_OBJECT(export, "Copies the adapter to a folder of its own.");
SECTION_OBJECT(report, "A self-contained HTML page.");
static const esp_key after_keys[] = {
    {"merge", ESP_T_OBJECT, .object = &merge_object, .help = "merge the adapter into the base"},
    {"merge_tasks", ESP_T_OBJECT, .object = &esp_schema_merge_tasks,
     .help = "merge what all tasks learned, by a method"},
    {"export", ESP_T_OBJECT, .object = &export_object, .help = "write the adapter elsewhere"},
    {"report", ESP_T_OBJECT, .object = &report_object, .help = "write the report"},
};
static const esp_object after_object = {"after", "What is made once all tasks are trained, in this order.", after_keys,
                                        COUNT(after_keys), sizeof(esp_after_step)};

static const esp_key watchdog_keys[] = {
    {"loss_above", ESP_T_NUMBER, AT(log.watchdog.loss_above), .def = "off", .flags = ESP_K_NOHASH | ESP_K_ABOVE_MIN,
     RANGE(0, 1e30), .word = "off", .help = "a loss above this stops the run"},
    {"grad_norm_above", ESP_T_NUMBER, AT(log.watchdog.grad_norm_above), .def = "off",
     .flags = ESP_K_NOHASH | ESP_K_ABOVE_MIN, RANGE(0, 1e30), .word = "off",
     .help = "a gradient norm above this stops the run"},
    {"patience", ESP_T_INT32, AT(log.watchdog.patience), .def = "3", .flags = ESP_K_NOHASH, RANGE(1, 1000000),
     .help = "after this many steps in a row"},
};
SECTION_OBJECT(watchdog, "A non-finite loss always stops the run.");
static const esp_key log_keys[] = {
    {"every", ESP_T_INT, AT(log.every), .def = "1", .flags = ESP_K_NOHASH | ESP_K_COMMON, RANGE(1, BIG),
     .aliases = "logging_steps log_every_n_steps", .help = "steps between lines"},
    {"to", ESP_T_SINKS, AT(log.stdout_on), .def = "[stdout, jsonl]", .flags = ESP_K_NOHASH | ESP_K_COMMON,
     WORDS("stdout", "jsonl", "tensorboard"), .aliases = "report_to",
     .help = "list of stdout, jsonl (metrics.jsonl), tensorboard (event files)"},
    {"watchdog", ESP_T_OBJECT, .object = &watchdog_object, .help = "stops a run that has gone wrong, exit code 7"},
};
static const esp_key checkpoint_keys[] = {
    {"output_dir", ESP_T_PATH, AT(checkpoint.output_dir), .flags = ESP_K_NOHASH | ESP_K_COMMON,
     .help = "the run's folder; runs/${name} in the working directory when not given"},
    {"every", ESP_T_INT, AT(checkpoint.every), .def = "200", .flags = ESP_K_NOHASH | ESP_K_COMMON, RANGE(1, BIG),
     .word = "task", .aliases = "save_steps", .help = "steps between checkpoints; task: at task ends only"},
    {"keep", ESP_T_INT32, AT(checkpoint.keep), .def = "3", .flags = ESP_K_NOHASH, RANGE(1, 1000000),
     .aliases = "save_total_limit", .help = "newest checkpoints kept"},
    {"keep_best", ESP_T_KEEP_BEST, AT(checkpoint.keep_best_metric), .flags = ESP_K_NOHASH,
     .help = "{metric: loss or an evaluation set, mode: min or max}: the best adapter so far is kept in best/adapter"},
};
SECTION_OBJECT(log, "What is written while it runs.");
SECTION_OBJECT(checkpoint, "Where the run lives and what is kept of it.");

static const esp_key root_keys[] = {
    {"version", ESP_T_VERSION, .flags = ESP_K_INPUT_ONLY, .help = "of the recipe's format: 1"},
    {"name", ESP_T_NAME, AT(name), .flags = ESP_K_NOHASH | ESP_K_COMMON,
     .help = "of the run; the file's name without .yaml when not given"},
    {"seed", ESP_T_SEED, AT(seed), .def = "42", .flags = ESP_K_COMMON, .help = "of every random draw"},
    {"model", ESP_T_OBJECT, .object = &model_object, .flags = ESP_K_COMMON},
    {"adapter", ESP_T_OBJECT, .object = &adapter_object, .flags = ESP_K_COMMON},
    {"data", ESP_T_OBJECT, .object = &data_object, .flags = ESP_K_COMMON},
    {"optim", ESP_T_OBJECT, .object = &optim_object, .flags = ESP_K_COMMON},
    {"schedule", ESP_T_OBJECT, .object = &schedule_object, .flags = ESP_K_COMMON},
    {"train", ESP_T_OBJECT, .object = &train_object, .flags = ESP_K_COMMON},
    {"memory", ESP_T_OBJECT, .object = &memory_object, .flags = ESP_K_COMMON},
    {"parallel", ESP_T_OBJECT, .object = &parallel_object, .flags = ESP_K_COMMON},
    {"eval", ESP_T_OBJECT, .object = &eval_object, .flags = ESP_K_COMMON},
    {"continual", ESP_T_OBJECT, .object = &continual_object, .flags = ESP_K_COMMON},
    {"tasks", ESP_T_OBJECTS, LIST(tasks, n_tasks), .flags = ESP_K_REQUIRED | ESP_K_NONEMPTY | ESP_K_COMMON,
     .object = &task_object, .help = "what is trained, in this order"},
    {"before", ESP_T_AFTER, LIST(before, n_before), .flags = ESP_K_NOHASH, .object = &before_object,
     .help = "one merge_tasks, keys as in after: every task from the second on starts from the merge of all earlier "
             "ones"},
    {"after", ESP_T_AFTER, LIST(after, n_after), .flags = ESP_K_NOHASH | ESP_K_COMMON, .object = &after_object,
     .help = "list of merge, merge_tasks, export and report, done in this order"},
    {"log", ESP_T_OBJECT, .object = &log_object, .flags = ESP_K_COMMON},
    {"checkpoint", ESP_T_OBJECT, .object = &checkpoint_object, .flags = ESP_K_COMMON},
};
const esp_object esp_schema_root = {"recipe", "", root_keys, COUNT(root_keys), 0};

#define SECTION(n, field)                                                                                              \
  { #n, offsetof(esp_recipe, n), offsetof(esp_recipe_task, field), sizeof(((esp_recipe_task *)0)->field) }
const esp_section esp_schema_sections[] = {SECTION(adapter, adapter), SECTION(data, data_cfg), SECTION(optim, optim),
                                           SECTION(schedule, schedule), SECTION(train, train)};
const int esp_schema_n_sections = COUNT(esp_schema_sections);

const esp_section *esp_schema_section(const char *name) {
  for (int i = 0; i < esp_schema_n_sections; i++)
    if (!strcmp(esp_schema_sections[i].name, name)) return &esp_schema_sections[i];
  return NULL;
}

bool esp_key_has_alias(const esp_key *k, const char *name) {
  size_t n = strlen(name);
  for (const char *p = k->aliases; n && p && *p;) {
    size_t w = strcspn(p, " ");
    if (w == n && !memcmp(p, name, n)) return true;
    p += w + (p[w] == ' ');
  }
  return false;
}

const esp_key *esp_schema_find(const esp_object *o, const char *name) {
  for (int i = 0; i < o->n; i++)
    if (!strcmp(o->keys[i].name, name)) return &o->keys[i];
  for (int i = 0; i < o->n; i++)
    if (esp_key_has_alias(&o->keys[i], name)) return &o->keys[i];
  return NULL;
}

const char *const *esp_key_words(const esp_key *k, int *n) {
  if (k->names) return k->names(n);
  *n = 0;
  while (k->words && k->words[*n]) ++*n;
  return k->words;
}

bool esp_key_per_task(const esp_key *k, const esp_section *s) {
  return k->offset >= s->recipe_offset && k->offset < s->recipe_offset + s->size;
}
