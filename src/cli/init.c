/* init.c: `espalier init`: a commented recipe to start from. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"

static const cli_option options[] = {
    {"out", "FILE", 'o', false, "write there instead of the standard output; an existing file is kept"},
};

static int init(cli_args *a) {
  char *text = esp_init_recipe(a->n_positional ? a->positional[0] : "path/to/model");
  const char *out = cli_value(a, "out");
  if (!text || !out) return cli_print_text(text ? ESP_OK : ESP_ERR_MEMORY, text);
  int code = 0;
  FILE *f = fopen(out, "wx");
  if (!f) {
    code = cli_usage_error(a->verb, "%s: %s", out, strerror(errno));
  } else {
    bool good = fputs(text, f) >= 0;
    if (fclose(f) || !good) {
      fprintf(stderr, "espalier init: %s: %s\n", out, strerror(errno));
      unlink(out);
      code = ESP_ERR_INTERNAL;
    }
  }
  esp_free(text);
  return code;
}

const cli_verb cli_init = {"init",
                           NULL,
                           "[MODEL_DIR]",
                           0,
                           1,
                           false,
                           "write a commented recipe to start from",
                           "With the most used keys at their defaults.",
                           CLI_OPTIONS(options),
                           init};
