/* session.c: stepping by hand. Settings are a recipe of which only the sections that concern a step are read; sizes
 * come, as everywhere, from the counting backend: a batch larger than any before is counted first. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/api.h"
#include "core/log.h"
#include "core/strbuf.h"
#include "core/threads.h"
#include "eval/generate.h"

enum { MAX_ADDED = 63 };
typedef struct added { /* beside the trained adapter; [0] in the engine, [1] in the counting one */
  char *dir;
  double weight;
  esp_adapter *a[2];
} added;

struct esp_session {
  esp_recipe *recipe;
  esp_comm *comm;
  esp_tokenizer *tok;
  esp_engine engine, count;
  char *adapter_dir; /* loaded from; NULL: new */
  bool attached;     /* an adapter was asked for */
  added added[MAX_ADDED];
  int n_added;
  bool ready; /* weights are loaded */
  bool shown; /* data, to an adapter that takes its start from them */
  double lr_factor;
  int64_t step;
};

esp_status esp_session_open(const char *dir, const char *const *settings, int n, esp_session **out) {
  esp_status st = ESP_OK;
  esp_strbuf yaml;
  *out = NULL;
  esp_session *s = esp_mem_alloc(ESP_MEM_HOST, sizeof *s);
  if (!s) return ESP_ERR_MEMORY;
  s->lr_factor = 1;
  esp_strbuf_init(&yaml);
  esp_strbuf_puts(&yaml, "name: session\nmodel: {base_model: ");
  esp_strbuf_json(&yaml, dir, strlen(dir));
  /* A recipe wants a task; a session's data come from its caller. */
  esp_strbuf_puts(&yaml, "}\ntasks: [{name: session, data: [{path: none}]}]\n");
  if (yaml.failed) ESP_GOTO(ESP_ERR_MEMORY);
  ESP_GOTO(esp_recipe_parse(yaml.data, yaml.len, "settings", settings, n, &s->recipe));
  if (s->recipe->parallel.threads > 0) ESP_GOTO(esp_threads_init(s->recipe->parallel.threads));
  ESP_GOTO(esp_comm_create("self", &s->comm));
  ESP_GOTO(esp_tokenizer_load(s->recipe->model.tokenizer, &s->tok));
  ESP_GOTO(esp_engine_init(&s->engine, s->recipe, s->comm, false));
  ESP_GOTO(esp_engine_init(&s->count, s->recipe, s->comm, true));
  /* Headers now, so that a bad directory is an error of this call. */
  ESP_GOTO(esp_engine_load(&s->count, s->recipe->model.base_model, NULL, NULL, false));
  *out = s;
out:
  esp_strbuf_deinit(&yaml);
  if (st != ESP_OK) esp_session_close(s);
  return st;
}

void esp_session_close(esp_session *s) {
  if (!s) return;
  for (int i = 0; i < s->n_added; i++) {
    for (int k = 0; k < 2; k++) esp_adapter_destroy(s->added[i].a[k]);
    esp_mem_free(s->added[i].dir);
  }
  esp_engine_deinit(&s->engine);
  esp_engine_deinit(&s->count);
  esp_tokenizer_destroy(s->tok);
  esp_comm_destroy(s->comm);
  esp_recipe_destroy(s->recipe);
  esp_mem_free(s->adapter_dir);
  esp_mem_free(s);
}

static const esp_adapter_cfg *cfg_of(const esp_session *s) {
  return s->attached ? &s->recipe->adapter : NULL;
}

esp_status esp_session_attach(esp_session *s, const char *dir) {
  if (s->attached || s->ready || s->n_added)
    return esp_fail(ESP_ERR_RECIPE, "session: an adapter is attached once, before the first computation");
  if (dir && !(s->adapter_dir = esp_mem_strdup(ESP_MEM_HOST, dir))) return ESP_ERR_MEMORY;
  s->attached = true;
  return esp_engine_load(&s->count, s->recipe->model.base_model, cfg_of(s), s->adapter_dir, true);
}

static esp_status load_added(esp_session *s, esp_engine *e, int which, int i) {
  char name[32];
  added *x = &s->added[i];
  snprintf(name, sizeof name, "added%d", i + 1);
  ESP_TRY(esp_adapter_load(e->model, x->dir, name, false, &x->a[which]));
  x->a[which]->weight = x->weight;
  return ESP_OK;
}

static esp_status activate(esp_session *s, esp_engine *e, int which) {
  esp_adapter *list[MAX_ADDED + 1];
  int n = 0;
  if (e->adapter) list[n++] = e->adapter;
  for (int i = 0; i < s->n_added; i++)
    if (s->added[i].a[which]) list[n++] = s->added[i].a[which];
  return esp_adapters_activate(e->model, list, n);
}

