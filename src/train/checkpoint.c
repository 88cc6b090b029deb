#include "train/checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "io/file.h"
#include "io/json.h"
#include "io/safetensors.h"

#define FORMAT 1

/* ---- tensors ---- */

/* The flat buffer `which`: the masters (-1), a state of the optimizer, and behind those a state of the adapter kind. */
static int optim_states(const esp_engine *e) {
  return e->optim->kind->n_states;
}
static float *buffer(const esp_engine *e, int which) {
  int n = optim_states(e);
  return which < 0 ? e->adapter->params->master : which < n ? e->optim->state[which] : e->adapter->state[which - n];
}

/* The values of a parameter in a buffer, through the host. values: see esp_checkpoint_write. */
static void get_values(const esp_engine *e, const float *values, int which, int i, float *host) {
  const esp_params *ps = e->adapter->params;
  if (values) {
    memcpy(host, values + (which + 1) * ps->total + ps->list[i].offset, (size_t)ps->list[i].numel * sizeof *host);
    return;
  }
  if (which < 0) {
    esp_params_get(ps, i, host);
    return;
  }
  const esp_param *p = &ps->list[i];
  e->be->ops->download(e->be, host, buffer(e, which) + p->offset, p->numel * (int64_t)sizeof(float));
}
static void set_values(esp_engine *e, int which, int i, const float *host) {
  esp_params *ps = e->adapter->params;
  if (which < 0) {
    esp_params_set(ps, i, host);
    return;
  }
  const esp_param *p = &ps->list[i];
  e->be->ops->upload(e->be, buffer(e, which) + p->offset, host, p->numel * (int64_t)sizeof(float));
}

static int64_t largest_param(const esp_params *ps) {
  int64_t most = 1;
  for (int i = 0; i < ps->count; i++)
    if (ps->list[i].numel > most) most = ps->list[i].numel;
  return most;
}

/* The largest parameter, and the header of the file with the most tensors: a name and about 100 letters of each, as
 * text that grows by doubling, and what the writer knows of each. */
int64_t esp_checkpoint_bytes(const esp_engine *e) {
  const esp_params *ps = e->adapter->params;
  int64_t files = e->adapter->kind->n_states + optim_states(e), header = 0;
  for (int i = 0; i < ps->count; i++) header += (int64_t)strlen(ps->list[i].name) + 100;
  return esp_adapter_save_bytes(e->adapter) + 5 * (files > 1 ? files : 1) * header;
}

static char *tensor_name(const esp_engine *e, int which, int i) {
  const char *name = e->adapter->params->list[i].name;
  if (which < 0) return esp_mem_strdup(ESP_MEM_HOST, name);
  int n = optim_states(e);
  const char *state = which < n ? e->optim->kind->state_names[which] : e->adapter->kind->state_names[which - n];
  return esp_mem_printf(ESP_MEM_HOST, "%s.%s", state, name);
}

static esp_status write_tensors(const esp_engine *e, const float *values, const char *path, int first, int last) {
  esp_status st = ESP_OK;
  const esp_params *ps = e->adapter->params;
  esp_st_writer *w = NULL;
  char *name = NULL;
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)largest_param(ps) * sizeof *host);
  if (!host) return ESP_ERR_MEMORY;
  ESP_GOTO(esp_st_writer_create(path, &w));
  for (int pass = 0; pass < 2; pass++)
    for (int which = first; which < last; which++)
      for (int i = 0; i < ps->count; i++) {
        const esp_param *p = &ps->list[i];
        esp_mem_free(name);
        name = tensor_name(e, which, i);
        if (!name) ESP_GOTO(ESP_ERR_MEMORY);
        if (pass == 0) {
          ESP_GOTO(esp_st_writer_declare(w, name, ESP_F32, p->ndim, p->shape));
          continue;
        }
        get_values(e, values, which, i, host);
        ESP_GOTO(esp_st_writer_put(w, name, host, p->numel * (int64_t)sizeof(float)));
      }
  st = esp_st_writer_commit(w);
  w = NULL;
out:
  esp_st_writer_abort(w);
  esp_mem_free(name);
  esp_mem_free(host);
  return st;
}

