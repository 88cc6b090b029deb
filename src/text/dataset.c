/* dataset.c: several sources as one list of samples. */
#include "text/dataset.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/log.h"
#include "core/map.h"
#include "text/data_priv.h"
#include "text/template.h"
#include "text/tok_priv.h"

void esp_shard_deinit(esp_shard *s) {
  for (int i = 0; i < 4; i++) esp_mem_free(s->owned[i]);
  if (s->map.data) esp_file_unmap(&s->map);
  memset(s, 0, sizeof *s);
}

static esp_status configure(esp_source_ctx *c, const esp_data_cfg *cfg) {
  static const char *const modes[] = {"none", "last", "turn"};
  const char *eos = cfg->train_on_eos ? cfg->train_on_eos : "turn", *chat = cfg->chat_template;
  c->eos_mode = -1;
  for (int i = 0; i < 3; i++)
    if (!strcmp(eos, modes[i])) c->eos_mode = i;
  if (c->eos_mode < 0) return esp_fail(ESP_ERR_RECIPE, "data.train_on_eos: '%s' is not turn, last or none", eos);
  if (chat && strcmp(chat, "auto")) {
    int n;
    const char *const *names = esp_template_names(&n);
    for (int i = 0; i < n && !c->chat; i++)
      if (!strncmp(chat, "builtin:", 8) && !strcmp(chat + 8, names[i])) c->chat = names[i];
    if (!c->chat)
      return esp_fail(ESP_ERR_RECIPE,
                      "data.chat_template: '%s' is not auto or builtin:chatml, llama3, mistral, gemma, alpaca", chat);
  }
  return ESP_OK;
}

/* What a format asks of the recipe. */
static esp_status check_format(const esp_source_ctx *c) {
  bool chat = c->format == ESP_FMT_MESSAGES || c->format == ESP_FMT_SHAREGPT;
  if (chat || (c->format == ESP_FMT_ALPACA && c->chat)) return esp_row_check_template(c, c->src->path);
  if (c->format == ESP_FMT_CLASSIFICATION && c->src->prompt_template && !strstr(c->src->prompt_template, "{text}"))
    return esp_fail(ESP_ERR_RECIPE, "prompt_template '%s' has no {text}", c->src->prompt_template);
  return ESP_OK;
}

static esp_status build_shard(esp_source_ctx *c, esp_arena *arena, esp_shard *out) {
  char hash[33], key[33], path[4096] = "";
  esp_source_file file = {0};
  esp_status st = ESP_OK;
  ESP_GOTO(esp_source_open(c, arena, &file));
  ESP_GOTO(check_format(c));
  if (c->cfg->cache_dir) {
    esp_hash_hex(file.map.data, file.map.size, hash);
    esp_cache_key(c, hash, key);
    char name[64];
    snprintf(name, sizeof name, "tokens-%s.bin", key);
    if (key[0]) esp_path_join(path, sizeof path, c->cfg->cache_dir, name);
  }
  if (!path[0] || !esp_cache_load(path, key, esp_tokenizer_vocab(c->tok), out)) {
    ESP_GOTO(esp_shard_tokenise(c, &file, out));
    out->format = c->format;
    /* A cache that cannot be written (full or read-only disk) costs time, not the run. */
    if (path[0] && (esp_mkdirs(c->cfg->cache_dir) != ESP_OK || esp_cache_store(path, key, out) != ESP_OK)) {
      esp_log(ESP_LOG_NOTICE, "token cache not written: %s", esp_error_message());
      esp_error_clear();
    }
  }
  out->path = c->src->path;
  if (!out->n_samples)
    st = esp_fail(ESP_ERR_DATA, "%s: the dataset is empty: all %lld rows are longer than sequence_len %lld",
                  c->src->path, (long long)out->stats.dropped_overlong, (long long)c->cfg->sequence_len);
out:
  esp_source_close(&file);
  return st;
}

