/* Adapter directories: strict accounting, other bases, refused saves, variants that are not supported, a real adapter.
 * Mutation seen to be caught: accepting a file with unexpected tensors in fill() fails "strict". */
#include <math.h>

#include "../adapters/adapter_fixture.h"
#include "io/json.h"

static const char *const qv[] = {"q_proj", "v_proj"};
static const esp_adapter_cfg plain = {.type = "lora", .r = 4, .alpha = 8, .target = qv, .n_target = 2, .seed = 1};

static void save_plain(const char *base, const char *name) {
  fx_run r;
  esp_adapter *a;
  fx_open(&r, fx_path(base), ESP_F32, false);
  OK(esp_adapter_create(r.m, &plain, "default", false, &a));
  fx_shake(a, 0.1f, 2);
  OK(esp_adapter_save(a, fx_path(name)));
  esp_adapter_destroy(a);
  fx_close(&r);
}

/* Loads <name> onto <base> and wants ESP_ERR_DATA with `text` in the message. */
static void refused(const char *base, const char *name, const char *text) {
  fx_run r;
  esp_adapter *a = NULL;
  fx_open(&r, fx_path(base), ESP_F32, false);
  esp_status st = esp_adapter_load(r.m, fx_path(name), "default", false, &a);
  if (st != ESP_ERR_DATA || a || !strstr(esp_error_message(), text))
    fail_msg("wanted '%s', got status %d: %s", text, (int)st, esp_error_message());
  fx_close(&r);
}

typedef struct change { /* how to write the tensor file again */
  const char *drop, *add, *base;
  int nan_in;
} change;

static void rewrite(const char *name, change c) {
  char path[300];
  snprintf(path, sizeof path, "%s/adapter_model.safetensors", fx_path(name));
  esp_st *f;
  esp_st_writer *w;
  OK(esp_st_open(path, &f));
  OK(esp_st_writer_create(path, &w));
  if (c.base) OK(esp_st_writer_metadata(w, "espalier_base", c.base));
  for (int pass = 0; pass < 2; pass++) {
    for (int i = 0; i < esp_st_count(f); i++) {
      const esp_st_entry *e = esp_st_at(f, i);
      if (c.drop && strstr(e->name, c.drop)) continue;
      if (pass == 0) {
        OK(esp_st_writer_declare(w, e->name, e->dtype, e->ndim, e->shape));
        continue;
      }
      float *x = malloc((size_t)e->bytes);
      memcpy(x, e->data, (size_t)e->bytes);
      if (c.nan_in && i == 0) x[3] = NAN;
      OK(esp_st_writer_put(w, e->name, x, e->bytes));
      free(x);
    }
    if (c.add && pass == 0) OK(esp_st_writer_declare(w, c.add, ESP_F32, 1, (int64_t[]){1}));
    if (c.add && pass == 1) OK(esp_st_writer_put(w, c.add, &(float){1.0f}, 4));
  }
  OK(esp_st_writer_commit(w));
  esp_st_close(f);
}

static void strict(void **state) {
  save_plain("qwen", "ad");
  rewrite("ad", (change){.drop = "layers.1.self_attn.q_proj.lora_B"});
  refused("qwen", "ad", "1 missing (base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight), 0 unexpected");
  save_plain("qwen", "ad");
  rewrite("ad", (change){.add = "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight"});
  refused("qwen", "ad", "0 missing (), 1 unexpected (base_model.model.model.layers.7");
  save_plain("qwen", "ad");
  rewrite("ad", (change){.nan_in = 1});
  refused("qwen", "ad", "non-finite");
}

static void other_base(void **state) {
  save_plain("qwen", "ad");
  refused("llama", "ad", "made on another base");
  rewrite("ad", (change){0}); /* without the fingerprint, as a file of PEFT: shapes are equal, so it is accepted */
  fx_run r;
  esp_adapter *a;
  fx_open(&r, fx_path("llama"), ESP_F32, false);
  OK(esp_adapter_load(r.m, fx_path("ad"), "default", false, &a));
  esp_adapter_destroy(a);
  fx_close(&r);
  refused("gpt2", "ad", "matches no module");
}

static void edit_config(const char *name, const char *key, json_t *value) {
  char path[300];
  json_t *j;
  snprintf(path, sizeof path, "%s/adapter_config.json", fx_path(name));
  OK(esp_json_load(path, &j));
  if (value)
    json_object_set_new(j, key, value);
  else
    json_object_del(j, key);
  OK(esp_json_save(path, j, 1));
  json_decref(j);
}

static void configurations(void **state) {
  save_plain("qwen", "ad");
  edit_config("ad", "r", json_integer(5));
  refused("qwen", "ad", "has shape [4, 32], this base and configuration need [5, 32]");
  save_plain("qwen", "ad");
  edit_config("ad", "use_qalora", json_true());
  refused("qwen", "ad", "key 'use_qalora'");
  save_plain("qwen", "ad");
  edit_config("ad", "peft_type", json_string("XLORA"));
  refused("qwen", "ad", "peft_type 'XLORA'");
  edit_config("ad", "peft_type", NULL);
  refused("qwen", "ad", "peft_type");
  save_plain("qwen", "ad");
  edit_config("ad", "init_lora_weights", json_string("corda"));
  refused("qwen", "ad", "init_lora_weights 'corda'");
  edit_config("ad", "init_lora_weights", json_string("eva"));
  edit_config("ad", "a_key_of_tomorrow", json_true());
  edit_config("ad", "use_rslora", NULL);
  edit_config("ad", "target_modules", json_string(".*\\.(q|v)_proj"));
  fx_run r;
  esp_adapter *a;
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  OK(esp_adapter_load(r.m, fx_path("ad"), "default", false, &a));
  esp_adapter_destroy(a);
  fx_close(&r);
  OK(esp_remove_tree(fx_path("ad")));
  refused("qwen", "ad", "adapter_config.json");
}

