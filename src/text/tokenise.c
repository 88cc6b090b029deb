/* tokenise.c: rows to samples, in parallel over blocks of lines whose boundaries do not depend on the thread count. */
#include <stdlib.h>
#include <string.h>

#include "core/threads.h"
#include "text/data_priv.h"
#include "text/tok_priv.h"

static esp_status weights_to(float **w, int64_t *cap, int64_t n) {
  if (n <= *cap) return ESP_OK;
  int64_t grown = n * 2 + 256;
  void *p = esp_mem_realloc(ESP_MEM_DATA, *w, (size_t)grown * sizeof **w);
  if (!p) return ESP_ERR_MEMORY;
  *w = p;
  *cap = grown;
  return ESP_OK;
}

esp_status esp_row_tokenise(const esp_source_ctx *c, const esp_row *row, const char *where, esp_ids *ids,
                            float **weights, int64_t *cap_weights, int64_t *prompt) {
  esp_status st = ESP_OK;
  int64_t start = ids->n;
  int32_t bos = esp_tokenizer_bos(c->tok), eos = esp_tokenizer_eos(c->tok);
  bool begun = false, in_prompt = true;
  esp_strbuf text;
  esp_strbuf_init(&text);
  *prompt = 0;
  for (int i = 0; i < row->n_runs;) {
    const esp_run *r = &row->runs[i];
    int64_t before = ids->n;
    bool train = r->train;
    if (r->eos) {
      i++;
      /* A text that already ends with EOS gets no second one. */
      if (!(begun && ids->data[ids->n - 1] == eos))
        ESP_GOTO(esp_ids_push(ids, eos));
      else if (train)
        (*weights)[ids->n - 1] = 1;
    } else {
      esp_strbuf_clear(&text);
      bool is_prompt = r->prompt;
      for (; i < row->n_runs && !row->runs[i].eos && row->runs[i].train == train && row->runs[i].prompt == is_prompt;
           i++)
        esp_strbuf_add(&text, row->runs[i].text, row->runs[i].n);
      if (text.failed) {
        st = ESP_ERR_MEMORY;
        goto out;
      }
      if (begun)
        ESP_GOTO(esp_tokenizer_encode_more(c->tok, text.data, text.len, ids));
      else
        ESP_GOTO(esp_tokenizer_encode(c->tok, text.data, text.len, false, ids));
      if (!begun && row->bos && bos >= 0 && !(ids->n > start && ids->data[start] == bos)) {
        ESP_GOTO(esp_ids_push(ids, bos));
        memmove(ids->data + start + 1, ids->data + start, (size_t)(ids->n - start - 1) * sizeof *ids->data);
        ids->data[start] = bos;
      }
      in_prompt = in_prompt && is_prompt;
    }
    begun = begun || ids->n > start;
    ESP_GOTO(weights_to(weights, cap_weights, ids->n));
    for (int64_t k = before; k < ids->n; k++) (*weights)[k] = train ? 1.0f : 0.0f;
    if (in_prompt && !r->eos) *prompt = ids->n - start;
  }
  if (ids->n > start) {
    (*weights)[start] = 0; /* nothing predicts the first token */
    if (*prompt == 0) *prompt = 1;
  }
out:
  esp_strbuf_deinit(&text);
  return st;
}

/* ---- blocks of lines ---- */
typedef struct block {
  esp_ids ids;
  float *weights;
  int64_t cap_weights;
  esp_sample *samples;
  int64_t n_samples, cap_samples;
  esp_strbuf text;
  esp_dataset_stats stats;
  esp_status status;
  char *message;
} block;

typedef struct job {
  const esp_source_ctx *c;
  const esp_source_file *file;
  block *blocks;
} job;

enum { BLOCK = 32 };

static esp_status keep(block *b, int64_t at, int64_t n, int64_t prompt, int64_t line, int64_t answer) {
  if (b->n_samples == b->cap_samples) {
    int64_t cap = b->cap_samples * 2 + BLOCK;
    void *p = esp_mem_realloc(ESP_MEM_DATA, b->samples, (size_t)cap * sizeof *b->samples);
    if (!p) return ESP_ERR_MEMORY;
    b->samples = p;
    b->cap_samples = cap;
  }
  if (n > INT32_MAX) return esp_fail(ESP_ERR_DATA, "a sample of %lld tokens is too long", (long long)n);
  b->samples[b->n_samples++] = (esp_sample){at, (int32_t)n, (int32_t)(prompt < n ? prompt : n), -1, 0, line, answer};
  b->stats.kept++;
  return ESP_OK;
}

static double weight_of(const float *w, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += w[i];
  return sum;
}

