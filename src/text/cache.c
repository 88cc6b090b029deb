/* cache.c: the token cache. The key is the hash of everything the samples depend on; the file is written atomically,
 * mapped at load, and believed only when its hash and every index in it are right. */
#include <string.h>
#include <xxhash.h>

#include "text/data_priv.h"

#define VERSION 2 /* raise with any change of what a row becomes */

typedef struct cache_head {
  char magic[8];
  uint32_t version, size_of_sample;
  char key[40];
  int64_t n_samples, n_tokens, n_text, format;
  esp_dataset_stats stats;
  uint64_t payload_hash;
} cache_head;

void esp_cache_key(const esp_source_ctx *c, const char *file_hash, char key[33]) {
  esp_strbuf b;
  esp_strbuf_init(&b);
  const esp_data_cfg *g = c->cfg;
  esp_strbuf_printf(&b, "v%d %s %s %d %d %d", VERSION, file_hash, esp_tokenizer_fingerprint(c->tok),
                    esp_tokenizer_bos(c->tok), esp_tokenizer_eos(c->tok), c->format);
  esp_strbuf_printf(&b, " %lld %lld %d %d %d %d %d %s\n", (long long)c->src->limit, (long long)g->sequence_len,
                    g->overlong, g->train_on, g->mask_history, c->eos_mode, g->add_bos, c->chat ? c->chat : "-");
  esp_strbuf_puts(&b, c->src->prompt_template ? c->src->prompt_template : "");
  for (int i = 0; i < c->src->n_labels; i++) {
    esp_strbuf_putc(&b, '\n');
    esp_strbuf_puts(&b, c->src->labels[i]);
  }
  esp_hash_hex(b.data ? b.data : "", b.len, key);
  if (b.failed) key[0] = 0; /* no memory for a key: no cache */
  esp_strbuf_deinit(&b);
}

static bool indices_right(const esp_shard *s, int64_t vocab) {
  int64_t at = 0;
  for (int64_t i = 0; i < s->n_samples; i++) {
    const esp_sample *x = &s->samples[i];
    if (x->at != at || x->n < 1 || x->n > s->n_tokens - at || x->prompt < 0 || x->prompt > x->n || x->answer < 0 ||
        x->answer >= s->n_text)
      return false;
    at += x->n;
  }
  for (int64_t i = 0; i < s->n_tokens; i++)
    if (s->ids[i] < 0 || s->ids[i] >= vocab) return false;
  return at == s->n_tokens && (s->n_text == 0 || s->text[s->n_text - 1] == 0);
}

bool esp_cache_load(const char *path, const char *key, int64_t vocab, esp_shard *out) {
  if (!esp_file_exists(path) || esp_file_map(path, &out->map) != ESP_OK) {
    esp_error_clear();
    return false;
  }
  const cache_head *h = (const cache_head *)out->map.data;
  size_t left = out->map.size < sizeof *h ? 0 : out->map.size - sizeof *h;
  bool good = out->map.size >= sizeof *h && !memcmp(h->magic, "ESPTOKS", 8) && h->version == VERSION &&
              h->size_of_sample == sizeof(esp_sample) && !strncmp(h->key, key, sizeof h->key);
  good = good && h->n_samples >= 0 && h->n_tokens >= 0 && h->n_text >= 0 &&
         (uint64_t)h->n_samples <= left / sizeof(esp_sample) && (uint64_t)h->n_tokens <= left / 8 &&
         (uint64_t)h->n_text <= left &&
         (uint64_t)h->n_samples * sizeof(esp_sample) + (uint64_t)h->n_tokens * 8 + (uint64_t)h->n_text == left;
  good = good && XXH3_64bits(h + 1, left) == h->payload_hash;
  if (good) {
    const char *p = (const char *)(h + 1);
    out->samples = (const esp_sample *)p;
    out->n_samples = h->n_samples;
    out->n_tokens = h->n_tokens;
    out->n_text = h->n_text;
    out->ids = (const int32_t *)(p + (size_t)h->n_samples * sizeof(esp_sample));
    out->weights = (const float *)(out->ids + h->n_tokens);
    out->text = (const char *)(out->weights + h->n_tokens);
    out->stats = h->stats;
    out->stats.cached = h->stats.rows;
    out->format = (esp_data_format)h->format;
    good = indices_right(out, vocab);
  }
  if (!good) {
    esp_file_unmap(&out->map);
    memset(out, 0, sizeof *out);
  }
  return good;
}

esp_status esp_cache_store(const char *path, const char *key, const esp_shard *s) {
  size_t a = (size_t)s->n_samples * sizeof *s->samples, b = (size_t)s->n_tokens * 4, c = (size_t)s->n_text;
  cache_head h = {.magic = "ESPTOKS",
                  .version = VERSION,
                  .size_of_sample = sizeof(esp_sample),
                  .n_samples = s->n_samples,
                  .n_tokens = s->n_tokens,
                  .n_text = s->n_text,
                  .format = s->format,
                  .stats = s->stats};
  strncpy(h.key, key, sizeof h.key - 1);
  char *file = esp_mem_alloc(ESP_MEM_DATA, sizeof h + a + 2 * b + c);
  if (!file) return ESP_ERR_MEMORY;
  char *p = file + sizeof h;
  memcpy(p, s->samples, a);
  memcpy(p + a, s->ids, b);
  memcpy(p + a + b, s->weights, b);
  memcpy(p + a + 2 * b, s->text, c);
  h.payload_hash = XXH3_64bits(p, a + 2 * b + c);
  memcpy(file, &h, sizeof h);
  esp_status st = esp_file_write_atomic(path, file, sizeof h + a + 2 * b + c);
  esp_mem_free(file);
  return st;
}
