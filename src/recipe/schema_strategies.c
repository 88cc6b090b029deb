/* schema_strategies.c: the keys of the strategies against forgetting: one object per strategy that has any. */
#include "recipe/schema_rows.h"

static const esp_key bank_keys[] = {
    {"selector", ESP_T_WORD, AT(continual.strategy.bank.selector), .def = "nearest",
     WORDS("last", "sum", "oracle", "nearest", "keys", "trained"),
     .help =
         "which task's adapter a sequence gets at test time: the newest, all of them, its own task's, by the nearest "
         "centroid, by keys, by a trained classifier"},
    {"centroids", ESP_T_INT, AT(continual.strategy.bank.centroids), .def = "5", RANGE(1, 4096),
     .help = "nearest: k-means centroids per task"},
    {"samples", ESP_T_INT, AT(continual.strategy.bank.samples), .def = "256", RANGE(1, 1e9),
     .help = "samples of a task whose features a selector learns from"},
    {"top_k", ESP_T_INT, AT(continual.strategy.bank.top_k), .def = "1", RANGE(1, 256),
     .help = "keys: so many adapters together, weighted"},
    {"temperature", ESP_T_NUMBER, AT(continual.strategy.bank.temperature), .def = "0.1", .flags = ESP_K_ABOVE_MIN,
     RANGE(0, 1e6), .help = "keys: of the softmax over similarities that gives the weights"},
};
STRATEGY(bank, "Strategy bank: an adapter for each task and a selector. With policy new_per_task.");

static const esp_key ncm_keys[] = {
    {"metric", ESP_T_WORD, AT(continual.strategy.ncm.metric), .def = "cosine", WORDS("cosine", "euclidean"),
     .help = "what is near"},
    {"choices", ESP_T_WORD, AT(continual.strategy.ncm.choices), .def = "set", WORDS("set", "seen"),
     .help = "the classes a row is compared with: those of its own set, as in all other scores, or all that were seen"},
};
STRATEGY(ncm, "Strategy ncm: nothing is trained, the nearest class mean of the base's features answers. A reference.");

static const esp_key replay_keys[] = {
    {"buffer", ESP_T_SHARE, AT(continual.strategy.replay.buffer), .def = "1%", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e9),
     .help = "samples kept of all finished tasks together, or a percentage of each one's"},
    {"buffer_bytes", ESP_T_INT, AT(continual.strategy.replay.bytes), .def = "any", RANGE(1, BIG), .word = "any",
     .help = "most bytes that their tokens and weights take"},
    {"sampler", ESP_T_WORD, AT(continual.strategy.replay.sampler), .def = "reservoir",
     WORDS("reservoir", "balanced", "loss", "herding"),
     .help = "which are kept: any, as many of each label, those of the largest loss, those whose mean feature is the "
             "task's"},
    {"ratio", ESP_T_NUMBER, AT(continual.strategy.replay.ratio), .def = "auto",
     .flags = ESP_K_ABOVE_MIN | ESP_K_BELOW_MAX, RANGE(0, 1), .word = "auto",
     .help = "share of a step's samples that are replayed; auto: each kept one once per epoch"},
    {"weight", ESP_T_NUMBER, AT(continual.strategy.replay.weight), .def = "1", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e6),
     .help = "of the loss of replayed tokens"},
};
STRATEGY(replay, "Strategy replay: rows of earlier tasks are trained beside those of the present one.");

static const esp_key lwf_keys[] = {
    {"teacher", ESP_T_WORD, AT(continual.strategy.lwf.teacher), .def = "previous", WORDS("previous", "base"),
     .help = "the adapter at the end of the task before, or as it was before the first"},
    {"kl", ESP_T_NUMBER, AT(continual.strategy.lwf.kl), .def = "1", RANGE(0, 1e6),
     .help = "weight of T^2 KL(teacher || student) over the vocabulary"},
    {"temperature", ESP_T_NUMBER, AT(continual.strategy.lwf.temperature), .def = "2", .flags = ESP_K_ABOVE_MIN,
     RANGE(0, 1000), .help = "T, of both distributions"},
    {"hidden", ESP_T_NUMBER, AT(continual.strategy.lwf.hidden), .def = "0", RANGE(0, 1e6),
     .help = "weight of the distance of the final hidden states"},
    {"hidden_loss", ESP_T_WORD, AT(continual.strategy.lwf.hidden_loss), .def = "l2", WORDS("l2", "l1"),
     .help = "mean of squares or of absolute values over a state"},
};
STRATEGY(lwf, "Strategy lwf: what an earlier adapter answers to the new task's rows is kept.");

