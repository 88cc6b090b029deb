/* strategy.h: the strategy kind, what is done against forgetting around the steps of a sequence of tasks. One file per
 * kind, one line in registry.c. A kind sees the run through esp_sequence and is written over the op table only, so that
 * it runs on every backend; under the counting backend the same hooks run, so that a plan knows what they hold.
 *
 * Several strategies act together in the order of the recipe. What a strategy remembers lives in named arrays
 * (esp_strategy_array): these are counted as memory of the strategy and are part of checkpoints without further code.
 *
 * Order in a step: `draw` (rows beside the step's own), then for every micro-batch `teach` and forward and backward,
 * `pass` (the drawn rows), the sum over ranks, `penalty`, `project`, clipping, the optimizer, `after_step`.
 * At a task: `task_begin` before its first step; after its last one `task_end`, then the adapter is saved and measured
 * between `deploy(true)` and `deploy(false)`, then, before another task, `hand_over`. Where nothing is trained
 * (adapter.type none) tasks have no steps, and all else is the same.
 */
#ifndef ESP_TASKS_STRATEGY_H
#define ESP_TASKS_STRATEGY_H

#include "adapters/adapter.h"
#include "dist/comm.h"
#include "optim/optim.h"
#include "text/dataset.h"

struct json_t; /* jansson */

/* Every key of `continual` that a strategy reads; one struct per strategy, named like it. */
typedef struct esp_strategy_cfg {
  const char *const *names; /* in order */
  int n;
  struct {
    const char *selector; /* last | sum | oracle | nearest | keys | trained */
    int64_t centroids, samples, top_k;
    double temperature;
  } bank;
  struct {
    const char *metric, *choices; /* cosine | euclidean; set | seen */
  } ncm;
  struct {
    double buffer; /* what is kept and how it is chosen: tasks/memory.h */
    int64_t bytes;
    const char *sampler;
    double ratio;  /* share of a step's samples that are replayed; 0: each kept sample once per pass over the task */
    double weight; /* of the loss of replayed tokens */
  } replay;
  struct {
    const char *teacher; /* previous | base */
    double kl, temperature;
    double hidden;           /* weight of the distance of final hidden states, 0: none */
    const char *hidden_loss; /* l2 | l1 */
  } lwf;
  struct {
    int64_t samples, max_new_tokens; /* rows answered before a task, and how long */
    int64_t batch;                   /* trained in a step */
    double temperature, weight;
  } seqkd;
  struct {
    esp_data_source data;       /* of general samples */
    const char *loss;           /* label | kl | l1 | l2 | margin */
    double weight, temperature; /* of what comes from the base; weight 0: dynamic */
    int64_t batch;              /* samples in a step */
  } gere;
  struct {
    double decay; /* a of phi <- a phi + (1-a) theta */
    bool ensemble;
  } lae;
  struct {
    double decay, gamma; /* gamma: weight of the hidden states' distance */
    double buffer;       /* as replay.buffer */
    int64_t batch;       /* replayed in a step */
  } ilora;
  struct {
    double momentum; /* m of theta <- (1-m) theta + m mean */
  } mos;
  struct {
    double weight; /* lambda: weight/2 * |theta - theta_previous|^2 */
  } l2;
  struct {
    double buffer; /* as replay.buffer */
    const char *sampler;
    double margin;
  } gem;
  struct {
    double buffer;
    const char *sampler;
    int64_t batch; /* drawn in a step */
  } agem;
  struct {
    int64_t samples, directions; /* of a task */
  } ogd;
  struct {
    int64_t interval; /* steps; 0: only when a task begins */
  } refactor;
  struct {
    const char *when; /* step | task */
    double weight, noise;
  } perturb;
  struct {
    double beta, noise;
  } upgd;
  struct {
    double weight; /* lambda of lambda/2 sum F (theta - theta_k)^2 */
    double decay;  /* gamma of the online form; 0: all tasks alike, each around its own optimum */
    int64_t samples;
  } ewc;
  struct {
    double weight, damping; /* c and xi */
  } si;
  struct {
    double weight;
  } group_lasso;
  struct {
    double weight, share; /* of the entries of a matrix that a task adds to its set */
  } reglora;
  struct {
    double energy;           /* share of the inputs' squared length that bases hold */
    int64_t samples, tokens; /* of each task; rows of each layer's input */
  } gpm, nullspace;
  struct {
    const esp_schedule *schedule; /* of each task, from the recipe's schedule; NULL: none that decays in each */
  } branch;
  struct {
    double retain, retain_min; /* share of the triples that stay; of an unimportant layer, 0: of all layers alike */
  } osf;
  struct {
    double threshold; /* share of rows without a gradient */
    int64_t interval, samples, tokens;
    const char *mask; /* magnitude | random */
  } migu;
} esp_strategy_cfg;

