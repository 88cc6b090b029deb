#include "train/watchdog.h"

static esp_status bound(int64_t *count, int patience, int64_t step, const char *what, double value, double limit) {
  if (!(limit > 0) || value <= limit) {
    *count = 0;
    return ESP_OK;
  }
  ++*count;
  int most = patience > 0 ? patience : 1;
  if (*count < most) return ESP_OK;
  return esp_fail(ESP_ERR_DIVERGED, "step %lld: %s %.6g is above %.6g for %lld steps in a row (log.watchdog)",
                  (long long)step, what, value, limit, (long long)*count);
}

esp_status esp_watch_step(esp_watch *w, const esp_watchdog *cfg, int64_t step, double loss, double grad_norm) {
  ESP_TRY(bound(&w->loss_above, cfg->patience, step, "the loss", loss, cfg->loss_above));
  return bound(&w->grad_above, cfg->patience, step, "the gradient norm", grad_norm, cfg->grad_norm_above);
}
