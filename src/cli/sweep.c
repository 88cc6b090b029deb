/* sweep.c: `espalier sweep`: a recipe (or several) over values, orders of tasks and seeds. */
#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "cli/sweep.h"

static const cli_option options[] = {
    {"out", "DIR", 'o', true, "the sweep's folder: one run folder per run, sweep.json, sweep.md"},
    {"seeds", "N,N,...", 's', false, "a run for each seed (default: the recipe's)"},
    {"order", "TASK,TASK,...", 0, false,
     "a run for each order of the tasks; may be repeated; NAME=TASK,... gives it a name"},
    {"set", "KEY=A|KEY=B", 0, false,
     "a run for each alternative; 'NAME: KEY=A; KEY2=C | NAME2:' names them; several --set are crossed; without | it "
     "holds for all runs"},
    {"jobs", "N", 'j', false, "runs at a time (default 1)"},
    {"threads", "N", 't', false, "threads of all runs together (default: the processors)"},
    {"device", "NAME,...", 'd', false, "auto, cpu, cuda or cuda:N; with several, jobs take them in turn"},
    {"dry-run", NULL, 0, false, "list the runs and whether they are there"},
};

enum { MAX_AXES = 16, MAX_ALTERNATIVES = 64, MAX_ORDERS = 256, MAX_SEEDS = 1024, MAX_PARTS = 16 };

typedef struct alternative {
  char label[SWEEP_LABEL];
  const char *overrides[MAX_PARTS];
  int n;
} alternative;

typedef struct axis {
  char *text, *key; /* key: of the first alternative */
  alternative *of;
  int n;
} axis;

typedef struct spec { /* everything lives as long as the program */
  axis axes[MAX_AXES];
  int n_axes;
  struct {
    char label[SWEEP_LABEL];
    char *override; /* continual.order=[...]; NULL: as the recipe says */
  } orders[MAX_ORDERS];
  int n_orders;
  char *seed_text, *seeds[MAX_SEEDS]; /* seed=N */
  int n_seeds;
} spec;

static char *trim(char *s) {
  while (isspace((unsigned char)*s)) s++;
  size_t n = strlen(s);
  while (n && isspace((unsigned char)s[n - 1])) s[--n] = 0;
  return s;
}

/* "label: a=1; b=2", "a=1", or "1" with the key of the first alternative. */
static bool take_alternative(const cli_args *a, char *text, const char *first_key, alternative *out) {
  char *colon = strchr(text, ':'), *eq = strchr(text, '=');
  bool named = colon && (!eq || colon < eq);
  *out = (alternative){0};
  if (named) {
    *colon = 0;
    snprintf(out->label, sizeof out->label, "%s", trim(text));
    text = trim(colon + 1);
    if (!out->label[0]) return cli_usage_error(a->verb, "--set: a name is missing before ':'"), false;
  }
  for (char *part = strtok(text, ";"); part; part = strtok(NULL, ";")) {
    part = trim(part);
    if (!*part) continue;
    if (!strchr(part, '=') && !named && first_key) {
      char *whole = malloc(strlen(first_key) + strlen(part) + 2);
      if (!whole) return false;
      sprintf(whole, "%s=%s", first_key, part);
      part = whole;
    }
    if (!strchr(part, '=')) return cli_usage_error(a->verb, "--set: expected KEY=VALUE, got '%s'", part), false;
    if (out->n == MAX_PARTS) return cli_usage_error(a->verb, "--set: more than %d keys", MAX_PARTS), false;
    if (!named)
      snprintf(out->label + strlen(out->label), sizeof out->label - strlen(out->label), "%s%s", out->n ? ";" : "",
               part);
    out->overrides[out->n++] = part;
  }
  if (!named && out->n == 0)
    return cli_usage_error(a->verb, "--set: an alternative is empty (NAME: gives one that changes nothing a name)"),
           false;
  return true;
}

static bool take_axis(const cli_args *a, const char *text, axis *out) {
  out->text = strdup(text);
  out->of = calloc(MAX_ALTERNATIVES, sizeof *out->of);
  if (!out->text || !out->of) return false;
  for (char *at = out->text; at;) {
    char *bar = strchr(at, '|');
    if (bar) *bar = 0;
    if (out->n == MAX_ALTERNATIVES)
      return cli_usage_error(a->verb, "--set: more than %d alternatives", MAX_ALTERNATIVES), false;
    if (!take_alternative(a, trim(at), out->key, &out->of[out->n])) return false;
    for (int i = 0; i < out->n; i++)
      if (!strcmp(out->of[i].label, out->of[out->n].label))
        return cli_usage_error(a->verb, "--set: '%s' stands twice", out->of[i].label), false;
    if (!out->key && out->of[out->n].n > 0) {
      out->key = strdup(out->of[out->n].overrides[0]);
      if (!out->key) return false;
      out->key[strcspn(out->key, "=")] = 0;
    }
    out->n++;
    at = bar ? bar + 1 : NULL;
  }
  return true;
}

