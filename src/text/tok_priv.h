/* tok_priv.h: the parts of a tokenizer and the state of one encoding thread. Private to src/text.
 *
 * Stages, as in the `tokenizers` package: added tokens are cut out of the raw text, the rest is normalised, added
 * tokens that are matched on normalised text are cut out, each remaining section is split into pieces by the
 * pre-tokenisers, each piece goes through the model, and the post-processor adds special tokens around the whole.
 */
#ifndef ESP_TEXT_TOK_PRIV_H
#define ESP_TEXT_TOK_PRIV_H

#include <jansson.h>
#include <pthread.h>

#include "core/arena.h"
#include "core/mem.h"
#include "core/strbuf.h"
#include "text/tokenizer.h"

/* ---- regular expressions (tok_regex.c) ---- */
typedef struct esp_regex esp_regex;
typedef struct esp_regex_state esp_regex_state; /* match data of one thread */
/* Oniguruma's dialect as far as tokenizer files use it; what PCRE2 would read differently is an error. */
esp_status esp_regex_create(const char *pattern, size_t n, const char *path, esp_regex **out);
void esp_regex_destroy(esp_regex *r);
esp_status esp_regex_state_create(esp_regex_state **out);
void esp_regex_state_destroy(esp_regex_state *s);
/* The text to hand to esp_regex_find: `text`, or a copy in `spare` where characters newer than PCRE2's tables have been
 * replaced by older ones of their kind and length, so that places are the same. NULL: no memory. */
const char *esp_regex_text(const char *text, size_t n, esp_strbuf *spare);
/* 1: match at [*start, *stop), 0: none, -1: PCRE2 gave up (error set). */
int esp_regex_find(const esp_regex *r, esp_regex_state *s, const char *text, size_t n, size_t from, size_t *start,
                   size_t *stop);

/* ---- hand-written splitters for the three common byte-level patterns (tok_split.c) ---- */
typedef enum esp_split_kind { ESP_SPLIT_NONE, ESP_SPLIT_GPT2, ESP_SPLIT_LLAMA3, ESP_SPLIT_QWEN2 } esp_split_kind;
esp_split_kind esp_split_known(const char *pattern, size_t n);
extern const char *const esp_gpt2_pattern;
/* End of the piece that begins at `at` (< n) of valid UTF-8. */
size_t esp_split_next(esp_split_kind kind, const char *text, size_t n, size_t at);

/* ---- normalizers (tok_norm.c) ---- */
typedef enum esp_norm_kind {
  ESP_NORM_NFC,
  ESP_NORM_NFD,
  ESP_NORM_NFKC,
  ESP_NORM_NFKD,
  ESP_NORM_LOWERCASE,
  ESP_NORM_STRIP,
  ESP_NORM_STRIP_ACCENTS,
  ESP_NORM_PREPEND,
  ESP_NORM_REPLACE,
  ESP_NORM_REPLACE_REGEX,
  ESP_NORM_BERT,
  ESP_NORM_BYTE_LEVEL
} esp_norm_kind;
typedef struct esp_norm {
  esp_norm_kind kind;
  const char *a, *b; /* prepend: a; replace: a -> b */
  size_t na, nb;
  bool left, right;                      /* strip */
  bool clean, cjk, strip_accents, lower; /* bert */
  esp_regex *regex;
} esp_norm;

/* ---- pre-tokenizers (tok_pre.c) ---- */
typedef enum esp_pre_kind {
  ESP_PRE_BYTE_LEVEL,
  ESP_PRE_SPLIT,
  ESP_PRE_WHITESPACE,
  ESP_PRE_WHITESPACE_SPLIT,
  ESP_PRE_BERT,
  ESP_PRE_DIGITS,
  ESP_PRE_PUNCTUATION,
  ESP_PRE_METASPACE,
  ESP_PRE_DELIMITER
} esp_pre_kind;
typedef enum esp_behavior {
  ESP_BEHAVE_ISOLATED,
  ESP_BEHAVE_REMOVED,
  ESP_BEHAVE_MERGED_PREVIOUS,
  ESP_BEHAVE_MERGED_NEXT,
  ESP_BEHAVE_CONTIGUOUS
} esp_behavior;
typedef struct esp_pre {
  esp_pre_kind kind;
  esp_split_kind known; /* split, byte level: hand-written matcher */
  esp_behavior behavior;
  bool invert, use_regex, add_prefix_space, individual, split;
  const char *literal; /* split by string, delimiter, metaspace replacement */
  size_t n_literal;
  int scheme; /* metaspace: 0 never, 1 first, 2 always */
  esp_regex *regex;
} esp_pre;

