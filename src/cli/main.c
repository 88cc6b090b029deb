/* main.c: the table of verbs and the way to them. */
#include <errno.h>
#include <locale.h>
#include <string.h>

#include "cli/cli.h"

const cli_verb *const cli_verbs[] = {&cli_run,      &cli_resume, &cli_plan,    &cli_check,  &cli_data,    &cli_eval,
                                     &cli_generate, &cli_merge,  &cli_extract, &cli_export, &cli_inspect, &cli_matrix,
                                     &cli_report,   &cli_sweep,  &cli_schema,  &cli_doctor, &cli_init,    &cli_help};
const int cli_n_verbs = (int)(sizeof cli_verbs / sizeof *cli_verbs);

const cli_verb *cli_find_verb(const char *name) {
  for (int i = 0; i < cli_n_verbs; i++)
    if (!strcmp(cli_verbs[i]->name, name) || (cli_verbs[i]->alias && !strcmp(cli_verbs[i]->alias, name)))
      return cli_verbs[i];
  return NULL;
}

static int unknown_verb(const char *name) {
  const char *names[64];
  int n = 0;
  for (int i = 0; i < cli_n_verbs && n < 62; i++) {
    names[n++] = cli_verbs[i]->name;
    if (cli_verbs[i]->alias) names[n++] = cli_verbs[i]->alias;
  }
  const char *near = cli_nearest(name, names, n);
  if (near)
    fprintf(stderr, "espalier: unknown verb '%s' (did you mean '%s'?)\n", name, near);
  else
    fprintf(stderr, "espalier: unknown verb '%s' (`espalier help` lists them)\n", name);
  return ESP_ERR_RECIPE;
}

static int dispatch(int argc, char **argv) {
  if (argc < 2) {
    cli_page_overview(stderr);
    return ESP_ERR_RECIPE;
  }
  if (!strcmp(argv[1], "--version") || !strcmp(argv[1], "-V")) {
    printf("espalier %s\n", esp_version());
    return 0;
  }
  if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")) {
    cli_page_overview(stdout);
    return 0;
  }
  const cli_verb *verb = cli_find_verb(argv[1]);
  if (!verb) return unknown_verb(argv[1]);
  for (int i = 2; i < argc && strcmp(argv[i], "--"); i++)
    if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
      cli_page_usage(verb, stdout);
      return 0;
    }
  static cli_args args; /* too large for comfort on the stack */
  int code = ESP_ERR_RECIPE;
  if (cli_parse(verb, argc - 1, argv + 1, &args)) code = verb->run(&args);
  cli_args_deinit(&args);
  return code;
}

int main(int argc, char **argv) {
  setlocale(LC_CTYPE, ""); /* whether the terminal takes UTF-8; numbers keep their point */
  int code = dispatch(argc, argv);
  errno = 0;
  if ((fflush(stdout) || ferror(stdout)) && code == 0) { /* a full disk must not look like success */
    fprintf(stderr, "espalier: cannot write the output: %s\n", errno ? strerror(errno) : "write error");
    code = ESP_ERR_INTERNAL;
  }
  return code;
}