static void refused_saves(void **state) {
  fx_run r;
  fx_batch f;
  esp_adapter *a;
  fx_fill(&f);
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  OK(esp_adapter_create(r.m, &plain, "default", true, &a));
  OK(esp_adapters_activate(r.m, &a, 1));
  OK(esp_adapter_save(a, fx_path("start"))); /* B is zero, but nothing was trained yet */
  fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 1);
  assert_true(a->backwards > 0);
  assert_int_equal(esp_adapter_save(a, fx_path("bad")), ESP_ERR_DIVERGED);
  assert_non_null(strstr(esp_error_message(), "every B is still zero"));
  float *v = calloc((size_t)a->params->list[1].numel, sizeof *v);
  v[0] = INFINITY;
  esp_params_set(a->params, 1, v);
  free(v);
  assert_int_equal(esp_adapter_save(a, fx_path("bad")), ESP_ERR_DIVERGED);
  assert_non_null(strstr(esp_error_message(), "non-finite"));
  assert_false(esp_dir_exists(fx_path("bad"))); /* nothing half-written */
  esp_adapter_destroy(a);
  fx_close(&r);
}

/* A rewriting init is saved as a plain LoRA of twice the rank. */
static void converted(void **state) {
  fx_run r;
  esp_adapter *a;
  esp_adapter_cfg c = plain;
  c.init = "pissa";
  c.rslora = true;
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  OK(esp_adapter_create(r.m, &c, "default", true, &a));
  OK(esp_adapter_save(a, fx_path("pissa")));
  esp_adapter_destroy(a);
  fx_close(&r);
  esp_arena *arena = esp_arena_create(ESP_MEM_HOST);
  esp_adapter_cfg back;
  OK(esp_adapter_cfg_load(fx_path("pissa"), arena, &back));
  assert_int_equal(back.r, 8);
  assert_true(back.rslora);
  assert_true(fabs(back.alpha - 8 * sqrt(2.0)) < 1e-9);
  assert_string_equal(back.init, "default");
  esp_arena_destroy(arena);
}

static void real_adapter(void **state) {
  const char *dir = ESP_SHARED_DIR "/data/adapters/gpt-neo-125m-lora-apache";
  if (!esp_dir_exists(dir)) {
    print_message("skipped: %s is not there\n", dir);
    skip();
  }
  esp_arena *arena = esp_arena_create(ESP_MEM_HOST);
  esp_adapter_cfg c;
  OK(esp_adapter_cfg_load(dir, arena, &c));
  assert_string_equal(c.type, "lora");
  assert_int_equal(c.r, 8);
  assert_true(c.alpha == 16 && fabs(c.dropout - 0.05) < 1e-12 && c.n_target == 2);
  esp_arena_destroy(arena);
  esp_st *f;
  char path[600];
  snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
  OK(esp_st_open(path, &f));
  assert_int_equal(esp_st_count(f), 48);
  esp_st_close(f);
  fx_run r; /* another family: its modules are named alike, its tensors are not */
  esp_adapter *a;
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  assert_int_equal(esp_adapter_load(r.m, dir, "default", false, &a), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "8 missing"));
  assert_non_null(strstr(esp_error_message(), "48 unexpected"));
  fx_close(&r);
}

/* On the counting backend nothing is read and the sizes are those of the real one. */
static void counted(void **state) {
  fx_run r;
  esp_adapter *a, *b;
  esp_adapter_cfg c = plain;
  const int32_t rows[] = {5, 6};
  c.lora_bias = true;
  c.init = "pissa";
  c.trainable_tokens = rows;
  c.n_trainable_tokens = 2;
  fx_batch f;
  fx_fill(&f);
  fx_open(&r, fx_path("qwen"), ESP_BF16, false);
  OK(esp_adapter_create(r.m, &c, "default", true, &a));
  OK(esp_adapters_activate(r.m, &a, 1));
  fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 1);
  esp_backend *count;
  esp_model *m;
  esp_stack stack;
  esp_loss_out out;
  OK(esp_backend_create("count", &count));
  OK(esp_model_open(fx_path("qwen"), count, &(esp_model_options){.compute = ESP_BF16}, &m));
  OK(esp_stack_init(&stack, count, 0));
  OK(esp_adapter_create(m, &c, "default", true, &b));
  OK(esp_adapters_activate(m, &b, 1));
  OK(esp_model_load_weights(m));
  OK(esp_model_step(m, &stack, &f.b, ESP_CKPT_OFF, true, 1.0f, 1, 1, &out, NULL));
  assert_int_equal(a->params->total, b->params->total);
  assert_int_equal(r.stack.high, stack.high);
  esp_adapter_destroy(b);
  esp_stack_deinit(&stack);
  esp_model_close(m);
  esp_backend_destroy(count);
  esp_adapter_destroy(a);
  fx_close(&r);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(strict),        cmocka_unit_test(other_base), cmocka_unit_test(configurations),
      cmocka_unit_test(refused_saves), cmocka_unit_test(converted),  cmocka_unit_test(real_adapter),
      cmocka_unit_test(counted),
  };
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
