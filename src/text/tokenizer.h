/* tokenizer.h: tokenizer.json, exactly as the `tokenizers` package applies it. */
#ifndef ESP_TEXT_TOKENIZER_H
#define ESP_TEXT_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/error.h"

typedef struct esp_tokenizer esp_tokenizer;
/* Reads <dir>/tokenizer.json (and tokenizer_config.json where present, for bos/eos/pad names). A component of the file
 * that is not understood is an error that names it. */
esp_status esp_tokenizer_load(const char *dir, esp_tokenizer **out);
esp_status esp_tokenizer_parse(const char *json, size_t len, const char *path, esp_tokenizer **out);
void esp_tokenizer_destroy(esp_tokenizer *t);
/* Frees the idle encoders with their caches (as many as threads happened to encode at once); the next encode makes its
 * own. Called when the data is tokenised, so that what a run holds is a function of the recipe alone. */
void esp_tokenizer_trim(esp_tokenizer *t);

typedef struct esp_ids { /* growable */
  int32_t *data;
  int64_t n, cap;
} esp_ids;
void esp_ids_deinit(esp_ids *ids);
/* Appends the ids of text[0..n) (UTF-8; invalid bytes become U+FFFD as in Python's errors="replace"). special: apply
 * the post-processor (adds BOS and the like). Added tokens in the text are recognised either way. Thread-safe. */
esp_status esp_tokenizer_encode(const esp_tokenizer *t, const char *text, size_t n, bool special, esp_ids *out);
/* Appends the ids of text that continues what `out` already holds: as above without special, but what the normaliser or
 * pre-tokeniser puts in front of a text (Prepend, Metaspace, add_prefix_space) is left out unless the last id is an
 * added token. The boundary stays a token boundary, as it is when a model generates after a prompt. */
esp_status esp_tokenizer_encode_more(const esp_tokenizer *t, const char *text, size_t n, esp_ids *out);
/* Text of ids, zero-terminated, owned by the caller (esp_mem_free). */
esp_status esp_tokenizer_decode(const esp_tokenizer *t, const int32_t *ids, int64_t n, bool skip_special, char **text,
                                size_t *len);
int64_t esp_tokenizer_vocab(const esp_tokenizer *t);                 /* highest id + 1 */
int32_t esp_tokenizer_id(const esp_tokenizer *t, const char *token); /* -1 */
const char *esp_tokenizer_token(const esp_tokenizer *t, int32_t id); /* NULL */
bool esp_tokenizer_is_special(const esp_tokenizer *t, int32_t id);
bool esp_tokenizer_is_added(const esp_tokenizer *t, int32_t id);
int32_t esp_tokenizer_bos(const esp_tokenizer *t); /* -1: none */
int32_t esp_tokenizer_eos(const esp_tokenizer *t);
int32_t esp_tokenizer_pad(const esp_tokenizer *t);
/* The model's own Jinja chat template is present (it is not rendered yet). */
bool esp_tokenizer_has_chat_template(const esp_tokenizer *t);
/* xxh3-128 hex of the file: part of the token cache key. */
const char *esp_tokenizer_fingerprint(const esp_tokenizer *t);
/* Trains a byte-level BPE of `vocab` tokens on text and writes tokenizer.json + tokenizer_config.json (used to make the
 * demo base). special: names that get the first ids. */
esp_status esp_bpe_train(const char *text, size_t n, int vocab, const char *const *special, int n_special,
                         const char *dir);

#endif
