/* The safetensors writer: what is written reads back, and nothing is left by an abort, a kill or a full disk.
 * Mutation seen to fail: lay_out sorting by name alone (tensors lose their alignment). */
#include <dirent.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/mem.h"
#include "core/rng.h"
#include "io/file.h"
#include "io/safetensors.h"

static char root[] = "/tmp/espalier-test-XXXXXX";

static int setup(void **state) {
  return mkdtemp(root) ? 0 : -1;
}

static int teardown(void **state) {
  return esp_remove_tree(root) == ESP_OK ? 0 : -1;
}

static const char *at(const char *name) {
  static char path[4][512];
  static int turn;
  turn = (turn + 1) % 4;
  return esp_path_join(path[turn], sizeof path[turn], root, name);
}

static int entries(const char *path) {
  DIR *d = opendir(path);
  int n = 0;
  assert_non_null(d);
  while (readdir(d)) n++;
  closedir(d);
  return n - 2;
}

static esp_st_writer *begin(const char *path) {
  esp_st_writer *w;
  assert_int_equal(esp_st_writer_create(path, &w), ESP_OK);
  return w;
}

static void test_round_trip(void **state) {
  static const int64_t shapes[][3] = {{3, 5, 1}, {7, 1, 1}, {1, 2, 3}, {0, 4, 1}, {1, 1, 1}};
  static const esp_dtype types[] = {ESP_U8, ESP_F32, ESP_BF16, ESP_F16, ESP_I64, ESP_BOOL, ESP_F64, ESP_I8, ESP_I32};
  enum { N = 45 };
  char names[N][32];
  unsigned char *bytes[N];
  int64_t size[N];
  esp_st_writer *w = begin(at("r.safetensors"));
  assert_int_equal(esp_st_writer_metadata(w, "format", "pt"), ESP_OK);
  assert_int_equal(esp_st_writer_metadata(w, "odd \"key\"\n", "v\xc3\xa9\x01"), ESP_OK);
  for (int i = 0; i < N; i++) {
    esp_dtype t = types[i % 9];
    const int64_t *shape = shapes[i / 9];
    snprintf(names[i], sizeof names[i], "t\xc3\xa9\"%d", i);
    size[i] = shape[0] * shape[1] * shape[2] * (int64_t)esp_dtype_size(t);
    bytes[i] = esp_mem_alloc(ESP_MEM_HOST, (size_t)size[i]);
    for (int64_t k = 0; k < size[i]; k++) bytes[i][k] = (unsigned char)esp_rng_u32(1, (uint64_t)i, (uint64_t)k);
    assert_int_equal(esp_st_writer_declare(w, names[i], t, i / 9 == 4 ? 0 : 3, shape), ESP_OK);
  }
  for (int i = N - 1; i >= 0; i--) { /* any order; some in parts, the last part first */
    int64_t half = size[i] / 2;
    if (i % 2) {
      assert_int_equal(esp_st_writer_put(w, names[i], bytes[i], size[i]), ESP_OK);
    } else {
      assert_int_equal(esp_st_writer_put_at(w, names[i], half, bytes[i] + half, size[i] - half), ESP_OK);
      assert_int_equal(esp_st_writer_put_at(w, names[i], 0, bytes[i], half), ESP_OK);
    }
  }
  assert_false(esp_file_exists(at("r.safetensors")));
  assert_int_equal(esp_st_writer_commit(w), ESP_OK);
  esp_st *s;
  assert_int_equal(esp_st_open(at("r.safetensors"), &s), ESP_OK);
  assert_int_equal(esp_st_count(s), N);
  assert_string_equal(esp_st_metadata(s, "format"), "pt");
  assert_string_equal(esp_st_metadata(s, "odd \"key\"\n"), "v\xc3\xa9\x01");
  for (int i = 0; i < N; i++) {
    const esp_st_entry *e = esp_st_find(s, names[i]);
    assert_non_null(e);
    assert_int_equal(e->dtype, types[i % 9]);
    assert_int_equal(e->ndim, i / 9 == 4 ? 0 : 3);
    for (int d = 0; d < e->ndim; d++) assert_int_equal(e->shape[d], shapes[i / 9][d]);
    assert_int_equal(e->bytes, size[i]);
    assert_memory_equal(e->data, bytes[i], (size_t)size[i]);
    assert_int_equal((uintptr_t)e->data % esp_dtype_size(e->dtype), 0); /* the mapping starts on a page */
    esp_mem_free(bytes[i]);
  }
  esp_st_close(s);
  assert_int_equal(entries(root), 1);
}

