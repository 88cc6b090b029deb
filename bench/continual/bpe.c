/* bpe.c: trains a byte-level BPE on a text file and writes the tokenizer's files: espalier-bpe TEXT VOCABULARY OUT_DIR.
 * For bases that are trained from nothing (bench/continual/prepare.py). */
#include <stdio.h>
#include <stdlib.h>

#include "core/error.h"
#include "io/file.h"
#include "text/tokenizer.h"

int main(int argc, char **argv) {
  static const char *const special[] = {"<s>", "</s>"};
  esp_map_file text = {0};
  if (argc != 4) {
    fprintf(stderr, "usage: espalier-bpe TEXT VOCABULARY OUT_DIR\n");
    return 2;
  }
  esp_status st = esp_file_map(argv[1], &text);
  if (st == ESP_OK) st = esp_mkdirs(argv[3]);
  if (st == ESP_OK) st = esp_bpe_train(text.data ? text.data : "", text.size, atoi(argv[2]), special, 2, argv[3]);
  if (st != ESP_OK) fprintf(stderr, "%s\n", esp_error_message());
  esp_file_unmap(&text);
  return st == ESP_OK ? 0 : 1;
}
