/* make_tiny DIR: the files of tiny.h, for the tests that are scripts, and DIR/recipe.yaml over them. */
#include "tiny.h"

static const char recipe[] = "name: tiny\n"
                             "seed: 3\n"
                             "model: {base_model: model, dtype: bf16}\n"
                             "adapter: {type: lora, r: 4, alpha: 8, dropout: 0.1, target: all-linear}\n"
                             "data: {sequence_len: 64}\n"
                             "optim: {lr: 1e-2}\n"
                             "train: {epochs: 8, micro_batch_size: 2, gradient_accumulation_steps: 2}\n"
                             "eval:\n"
                             "  batch_tokens: 128\n"
                             "  sets:\n"
                             "    - {name: a, path: a.test.jsonl, metric: perplexity}\n"
                             "    - {name: b, path: b.test.jsonl, metric: exact_match, max_new_tokens: 6}\n"
                             "tasks:\n"
                             "  - {name: a, data: [{path: a.jsonl}], eval: a}\n"
                             "  - {name: b, data: [{path: b.jsonl}], eval: b, optim: {lr: 5e-3}}\n"
                             "log: {to: [jsonl, tensorboard]}\n"
                             "checkpoint: {output_dir: run, every: 2, keep: 2}\n";

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  if (tiny_make(argv[1]) != ESP_OK || tiny_write(argv[1], "recipe.yaml", recipe) != ESP_OK) {
    fprintf(stderr, "make_tiny: %s\n", esp_error_message());
    return 1;
  }
  return 0;
}