esp_status esp_session_add(esp_session *s, const char *dir, double weight) {
  if (s->ready) return esp_fail(ESP_ERR_RECIPE, "session: adapters are added before the first computation");
  if (s->n_added == MAX_ADDED) return esp_fail(ESP_ERR_RECIPE, "session: more than %d adapters", MAX_ADDED);
  if (!isfinite(weight)) return esp_fail(ESP_ERR_RECIPE, "session: the weight of %s is not finite", dir);
  added *x = &s->added[s->n_added];
  if (!(x->dir = esp_mem_strdup(ESP_MEM_HOST, dir))) return ESP_ERR_MEMORY;
  x->weight = weight;
  s->n_added++;
  ESP_TRY(load_added(s, &s->count, 1, s->n_added - 1));
  return activate(s, &s->count, 1);
}

static esp_status ready(esp_session *s) {
  if (s->ready) return ESP_OK;
  for (int i = 0; i < s->n_added; i++) { /* of a call before that failed */
    esp_adapter_destroy(s->added[i].a[0]);
    s->added[i].a[0] = NULL;
  }
  ESP_TRY(esp_engine_load(&s->engine, s->recipe->model.base_model, cfg_of(s), s->adapter_dir, true));
  for (int i = 0; i < s->n_added; i++) ESP_TRY(load_added(s, &s->engine, 0, i));
  if (s->n_added) ESP_TRY(activate(s, &s->engine, 0));
  if (s->engine.adapter) ESP_TRY(esp_engine_optim(&s->engine, &s->recipe->optim, false));
  ESP_TRY(esp_engine_stack(&s->count, 0));
  s->ready = true;
  return ESP_OK;
}

static bool wants_data(const esp_session *s) {
  return !s->shown && !s->adapter_dir && esp_engine_wants_data(&s->engine);
}

/* Before anything is computed with an adapter that takes its start from data. */
static esp_status started(esp_session *s) {
  ESP_TRY(ready(s));
  if (!wants_data(s)) return ESP_OK;
  const esp_adapter_cfg *c = &s->engine.adapter->cfg;
  bool lora = strcmp(s->engine.adapter->kind->name, "lora") == 0;
  return esp_fail(ESP_ERR_RECIPE,
                  "session: %s %s takes its start from data: show it some with esp_session_calibrate first",
                  lora ? "adapter.init" : "an adapter of type", lora ? c->init : s->engine.adapter->kind->name);
}

/* The stack is at least what `count` has measured so far. */
static esp_status grow_stack(esp_session *s) {
  if (s->engine.stack_ready && s->engine.stack.capacity >= s->count.stack.high) return ESP_OK;
  ESP_TRY(esp_engine_stack(&s->engine, s->count.stack.high));
  esp_backend *be = s->engine.be;
  if (be->ops->scratch) be->ops->scratch(be, s->count.be->ops->scratch(s->count.be, 0));
  return be->sticky;
}

esp_status esp_session_encode(esp_session *s, const char *text, int special, int32_t **ids, int64_t *n) {
  esp_ids list = {0};
  esp_status st = esp_tokenizer_encode(s->tok, text, strlen(text), special != 0, &list);
  if (st == ESP_OK && !list.data && !(list.data = esp_mem_alloc(ESP_MEM_DATA, 4))) st = ESP_ERR_MEMORY;
  if (st != ESP_OK) {
    esp_ids_deinit(&list);
    return st;
  }
  *ids = list.data; /* from esp_mem: esp_free */
  *n = list.n;
  return ESP_OK;
}

esp_status esp_session_decode(esp_session *s, const int32_t *ids, int64_t n, char **text) {
  size_t len;
  *text = NULL;
  return esp_tokenizer_decode(s->tok, ids, n, true, text, &len);
}

int32_t esp_session_eos(esp_session *s) {
  int32_t id = esp_tokenizer_eos(s->tok);
  const esp_model_desc *d = esp_model_describe(s->count.model);
  return id < 0 && d->n_eos > 0 ? d->eos[0] : id;
}

/* ---- batches ---- */

typedef struct packed {
  int32_t *ids, *targets, *positions, *cu;
  float *weights;
  esp_batch batch;
  double weight;
  int64_t trained;
} packed;

static void packed_free(packed *p) {
  esp_mem_free(p->ids);
  esp_mem_free(p->weights);
  esp_mem_free(p->cu);
}