static bool take_orders(const cli_args *a, spec *s) {
  const char *given[MAX_ORDERS];
  int n = cli_values(a, "order", given, MAX_ORDERS);
  for (int i = 0; i < n; i++) {
    const char *eq = strchr(given[i], '='), *names = eq ? eq + 1 : given[i];
    char *label = s->orders[i].label, *text = malloc(strlen(names) + 32);
    if (!text) return false;
    sprintf(text, "continual.order=[%s]", names);
    s->orders[i].override = text;
    if (strspn(names, " ,\t") == strlen(names) || strpbrk(names, "[]{}|"))
      return cli_usage_error(a->verb, "--order: expected names of tasks with commas, got '%s'", names), false;
    if (eq && eq != given[i])
      snprintf(label, SWEEP_LABEL, "%.*s", (int)(eq - given[i]), given[i]);
    else if (strlen(names) <= 32)
      snprintf(label, SWEEP_LABEL, "%s", names);
    else
      snprintf(label, SWEEP_LABEL, "order%d", i + 1);
    for (char *p = label; *p; p++)
      if (*p == ',') *p = '-';
    for (int k = 0; k < i; k++)
      if (!strcmp(s->orders[k].label, label))
        return cli_usage_error(a->verb, "--order: '%s' stands twice", label), false;
  }
  s->n_orders = n > 0 ? n : 1;
  return true;
}

static bool take_seeds(const cli_args *a, spec *s) {
  const char *text = cli_value(a, "seeds");
  s->seed_text = strdup(text ? text : "");
  if (!s->seed_text) return false;
  for (char *part = strtok(s->seed_text, ","); part; part = strtok(NULL, ",")) {
    char *end;
    part = trim(part);
    errno = 0;
    long long v = strtoll(part, &end, 10);
    if (!*part || *end || errno || v < 0)
      return cli_usage_error(a->verb, "--seeds: expected integers with commas, got '%s'", part), false;
    if (s->n_seeds == MAX_SEEDS) return cli_usage_error(a->verb, "--seeds: more than %d", MAX_SEEDS), false;
    char *override = malloc(32);
    if (!override) return false;
    sprintf(override, "seed=%lld", v);
    s->seeds[s->n_seeds++] = override;
    for (int i = 0; i + 1 < s->n_seeds; i++)
      if (!strcmp(s->seeds[i], override)) return cli_usage_error(a->verb, "--seeds: %lld stands twice", v), false;
  }
  if (text && s->n_seeds == 0) return cli_usage_error(a->verb, "--seeds: names none"), false;
  return true;
}

static bool take_spec(const cli_args *a, spec *s) {
  for (int i = 0; i < a->n_overrides; i++) {
    if (!strchr(a->overrides[i], '|')) continue;
    if (s->n_axes == MAX_AXES) return cli_usage_error(a->verb, "more than %d --set with |", MAX_AXES), false;
    if (!take_axis(a, a->overrides[i], &s->axes[s->n_axes++])) return false;
  }
  return take_orders(a, s) && take_seeds(a, s);
}

/* ---- the runs: every recipe and combination of alternatives, then orders, then seeds ---- */

/* Letters, digits, "._-"; anything else becomes one '_'. */
static void append_name(char *out, size_t n, const char *label) {
  size_t w = strlen(out);
  for (const char *p = label; *p && w + 1 < n; p++) {
    bool good = isalnum((unsigned char)*p) || strchr("._-", *p);
    if (good)
      out[w++] = *p;
    else if (w && out[w - 1] != '_')
      out[w++] = '_';
  }
  out[w] = 0;
}

static void place(sweep *s, sweep_run *r) {
  char name[3 * SWEEP_LABEL] = "", seed[32];
  append_name(name, sizeof name - 64, r->variant[0] == '.' ? "_" : "");
  append_name(name, sizeof name - 64, r->variant);
  if (*r->order) {
    append_name(name, sizeof name - 48, ".");
    append_name(name, sizeof name - 48, r->order);
  }
  snprintf(seed, sizeof seed, ".s%lld", (long long)r->seed);
  append_name(name, sizeof name, seed);
  size_t n = strlen(s->out);
  while (n > 1 && s->out[n - 1] == '/') n--;
  snprintf(r->dir, sizeof r->dir, "%.*s/%s", (int)n, s->out, name);
  for (int twin = 2, clash = 1; clash; twin++) { /* labels that differ in other characters only */
    clash = 0;
    for (sweep_run *k = s->runs; k < r; k++) clash |= !strcmp(k->dir, r->dir);
    if (clash) snprintf(r->dir, sizeof r->dir, "%.*s/%s.%d", (int)n, s->out, name, twin);
  }
}

