/* test_text_dataset.c: rows of every format become the right tokens and loss weights; errors name file and line;
 * packing places every sample once; the cache changes nothing.
 * Mutation seen to be caught: training the header of an assistant turn (s->content dropped from `trained` in rows.c).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/mem.h"
#include "core/strbuf.h"
#include "core/threads.h"
#include "io/file.h"
#include "io/json.h"
#include "text/dataset.h"
#include "text/template.h"

static char dir[] = "/tmp/esp_dataset_XXXXXX";
static char file[64];
static esp_tokenizer *tok;

/* One token per byte, control tokens on top: expectations can be read off the text. */
static int setup(void **state) {
  esp_strbuf b;
  esp_strbuf_init(&b);
  static const char *const special[] = {"<s>",
                                        "</s>",
                                        "<|im_start|>",
                                        "<|im_end|>",
                                        "<bos>",
                                        "<start_of_turn>",
                                        "<end_of_turn>",
                                        "<|begin_of_text|>",
                                        "<|eot_id|>",
                                        "<|start_header_id|>",
                                        "<|end_header_id|>"};
  const int n = sizeof special / sizeof *special;
  esp_strbuf_puts(&b, "{\"added_tokens\":[");
  for (int i = 0; i < n; i++)
    esp_strbuf_printf(&b, "%s{\"id\":%d,\"content\":\"%s\",\"special\":true,\"normalized\":false}", i ? "," : "",
                      256 + i, special[i]);
  esp_strbuf_puts(&b, "],\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},"
                      "\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"merges\":[],\"vocab\":{");
  int extra = 0;
  for (int c = 0; c < 256; c++) {
    bool prints = (c >= '!' && c <= '~') || (c >= 0xA1 && c <= 0xAC) || c >= 0xAE;
    esp_strbuf_printf(&b, "%s\"\\u%04x\":%d", c ? "," : "", prints ? c : 256 + extra, c);
    extra += !prints;
  }
  esp_strbuf_puts(&b, "}}}");
  if (!mkdtemp(dir)) return 1;
  char path[128];
  snprintf(path, sizeof path, "%s/tokenizer.json", dir);
  if (esp_file_write_atomic(path, b.data, b.len) != ESP_OK) return 1;
  snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
  const char *config = "{\"bos_token\":\"<s>\",\"eos_token\":{\"content\":\"</s>\"},"
                       "\"model_max_length\":1000000000000000019884624838656}";
  if (esp_file_write_atomic(path, config, strlen(config)) != ESP_OK) return 1;
  esp_strbuf_deinit(&b);
  snprintf(file, sizeof file, "%s/data.jsonl", dir);
  if (esp_tokenizer_load(dir, &tok) != ESP_OK) {
    fprintf(stderr, "%s\n", esp_error_message());
    return 1;
  }
  return 0;
}

static int teardown(void **state) {
  esp_tokenizer_destroy(tok);
  return esp_remove_tree(dir) != ESP_OK;
}

static esp_status build(const char *rows, const esp_data_source *like, const esp_data_cfg *cfg, esp_dataset **out) {
  esp_data_source src = like ? *like : (esp_data_source){0};
  src.path = file;
  *out = NULL;
  assert_int_equal(esp_file_write_atomic(file, rows, strlen(rows)), ESP_OK);
  return esp_dataset_build(&src, 1, cfg, tok, out);
}

/* Text with the trained parts in []: "<s>ask[yes</s>]" */
static int64_t render(const esp_dataset *d, int64_t i, esp_strbuf *b) {
  int64_t last = 0; /* where the last trained stretch begins */
  const int32_t *ids;
  const float *w;
  int64_t n;
  esp_dataset_sample(d, i, &ids, &w, &n);
  esp_strbuf_clear(b);
  bool open = false;
  for (int64_t k = 0; k < n; k++) {
    if ((w[k] > 0) != open) esp_strbuf_putc(b, open ? ']' : '[');
    if (w[k] > 0 && !open) last = k;
    open = w[k] > 0;
    char *text;
    size_t len;
    assert_int_equal(esp_tokenizer_decode(tok, &ids[k], 1, false, &text, &len), ESP_OK);
    esp_strbuf_add(b, text, len);
    esp_mem_free(text);
  }
  if (open) esp_strbuf_putc(b, ']');
  return last;
}