static esp_status read_one(const esp_engine *e, const esp_st *f, int which, int i, float *host) {
  const esp_param *p = &e->adapter->params->list[i];
  char *name = tensor_name(e, which, i);
  if (!name) return ESP_ERR_MEMORY;
  const esp_st_entry *t = esp_st_find(f, name);
  esp_status st = ESP_OK;
  if (!t || t->dtype != ESP_F32 || t->bytes != p->numel * (int64_t)sizeof(float))
    st = esp_fail(ESP_ERR_DATA, "checkpoint: tensor '%s' is missing or has another size", name);
  else
    memcpy(host, t->data, (size_t)t->bytes);
  esp_mem_free(name);
  return st;
}

/* Rank 0 reads file `path`, all ranks end with its values. */
static esp_status read_tensors(esp_engine *e, const char *path, int first, int last) {
  esp_status st = ESP_OK;
  const esp_params *ps = e->adapter->params;
  esp_st *f = NULL;
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)largest_param(ps) * sizeof *host);
  if (!host) st = ESP_ERR_MEMORY;
  if (st == ESP_OK && e->comm->rank == 0) {
    st = esp_st_open(path, &f);
    if (st == ESP_OK && esp_st_count(f) != ps->count * (last - first))
      st = esp_fail(ESP_ERR_DATA, "%s: %d tensors, this run has %d", path, esp_st_count(f), ps->count * (last - first));
  }
  ESP_GOTO(esp_comm_agree(e->comm, st));
  for (int which = first; which < last; which++)
    for (int i = 0; i < ps->count; i++) {
      if (e->comm->rank == 0) st = read_one(e, f, which, i, host);
      ESP_GOTO(esp_comm_agree(e->comm, st));
      ESP_GOTO(e->comm->ops->broadcast(e->comm, host, (size_t)ps->list[i].numel * sizeof(float), 0));
      set_values(e, which, i, host);
    }
  st = esp_backend_sync(e->be);
out:
  esp_st_close(f);
  esp_mem_free(host);
  return st;
}

/* A whole file, read by rank 0, on every rank (zero-terminated). */
static esp_status read_everywhere(esp_comm *c, const char *path, char **text, size_t *n) {
  esp_status st = c->rank == 0 ? esp_file_read(path, text, n) : ESP_OK;
  ESP_TRY(esp_comm_agree(c, st));
  ESP_TRY(c->ops->broadcast(c, n, sizeof *n, 0));
  if (c->rank != 0 && !(*text = esp_mem_alloc(ESP_MEM_HOST, *n + 1))) st = ESP_ERR_MEMORY;
  ESP_TRY(esp_comm_agree(c, st));
  return c->ops->broadcast(c, *text, *n, 0);
}

/* Shapes and the kind's own state, before any value. */
static esp_status read_adapter(esp_engine *e, const char *path) {
  json_t *j = NULL;
  char *text = NULL;
  size_t n = 0;
  esp_status st = read_everywhere(e->comm, path, &text, &n);
  if (st == ESP_OK) st = esp_json_parse(text, n, path, &j);
  if (st == ESP_OK) st = esp_adapter_state_restore(e->adapter, j, path);
  json_decref(j);
  esp_mem_free(text);
  return esp_comm_agree(e->comm, st);
}

static esp_status read_strategies(esp_engine *e, const char *tensors, const char *json) {
  char *text[2] = {0};
  size_t n[2] = {0};
  esp_status st = read_everywhere(e->comm, tensors, &text[0], &n[0]);
  if (st == ESP_OK) st = read_everywhere(e->comm, json, &text[1], &n[1]);
  if (st == ESP_OK) st = esp_strategies_load(&e->strategies, text[0], n[0], text[1], n[1], json);
  esp_mem_free(text[0]);
  esp_mem_free(text[1]);
  return esp_comm_agree(e->comm, st);
}

esp_status esp_checkpoint_load(esp_engine *e, const char *path) {
  char file[ESP_PATH];
  int n = optim_states(e), own = e->adapter->kind->n_states;
  if (esp_adapter_has_state(e->adapter))
    ESP_TRY(read_adapter(e, esp_path_join(file, sizeof file, path, "adapter.json")));
  ESP_TRY(read_tensors(e, esp_path_join(file, sizeof file, path, "params.safetensors"), -1, 0));
  if (n > 0) ESP_TRY(read_tensors(e, esp_path_join(file, sizeof file, path, "optim.safetensors"), 0, n));
  if (own > 0) ESP_TRY(read_tensors(e, esp_path_join(file, sizeof file, path, "adapter.safetensors"), n, n + own));
  if (e->strategies.n == 0) return ESP_OK;
  char json[ESP_PATH];
  return read_strategies(e, esp_path_join(file, sizeof file, path, "strategy.safetensors"),
                         esp_path_join(json, sizeof json, path, "strategy.json"));
}

