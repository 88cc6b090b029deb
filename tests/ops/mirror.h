/* mirror.h: a backend whose operations take host memory and run on another backend: operands are copied there, guards
 * and gaps between rows included, the operation runs, and what it may have written is copied back. The conformance
 * tests, whose buffers and references lie in host memory, so run unchanged on a device. It also checks what the tests
 * cannot see from the host: nothing is written that the operation only reads, nor around the operands. */
#ifndef TESTS_OPS_MIRROR_H
#define TESTS_OPS_MIRROR_H

#include "backend/backend.h"

/* Takes `real` over when it succeeds. */
esp_status mirror_create(esp_backend *real, esp_backend **out);
esp_backend *mirror_real(esp_backend *be);

#endif