/* prompt: the expected prompt length, -1: the last trained stretch is the answer. */
static void expect(const char *rows, const esp_data_source *src, const esp_data_cfg *cfg, const char *want,
                   int64_t prompt) {
  esp_dataset *d;
  esp_strbuf b;
  esp_strbuf_init(&b);
  if (build(rows, src, cfg, &d) != ESP_OK) fail_msg("%s", esp_error_message());
  int64_t last = render(d, 0, &b);
  assert_string_equal(b.data, want);
  assert_int_equal(esp_dataset_prompt_len(d, 0), prompt < 0 ? last : prompt);
  esp_strbuf_deinit(&b);
  esp_dataset_destroy(d);
}

static const esp_data_cfg plain = {.sequence_len = 4096, .add_bos = true};

static esp_data_cfg chat(const char *name) {
  esp_data_cfg c = plain;
  c.chat_template = name;
  return c;
}

static void formats(void **state) {
  esp_data_cfg no_eos = plain, all = plain, no_bos = plain;
  no_eos.train_on_eos = "none";
  all.train_on = ESP_TRAIN_ALL;
  no_bos.add_bos = false;
  const char *row = "{\"prompt\":\"ask\",\"completion\":\"yes\"}\n";
  expect(row, NULL, &plain, "<s>ask[yes</s>]", 4);
  expect(row, NULL, &no_eos, "<s>ask[yes]</s>", 4);
  expect(row, NULL, &all, "<s>[askyes</s>]", 4);
  expect(row, NULL, &no_bos, "ask[yes</s>]", 3);
  expect("{\"prompt\":\"<s>ask\",\"completion\":\"yes</s>\"}", NULL, &plain, "<s>ask[yes</s>]",
         4); /* nothing doubled */
  expect("{\"text\":\"ab\"}", NULL, &plain, "<s>[ab</s>]", 1);
  expect("{\"text\":\"ab\"}", NULL, &no_bos, "a[b</s>]", 1);
  expect("{\"instruction\":\"Do\",\"input\":\"\",\"output\":\"ok\"}", NULL, &plain,
         "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
         "request.\n\n### Instruction:\nDo\n\n### Response:\n[ok</s>]",
         -1);
  expect("{\"instruction\":\"Do\",\"input\":\"it\",\"output\":\"ok\"}", NULL, &no_bos,
         "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
         "response that appropriately completes the request.\n\n### Instruction:\nDo\n\n### Input:\nit\n\n### "
         "Response:\n[ok</s>]",
         -1);
}

static void conversations(void **state) {
  esp_data_cfg ml = chat("builtin:chatml"), history = ml, last = ml, l3 = chat("builtin:llama3");
  esp_data_cfg mi = chat("builtin:mistral"), ge = chat("builtin:gemma"), al = chat("builtin:alpaca");
  history.mask_history = true;
  last.train_on_eos = "last";
  const char *two = "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"},"
                    "{\"role\":\"user\",\"content\":\"c\"},{\"role\":\"assistant\",\"content\":\" d\"}]}";
  expect(two, NULL, &ml,
         "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]\n<|im_start|>user\nc<|im_end|>\n"
         "<|im_start|>assistant\n[ d<|im_end|>]\n",
         -1);
  expect(two, NULL, &history,
         "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
         "<|im_start|>assistant\n[ d<|im_end|>]\n",
         -1);
  expect(two, NULL, &last,
         "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b]<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
         "<|im_start|>assistant\n[ d<|im_end|>]\n",
         -1);
  expect(two, NULL, &l3,
         "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant"
         "<|end_header_id|>\n\n[b<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>"
         "assistant<|end_header_id|>\n\n[d<|eot_id|>]",
         -1);
  expect(two, NULL, &mi, "<s> [INST] a [/INST][ b</s>] [INST] c [/INST][  d</s>]", -1);
  expect(two, NULL, &ge,
         "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n[b<end_of_turn>]\n<start_of_turn>user\n"
         "c<end_of_turn>\n<start_of_turn>model\n[d<end_of_turn>]\n",
         -1);
  expect("{\"conversations\":[{\"from\":\"system\",\"value\":\"S\"},{\"from\":\"human\",\"value\":\"a\"},"
         "{\"from\":\"gpt\",\"value\":\"b\"}]}",
         NULL, &al, "<s>S\n\n### Instruction:\na\n\n### Response:\n[b</s>]\n\n", -1);
  expect("{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"}],\"train\":true},"
         "{\"role\":\"assistant\",\"content\":\"b\",\"weight\":0}]}",
         NULL, &ml, "<|im_start|>user\n[a<|im_end|>]\n<|im_start|>assistant\nb<|im_end|>\n", -1);
  expect("{\"instruction\":\"Do\",\"input\":\"it\",\"output\":\"ok\"}", NULL, &ml,
         "<|im_start|>user\nDo\nit<|im_end|>\n<|im_start|>assistant\n[ok<|im_end|>]\n", -1);
}

