/* merge.c: `espalier merge`: adapters into the base; models and adapters into one by a method. */
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"

enum { MOST = 64 }; /* inputs */

static const cli_option options[] = {
    {"base", "DIR", 'b', true, "model directory"},
    {"adapter", "DIR[:W]", 'a', false, "PEFT adapter directory, with a weight (default 1); may be repeated, in order"},
    {"models", "DIR[:W]...", 'm', false,
     "with --method: model directories, adapters or stored differences (extract --as) against the base, in order"},
    {"out", "DIR", 'o', true, "model directory to write; with --combine an adapter directory"},
    {"dtype", "TYPE", 0, false, "bf16, fp16 or fp32 (default: as stored)"},
    {"verify", "N", 0, false, "compare logits of merged and unmerged adapters on N samples"},
    {"method", "NAME", 0, false,
     "one model of all inputs: linear, task_arithmetic, magnitude_prune, ties, dare_linear, dare_ties, breadcrumbs, "
     "breadcrumbs_ties, magmax, lines, opcm, model_stock, mwa, slerp or nuslerp"},
    {"combine", "NAME", 0, false,
     "one LoRA of all adapters: PEFT's linear, svd, cat, ties, ties_svd, dare_ties, dare_linear, dare_ties_svd, "
     "dare_linear_svd, magnitude_prune, magnitude_prune_svd, or another method"},
    {"into-model", NULL, 0, false, "with --combine: merge that LoRA into the base"},
    {"weight", "W,...", 0, false, "one weight for all inputs or one each"},
    {"density", "D,...", 0, false,
     "ties, dare, breadcrumbs, magnitude_prune: share of the entries that stay, above 0 and at most 1; one or one "
     "each"},
    {"lambda", "L", 0, false, "factor of the merged change (default 1)"},
    {"gamma", "G", 0, false, "breadcrumbs: share of the largest entries that leave (default 0.01)"},
    {"t", "T", 0, false, "slerp, nuslerp: from 0, the first, to 1, the second"},
    {"alpha", "A", 0, false, "opcm: share of the spectrum that is closed to later tasks (default 0.5)"},
    {"lines", "A[,B]", 0, false, "block l of L is multiplied by A + B l/(L-1), the rest by A (default B: 1 - A)"},
    {"metrics", "M,...", 0, false, "mwa: the metric of each input"},
    {"better", "WHICH", 0, false, "mwa: higher (default) or lower metrics are better"},
    {"power", "P", 0, false, "mwa: weights are metrics to this power (default 1)"},
    {"rescale", "HOW", 0, false, "dare: inverse (of the density, default), l1 (keeps the norm) or none"},
    {"normalize", "YES", 0, false, "yes or no: divide by the weights (default: as the method does)"},
    {"majority-sign", "METHOD", 0, false, "ties: total (default) or frequency"},
    {"seed", "N", 0, false, "dare: of the masks (default 0)"},
    {"rank", "R", 'r', false,
     "of the LoRA at most (default: what carries the combination; of those that are cut the largest rank)"},
};

typedef struct request {
  esp_merge_options o;
  esp_merge_method method;
  const char *dirs[MOST];
  char *owned[MOST];
  double weights[MOST], density[MOST], metrics[MOST];
  int n;
} request;

/* Numbers separated by commas. */
static bool numbers(cli_args *a, const char *option, double min, double max, double *out, int *n) {
  const char *text = cli_value(a, option);
  *n = 0;
  for (const char *p = text; p; p = *p == ',' ? p + 1 : NULL) {
    char *end;
    double v = strtod(p, &end);
    if (end == p || *p == ' ' || (*end && *end != ',') || !(v >= min && v <= max)) {
      cli_usage_error(a->verb, "--%s: expected a number from %g to %g, got '%.*s'", option, min, max,
                      (int)strcspn(p, ","), p);
      return false;
    }
    if (*n == MOST) {
      cli_usage_error(a->verb, "--%s: more than %d numbers", option, MOST);
      return false;
    }
    out[(*n)++] = v;
    p = end;
  }
  return true;
}

