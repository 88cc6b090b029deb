/* generate.c: writes the text that the demo base is trained on and the four demo tasks. Every byte is a function of the
 * seed (Philox), so recipes/demo can be reproduced from nothing.
 *
 *   espalier-demo-data OUT_DIR [SEED]
 *
 * writes OUT_DIR/corpus.jsonl, OUT_DIR/<task>.{train,test}.jsonl and, in OUT_DIR/shape, the tokenizer (byte-level BPE
 * trained on the corpus) and the config.json of the base.
 *
 * The little world: sentences with a subject (animal, person or thing), a mood, a number and a time. The corpus says
 * such a sentence and then remarks on some of its properties, so a model of it knows the properties. Each task asks for
 * one of them with the words yes and no: the four tasks share their inputs and their answers and differ in the
 * question, which is why one adapter trained on them in turn overwrites what it learnt before.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/rng.h"
#include "core/strbuf.h"
#include "io/file.h"
#include "text/tokenizer.h"

#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))

typedef struct word {
  const char *one, *many;
} word;
static const word animals[] = {{"dog", "dogs"},   {"cat", "cats"},   {"horse", "horses"}, {"bird", "birds"},
                               {"fox", "foxes"},  {"goat", "goats"}, {"sheep", "sheep"},  {"mouse", "mice"},
                               {"bear", "bears"}, {"duck", "ducks"}};
static const word persons[] = {{"baker", "bakers"},   {"teacher", "teachers"}, {"sailor", "sailors"},
                               {"farmer", "farmers"}, {"doctor", "doctors"},   {"singer", "singers"},
                               {"child", "children"}, {"king", "kings"}};
static const word things[] = {{"cart", "carts"},   {"boat", "boats"},   {"lamp", "lamps"}, {"kite", "kites"},
                              {"wheel", "wheels"}, {"clock", "clocks"}, {"drum", "drums"}, {"bell", "bells"}};
static const char *const kinds[] = {"animal", "person", "thing"};
static const char *const pleasant[] = {"happy", "lovely", "bright", "gentle", "clever", "merry", "kind", "fine"};
static const char *const unpleasant[] = {"angry", "ugly", "gloomy", "cruel", "broken", "bitter", "nasty", "sad"};
static const char *const numbers[] = {"two", "three", "four", "five", "six", "many", "several"};
static const char *const past_time[] = {"yesterday", "last night", "long ago", "last week"};
static const char *const future_time[] = {"tomorrow", "next week", "soon", "next year"};
static const word moves[] = {
    {"came", "come"}, {"went", "go"}, {"moved", "move"}, {"fell", "fall"}, {"returned", "return"}};
static const char *const places[] = {"to the river",     "to the market", "into the garden", "near the old bridge",
                                     "behind the house", "to the hill",   "by the sea",      "into the village"};

typedef struct scene {
  int kind, good, many, past;
  const word *noun;
  const char *place;
  char text[256];
} scene;

static uint64_t seed_ = 20250101, stream_, draw_;

static int pick(int n) {
  return (int)esp_rng_below(seed_, stream_, draw_++, (uint64_t)n);
}

static void scene_make(scene *s) {
  s->kind = pick(3);
  s->good = pick(2);
  s->many = pick(2);
  s->past = pick(2);
  const word *w = s->kind == 0   ? &animals[pick(COUNT(animals))]
                  : s->kind == 1 ? &persons[pick(COUNT(persons))]
                                 : &things[pick(COUNT(things))];
  s->noun = w;
  const char *adj = s->good ? pleasant[pick(COUNT(pleasant))] : unpleasant[pick(COUNT(unpleasant))];
  const word *move = &moves[pick(COUNT(moves))];
  const char *place = places[pick(COUNT(places))];
  s->place = place;
  const char *when = s->past ? past_time[pick(COUNT(past_time))] : future_time[pick(COUNT(future_time))];
  const char *number = s->many ? numbers[pick(COUNT(numbers))] : pick(2) ? "one" : "a single";
  char verb[32];
  snprintf(verb, sizeof verb, "%s%s", s->past ? "" : "will ", s->past ? move->one : move->many);
  const char *noun = s->many ? w->many : w->one;
  if (pick(2))
    snprintf(s->text, sizeof s->text, "%c%s %s %s %s %s %s.", when[0] - 32, when + 1, number, adj, noun, verb, place);
  else
    snprintf(s->text, sizeof s->text, "%c%s %s %s %s %s %s.", number[0] - 32, number + 1, adj, noun, verb, place, when);
}

/* One remark on one property of the scene; several wordings. */
static void remark(const scene *s, int property, char *out, size_t n) {
  int v = pick(2);
  switch (property) {
  case 0:
    snprintf(out, n, v ? "That was %s to see." : "It felt %s.", s->good ? "good" : "bad");
    break;
  case 1:
    snprintf(out, n, v ? "We speak of %s %s." : "Here is %s %s.", s->kind == 0 ? "an" : "a", kinds[s->kind]);
    break;
  case 2:
    snprintf(out, n, v ? "There %s." : "We count %s.",
             v ? (s->many ? "were more than one" : "was only one") : (s->many ? "more than one" : "only one"));
    break;
  default:
    snprintf(out, n, v ? "It %s." : "All this %s.", s->past ? "is in the past" : "is still to come");
  }
}