static esp_status pack(esp_session *s, const esp_example *list, int n, packed *p) {
  int64_t vocab = esp_model_describe(s->count.model)->vocab, most = esp_model_describe(s->count.model)->max_positions;
  int64_t real = 0;
  memset(p, 0, sizeof *p);
  for (int i = 0; i < n; i++) {
    if (list[i].n < 2 || list[i].n > most)
      return esp_fail(ESP_ERR_DATA, "example %d: %lld tokens, must be 2 to %lld", i + 1, (long long)list[i].n,
                      (long long)most);
    real += list[i].n;
  }
  if (n < 1) return esp_fail(ESP_ERR_DATA, "the batch is empty");
  int64_t T = esp_sequence_round(real);
  p->ids = esp_mem_alloc(ESP_MEM_DATA, (size_t)T * 3 * sizeof(int32_t));
  p->weights = esp_mem_alloc(ESP_MEM_DATA, (size_t)T * sizeof(float));
  p->cu = esp_mem_alloc(ESP_MEM_DATA, (size_t)(n + 2) * sizeof(int32_t));
  if (!p->ids || !p->weights || !p->cu) return ESP_ERR_MEMORY;
  p->targets = p->ids + T;
  p->positions = p->targets + T;
  int64_t at = 0;
  for (int i = 0; i < n; i++) {
    for (int64_t k = 0; k < list[i].n; k++, at++) {
      int32_t id = list[i].ids[k];
      if (id < 0 || id >= vocab)
        return esp_fail(ESP_ERR_DATA, "example %d: token %d is not in the vocabulary of %lld", i + 1, id,
                        (long long)vocab);
      p->ids[at] = id;
      p->positions[at] = (int32_t)k;
      if (k + 1 == list[i].n) continue;
      p->targets[at] = list[i].ids[k + 1];
      p->weights[at] = list[i].weights ? list[i].weights[k + 1] : 1.0f;
      p->weight += p->weights[at];
      p->trained += p->weights[at] != 0.0f;
    }
    p->cu[i + 1] = (int32_t)at;
  }
  for (int64_t k = at; k < T; k++) p->positions[k] = (int32_t)(k - at); /* a tail that nobody trains on */
  if (T > at) p->cu[n + 1] = (int32_t)T;
  p->batch = (esp_batch){.tokens = T,
                         .ids = p->ids,
                         .targets = p->targets,
                         .positions = p->positions,
                         .weights = p->weights,
                         .cu_seqlens = p->cu,
                         .n_seqs = T > at ? n + 1 : n};
  if (!(p->weight > 0)) return esp_fail(ESP_ERR_DATA, "the batch has no trained token");
  return ESP_OK;
}

/* Forward and, with `train`, backward on an engine. */
static esp_status compute(esp_session *s, esp_engine *e, const packed *p, bool train, esp_loss_out *loss) {
  ESP_TRY(esp_model_step(e->model, &e->stack, &p->batch, s->recipe->memory.activation_checkpointing, train,
                         (float)(1.0 / p->weight), s->recipe->seed, s->step << 20, loss, NULL));
  return esp_backend_sync(e->be);
}

static esp_status one_pass(esp_session *s, const esp_example *list, int n, bool train, packed *p, esp_loss_out *loss) {
  ESP_TRY(started(s));
  ESP_TRY(pack(s, list, n, p));
  ESP_TRY(compute(s, &s->count, p, train, loss));
  ESP_TRY(grow_stack(s));
  if (train) esp_params_zero_grad(s->engine.adapter->params);
  return compute(s, &s->engine, p, train, loss);
}

/* ---- the pass that the adapter's start comes from ---- */

typedef struct shown {
  esp_session *s;
  const esp_example *list;
  int n, size;
  packed p;
} shown;

static esp_status next_batch(void *ctx, int64_t i, esp_batch *out) {
  shown *x = ctx;
  int64_t at = i * x->size;
  packed_free(&x->p);
  ESP_TRY(pack(x->s, x->list + at, (int)(x->n - at < x->size ? x->n - at : x->size), &x->p));
  *out = x->p.batch;
  return ESP_OK;
}

static esp_status calibrate(esp_session *s, esp_engine *e, const esp_example *list, int n, int size) {
  shown x = {.s = s, .list = list, .n = n, .size = size};
  esp_status st = esp_calibrate_with(e, &s->recipe->optim, s->recipe->memory.activation_checkpointing,
                                     (n + size - 1) / size, next_batch, &x);
  packed_free(&x.p);
  return st;
}

