/* inspect.c: `espalier inspect`: what is in a file or folder. */
#include "cli/cli.h"

static int inspect(cli_args *a) {
  char *text = NULL;
  esp_status st = esp_inspect(a->positional[0], a->json, &text);
  return cli_print_text(st, text);
}

const cli_verb cli_inspect = {"inspect",
                              NULL,
                              "PATH",
                              1,
                              1,
                              false,
                              "say what a file or folder holds",
                              "A model, an adapter, a checkpoint, a run, or a safetensors file.",
                              NULL,
                              0,
                              inspect};