/* ---- state.json ---- */

static esp_status save_state(const esp_run_state *s, const esp_recipe *r, const esp_task_steps *tasks,
                             const char *path) {
  json_t *counts = json_array();
  for (int i = 0; i < r->n_tasks; i++)
    json_array_append_new(counts, json_pack("{s:s,s:I,s:I,s:I,s:I}", "name", r->tasks[i].name, "samples",
                                            (json_int_t)tasks[i].samples, "rows", (json_int_t)tasks[i].rows, "steps",
                                            (json_int_t)tasks[i].steps, "tokens", (json_int_t)tasks[i].tokens));
  json_t *j = json_pack(
      "{s:i,s:s,s:s,s:i,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:s,s:o}", "format", FORMAT, "recipe_hash",
      s->recipe_hash, "base_fingerprint", s->fingerprint, "ranks", (int)s->ranks, "seed", (json_int_t)r->seed, "task",
      (json_int_t)s->at.task, "task_step", (json_int_t)s->at.task_step, "epoch", (json_int_t)s->at.epoch, "epoch_step",
      (json_int_t)s->at.epoch_step, "step", (json_int_t)s->at.step, "optimizer_step", (json_int_t)s->optim_step,
      "loss_above", (json_int_t)s->watch.loss_above, "grad_above", (json_int_t)s->watch.grad_above, "metrics_bytes",
      (json_int_t)s->jsonl_bytes, "events_bytes", (json_int_t)s->events_bytes, "base", s->base, "tasks", counts);
  if (!j) return esp_fail_oom("state.json", 1024);
  json_object_set_new(j, "sets", json_integer(r->eval.n_sets));
  json_object_set_new(j, "backwards", json_integer((json_int_t)s->backwards));
  json_object_set_new(j, "last_loss", isfinite(s->last_loss) ? json_real(s->last_loss) : json_null());
  json_object_set_new(j, "best", s->has_best ? json_real(s->best) : json_null());
  esp_status st = esp_json_save(path, j, 0);
  json_decref(j);
  return st;
}

static esp_status check_counts(json_t *j, const esp_recipe *r, const esp_task_steps *tasks, const char *path) {
  json_t *counts = json_object_get(j, "tasks");
  if (!json_is_array(counts) || (int)json_array_size(counts) > r->n_tasks)
    return esp_fail(ESP_ERR_RECIPE, "%s: the run has %d tasks, the checkpoint %d", path, r->n_tasks,
                    (int)json_array_size(counts));
  for (int i = 0; i < (int)json_array_size(counts); i++) {
    json_t *c = json_array_get(counts, (size_t)i);
    int64_t samples = -1, rows = -1, steps = -1, tokens = -1;
    ESP_TRY(esp_json_i64(c, "samples", path, 1, &samples));
    ESP_TRY(esp_json_i64(c, "rows", path, 1, &rows));
    ESP_TRY(esp_json_i64(c, "steps", path, 1, &steps));
    ESP_TRY(esp_json_i64(c, "tokens", path, 1, &tokens));
    if (samples != tasks[i].samples || rows != tasks[i].rows || steps != tasks[i].steps || tokens != tasks[i].tokens)
      return esp_fail(ESP_ERR_DATA,
                      "%s: the data of task '%s' has changed since the checkpoint (%lld samples in %lld rows then, "
                      "%lld in %lld now)",
                      path, r->tasks[i].name, (long long)samples, (long long)rows, (long long)tasks[i].samples,
                      (long long)tasks[i].rows);
  }
  return ESP_OK;
}

static esp_status copy_str(json_t *j, const char *key, const char *path, char *out, size_t n) {
  const char *s = NULL;
  ESP_TRY(esp_json_str(j, key, path, 1, &s));
  if (strlen(s) >= n) return esp_fail(ESP_ERR_DATA, "%s: '%s' is too long", path, key);
  strcpy(out, s);
  return ESP_OK;
}

