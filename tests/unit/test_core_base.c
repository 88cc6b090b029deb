/* Errors, counted memory, arenas, strings, maps, processor levels.
 * Mutation seen to fail: esp_mem_free subtracting nothing from the books. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/arena.h"
#include "core/cpu.h"
#include "core/error.h"
#include "core/log.h"
#include "core/map.h"
#include "core/mem.h"
#include "core/strbuf.h"

static void test_error(void **state) {
  esp_error_clear();
  assert_string_equal(esp_error_message(), "");
  assert_int_equal(esp_fail(ESP_ERR_DATA, "file:%d: bad", 3), ESP_ERR_DATA);
  assert_int_equal(esp_fail_context(ESP_ERR_DATA, "task %s", "a"), ESP_ERR_DATA);
  assert_string_equal(esp_error_message(), "task a: file:3: bad");
  esp_fail(ESP_ERR_DATA, "again: %s", esp_error_message()); /* the old message as an argument */
  assert_string_equal(esp_error_message(), "again: task a: file:3: bad");
  for (int i = 0; i < 5000; i++) esp_fail_context(ESP_ERR_DATA, "0123456789");
  assert_true(strlen(esp_error_message()) < 5000 * 12);
  assert_true(strncmp(esp_error_message(), "0123456789: 0123456789: ", 24) == 0);
}

static void test_mem_books(void **state) {
  esp_mem_stats before, s;
  esp_mem_stats_get(&before);
  static const size_t sizes[] = {0, 1, 63, 64, 65, 4096, (4u << 20) - 1, 4u << 20, 9u << 20};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    unsigned char *p = esp_mem_alloc(ESP_MEM_WEIGHTS, sizes[i]);
    assert_non_null(p);
    assert_int_equal((uintptr_t)p % 64, 0);
    for (size_t k = 0; k < sizes[i]; k += 61) assert_int_equal(p[k], 0);
    memset(p, 0xee, sizes[i]);
    esp_mem_stats_get(&s);
    assert_int_equal(s.now[ESP_MEM_WEIGHTS] - before.now[ESP_MEM_WEIGHTS], sizes[i]);
    assert_int_equal(s.now_total - before.now_total, sizes[i]);
    assert_true(s.peak[ESP_MEM_WEIGHTS] >= s.now[ESP_MEM_WEIGHTS]);
    unsigned char *q = esp_mem_realloc(ESP_MEM_WEIGHTS, p, sizes[i] + 5000);
    assert_non_null(q);
    for (size_t k = 0; k < sizes[i]; k += 61) assert_int_equal(q[k], 0xee);
    for (size_t k = sizes[i]; k < sizes[i] + 5000; k++) assert_int_equal(q[k], 0);
    esp_mem_free(q);
    esp_mem_stats_get(&s);
    assert_int_equal(s.now_total, before.now_total);
  }
  esp_mem_stats_reset_peak();
  void *p = esp_mem_alloc(ESP_MEM_OPTIM, 1000);
  esp_mem_free(p);
  esp_mem_stats_get(&s);
  assert_int_equal(s.peak[ESP_MEM_OPTIM] - s.now[ESP_MEM_OPTIM], 1000);
  esp_mem_account(ESP_MEM_DATA, 77);
  esp_mem_stats_get(&s);
  assert_int_equal(s.now[ESP_MEM_DATA] - before.now[ESP_MEM_DATA], 77);
  esp_mem_account(ESP_MEM_DATA, -77);
  assert_null(esp_mem_alloc(ESP_MEM_HOST, SIZE_MAX - 8));
  assert_non_null(strstr(esp_error_message(), "out of memory"));
  assert_true(esp_mem_rss_peak() > 1 << 20);
  char *text = esp_mem_printf(ESP_MEM_HOST, "%d-%s", 5, "x");
  assert_string_equal(text, "5-x");
  esp_mem_free(text);
  esp_mem_free(NULL);
}

static void test_arena(void **state) {
  esp_mem_stats before, after;
  esp_mem_stats_get(&before);
  esp_arena *a = esp_arena_create(ESP_MEM_HOST);
  char *texts[2000];
  size_t asked = 0;
  for (int i = 0; i < 2000; i++) {
    texts[i] = esp_arena_printf(a, "text number %d", i);
    asked += strlen(texts[i]) + 1;
    assert_int_equal((uintptr_t)texts[i] % 16, 0);
  }
  char *big = esp_arena_alloc(a, 3 << 20);
  for (int i = 0; i < 3 << 20; i += 997) assert_int_equal(big[i], 0);
  memset(big, 1, 3 << 20);
  assert_int_equal(esp_arena_bytes(a), asked + (3 << 20));
  for (int i = 0; i < 2000; i++) {
    char want[32];
    snprintf(want, sizeof want, "text number %d", i);
    assert_string_equal(texts[i], want);
  }
  assert_string_equal(esp_arena_strndup(a, "abcdef", 3), "abc");
  assert_null(esp_arena_alloc(a, SIZE_MAX));
  esp_arena_destroy(a);
  esp_arena_destroy(NULL);
  esp_mem_stats_get(&after);
  assert_int_equal(after.now_total, before.now_total);
}

