/* error.h: raising and passing on failures inside the library (public half: espalier/status.h). */
#ifndef ESP_CORE_ERROR_H
#define ESP_CORE_ERROR_H

#include "espalier/status.h"

/* Sets this thread's message and returns `status`. Use as `return esp_fail(ESP_ERR_DATA, "%s: ...", path);`
 * Messages: one line, no trailing full stop, file and place first ("path:line:column: what"). */
esp_status esp_fail(esp_status status, const char *fmt, ...) ESP_PRINTF(2, 3);
/* Puts "prefix: " before the current message; returns `status` unchanged. */
esp_status esp_fail_context(esp_status status, const char *fmt, ...) ESP_PRINTF(2, 3);
/* An allocation of `bytes` for `what` failed: ESP_ERR_MEMORY with a message. */
esp_status esp_fail_oom(const char *what, unsigned long long bytes);

#define ESP_TRY(expr)                                                                                                  \
  do {                                                                                                                 \
    esp_status esp_try_ = (expr);                                                                                      \
    if (esp_try_ != ESP_OK) return esp_try_;                                                                           \
  } while (0)

/* With a local `esp_status st` and a label `out` in scope: the one cleanup label of a function. */
#define ESP_GOTO(expr)                                                                                                 \
  do {                                                                                                                 \
    st = (expr);                                                                                                       \
    if (st != ESP_OK) goto out;                                                                                        \
  } while (0)

#endif