static void test_refusals(void **state) {
  const int64_t shape[2] = {2, 2}, negative[1] = {-1}, huge[2] = {1ll << 40, 1ll << 40};
  const float data[4] = {1, 2, 3, 4};
  int before = entries(root);
  esp_st_writer *w = begin(at("x.safetensors"));
  assert_int_equal(esp_st_writer_declare(w, "a", ESP_F32, 2, shape), ESP_OK);
  assert_int_equal(esp_st_writer_declare(w, "a", ESP_F32, 2, shape), ESP_ERR_INTERNAL);
  assert_int_equal(esp_st_writer_declare(w, "n", ESP_F32, 1, negative), ESP_ERR_INTERNAL);
  assert_int_equal(esp_st_writer_declare(w, "h", ESP_F32, 2, huge), ESP_ERR_INTERNAL);
  assert_int_equal(esp_st_writer_declare(w, "d", ESP_F32, 9, shape), ESP_ERR_INTERNAL);
  assert_int_equal(esp_st_writer_declare(w, "__metadata__", ESP_F32, 2, shape), ESP_ERR_DATA);
  static const char *const not_utf8[] = {"\xff", "a\xc3", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\x80"};
  for (size_t i = 0; i < sizeof not_utf8 / sizeof *not_utf8; i++)
    assert_int_equal(esp_st_writer_declare(w, not_utf8[i], ESP_F32, 2, shape), ESP_ERR_DATA);
  assert_int_equal(esp_st_writer_metadata(w, "k", "v"), ESP_OK);
  assert_int_equal(esp_st_writer_metadata(w, "k", "v"), ESP_ERR_INTERNAL);
  assert_int_equal(esp_st_writer_put(w, "b", data, 16), ESP_ERR_INTERNAL);
  assert_int_equal(esp_st_writer_put(w, "a", data, 12), ESP_ERR_INTERNAL);
  assert_int_equal(esp_st_writer_put_at(w, "a", 8, data, 12), ESP_ERR_INTERNAL);
  assert_int_equal(esp_st_writer_put_at(w, "a", 4, data, 8), ESP_OK);
  assert_int_equal(esp_st_writer_put_at(w, "a", 0, data, 8), ESP_ERR_INTERNAL); /* four bytes twice */
  assert_int_equal(esp_st_writer_put_at(w, "a", 8, data, 4), ESP_ERR_INTERNAL);
  assert_int_equal(esp_st_writer_declare(w, "late", ESP_F32, 2, shape), ESP_ERR_INTERNAL);
  assert_int_equal(esp_st_writer_metadata(w, "late", "v"), ESP_ERR_INTERNAL);
  assert_int_equal(esp_st_writer_put_at(w, "a", 12, data, 4), ESP_OK);
  assert_int_equal(esp_st_writer_commit(w), ESP_ERR_INTERNAL); /* bytes 0..3 are missing */
  assert_non_null(strstr(esp_error_message(), "tensor 'a' was not written completely"));
  assert_int_equal(entries(root), before);
  assert_int_equal(esp_st_writer_create(at("no/such/x.safetensors"), &w), ESP_ERR_DATA);
  assert_null(w);
}

static void test_empty_and_abort(void **state) {
  int before = entries(root);
  esp_st_writer *w = begin(at("e.safetensors"));
  esp_st_writer_abort(w);
  esp_st_writer_abort(NULL);
  assert_int_equal(entries(root), before);
  w = begin(at("e.safetensors"));
  assert_int_equal(esp_st_writer_commit(w), ESP_OK);
  esp_st *s;
  assert_int_equal(esp_st_open(at("e.safetensors"), &s), ESP_OK);
  assert_int_equal(esp_st_count(s), 0);
  esp_st_close(s);
  w = begin(at("e.safetensors")); /* aborting keeps what was there */
  const int64_t shape = 4;
  assert_int_equal(esp_st_writer_declare(w, "a", ESP_U8, 1, &shape), ESP_OK);
  assert_int_equal(esp_st_writer_put(w, "a", "abcd", 4), ESP_OK);
  esp_st_writer_abort(w);
  assert_int_equal(esp_st_open(at("e.safetensors"), &s), ESP_OK);
  assert_int_equal(esp_st_count(s), 0);
  esp_st_close(s);
  assert_int_equal(entries(root), before + 1);
}

/* SIGKILL in the middle of a tensor: the target keeps its old content, and where the file system has unnamed files
 * (tmpfs, ext4, xfs, btrfs) not even a temporary one remains. */
static void test_kill(void **state) {
  assert_int_equal(esp_mkdirs(at("kill")), ESP_OK);
  assert_int_equal(esp_file_write_atomic(at("kill/k.safetensors"), "old", 3), ESP_OK);
  char tmp[512];
  int fd = open(at("kill"), O_TMPFILE | O_WRONLY, 0600);
  bool unnamed = fd >= 0;
  if (fd >= 0) close(fd);
  pid_t child = fork();
  if (child == 0) {
    esp_st_writer *w;
    const int64_t shape = 1 << 20;
    if (esp_st_writer_create(at("kill/k.safetensors"), &w) == ESP_OK &&
        esp_st_writer_declare(w, "a", ESP_U8, 1, &shape) == ESP_OK &&
        esp_st_writer_put_at(w, "a", 5, "abcd", 4) == ESP_OK)
      raise(SIGKILL);
    _exit(1);
  }
  int status;
  waitpid(child, &status, 0);
  assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  char *text;
  snprintf(tmp, sizeof tmp, "%s", at("kill/k.safetensors"));
  assert_int_equal(esp_file_read(tmp, &text, NULL), ESP_OK);
  assert_string_equal(text, "old");
  esp_mem_free(text);
  if (unnamed) assert_int_equal(entries(at("kill")), 1);
}

/* Writes 1 MiB where it cannot fit; the message must name the file and the cause. */
static void fill(const char *path, const char *cause) {
  esp_st_writer *w = begin(path);
  const int64_t shape = 1 << 20;
  char *data = esp_mem_alloc(ESP_MEM_HOST, 1 << 20);
  assert_int_equal(esp_st_writer_declare(w, "a", ESP_U8, 1, &shape), ESP_OK);
  assert_int_equal(esp_st_writer_put(w, "a", data, shape), ESP_ERR_DATA);
  if (!strstr(esp_error_message(), cause) || !strstr(esp_error_message(), path))
    fail_msg("wanted '%s', got '%s'", cause, esp_error_message());
  esp_st_writer_abort(w);
  esp_mem_free(data);
}

static void test_size_limit(void **state) {
  struct rlimit old, tight;
  int before = entries(root);
  signal(SIGXFSZ, SIG_IGN);
  getrlimit(RLIMIT_FSIZE, &old);
  tight = old;
  tight.rlim_cur = 200000;
  setrlimit(RLIMIT_FSIZE, &tight);
  fill(at("big.safetensors"), "File too large");
  setrlimit(RLIMIT_FSIZE, &old);
  assert_int_equal(entries(root), before);
}

static void test_full_tmpfs(void **state) {
  const char *mnt = at("small");
  assert_int_equal(esp_mkdirs(mnt), ESP_OK);
  if (mount("tmpfs", mnt, "tmpfs", 0, "size=256k") != 0) {
    print_message("skipped: mounting a tmpfs needs the privilege\n");
    skip();
  }
  char path[600];
  fill(esp_path_join(path, sizeof path, mnt, "f.safetensors"), "No space left on device");
  int left = entries(mnt);
  umount(mnt);
  assert_int_equal(left, 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_round_trip), cmocka_unit_test(test_refusals),   cmocka_unit_test(test_empty_and_abort),
      cmocka_unit_test(test_kill),       cmocka_unit_test(test_size_limit), cmocka_unit_test(test_full_tmpfs),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
