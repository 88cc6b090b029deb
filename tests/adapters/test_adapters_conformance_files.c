/* Conformance of adapter kinds (conformance.h has all statements): files. The names in each kind's file are pinned in
 * conformance_keys.txt, which ESP_PIN_KEYS=1 writes anew.
 * Mutation seen to be caught: a name of lora's B changed in lora_declare fails "keys". */
#include "conformance.h"

#include "io/json.h"

static const char *file_of(const row *w) {
  return whole(w) ? "model.safetensors" : "adapter_model.safetensors";
}

static void in(char *out, size_t size, const char *dir, const char *name) {
  snprintf(out, size, "%s/%s", fx_path(dir), name);
}

/* A shaken adapter of the row in `dir`, and its logits. */
static void saved(const row *w, const char *dir, const char *name, uint64_t seed, float *logits) {
  fx_run r;
  fx_batch f;
  fx_fill(&f);
  fx_open(&r, fx_path(w->base), ESP_F32, false);
  esp_adapter *a = attach(&r, w, name, true);
  fx_shake(a, 0.1f, seed);
  fx_logits(&r, &f.b, logits);
  OK(esp_adapter_save(a, fx_path(dir)));
  esp_adapter_destroy(a);
  fx_close(&r);
}

static void round_trip(void **state) {
  static float y[N_LOGITS], z[N_LOGITS];
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++) {
    fx_run r;
    esp_adapter *a;
    char one[300], two[300];
    saved(&rows[i], "one", "default", 18, y);
    saved(&rows[i], "named", "somewhat", 18, z); /* the name is not in the file */
    in(one, sizeof one, "one", file_of(&rows[i]));
    in(two, sizeof two, "named", file_of(&rows[i]));
    same_file(one, two, rows[i].name);
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    OK(esp_adapter_load(r.m, fx_path("one"), "other", false, &a));
    OK(esp_adapters_activate(r.m, &a, 1));
    fx_logits(&r, &f.b, z);
    double d = fx_rel(z, y, N_LOGITS);
    if (!(d <= (rows[i].rewrites ? 4e-6 : 0.0))) fail_msg("%s: %g away after loading", rows[i].name, d);
    OK(esp_adapter_save(a, fx_path("two")));
    in(two, sizeof two, "two", file_of(&rows[i]));
    same_file(one, two, rows[i].name);
    if (strncmp(rows[i].name, "lora all", 8) != 0 && !rows[i].rewrites) {
      in(one, sizeof one, "one", "adapter_config.json");
      in(two, sizeof two, "two", "adapter_config.json");
      same_file(one, two, rows[i].name);
    }
    esp_adapter_destroy(a);
    fx_close(&r);
    OK(esp_remove_tree(fx_path("one")));
    OK(esp_remove_tree(fx_path("two")));
    OK(esp_remove_tree(fx_path("named")));
  }
}

/* ---- names ---- */

typedef struct text {
  char *data;
  size_t n, cap;
} text;

static void add(text *t, const char *line) {
  size_t len = strlen(line);
  if (t->n + len + 1 > t->cap) {
    t->cap = 2 * (t->n + len + 1);
    t->data = realloc(t->data, t->cap);
    if (!t->data) abort();
  }
  memcpy(t->data + t->n, line, len + 1);
  t->n += len;
}

static int by_line(const void *x, const void *y) {
  return strcmp(*(char *const *)x, *(char *const *)y);
}

/* Each name once, layer numbers as #, with type and shape. */
static void names_of(const char *path, text *out) {
  esp_st *st;
  char *lines[512];
  int n = 0;
  OK(esp_st_open(path, &st));
  for (int i = 0; i < esp_st_count(st); i++) {
    const esp_st_entry *e = esp_st_at(st, i);
    char line[400];
    size_t at = 0;
    for (const char *p = e->name; *p && at < 300; p++) {
      bool digit = *p >= '0' && *p <= '9' && p > e->name && p[-1] == '.' && (p[1] == '.' || !p[1]);
      line[at++] = digit ? '#' : *p;
    }
    at += (size_t)snprintf(line + at, sizeof line - at, " %s", esp_dtype_name(e->dtype));
    for (int d = 0; d < e->ndim; d++)
      at += (size_t)snprintf(line + at, sizeof line - at, "%s%lld", d ? "x" : " ", (long long)e->shape[d]);
    assert_true(n < 512);
    lines[n++] = strdup(line);
  }
  qsort(lines, (size_t)n, sizeof *lines, by_line);
  for (int i = 0; i < n; i++) {
    if (i == 0 || strcmp(lines[i], lines[i - 1]) != 0) {
      add(out, "  ");
      add(out, lines[i]);
      add(out, "\n");
    }
  }
  for (int i = 0; i < n; i++) free(lines[i]);
  esp_st_close(st);
}

static void keys(void **state) {
  static float y[N_LOGITS];
  if (test_quick()) return; /* no device has to do with names */
  text have = {0};
  char path[700];
  for (int i = 0; i < N_ROWS; i++) {
    bool first = true; /* of its kind and base */
    for (int k = 0; k < i; k++)
      first &= strcmp(rows[k].cfg.type, rows[i].cfg.type) != 0 || strcmp(rows[k].base, rows[i].base) != 0;
    if (!first || whole(&rows[i])) continue;
    saved(&rows[i], "one", "default", 18, y);
    add(&have, rows[i].name);
    add(&have, "\n");
    in(path, sizeof path, "one", file_of(&rows[i]));
    names_of(path, &have);
    OK(esp_remove_tree(fx_path("one")));
  }
  snprintf(path, sizeof path, "%s/tests/adapters/conformance_keys.txt", ESP_SOURCE_DIR);
  if (getenv("ESP_PIN_KEYS")) OK(esp_file_write_atomic(path, have.data, have.n));
  char *want;
  size_t n;
  OK(esp_file_read(path, &want, &n));
  size_t same = 0, line = 0;
  while (same < n && same < have.n && want[same] == have.data[same]) same++;
  for (line = same; line > 0 && have.data[line - 1] != '\n'; line--) {
  }
  if (same < n || same < have.n)
    fail_msg("the names differ from conformance_keys.txt from here: %.80s\nwhere it has: %.80s", have.data + line,
             line < n ? want + line : "(its end)");
  esp_mem_free(want);
  free(have.data);
}

