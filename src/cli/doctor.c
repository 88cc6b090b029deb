/* doctor.c: `espalier doctor`: what this machine offers and what is used of it. */
#include "cli/cli.h"

static const cli_option options[] = {
    {"calibrate", NULL, 0, false, "measure the ceilings: matrix products and memory bandwidth"},
    {"threads", "N", 't', false, "threads of this process"},
};

static int doctor(cli_args *a) {
  char *text = NULL;
  int64_t threads = 0;
  if (!cli_integer(a, "threads", 1, 4096, &threads)) return ESP_ERR_RECIPE;
  esp_status st = threads ? esp_set_threads((int)threads) : ESP_OK;
  if (st == ESP_OK) st = esp_doctor(cli_flag(a, "calibrate"), a->json, &text);
  return cli_print_text(st, text);
}

const cli_verb cli_doctor = {
    "doctor",
    NULL,
    "",
    0,
    0,
    false,
    "say what this machine offers and what is used of it",
    "Processor, instruction set, threads, memory, MPI, library versions. ESPALIER_ISA=plain|avx2|avx512|amx forces a\n"
    "lower instruction set, ESPALIER_THREADS a thread count.",
    CLI_OPTIONS(options),
    doctor};
