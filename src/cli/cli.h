/* cli.h: verbs, their options, and what they share. The program uses the public interface only (include/espalier). */
#ifndef ESP_CLI_H
#define ESP_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "espalier/espalier.h"

enum { CLI_MAX_ARGS = 512 };

typedef struct cli_option {
  const char *name, *arg; /* arg NULL: a flag */
  char letter;            /* 0: none */
  bool required;
  const char *help;
} cli_option;

typedef struct cli_args {
  const struct cli_verb *verb;
  struct {
    const cli_option *option;
    const char *value;
  } options[CLI_MAX_ARGS];
  int n_options;
  const char *positional[CLI_MAX_ARGS]; /* without overrides */
  int n_positional;
  const char *overrides[CLI_MAX_ARGS]; /* key=value, --set key=value, --dotted.key value */
  int n_overrides;
  char *owned[CLI_MAX_ARGS];
  int n_owned;
  bool json, quiet, verbose;
} cli_args;

typedef struct cli_verb {
  const char *name, *alias, *positional; /* as shown in the usage line; "" for none */
  int min_positional, max_positional;
  bool overrides; /* takes key=value */
  const char *summary, *text;
  const cli_option *options;
  int n_options;
  int (*run)(cli_args *a); /* the exit code */
} cli_verb;

#define CLI_OPTIONS(a) (a), (int)(sizeof(a) / sizeof((a)[0]))

extern const cli_verb cli_run, cli_resume, cli_plan, cli_check, cli_data, cli_eval, cli_generate, cli_merge,
    cli_extract, cli_export, cli_inspect, cli_matrix, cli_report, cli_sweep, cli_schema, cli_doctor, cli_init, cli_help;
extern const cli_verb *const cli_verbs[];
extern const int cli_n_verbs;
const cli_verb *cli_find_verb(const char *name); /* by name or alias */
const cli_option *cli_common_options(int *n);

/* args.c: false: a usage error was printed (exit code 2). */
bool cli_parse(const cli_verb *verb, int argc, char **argv, cli_args *out);
void cli_args_deinit(cli_args *a);
const char *cli_value(const cli_args *a, const char *option); /* the last one; NULL when not given */
bool cli_flag(const cli_args *a, const char *option);
int cli_values(const cli_args *a, const char *option, const char **out, int max);
bool cli_integer(const cli_args *a, const char *option, int64_t min, int64_t max, int64_t *out);
bool cli_number(const cli_args *a, const char *option, double min, double max, double *out);
/* DIR[:W]: *dir is the caller's (free), *weight 1 without W. */
bool cli_weighted(const cli_verb *verb, const char *value, char **dir, double *weight);
/* Adds key=value. The first quotes the value for YAML, so that any text is a text. */
bool cli_override(cli_args *a, const char *key, const char *value);
bool cli_override_plain(cli_args *a, const char *key, const char *value);
int cli_usage_error(const cli_verb *verb, const char *fmt, ...) ESP_PRINTF(2, 3); /* returns 2 */
/* Edit distance; the nearest name or NULL. */
const char *cli_nearest(const char *word, const char *const *names, int n);

/* common.c */
int cli_fail(esp_status st);                              /* prints the message of the failure, returns the exit code */
int cli_print_text(esp_status st, char *text);            /* prints and frees the text, or fails */
bool cli_open_job(cli_args *a, esp_job **job, int *code); /* the recipe is the first positional */
void cli_catch_signals(void);
void cli_json_string(FILE *f, const char *s);
void cli_json_number(FILE *f, double v); /* null when not finite */
const char *cli_bytes(double bytes, char *buf, size_t n);
const char *cli_duration(double seconds, char *buf, size_t n);
const char *cli_count(double v, char *buf, size_t n); /* 12.3k */
bool cli_color(FILE *f);                              /* a terminal, and NO_COLOR is not set */
bool cli_utf8(void);

/* progress.c */
typedef struct cli_progress cli_progress;
cli_progress *cli_progress_create(const cli_args *a, const esp_job *job);
void cli_progress_event(void *progress, const esp_event *e);
/* Whether events came: only the first rank of a run gets them, and only it prints. */
bool cli_progress_active(const cli_progress *p);
void cli_progress_destroy(cli_progress *p);

/* pages.c */
void cli_page_usage(const cli_verb *v, FILE *f);
void cli_page_man(FILE *f);
void cli_page_markdown(FILE *f);
void cli_page_completion(FILE *f);
void cli_page_overview(FILE *f);

#endif