static esp_status load_state(const char *path, const esp_recipe *r, int ranks, const esp_task_steps *tasks,
                             esp_run_state *s) {
  esp_status st = ESP_OK;
  json_t *j = NULL;
  int64_t format = 0, saved_ranks = 0, sets = r->eval.n_sets;
  char hash[33];
  memset(s, 0, sizeof *s);
  ESP_TRY(esp_json_load(path, &j));
  ESP_GOTO(esp_json_i64(j, "format", path, 1, &format));
  if (format != FORMAT)
    ESP_GOTO(
        esp_fail(ESP_ERR_DATA, "%s: checkpoint format %lld, this program reads %d", path, (long long)format, FORMAT));
  ESP_GOTO(copy_str(j, "recipe_hash", path, s->recipe_hash, sizeof s->recipe_hash));
  ESP_GOTO(copy_str(j, "base_fingerprint", path, s->fingerprint, sizeof s->fingerprint));
  ESP_GOTO(copy_str(j, "base", path, s->base, sizeof s->base));
  ESP_GOTO(esp_json_i64(j, "task", path, 1, &s->at.task));
  ESP_GOTO(esp_json_i64(j, "sets", path, 0, &sets));
  int before = (int)json_array_size(json_object_get(j, "tasks"));
  esp_recipe_hash(r, hash);
  if (strcmp(hash, s->recipe_hash) && before < r->n_tasks) { /* tasks were added to a run that had finished */
    esp_recipe_hash_first(r, before, (int)sets, hash);
    s->appended = before;
    if (!strcmp(hash, s->recipe_hash) && s->at.task != before)
      ESP_GOTO(esp_fail(ESP_ERR_RECIPE, "%s: the run has not finished its %d tasks: resume it before others are added",
                        path, before));
  }
  if (strcmp(hash, s->recipe_hash))
    ESP_GOTO(esp_fail(ESP_ERR_RECIPE,
                      "%s: the checkpoint belongs to another recipe (hash %s, this one has %s): resume with the recipe "
                      "in the run directory",
                      path, s->recipe_hash, hash));
  ESP_GOTO(esp_json_i64(j, "ranks", path, 1, &saved_ranks));
  if (saved_ranks != ranks)
    ESP_GOTO(esp_fail(ESP_ERR_RECIPE, "%s: the checkpoint was written by %lld ranks, this run has %d", path,
                      (long long)saved_ranks, ranks));
  s->ranks = ranks;
  ESP_GOTO(check_counts(j, r, tasks, path));
  struct {
    const char *key;
    int64_t *value;
  } fields[] = {{"task", &s->at.task},
                {"task_step", &s->at.task_step},
                {"epoch", &s->at.epoch},
                {"epoch_step", &s->at.epoch_step},
                {"step", &s->at.step},
                {"optimizer_step", &s->optim_step},
                {"loss_above", &s->watch.loss_above},
                {"grad_above", &s->watch.grad_above},
                {"metrics_bytes", &s->jsonl_bytes},
                {"events_bytes", &s->events_bytes},
                {"backwards", &s->backwards}};
  for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
    ESP_GOTO(esp_json_i64(j, fields[i].key, path, 1, fields[i].value));
  if (s->at.task < 0 || s->at.task > r->n_tasks || s->at.task_step < 0)
    ESP_GOTO(esp_fail(ESP_ERR_DATA, "%s: the cursor is out of range", path));
  s->last_loss = NAN;
  s->best = NAN;
  ESP_GOTO(esp_json_f64(j, "last_loss", path, 0, &s->last_loss));
  ESP_GOTO(esp_json_f64(j, "best", path, 0, &s->best));
  s->has_best = !isnan(s->best);
out:
  json_decref(j);
  return st;
}

/* ---- manifest ---- */

static const char *const parts[] = {"params.safetensors",   "optim.safetensors",   "state.json",
                                    "matrix.json",          "adapter.safetensors", "adapter.json",
                                    "strategy.safetensors", "strategy.json"};
#define N_PARTS (sizeof parts / sizeof *parts)

static esp_status save_manifest(const char *dir) {
  esp_status st = ESP_OK;
  char path[ESP_PATH], hash[33];
  json_t *files = json_object(), *j = json_pack("{s:i,s:o}", "format", FORMAT, "files", files);
  if (!j) return esp_fail_oom("manifest.json", 1024);
  for (size_t i = 0; i < N_PARTS; i++) {
    struct stat info;
    if (stat(esp_path_join(path, sizeof path, dir, parts[i]), &info) != 0) continue;
    ESP_GOTO(esp_file_hash(path, hash));
    json_object_set_new(files, parts[i], json_pack("{s:I,s:s}", "bytes", (json_int_t)info.st_size, "xxh3_128", hash));
  }
  ESP_GOTO(esp_json_save(esp_path_join(path, sizeof path, dir, "manifest.json"), j, 0));
out:
  json_decref(j);
  return st;
}