/* ---- decoders (tok_decode.c) ---- */
typedef enum esp_dec_kind {
  ESP_DEC_BYTE_LEVEL,
  ESP_DEC_BYTE_FALLBACK,
  ESP_DEC_FUSE,
  ESP_DEC_REPLACE,
  ESP_DEC_STRIP,
  ESP_DEC_METASPACE,
  ESP_DEC_WORDPIECE,
  ESP_DEC_BPE
} esp_dec_kind;
typedef struct esp_dec {
  esp_dec_kind kind;
  const char *a, *b;
  size_t na, nb;
  int start, stop;
  bool flag; /* wordpiece: cleanup; metaspace: the first token loses its marks */
  esp_regex *regex;
} esp_dec;

/* ---- added tokens (tok_added.c) ---- */
typedef struct esp_added {
  const char *content; /* as in the file */
  size_t n;
  int32_t id;
  bool special, lstrip, rstrip, single_word, normalized;
} esp_added;
typedef struct esp_trie {
  uint32_t first[256]; /* node of the first byte, 0: none */
  struct esp_trie_node {
    uint32_t sibling, child; /* 0: none */
    int32_t added;           /* index + 1 into added, 0: none */
    unsigned char byte;
  } * nodes;
  uint32_t n, cap;
} esp_trie;
esp_status esp_trie_add(esp_trie *t, const char *s, size_t n, int added);
void esp_trie_deinit(esp_trie *t);
/* Next added token at or after `from`, longest at its leftmost place, honouring single_word. False: none. lstrip and
 * rstrip widen [*start, *stop); *start never falls below `from`. */
bool esp_trie_find(const esp_trie *t, const esp_added *added, const char *text, size_t n, size_t from, size_t *start,
                   size_t *stop, int *index);

/* ---- vocabulary and models ---- */
typedef struct esp_vocab { /* token bytes -> id, open addressing; strings live in one pool */
  char *pool;
  uint32_t *offset, *length; /* by id; length UINT32_MAX: no such id */
  int64_t n_ids;             /* highest id + 1 */
  int64_t count;
  uint64_t *slots; /* hash high 32 bits | id + 1 */
  uint64_t mask;
} esp_vocab;
int32_t esp_vocab_find(const esp_vocab *v, const char *s, size_t n); /* -1 */

typedef struct esp_merge_slot {
  uint64_t pair; /* left << 32 | right; UINT64_MAX: empty */
  int32_t rank, id;
} esp_merge_slot;
typedef struct esp_bpe {
  esp_merge_slot *merges;
  uint64_t mask;
  int shift;
  int32_t ascii_id[128];    /* id of the one-character token, -1 */
  int32_t byte_id[256];     /* byte-level: id of the byte's letter, -1 */
  int32_t fallback_id[256]; /* <0xNN>, -1 */
  int32_t unk;              /* -1 */
  bool bytes;               /* pieces arrive as raw bytes, the last pre-tokenizer being ByteLevel */
  bool byte_fallback, ignore_merges, fuse_unk;
  bool space_cut; /* no merge crosses from a letter into U+2581: a text may be cut before each such mark */
  const char *prefix, *suffix;
  size_t n_prefix, n_suffix;
} esp_bpe;
typedef struct esp_wordpiece {
  const char *prefix;
  size_t n_prefix;
  int64_t max_chars;
  int32_t unk;
} esp_wordpiece;

typedef struct esp_piece {
  uint32_t at, n;
  bool first; /* begins where the whole text begins */
} esp_piece;

