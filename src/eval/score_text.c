/* score_text.c: answers that are generated: exact match, ROUGE-L, answers that are none of the labels, samples. */
#include <ctype.h>
#include <string.h>

#include "eval/generate.h"
#include "eval/score_priv.h"

static void trimmed(const char **s, size_t *n) {
  while (*n && isspace((unsigned char)**s)) (*s)++, (*n)--;
  while (*n && isspace((unsigned char)(*s)[*n - 1])) (*n)--;
}

bool esp_exact_match(const char *answer, const char *reference) {
  size_t a = strlen(answer), r = strlen(reference);
  trimmed(&answer, &a);
  trimmed(&reference, &r);
  return a == r && memcmp(answer, reference, a) == 0;
}

typedef struct span {
  const char *s;
  size_t n;
} span;

static int words(const char *s, span *out, int max) {
  int n = 0;
  while (*s && n < max) {
    while (*s && !isalnum((unsigned char)*s) && (unsigned char)*s < 0x80) s++;
    const char *begin = s;
    while (*s && (isalnum((unsigned char)*s) || (unsigned char)*s >= 0x80)) s++;
    if (s > begin) out[n++] = (span){begin, (size_t)(s - begin)};
  }
  return n;
}

static bool same_word(span a, span b) {
  if (a.n != b.n) return false;
  for (size_t i = 0; i < a.n; i++)
    if (tolower((unsigned char)a.s[i]) != tolower((unsigned char)b.s[i])) return false;
  return true;
}

double esp_rouge_l(const char *answer, const char *reference) {
  enum { MAX = 1024 };
  static _Thread_local span a[MAX], r[MAX];
  int na = words(answer, a, MAX), nr = words(reference, r, MAX);
  if (na == 0 || nr == 0) return na == nr ? 1.0 : 0.0;
  int row[MAX + 1] = {0};
  for (int i = 0; i < na; i++) {
    int diagonal = 0;
    for (int j = 1; j <= nr; j++) {
      int above = row[j];
      row[j] = same_word(a[i], r[j - 1]) ? diagonal + 1 : row[j] > row[j - 1] ? row[j] : row[j - 1];
      diagonal = above;
    }
  }
  double lcs = row[nr];
  return 2 * lcs / (na + nr); /* F1 of lcs/na and lcs/nr */
}

enum { MAX_BATCH = 64 };

/* Which adapters the prompts get. */
static esp_status choose(const esp_score_cfg *cfg, const esp_ids *prompts, int n, esp_gen_cfg *gen) {
  int32_t cu[MAX_BATCH + 1] = {0}, length[MAX_BATCH];
  if (!cfg->strategies) return ESP_OK;
  for (int i = 0; i < n; i++) {
    length[i] = (int32_t)prompts[i].n;
    cu[i + 1] = cu[i] + length[i];
  }
  int32_t *ids = esp_mem_alloc(ESP_MEM_DATA, (size_t)cu[n] * sizeof *ids);
  if (!ids) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) memcpy(ids + cu[i], prompts[i].data, (size_t)length[i] * sizeof *ids);
  esp_batch b = {.tokens = cu[n], .ids = ids, .cu_seqlens = cu, .n_seqs = n};
  esp_status st = esp_strategies_choose(cfg->strategies, cfg->sequence, cfg->owner, length, &b);
  esp_mem_free(ids);
  gen->adapters = b.adapters, gen->shares = b.shares, gen->n_shares = b.n_shares;
  return st;
}

static esp_status complete(esp_model *m, const esp_tokenizer *tok, const esp_dataset *d, esp_stack *stack,
                           const esp_score_cfg *cfg, const int64_t *index, int n, esp_ids *answers) {
  esp_ids prompts[MAX_BATCH];
  for (int k = 0; k < n; k++) {
    const int32_t *ids;
    const float *weights;
    int64_t len;
    esp_dataset_sample(d, index[k], &ids, &weights, &len);
    prompts[k] = (esp_ids){(int32_t *)ids, esp_dataset_prompt_len(d, index[k]), 0};
  }
  const esp_model_desc *desc = esp_model_describe(m);
  int32_t stop[9];
  int n_stop = 0;
  for (int i = 0; i < desc->n_eos; i++) stop[n_stop++] = desc->eos[i];
  if (esp_tokenizer_eos(tok) >= 0) stop[n_stop++] = esp_tokenizer_eos(tok);
  esp_gen_cfg gen = {.max_new_tokens = cfg->max_new_tokens, .stop = stop, .n_stop = n_stop, .experts = &cfg->experts};
  ESP_TRY(choose(cfg, prompts, n, &gen));
  return esp_generate(m, stack, prompts, n, &gen, answers);
}