static void labels(void **state) {
  static const char *const names[] = {"sport", "world", "business"};
  esp_data_source src = {.prompt_template = "{text} ({labels})? ", .labels = names, .n_labels = 3};
  esp_dataset *d;
  const char *rows = "{\"text\":\"x\",\"label\":\"world\"}\n{\"text\":\"y\",\"label\":0}\n";
  expect(rows, &src, &plain, "<s>x (sport, world, business)? [world</s>]", -1);
  assert_int_equal(build(rows, &src, &plain, &d), ESP_OK);
  const char *const *got;
  const esp_ids *ids;
  assert_int_equal(esp_dataset_labels(d, &got, &ids), 3);
  assert_string_equal(got[1], "world");
  assert_int_equal(esp_dataset_label(d, 0), 1);
  assert_int_equal(esp_dataset_label(d, 1), 0);
  assert_int_equal(ids[1].n, 6);
  assert_int_equal(ids[1].data[0], 'w');
  assert_int_equal(ids[1].data[5], esp_tokenizer_eos(tok));
  assert_string_equal(esp_dataset_answer(d, 0), "world");
  char origin[128];
  esp_dataset_origin(d, 1, origin, sizeof origin);
  assert_non_null(strstr(origin, "data.jsonl:2"));
  esp_dataset_destroy(d);
  expect("{\"text\":\"x\",\"label\":\"b\"}\n\n{\"text\":\"y\",\"label\":\"a\"}", NULL, &plain, "<s>x\n[b</s>]", 3);
  assert_int_equal(build("{\"text\":\"x\",\"label\":\"b\"}\n\n{\"text\":\"y\",\"label\":\"a\"}", NULL, &plain, &d),
                   ESP_OK);
  assert_int_equal(esp_dataset_label(d, 0), 1); /* labels taken from the data are sorted */
  esp_dataset_destroy(d);
}