static void test_strbuf(void **state) {
  esp_strbuf b;
  esp_strbuf_init(&b);
  for (int i = 0; i < 1000; i++) esp_strbuf_printf(&b, "%d,", i);
  assert_int_equal(b.len, 3890);
  assert_int_equal(strlen(b.data), 3890);
  esp_strbuf_clear(&b);
  assert_string_equal(b.data, "");
  esp_strbuf_json(&b, "a\"b\\\n\t\x01\x7f\0z\xc3\xa9", 12);
  assert_string_equal(b.data, "\"a\\\"b\\\\\\n\\t\\u0001\\u007f\\u0000z\xc3\xa9\"");
  char *t = esp_strbuf_take(&b);
  assert_null(b.data);
  esp_mem_free(t);
  t = esp_strbuf_take(&b); /* an empty buffer gives an empty text */
  assert_string_equal(t, "");
  esp_mem_free(t);
  /* exactly at the capacity */
  for (size_t n = 60; n < 70; n++) {
    char chunk[70];
    memset(chunk, 'x', sizeof chunk);
    esp_strbuf_add(&b, chunk, n);
    assert_int_equal(b.data[n], 0);
    esp_strbuf_deinit(&b);
  }
}

static void test_map(void **state) {
  esp_map *m = esp_map_create(0);
  static char keys[5000][12];
  for (intptr_t i = 0; i < 5000; i++) {
    snprintf(keys[i], sizeof keys[i], "k%d", (int)i);
    assert_true(esp_map_put(m, keys[i], strlen(keys[i]), (void *)(i + 1)));
  }
  assert_int_equal(esp_map_count(m), 5000);
  for (intptr_t i = 0; i < 5000; i++) {
    char k[12];
    memcpy(k, keys[i], sizeof k);
    assert_ptr_equal(esp_map_get(m, k, strlen(k)), (void *)(i + 1));
  }
  assert_null(esp_map_get(m, "k5000", 5));
  assert_false(esp_map_has(m, "k", 1));
  assert_true(esp_map_put(m, "k7", 2, NULL)); /* replaced by NULL: present all the same */
  assert_true(esp_map_has(m, "k7", 2));
  assert_null(esp_map_get(m, "k7", 2));
  assert_int_equal(esp_map_count(m), 5000);
  esp_map_destroy(m);
  esp_map_destroy(NULL);
}

static void test_did_you_mean(void **state) {
  static const char *const names[] = {"rank", "alpha", "dropout", "target_modules"};
  assert_string_equal(esp_closest("rnak", names, 4), "rank");
  assert_string_equal(esp_closest("alhpa", names, 4), "alpha");
  assert_string_equal(esp_closest("target_module", names, 4), "target_modules");
  assert_null(esp_closest("seed", names, 4));
  assert_null(esp_closest("x", names, 4));
  assert_int_equal(esp_edit_distance("kitten", "sitting"), 3);
  assert_int_equal(esp_edit_distance("", "abc"), 3);
  assert_int_equal(esp_edit_distance("lora_rnak", "lora_rank"), 1);
}

static void sink(void *ctx, esp_log_level level, const char *line) {
  snprintf(ctx, 64, "%d:%s", (int)level, line);
}

static void test_log(void **state) {
  char seen[64] = "";
  esp_log(ESP_LOG_INFO, "nobody listens");
  esp_log_set_sink(sink, seen);
  esp_log(ESP_LOG_NOTICE, "%d rows", 3);
  esp_log_set_sink(NULL, NULL);
  esp_log(ESP_LOG_INFO, "again nobody");
  assert_string_equal(seen, "2:3 rows");
  double a = esp_now();
  assert_true(esp_now() >= a);
}

static void test_cpu(void **state) {
  assert_true(esp_cpu_isa() <= esp_cpu_isa_available());
  assert_true(strlen(esp_cpu_brand()) > 0);
  assert_string_equal(esp_isa_name(ESP_ISA_AVX512), "avx512");
  esp_cpu_isa_set(ESP_ISA_PLAIN);
  assert_int_equal(esp_cpu_isa(), ESP_ISA_PLAIN);
  esp_cpu_isa_set(ESP_ISA_AMX); /* never above what is there */
  assert_int_equal(esp_cpu_isa(), esp_cpu_isa_available());
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_error),  cmocka_unit_test(test_mem_books), cmocka_unit_test(test_arena),
      cmocka_unit_test(test_strbuf), cmocka_unit_test(test_map),       cmocka_unit_test(test_did_you_mean),
      cmocka_unit_test(test_log),    cmocka_unit_test(test_cpu),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