/* ---- labels ---- */
static int by_name(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static int label_index(const esp_dataset *d, const char *name) {
  for (int i = 0; i < d->n_labels; i++)
    if (!strcmp(d->labels[i], name)) return i;
  return -1;
}

static esp_status add_label(esp_dataset *d, int *cap, const char *name) {
  if (label_index(d, name) >= 0) return ESP_OK;
  if (d->n_labels == *cap) {
    *cap = *cap * 2 + 32;
    const char **grown = esp_arena_alloc(d->arena, sizeof *grown * (size_t)*cap);
    if (!grown) return ESP_ERR_MEMORY;
    if (d->n_labels) memcpy(grown, d->labels, sizeof *grown * (size_t)d->n_labels);
    d->labels = grown;
  }
  d->labels[d->n_labels] = esp_arena_strdup(d->arena, name);
  return d->labels[d->n_labels++] ? ESP_OK : ESP_ERR_MEMORY;
}

/* Ids of a label behind a prompt: a row with a placeholder text goes the way every row goes. */
static esp_status label_tokens(const esp_source_ctx *c, const char *label, esp_ids *out) {
  esp_status st = ESP_OK;
  esp_ids ids = {0};
  float *weights = NULL;
  int64_t cap = 0, prompt = 0;
  esp_data_source source = *c->src; /* any label will do here */
  source.n_labels = 0;
  esp_source_ctx any = *c;
  any.src = &source;
  any.format = ESP_FMT_CLASSIFICATION;
  esp_row row = {.arena = esp_arena_create(ESP_MEM_DATA)};
  json_t *j = json_pack("{s:s,s:s}", c->text_key, "x", c->label_key, label);
  if (!row.arena || !j) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  ESP_GOTO(esp_row_build(&any, j, c->src->path, &row));
  ESP_GOTO(esp_row_tokenise(&any, &row, c->src->path, &ids, &weights, &cap, &prompt));
  for (int64_t i = prompt; i < ids.n && st == ESP_OK; i++) {
    if (out->n == out->cap) {
      int64_t grown = out->cap * 2 + 8;
      void *p = esp_mem_realloc(ESP_MEM_DATA, out->data, (size_t)grown * sizeof *out->data);
      if (!p) {
        st = ESP_ERR_MEMORY;
        break;
      }
      out->data = p;
      out->cap = grown;
    }
    out->data[out->n++] = ids.data[i];
  }
out:
  json_decref(j);
  esp_arena_destroy(row.arena);
  esp_ids_deinit(&ids);
  esp_mem_free(weights);
  return st;
}

static esp_status build_labels(esp_dataset *d, const esp_source_ctx *ctx, int n_src) {
  int cap = 0, first = -1;
  bool given = false;
  for (int s = 0; s < n_src; s++) {
    const esp_shard *h = &d->shards[s];
    if (h->format != ESP_FMT_CLASSIFICATION) continue;
    if (first < 0) first = s;
    for (int i = 0; i < ctx[s].src->n_labels; i++) ESP_TRY(add_label(d, &cap, ctx[s].src->labels[i]));
    given = given || ctx[s].src->n_labels;
    for (int64_t i = 0; i < h->n_samples && !ctx[s].src->n_labels; i++)
      ESP_TRY(add_label(d, &cap, h->text + h->samples[i].answer));
  }
  if (first < 0) return ESP_OK;
  if (!given) qsort(d->labels, (size_t)d->n_labels, sizeof *d->labels, by_name);
  d->label_ids = esp_arena_alloc(d->arena, sizeof *d->label_ids * (size_t)(d->n_labels + 1));
  if (!d->label_ids) return ESP_ERR_MEMORY;
  for (int i = 0; i < d->n_labels; i++) ESP_TRY(label_tokens(&ctx[first], d->labels[i], &d->label_ids[i]));
  return ESP_OK;
}

esp_status esp_dataset_build(const esp_data_source *src, int n_src, const esp_data_cfg *cfg, const esp_tokenizer *tok,
                             esp_dataset **out) {
  esp_status st = ESP_OK;
  esp_source_ctx *ctx = NULL;
  esp_dataset *d = esp_mem_alloc(ESP_MEM_DATA, sizeof *d);
  if (!d) return ESP_ERR_MEMORY;
  d->arena = esp_arena_create(ESP_MEM_DATA);
  if (!d->arena) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  if (n_src <= 0) {
    st = esp_fail(ESP_ERR_DATA, "no data source");
    goto out;
  }
  ctx = esp_arena_alloc(d->arena, sizeof *ctx * (size_t)n_src);
  d->shards = esp_arena_alloc(d->arena, sizeof *d->shards * (size_t)n_src);
  d->first = esp_arena_alloc(d->arena, sizeof *d->first * (size_t)(n_src + 1));
  d->share = esp_arena_alloc(d->arena, sizeof *d->share * (size_t)n_src);
  if (!ctx || !d->shards || !d->first || !d->share) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int i = 0; i < n_src; i++) {
    ctx[i].src = &src[i];
    ctx[i].cfg = cfg;
    ctx[i].tok = tok;
    d->share[i] = src[i].weight > 0 ? src[i].weight : 1.0;
    ESP_GOTO(configure(&ctx[i], cfg));
    d->n_shards = i + 1;
    ESP_GOTO(build_shard(&ctx[i], d->arena, &d->shards[i]));
    esp_shard *s = &d->shards[i];
    if (!(s->path = esp_arena_strdup(d->arena, s->path))) {
      st = ESP_ERR_MEMORY;
      goto out;
    }
    d->first[i + 1] = d->first[i] + s->n_samples;
    const int64_t *from = (const int64_t *)&s->stats;
    int64_t *to = (int64_t *)&d->stats;
    for (size_t k = 0; k < sizeof d->stats / sizeof *to; k++) to[k] += from[k];
  }
  ESP_GOTO(build_labels(d, ctx, n_src));
  *out = d;
  d = NULL;
out:
  esp_dataset_destroy(d);
  return esp_text_one_line(st);
}