static void errors(void **state) {
  static const char *const names[] = {"yes", "no"};
  esp_data_source with = {.labels = names, .n_labels = 2}, pc = {.format = ESP_FMT_PROMPT_COMPLETION};
  esp_data_cfg autos = plain, ml = chat("builtin:chatml"), none = plain, over = plain, bad = chat("builtin:vicuna");
  none.train_on_eos = "none";
  over.sequence_len = 8;
  over.overlong = ESP_OVER_ERROR;
  autos.chat_template = "auto";
  const struct {
    const char *rows;
    const esp_data_source *src;
    const esp_data_cfg *cfg;
    esp_status status;
    const char *says[3];
  } cases[] = {
      {"", NULL, &plain, ESP_ERR_DATA, {"data.jsonl: ", "empty"}},
      {"\n\n", NULL, &plain, ESP_ERR_DATA, {"empty"}},
      {"{\"text\":\"a\"}\n{\"text\":", NULL, &plain, ESP_ERR_DATA, {"data.jsonl:2: ", "JSON"}},
      {"[1]", NULL, &plain, ESP_ERR_DATA, {"data.jsonl:1: ", "object"}},
      {"{\"foo\":1}", NULL, &plain, ESP_ERR_DATA, {"data.jsonl:1: ", "format"}},
      {"{\"prompt\":\"a\"}", NULL, &plain, ESP_ERR_DATA, {"data.jsonl:1: ", "missing key 'completion'"}},
      {"{\"text\":\"a\"}", &pc, &plain, ESP_ERR_DATA, {"data.jsonl:1: ", "missing key 'prompt'"}},
      {"{\"prompt\":\"a\",\"completion\":3}", NULL, &plain, ESP_ERR_DATA, {":1: ", "'completion' must be a string"}},
      {"{\"text\":\"a\",\"text\":\"b\"}", NULL, &plain, ESP_ERR_DATA, {":1: ", "duplicate"}},
      {"{\"text\":\"a\",\"label\":\"yess\"}", &with, &plain, ESP_ERR_DATA, {":1: ", "'yess'", "did you mean 'yes'"}},
      {"{\"prompt\":\"a\",\"completion\":\"\"}", NULL, &none, ESP_ERR_DATA, {":1: ", "no trained token"}},
      {"{\"prompt\":\"aaaaaaaaaa\",\"completion\":\"b\"}", NULL, &over, ESP_ERR_DATA, {":1: ", "13 tokens"}},
      {"{\"messages\":[]}", NULL, &ml, ESP_ERR_DATA, {":1: ", "empty"}},
      {"{\"messages\":{}}", NULL, &ml, ESP_ERR_DATA, {":1: ", "list"}},
      {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}", NULL, &ml, ESP_ERR_DATA, {":1: ", "no trained token"}},
      {"{\"messages\":[{\"role\":\"robot\",\"content\":\"a\"}]}", NULL, &ml, ESP_ERR_DATA, {"unknown role 'robot'"}},
      {"{\"messages\":[{\"role\":\"user\"}]}", NULL, &ml, ESP_ERR_DATA, {":1: ", "missing key 'content'"}},
      {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}",
       NULL,
       &autos,
       ESP_ERR_DATA,
       {"auto", "builtin:chatml"}},
      {"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}", NULL, &bad, ESP_ERR_RECIPE, {"builtin:vicuna"}},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    esp_dataset *d;
    esp_status st = build(cases[i].rows, cases[i].src, cases[i].cfg, &d);
    if (st != cases[i].status) fail_msg("%s: status %d: %s", cases[i].rows, st, esp_error_message());
    for (int k = 0; k < 3 && cases[i].says[k]; k++)
      if (!strstr(esp_error_message(), cases[i].says[k]))
        fail_msg("%s: '%s' lacks '%s'", cases[i].rows, esp_error_message(), cases[i].says[k]);
    assert_null(d);
  }
  esp_data_source missing = {.path = "/nonexistent/x.jsonl"};
  esp_dataset *d;
  assert_int_equal(esp_dataset_build(&missing, 1, &plain, tok, &d), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "/nonexistent/x.jsonl"));
}

static void overlong(void **state) {
  const char *rows = "{\"prompt\":\"ab\",\"completion\":\"cdefgh\"}\n{\"prompt\":\"a\",\"completion\":\"b\"}\n";
  static const char *const want[] = {"<s>a[b</s>]", "<s>ab[cd]", "<s>[fgh</s>]", "<s>ab[cd]"};
  static const esp_overlong modes[] = {ESP_OVER_DROP, ESP_OVER_TRUNCATE_END, ESP_OVER_TRUNCATE_START, ESP_OVER_SPLIT};
  esp_strbuf b;
  esp_strbuf_init(&b);
  for (int i = 0; i < 4; i++) {
    esp_data_cfg c = plain;
    esp_dataset *d;
    c.sequence_len = 5;
    c.overlong = modes[i];
    if (build(rows, NULL, &c, &d) != ESP_OK) fail_msg("%s", esp_error_message());
    render(d, 0, &b);
    assert_string_equal(b.data, want[i]);
    const esp_dataset_stats *s = esp_dataset_statistics(d);
    assert_int_equal(s->rows, 2);
    assert_int_equal(s->dropped_overlong, i == 0);
    assert_int_equal(s->truncated, i == 1 || i == 2);
    assert_int_equal(s->split, i == 3);
    if (i == 3) { /* 10 tokens <s>abcdefgh</s> in chunks of 5 that share one token: all 7 trained ones are there */
      assert_int_equal(esp_dataset_count(d), 4);
      render(d, 1, &b);
      assert_string_equal(b.data, "d[efgh]");
      render(d, 2, &b);
      assert_string_equal(b.data, "h[</s>]");
      assert_int_equal(s->trained_tokens, 7 + 2);
    }
    esp_dataset_destroy(d);
  }
  esp_strbuf_deinit(&b);
}