/* Opens the run's recipe with everything that is set, so that what is wrong with any is said before one starts. */
static int look(sweep *s, sweep_run *r) {
  static const char *all[CLI_MAX_ARGS + SWEEP_OVERRIDES + 2];
  char output[SWEEP_PATH + 64];
  esp_job *job = NULL;
  int n = 0;
  for (int i = 0; i < s->args->n_overrides; i++)
    if (!strchr(s->args->overrides[i], '|')) all[n++] = s->args->overrides[i];
  for (int i = 0; i < r->n_overrides; i++) all[n++] = r->overrides[i];
  if (*r->dir) {
    snprintf(output, sizeof output, "checkpoint.output_dir='%s'", r->dir);
    all[n++] = output;
  }
  esp_status st = esp_job_open(r->recipe, all, n, &job);
  if (st == ESP_OK && *r->dir) st = esp_job_found(job, &r->found);
  if (st == ESP_OK && !*r->dir) {
    r->seed = (int64_t)esp_job_seed(job);
    if (!r->variant && !(r->variant = strdup(esp_job_name(job)))) st = ESP_ERR_MEMORY;
  }
  int code = st == ESP_OK ? 0 : cli_fail(st);
  esp_job_close(job);
  return code;
}

static int add_run(sweep *s, const spec *p, const char *recipe, const alternative *const *chosen, const char *variant,
                   int order, int seed) {
  if (s->n == SWEEP_MAX_RUNS) return cli_usage_error(s->args->verb, "more than %d runs", SWEEP_MAX_RUNS);
  sweep_run *r = &s->runs[s->n];
  *r = (sweep_run){.recipe = recipe, .variant = variant, .order = p->orders[order].label, .code = -1};
  for (int i = 0; i < p->n_axes; i++)
    for (int k = 0; k < chosen[i]->n; k++) {
      if (r->n_overrides + 2 >= SWEEP_OVERRIDES) return cli_usage_error(s->args->verb, "too many keys in one run");
      r->overrides[r->n_overrides++] = chosen[i]->overrides[k];
    }
  if (p->orders[order].override) r->overrides[r->n_overrides++] = p->orders[order].override;
  if (p->n_seeds > 0) r->overrides[r->n_overrides++] = p->seeds[seed];
  int code = look(s, r); /* seed, name */
  if (code) return code;
  place(s, r);
  s->n++;
  return look(s, r); /* what is in its folder */
}

/* "a/ewc.yaml" -> "ewc": what tells several recipes apart. */
static const char *file_label(const char *recipe, char out[SWEEP_LABEL]) {
  const char *slash = strrchr(recipe, '/'), *name = slash ? slash + 1 : recipe, *dot = strrchr(name, '.');
  int n = dot && dot > name ? (int)(dot - name) : (int)strlen(name);
  snprintf(out, SWEEP_LABEL, "%.*s", n, name);
  return out;
}

static int check_recipes(const sweep *s) {
  char a[SWEEP_LABEL], b[SWEEP_LABEL];
  for (int i = 0; i < s->args->n_positional; i++)
    for (int k = 0; k < i; k++)
      if (!strcmp(file_label(s->args->positional[i], a), file_label(s->args->positional[k], b)))
        return cli_usage_error(s->args->verb, "two recipes are called '%s'", a);
  return 0;
}

static int make_runs(sweep *s, const spec *p) {
  int recipes = s->args->n_positional, combinations = 1;
  for (int i = 0; i < p->n_axes; i++) combinations *= p->axes[i].n;
  for (int f = 0; f < recipes; f++)
    for (int c = 0; c < combinations; c++) {
      const alternative *chosen[MAX_AXES];
      const char *recipe = s->args->positional[f];
      char *variant = NULL, label[SWEEP_LABEL];
      for (int i = p->n_axes - 1, rest = c; i >= 0; rest /= p->axes[i--].n)
        chosen[i] = &p->axes[i].of[rest % p->axes[i].n];
      bool named = recipes > 1 || p->n_axes > 0;
      if (named && !(variant = calloc(MAX_AXES + 2, SWEEP_LABEL + 1))) return ESP_ERR_MEMORY;
      if (recipes > 1) strcat(variant, file_label(recipe, label));
      for (int i = 0; i < p->n_axes; i++) {
        if (*variant) strcat(variant, " ");
        strcat(variant, chosen[i]->label);
      }
      for (int o = 0; o < p->n_orders; o++)
        for (int k = 0; k < (p->n_seeds ? p->n_seeds : 1); k++) {
          int code = add_run(s, p, recipe, chosen, variant, o, k);
          if (code) return code;
          if (!variant) variant = (char *)(uintptr_t)s->runs[s->n - 1].variant;
        }
    }
  return 0;
}

