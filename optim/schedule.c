/* schedule.c: learning-rate schedules as pure functions of (step, total), so that resume and per-task re-warming need
 * no state. Warm-up is linear and its first step is already above zero: factor (step + 1) / warmup.
 *
 * infinite (arXiv 2503.02844, eq. 1; four phases): warm-up, a cosine down to the constant rate, that rate for as long
 * as there are tasks, and where something is to be deployed an exponential decay, constant (min / constant)^u. Its
 * phases count steps from the beginning, so that neither a further task nor a longer one moves them. The sources differ
 * in the denominator of u; here u is the share of the decay's own steps that are done, as in every other phase. */
#include <math.h>
#include <string.h>

#include "optim/optim.h"

static const char *const names[] = {"constant", "linear", "cosine", "wsd", "infinite"};

int esp_schedule_parse(const char *name) {
  for (int i = 0; i < 5; i++)
    if (!strcmp(name, names[i])) return i;
  return -1;
}

/* Steps, or a share of all of them. */
static double steps_of(double given, int64_t total) {
  return given > 0 && given < 1 ? ceil(given * (double)total) : given;
}

static double half_cosine(double t) {
  return 0.5 * (1 + cos(3.14159265358979323846 * t));
}

int64_t esp_schedule_decay_steps(const esp_schedule *s, int64_t total) {
  double n = 0;
  if (s->name == ESP_SCHED_WSD) n = ceil((s->decay_share > 0 ? s->decay_share : 0.2) * (double)total);
  if (s->name == ESP_SCHED_INFINITE) n = steps_of(s->anneal_steps, total);
  return n < (double)total ? (int64_t)n : total;
}

/* After warm-up: the cosine to the constant rate, which follows it. */
static double cooled(const esp_schedule *s, double since_warm, int64_t total) {
  double cool = steps_of(s->cooldown_steps, total), flat = s->constant_ratio;
  return since_warm < cool ? flat + (1 - flat) * half_cosine(since_warm / cool) : flat;
}

double esp_schedule_factor(const esp_schedule *s, int64_t step, int64_t total) {
  double warm = steps_of(s->warmup_steps, total), decay = (double)esp_schedule_decay_steps(s, total);
  if ((double)step < warm) return ((double)step + 1) / warm;
  double floor_ = s->min_lr_ratio, span = (double)total - warm, start = (double)total - decay;
  /* t in [0, 1): 0 at the first step after warm-up; 1 would be the step after the last one */
  double t = span > 0 ? ((double)step - warm) / span : 1;
  if (t > 1) t = 1;
  if (start < warm) start = warm, decay = span;
  double u = decay > 0 && (double)step >= start ? fmin(1, ((double)step - start) / decay) : 0;
  double f = 1;
  switch (s->name) {
  case ESP_SCHED_CONSTANT:
    return 1;
  case ESP_SCHED_LINEAR:
    f = 1 - t;
    break;
  case ESP_SCHED_COSINE:
    f = half_cosine(t);
    break;
  case ESP_SCHED_WSD: /* warm-up, stable, then 1-sqrt decay over the last share (Hagele et al., arXiv 2405.18392) */
    f = 1 - sqrt(u);
    break;
  case ESP_SCHED_INFINITE: {
    double from = cooled(s, fmin((double)step, start) - warm, total);
    return u > 0 ? from * pow(floor_ / from, u) : from;
  }
  }
  return floor_ + (1 - floor_) * f;
}

double esp_schedule_run_factor(const esp_schedule *s, int64_t step, int64_t total, int64_t task_step,
                               int64_t task_steps) {
  if (s->name != ESP_SCHED_INFINITE) return esp_schedule_factor(s, step, total);
  int64_t decay = esp_schedule_decay_steps(s, task_steps), into = task_step - (task_steps - decay);
  esp_schedule body = *s;
  body.anneal_steps = 0;
  if (into <= 0) return esp_schedule_factor(&body, step, total);
  double from = esp_schedule_factor(&body, step - into, total);
  return from * pow(s->min_lr_ratio / from, (double)into / (double)decay);
}
