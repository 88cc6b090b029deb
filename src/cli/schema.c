/* schema.c: `espalier schema`: every key of a recipe. */
#include "cli/cli.h"

static const cli_option options[] = {
    {"format", "FORMAT", 'f', false, "text (default), json (JSON Schema) or markdown"},
};

static int schema(cli_args *a) {
  const char *format = cli_value(a, "format");
  char *text = esp_schema(format ? format : a->json ? "json" : "text");
  return cli_print_text(text ? ESP_OK : ESP_ERR_RECIPE, text);
}

const cli_verb cli_schema = {"schema",
                             NULL,
                             "",
                             0,
                             0,
                             false,
                             "list every key of a recipe",
                             "Types, defaults, ranges, meanings and other accepted spellings.",
                             CLI_OPTIONS(options),
                             schema};