static bool only_for_methods(cli_args *a) {
  static const char *const options_of[] = {"into-model", "weight", "density", "lambda",       "gamma", "t",
                                           "alpha",      "lines",  "metrics", "better",       "power", "rescale",
                                           "normalize",  "seed",   "rank",    "majority-sign"};
  for (size_t i = 0; i < sizeof options_of / sizeof options_of[0]; i++)
    if (cli_value(a, options_of[i])) {
      cli_usage_error(a->verb, "--%s is for --method and --combine", options_of[i]);
      return false;
    }
  return true;
}

static bool method(cli_args *a, request *r) {
  esp_merge_method *m = &r->method;
  const char *name = cli_value(a, "method"), *combine = cli_value(a, "combine"), *normalize = cli_value(a, "normalize");
  int64_t seed = 0;
  double lines[MOST];
  int n_lines, n_weights;
  if (name && combine)
    return cli_usage_error(a->verb, "--method makes a model and --combine an adapter: give one"), false;
  if (!name && !combine) return only_for_methods(a);
  *m = (esp_merge_method)ESP_MERGE_METHOD;
  m->name = name ? name : combine;
  if (!numbers(a, "weight", -1e6, 1e6, r->weights, &n_weights) ||
      !numbers(a, "density", 0, 1, r->density, &m->n_density) ||
      !numbers(a, "metrics", 0, 1e30, r->metrics, &m->n_metrics) || !numbers(a, "lines", -1e6, 1e6, lines, &n_lines) ||
      !cli_number(a, "lambda", -1e6, 1e6, &m->lambda) || !cli_number(a, "gamma", 0, 1, &m->gamma) ||
      !cli_number(a, "t", 0, 1, &m->t) || !cli_number(a, "alpha", 0, 1, &m->alpha) ||
      !cli_number(a, "power", 0, 1e6, &m->power) || !cli_integer(a, "seed", 0, INT64_MAX, &seed) ||
      !cli_integer(a, "rank", 1, 65536, &r->o.rank))
    return false;
  if (n_lines > 2) return cli_usage_error(a->verb, "--lines: expected alpha, or alpha and beta"), false;
  if (n_lines > 0) m->lines_alpha = lines[0];
  if (n_lines > 1) m->lines_beta = lines[1];
  if (n_weights > 1 && n_weights != r->n)
    return cli_usage_error(a->verb, "--weight: %d weights for %d inputs: give one, or one each", n_weights, r->n),
           false;
  if (n_weights > 0 && r->o.weights)
    return cli_usage_error(a->verb, "weights stand both in --weight and behind a directory"), false;
  for (int i = 1; n_weights == 1 && i < r->n; i++) r->weights[i] = r->weights[0];
  if (n_weights > 0) r->o.weights = r->weights;
  if (normalize && strcmp(normalize, "yes") && strcmp(normalize, "no"))
    return cli_usage_error(a->verb, "--normalize: '%s' is neither yes nor no", normalize), false;
  if (normalize) m->normalize = strcmp(normalize, "yes") == 0;
  m->density = r->density;
  m->metrics = r->metrics;
  m->better = cli_value(a, "better");
  m->rescale = cli_value(a, "rescale");
  m->majority = cli_value(a, "majority-sign");
  m->seed = (uint64_t)seed;
  r->o.method = m;
  r->o.as_adapter = combine != NULL;
  r->o.into_model = cli_flag(a, "into-model");
  if (r->o.into_model && !combine) return cli_usage_error(a->verb, "--into-model is for --combine"), false;
  return true;
}