static void make_rows(esp_strbuf *b, int n) {
  esp_strbuf_clear(b);
  for (int i = 0; i < n; i++)
    esp_strbuf_printf(b, "{\"prompt\":\"%.*s\",\"completion\":\"%d\"}\n", 1 + i * 7 % 23, "abcdefghijklmnopqrstuvwxyz",
                      i);
}

static void check_packs(const esp_dataset *d, const esp_data_cfg *cfg, int64_t epoch, double least) {
  esp_packs *p, *q;
  esp_rows r = {0};
  assert_int_equal(esp_packs_create(d, cfg, 7, 0, epoch, &p), ESP_OK);
  assert_int_equal(esp_packs_create(d, cfg, 7, 0, epoch, &q), ESP_OK);
  int64_t tokens = 0, seqs = 0;
  double weight = 0;
  for (int64_t i = 0; i < esp_packs_count(p); i++) {
    assert_int_equal(esp_packs_fetch(p, i, 1, 0, &r), ESP_OK);
    assert_true(r.tokens <= cfg->sequence_len);
    assert_true(r.weight_sum == esp_packs_row_weight(p, i));
    for (int s = 0; s < r.n_seqs; s++)
      for (int t = r.cu_seqlens[s]; t < r.cu_seqlens[s + 1]; t++) {
        assert_int_equal(r.positions[t], t - r.cu_seqlens[s]);
        bool last = t + 1 == r.cu_seqlens[s + 1];
        assert_int_equal(r.targets[t], last ? 0 : r.ids[t + 1]);
        if (last) assert_true(r.weights[t] == 0);
      }
    esp_rows same = {0};
    assert_int_equal(esp_packs_fetch(q, i, 1, 0, &same), ESP_OK);
    assert_int_equal(same.tokens, r.tokens);
    assert_memory_equal(same.ids, r.ids, (size_t)r.tokens * sizeof *r.ids);
    esp_rows_deinit(&same);
    tokens += r.tokens;
    seqs += r.n_seqs;
    weight += r.weight_sum;
  }
  assert_int_equal(tokens, esp_dataset_statistics(d)->tokens);
  assert_int_equal(seqs, esp_dataset_count(d));
  assert_true(weight == (double)esp_dataset_statistics(d)->trained_tokens);
  if (esp_packs_fill(p) < least) fail_msg("fill %.3f", esp_packs_fill(p));
  /* beyond the end, and padded */
  assert_int_equal(esp_packs_fetch(p, esp_packs_count(p) - 1, 3, 100, &r), ESP_OK);
  assert_int_equal(r.tokens, 100);
  assert_true(r.weight_sum == esp_packs_row_weight(p, esp_packs_count(p) - 1));
  assert_int_equal(r.cu_seqlens[r.n_seqs], 100);
  esp_rows_deinit(&r);
  esp_packs_destroy(p);
  esp_packs_destroy(q);
}

static void packing(void **state) {
  esp_strbuf b;
  esp_strbuf_init(&b);
  make_rows(&b, 500);
  esp_data_cfg c = plain;
  c.sequence_len = 64;
  c.packing = ESP_PACK_BFD;
  c.shuffle = true;
  esp_dataset *d;
  if (build(b.data, NULL, &c, &d) != ESP_OK) fail_msg("%s", esp_error_message());
  check_packs(d, &c, 0, 0.98);
  check_packs(d, &c, 1, 0.98);
  esp_packs *a, *e;
  esp_rows ra = {0}, re = {0};
  assert_int_equal(esp_packs_create(d, &c, 7, 0, 0, &a), ESP_OK);
  assert_int_equal(esp_packs_create(d, &c, 7, 0, 1, &e), ESP_OK);
  assert_int_equal(esp_packs_fetch(a, 0, 4, 0, &ra), ESP_OK);
  assert_int_equal(esp_packs_fetch(e, 0, 4, 0, &re), ESP_OK);
  assert_true(ra.tokens != re.tokens || memcmp(ra.ids, re.ids, (size_t)ra.tokens * 4)); /* epochs differ */
  esp_rows_deinit(&ra);
  esp_rows_deinit(&re);
  esp_packs_destroy(a);
  esp_packs_destroy(e);
  c.shuffle = false;
  check_packs(d, &c, 0, 0.98);
  c.packing = ESP_PACK_OFF;
  check_packs(d, &c, 0, 0.1);
  assert_int_equal(esp_packs_create(d, &c, 7, 0, 0, &a), ESP_OK);
  assert_int_equal(esp_packs_count(a), 500);
  assert_int_equal(esp_packs_fetch(a, 3, 1, 0, &ra), ESP_OK); /* unshuffled and unpacked: rows are samples */
  const int32_t *ids;
  const float *w;
  int64_t n;
  esp_dataset_sample(d, 3, &ids, &w, &n);
  assert_int_equal(ra.tokens, n);
  assert_memory_equal(ra.ids, ids, (size_t)n * 4);
  esp_rows_deinit(&ra);
  esp_packs_destroy(a);
  esp_dataset_destroy(d);
  esp_strbuf_deinit(&b);
}

