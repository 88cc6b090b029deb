/* args.c: options of a verb through getopt_long, overrides in all their spellings, and errors with a suggestion. */
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"

static const cli_option common[] = {
    {"help", NULL, 'h', false, "show what the verb does and its options"},
    {"quiet", NULL, 'q', false, "only errors and results"},
    {"verbose", NULL, 'v', false, "counted facts as they come"},
    {"json", NULL, 0, false, "results as JSON, one object per line"},
};

const cli_option *cli_common_options(int *n) {
  *n = (int)(sizeof common / sizeof *common);
  return common;
}

int cli_usage_error(const cli_verb *verb, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  fprintf(stderr, "espalier %s: ", verb->name);
  vfprintf(stderr, fmt, ap);
  fputc('\n', stderr);
  va_end(ap);
  return ESP_ERR_RECIPE;
}

static int distance(const char *a, const char *b) {
  int row[65];
  int n = (int)strlen(b);
  if (n > 64 || strlen(a) > 64) return 1000;
  for (int j = 0; j <= n; j++) row[j] = j;
  for (int i = 0; a[i]; i++) {
    int diagonal = row[0]++;
    for (int j = 0; j < n; j++) {
      int cost = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      if (diagonal + 1 < cost) cost = diagonal + 1;
      if (row[j] + 1 < cost) cost = row[j] + 1;
      row[j + 1] = cost;
    }
  }
  return row[n];
}

const char *cli_nearest(const char *word, const char *const *names, int n) {
  const char *best = NULL;
  int least = 3 < (int)strlen(word) / 2 ? 3 : (int)strlen(word) / 2;
  for (int i = 0; i < n; i++) {
    int d = distance(word, names[i]);
    if (d <= least) {
      least = d - 1;
      best = names[i];
    }
  }
  return best;
}

/* The option that getopt refused. */
static int unknown_option(const cli_verb *verb, const char *text) {
  char name[64];
  snprintf(name, sizeof name, "%.*s", (int)strcspn(text + 2, "="), text + 2);
  const char *names[64];
  int n = 0;
  for (int i = 0; i < verb->n_options && n < 60; i++) names[n++] = verb->options[i].name;
  for (size_t i = 0; i < sizeof common / sizeof *common; i++) names[n++] = common[i].name;
  const char *near = cli_nearest(name, names, n);
  if (near) return cli_usage_error(verb, "unknown option '--%s' (did you mean '--%s'?)", name, near);
  return cli_usage_error(verb, "unknown option '--%s'", name);
}

static bool add_override(cli_args *a, const char *text, char *owned) {
  if (a->n_overrides == CLI_MAX_ARGS || a->n_owned == CLI_MAX_ARGS) {
    free(owned);
    return false;
  }
  if (owned) a->owned[a->n_owned++] = owned;
  a->overrides[a->n_overrides++] = text;
  return true;
}

bool cli_override(cli_args *a, const char *key, const char *value) {
  char *text = malloc(strlen(key) + 2 * strlen(value) + 4);
  if (!text) return false;
  char *w = text + sprintf(text, "%s=\"", key);
  for (const char *p = value; *p; p++) {
    if (*p == '"' || *p == '\\') *w++ = '\\';
    *w++ = *p;
  }
  *w++ = '"';
  *w = 0;
  return add_override(a, text, text);
}

bool cli_override_plain(cli_args *a, const char *key, const char *value) {
  char *text = malloc(strlen(key) + strlen(value) + 2);
  if (!text) return false;
  sprintf(text, "%s=%s", key, value);
  return add_override(a, text, text);
}

/* Takes "--optim.lr 1e-4" and "--optim.lr=1e-4" out of argv: a dot tells them from options. */
static bool take_dotted(cli_args *a, int *argc, char **argv) {
  int kept = 1;
  for (int i = 1; i < *argc; i++) {
    char *arg = argv[i];
    if (!strcmp(arg, "--")) {
      while (i < *argc) argv[kept++] = argv[i++];
      break;
    }
    size_t name = !strncmp(arg, "--", 2) ? strcspn(arg, "=") : 0;
    if (!name || !memchr(arg, '.', name)) {
      argv[kept++] = arg;
      continue;
    }
    char *text;
    if (arg[name]) {
      text = strdup(arg + 2);
    } else {
      if (i + 1 == *argc) {
        cli_usage_error(a->verb, "%s takes a value", arg);
        return false;
      }
      text = malloc(strlen(arg) + strlen(argv[i + 1]) + 2);
      if (text) sprintf(text, "%s=%s", arg + 2, argv[++i]);
    }
    if (!text || !add_override(a, text, text)) return false;
  }
  *argc = kept;
  argv[kept] = NULL;
  return true;
}

