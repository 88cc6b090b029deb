/* teacher.h: what strategies that teach share: room for the teacher's states of a micro-batch. */
#ifndef ESP_TASKS_TEACHER_H
#define ESP_TASKS_TEACHER_H

#include "tasks/strategy.h"

typedef struct esp_teacher {
  esp_backend *be;
  esp_tensor features; /* [rows, hidden] of the compute type */
  esp_teach teach;
} esp_teacher;

/* Room for at least `rows` rows. The old contents are lost. */
esp_status esp_teacher_reserve(esp_teacher *t, const esp_sequence *q, int64_t rows);
int64_t esp_teacher_bytes(const esp_teacher *t);
void esp_teacher_deinit(esp_teacher *t);
/* b is taught what the model with `masters` in the place of the adapter's answers. */
esp_status esp_teacher_ask(esp_teacher *t, const esp_sequence *q, esp_tensor masters, esp_batch *b);

#endif