/* ---- results ---- */

static esp_status report(const sweep *s, int json, char **text) {
  esp_run_place *places = calloc((size_t)s->n, sizeof *places);
  if (!places) return ESP_ERR_MEMORY;
  for (int i = 0; i < s->n; i++)
    places[i] = (esp_run_place){s->runs[i].dir, s->runs[i].variant, s->runs[i].order, s->runs[i].seed};
  esp_status st = esp_runs_compare(places, s->n, s->out, json, text);
  free(places);
  return st;
}

/* The table grows with the runs: a sweep that is stopped leaves what it has. */
static void after_run(sweep *s) {
  char *text = NULL;
  esp_status st = report(s, 0, &text);
  if (st != ESP_OK) (void)cli_fail(st);
  esp_free(text);
}

static int dry_run(const sweep *s) {
  static const char *const words[] = {"to train", "to resume", "finished"};
  for (int i = 0; i < s->n; i++) {
    printf("%s: %s:", s->runs[i].dir, words[s->runs[i].found]);
    printf(" %s", s->runs[i].recipe);
    for (int k = 0; k < s->runs[i].n_overrides; k++) printf(" %s", s->runs[i].overrides[k]);
    putchar('\n');
  }
  return 0;
}

static int split_work(sweep *s) {
  cpu_set_t cpus;
  const char *devices = cli_value(s->args, "device");
  int64_t threads = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
  s->jobs = 1;
  if (!cli_integer(s->args, "jobs", 1, 64, &s->jobs) || !cli_integer(s->args, "threads", 1, 4096, &threads))
    return ESP_ERR_RECIPE;
  if (s->jobs > 1 || cli_value(s->args, "threads")) s->threads = threads / s->jobs > 0 ? threads / s->jobs : 1;
  char *copy = devices ? strdup(devices) : NULL;
  for (char *d = copy ? strtok(copy, ",") : NULL; d && s->n_devices < 64; d = strtok(NULL, ","))
    s->devices[s->n_devices++] = trim(d);
  return 0;
}

static int run_sweep(cli_args *a) {
  static spec p; /* what they point to lives as long as the process */
  static sweep s;
  s.args = a, s.out = cli_value(a, "out");
  if (strpbrk(s.out, "'\n") || strlen(s.out) > SWEEP_PATH / 2 || !*s.out)
    return cli_usage_error(a->verb, "--out: '%.80s' cannot be used as a folder", s.out);
  int code = split_work(&s);
  if (code || !take_spec(a, &p)) return code ? code : ESP_ERR_RECIPE;
  s.runs = calloc(SWEEP_MAX_RUNS, sizeof *s.runs);
  if (!s.runs) return ESP_ERR_MEMORY;
  code = check_recipes(&s);
  if (code == 0) code = make_runs(&s, &p);
  if (code == 0 && cli_flag(a, "dry-run")) {
    code = dry_run(&s);
  } else if (code == 0) {
    char *text = NULL;
    esp_status st = report(&s, 0, &text); /* makes the folder */
    esp_free(text);
    text = NULL;
    code = st == ESP_OK ? sweep_train(&s, after_run) : cli_fail(st);
    if (st == ESP_OK) {
      st = report(&s, a->json, &text);
      int printed = cli_print_text(st, text);
      code = code ? code : printed;
    }
    if (code == ESP_ERR_INTERRUPTED) fputs("espalier sweep: stopped; the same command goes on\n", stderr);
  }
  return code;
}

const cli_verb cli_sweep = {
    "sweep",
    NULL,
    "RECIPE ... [key=value ...]",
    1,
    64,
    true,
    "train a recipe over values, orders of tasks and seeds, and compare",
    "Trains one run for each recipe, combination of --set, order and seed, each in a folder of its own below --out.\n"
    "Runs that have finished are kept, runs that were interrupted are resumed: the same command goes on where it "
    "stopped.\n"
    "At the end: mean and sample standard deviation of the scores, the differences to the first variant pair by pair\n"
    "(same order and seed), memory and time per step, as a table, sweep.md and sweep.json.",
    CLI_OPTIONS(options),
    run_sweep};