esp_status esp_session_calibrate(esp_session *s, const esp_example *list, int n, int size) {
  if (!s->attached) return esp_fail(ESP_ERR_RECIPE, "session: there is no adapter to calibrate");
  if (n < 1 || size < 1) return esp_fail(ESP_ERR_DATA, "session: nothing to calibrate with");
  ESP_TRY(ready(s));
  if (!wants_data(s)) return ESP_OK;
  if (s->n_added > 0) /* they stand on the model, which is read again */
    return esp_fail(ESP_ERR_RECIPE, "session: an adapter that takes its start from data stands alone");
  ESP_TRY(calibrate(s, &s->count, list, n, size));
  ESP_TRY(grow_stack(s));
  ESP_TRY(calibrate(s, &s->engine, list, n, size));
  s->shown = true;
  return ESP_OK;
}

static void fill(const packed *p, const esp_loss_out *loss, double began, esp_step_result *out) {
  out->loss = loss->loss_sum / p->weight;
  out->accuracy = p->trained ? (double)loss->correct / (double)p->trained : 0;
  out->trained_tokens = p->weight;
  out->seconds = esp_now() - began;
}

esp_status esp_session_step(esp_session *s, const esp_example *list, int n, esp_step_result *out) {
  esp_status st = ESP_OK;
  packed p = {0};
  esp_loss_out loss = {0};
  esp_step_result r = {0};
  double began = esp_now();
  if (!s->attached) return esp_fail(ESP_ERR_RECIPE, "session: nothing to train (attach an adapter first)");
  ESP_GOTO(one_pass(s, list, n, true, &p, &loss));
  esp_optim *o = s->engine.optim;
  esp_adapter *a = s->engine.adapter;
  /* How many steps its caller will do is known from the settings only. */
  int64_t total = s->recipe->train.max_steps > 0 ? s->recipe->train.max_steps : 0;
  if (a->kind->before_step) r.penalty = a->kind->before_step(a, s->step, total);
  r.grad_norm = esp_optim_grad_norm(o);
  fill(&p, &loss, began, &r);
  if (!isfinite(r.loss) || !isfinite(r.grad_norm))
    ESP_GOTO(esp_fail(ESP_ERR_DIVERGED, "step %lld: loss %g, gradient norm %g", (long long)s->step + 1, r.loss,
                      r.grad_norm));
  double most = s->recipe->optim.max_grad_norm;
  r.lr = s->recipe->optim.lr * s->lr_factor;
  a->grad_scale = most > 0 && r.grad_norm > most ? (float)(most / r.grad_norm) : 1.0f;
  a->lr = r.lr;
  esp_optim_step(o, r.lr, a->grad_scale);
  ESP_GOTO(esp_backend_sync(s->engine.be));
  r.step = ++s->step;
  if (a->kind->after_step) ESP_GOTO(a->kind->after_step(a, s->step, total));
  r.seconds = esp_now() - began;
  if (out) *out = r;
out:
  packed_free(&p);
  return st;
}

esp_status esp_session_loss(esp_session *s, const esp_example *list, int n, esp_step_result *out) {
  packed p = {0};
  esp_loss_out loss = {0};
  double began = esp_now();
  esp_status st = one_pass(s, list, n, false, &p, &loss);
  *out = (esp_step_result){.step = s->step};
  if (st == ESP_OK) fill(&p, &loss, began, out);
  packed_free(&p);
  return st;
}

static esp_status text_example(esp_session *s, const char *prompt, const char *completion, esp_ids *ids,
                               float **weights, esp_example *out) {
  int32_t bos = esp_tokenizer_bos(s->tok), eos = esp_session_eos(s);
  if (eos < 0) return esp_fail(ESP_ERR_DATA, "the tokenizer names no end-of-text token");
  esp_ids_deinit(ids);
  *ids = (esp_ids){0};
  if (bos >= 0 && s->recipe->data.add_bos)
    ESP_TRY(esp_tokenizer_encode(s->tok, esp_tokenizer_token(s->tok, bos), strlen(esp_tokenizer_token(s->tok, bos)),
                                 false, ids));
  ESP_TRY(esp_tokenizer_encode(s->tok, prompt, strlen(prompt), false, ids));
  int64_t from = ids->n;
  ESP_TRY(esp_tokenizer_encode(s->tok, completion, strlen(completion), false, ids));
  int32_t *grown = esp_mem_realloc(ESP_MEM_DATA, ids->data, (size_t)(ids->n + 1) * sizeof *grown);
  if (!grown) return ESP_ERR_MEMORY;
  ids->data = grown;
  ids->cap = ids->n + 1;
  ids->data[ids->n++] = eos;
  *weights = esp_mem_alloc(ESP_MEM_DATA, (size_t)ids->n * sizeof **weights);
  if (!*weights) return ESP_ERR_MEMORY;
  for (int64_t k = from; k < ids->n; k++) (*weights)[k] = 1.0f;
  *out = (esp_example){ids->data, *weights, ids->n};
  return ESP_OK;
}

