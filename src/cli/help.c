/* help.c: `espalier help`: one verb, or all of them as a man page, Markdown or a bash completion. */
#include "cli/cli.h"

static const cli_option options[] = {
    {"man", NULL, 0, false, "the man page (roff)"},
    {"markdown", NULL, 0, false, "the reference as Markdown"},
    {"completion", NULL, 0, false, "a bash completion"},
};

static int help(cli_args *a) {
  if (cli_flag(a, "man")) {
    cli_page_man(stdout);
  } else if (cli_flag(a, "markdown")) {
    cli_page_markdown(stdout);
  } else if (cli_flag(a, "completion")) {
    cli_page_completion(stdout);
  } else if (!a->n_positional) {
    cli_page_overview(stdout);
  } else {
    const cli_verb *v = cli_find_verb(a->positional[0]);
    if (!v) return cli_usage_error(a->verb, "unknown verb '%s'", a->positional[0]);
    cli_page_usage(v, stdout);
  }
  return 0;
}

const cli_verb cli_help = {"help",
                           NULL,
                           "[VERB]",
                           0,
                           1,
                           false,
                           "explain a verb",
                           "Also writes the man page, the reference and the completion.",
                           CLI_OPTIONS(options),
                           help};
