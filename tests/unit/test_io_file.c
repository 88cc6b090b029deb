/* Files and directories that appear whole or not at all.
 * Mutation seen to fail: esp_atomic_commit without the rename (target missing, temporary file left). */
#include <dirent.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/mem.h"
#include "io/file.h"

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

/* Entries of a directory, "." and ".." not counted. */
static int entries(const char *path) {
  DIR *d = opendir(path);
  int n = 0;
  assert_non_null(d);
  while (readdir(d)) n++;
  closedir(d);
  return n - 2;
}

static void check_content(const char *path, const char *want) {
  char *text;
  size_t n;
  assert_int_equal(esp_file_read(path, &text, &n), ESP_OK);
  assert_int_equal(n, strlen(want));
  assert_string_equal(text, want);
  esp_mem_free(text);
}

static void test_read_and_write(void **state) {
  int before = entries(root);
  assert_int_equal(esp_file_write_atomic(at("a"), "first", 5), ESP_OK);
  check_content(at("a"), "first");
  assert_int_equal(esp_file_write_atomic(at("a"), "", 0), ESP_OK);
  check_content(at("a"), "");
  assert_int_equal(esp_file_write_atomic(at("a"), "second", 6), ESP_OK);
  check_content(at("a"), "second");
  assert_int_equal(entries(root), before + 1);
  struct stat info;
  mode_t mask = umask(0);
  umask(mask);
  assert_int_equal(stat(at("a"), &info), 0);
  assert_int_equal(info.st_mode & 0777, 0666 & ~mask);
  char *text;
  assert_int_equal(esp_file_read(at("none"), &text, NULL), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "none: cannot open: No such file"));
  assert_int_equal(esp_file_read(root, &text, NULL), ESP_ERR_DATA);
  assert_int_equal(esp_file_write_atomic(at("no/such/dir"), "x", 1), ESP_ERR_DATA);
  assert_int_equal(esp_file_read("/proc/self/status", &text, NULL), ESP_OK); /* a file that says it has no size */
  assert_non_null(strstr(text, "VmHWM"));
  esp_mem_free(text);
}

static void test_map_copy_hash(void **state) {
  esp_map_file m;
  char h1[33], h2[33];
  assert_int_equal(esp_file_write_atomic(at("m"), "hello", 5), ESP_OK);
  assert_int_equal(esp_file_map(at("m"), &m), ESP_OK);
  assert_int_equal(m.size, 5);
  assert_memory_equal(m.data, "hello", 5);
  esp_file_unmap(&m);
  assert_int_equal(esp_copy_file(at("m"), at("m2")), ESP_OK);
  check_content(at("m2"), "hello");
  esp_hash_hex("hello", 5, h1);
  assert_string_equal(h1, "b5e9c1ad071b3e7fc779cfaa5e523818"); /* the canonical (big-endian) form */
  assert_int_equal(esp_file_hash(at("m2"), h2), ESP_OK);
  assert_string_equal(h1, h2);
  assert_int_equal(esp_file_write_atomic(at("empty"), "", 0), ESP_OK);
  assert_int_equal(esp_file_map(at("empty"), &m), ESP_OK);
  assert_int_equal(m.size, 0);
  esp_file_unmap(&m);
  assert_int_equal(esp_file_map(root, &m), ESP_ERR_DATA);
  assert_true(esp_disk_free(root) > 0);
  assert_int_equal(esp_disk_free(at("none")), -1);
}

static void test_dirs(void **state) {
  assert_int_equal(esp_mkdirs(at("x/y/z")), ESP_OK);
  assert_int_equal(esp_mkdirs(at("x/y/z/")), ESP_OK);
  assert_true(esp_dir_exists(at("x/y/z")));
  assert_false(esp_file_exists(at("x/y")));
  assert_int_equal(esp_file_write_atomic(at("x/y/f"), "1", 1), ESP_OK);
  assert_int_equal(esp_mkdirs(at("x/y/f/g")), ESP_ERR_DATA);
  /* a link out of the tree is removed, not followed */
  assert_int_equal(esp_mkdirs(at("outside")), ESP_OK);
  assert_int_equal(esp_file_write_atomic(at("outside/kept"), "1", 1), ESP_OK);
  assert_int_equal(symlink(at("outside"), at("x/link")), 0);
  assert_int_equal(esp_remove_tree(at("x")), ESP_OK);
  assert_false(esp_dir_exists(at("x")));
  assert_true(esp_file_exists(at("outside/kept")));
  assert_int_equal(esp_remove_tree(at("x")), ESP_OK); /* nothing there is what was wanted */
}