/* ---- in the place of another ---- */

/* On an open base, an adapter takes the place of another of another shape: as if the base had been opened for it. (It
 * found stacked biases that kept trained values of modules that are frozen again.) */
static void exchanged(void **state) {
  static float y[N_LOGITS], z[N_LOGITS];
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++) {
    if (left_out(i)) continue;
    fx_run r;
    int other = i;
    for (int k = 1; k < N_ROWS && other == i; k++) { /* the next that does not rewrite this base */
      int at = (i + k) % N_ROWS;
      if (strcmp(rows[at].base, rows[i].base) == 0 && !rows[at].rewrites) other = at;
    }
    if (other == i || quantised(&rows[i])) continue;
    saved(&rows[i], "one", "default", 25, y);
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    esp_adapter *a = attach(&r, &rows[other], "default", true), *b;
    fx_shake(a, 0.1f, 26);
    fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 0);
    OK(esp_adapter_load(r.m, fx_path("one"), "other", false, &b));
    OK(esp_adapters_activate(r.m, &b, 1));
    fx_logits(&r, &f.b, z);
    double d = fx_rel(z, y, N_LOGITS);
    if (!(d <= (rows[i].rewrites ? 4e-6 : 0.0)))
      fail_msg("%s in the place of %s: %g away from a fresh load", rows[i].name, rows[other].name, d);
    esp_adapter_destroy(a);
    esp_adapter_destroy(b);
    fx_close(&r);
    OK(esp_remove_tree(fx_path("one")));
  }
}

/* ---- damaged ---- */

typedef enum damage { DROPPED, RENAMED, NOT_FINITE, N_DAMAGES } damage;

static bool on_floats(const esp_st_entry *e) {
  return e->dtype == ESP_F32 && e->bytes > 0;
}

/* The file again without its first tensor, with another name for it, or with a NaN in it. Answers that name. */
static void rewrite(const char *from, const char *to, damage how, char *name, size_t size) {
  esp_st *f;
  esp_st_writer *w;
  OK(esp_st_open(from, &f));
  OK(esp_st_writer_create(to, &w));
  int first = -1;
  for (int i = 0; i < esp_st_count(f) && first < 0; i++)
    if (on_floats(esp_st_at(f, i))) first = i;
  assert_true(first >= 0);
  snprintf(name, size, "%s", esp_st_at(f, first)->name);
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < esp_st_count(f); i++) {
      const esp_st_entry *e = esp_st_at(f, i);
      char other[400];
      snprintf(other, sizeof other, "%s%s", i == first && how == RENAMED ? "wrong." : "", e->name);
      if (i == first && how == DROPPED) continue;
      if (pass == 0) {
        OK(esp_st_writer_declare(w, other, e->dtype, e->ndim, e->shape));
        continue;
      }
      float *x = malloc((size_t)e->bytes + 1);
      memcpy(x, e->data, (size_t)e->bytes);
      if (i == first && how == NOT_FINITE) x[0] = NAN;
      OK(esp_st_writer_put(w, other, x, e->bytes));
      free(x);
    }
  OK(esp_st_writer_commit(w));
  esp_st_close(f);
}

static void no_load(const row *w, const char *what, const char *says) {
  fx_run r;
  esp_adapter *a = NULL;
  fx_open(&r, fx_path(w->base), ESP_F32, false);
  esp_status st = esp_adapter_load(r.m, fx_path("one"), "default", false, &a);
  if (st != ESP_ERR_DATA || a) fail_msg("%s: %s: loaded (status %d)", w->name, what, (int)st);
  if (!strstr(esp_error_message(), says))
    fail_msg("%s: %s: '%s' does not say '%s'", w->name, what, esp_error_message(), says);
  assert_null(strchr(esp_error_message(), '\n'));
  fx_close(&r);
}

static void damaged(void **state) {
  static float y[N_LOGITS];
  for (int i = 0; i < N_ROWS; i++) {
    if (left_out(i)) continue;
    if (whole(&rows[i])) continue; /* a model directory: tests/unit/test_model_weights.c */
    char path[300], copy[300], name[400];
    char *bytes;
    size_t n;
    saved(&rows[i], "one", "default", 27, y);
    in(path, sizeof path, "one", file_of(&rows[i]));
    in(copy, sizeof copy, "one", "copy.safetensors");
    OK(esp_file_read(path, &bytes, &n));
    OK(esp_file_write_atomic(copy, bytes, n));
    for (damage how = 0; how < N_DAMAGES; how++) {
      static const char *const what[] = {"a tensor is missing", "a tensor has another name", "a value is not finite"};
      rewrite(copy, path, how, name, sizeof name);
      no_load(&rows[i], what[how], name);
    }
    OK(esp_file_write_atomic(path, bytes, n - 5));
    no_load(&rows[i], "the file is cut off", path);
    esp_mem_free(bytes);
    OK(esp_remove_tree(fx_path("one")));
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(round_trip),
      cmocka_unit_test(keys),
      cmocka_unit_test(exchanged),
      cmocka_unit_test(damaged),
  };
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
