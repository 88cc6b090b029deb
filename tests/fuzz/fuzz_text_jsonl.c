/* fuzz_text_jsonl.c: any bytes as a file of rows (lines, a list, natural instructions), in every format and overlong
 * policy (chosen by the first byte): an error with a message, or samples whose packs hold together. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/mem.h"
#include "core/strbuf.h"
#include "io/file.h"
#include "text/dataset.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static esp_tokenizer *make_tokenizer(void) {
  esp_strbuf b;
  esp_strbuf_init(&b);
  esp_strbuf_puts(&b, "{\"added_tokens\":[{\"id\":256,\"content\":\"<|im_start|>\",\"special\":true},"
                      "{\"id\":257,\"content\":\"<|im_end|>\",\"special\":true}],"
                      "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},"
                      "\"model\":{\"type\":\"BPE\",\"merges\":[],\"vocab\":{");
  int extra = 0;
  for (int c = 0; c < 256; c++) {
    bool prints = (c >= '!' && c <= '~') || (c >= 0xA1 && c <= 0xAC) || c >= 0xAE;
    esp_strbuf_printf(&b, "%s\"\\u%04x\":%d", c ? "," : "", prints ? c : 256 + extra, c);
    extra += !prints;
  }
  esp_strbuf_puts(&b, "}}}");
  char dir[] = "/tmp/esp_fuzz_XXXXXX", path[128];
  esp_tokenizer *t = NULL;
  if (!mkdtemp(dir)) abort();
  snprintf(path, sizeof path, "%s/tokenizer.json", dir);
  if (esp_file_write_atomic(path, b.data, b.len) != ESP_OK) abort();
  snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
  if (esp_file_write_atomic(path, "{\"eos_token\":\"<|im_end|>\"}", 26) != ESP_OK) abort();
  if (esp_tokenizer_load(dir, &t) != ESP_OK || esp_remove_tree(dir) != ESP_OK) abort();
  esp_strbuf_deinit(&b);
  return t;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static esp_tokenizer *tok;
  static char path[64];
  if (!tok) {
    tok = make_tokenizer();
    snprintf(path, sizeof path, "/dev/shm/esp_fuzz_%d.jsonl", (int)getpid());
  }
  if (!size) return 0;
  FILE *f = fopen(path, "wb"); /* no fsync: this runs a million times */
  if (!f) abort();
  fwrite(data + 1, 1, size - 1, f);
  fclose(f);
  esp_data_source src = {.path = path,
                         .prompt_template = data[0] & 16 ? "{definition}|{text}|{labels}" : NULL,
                         .format = data[0] & 32 ? ESP_FMT_NATURAL_INSTRUCTIONS : ESP_FMT_AUTO};
  esp_data_cfg cfg = {.sequence_len = 16 + data[0] / 8,
                      .overlong = (esp_overlong)(data[0] % 5),
                      .packing = data[0] & 1 ? ESP_PACK_BFD : ESP_PACK_OFF,
                      .train_on = data[0] & 2 ? ESP_TRAIN_ALL : ESP_TRAIN_ASSISTANT,
                      .mask_history = data[0] & 4,
                      .shuffle = true,
                      .add_bos = true,
                      .chat_template = data[0] & 8 ? "builtin:alpaca" : "builtin:chatml"};
  esp_dataset *d = NULL;
  if (esp_dataset_build(&src, 1, &cfg, tok, &d) != ESP_OK) {
    if (!esp_error_message()[0] || strchr(esp_error_message(), '\n') || d) __builtin_trap();
    unlink(path);
    return 0;
  }
  esp_packs *p = NULL;
  esp_rows r = {0};
  int64_t tokens = 0;
  if (esp_packs_create(d, &cfg, 1, 0, 0, &p) != ESP_OK) __builtin_trap();
  for (int64_t i = 0; i < esp_packs_count(p); i++) {
    if (esp_packs_fetch(p, i, 1, 0, &r) != ESP_OK || r.tokens > cfg.sequence_len) __builtin_trap();
    tokens += r.tokens;
    for (int64_t t = 0; t < r.tokens; t++)
      if (r.ids[t] < 0 || r.ids[t] >= esp_tokenizer_vocab(tok)) __builtin_trap();
  }
  if (tokens != esp_dataset_statistics(d)->tokens) __builtin_trap();
  esp_rows_deinit(&r);
  esp_packs_destroy(p);
  esp_dataset_destroy(d);
  unlink(path);
  return 0;
}
