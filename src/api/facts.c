/* facts.c: a JSON object of facts as the text that inspect and doctor give. */
#include <stdlib.h>
#include <string.h>

#include "api/api.h"
#include "core/strbuf.h"

#define MANY 40 /* tensors listed in text; all of them in JSON */

static void print_value(esp_strbuf *b, json_t *v) {
  if (json_is_string(v)) {
    esp_strbuf_puts(b, json_string_value(v));
    return;
  }
  if (json_is_real(v)) {
    esp_strbuf_printf(b, "%.6g", json_real_value(v));
    return;
  }
  char *text = json_dumps(v, JSON_COMPACT | JSON_ENCODE_ANY);
  esp_strbuf_puts(b, text ? text : "");
  free(text);
}

static void print_text(esp_strbuf *b, json_t *j) {
  const char *key;
  json_t *v;
  json_object_foreach(j, key, v) {
    if (!strcmp(key, "list")) continue;
    if (json_is_object(v)) {
      const char *inner;
      json_t *w;
      esp_strbuf_printf(b, "%s\n", key);
      json_object_foreach(v, inner, w) {
        if (json_is_null(w)) continue;
        esp_strbuf_printf(b, "  %-22s ", inner);
        print_value(b, w);
        esp_strbuf_putc(b, '\n');
      }
      continue;
    }
    esp_strbuf_printf(b, "%-24s ", key);
    print_value(b, v);
    esp_strbuf_putc(b, '\n');
  }
  json_t *list = json_object_get(j, "list");
  for (size_t i = 0; i < json_array_size(list); i++) {
    json_t *t = json_array_get(list, i);
    if (i == MANY) {
      esp_strbuf_printf(b, "  ... and %zu more (--json lists all)\n", json_array_size(list) - MANY);
      break;
    }
    esp_strbuf_printf(b, "  %-5s ", json_string_value(json_object_get(t, "dtype")));
    print_value(b, json_object_get(t, "shape"));
    esp_strbuf_printf(b, " %s\n", json_string_value(json_object_get(t, "name")));
  }
}

esp_status esp_api_facts_text(json_t *facts, int json, char **text) {
  esp_strbuf b;
  esp_strbuf_init(&b);
  if (json) {
    char *dump = json_dumps(facts, JSON_INDENT(2));
    esp_strbuf_puts(&b, dump ? dump : "");
    esp_strbuf_putc(&b, '\n');
    free(dump);
  } else {
    print_text(&b, facts);
  }
  *text = esp_strbuf_take(&b);
  esp_strbuf_deinit(&b);
  return *text ? ESP_OK : ESP_ERR_MEMORY;
}
