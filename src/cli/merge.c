/* merge.c: `espalier merge`: adapters into the base. */
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"

static const cli_option options[] = {
    {"base", "DIR", 'b', true, "model directory"},
    {"adapter", "DIR[:W]", 'a', true, "PEFT adapter directory, with a weight (default 1); may be repeated, in order"},
    {"out", "DIR", 'o', true, "model directory to write"},
    {"dtype", "TYPE", 0, false, "bf16, fp16 or fp32 (default: as stored)"},
    {"verify", "N", 0, false, "compare logits of merged and unmerged on N samples"},
};

static int merge(cli_args *a) {
  enum { MAX_ADAPTERS = 64 };
  const char *dirs[MAX_ADAPTERS];
  char *owned[MAX_ADAPTERS] = {0};
  double weights[MAX_ADAPTERS];
  int code = ESP_ERR_RECIPE;
  esp_merge_options o = {.base = cli_value(a, "base"), .out = cli_value(a, "out"), .dtype = cli_value(a, "dtype")};
  esp_merge_result r = {0};
  o.n_adapters = cli_values(a, "adapter", dirs, MAX_ADAPTERS);
  for (int i = 0; i < o.n_adapters; i++) {
    weights[i] = 1;
    const char *colon = strrchr(dirs[i], ':');
    char *end;
    double w = colon && colon[1] ? strtod(colon + 1, &end) : 0;
    if (!colon || !colon[1] || *end) continue;
    if (!(w > -1e6 && w < 1e6)) {
      cli_usage_error(a->verb, "--adapter: '%s' is not a weight", colon + 1);
      goto out;
    }
    weights[i] = w;
    owned[i] = strndup(dirs[i], (size_t)(colon - dirs[i]));
    if (!owned[i]) goto out;
    dirs[i] = owned[i];
  }
  if (o.dtype && strcmp(o.dtype, "bf16") && strcmp(o.dtype, "fp16") && strcmp(o.dtype, "fp32")) {
    cli_usage_error(a->verb, "--dtype: '%s' is not one of bf16, fp16, fp32", o.dtype);
    goto out;
  }
  if (!cli_integer(a, "verify", 0, 1000000, &o.verify)) goto out;
  o.adapters = dirs;
  o.adapter_weights = weights;
  esp_status st = esp_merge(&o, &r);
  if (st != ESP_OK) {
    code = cli_fail(st);
    goto out;
  }
  code = 0;
  if (a->json) {
    printf("{\"out\": ");
    cli_json_string(stdout, o.out);
    printf(", \"tensors\": %lld, \"changed\": %lld", (long long)r.tensors, (long long)r.changed);
    if (o.verify)
      printf(", \"max_abs\": %.9g, \"max_rel\": %.9g, \"top1_agreement\": %.9g", r.max_abs, r.max_rel,
             r.top1_agreement);
    puts("}");
  } else if (!a->quiet) {
    printf("%s: %lld tensors, %lld changed\n", o.out, (long long)r.tensors, (long long)r.changed);
    if (o.verify)
      printf("verified on %lld rows: largest difference of logits %.3g (relative %.3g), same first choice %.2f%%\n",
             (long long)r.rows, r.max_abs, r.max_rel, 100 * r.top1_agreement);
  }
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
    "merge adapters into the base: a model directory",
    "Computes in fp32 from the stored weights and rounds once, shard by shard. The target folder appears complete or\n"
    "not at all.",
    CLI_OPTIONS(options),
    merge};
