/* export.c: `espalier export`: an adapter in another form. */
#include <string.h>

#include "cli/cli.h"

static const cli_option options[] = {
    {"adapter", "DIR", 'a', true, "PEFT adapter directory"},
    {"base", "DIR", 'b', true, "model directory"},
    {"out", "DIR", 'o', true, "adapter directory to write"},
    {"as", "KIND", 0, false, "lora: a plain LoRA, exactly where the rank allows, else by SVD with the error printed"},
    {"rank", "R", 'r', false, "rank of the LoRA (default: the exact one, where the kind has one)"},
    {"for", "PROGRAM", 0, false, "vllm: a plain LoRA of one rank and one scale, and nothing that vLLM refuses"},
};

static int export(cli_args *a) {
  esp_export_options o = {.base = cli_value(a, "base"),
                          .adapter = cli_value(a, "adapter"),
                          .out = cli_value(a, "out"),
                          .as = cli_value(a, "as"),
                          .target = cli_value(a, "for")};
  esp_extract_result r = {0};
  if (!cli_integer(a, "rank", 0, 65536, &o.rank)) return ESP_ERR_RECIPE;
  if (o.as && strcmp(o.as, "lora")) return cli_usage_error(a->verb, "--as: '%s' is not lora", o.as);
  if (o.target && strcmp(o.target, "vllm")) return cli_usage_error(a->verb, "--for: '%s' is not vllm", o.target);
  esp_status st = esp_export(&o, &r);
  if (st != ESP_OK) return cli_fail(st);
  if (a->json)
    printf("{\"sites\": %d, \"rank\": %lld, \"max_error\": %.9g, \"mean_error\": %.9g}\n", r.sites, (long long)r.rank,
           r.max_error, r.mean_error);
  else if (!a->quiet && r.rank == 0)
    printf("%s: written as it is\n", o.out);
  else if (!a->quiet)
    printf("%s: %d modules, rank %lld, relative error: mean %.3g, largest %.3g\n", o.out, r.sites, (long long)r.rank,
           r.mean_error, r.max_error);
  return 0;
}

const cli_verb cli_export = {"export",
                             NULL,
                             "",
                             0,
                             0,
                             false,
                             "write an adapter in another form",
                             "For other programs: as a plain LoRA, or checked against what vLLM loads.",
                             CLI_OPTIONS(options),
                             export};
