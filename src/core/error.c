#include "core/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "espalier/status.h"

#define MESSAGE_BYTES 16384 /* a recipe's errors, one line each */

static _Thread_local char message[MESSAGE_BYTES];

const char *esp_error_message(void) {
  return message;
}

void esp_error_clear(void) {
  message[0] = 0;
}

esp_status esp_fail(esp_status status, const char *fmt, ...) {
  /* Formatted aside first: an argument may be the old message itself. */
  char text[MESSAGE_BYTES];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  memcpy(message, text, strlen(text) + 1);
  return status;
}

esp_status esp_fail_context(esp_status status, const char *fmt, ...) {
  char text[MESSAGE_BYTES];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  size_t used = strlen(text);
  /* Too long a message loses its end. */
  size_t room = sizeof text - 1 - used, keep = strlen(message);
  if (room > 2) {
    memcpy(text + used, ": ", 2);
    if (keep > room - 2) keep = room - 2;
    memcpy(text + used + 2, message, keep);
    text[used + 2 + keep] = 0;
  }
  memcpy(message, text, strlen(text) + 1);
  return status;
}

esp_status esp_fail_oom(const char *what, unsigned long long bytes) {
  return esp_fail(ESP_ERR_MEMORY, "out of memory: %llu bytes for %s", bytes, what);
}
