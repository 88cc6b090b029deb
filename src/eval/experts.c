#include "eval/experts.h"

#include <math.h>

double esp_log_sum(const float *z, int64_t n) {
  double most = -INFINITY, sum = 0;
  for (int64_t v = 0; v < n; v++) most = fmax(most, (double)z[v]);
  for (int64_t v = 0; v < n; v++) sum += exp((double)z[v] - most);
  return most + log(sum);
}

void esp_log_softmax(double *x, int64_t n) {
  double most = -INFINITY, sum = 0;
  for (int64_t v = 0; v < n; v++) most = fmax(most, x[v]);
  for (int64_t v = 0; v < n; v++) sum += exp(x[v] - most);
  for (int64_t v = 0; v < n; v++) x[v] -= most + log(sum);
}

void esp_join_logits(float *x, const float *y, int64_t n) {
  double lx = esp_log_sum(x, n), ly = esp_log_sum(y, n);
  for (int64_t v = 0; v < n; v++) x[v] = (float)fmax((double)x[v] - lx, (double)y[v] - ly);
}

double esp_joined_loss(const float *x, const float *y, int64_t n, int64_t target) {
  double lx = esp_log_sum(x, n), ly = esp_log_sum(y, n), sum = 0;
  for (int64_t v = 0; v < n; v++) sum += exp(fmax((double)x[v] - lx, (double)y[v] - ly));
  return log(sum) - fmax((double)x[target] - lx, (double)y[target] - ly);
}
