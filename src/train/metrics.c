#include "train/metrics.h"

#include <errno.h>
#include <math.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/strbuf.h"
#include "io/file.h"
#include "train/tensorboard.h"

static esp_status open_cut(const char *path, int64_t bytes, FILE **out) {
  FILE *f = fopen(path, bytes > 0 ? "r+b" : "w+b");
  if (!f) return esp_fail(ESP_ERR_DATA, "%s: %s", path, strerror(errno));
  if (fseeko(f, 0, SEEK_END) != 0 || ftello(f) < bytes) {
    fclose(f);
    return esp_fail(ESP_ERR_DATA, "%s: is shorter than the checkpoint says (%lld bytes)", path, (long long)bytes);
  }
  if (ftruncate(fileno(f), bytes) != 0 || fseeko(f, bytes, SEEK_SET) != 0) {
    int err = errno;
    fclose(f);
    return esp_fail(ESP_ERR_DATA, "%s: %s", path, strerror(err));
  }
  *out = f;
  return ESP_OK;
}

static double wall(void) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

esp_status esp_metrics_open(esp_metrics *m, const esp_recipe *r, int64_t jsonl_bytes, int64_t events_bytes) {
  char path[ESP_PATH];
  *m = (esp_metrics){0};
  if (r->log.jsonl)
    ESP_TRY(
        open_cut(esp_path_join(path, sizeof path, r->checkpoint.output_dir, "metrics.jsonl"), jsonl_bytes, &m->jsonl));
  if (!r->log.tensorboard) return ESP_OK;
  /* TensorBoard takes any file with "tfevents" in its name; a fixed one is what can be cut on resume. */
  ESP_TRY(open_cut(esp_path_join(path, sizeof path, r->checkpoint.output_dir, "events.out.tfevents.0.espalier"),
                   events_bytes, &m->events));
  if (events_bytes == 0) {
    unsigned char rec[64];
    size_t n = esp_tb_version(wall(), rec);
    if (fwrite(rec, 1, n, m->events) != n) return esp_fail(ESP_ERR_DATA, "%s: %s", path, strerror(errno));
  }
  return ESP_OK;
}

void esp_metrics_close(esp_metrics *m) {
  if (m->jsonl) fclose(m->jsonl);
  if (m->events) fclose(m->events);
  *m = (esp_metrics){0};
}

/* JSON has no NaN: null. */
static void number(esp_strbuf *b, const char *key, double v) {
  if (isfinite(v))
    esp_strbuf_printf(b, ",\"%s\":%.9g", key, v);
  else
    esp_strbuf_printf(b, ",\"%s\":null", key);
}

static esp_status line(esp_metrics *m, esp_strbuf *b) {
  esp_status st = ESP_OK;
  esp_strbuf_puts(b, "}\n");
  if (b->failed)
    st = ESP_ERR_MEMORY;
  else if (m->jsonl && (fwrite(b->data, 1, b->len, m->jsonl) != b->len || fflush(m->jsonl) != 0))
    st = esp_fail(ESP_ERR_DATA, "metrics.jsonl: %s", strerror(errno));
  esp_strbuf_deinit(b);
  return st;
}

static esp_status scalar(esp_metrics *m, int64_t step, const char *name, double v) {
  unsigned char rec[192];
  size_t n = esp_tb_scalar(wall(), step, name, (float)v, rec);
  if (fwrite(rec, 1, n, m->events) != n) return esp_fail(ESP_ERR_DATA, "event file: %s", strerror(errno));
  return ESP_OK;
}

static esp_status flush_events(esp_metrics *m) {
  return fflush(m->events) == 0 ? ESP_OK : esp_fail(ESP_ERR_DATA, "event file: %s", strerror(errno));
}

esp_status esp_metrics_step(esp_metrics *m, const esp_event *e) {
  if (m->jsonl) {
    esp_strbuf b;
    esp_strbuf_init(&b);
    esp_strbuf_printf(&b, "{\"step\":%lld,\"task\":", (long long)e->step);
    esp_strbuf_json(&b, e->task, strlen(e->task));
    esp_strbuf_printf(&b, ",\"task_step\":%lld,\"tokens\":%lld", (long long)e->task_step, (long long)e->tokens);
    number(&b, "epoch", e->epoch);
    number(&b, "loss", e->loss);
    number(&b, "accuracy", e->accuracy);
    number(&b, "lr", e->lr);
    number(&b, "grad_norm", e->grad_norm);
    number(&b, "trained_tokens", e->trained_tokens);
    number(&b, "seconds", e->step_seconds);
    number(&b, "tokens_per_second", e->tokens_per_second);
    number(&b, "memory_peak", (double)e->memory_peak);
    if (e->penalty != 0) number(&b, "penalty", e->penalty);
    if (e->rank_budget > 0)
      esp_strbuf_printf(&b, ",\"ranks_kept\":%lld,\"rank_budget\":%lld", (long long)e->ranks_kept,
                        (long long)e->rank_budget);
    ESP_TRY(line(m, &b));
  }
  if (!m->events) return ESP_OK;
  ESP_TRY(scalar(m, e->step, "train/loss", e->loss));
  ESP_TRY(scalar(m, e->step, "train/accuracy", e->accuracy));
  ESP_TRY(scalar(m, e->step, "train/lr", e->lr));
  ESP_TRY(scalar(m, e->step, "train/grad_norm", e->grad_norm));
  if (e->penalty != 0) ESP_TRY(scalar(m, e->step, "train/penalty", e->penalty));
  if (e->rank_budget > 0) ESP_TRY(scalar(m, e->step, "train/ranks_kept", (double)e->ranks_kept));
  ESP_TRY(scalar(m, e->step, "perf/tokens_per_second", e->tokens_per_second));
  return flush_events(m);
}

esp_status esp_metrics_eval(esp_metrics *m, const esp_event *e) {
  if (m->jsonl) {
    esp_strbuf b;
    esp_strbuf_init(&b);
    esp_strbuf_printf(&b, "{\"eval\":");
    esp_strbuf_json(&b, e->set, strlen(e->set));
    esp_strbuf_puts(&b, ",\"metric\":");
    esp_strbuf_json(&b, e->metric, strlen(e->metric));
    number(&b, "score", e->score);
    if (e->has_malformed) number(&b, "malformed", e->malformed);
    esp_strbuf_printf(&b, ",\"step\":%lld,\"task\":", (long long)e->step);
    esp_strbuf_json(&b, e->task, strlen(e->task));
    ESP_TRY(line(m, &b));
  }
  if (!m->events) return ESP_OK;
  char name[65];
  snprintf(name, sizeof name, "eval/%.58s", e->set);
  ESP_TRY(scalar(m, e->step, name, e->score));
  snprintf(name, sizeof name, "malformed/%.50s", e->set);
  if (e->has_malformed) ESP_TRY(scalar(m, e->step, name, e->malformed));
  return flush_events(m);
}

static esp_status sync_one(FILE *f, int64_t *bytes) {
  *bytes = 0;
  if (!f) return ESP_OK;
  if (fflush(f) != 0 || fsync(fileno(f)) != 0) return esp_fail(ESP_ERR_DATA, "metrics: %s", strerror(errno));
  *bytes = ftello(f);
  return ESP_OK;
}

esp_status esp_metrics_sync(esp_metrics *m, int64_t *jsonl_bytes, int64_t *events_bytes) {
  ESP_TRY(sync_one(m->jsonl, jsonl_bytes));
  return sync_one(m->events, events_bytes);
}
