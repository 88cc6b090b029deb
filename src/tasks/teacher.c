#include "tasks/teacher.h"

esp_status esp_teacher_reserve(esp_teacher *t, const esp_sequence *q, int64_t rows) {
  int64_t hidden = esp_model_describe(q->model)->hidden;
  esp_tensor want = esp_tensor_2d(NULL, esp_model_compute(q->model), rows, hidden);
  bool same = t->features.data && esp_tensor_cols(&t->features) == hidden && t->features.dtype == want.dtype;
  if (same && esp_tensor_rows(&t->features) >= rows) return ESP_OK;
  esp_teacher_deinit(t);
  t->be = q->be;
  want.data = q->be->ops->alloc(q->be, ESP_MEM_STRATEGY, esp_tensor_bytes(&want));
  if (!want.data) return esp_backend_why_null(q->be);
  t->features = want;
  return ESP_OK;
}

int64_t esp_teacher_bytes(const esp_teacher *t) {
  return t->features.data ? esp_tensor_bytes(&t->features) : 0;
}

void esp_teacher_deinit(esp_teacher *t) {
  if (t->features.data) t->be->ops->free(t->be, t->features.data);
  t->features = (esp_tensor){0};
}

esp_status esp_teacher_ask(esp_teacher *t, const esp_sequence *q, esp_tensor masters, esp_batch *b) {
  ESP_TRY(esp_sequence_features(q, masters, b, t->features));
  t->teach.features = t->features;
  b->teach = &t->teach;
  return ESP_OK;
}
