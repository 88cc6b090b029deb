/* test_text_template.c: the built-in templates print what the models' Jinja templates print (fixture made by
 * tests/golden/make_templates.py), and every byte's origin is right.
 * Mutation seen to be caught: the trim of Llama 3's contents left out. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "core/strbuf.h"
#include "io/json.h"
#include "text/template.h"

static void as_jinja(void **state) {
  json_t *all = json_load_file(ESP_SOURCE_DIR "/tests/golden/templates.json", 0, NULL), *c, *m;
  assert_non_null(all);
  size_t i, k;
  json_array_foreach(all, i, c) {
    const char *name = json_string_value(json_object_get(c, "template"));
    const json_t *messages = json_object_get(c, "messages"), *want = json_object_get(c, "text");
    esp_message list[16];
    int n = 0;
    json_array_foreach(messages, k, m) {
      list[n++] = (esp_message){json_string_value(json_object_get(m, "role")),
                                json_string_value(json_object_get(m, "content")), -1};
    }
    esp_rendered r;
    esp_status st = esp_template_render(name, list, n, json_is_true(json_object_get(c, "generation")), &r);
    if (json_is_null(want)) {
      if (st == ESP_OK) fail_msg("%s renders case %zu, Jinja refuses it", name, i);
      continue;
    }
    if (st != ESP_OK) fail_msg("%s: case %zu: %s", name, i, esp_error_message());
    esp_strbuf b;
    esp_strbuf_init(&b);
    int ends = 0, answers = 0;
    for (int s = 0; s < r.n; s++) {
      esp_strbuf_add(&b, r.segments[s].text, r.segments[s].len);
      if (r.segments[s].terminator && !r.segments[s].len) esp_strbuf_puts(&b, "<EOS>"); /* the tokenizer's own */
      if (r.segments[s].content && r.segments[s].len > 1) /* content bytes are the message's own */
        assert_non_null(strstr(list[r.segments[s].message].content, r.segments[s].text));
      bool answer = r.segments[s].message >= 0 && !strcmp(list[r.segments[s].message].role, "assistant");
      ends += r.segments[s].terminator && answer;
    }
    for (int k2 = 0; k2 < n; k2++) answers += !strcmp(list[k2].role, "assistant");
    assert_int_equal(ends, answers); /* every answer has one terminator */
    if (b.len != json_string_length(want) || memcmp(b.data, json_string_value(want), b.len))
      fail_msg("%s: case %zu:\n%s\n-- expected --\n%s", name, i, b.data, json_string_value(want));
    esp_strbuf_deinit(&b);
    esp_rendered_deinit(&r);
  }
  assert_true(i > 100);
  json_decref(all);
}

static void unknown(void **state) {
  esp_rendered r;
  esp_message m = {"user", "x", -1};
  assert_int_equal(esp_template_render("vicuna", &m, 1, false, &r), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "vicuna"));
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(as_jinja), cmocka_unit_test(unknown)};
  return cmocka_run_group_tests_name("text template", tests, NULL, NULL);
}
