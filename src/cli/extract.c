/* extract.c: `espalier extract`: a LoRA from the difference of two models, or the difference stored small. */
#include <string.h>

#include "cli/cli.h"

static const cli_option options[] = {
    {"base", "DIR", 'b', true, "model directory"},
    {"tuned", "DIR", 't', true, "fine-tuned model directory of the same shape; with lowrank and 1bit also an adapter"},
    {"out", "DIR", 'o', true, "adapter directory to write, or directory of the stored difference"},
    {"as", "FORM", 0, false,
     "lora (default); lowrank: factors of every matrix; 1bit: signs and scales; both are inputs of merge --method"},
    {"energy", "E", 0, false, "lowrank: share of the squares of all matrices that is held (default 0.9)"},
    {"bits", "N", 0, false, "lowrank: bits of an entry, 8, 16 or 32 (default 16)"},
    {"per-matrix", NULL, 0, false, "1bit: one scale of each matrix, not of each row"},
    {"rank", "R", 'r', false, "rank (default 16)"},
    {"target", "WHAT", 0, false, "all-linear (default), comma-separated names, or a regular expression"},
};

static int extract(cli_args *a) {
  esp_extract_options o = {.base = cli_value(a, "base"),
                           .tuned = cli_value(a, "tuned"),
                           .out = cli_value(a, "out"),
                           .rank = 16,
                           .target = cli_value(a, "target")};
  esp_extract_result r = {0};
  int64_t bits = 0;
  static const char *const own[][2] = {
      {"rank", "lora"}, {"target", "lora"}, {"energy", "lowrank"}, {"bits", "lowrank"}, {"per-matrix", "1bit"}};
  o.as = cli_value(a, "as");
  for (size_t i = 0; i < sizeof own / sizeof own[0]; i++)
    if (cli_value(a, own[i][0]) && strcmp(own[i][1], o.as ? o.as : "lora") != 0)
      return cli_usage_error(a->verb, "--%s is for --as %s", own[i][0], own[i][1]);
  if (!cli_integer(a, "rank", 1, 65536, &o.rank) || !cli_number(a, "energy", 0, 1, &o.energy) ||
      !cli_integer(a, "bits", 8, 32, &bits))
    return ESP_ERR_RECIPE;
  if (cli_value(a, "energy") && o.energy == 0)
    return cli_usage_error(a->verb, "--energy: expected a number above 0 and at most 1, got 0");
  o.bits = (int)bits;
  o.per_matrix = cli_flag(a, "per-matrix");
  bool stored = o.as && strcmp(o.as, "lora") != 0;
  esp_status st = esp_extract(&o, &r);
  if (st != ESP_OK) return cli_fail(st);
  if (a->json && stored)
    printf("{\"tensors\": %d, \"rank\": %lld, \"max_error\": %.9g, \"mean_error\": %.9g, \"bytes\": %lld, "
           "\"full_bytes\": %lld}\n",
           r.sites, (long long)r.rank, r.max_error, r.mean_error, (long long)r.bytes, (long long)r.full_bytes);
  else if (a->json)
    printf("{\"sites\": %d, \"rank\": %lld, \"max_error\": %.9g, \"mean_error\": %.9g}\n", r.sites, (long long)r.rank,
           r.max_error, r.mean_error);
  else if (!a->quiet && stored)
    printf("%s: %d tensors in %.1f%% of the model's bytes, relative error: mean %.3g, largest %.3g\n", o.out, r.sites,
           100.0 * (double)r.bytes / (double)r.full_bytes, r.mean_error, r.max_error);
  else if (!a->quiet)
    printf("%s: %d modules, rank %lld, relative error of the truncation: mean %.3g, largest %.3g\n", o.out, r.sites,
           (long long)o.rank, r.mean_error, r.max_error);
  return 0;
}

const cli_verb cli_extract = {
    "extract",
    NULL,
    "",
    0,
    0,
    false,
    "make a LoRA from the difference of two models, or store the difference small",
    "Truncated singular value decomposition of (tuned - base), module by module; prints what the truncation loses.\n"
    "With --as lowrank or 1bit the difference of all tensors (docs/merging.md has the formats).",
    CLI_OPTIONS(options),
    extract};
