/* tok_wordpiece.c: greedy longest match, as BERT. */
#include "text/tok_priv.h"
#include "text/utf8.h"

esp_status esp_wordpiece_piece(const esp_tokenizer *t, const char *s, size_t n, esp_ids *out) {
  const esp_wordpiece *m = &t->wp;
  if (n == 0) return ESP_OK;
  int64_t chars = 0, before = out->n;
  for (size_t i = 0; i < n; i++) chars += ((unsigned char)s[i] & 0xC0) != 0x80;
  bool bad = chars > m->max_chars;
  char key[4096];
  if (!bad && n + m->n_prefix > sizeof key)
    return esp_fail(ESP_ERR_DATA, "%s: a word of %zu bytes is too long for WordPiece", t->path, n);
  for (size_t start = 0; !bad && start < n;) {
    size_t lead = start ? m->n_prefix : 0, end = n;
    memcpy(key, m->prefix, lead);
    memcpy(key + lead, s + start, n - start);
    int32_t id = -1;
    while (end > start && (id = esp_vocab_find(&t->vocab, key, lead + end - start)) < 0)
      end -= (size_t)esp_utf8_back(s + end);
    if (id < 0) {
      bad = true;
    } else {
      ESP_TRY(esp_ids_push(out, id));
      start = end;
    }
  }
  if (!bad) return ESP_OK;
  out->n = before;
  return esp_ids_push(out, m->unk);
}
