/* extract.c: `espalier extract`: a LoRA from the difference of two models. */
#include "cli/cli.h"

static const cli_option options[] = {
    {"base", "DIR", 'b', true, "model directory"},
    {"tuned", "DIR", 't', true, "fine-tuned model directory of the same shape"},
    {"out", "DIR", 'o', true, "adapter directory to write"},
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
  if (!cli_integer(a, "rank", 1, 65536, &o.rank)) return ESP_ERR_RECIPE;
  esp_status st = esp_extract(&o, &r);
  if (st != ESP_OK) return cli_fail(st);
  if (a->json)
    printf("{\"sites\": %d, \"rank\": %lld, \"max_error\": %.9g, \"mean_error\": %.9g}\n", r.sites, (long long)r.rank,
           r.max_error, r.mean_error);
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
    "make a LoRA from the difference of two models",
    "Truncated singular value decomposition of (tuned - base), module by module; prints what the truncation loses.",
    CLI_OPTIONS(options),
    extract};