static void test_path_join(void **state) {
  char out[32];
  assert_string_equal(esp_path_join(out, sizeof out, "a", "b"), "a/b");
  assert_string_equal(esp_path_join(out, sizeof out, "a//", "/b"), "a/b");
  assert_string_equal(esp_path_join(out, sizeof out, "/", "b"), "/b");
  assert_string_equal(esp_path_join(out, sizeof out, ".", "b"), "./b");
}

static void stage(const char *dir, const char *name, const char *text, char staged[512]) {
  char path[600];
  assert_int_equal(esp_dir_stage(dir, staged, 512), ESP_OK);
  assert_int_equal(esp_file_write_atomic(esp_path_join(path, sizeof path, staged, name), text, strlen(text)), ESP_OK);
}

static void test_dir_commit(void **state) {
  char staged[512];
  const char *parent = at("stage");
  assert_int_equal(esp_mkdirs(parent), ESP_OK);
  stage(at("stage/d"), "one", "1", staged);
  assert_false(esp_dir_exists(at("stage/d")));
  assert_int_equal(esp_dir_commit(staged, at("stage/d")), ESP_OK);
  check_content(at("stage/d/one"), "1");
  stage(at("stage/d/"), "two", "2", staged);
  assert_int_equal(esp_dir_commit(staged, at("stage/d/")), ESP_OK);
  check_content(at("stage/d/two"), "2");
  assert_false(esp_file_exists(at("stage/d/one"))); /* replaced, not mixed */
  assert_int_equal(entries(at("stage")), 1);
}

/* What a killed process staged is litter, and the next one that stages the same directory removes it. */
static void test_stale_stage(void **state) {
  assert_int_equal(esp_mkdirs(at("stale")), ESP_OK);
  pid_t child = fork();
  if (child == 0) {
    char staged[512];
    if (esp_dir_stage(at("stale/d"), staged, sizeof staged) == ESP_OK) raise(SIGKILL);
    _exit(1);
  }
  int status;
  waitpid(child, &status, 0);
  assert_true(WIFSIGNALED(status));
  assert_int_equal(entries(at("stale")), 1);
  char staged[512];
  stage(at("stale/d"), "f", "1", staged);
  assert_int_equal(entries(at("stale")), 1);
  assert_int_equal(esp_dir_commit(staged, at("stale/d")), ESP_OK);
  assert_int_equal(entries(at("stale")), 1);
}

/* A limit on the file size stands in for the full disk: the write stops in the middle. */
static void test_full_disk(void **state) {
  struct rlimit old, tight;
  char *big = esp_mem_alloc(ESP_MEM_HOST, 1 << 20);
  assert_int_equal(esp_file_write_atomic(at("full"), "old", 3), ESP_OK);
  int before = entries(root);
  signal(SIGXFSZ, SIG_IGN);
  getrlimit(RLIMIT_FSIZE, &old);
  tight = old;
  tight.rlim_cur = 100000;
  setrlimit(RLIMIT_FSIZE, &tight);
  esp_status st = esp_file_write_atomic(at("full"), big, 1 << 20);
  setrlimit(RLIMIT_FSIZE, &old);
  assert_int_equal(st, ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "full: cannot write"));
  check_content(at("full"), "old");
  assert_int_equal(entries(root), before);
  esp_mem_free(big);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_read_and_write), cmocka_unit_test(test_map_copy_hash), cmocka_unit_test(test_dirs),
      cmocka_unit_test(test_path_join),      cmocka_unit_test(test_dir_commit),    cmocka_unit_test(test_stale_stage),
      cmocka_unit_test(test_full_disk),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