void esp_dataset_destroy(esp_dataset *d) {
  if (!d) return;
  for (int i = 0; i < d->n_shards; i++) esp_shard_deinit(&d->shards[i]);
  for (int i = 0; d->label_ids && i < d->n_labels; i++) esp_ids_deinit(&d->label_ids[i]);
  esp_arena_destroy(d->arena);
  esp_mem_free(d);
}

int64_t esp_dataset_count(const esp_dataset *d) {
  return d->first[d->n_shards];
}

const esp_dataset_stats *esp_dataset_statistics(const esp_dataset *d) {
  return &d->stats;
}

const esp_sample *esp_dataset_at(const esp_dataset *d, int64_t i, const esp_shard **shard) {
  int s = 0;
  while (i >= d->first[s + 1]) s++;
  *shard = &d->shards[s];
  return &d->shards[s].samples[i - d->first[s]];
}

void esp_dataset_sample(const esp_dataset *d, int64_t i, const int32_t **ids, const float **weights, int64_t *n) {
  const esp_shard *h;
  const esp_sample *s = esp_dataset_at(d, i, &h);
  *ids = h->ids + s->at;
  *weights = h->weights + s->at;
  *n = s->n;
}

void esp_dataset_origin(const esp_dataset *d, int64_t i, char *buf, size_t n) {
  const esp_shard *h;
  const esp_sample *s = esp_dataset_at(d, i, &h);
  snprintf(buf, n, "%s:%lld", h->path, (long long)s->line);
}

int64_t esp_dataset_prompt_len(const esp_dataset *d, int64_t i) {
  const esp_shard *h;
  return esp_dataset_at(d, i, &h)->prompt;
}

int esp_dataset_label(const esp_dataset *d, int64_t i) {
  const esp_shard *h;
  const esp_sample *s = esp_dataset_at(d, i, &h);
  return h->format == ESP_FMT_CLASSIFICATION ? label_index(d, h->text + s->answer) : -1;
}

int esp_dataset_labels(const esp_dataset *d, const char *const **names, const esp_ids **ids) {
  if (names) *names = d->labels;
  if (ids) *ids = d->label_ids;
  return d->n_labels;
}

const char *esp_dataset_answer(const esp_dataset *d, int64_t i) {
  const esp_shard *h;
  const esp_sample *s = esp_dataset_at(d, i, &h);
  return h->text + s->answer;
}
