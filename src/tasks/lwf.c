/* lwf.c: distillation from an earlier adapter on the rows of the new task: Li and Hoiem, "Learning without Forgetting"
 * (2016), with T^2 as in Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), and the distance of the
 * final hidden states beside it. Teacher and student are one base; the teacher is other values of the same adapter, so
 * that there is no second model. */
#include <string.h>

#include "tasks/internal.h"
#include "tasks/teacher.h"

static esp_status check(const esp_strategy_cfg *c, int n_tasks) {
  (void)n_tasks;
  if (c->lwf.kl == 0 && c->lwf.hidden == 0)
    return esp_fail(ESP_ERR_RECIPE, "continual.lwf.kl: nothing is taught where hidden is 0 as well");
  return ESP_OK;
}

static esp_status open(esp_strategy *s, const esp_sequence *q) {
  if (s->cfg->lwf.kl > 0) ESP_TRY(esp_sequence_frozen_head(s, q));
  s->impl = esp_mem_alloc(ESP_MEM_HOST, sizeof(esp_teacher));
  return s->impl ? ESP_OK : ESP_ERR_MEMORY;
}

static void close(esp_strategy *s) {
  if (s->impl) esp_teacher_deinit(s->impl);
  esp_mem_free(s->impl);
}

static bool from_base(const esp_strategy *s) {
  return !strcmp(s->cfg->lwf.teacher, "base");
}

/* An adapter that has not been trained changes nothing: its first values are the base. */
static esp_status task_begin(esp_strategy *s, const esp_sequence *q) {
  esp_teacher *t = s->impl;
  if (q->task == 0 && !from_base(s)) return ESP_OK;
  bool known = esp_strategy_get(s, "teacher", NULL) != NULL;
  esp_tensor teacher = esp_strategy_flat(s, "teacher", q);
  if (!teacher.data) return ESP_ERR_MEMORY;
  if (!known || !from_base(s)) q->be->ops->axpby(q->be, teacher, 1.0f, esp_sequence_masters(q), 0.0f);
  bool l1 = !strcmp(s->cfg->lwf.hidden_loss, "l1");
  t->teach = (esp_teach){.kl = (float)s->cfg->lwf.kl,
                         .temperature = (float)s->cfg->lwf.temperature,
                         .hidden = s->cfg->lwf.hidden == 0 ? ESP_HIDDEN_NONE
                                   : l1                    ? ESP_HIDDEN_L1
                                                           : ESP_HIDDEN_L2,
                         .hidden_weight = (float)s->cfg->lwf.hidden};
  return esp_teacher_reserve(t, q, q->max_tokens);
}

static esp_status teach(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t, esp_batch *b) {
  (void)t;
  if (!esp_strategy_get(s, "teacher", NULL)) return ESP_OK;
  return esp_teacher_ask(s->impl, q, esp_strategy_flat(s, "teacher", q), b);
}

static int64_t held(const esp_strategy *s, const esp_sequence *q) {
  (void)q;
  return s->impl ? esp_teacher_bytes(s->impl) : 0;
}

const esp_strategy_kind esp_strategy_lwf = {
    .name = "lwf",
    .summary = "what an earlier adapter answers to the new rows is kept: + kl T^2 KL(teacher || student)",
    .flags = ESP_STRATEGY_BY_PARAMETER | ESP_STRATEGY_TEACHES,
    .check = check,
    .open = open,
    .close = close,
    .task_begin = task_begin,
    .teach = teach,
    .held = held,
};