/* The run as a strategy sees it. Filled in by the room that trains; model, adapter and optim are those of the present
 * task, and change where the policy makes new ones. */
typedef struct esp_sequence {
  esp_backend *be;
  esp_model *model;
  esp_adapter *adapter;
  esp_optim *optim;
  esp_stack *stack;
  esp_comm *comm, *device_comm; /* device_comm NULL: gradients are reduced through comm */
  const esp_tokenizer *tok;
  esp_dataset *const *data; /* [n_tasks] training data of each task; of a later one nothing may be read but its size */
  const esp_data_cfg *const *data_cfg; /* [n_tasks] */
  const char *const *task_name;
  int task, n_tasks;
  /* Adapters of the tasks so far, the present one last. More than one only where a strategy wants a bank, or where the
   * policy stacks them. */
  esp_adapter *const *bank;
  int n_bank;
  bool one_adapter;    /* it lives through all tasks */
  int64_t micro_batch; /* rows of one micro-batch of the present task */
  int64_t max_tokens;  /* of its largest micro-batch, padded */
  int64_t epoch_steps; /* optimizer steps of one pass over its data */
  esp_ckpt_mode ckpt;
  uint64_t seed;
  void *ctx; /* of `generate` */
  /* Continues prompts with the adapter as it stands: greedy at temperature 0, else sampled from `seed`. out[i] is
   * cleared first and receives the new tokens, terminator included. NULL: not available (a session, a plan). */
  esp_status (*generate)(const struct esp_sequence *q, const esp_ids *prompts, int n, int64_t max_new,
                         double temperature, uint64_t seed, esp_ids *out);
} esp_sequence;

/* A step of the task, as far as it has come. */
typedef struct esp_strategy_step {
  int64_t step; /* of the run, 0-based */
  int64_t task_step, task_steps;
  double lr;     /* scheduled */
  double weight; /* trained-token weight of the step's own rows, all ranks */
  double scale;  /* what losses are multiplied with: 1 / (weight + what was drawn); from `teach` on */
} esp_strategy_step;

typedef struct esp_strategy esp_strategy;

enum {                                /* esp_strategy_kind.flags */
       ESP_STRATEGY_BY_PARAMETER = 1, /* remembers values per parameter: not with adapters whose ranks move, and only
                                       * where one adapter lives through all tasks */
       ESP_STRATEGY_TEACHES = 2,      /* has `teach`: at most one in a run */
       ESP_STRATEGY_DEPLOYS = 4,      /* has `deploy`: at most one */
       ESP_STRATEGY_ONE_RANK = 8,     /* not with several ranks */
       ESP_STRATEGY_BANK = 16,  /* wants the adapters of earlier tasks beside the present one: policy new_per_task */
       ESP_STRATEGY_MEETS = 32, /* its `pass` talks to other ranks: none passes where one has failed before */
       ESP_STRATEGY_FROZEN = 64 /* of a base on which nothing is trained; no other kind is for such a run */
};

