/* report.c: what the run says while it runs and at its end. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "core/log.h"
#include "io/file.h"
#include "io/json.h"
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

void esp_loop_log_open(esp_loop *l) {
  char path[ESP_PATH];
  if (l->comm->rank == 0) l->log = fopen(esp_path_join(path, sizeof path, l->r->checkpoint.output_dir, "run.log"), "a");
}

static void log_line(FILE *f, const esp_event *e) {
  char now[32];
  time_t t = time(NULL);
  struct tm utc;
  strftime(now, sizeof now, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&t, &utc));
  switch (e->kind) {
  case ESP_EVENT_STEP:
    return; /* metrics.jsonl */
  case ESP_EVENT_PHASE:
    fprintf(f, "%s phase %s\n", now, e->phase);
    break;
  case ESP_EVENT_TASK_BEGIN:
    fprintf(f, "%s task %s begins at step %lld of %lld\n", now, e->task, (long long)e->step, (long long)e->total_steps);
    break;
  case ESP_EVENT_EVAL:
    fprintf(f, "%s step %lld: %s %s %.6g\n", now, (long long)e->step, e->set, e->metric, e->score);
    break;
  case ESP_EVENT_CHECKPOINT:
    fprintf(f, "%s step %lld: checkpoint %s\n", now, (long long)e->step, e->path);
    break;
  case ESP_EVENT_TASK_END:
    fprintf(f, "%s step %lld: adapter of %s %s\n", now, (long long)e->step, e->task, e->path);
    break;
  case ESP_EVENT_RUN_END:
    fprintf(f, "%s finished: %lld steps\n", now, (long long)e->step);
    break;
  case ESP_EVENT_NOTE:
    fprintf(f, "%s %s\n", now, e->text);
    break;
  }
  fflush(f);
}

void esp_loop_emit(esp_loop *l, esp_event *e) {
  if (l->log) log_line(l->log, e);
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

void esp_loop_result(const esp_loop *l, esp_run_result *out) {
  *out = (esp_run_result){.steps = l->state.at.step,
                          .seconds = esp_now() - l->started,
                          .last_loss = l->state.last_loss,
                          .tokens = l->tokens,
                          .n_tasks = l->r->n_tasks};
  esp_mem_stats s;
  esp_mem_stats_get(&s);
  out->memory_peak = s.peak_total;
  out->device_peak = s.peak_device;
  if (l->engine.be) snprintf(out->device, sizeof out->device, "%s", l->engine.be->device);
  if (l->plan.plan) {
    out->trainable = l->plan.plan->trainable;
    out->parameters = l->plan.plan->parameters;
  }
  if (!l->matrix) return;
  esp_matrix_summary m;
  esp_matrix_summarise(l->matrix, &m);
  out->has_matrix = 1;
  out->acc = m.acc, out->bwt = m.bwt, out->fwt = m.fwt, out->forgetting = m.forgetting, out->lowest = m.lowest;
}

static json_t *real(double v) {
  return isfinite(v) ? json_real(v) : json_null();
}

/* Peaks per category, and what each strategy holds at the end: what methods against forgetting are compared at. */
static json_t *memory_of(void) {
  esp_mem_stats s;
  json_t *j = json_object();
  esp_mem_stats_get(&s);
  for (int k = 0; k < ESP_MEM_KINDS; k++)
    json_object_set_new(j, esp_mem_kind_name((esp_mem_kind)k), json_integer((json_int_t)s.peak[k]));
  return j;
}

static json_t *strategies_of(const esp_loop *l) {
  const esp_strategies *s = &l->engine.strategies;
  json_t *j = json_object();
  for (int i = 0; i < s->n; i++)
    json_object_set_new(j, s->list[i].kind->name,
                        json_integer((json_int_t)esp_strategies_bytes(s, i, &l->engine.sequence)));
  return j;
}

esp_status esp_loop_save_result(const esp_loop *l, const esp_run_result *r) {
  char path[ESP_PATH];
  const esp_plan *p = l->plan.plan;
  json_t *j = json_pack("{s:I,s:I,s:I,s:I,s:I,s:I,s:i,s:i}", "steps", (json_int_t)r->steps, "planned_steps",
                        (json_int_t)p->steps, "memory_peak", (json_int_t)r->memory_peak, "planned_memory_peak",
                        (json_int_t)p->peak_bytes, "trainable", (json_int_t)r->trainable, "parameters",
                        (json_int_t)r->parameters, "ranks", l->comm->size, "tasks", r->n_tasks);
  if (!j) return esp_fail_oom("result.json", 1024);
  if (r->device_peak) {
    json_object_set_new(j, "device", json_string(r->device));
    json_object_set_new(j, "device_peak", json_integer((json_int_t)r->device_peak));
    json_object_set_new(j, "planned_device_peak", json_integer((json_int_t)p->device_peak_bytes));
  }
  json_t *names = json_array();
  for (int i = 0; i < l->r->n_tasks; i++) json_array_append_new(names, json_string(l->r->tasks[i].name));
  json_object_set_new(j, "task_names", names);
  json_object_set_new(j, "memory", memory_of());
  if (l->engine.strategies.n > 0) json_object_set_new(j, "strategies", strategies_of(l));
  json_object_set_new(j, "seconds", real(r->seconds));
  json_object_set_new(j, "last_loss", real(r->last_loss));
  if (r->has_matrix)
    json_object_set_new(j, "scores",
                        json_pack("{s:o,s:o,s:o,s:o,s:o}", "acc", real(r->acc), "bwt", real(r->bwt), "fwt",
                                  real(r->fwt), "forgetting", real(r->forgetting), "lowest", real(r->lowest)));
  esp_path_join(path, sizeof path, l->r->checkpoint.output_dir, "result.json");
  esp_status st = esp_json_save(path, j, 0);
  json_decref(j);
  return st;
}
