/* stack.h: the activation stack. What backward needs is pushed in forward and popped in reverse: backpropagation is
 * last-in first-out, so the high-water mark is the exact activation memory (DESIGN section 4). One allocation of the
 * size that `plan` found; on the counting backend it only measures. */
#ifndef ESP_BACKEND_STACK_H
#define ESP_BACKEND_STACK_H

#include "backend/backend.h"

typedef struct esp_stack {
  esp_backend *be;
  char *base;
  int64_t capacity, top, high; /* bytes */
  bool measure;                /* counting backend: unbounded, addresses are fake */
} esp_stack;

/* capacity 0 on the counting backend: measures. */
esp_status esp_stack_init(esp_stack *s, esp_backend *be, int64_t capacity);
void esp_stack_deinit(esp_stack *s);
/* Overflow sets the backend's sticky error (ESP_ERR_MEMORY) and returns the base: the step ends with that error. */
void *esp_stack_push(esp_stack *s, int64_t bytes); /* 64-byte aligned, NOT zeroed */
esp_tensor esp_stack_tensor(esp_stack *s, esp_dtype t, int64_t rows, int64_t cols);
static inline int64_t esp_stack_mark(const esp_stack *s) {
  return s->top;
}
static inline void esp_stack_release(esp_stack *s, int64_t mark) {
  s->top = mark;
}

#endif
