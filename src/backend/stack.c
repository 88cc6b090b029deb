/* stack.c: the activation stack over one allocation; on the counting backend an address counter that is in no
 * book. */
#include "backend/stack.h"

#define ALIGN 64
/* Where a measuring stack pretends to live: not a canonical x86-64 address, so a dereference faults at once. */
#define FAKE_BASE ((char *)0x0200000000000000)

esp_status esp_stack_init(esp_stack *s, esp_backend *be, int64_t capacity) {
  *s = (esp_stack){.be = be, .capacity = capacity};
  if (capacity == 0 && esp_backend_counts(be)) {
    s->measure = true;
    s->base = FAKE_BASE;
    return ESP_OK;
  }
  s->base = be->ops->alloc(be, ESP_MEM_ACTIVATIONS, capacity);
  if (!s->base) return be->sticky ? be->sticky : esp_fail_oom("the activation stack", (unsigned long long)capacity);
  return ESP_OK;
}

void esp_stack_deinit(esp_stack *s) {
  if (!s->be) return;
  if (!s->measure) s->be->ops->free(s->be, s->base);
  *s = (esp_stack){0};
}

void *esp_stack_push(esp_stack *s, int64_t bytes) {
  int64_t need = (bytes + ALIGN - 1) / ALIGN * ALIGN;
  if (!s->measure && s->top + need > s->capacity) {
    if (s->be->sticky == ESP_OK)
      s->be->sticky =
          esp_fail(ESP_ERR_MEMORY, "the activation stack overflows: %lld bytes more on %lld used, %lld were planned",
                   (long long)bytes, (long long)s->top, (long long)s->capacity);
    return s->base;
  }
  void *p = s->base + s->top;
  s->top += need;
  if (s->top > s->high) s->high = s->top;
  return p;
}

esp_tensor esp_stack_tensor(esp_stack *s, esp_dtype t, int64_t rows, int64_t cols) {
  return esp_tensor_2d(esp_stack_push(s, rows * cols * (int64_t)esp_dtype_size(t)), t, rows, cols);
}