/* A question that is none of the tasks': the corpus teaches what a question, yes and no are. */
static void other_question(const scene *s, char *out, size_t n) {
  int yes = pick(2);
  if (pick(2)) {
    const char *place = s->place;
    while (!yes && place == s->place) place = places[pick(COUNT(places))];
    snprintf(out, n, "Is it %s?\\n%s", place, yes ? "yes" : "no");
  } else {
    const word *noun = s->noun;
    while (!yes && noun == s->noun) noun = pick(2) ? &animals[pick(COUNT(animals))] : &persons[pick(COUNT(persons))];
    snprintf(out, n, "Is it about a %s?\\n%s", noun->one, yes ? "yes" : "no");
  }
}

/* What words mean, said plainly. */
static size_t definitions(char *out, size_t n) {
  size_t at = 0;
  for (int k = 2 + pick(4); k > 0; k--) {
    int kind = pick(3), good = pick(2);
    const word *w = kind == 0   ? &animals[pick(COUNT(animals))]
                    : kind == 1 ? &persons[pick(COUNT(persons))]
                                : &things[pick(COUNT(things))];
    const char *adj = good ? pleasant[pick(COUNT(pleasant))] : unpleasant[pick(COUNT(unpleasant))];
    if (pick(2))
      at += (size_t)snprintf(out + at, n - at, "%sA %s is %s %s.", at ? " " : "", w->one, kind == 0 ? "an" : "a",
                             kinds[kind]);
    else
      at += (size_t)snprintf(out + at, n - at, "%sWhat is %s is %s.", at ? " " : "", adj, good ? "good" : "bad");
  }
  return at;
}

static const char *const task_name[] = {"mood", "animal", "number", "time"};
static const char *const question[] = {"Is it good?", "Is it an animal?", "Is it more than one?", "Is it past?"};

static int answer(const scene *s, int task) {
  return task == 0 ? s->good : task == 1 ? s->kind == 0 : task == 2 ? s->many : s->past;
}

static FILE *open_out(const char *dir, const char *name) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", dir, name);
  FILE *f = fopen(path, "w");
  if (!f) {
    fprintf(stderr, "%s: %s\n", path, strerror(errno));
    exit(1);
  }
  return f;
}

static void close_out(FILE *f, const char *what) {
  if (ferror(f) || fclose(f)) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
  }
}

