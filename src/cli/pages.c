/* pages.c: help, man page, reference and completion, all from the table of verbs. */
#include <string.h>

#include "cli/cli.h"

static const struct {
  int code;
  const char *meaning;
} codes[] = {{0, "done"},
             {1, "a fault of this program, or the operating system refused something"},
             {2, "recipe or command line"},
             {3, "data, tokenizer, model or adapter files"},
             {4, "does not fit into memory"},
             {5, "device or communication"},
             {6, "interrupted, after a complete checkpoint"},
             {7, "diverged: a loss or gradient that is not finite, or the watchdog"}};
enum { N_CODES = (int)(sizeof codes / sizeof *codes) };

void cli_page_overview(FILE *f) {
  fputs("espalier fine-tunes adapters on a frozen base over a sequence of tasks\n\n"
        "usage: espalier VERB [ARGUMENTS] [OPTIONS]\n\n",
        f);
  for (int i = 0; i < cli_n_verbs; i++) fprintf(f, "  %-10s %s\n", cli_verbs[i]->name, cli_verbs[i]->summary);
  fputs("\n`espalier help VERB` explains a verb, `espalier schema` the recipe, `espalier --version` says which this "
        "is.\n",
        f);
}

static void option_label(const cli_option *o, char *out, size_t n) {
  char letter[8] = "    ";
  if (o->letter) snprintf(letter, sizeof letter, "-%c, ", o->letter);
  snprintf(out, n, "%s--%s%s%s", letter, o->name, o->arg ? " " : "", o->arg ? o->arg : "");
}

static void usage_options(const cli_option *o, int n, FILE *f) {
  char label[64];
  for (int i = 0; i < n; i++) {
    option_label(&o[i], label, sizeof label);
    fprintf(f, "  %-28s %s%s\n", label, o[i].help, o[i].required ? " (required)" : "");
  }
}

void cli_page_usage(const cli_verb *v, FILE *f) {
  int n;
  const cli_option *common = cli_common_options(&n);
  fprintf(f, "usage: espalier %s%s%s [OPTIONS]\n", v->name, *v->positional ? " " : "", v->positional);
  if (v->alias) fprintf(f, "       (also: espalier %s)\n", v->alias);
  fprintf(f, "\n%s.\n%s\n\n", v->summary, v->text);
  usage_options(v->options, v->n_options, f);
  usage_options(common, n, f);
}

/* A leading dot or apostrophe would be a roff request, a backslash an escape, a minus a hyphen. */
static void roff(const char *s, FILE *f) {
  bool start = true;
  for (; *s; s++) {
    if (start && (*s == '.' || *s == '\'')) fputs("\\&", f);
    start = *s == '\n';
    if (*s == '\\')
      fputs("\\e", f);
    else if (*s == '-')
      fputs("\\-", f);
    else
      fputc(*s, f);
  }
}

static void man_options(const cli_option *o, int n, FILE *f) {
  for (int i = 0; i < n; i++) {
    fputs(".TP\n\\fB", f);
    if (o[i].letter) fprintf(f, "\\-%c\\fR, \\fB", o[i].letter);
    fputs("\\-\\-", f);
    roff(o[i].name, f);
    fputs("\\fR", f);
    if (o[i].arg) fprintf(f, " \\fI%s\\fR", o[i].arg);
    fputc('\n', f);
    roff(o[i].help, f);
    fputs(o[i].required ? " (required)\n" : "\n", f);
  }
}

void cli_page_man(FILE *f) {
  int n;
  const cli_option *common = cli_common_options(&n);
  fprintf(
      f,
      ".TH ESPALIER 1 \"\" \"espalier %s\" \"User Commands\"\n.SH NAME\nespalier \\- fine\\-tune adapters on a frozen "
      "base over a sequence of tasks\n.SH SYNOPSIS\n.B espalier\n\\fIVERB\\fR [\\fIARGUMENTS\\fR] "
      "[\\fIOPTIONS\\fR]\n.SH DESCRIPTION\n",
      esp_version());
  roff(
      "Reads a Hugging Face model directory and a recipe, trains adapters over the recipe's tasks, measures what each\n"
      "task did to the others, and writes adapters that PEFT loads or a merged model that transformers loads.\n",
      f);
  fputs(".SH VERBS\n", f);
  for (int i = 0; i < cli_n_verbs; i++) {
    const cli_verb *v = cli_verbs[i];
    fprintf(f, ".SS \"%s%s", v->name, *v->positional ? " " : "");
    roff(v->positional, f);
    fputs("\"\n", f);
    roff(v->summary, f);
    fputs(".\n", f);
    roff(v->text, f);
    fputc('\n', f);
    man_options(v->options, v->n_options, f);
  }
  fputs(".SH COMMON OPTIONS\n", f);
  man_options(common, n, f);
  fputs(".SH EXIT STATUS\n", f);
  for (int i = 0; i < N_CODES; i++) {
    fprintf(f, ".TP\n\\fB%d\\fR\n", codes[i].code);
    roff(codes[i].meaning, f);
    fputc('\n', f);
  }
  fputs(".SH ENVIRONMENT\n.TP\n\\fBESPALIER_THREADS\\fR\nthreads when the recipe says auto\n.TP\n\\fBESPALIER_ISA\\fR\n"
        "plain, avx2, avx512 or amx: a lower instruction set than the processor's\n.TP\n\\fBNO_COLOR\\fR\nno colours\n",
        f);
}