esp_status esp_session_step_text(esp_session *s, const char *const *prompts, const char *const *completions, int n,
                                 esp_step_result *out) {
  esp_status st = ESP_OK;
  esp_ids *ids = calloc((size_t)n + 1, sizeof *ids);
  float **weights = calloc((size_t)n + 1, sizeof *weights);
  esp_example *list = calloc((size_t)n + 1, sizeof *list);
  if (!ids || !weights || !list) ESP_GOTO(esp_fail_oom("a batch", sizeof *list * (size_t)n));
  for (int i = 0; i < n; i++) ESP_GOTO(text_example(s, prompts[i], completions[i], &ids[i], &weights[i], &list[i]));
  ESP_GOTO(esp_session_step(s, list, n, out));
out:
  for (int i = 0; i < n; i++) {
    if (ids) esp_ids_deinit(&ids[i]);
    if (weights) esp_mem_free(weights[i]);
  }
  free(ids);
  free(weights);
  free(list);
  return st;
}

void esp_session_set_lr_factor(esp_session *s, double factor) {
  s->lr_factor = factor;
}

void esp_session_parameters(const esp_session *s, int64_t *trainable, int64_t *total) {
  esp_engine_parameters(&s->count, trainable, total);
}

esp_status esp_session_save(esp_session *s, const char *dir) {
  if (!s->attached) return esp_fail(ESP_ERR_RECIPE, "session: there is no adapter to save");
  ESP_TRY(started(s));
  return esp_adapter_save(s->engine.adapter, dir);
}

/* ---- generation ---- */

static esp_status generate(esp_session *s, esp_engine *e, const esp_ids *prompts, int n, const esp_generate_options *o,
                           esp_ids *out) {
  const esp_model_desc *d = esp_model_describe(e->model);
  int32_t stop[9];
  int n_stop = 0;
  for (int i = 0; i < d->n_eos; i++) stop[n_stop++] = d->eos[i];
  if (esp_tokenizer_eos(s->tok) >= 0) stop[n_stop++] = esp_tokenizer_eos(s->tok);
  esp_gen_cfg cfg = {.max_new_tokens = o->max_new_tokens > 0 ? o->max_new_tokens : 64,
                     .temperature = o->temperature,
                     .top_p = o->top_p,
                     .top_k = o->top_k,
                     .seed = o->seed,
                     .stop = stop,
                     .n_stop = n_stop,
                     .adapters = o->adapters};
  if (esp_backend_counts(e->be)) {
    cfg.n_stop = 0; /* nothing is computed: only the length counts */
    cfg.temperature = 0;
  }
  return esp_generate(e->model, &e->stack, prompts, n, &cfg, out);
}

esp_status esp_session_generate(esp_session *s, const char *const *prompts, int n, const esp_generate_options *options,
                                char **texts) {
  esp_status st = ESP_OK;
  esp_generate_options o = options ? *options : (esp_generate_options){0};
  esp_ids *in = calloc((size_t)n + 1, sizeof *in), *out = calloc((size_t)n + 1, sizeof *out);
  for (int i = 0; i < n; i++) texts[i] = NULL;
  if (!in || !out) ESP_GOTO(esp_fail_oom("prompts", sizeof *in * (size_t)n));
  ESP_GOTO(started(s));
  int32_t bos = esp_tokenizer_bos(s->tok);
  for (int i = 0; i < n; i++) {
    if (bos >= 0 && !o.raw && s->recipe->data.add_bos) {
      const char *token = esp_tokenizer_token(s->tok, bos);
      ESP_GOTO(esp_tokenizer_encode(s->tok, token, strlen(token), false, &in[i]));
    }
    ESP_GOTO(esp_tokenizer_encode(s->tok, prompts[i], strlen(prompts[i]), false, &in[i]));
  }
  ESP_GOTO(generate(s, &s->count, in, n, &o, out));
  for (int i = 0; i < n; i++) out[i].n = 0;
  ESP_GOTO(grow_stack(s));
  ESP_GOTO(generate(s, &s->engine, in, n, &o, out));
  for (int i = 0; i < n; i++) ESP_GOTO(esp_session_decode(s, out[i].data, out[i].n, &texts[i]));
out:
  for (int i = 0; i < n; i++) {
    if (in) esp_ids_deinit(&in[i]);
    if (out) esp_ids_deinit(&out[i]);
    if (st != ESP_OK) esp_mem_free(texts[i]), texts[i] = NULL;
  }
  free(in);
  free(out);
  return st;
}