typedef struct esp_strategy_kind {
  const char *name;    /* in recipes */
  const char *summary; /* one line: what it does, formula, paper */
  unsigned flags;

  /* All optional. check: errors of a recipe that need no base (ESP_ERR_RECIPE, naming continual.<name>.<key>).
   * open: once, model and adapter stand; also on resume. close: what arrays do not hold. */
  esp_status (*check)(const esp_strategy_cfg *c, int n_tasks);
  esp_status (*open)(esp_strategy *s, const esp_sequence *q);
  void (*close)(esp_strategy *s);

  /* On resume task_begin runs before the saved arrays replace whatever it made. */
  esp_status (*task_begin)(esp_strategy *s, const esp_sequence *q);
  esp_status (*task_end)(esp_strategy *s, const esp_sequence *q);
  /* After a task has ended and was measured, once it is known that another follows: passes over its data for what later
   * tasks need. Of the last task it is called when others are added to the finished run. */
  esp_status (*hand_over)(esp_strategy *s, const esp_sequence *q);

  /* draw: chooses rows beside the step's own, the same on all ranks; adds their trained-token weight (all ranks) to
   * *weight. pass: forward and backward of this rank's share of them, into the same gradient (esp_strategy_rows). */
  esp_status (*draw)(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t, double *weight);
  esp_status (*pass)(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t);
  /* Before each micro-batch of the step's own rows: may run passes without gradients and set b->teach. */
  esp_status (*teach)(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t, esp_batch *b);

  /* Gradients are complete (all ranks). penalty adds the gradient of a loss term and answers its value; project may
   * change the gradient in any way, also by passes of its own (esp_strategy_gradient). */
  double (*penalty)(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t);
  esp_status (*project)(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t);
  /* Parameters are new. The gradient is still that of the step, unclipped. */
  esp_status (*after_step)(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t);

  /* true: puts the values in force that are to be measured and saved, false: those that are trained. */
  esp_status (*deploy)(esp_strategy *s, const esp_sequence *q, bool on);

  /* While deployed, with the bank's adapters active: which of them each sequence of a batch gets, from its first
   * prompt[i] tokens alone. Sets b->adapters or b->shares, memory that lives until the next call. owner: the task that
   * the rows belong to, -1: none; only an oracle reads it. */
  esp_status (*choose)(esp_strategy *s, const esp_sequence *q, int owner, const int32_t *prompt, esp_batch *b);

  /* While deployed: how many sets of values answer together (1 or 2), and which is in force: number 0 is what deploy
   * has put there. */
  int (*experts)(const esp_strategy *s);
  esp_status (*expert)(esp_strategy *s, const esp_sequence *q, int i);

  /* While deployed: whether it answers rows of a set of labels itself, and the answers, from the first prompt[i] tokens
   * of each sequence alone: out[i] is a label's text that lives until the next call. */
  bool (*answers)(const esp_strategy *s, const char *const *labels, int n);
  esp_status (*answer)(esp_strategy *s, const esp_sequence *q, const char *const *labels, int n, const int32_t *prompt,
                       const esp_batch *b, const char **out);

  /* What a checkpoint must hold beside the arrays, and bytes held beside them (samples kept). */
  void (*state_write)(const esp_strategy *s, struct json_t *j);
  esp_status (*state_read)(esp_strategy *s, const struct json_t *j, const char *path);
  int64_t (*held)(const esp_strategy *s, const esp_sequence *q);
} esp_strategy_kind;

typedef struct esp_strategy_value { /* an array by name */
  char name[96];
  esp_dtype dtype; /* ESP_F32, ESP_I32, ESP_I64, ... */
  int64_t n;
  bool host;
  void *data;
} esp_strategy_value;

struct esp_strategy {
  const esp_strategy_kind *kind;
  const esp_strategy_cfg *cfg;
  esp_backend *be;
  esp_strategy_value *values;
  int n_values;
  void *impl; /* freed by `close` */
};