static void corpus(const char *dir, int documents, esp_strbuf *text) {
  FILE *lines = open_out(dir, "corpus.jsonl");
  stream_ = esp_rng_stream(ESP_RNG_DATA, 0, 0, 0);
  draw_ = 0;
  for (int i = 0; i < documents; i++) {
    char doc[2048];
    size_t at = 0;
    int sort = pick(4), question_only = sort == 0, scenes = sort == 1 ? 0 : question_only ? 1 : 1 + pick(3);
    if (sort == 1) at = definitions(doc, sizeof doc);
    for (int k = 0; k < scenes; k++) {
      scene s;
      scene_make(&s);
      at += (size_t)snprintf(doc + at, sizeof doc - at, "%s%s", k ? " " : "", s.text);
      if (question_only) {
        char words[128];
        other_question(&s, words, sizeof words);
        at += (size_t)snprintf(doc + at, sizeof doc - at, " %s", words);
        break;
      }
      int order[4] = {0, 1, 2, 3}, remarks = 2 + pick(3);
      for (int r = 0; r < remarks; r++) {
        int j = r + pick(4 - r), t = order[r];
        order[r] = order[j];
        order[j] = t;
        char words[128];
        remark(&s, order[r], words, sizeof words);
        at += (size_t)snprintf(doc + at, sizeof doc - at, " %s", words);
      }
    }
    fprintf(lines, "{\"text\": \"%s\"}\n", doc);
    esp_strbuf_printf(text, "%s\n", doc);
  }
  close_out(lines, "corpus.jsonl");
}

static void task(const char *dir, int t, const char *split, int rows) {
  char name[64];
  snprintf(name, sizeof name, "%s.%s.jsonl", task_name[t], split);
  FILE *f = open_out(dir, name);
  stream_ = esp_rng_stream(ESP_RNG_DATA, 1, (uint64_t)t, strcmp(split, "test") == 0);
  draw_ = 0;
  for (int i = 0; i < rows; i++) {
    scene s;
    do scene_make(&s);
    while (answer(&s, t) != i % 2); /* balanced answers */
    fprintf(f, "{\"text\": \"%s %s\", \"label\": \"%s\"}\n", s.text, question[t], answer(&s, t) ? "yes" : "no");
  }
  close_out(f, name);
}

/* The shape of the base: 1.3 M parameters. */
static const char config[] = "{\n"
                             "  \"architectures\": [\"LlamaForCausalLM\"],\n"
                             "  \"model_type\": \"llama\",\n"
                             "  \"vocab_size\": 1024,\n"
                             "  \"hidden_size\": 128,\n"
                             "  \"intermediate_size\": 384,\n"
                             "  \"num_hidden_layers\": 6,\n"
                             "  \"num_attention_heads\": 4,\n"
                             "  \"num_key_value_heads\": 2,\n"
                             "  \"max_position_embeddings\": 512,\n"
                             "  \"rms_norm_eps\": 1e-05,\n"
                             "  \"rope_theta\": 10000.0,\n"
                             "  \"hidden_act\": \"silu\",\n"
                             "  \"attention_bias\": false,\n"
                             "  \"mlp_bias\": false,\n"
                             "  \"tie_word_embeddings\": true,\n"
                             "  \"bos_token_id\": 0,\n"
                             "  \"eos_token_id\": 1,\n"
                             "  \"torch_dtype\": \"bfloat16\"\n"
                             "}\n";

static void shape(const char *dir, const esp_strbuf *text) {
  static const char *const special[] = {"<s>", "</s>"};
  char path[4096], file[4160];
  snprintf(path, sizeof path, "%s/shape", dir);
  snprintf(file, sizeof file, "%s/config.json", path);
  if (text->failed || esp_mkdirs(path) || esp_file_write_atomic(file, config, sizeof config - 1) ||
      esp_bpe_train(text->data, text->len, 1024, special, COUNT(special), path)) {
    fprintf(stderr, "%s\n", esp_error_message());
    exit(1);
  }
}

int main(int argc, char **argv) {
  if (argc < 2 || argc > 3) {
    fprintf(stderr, "usage: espalier-demo-data OUT_DIR [SEED]\n");
    return 2;
  }
  if (argc == 3) seed_ = strtoull(argv[2], NULL, 10);
  if (esp_mkdirs(argv[1])) {
    fprintf(stderr, "%s\n", esp_error_message());
    return 1;
  }
  esp_strbuf text;
  esp_strbuf_init(&text);
  corpus(argv[1], 40000, &text);
  shape(argv[1], &text);
  esp_strbuf_deinit(&text);
  for (int t = 0; t < COUNT(task_name); t++) {
    task(argv[1], t, "train", 800);
    task(argv[1], t, "test", 200);
  }
  return 0;
}