esp_status esp_checkpoint_verify(const char *dir) {
  esp_status st = ESP_OK;
  char path[ESP_PATH], hash[33];
  json_t *j = NULL, *entry;
  const char *name, *want = NULL;
  esp_path_join(path, sizeof path, dir, "manifest.json");
  ESP_TRY(esp_json_load(path, &j));
  json_t *files = json_object_get(j, "files");
  if (!json_object_get(files, "state.json") || !json_object_get(files, "params.safetensors"))
    ESP_GOTO(esp_fail(ESP_ERR_DATA, "%s: lists no state", path));
  json_object_foreach(files, name, entry) {
    char file[ESP_PATH];
    ESP_GOTO(esp_json_str(entry, "xxh3_128", path, 1, &want));
    ESP_GOTO(esp_file_hash(esp_path_join(file, sizeof file, dir, name), hash));
    if (strcmp(hash, want)) ESP_GOTO(esp_fail(ESP_ERR_DATA, "%s: differs from its hash in manifest.json", file));
  }
out:
  json_decref(j);
  return st;
}

/* ---- directories ---- */

static char *folder(char out[ESP_PATH], const esp_recipe *r) {
  return esp_path_join(out, ESP_PATH, r->checkpoint.output_dir, "checkpoints");
}

/* step * 1024 + task for ordering; -1: not the name of a complete checkpoint. */
static int64_t order_of(const char *name) {
  long long step;
  int task = 0, used = 0;
  if (sscanf(name, "checkpoint-%lld%n", &step, &used) != 1 || step < 0) return -1;
  if (name[used] == '\0') return step * 1024;
  int more = 0;
  if (sscanf(name + used, "-task%d%n", &task, &more) != 1 || name[used + more] != '\0') return -1;
  return step * 1024 + task;
}

static int newest_first(const void *a, const void *b) {
  int64_t x = order_of(*(char *const *)a), y = order_of(*(char *const *)b);
  return x < y ? 1 : x > y ? -1 : 0;
}

/* Names in the folder, newest checkpoint first, everything else (order -1) at the end. */
static esp_status list(const char *dir, char ***names, int *n) {
  *names = NULL;
  *n = 0;
  DIR *d = opendir(dir);
  if (!d) return errno == ENOENT ? ESP_OK : esp_fail(ESP_ERR_DATA, "%s: %s", dir, strerror(errno));
  struct dirent *ent;
  esp_status st = ESP_OK;
  while (st == ESP_OK && (ent = readdir(d))) {
    if (!strcmp(ent->d_name, ".") || !strcmp(ent->d_name, "..")) continue;
    char **grown = realloc(*names, (size_t)(*n + 1) * sizeof *grown);
    if (grown) *names = grown;
    if (!grown || !(grown[*n] = strdup(ent->d_name)))
      st = esp_fail_oom("a directory listing", 256);
    else
      ++*n;
  }
  closedir(d);
  if (st == ESP_OK && *n > 0) qsort(*names, (size_t)*n, sizeof **names, newest_first);
  return st;
}

static void list_free(char **names, int n) {
  for (int i = 0; i < n; i++) free(names[i]);
  free(names);
}

esp_status esp_checkpoint_prune(const esp_recipe *r, int keep) {
  char dir[ESP_PATH], path[ESP_PATH], away[ESP_PATH + 16], **names;
  int n;
  esp_status st = list(folder(dir, r), &names, &n);
  for (int i = 0; st == ESP_OK && i < n; i++) {
    bool complete = order_of(names[i]) >= 0;
    if (complete && (keep <= 0 || i < keep)) continue;
    esp_path_join(path, sizeof path, dir, names[i]);
    if (complete) { /* out of the way in one move: a kill in the middle of removing must not leave half of one */
      snprintf(away, sizeof away, "%s.removed", path);
      if (rename(path, away) == 0)
        st = esp_remove_tree(away);
      else
        st = esp_fail(ESP_ERR_DATA, "%s: %s", path, strerror(errno));
    } else {
      st = esp_remove_tree(path);
    }
  }
  list_free(names, n);
  return st;
}

static esp_status save_adapter_state(const esp_engine *e, const char *path) {
  json_t *j = esp_adapter_state_json(e->adapter);
  if (!j) return esp_fail_oom("adapter.json", 1024);
  esp_status st = esp_json_save(path, j, 0);
  json_decref(j);
  return st;
}