const esp_strategy_kind *esp_strategy_find(const char *name);
const char *const *esp_strategy_names(int *n);
typedef struct esp_strategy_facts { /* of a recipe, for the rules between strategies and what stands around them */
  int n_tasks;
  bool adapter_moves; /* its ranks change in a run */
  bool one_adapter;   /* it lives through all tasks */
  bool new_per_task;  /* the policy of that name */
  bool frozen;        /* nothing is trained in it */
  bool merges_before; /* a task starts from a merge of adapters: the parameters are others of a sudden */
} esp_strategy_facts;
/* Rules of a recipe: pairs, flags, and each kind's own. */
esp_status esp_strategies_check(const esp_strategy_cfg *c, const esp_strategy_facts *f);
/* Whether some strategy of the list has the flag. */
bool esp_strategies_have(const esp_strategy_cfg *c, unsigned flag);

/* The named array, zeroed when it is new or has another size. host false: in the backend's memory. NULL: error set.
 * Names live as long as the strategy: ask for them by name again in each hook, a resumed run has other addresses. */
void *esp_strategy_array(esp_strategy *s, const char *name, esp_dtype dtype, int64_t n, bool host);
/* NULL where there is none; n may be NULL. */
void *esp_strategy_get(const esp_strategy *s, const char *name, int64_t *n);
void esp_strategy_drop(esp_strategy *s, const char *name);
/* The same as a [1, n] tensor over all parameters (n = params->total, fp32, in the backend's memory). */
esp_tensor esp_strategy_flat(esp_strategy *s, const char *name, const esp_sequence *q);

/* ---- what several kinds need ---- */
static inline esp_tensor esp_flat(float *data, int64_t n) {
  return esp_tensor_2d(data, ESP_F32, 1, n);
}
/* Masters of all parameters, and of their gradient. */
esp_tensor esp_sequence_masters(const esp_sequence *q);
esp_tensor esp_sequence_gradient(const esp_sequence *q);
/* Exchanges the masters with `other` ([1, total]) and refreshes what forward reads. */
void esp_sequence_exchange(const esp_sequence *q, esp_tensor other);
/* The one penalty: weight/2 * sum importance * (theta - anchor)^2 (importance.data NULL: 1); adds its gradient and
 * answers its value. */
double esp_sequence_pull(const esp_sequence *q, esp_tensor anchor, esp_tensor importance, double weight);

typedef struct esp_sample { /* a row of some task's training data */
  int32_t task;
  int64_t index;
} esp_sample;
/* Tokens of a micro-batch are padded so that shapes repeat: to whole tile blocks of the matrix products, and for a
 * given backend further where that pays; most: the largest there is. */
static inline int64_t esp_sequence_round(int64_t tokens) {
  return (tokens + 31) / 32 * 32;
}
int64_t esp_sequence_pad(const esp_backend *be, int64_t tokens, int64_t most);
/* n samples as one micro-batch, one sequence each, padded. Under the counting backend each is as long as the longest
 * there is, so that a plan holds for every draw. */
esp_status esp_sequence_rows(const esp_sequence *q, const esp_sample *s, int64_t n, esp_rows *out);
static inline esp_batch esp_sequence_batch(const esp_rows *r) {
  return (esp_batch){.tokens = r->tokens,
                     .ids = r->ids,
                     .targets = r->targets,
                     .positions = r->positions,
                     .weights = r->weights,
                     .cu_seqlens = r->cu_seqlens,
                     .n_seqs = r->n_seqs};
}
/* Loss weight of a sample's trained tokens. */
double esp_sequence_weight(const esp_sequence *q, esp_sample s);
/* `n` of `count` (all of them where n >= count) without repetition, a function of (seed, stream). */
esp_status esp_sequence_choose(uint64_t seed, uint64_t stream, int64_t count, int64_t n, int64_t *out);
/* Forward, loss and, with train, backward of rows: gradients are added, scaled. out NULL: into the step's own sums. */
esp_status esp_sequence_pass(const esp_sequence *q, const esp_rows *rows, const struct esp_teach *teach, bool train,
                             double scale, int64_t draw, esp_loss_out *out);
/* The final normed hidden states of b's labelled rows into `out` (esp_model_features) with other masters ([1, total])
 * in the place of the adapter's, which are there again afterwards. */