static void shares(void **state) {
  esp_strbuf b;
  esp_strbuf_init(&b);
  make_rows(&b, 100);
  assert_int_equal(esp_file_write_atomic(file, b.data, b.len), ESP_OK);
  esp_data_source src[2] = {{.path = file, .weight = 0.25}, {.path = file, .weight = 2, .limit = 10}};
  esp_dataset *d;
  assert_int_equal(esp_dataset_build(src, 2, &plain, tok, &d), ESP_OK);
  assert_int_equal(esp_dataset_count(d), 110);
  esp_data_cfg c = plain;
  c.shuffle = true;
  esp_packs *p;
  assert_int_equal(esp_packs_create(d, &c, 1, 0, 0, &p), ESP_OK);
  assert_int_equal(esp_packs_count(p), 25 + 20);
  esp_packs_destroy(p);
  esp_dataset_destroy(d);
  esp_strbuf_deinit(&b);
}

static void same_dataset(const esp_dataset *a, const esp_dataset *b) {
  assert_int_equal(esp_dataset_count(a), esp_dataset_count(b));
  for (int64_t i = 0; i < esp_dataset_count(a); i++) {
    const int32_t *ia, *ib;
    const float *wa, *wb;
    int64_t na, nb;
    esp_dataset_sample(a, i, &ia, &wa, &na);
    esp_dataset_sample(b, i, &ib, &wb, &nb);
    assert_int_equal(na, nb);
    assert_memory_equal(ia, ib, (size_t)na * 4);
    assert_memory_equal(wa, wb, (size_t)na * 4);
    assert_string_equal(esp_dataset_answer(a, i), esp_dataset_answer(b, i));
    assert_int_equal(esp_dataset_prompt_len(a, i), esp_dataset_prompt_len(b, i));
    char oa[128], ob[128];
    esp_dataset_origin(a, i, oa, sizeof oa);
    esp_dataset_origin(b, i, ob, sizeof ob);
    assert_string_equal(oa, ob);
  }
}

static void cache(void **state) {
  esp_strbuf b;
  esp_strbuf_init(&b);
  make_rows(&b, 200);
  char folder[64], command[160];
  snprintf(folder, sizeof folder, "%s/cache", dir);
  esp_data_cfg c = plain;
  c.cache_dir = folder;
  esp_dataset *first, *second, *other, *damaged;
  assert_int_equal(build(b.data, NULL, &c, &first), ESP_OK);
  assert_int_equal(build(b.data, NULL, &c, &second), ESP_OK);
  assert_int_equal(esp_dataset_statistics(first)->cached, 0);
  assert_int_equal(esp_dataset_statistics(second)->cached, 200);
  same_dataset(first, second);
  esp_data_cfg changed = c; /* any setting that changes tokens is another key */
  changed.train_on_eos = "none";
  assert_int_equal(build(b.data, NULL, &changed, &other), ESP_OK);
  assert_int_equal(esp_dataset_statistics(other)->cached, 0);
  esp_dataset_destroy(second);
  /* A damaged file is not believed. */
  snprintf(command, sizeof command,
           "for f in %s/*.bin; do printf X | dd of=$f bs=1 seek=900 conv=notrunc 2>/dev/null; done", folder);
  assert_int_equal(system(command), 0);
  assert_int_equal(build(b.data, NULL, &c, &damaged), ESP_OK);
  assert_int_equal(esp_dataset_statistics(damaged)->cached, 0);
  same_dataset(first, damaged);
  esp_dataset_destroy(first);
  esp_dataset_destroy(damaged);
  esp_dataset_destroy(other);
  esp_strbuf_deinit(&b);
}