/* State of one encoding thread; a tokenizer keeps a list of free ones. */
#define ESP_CACHE_KEY 22
#define ESP_CACHE_IDS 8
typedef struct esp_cache_slot { /* one cache line: word -> ids */
  uint64_t hash;
  uint8_t len, n;
  char key[ESP_CACHE_KEY];
  int32_t ids[ESP_CACHE_IDS];
} esp_cache_slot;
typedef struct esp_encoder {
  struct esp_encoder *next;
  esp_cache_slot *cache;
  esp_regex_state *regex;
  esp_strbuf text, norm, spare; /* repaired input; normalised section; scratch of both normalisers and splitters */
  esp_strbuf mapped, stand_in;
  esp_piece *pieces, *pieces2;
  int64_t n_pieces, cap_pieces, cap_pieces2;
  /* merging of one piece: linked symbols and a heap */
  struct esp_symbol {
    int32_t id, prev, next;
  } * symbols;
  struct esp_heap_item {
    int32_t rank, pos, id;
    int32_t left, right;
  } * heap;
  int64_t cap_symbols, n_heap, cap_heap;
} esp_encoder;

struct esp_tokenizer {
  esp_arena *arena;
  char path[512];
  char fingerprint[33];
  esp_vocab vocab;
  bool wordpiece;
  esp_bpe bpe;
  esp_wordpiece wp;
  esp_norm *norms;
  int n_norms;
  esp_pre *pres;
  int n_pres;
  esp_dec *decs;
  int n_decs;
  bool has_decoder;
  int32_t *before, *after; /* post-processor: ids around the sequence */
  int n_before, n_after;
  esp_added *added;
  int n_added;
  int32_t *added_of_id; /* index into added + 1, by id */
  int64_t n_vocab;      /* highest id + 1, added tokens included */
  esp_trie raw, normalized;
  int32_t bos, eos, pad;
  bool chat_template;
  pthread_mutex_t lock;
  esp_encoder *free_encoders;
};

/* Where a section of text stands: decides whether Prepend, Metaspace and add_prefix_space act on it. */
typedef enum esp_section { ESP_SECTION_START, ESP_SECTION_FRESH, ESP_SECTION_MIDDLE } esp_section;

/* tok_load.c, tok_parts.c: the file's components. */
esp_status esp_tok_load_model(esp_tokenizer *t, const char *json, size_t n, const char *path);
esp_status esp_tok_load_normalizer(esp_tokenizer *t, json_t *j, const char *path);
esp_status esp_tok_load_pre(esp_tokenizer *t, json_t *j, const char *path);
esp_status esp_tok_load_post(esp_tokenizer *t, json_t *j, const char *path);
esp_status esp_tok_load_decoder(esp_tokenizer *t, json_t *j, const char *path);
esp_status esp_tok_load_added(esp_tokenizer *t, json_t *j, const char *path);

/* Normalises in into out (which is cleared); `middle`: Prepend is not applied. */
esp_status esp_tok_normalize(const esp_tokenizer *t, esp_encoder *e, const char *in, size_t n, bool middle,
                             esp_strbuf *out);
/* Splits e->norm-like text into pieces and feeds each to the model. */
esp_status esp_tok_section(const esp_tokenizer *t, esp_encoder *e, const char *text, size_t n, esp_section where,
                           esp_ids *out);
esp_status esp_bpe_piece(const esp_tokenizer *t, esp_encoder *e, const char *s, size_t n, esp_ids *out);
/* esp_bpe_piece or esp_wordpiece_piece of a word, through the encoder's cache. */
esp_status esp_cached_piece(const esp_tokenizer *t, esp_encoder *e, const char *s, size_t n, esp_ids *out);
esp_status esp_wordpiece_piece(const esp_tokenizer *t, const char *s, size_t n, esp_ids *out);
esp_status esp_ids_push(esp_ids *ids, int32_t id);
esp_status esp_ids_reserve(esp_ids *ids, int64_t more);

/* Replaces control characters in the message of a failure; returns st. */
esp_status esp_text_one_line(esp_status st);

/* GPT-2's table: byte -> code point of its letter, and back (-1). */
uint32_t esp_byte_to_cp(unsigned char b);
int esp_cp_to_byte(uint32_t cp);
void esp_byte_map(const char *s, size_t n, esp_strbuf *out);

esp_status esp_encoder_create(esp_encoder **out);
void esp_encoder_destroy(esp_encoder *e);

#endif