static const esp_key seqkd_keys[] = {
    {"samples", ESP_T_INT, AT(continual.strategy.seqkd.samples), .def = "64", RANGE(1, 1e6),
     .help = "prompts of a task that the adapter of the task before answers"},
    {"max_new_tokens", ESP_T_INT, AT(continual.strategy.seqkd.max_new_tokens), .def = "64", RANGE(1, 1048576),
     .help = "of an answer"},
    {"temperature", ESP_T_NUMBER, AT(continual.strategy.seqkd.temperature), .def = "0", RANGE(0, 100),
     .help = "0: the likeliest token each time, else answers are drawn"},
    {"batch", ESP_T_INT, AT(continual.strategy.seqkd.batch), .def = "4", RANGE(1, 1e6),
     .help = "of these rows that a step trains, over all ranks"},
    {"weight", ESP_T_NUMBER, AT(continual.strategy.seqkd.weight), .def = "1", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e6),
     .help = "of the loss of their tokens"},
};
STRATEGY(seqkd, "Strategy seqkd: what the adapter of the task before answers itself is trained on.");

static const esp_key gere_data_keys[] = {
    {"path", ESP_T_PATH, AT(continual.strategy.gere.data.path), .help = "JSONL or JSON file, or a folder of them"},
    {"format", ESP_T_ENUM, AT(continual.strategy.gere.data.format), .def = "auto",
     WORDS("auto", "prompt_completion", "alpaca", "text", "messages", "sharegpt", "classification", "cl_benchmark",
           "natural_instructions"),
     .help = "shape of a row; auto: judged from the first row's keys"},
    {"limit", ESP_T_INT, AT(continual.strategy.gere.data.limit), .def = "1000", RANGE(1, BIG), .word = "all",
     .help = "only the first rows"},
};
static const esp_object gere_data = {"data", "The general samples of strategy gere.", gere_data_keys,
                                     COUNT(gere_data_keys), 0};
static const esp_key gere_keys[] = {
    {"data", ESP_T_OBJECT, .object = &gere_data},
    {"loss", ESP_T_WORD, AT(continual.strategy.gere.loss), .def = "margin", WORDS("label", "kl", "l1", "l2", "margin"),
     .help = "what holds their tokens, beside their labels"},
    {"weight", ESP_T_NUMBER, AT(continual.strategy.gere.weight), .def = "100", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e9),
     .word = "dynamic",
     .help = "of that loss; dynamic: what makes it as large as the cross-entropies of the step, new in each"},
    {"temperature", ESP_T_NUMBER, AT(continual.strategy.gere.temperature), .def = "1", .flags = ESP_K_ABOVE_MIN,
     RANGE(0, 1000), .help = "kl: T of both distributions"},
    {"batch", ESP_T_INT, AT(continual.strategy.gere.batch), .def = "4", RANGE(1, 1e6),
     .help = "samples that a step trains, over all ranks"},
};
STRATEGY(gere, "Strategy gere: general texts are trained beside every step and held to the base.");

static const esp_key lae_keys[] = {
    {"decay", ESP_T_NUMBER, AT(continual.strategy.lae.decay), .def = "0.9999", .flags = ESP_K_BELOW_MAX, RANGE(0, 1),
     .help = "share of the slow values that a step keeps"},
    {"ensemble", ESP_T_BOOL, AT(continual.strategy.lae.ensemble), .def = "false",
     .help =
         "evaluations take the larger of the probabilities of both, and the trained adapter is saved as well (fast/)"},
};
STRATEGY(lae, "Strategy lae: a slow copy of the adapter follows the trained one and is deployed.");