static void threads(void **state) {
  esp_strbuf b;
  esp_strbuf_init(&b);
  make_rows(&b, 300);
  esp_dataset *one, *two;
  assert_int_equal(esp_threads_init(1), ESP_OK);
  assert_int_equal(build(b.data, NULL, &plain, &one), ESP_OK);
  assert_int_equal(esp_threads_init(3), ESP_OK);
  assert_int_equal(build(b.data, NULL, &plain, &two), ESP_OK);
  same_dataset(one, two);
  esp_dataset_destroy(one);
  esp_dataset_destroy(two);
  esp_strbuf_deinit(&b);
}

/* Tokenising a conversation run by run gives the ids of the whole rendered text (what apply_chat_template gives), so
 * long as no token would straddle the edge of an answer. */
static void as_a_whole(void **state) {
  static const struct {
    const char *dir, *chat, *name;
  } cases[] = {{"qwen2", "builtin:chatml", "chatml"},
               {"llama-spm", "builtin:mistral", "mistral"},
               {"gpt2", "builtin:alpaca", "alpaca"}};
  static const char *const says[] = {"What is  2+2?\n", "It's 4.", "Et en fran\303\247ais\342\200\246 ?",
                                     "Quatre\n\n\xF0\x9F\x99\x82"};
  if (!esp_dir_exists(ESP_SHARED_DIR "/data/tokenizers")) {
    print_message("skipped: the shared tokenizers are absent\n");
    skip();
  }
  json_t *list = json_array();
  esp_message m[4];
  for (int i = 0; i < 4; i++) {
    m[i] = (esp_message){i % 2 ? "assistant" : "user", says[i], -1};
    json_array_append_new(list, json_pack("{s:s,s:s}", "role", m[i].role, "content", says[i]));
  }
  json_t *row = json_pack("{s:o}", "messages", list);
  char *text = json_dumps(row, JSON_COMPACT);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char dir_of[512];
    esp_tokenizer *t;
    snprintf(dir_of, sizeof dir_of, ESP_SHARED_DIR "/data/tokenizers/%s", cases[i].dir);
    if (esp_tokenizer_load(dir_of, &t) != ESP_OK) fail_msg("%s", esp_error_message());
    esp_data_cfg c = chat(cases[i].chat);
    c.add_bos = false;
    if (esp_tokenizer_eos(t) < 0 && i == 2) c.train_on_eos = "none"; /* alpaca ends with the tokenizer's EOS */
    esp_data_source src = {.path = file};
    esp_dataset *d;
    assert_int_equal(esp_file_write_atomic(file, text, strlen(text)), ESP_OK);
    if (esp_dataset_build(&src, 1, &c, t, &d) != ESP_OK) fail_msg("%s", esp_error_message());
    esp_rendered r;
    assert_int_equal(esp_template_render(cases[i].name, m, 4, false, &r), ESP_OK);
    esp_strbuf b;
    esp_strbuf_init(&b);
    for (int k = 0; k < r.n; k++) esp_strbuf_add(&b, r.segments[k].text, r.segments[k].len);
    esp_ids whole = {0};
    assert_int_equal(esp_tokenizer_encode(t, b.data, b.len, false, &whole), ESP_OK);
    const int32_t *ids;
    const float *w;
    int64_t n;
    esp_dataset_sample(d, 0, &ids, &w, &n);
    assert_int_equal(n, whole.n);
    assert_memory_equal(ids, whole.data, (size_t)n * sizeof *ids);
    esp_ids_deinit(&whole);
    esp_strbuf_deinit(&b);
    esp_rendered_deinit(&r);
    esp_dataset_destroy(d);
    esp_tokenizer_destroy(t);
  }
  free(text);
  json_decref(row);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(formats),  cmocka_unit_test(conversations), cmocka_unit_test(labels), cmocka_unit_test(errors),
      cmocka_unit_test(overlong), cmocka_unit_test(packing),       cmocka_unit_test(shares), cmocka_unit_test(cache),
      cmocka_unit_test(threads),  cmocka_unit_test(as_a_whole)};
  return cmocka_run_group_tests_name("text dataset", tests, setup, teardown);
}
