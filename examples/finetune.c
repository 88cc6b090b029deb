/* finetune.c: the whole of a fine-tune in C: load a model, attach a LoRA, train on a few pairs, save the adapter,
 * generate with it, and do the same again from the saved adapter.
 *
 *   cc finetune.c $(pkg-config --cflags --libs espalier) -o finetune
 *   ./finetune MODEL_DIR ADAPTER_DIR
 */
#include <espalier/espalier.h>
#include <stdio.h>

enum { PAIRS = 4, STEPS = 60 };
static const char *const prompts[PAIRS] = {"The capital of France is", "The capital of Italy is",
                                           "The capital of Spain is", "The capital of Norway is"};
static const char *const answers[PAIRS] = {" Paris", " Rome", " Madrid", " Oslo"};

static int failed(const char *what) {
  fprintf(stderr, "%s: %s\n", what, esp_error_message());
  return 0;
}

static int train(esp_session *s) {
  for (int step = 0; step < STEPS; step++) {
    esp_step_result r;
    esp_session_set_lr_factor(s, 1.0 - (double)step / STEPS);
    if (esp_session_step_text(s, prompts, answers, PAIRS, &r) != ESP_OK) return failed("step");
    if (step % 10 == 0 || step + 1 == STEPS)
      printf("step %2lld  loss %.4f  accuracy %.2f  |g| %.3f\n", (long long)r.step, r.loss, r.accuracy, r.grad_norm);
  }
  return 1;
}

/* How many answers come out as they were trained. */
static int ask(esp_session *s, int *right) {
  char *texts[PAIRS];
  esp_generate_options o = {.max_new_tokens = 12};
  *right = 0;
  if (esp_session_generate(s, prompts, PAIRS, &o, texts) != ESP_OK) return failed("generate");
  for (int i = 0; i < PAIRS; i++) {
    int same = 1;
    for (int k = 0; answers[i][k] || texts[i][k]; k++)
      if (answers[i][k] != texts[i][k]) {
        same = 0;
        break;
      }
    *right += same;
    printf("%s ->%s\n", prompts[i], texts[i]);
    esp_free(texts[i]);
  }
  return 1;
}

static int first_run(const char *model, const char *adapter, int *right) {
  const char *settings[] = {"adapter.r=16", "adapter.alpha=32", "adapter.target=all-linear", "optim.lr=1e-2",
                            "model.dtype=fp32"};
  esp_session *s = NULL;
  int64_t trained, total;
  int ok = esp_session_open(model, settings, 5, &s) == ESP_OK && esp_session_attach(s, NULL) == ESP_OK;
  if (!ok) {
    failed("open");
  } else {
    esp_session_parameters(s, &trained, &total);
    printf("%lld of %lld parameters are trained\n", (long long)trained, (long long)total);
    ok = train(s) && ask(s, right) && (esp_session_save(s, adapter) == ESP_OK || failed("save"));
  }
  esp_session_close(s);
  return ok;
}

static int second_run(const char *model, const char *adapter, int *right) {
  const char *settings[] = {"model.dtype=fp32"};
  esp_session *s = NULL;
  int ok = esp_session_open(model, settings, 1, &s) == ESP_OK && esp_session_attach(s, adapter) == ESP_OK;
  ok = ok ? ask(s, right) : failed("open again");
  esp_session_close(s);
  return ok;
}

int main(int argc, char **argv) {
  int first = 0, again = 0;
  if (argc != 3) {
    fprintf(stderr, "usage: %s MODEL_DIR ADAPTER_DIR\n", argv[0]);
    return 2;
  }
  if (!first_run(argv[1], argv[2], &first) || !second_run(argv[1], argv[2], &again)) return 1;
  printf("%d of %d answers learned, %d from the saved adapter\n", first, PAIRS, again);
  return first == PAIRS && again == PAIRS ? 0 : 1;
}
