/* schedule.c: learning-rate schedules as pure functions of (step, total), so that resume and per-task re-warming need
 * no state. Warm-up is linear and its first step is already above zero: factor (step + 1) / warmup. */
#include <math.h>
#include <string.h>

#include "optim/optim.h"

static const char *const names[] = {"constant", "linear", "cosine", "wsd"};

int esp_schedule_parse(const char *name) {
  for (int i = 0; i < 4; i++)
    if (!strcmp(name, names[i])) return i;
  return -1;
}

double esp_schedule_factor(const esp_schedule *s, int64_t step, int64_t total) {
  double warm = s->warmup_steps;
  if (warm > 0 && warm < 1) warm = ceil(warm * (double)total);
  if ((double)step < warm) return ((double)step + 1) / warm;
  double floor_ = s->min_lr_ratio, span = (double)total - warm;
  /* t in [0, 1): 0 at the first step after warm-up; 1 would be the step after the last one */
  double t = span > 0 ? ((double)step - warm) / span : 1;
  if (t > 1) t = 1;
  double f = 1;
  switch (s->name) {
  case ESP_SCHED_CONSTANT:
    return 1;
  case ESP_SCHED_LINEAR:
    f = 1 - t;
    break;
  case ESP_SCHED_COSINE:
    f = 0.5 * (1 + cos(3.14159265358979323846 * t));
    break;
  case ESP_SCHED_WSD: {
    /* warm-up, stable, then 1-sqrt decay over the last share of all steps (Hagele et al., arXiv 2405.18392) */
    double decay = ceil((s->decay_share > 0 ? s->decay_share : 0.2) * (double)total);
    double start = (double)total - decay;
    if (start < warm) start = warm, decay = (double)total - warm;
    if ((double)step >= start && decay > 0) f = 1 - sqrt(fmin(1, ((double)step - start) / decay));
    break;
  }
  }
  return floor_ + (1 - floor_) * f;
}