static void markdown_options(const cli_option *o, int n, FILE *f) {
  if (!n) return;
  fputs("| option | meaning |\n|---|---|\n", f);
  for (int i = 0; i < n; i++) {
    fputs("| `", f);
    if (o[i].letter) fprintf(f, "-%c, ", o[i].letter);
    fprintf(f, "--%s%s%s` | %s%s |\n", o[i].name, o[i].arg ? " " : "", o[i].arg ? o[i].arg : "", o[i].help,
            o[i].required ? " (required)" : "");
  }
  fputc('\n', f);
}

void cli_page_markdown(FILE *f) {
  int n;
  const cli_option *common = cli_common_options(&n);
  fputs("# The command line\n\nWritten by `espalier help --markdown` from the table of verbs; do not edit by hand.\n\n"
        "`espalier VERB [ARGUMENTS] [OPTIONS]`. Verbs that take a recipe take overrides too: `optim.lr=1e-4`,\n"
        "`--set optim.lr=1e-4`, `--optim.lr 1e-4` say the same.\n\n| code | meaning |\n|---|---|\n",
        f);
  for (int i = 0; i < N_CODES; i++) fprintf(f, "| %d | %s |\n", codes[i].code, codes[i].meaning);
  fputs("\n## Options of every verb\n\n", f);
  markdown_options(common, n, f);
  for (int i = 0; i < cli_n_verbs; i++) {
    const cli_verb *v = cli_verbs[i];
    fprintf(f, "## %s\n\n`espalier %s%s%s`: %s.%s%s%s\n\n%s\n\n", v->name, v->name, *v->positional ? " " : "",
            v->positional, v->summary, v->alias ? " Also `" : "", v->alias ? v->alias : "", v->alias ? "`." : "",
            v->text);
    markdown_options(v->options, v->n_options, f);
  }
}

static void completion_options(const cli_option *o, int n, bool with_arg, FILE *f) {
  for (int i = 0; i < n; i++)
    if (!with_arg || o[i].arg) fprintf(f, " --%s", o[i].name);
}

void cli_page_completion(FILE *f) {
  int n;
  const cli_option *common = cli_common_options(&n);
  fputs("# bash completion of espalier, written by `espalier help --completion`\n_espalier() {\n"
        "  local cur=${COMP_WORDS[COMP_CWORD]} verb=${COMP_WORDS[1]} words=\n"
        "  if [ \"$COMP_CWORD\" -eq 1 ]; then\n    COMPREPLY=($(compgen -W \"",
        f);
  for (int i = 0; i < cli_n_verbs; i++)
    fprintf(f, "%s%s%s%s", i ? " " : "", cli_verbs[i]->name, cli_verbs[i]->alias ? " " : "",
            cli_verbs[i]->alias ? cli_verbs[i]->alias : "");
  fputs(" --version --help\" -- \"$cur\"))\n    return\n  fi\n  case $verb in\n", f);
  for (int i = 0; i < cli_n_verbs; i++) {
    const cli_verb *v = cli_verbs[i];
    fprintf(f, "  %s%s%s) words=\"", v->name, v->alias ? "|" : "", v->alias ? v->alias : "");
    if (v == &cli_help)
      for (int k = 0; k < cli_n_verbs; k++) fprintf(f, " %s", cli_verbs[k]->name);
    completion_options(v->options, v->n_options, false, f);
    completion_options(common, n, false, f);
    fputs("\" ;;\n", f);
  }
  fputs("  esac\n  case $cur in\n  -*) COMPREPLY=($(compgen -W \"$words\" -- \"$cur\")) ;;\n"
        "  *) COMPREPLY=($(compgen -f -- \"$cur\"))\n"
        "    [ \"$verb\" = help ] && COMPREPLY=($(compgen -W \"$words\" -- \"$cur\")) ;;\n"
        "  esac\n}\ncomplete -o filenames -F _espalier espalier\n",
        f);
}
