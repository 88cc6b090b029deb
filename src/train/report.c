/* report.c: what the run says while it runs and at its end. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "core/log.h"
#include "train/loop.h"

esp_event esp_loop_event(const esp_loop *l, esp_event_kind kind) {
  const esp_cursor *at = &l->state.at;
  bool in_task = at->task < l->r->n_tasks;
  esp_event e = {.kind = kind,
                 .phase = l->phase,
                 .task = in_task ? l->r->tasks[at->task].name : "",
                 .task_index = (int)at->task,
                 .n_tasks = l->r->n_tasks,
                 .step = at->step,
                 .total_steps = l->total_steps,
                 .task_step = at->task_step,
                 .task_steps = in_task && l->plan.task ? l->plan.task[at->task].steps : 0,
                 .set = "",
                 .metric = "",
                 .path = "",
                 .text = ""};
  esp_mem_stats s;
  esp_mem_stats_get(&s);
  e.memory_now = s.now_total;
  e.memory_peak = s.peak_total;
  return e;
}

void esp_loop_emit(esp_loop *l, esp_event *e) {
  if (l->comm->rank == 0 && l->opt && l->opt->on_event) l->opt->on_event(l->opt->ctx, e);
}

void esp_loop_phase(esp_loop *l, const char *phase) {
  l->phase = phase;
  esp_event e = esp_loop_event(l, ESP_EVENT_PHASE);
  esp_loop_emit(l, &e);
}

void esp_loop_note(esp_loop *l, const char *fmt, ...) {
  char text[1024];
  va_list args;
  va_start(args, fmt);
  vsnprintf(text, sizeof text, fmt, args);
  va_end(args);
  esp_event e = esp_loop_event(l, ESP_EVENT_NOTE);
  e.text = text;
  esp_loop_emit(l, &e);
}

esp_status esp_loop_result(const esp_loop *l, esp_run_result *out) {
  if (!out) return ESP_OK;
  *out = (esp_run_result){.steps = l->state.at.step,
                          .seconds = esp_now() - l->started,
                          .last_loss = l->state.last_loss,
                          .tokens = l->tokens,
                          .n_tasks = l->r->n_tasks};
  esp_mem_stats s;
  esp_mem_stats_get(&s);
  out->memory_peak = s.peak_total;
  if (l->plan.plan) {
    out->trainable = l->plan.plan->trainable;
    out->parameters = l->plan.plan->parameters;
  }
  if (!l->matrix) return ESP_OK;
  esp_matrix_summary m;
  esp_matrix_summarise(l->matrix, &m);
  out->has_matrix = 1;
  out->acc = m.acc, out->bwt = m.bwt, out->fwt = m.fwt, out->forgetting = m.forgetting, out->min_acc = m.min_acc;
  return ESP_OK;
}