/* Removes tokens [from, from + count) of the block's tail. */
static void cut_out(block *b, int64_t from, int64_t count) {
  memmove(b->ids.data + from, b->ids.data + from + count, (size_t)(b->ids.n - from - count) * sizeof *b->ids.data);
  memmove(b->weights + from, b->weights + from + count, (size_t)(b->ids.n - from - count) * sizeof *b->weights);
  b->ids.n -= count;
}

/* One chunk after another of at most `limit` tokens; each begins with the last token of the one before, so that every
 * trained token is still predicted once. Chunks without trained tokens are left out. */
static esp_status split(block *b, int64_t at, int64_t n, int64_t prompt, int64_t limit, int64_t line, int64_t answer) {
  esp_status st = ESP_OK;
  int64_t kept = 0;
  int32_t *ids = esp_mem_alloc(ESP_MEM_DATA, (size_t)n * sizeof *ids);
  float *w = esp_mem_alloc(ESP_MEM_DATA, (size_t)n * sizeof *w);
  if (!ids || !w) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  memcpy(ids, b->ids.data + at, (size_t)n * sizeof *ids);
  memcpy(w, b->weights + at, (size_t)n * sizeof *w);
  b->ids.n = at;
  for (int64_t from = 0; from + 1 < n; from += limit - 1) {
    int64_t m = n - from < limit ? n - from : limit, to = b->ids.n;
    if (weight_of(w + from + 1, m - 1) == 0) continue;
    ESP_GOTO(esp_ids_reserve(&b->ids, m));
    ESP_GOTO(weights_to(&b->weights, &b->cap_weights, to + m));
    memcpy(b->ids.data + to, ids + from, (size_t)m * sizeof *ids);
    memcpy(b->weights + to, w + from, (size_t)m * sizeof *w);
    b->weights[to] = 0;
    b->ids.n = to + m;
    ESP_GOTO(keep(b, to, m, prompt > from ? prompt - from : 1, line, answer));
    kept++;
  }
  if (kept) b->stats.split++;
out:
  esp_mem_free(ids);
  esp_mem_free(w);
  return st;
}

static esp_status fit(const esp_source_ctx *c, block *b, int64_t at, int64_t prompt, int64_t line, int64_t answer,
                      const char *where) {
  int64_t n = b->ids.n - at, limit = c->cfg->sequence_len;
  if (limit <= 0 || n <= limit) return keep(b, at, n, prompt, line, answer);
  switch (c->cfg->overlong) {
  case ESP_OVER_ERROR:
    return esp_fail(ESP_ERR_DATA, "%s: %lld tokens, more than sequence_len %lld", where, (long long)n,
                    (long long)limit);
  case ESP_OVER_SPLIT:
    return split(b, at, n, prompt, limit, line, answer);
  case ESP_OVER_TRUNCATE_END:
    b->ids.n = at + limit;
    break;
  case ESP_OVER_TRUNCATE_START: {
    int64_t head = b->ids.data[at] == esp_tokenizer_bos(c->tok) && limit > 1; /* BOS stays */
    cut_out(b, at + head, n - limit);
    b->weights[at] = 0;
    prompt = prompt - (n - limit) > 1 ? prompt - (n - limit) : 1;
    break;
  }
  case ESP_OVER_DROP:
    b->ids.n = at;
    b->stats.dropped_overlong++;
    return ESP_OK;
  }
  if (weight_of(b->weights + at, limit) == 0) { /* nothing trained is left */
    b->ids.n = at;
    b->stats.dropped_overlong++;
    return ESP_OK;
  }
  b->stats.truncated++;
  return keep(b, at, limit, prompt, line, answer);
}

static esp_status one_line(const esp_source_ctx *c, const esp_row_ref *l, block *b, esp_arena *arena) {
  esp_status st = ESP_OK;
  char where[1200];
  json_error_t error;
  snprintf(where, sizeof where, "%s:%lld", c->src->path, (long long)l->line);
  json_t *j = json_loadb(l->text, l->n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &error);
  if (!j) return esp_fail(ESP_ERR_DATA, "%s: column %d: not valid JSON: %s", where, error.column, error.text);
  esp_row row = {.arena = arena};
  int64_t at = b->ids.n, prompt;
  ESP_GOTO(esp_row_build(c, j, where, &row));
  ESP_GOTO(esp_row_tokenise(c, &row, where, &b->ids, &b->weights, &b->cap_weights, &prompt));
  b->stats.rows++;
  if (b->ids.n == at || weight_of(b->weights + at, b->ids.n - at) == 0) {
    st = esp_fail(ESP_ERR_DATA, "%s: no trained token in this row", where);
    goto out;
  }
  if (c->eos_mode == 2 && row.terminated < row.turns) {
    st = esp_fail(ESP_ERR_DATA, "%s: a trained turn has no trained terminator", where);
    goto out;
  }
  b->stats.turns_trained += row.turns;
  b->stats.turns_terminated += row.terminated;
  int64_t answer = (int64_t)b->text.len;
  esp_strbuf_add(&b->text, row.answer, strlen(row.answer) + 1);
  if (b->text.failed)
    st = ESP_ERR_MEMORY;
  else
    st = fit(c, b, at, prompt, l->line, answer, where);
out:
  json_decref(j);
  return st;
}

