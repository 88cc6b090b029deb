/* job.h: a job for tests of the public interface. After cmocka.h. */
#ifndef TESTS_JOB_H
#define TESTS_JOB_H

#include <stdio.h>
#include <string.h>

#include "espalier/espalier.h"

/* The recipe `text` as one of folder `root`, its output in root/out, with n overrides, at most 15. */
static inline esp_job *job_open(const char *root, const char *text, const char *out, const char *const *more, int n) {
  char place[5000], file[4200];
  const char *list[16];
  esp_job *job = NULL;
  snprintf(place, sizeof place, "checkpoint.output_dir=%s/%s", root, out);
  snprintf(file, sizeof file, "%s/recipe.yaml", root);
  list[0] = place;
  for (int i = 0; i < n; i++) list[i + 1] = more[i];
  if (esp_job_open_text(text, strlen(text), file, list, n + 1, &job) != ESP_OK)
    fail_msg("%s: %s", out, esp_error_message());
  return job;
}

#endif