esp_status esp_checkpoint_write(const esp_engine *e, const esp_run_state *s, const esp_task_steps *tasks,
                                const esp_matrix *matrix, const float *values, char path[ESP_PATH]) {
  char dir[ESP_PATH], name[64], staged[ESP_PATH] = "", file[ESP_PATH];
  esp_status st = ESP_OK;
  int n = snprintf(name, sizeof name, "checkpoint-%08lld", (long long)s->at.step);
  if (s->at.task_step == 0 && s->at.task > 0) snprintf(name + n, sizeof name - (size_t)n, "-task%d", (int)s->at.task);
  ESP_TRY(esp_mkdirs(folder(dir, e->r)));
  esp_path_join(path, ESP_PATH, dir, name);
  ESP_GOTO(esp_dir_stage(path, staged, sizeof staged));
  ESP_GOTO(write_tensors(e, values, esp_path_join(file, sizeof file, staged, parts[0]), -1, 0));
  if (e->optim->kind->n_states > 0)
    ESP_GOTO(write_tensors(e, values, esp_path_join(file, sizeof file, staged, parts[1]), 0, e->optim->kind->n_states));
  int n_optim = optim_states(e), own = e->adapter->kind->n_states;
  if (own > 0)
    ESP_GOTO(write_tensors(e, values, esp_path_join(file, sizeof file, staged, parts[4]), n_optim, n_optim + own));
  if (esp_adapter_has_state(e->adapter))
    ESP_GOTO(save_adapter_state(e, esp_path_join(file, sizeof file, staged, parts[5])));
  char json[ESP_PATH];
  ESP_GOTO(esp_strategies_save(&e->strategies, esp_path_join(file, sizeof file, staged, parts[6]),
                               esp_path_join(json, sizeof json, staged, parts[7])));
  ESP_GOTO(save_state(s, e->r, tasks, esp_path_join(file, sizeof file, staged, parts[2])));
  if (matrix) ESP_GOTO(esp_matrix_save(matrix, esp_path_join(file, sizeof file, staged, parts[3])));
  ESP_GOTO(save_manifest(staged));
  ESP_GOTO(esp_fsync_dir(staged));
  ESP_GOTO(esp_dir_commit(staged, path));
out:
  if (st != ESP_OK && staged[0]) {
    char why[1024];
    snprintf(why, sizeof why, "%s", esp_error_message());
    (void)esp_remove_tree(staged); /* frees the space of a full disk; the reason is what is reported */
    st = esp_fail(st, "%s not written (earlier checkpoints are intact): %s", name, why);
  }
  return st;
}

static esp_status read_matrix(const char *dir, esp_matrix *matrix) {
  char file[ESP_PATH];
  esp_matrix *saved = NULL;
  if (!matrix) return ESP_OK;
  ESP_TRY(esp_matrix_load(esp_path_join(file, sizeof file, dir, "matrix.json"), &saved));
  esp_status st = ESP_OK;
  if (saved->tasks > matrix->tasks || saved->sets > matrix->sets) /* fewer: tasks were added since */
    st = esp_fail(ESP_ERR_DATA, "%s: %d x %d scores, this run has %d x %d", file, saved->tasks, saved->sets,
                  matrix->tasks, matrix->sets);
  else
    esp_matrix_copy_cells(matrix, saved);
  esp_matrix_destroy(saved);
  return st;
}

esp_status esp_checkpoint_find(const esp_recipe *r, int ranks, const esp_task_steps *tasks, esp_run_state *s,
                               esp_matrix *matrix, char path[ESP_PATH], int *damaged) {
  char dir[ESP_PATH], file[ESP_PATH], **names;
  int n, found = -1;
  *damaged = 0;
  path[0] = '\0';
  esp_status st = list(folder(dir, r), &names, &n);
  for (int i = 0; st == ESP_OK && i < n && found < 0 && order_of(names[i]) >= 0; i++) {
    esp_path_join(path, ESP_PATH, dir, names[i]);
    if (esp_checkpoint_verify(path) == ESP_OK)
      found = i;
    else
      ++*damaged;
  }
  list_free(names, n);
  if (st != ESP_OK) return st;
  if (found < 0) {
    if (*damaged > 0) return esp_fail_context(ESP_ERR_DATA, "no usable checkpoint of %d, the last", *damaged);
    path[0] = '\0';
    return ESP_OK;
  }
  esp_error_clear();
  ESP_TRY(load_state(esp_path_join(file, sizeof file, path, "state.json"), r, ranks, tasks, s));
  return read_matrix(path, matrix);
}