/* As text, for the caller to free: a strategy's answers, or what is generated. */
static esp_status answer(esp_model *m, const esp_tokenizer *tok, const esp_dataset *d, esp_stack *stack,
                         const esp_score_cfg *cfg, const int64_t *index, int n, char **text) {
  esp_status st = ESP_OK;
  esp_ids ids[MAX_BATCH] = {0};
  const char *own[MAX_BATCH];
  if (esp_score_answered(d, cfg)) {
    ESP_TRY(esp_score_answer(d, cfg, index, n, own));
    for (int k = 0; k < n; k++)
      if (!(text[k] = esp_mem_strdup(ESP_MEM_HOST, own[k]))) return ESP_ERR_MEMORY;
    return ESP_OK;
  }
  ESP_GOTO(complete(m, tok, d, stack, cfg, index, n, ids));
  for (int k = 0; k < n; k++) {
    size_t len;
    ESP_GOTO(esp_tokenizer_decode(tok, ids[k].data, ids[k].n, true, &text[k], &len));
  }
out:
  for (int k = 0; k < n; k++) esp_ids_deinit(&ids[k]);
  return st;
}

static void count_malformed(const esp_dataset *d, int64_t i, const char *answer, esp_score_sums *out) {
  const char *const *names;
  const esp_ids *ids;
  int labels = esp_dataset_labels(d, &names, &ids);
  bool known = false;
  if (labels == 0 || esp_dataset_label(d, i) < 0) return;
  for (int k = 0; k < labels; k++) known |= esp_exact_match(answer, names[k]);
  out->labelled++;
  out->malformed += !known;
}

static esp_status generated_batch(esp_model *m, const esp_tokenizer *tok, const esp_dataset *d, esp_stack *stack,
                                  const esp_score_cfg *cfg, const int64_t *index, int n, esp_score_sums *out) {
  char *text[MAX_BATCH] = {0};
  esp_status st = answer(m, tok, d, stack, cfg, index, n, text);
  for (int k = 0; st == ESP_OK && k < n; k++) {
    const char *reference = esp_dataset_answer(d, index[k]);
    out->num +=
        cfg->metric == ESP_METRIC_EXACT_MATCH ? esp_exact_match(text[k], reference) : esp_rouge_l(text[k], reference);
    out->den++;
    out->samples++;
    count_malformed(d, index[k], text[k], out);
  }
  for (int k = 0; k < n; k++) esp_mem_free(text[k]);
  return st;
}

esp_status esp_score_generated(esp_model *m, const esp_tokenizer *tok, const esp_dataset *d, esp_stack *stack,
                               const esp_score_cfg *cfg, esp_score_sums *out) {
  int64_t index[MAX_BATCH], at = cfg->rank;
  for (int n; (n = esp_score_rows(d, cfg, cfg->max_new_tokens, MAX_BATCH, &at, index)) > 0;)
    ESP_TRY(generated_batch(m, tok, d, stack, cfg, index, n, out));
  return ESP_OK;
}

/* ---- samples ---- */

static void put_text(const char *text, const char *key, esp_strbuf *out) {
  esp_strbuf_printf(out, ", \"%s\": ", key);
  esp_strbuf_json(out, text, strlen(text));
}

static esp_status put_sample(const esp_tokenizer *tok, const esp_dataset *d, int64_t i, const char *answer,
                             const char *set, esp_strbuf *out) {
  const int32_t *ids;
  const float *weights;
  int64_t n;
  size_t len;
  char *prompt = NULL;
  const char *reference = esp_dataset_answer(d, i);
  esp_dataset_sample(d, i, &ids, &weights, &n);
  ESP_TRY(esp_tokenizer_decode(tok, ids, esp_dataset_prompt_len(d, i), true, &prompt, &len));
  esp_strbuf_puts(out, out->len > 0 ? ",\n{\"set\": " : "{\"set\": ");
  esp_strbuf_json(out, set, strlen(set));
  esp_strbuf_printf(out, ", \"index\": %lld", (long long)i);
  put_text(prompt, "prompt", out);
  put_text(answer, "answer", out);
  put_text(reference ? reference : "", "reference", out);
  esp_strbuf_puts(out, "}");
  esp_mem_free(prompt);
  return ESP_OK;
}

esp_status esp_score_samples(esp_model *m, const esp_tokenizer *tok, const esp_dataset *d, esp_stack *stack,
                             const esp_score_cfg *cfg, const char *set, esp_strbuf *out) {
  int64_t n = esp_score_samples_of(d, cfg);
  for (int64_t i = 0; i < n; i++) { /* one by one: a sample does not depend on what is beside it */
    char *text = NULL;
    if (esp_dataset_prompt_len(d, i) <= 1) continue; /* running text: everything is predicted */
    esp_status st = answer(m, tok, d, stack, cfg, &i, 1, &text);
    if (st == ESP_OK && out) st = put_sample(tok, d, i, text, set, out);
    esp_mem_free(text);
    ESP_TRY(st);
  }
  return ESP_OK;
}