static void run_block(void *ctx, int64_t chunk, int thread) {
  job *job = ctx;
  block *b = &job->blocks[chunk];
  int64_t from = chunk * BLOCK, to = from + BLOCK < job->file->n_rows ? from + BLOCK : job->file->n_rows;
  esp_arena *arena = esp_arena_create(ESP_MEM_DATA);
  b->status = arena ? ESP_OK : ESP_ERR_MEMORY;
  for (int64_t i = from; i < to && b->status == ESP_OK; i++)
    b->status = one_line(job->c, &job->file->rows[i], b, arena);
  if (b->status != ESP_OK) b->message = esp_mem_strdup(ESP_MEM_HOST, esp_error_message()); /* errors are per thread */
  esp_arena_destroy(arena);
}

static void add_stats(esp_dataset_stats *a, const esp_dataset_stats *b) {
  a->rows += b->rows;
  a->kept += b->kept;
  a->dropped_overlong += b->dropped_overlong;
  a->truncated += b->truncated;
  a->split += b->split;
  a->turns_trained += b->turns_trained;
  a->turns_terminated += b->turns_terminated;
}

/* Blocks in file order become one shard. */
static esp_status join(block *blocks, int64_t n, esp_shard *out) {
  int64_t samples = 0, tokens = 0, text = 0;
  for (int64_t i = 0; i < n; i++) {
    samples += blocks[i].n_samples;
    tokens += blocks[i].ids.n;
    text += (int64_t)blocks[i].text.len;
  }
  esp_sample *s = out->owned[0] = esp_mem_alloc(ESP_MEM_DATA, (size_t)samples * sizeof *s);
  int32_t *ids = out->owned[1] = esp_mem_alloc(ESP_MEM_DATA, (size_t)tokens * sizeof *ids);
  float *w = out->owned[2] = esp_mem_alloc(ESP_MEM_DATA, (size_t)tokens * sizeof *w);
  char *t = out->owned[3] = esp_mem_alloc(ESP_MEM_DATA, (size_t)text + 1);
  if (!s || !ids || !w || !t) return ESP_ERR_MEMORY;
  out->samples = s;
  out->ids = ids;
  out->weights = w;
  out->text = t;
  for (int64_t i = 0; i < n; i++) {
    const block *b = &blocks[i];
    for (int64_t k = 0; k < b->n_samples; k++) {
      s[out->n_samples] = b->samples[k];
      s[out->n_samples].at += out->n_tokens;
      s[out->n_samples++].answer += out->n_text;
    }
    if (b->ids.n) {
      memcpy(ids + out->n_tokens, b->ids.data, (size_t)b->ids.n * sizeof *ids);
      memcpy(w + out->n_tokens, b->weights, (size_t)b->ids.n * sizeof *w);
    }
    if (b->text.len) memcpy(t + out->n_text, b->text.data, b->text.len);
    out->n_tokens += b->ids.n;
    out->n_text += (int64_t)b->text.len;
    add_stats(&out->stats, &b->stats);
  }
  out->stats.tokens = out->n_tokens;
  for (int64_t i = 0; i < out->n_tokens; i++) out->stats.trained_tokens += w[i] > 0;
  return ESP_OK;
}

esp_status esp_shard_tokenise(const esp_source_ctx *c, const esp_source_file *file, esp_shard *out) {
  esp_status st = ESP_OK;
  int64_t n_blocks = (file->n_rows + BLOCK - 1) / BLOCK;
  block *blocks = NULL;
  blocks = esp_mem_alloc(ESP_MEM_DATA, (size_t)n_blocks * sizeof *blocks);
  if (!blocks) {
    n_blocks = 0;
    st = ESP_ERR_MEMORY;
    goto out;
  }
  job j = {c, file, blocks};
  esp_parallel(n_blocks, run_block, &j);
  for (int64_t i = 0; i < n_blocks; i++)
    if (blocks[i].status != ESP_OK) {
      st = esp_fail(blocks[i].status, "%s", blocks[i].message ? blocks[i].message : "out of memory");
      goto out;
    }
  ESP_GOTO(join(blocks, n_blocks, out));
out:
  for (int64_t i = 0; i < n_blocks; i++) {
    esp_ids_deinit(&blocks[i].ids);
    esp_mem_free(blocks[i].weights);
    esp_mem_free(blocks[i].samples);
    esp_strbuf_deinit(&blocks[i].text);
    esp_mem_free(blocks[i].message);
  }
  esp_mem_free(blocks);
  return st;
}