static bool take_options(cli_args *a, int argc, char **argv) {
  const cli_verb *verb = a->verb;
  struct option longs[64] = {0};
  const cli_option *known[64];
  char letters[160] = ":"; /* a missing value is told from an unknown option */
  int n = 0;
  for (int i = 0; i < verb->n_options; i++) known[n++] = &verb->options[i];
  for (size_t i = 0; i < sizeof common / sizeof *common; i++) known[n++] = &common[i];
  for (int i = 0; i < n; i++) {
    longs[i] = (struct option){known[i]->name, known[i]->arg ? required_argument : no_argument, NULL, 1000 + i};
    if (known[i]->letter)
      snprintf(letters + strlen(letters), sizeof letters - strlen(letters), "%c%s", known[i]->letter,
               known[i]->arg ? ":" : "");
  }
  opterr = 0;
  optind = 1;
  for (;;) {
    int before = optind;
    int c = getopt_long(argc, argv, letters, longs, NULL);
    if (c == -1) break;
    if (c == ':') {
      cli_usage_error(verb, "%s takes a value", argv[optind - 1]);
      return false;
    }
    if (c == '?') {
      const char *text = argv[optind - 1] && !strncmp(argv[optind - 1], "--", 2) ? argv[optind - 1] : NULL;
      if (!text && before < argc && !strncmp(argv[before], "--", 2)) text = argv[before];
      if (text && optopt >= 1000)
        cli_usage_error(verb, "--%s takes no value", known[optopt - 1000]->name);
      else if (text)
        unknown_option(verb, text);
      else
        cli_usage_error(verb, "unknown option '-%c'", optopt);
      return false;
    }
    const cli_option *o = NULL;
    for (int i = 0; i < n; i++)
      if (c == 1000 + i || (c < 1000 && known[i]->letter == c)) o = known[i];
    if (!o || a->n_options == CLI_MAX_ARGS) return false;
    if (o->arg && !strcmp(o->name, "set")) {
      if (!add_override(a, optarg, NULL)) return false;
      continue;
    }
    a->options[a->n_options].option = o;
    a->options[a->n_options++].value = optarg;
  }
  for (int i = optind; i < argc; i++) {
    const char *eq = strchr(argv[i], '=');
    const char *slash = strchr(argv[i], '/');
    if (verb->overrides && eq && eq != argv[i] && !(slash && slash < eq)) {
      if (!add_override(a, argv[i], NULL)) return false;
    } else if (a->n_positional < CLI_MAX_ARGS) {
      a->positional[a->n_positional++] = argv[i];
    }
  }
  return true;
}

bool cli_parse(const cli_verb *verb, int argc, char **argv, cli_args *a) {
  memset(a, 0, sizeof *a);
  a->verb = verb;
  if (argc > CLI_MAX_ARGS) {
    cli_usage_error(verb, "more than %d arguments", CLI_MAX_ARGS);
    return false;
  }
  if (verb->overrides && !take_dotted(a, &argc, argv)) return false;
  if (!take_options(a, argc, argv)) return false;
  a->json = cli_flag(a, "json");
  a->quiet = cli_flag(a, "quiet");
  a->verbose = cli_flag(a, "verbose");
  for (int i = 0; i < verb->n_options; i++)
    if (verb->options[i].required && !cli_value(a, verb->options[i].name)) {
      cli_usage_error(verb, "--%s %s is missing (%s)", verb->options[i].name, verb->options[i].arg,
                      verb->options[i].help);
      return false;
    }
  if (a->n_positional < verb->min_positional) {
    cli_usage_error(verb, "%s is missing (usage: espalier %s %s)", verb->positional, verb->name, verb->positional);
    return false;
  }
  if (a->n_positional > verb->max_positional) {
    cli_usage_error(verb, "unexpected argument '%s'", a->positional[verb->max_positional]);
    return false;
  }
  return true;
}

void cli_args_deinit(cli_args *a) {
  for (int i = 0; i < a->n_owned; i++) free(a->owned[i]);
  a->n_owned = 0;
}

const char *cli_value(const cli_args *a, const char *option) {
  for (int i = a->n_options - 1; i >= 0; i--)
    if (!strcmp(a->options[i].option->name, option)) return a->options[i].value ? a->options[i].value : "";
  return NULL;
}

bool cli_flag(const cli_args *a, const char *option) {
  return cli_value(a, option) != NULL;
}

int cli_values(const cli_args *a, const char *option, const char **out, int max) {
  int n = 0;
  for (int i = 0; i < a->n_options && n < max; i++)
    if (!strcmp(a->options[i].option->name, option)) out[n++] = a->options[i].value;
  return n;
}

bool cli_integer(const cli_args *a, const char *option, int64_t min, int64_t max, int64_t *out) {
  const char *text = cli_value(a, option);
  if (!text) return true;
  char *end;
  errno = 0;
  long long v = strtoll(text, &end, 10);
  if (!*text || isspace((unsigned char)*text) || *end || errno || v < min || v > max) {
    cli_usage_error(a->verb, "--%s: expected an integer from %lld to %lld, got '%s'", option, (long long)min,
                    (long long)max, text);
    return false;
  }
  *out = v;
  return true;
}

bool cli_number(const cli_args *a, const char *option, double min, double max, double *out) {
  const char *text = cli_value(a, option);
  if (!text) return true;
  char *end;
  double v = strtod(text, &end);
  if (!*text || isspace((unsigned char)*text) || *end || !(v >= min && v <= max)) {
    cli_usage_error(a->verb, "--%s: expected a number from %g to %g, got '%s'", option, min, max, text);
    return false;
  }
  *out = v;
  return true;
}

bool cli_weighted(const cli_verb *verb, const char *value, char **dir, double *weight) {
  const char *colon = strrchr(value, ':');
  char *end = NULL;
  double w = colon && colon[1] ? strtod(colon + 1, &end) : 1;
  bool has = colon && colon[1] && !*end;
  *weight = has ? w : 1;
  if (has && !(w > -1e6 && w < 1e6)) {
    cli_usage_error(verb, "--adapter: '%s' is not a weight", colon + 1);
    return false;
  }
  *dir = has ? strndup(value, (size_t)(colon - value)) : strdup(value);
  return *dir != NULL;
}