/* `--models A B C`: the first is the option's value, the others come as arguments. */
static bool inputs(cli_args *a, request *r) {
  const char *given[MOST];
  bool weighted = false;
  int adapters = cli_values(a, "adapter", given, MOST),
      models = cli_values(a, "models", given + adapters, MOST - adapters);
  r->n = adapters + models;
  if (models && adapters) return cli_usage_error(a->verb, "--models takes adapters too: name all inputs there"), false;
  if (models > 1 && a->n_positional)
    return cli_usage_error(a->verb, "--models stands more than once and '%s' alone: the order is not clear",
                           a->positional[0]),
           false;
  if (a->n_positional && !models) return cli_usage_error(a->verb, "unexpected argument '%s'", a->positional[0]), false;
  if (models && !cli_value(a, "method"))
    return cli_usage_error(a->verb, "--models is for --method; adapters are named by --adapter"), false;
  if (r->n + a->n_positional > MOST) return cli_usage_error(a->verb, "more than %d inputs", MOST), false;
  for (int i = 0; i < a->n_positional; i++) given[r->n++] = a->positional[i];
  if (r->n == 0) {
    const char *what = cli_value(a, "method") ? "--models DIR..." : "--adapter DIR";
    return cli_usage_error(a->verb, "%s is missing", what), false;
  }
  for (int i = 0; i < r->n; i++) {
    if (!cli_weighted(a->verb, given[i], &r->owned[i], &r->weights[i])) return false;
    r->dirs[i] = r->owned[i];
    weighted |= strcmp(given[i], r->owned[i]) != 0;
  }
  r->o.inputs = r->dirs;
  r->o.n_inputs = r->n;
  r->o.weights = weighted ? r->weights : NULL;
  return true;
}

static void report(const cli_args *a, const esp_merge_options *o, const esp_merge_result *r) {
  bool model = !o->as_adapter || o->into_model;
  if (a->json) {
    printf("{\"out\": ");
    cli_json_string(stdout, o->out);
    if (o->as_adapter)
      printf(", \"sites\": %d, \"rank\": %lld, \"max_error\": %.9g, \"mean_error\": %.9g", r->sites, (long long)r->rank,
             r->max_error, r->mean_error);
    if (model) printf(", \"tensors\": %lld, \"changed\": %lld", (long long)r->tensors, (long long)r->changed);
    if (o->verify)
      printf(", \"max_abs\": %.9g, \"max_rel\": %.9g, \"top1_agreement\": %.9g", r->max_abs, r->max_rel,
             r->top1_agreement);
    puts("}");
    return;
  }
  if (a->quiet) return;
  if (o->as_adapter)
    printf("%s: %d adapters as one LoRA of rank %lld on %d modules, relative error: mean %.3g, largest %.3g\n",
           o->method->name, o->n_inputs, (long long)r->rank, r->sites, r->mean_error, r->max_error);
  else if (o->method)
    printf("%s of %d inputs, %.3g%% of the changes lost to rounding\n", o->method->name, o->n_inputs,
           100 * r->lost_share);
  if (model) printf("%s: %lld tensors, %lld changed\n", o->out, (long long)r->tensors, (long long)r->changed);
  if (o->verify)
    printf("verified on %lld rows: largest difference of logits %.3g (relative %.3g), same first choice %.2f%%\n",
           (long long)r->rows, r->max_abs, r->max_rel, 100 * r->top1_agreement);
}

static int merge(cli_args *a) {
  request r = {.o = {.base = cli_value(a, "base"), .out = cli_value(a, "out"), .dtype = cli_value(a, "dtype")}};
  esp_merge_result result = {0};
  int code = ESP_ERR_RECIPE;
  const char *dtype = r.o.dtype;
  if (!inputs(a, &r)) goto out;
  if (dtype && strcmp(dtype, "bf16") && strcmp(dtype, "fp16") && strcmp(dtype, "fp32")) {
    cli_usage_error(a->verb, "--dtype: '%s' is not one of bf16, fp16, fp32", dtype);
    goto out;
  }
  if (!cli_integer(a, "verify", 0, 1000000, &r.o.verify) || !method(a, &r)) goto out;
  esp_status st = esp_merge(&r.o, &result);
  if (st != ESP_OK) {
    code = cli_fail(st);
    goto out;
  }
  code = 0;
  report(a, &r.o, &result);
out:
  for (int i = 0; i < MOST; i++) free(r.owned[i]);
  return code;
}

const cli_verb cli_merge = {
    "merge",
    NULL,
    "[DIR...]",
    0,
    MOST,
    false,
    "merge adapters into the base, or models and adapters into one by a method",
    "Computes in fp32 from the stored weights and rounds once, tensor by tensor and shard by shard. The target folder\n"
    "appears complete or not at all. --method makes a model of several models or adapters (docs/merging.md has the\n"
    "formulas); --combine makes the adapters one LoRA, by a combination of PEFT's add_weighted_adapter or by a method\n"
    "(docs/adapters.md has what PEFT's compute).",
    CLI_OPTIONS(options),
    merge};