esp_status esp_sequence_features(const esp_sequence *q, esp_tensor masters, const esp_batch *b, esp_tensor out);
/* The output head is frozen, so that a teacher's logits can be made of its states; else ESP_ERR_RECIPE. */
esp_status esp_sequence_frozen_head(const esp_strategy *s, const esp_sequence *q);
/* Ranks: this one's share begins at *first and holds *n of `count` things. */
void esp_sequence_share(const esp_sequence *q, int64_t count, int64_t *first, int64_t *n);
/* The gradient of the mean loss of these samples, summed over ranks, into `out` ([1, total]); what q's gradient held is
 * there again afterwards. In micro-batches of q->micro_batch samples. loss may be NULL. */
esp_status esp_sequence_gradient_of(const esp_sequence *q, const esp_sample *s, int64_t n, esp_tensor out,
                                    double *loss);
/* Sum over ranks of a flat array in the backend's memory. */
esp_status esp_sequence_reduce(const esp_sequence *q, float *data, int64_t n);
double esp_sequence_dot(const esp_sequence *q, esp_tensor a, esp_tensor b); /* waits */

/* ---- all strategies of a run ---- */
typedef struct esp_strategies {
  esp_strategy *list;
  int n;
  bool deployed;
  int expert; /* in force */
} esp_strategies;
/* n == 0 makes an empty set; every function below accepts it. cfg must outlive the set. */
esp_status esp_strategies_create(const esp_strategy_cfg *cfg, esp_backend *be, esp_strategies *out);
void esp_strategies_destroy(esp_strategies *s);
esp_status esp_strategies_open(esp_strategies *s, const esp_sequence *q);
esp_status esp_strategies_task_begin(esp_strategies *s, const esp_sequence *q);
esp_status esp_strategies_task_end(esp_strategies *s, const esp_sequence *q);
esp_status esp_strategies_hand_over(esp_strategies *s, const esp_sequence *q);
esp_status esp_strategies_draw(esp_strategies *s, const esp_sequence *q, const esp_strategy_step *t, double *weight);
esp_status esp_strategies_teach(esp_strategies *s, const esp_sequence *q, const esp_strategy_step *t, esp_batch *b);
bool esp_strategies_meet(const esp_strategies *s); /* some kind has ESP_STRATEGY_MEETS */
esp_status esp_strategies_pass(esp_strategies *s, const esp_sequence *q, const esp_strategy_step *t);
double esp_strategies_penalty(esp_strategies *s, const esp_sequence *q, const esp_strategy_step *t);
esp_status esp_strategies_project(esp_strategies *s, const esp_sequence *q, const esp_strategy_step *t);
esp_status esp_strategies_after_step(esp_strategies *s, const esp_sequence *q, const esp_strategy_step *t);
esp_status esp_strategies_deploy(esp_strategies *s, const esp_sequence *q, bool on);
/* Nothing unless deployed and a strategy chooses. */
esp_status esp_strategies_choose(esp_strategies *s, const esp_sequence *q, int owner, const int32_t *prompt,
                                 esp_batch *b);
/* 1 unless deployed and a strategy has two. */
int esp_strategies_experts(const esp_strategies *s);
esp_status esp_strategies_expert(esp_strategies *s, const esp_sequence *q, int i);
/* Whether a strategy answers rows of a set of these labels itself (never unless deployed; s may be NULL), and the
 * answers. */
bool esp_strategies_answers(const esp_strategies *s, const char *const *labels, int n);
esp_status esp_strategies_answer(esp_strategies *s, const esp_sequence *q, const char *const *labels, int n,
                                 const int32_t *prompt, const esp_batch *b, const char **out);
/* Bytes that strategy i holds: its arrays and what it says itself. */
int64_t esp_strategies_bytes(const esp_strategies *s, int i, const esp_sequence *q);
/* Arrays and state into two files (nothing for an empty set), and back from their contents; path: for messages. */
esp_status esp_strategies_save(const esp_strategies *s, const char *tensors, const char *json);
esp_status esp_strategies_load(esp_strategies *s, const char *tensors, size_t n_tensors, const char *json,
                               size_t n_json, const char *path);

#endif
