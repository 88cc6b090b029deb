/* What a run writes about itself: event files against the published formats, metrics cut to a checkpoint, the watchdog.
 * Mutation seen caught: the mask constant 0xa282ead8 changed in tensorboard.c: test_frame fails. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "io/file.h"
#include "train/metrics.h"
#include "train/tensorboard.h"
#include "train/watchdog.h"

/* RFC 3720, appendix B.4, and the usual check value. */
static void test_crc32c(void **state) {
  unsigned char zeros[32] = {0}, ones[32];
  memset(ones, 0xff, sizeof ones);
  assert_int_equal(esp_crc32c((const unsigned char *)"123456789", 9), 0xe3069283u);
  assert_int_equal(esp_crc32c(zeros, 32), 0x8a9136aau);
  assert_int_equal(esp_crc32c(ones, 32), 0x62a8ab43u);
}

static uint32_t unmask(const unsigned char *p) {
  uint32_t m = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
  m -= 0xa282ead8u;
  return (m >> 17) | (m << 15);
}

static void test_frame(void **state) {
  unsigned char out[64];
  size_t n = esp_tb_frame((const unsigned char *)"123456789", 9, out);
  assert_int_equal(n, 8 + 4 + 9 + 4);
  static const unsigned char length[8] = {9};
  assert_memory_equal(out, length, 8);
  assert_int_equal(unmask(out + 8), esp_crc32c(length, 8));
  assert_memory_equal(out + 12, "123456789", 9);
  assert_int_equal(unmask(out + 21), 0xe3069283u);
}

/* The bytes that protobuf gives for Event(wall_time=1.5, step=300, summary=[Value(tag="a/b", simple_value=0.25)]). */
static void test_scalar(void **state) {
  static const unsigned char want[] = {0x09, 0,    0,    0,    0, 0,   0,   0xf8, 0x3f, 0x10, 0xac, 0x02, 0x2a,
                                       0x0c, 0x0a, 0x0a, 0x0a, 3, 'a', '/', 'b',  0x15, 0,    0,    0x80, 0x3e};
  unsigned char out[192];
  size_t n = esp_tb_scalar(1.5, 300, "a/b", 0.25f, out);
  assert_int_equal(n, sizeof want + 16);
  assert_memory_equal(out + 12, want, sizeof want);
}

static void test_cut(void **state) {
  char dir[] = "metrics-XXXXXX", path[256], *text;
  size_t n;
  assert_non_null(mkdtemp(dir));
  esp_recipe *r = calloc(1, sizeof *r);
  r->checkpoint.output_dir = dir;
  r->log.jsonl = r->log.tensorboard = true;
  esp_metrics m;
  int64_t jsonl, events;
  esp_event e = {.kind = ESP_EVENT_STEP, .task = "t\"1", .step = 1, .loss = 2.5, .grad_norm = 0.0 / 0.0};
  assert_int_equal(esp_metrics_open(&m, r, 0, 0), ESP_OK);
  assert_int_equal(esp_metrics_step(&m, &e), ESP_OK);
  assert_int_equal(esp_metrics_sync(&m, &jsonl, &events), ESP_OK);
  e.step = 2;
  assert_int_equal(esp_metrics_step(&m, &e), ESP_OK); /* lost to a kill */
  esp_metrics_close(&m);
  assert_int_equal(esp_metrics_open(&m, r, jsonl, events), ESP_OK);
  e.step = 22;
  assert_int_equal(esp_metrics_step(&m, &e), ESP_OK);
  esp_metrics_close(&m);
  assert_int_equal(esp_file_read(esp_path_join(path, sizeof path, dir, "metrics.jsonl"), &text, &n), ESP_OK);
  assert_non_null(strstr(text, "{\"step\":1,\"task\":\"t\\\"1\""));
  assert_non_null(strstr(text, "\"grad_norm\":null"));
  assert_null(strstr(text, "\"step\":2,"));
  assert_non_null(strstr(text, "\n{\"step\":22,"));
  esp_mem_free(text);
  /* a file that is shorter than the checkpoint says is not silently taken */
  assert_int_equal(esp_metrics_open(&m, r, 100000, events), ESP_ERR_DATA);
  esp_metrics_close(&m);
  assert_int_equal(esp_remove_tree(dir), ESP_OK);
  free(r);
}

static void test_watchdog(void **state) {
  esp_watchdog cfg = {.loss_above = 10, .grad_norm_above = 0, .patience = 2};
  esp_watch w = {0};
  assert_int_equal(esp_watch_step(&w, &cfg, 1, 11, 1e9), ESP_OK); /* once; gradient bound is off */
  assert_int_equal(esp_watch_step(&w, &cfg, 2, 9, 1), ESP_OK);    /* back: counts anew */
  assert_int_equal(esp_watch_step(&w, &cfg, 3, 11, 1), ESP_OK);
  assert_int_equal(esp_watch_step(&w, &cfg, 4, 11, 1), ESP_ERR_DIVERGED);
  assert_non_null(strstr(esp_error_message(), "step 4"));
  cfg = (esp_watchdog){.grad_norm_above = 5, .patience = 1};
  w = (esp_watch){0};
  assert_int_equal(esp_watch_step(&w, &cfg, 1, 1e9, 5), ESP_OK);
  assert_int_equal(esp_watch_step(&w, &cfg, 2, 1, 0.0 / 0.0), ESP_ERR_DIVERGED); /* not a number is above every bound */
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_crc32c), cmocka_unit_test(test_frame),    cmocka_unit_test(test_scalar),
      cmocka_unit_test(test_cut),    cmocka_unit_test(test_watchdog),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
