/* merge.c: `espalier merge`: adapters into the base. */
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"

static const cli_option options[] = {
    {"base", "DIR", 'b', true, "model directory"},
    {"adapter", "DIR[:W]", 'a', true, "PEFT adapter directory, with a weight (default 1); may be repeated, in order"},
    {"out", "DIR", 'o', true, "model directory to write; with --combine an adapter directory"},
    {"dtype", "TYPE", 0, false, "bf16, fp16 or fp32 (default: as stored)"},
    {"verify", "N", 0, false, "compare logits of merged and unmerged on N samples"},
    {"combine", "TYPE", 0, false,
     "make the adapters one LoRA: linear, svd, cat, ties, ties_svd, dare_ties, dare_linear, dare_ties_svd, "
     "dare_linear_svd, magnitude_prune or magnitude_prune_svd"},
    {"into-model", NULL, 0, false, "with --combine: merge that LoRA into the base"},
    {"density", "D", 0, false, "ties, dare, magnitude_prune: share of the entries that stay, above 0 and at most 1"},
    {"majority-sign", "METHOD", 0, false, "ties: total (default) or frequency"},
    {"seed", "N", 0, false, "dare: of the masks (default 0)"},
    {"rank", "R", 'r', false,
     "of the LoRA at most (default: what carries the combination; svd types: the largest rank)"},
};

static bool combination(cli_args *a, esp_merge_options *o) {
  static const char *const only[] = {"into-model", "density", "majority-sign", "seed", "rank"};
  int64_t seed = 0;
  for (size_t i = 0; !o->combine && i < sizeof only / sizeof only[0]; i++)
    if (cli_value(a, only[i]) || cli_flag(a, only[i])) {
      cli_usage_error(a->verb, "--%s is for --combine", only[i]);
      return false;
    }
  if (!cli_number(a, "density", 0, 1, &o->density) || !cli_integer(a, "seed", 0, INT64_MAX, &seed) ||
      !cli_integer(a, "rank", 1, 65536, &o->rank))
    return false;
  o->seed = (uint64_t)seed;
  o->into_model = cli_flag(a, "into-model");
  o->majority_sign = cli_value(a, "majority-sign");
  return true;
}

static void report(const cli_args *a, const esp_merge_options *o, const esp_merge_result *r) {
  bool model = !o->combine || o->into_model;
  if (a->json) {
    printf("{\"out\": ");
    cli_json_string(stdout, o->out);
    if (o->combine)
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
  if (o->combine)
    printf("%s: %d adapters as one LoRA of rank %lld on %d modules, relative error: mean %.3g, largest %.3g\n",
           o->combine, o->n_adapters, (long long)r->rank, r->sites, r->mean_error, r->max_error);
  if (model) printf("%s: %lld tensors, %lld changed\n", o->out, (long long)r->tensors, (long long)r->changed);
  if (o->verify)
    printf("verified on %lld rows: largest difference of logits %.3g (relative %.3g), same first choice %.2f%%\n",
           (long long)r->rows, r->max_abs, r->max_rel, 100 * r->top1_agreement);
}

static int merge(cli_args *a) {
  enum { MAX_ADAPTERS = 64 };
  const char *dirs[MAX_ADAPTERS];
  char *owned[MAX_ADAPTERS] = {0};
  double weights[MAX_ADAPTERS];
  int code = ESP_ERR_RECIPE;
  esp_merge_options o = {.base = cli_value(a, "base"),
                         .out = cli_value(a, "out"),
                         .dtype = cli_value(a, "dtype"),
                         .combine = cli_value(a, "combine")};
  esp_merge_result r = {0};
  o.n_adapters = cli_values(a, "adapter", dirs, MAX_ADAPTERS);
  for (int i = 0; i < o.n_adapters; i++) {
    if (!cli_weighted(a->verb, dirs[i], &owned[i], &weights[i])) goto out;
    dirs[i] = owned[i];
  }
  if (o.dtype && strcmp(o.dtype, "bf16") && strcmp(o.dtype, "fp16") && strcmp(o.dtype, "fp32")) {
    cli_usage_error(a->verb, "--dtype: '%s' is not one of bf16, fp16, fp32", o.dtype);
    goto out;
  }
  if (!cli_integer(a, "verify", 0, 1000000, &o.verify) || !combination(a, &o)) goto out;
  o.adapters = dirs;
  o.adapter_weights = weights;
  esp_status st = esp_merge(&o, &r);
  if (st != ESP_OK) {
    code = cli_fail(st);
    goto out;
  }
  code = 0;
  report(a, &o, &r);
out:
  for (int i = 0; i < MAX_ADAPTERS; i++) free(owned[i]);
  return code;
}

const cli_verb cli_merge = {
    "merge",
    NULL,
    "",
    0,
    0,
    false,
    "merge adapters into the base: a model directory; or into one adapter",
    "Computes in fp32 from the stored weights and rounds once, shard by shard. The target folder appears complete or\n"
    "not at all. With --combine the adapters are first made one LoRA, by a combination of PEFT's add_weighted_adapter\n"
    "(docs/adapters.md has what each computes).",
    CLI_OPTIONS(options),
    merge};