static const esp_key ilora_keys[] = {
    {"decay", ESP_T_NUMBER, AT(continual.strategy.ilora.decay), .def = "0.25", .flags = ESP_K_BELOW_MAX, RANGE(0, 1),
     .help = "share of the slow values that a step keeps, less in the first steps"},
    {"gamma", ESP_T_NUMBER, AT(continual.strategy.ilora.gamma), .def = "1", RANGE(0, 1e6),
     .help = "weight of the distance of replayed hidden states from those of the slow values"},
    {"buffer", ESP_T_SHARE, AT(continual.strategy.ilora.buffer), .def = "500", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e9),
     .help = "samples kept of all finished tasks together, or a percentage of each one's"},
    {"batch", ESP_T_INT, AT(continual.strategy.ilora.batch), .def = "4", RANGE(1, 1e6),
     .help = "samples replayed in a step, over all ranks"},
};
STRATEGY(ilora, "Strategy ilora: replay held to a slow copy of the adapter, which is deployed.");

static const esp_key mos_keys[] = {
    {"momentum", ESP_T_NUMBER, AT(continual.strategy.mos.momentum), .def = "0.01",
     .flags = ESP_K_ABOVE_MIN | ESP_K_BELOW_MAX, RANGE(0, 1),
     .help = "how far a step goes toward the mean of earlier adapters"},
};
STRATEGY(mos, "Strategy mos: each step goes a little toward the mean of the adapters of earlier tasks.");

static const esp_key l2_keys[] = {
    {"weight", ESP_T_NUMBER, AT(continual.strategy.l2.weight), .def = "1", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e12),
     .help = "lambda of lambda/2 |theta - theta_previous|^2"},
};
STRATEGY(l2, "Strategy l2: parameters stay near those of the task before.");

static const esp_key ewc_keys[] = {
    {"weight", ESP_T_NUMBER, AT(continual.strategy.ewc.weight), .def = "1000", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e12),
     .help = "lambda of lambda/2 sum F (theta - theta_k)^2"},
    {"samples", ESP_T_INT, AT(continual.strategy.ewc.samples), .def = "256", RANGE(1, 1e9),
     .help = "samples of a task whose squared gradients give F"},
    {"decay", ESP_T_NUMBER, AT(continual.strategy.ewc.decay), .def = "off", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1),
     .word = "off", .help = "online form: F of earlier tasks is multiplied by this, the anchor is the latest optimum"},
};
STRATEGY(ewc, "Strategy ewc: parameters that finished tasks depend on are held.");

static const esp_key si_keys[] = {
    {"weight", ESP_T_NUMBER, AT(continual.strategy.si.weight), .def = "1", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e12),
     .help = "c of c sum Omega (theta - theta_end)^2"},
    {"damping", ESP_T_NUMBER, AT(continual.strategy.si.damping), .def = "1e-3", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e6),
     .help = "xi: bounds the importance of parameters that hardly moved"},
};
STRATEGY(si, "Strategy si: parameters that the losses of finished tasks fell by are held.");

static const esp_key group_lasso_keys[] = {
    {"weight", ESP_T_NUMBER, AT(continual.strategy.group_lasso.weight), .def = "1e-3", .flags = ESP_K_ABOVE_MIN,
     RANGE(0, 1e6), .help = "alpha of alpha sum_layers |theta_layer|"},
};
STRATEGY(group_lasso, "Strategy group_lasso: whole layers of the adapter are drawn to zero.");

static const esp_key reglora_keys[] = {
    {"weight", ESP_T_NUMBER, AT(continual.strategy.reglora.weight), .def = "2500", .flags = ESP_K_ABOVE_MIN,
     RANGE(0, 1e12), .help = "of the mean over matrices of mean |B A| at the kept entries"},
    {"share", ESP_T_NUMBER, AT(continual.strategy.reglora.share), .def = "0.02", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1),
     .help = "of a matrix's entries, those of the largest |B A|, that a finished task adds to its set"},
};
STRATEGY(reglora, "Strategy reglora: entries of W that earlier tasks changed most are changed little.");
