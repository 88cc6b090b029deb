/* plan.c: `espalier plan`: memory, steps and work before any weight is read. */
#include "cli/cli.h"

static const cli_option options[] = {
    {"output", "DIR", 'o', false, "the run's folder (checkpoint.output_dir)"},
    {"threads", "N", 't', false, "threads of this process (parallel.threads)"},
    {"device", "NAME", 'd', false, "auto, cpu, cuda or cuda:N (parallel.device)"},
    {"set", "KEY=VALUE", 0, false, "override a value of the recipe; as a plain argument too"},
    {"resolved", NULL, 0, false, "print the resolved recipe with the origin of each value, and nothing else"},
};

static void print_json(const esp_plan *p) {
  printf("{\"device\": \"%s\", \"device_peak_bytes\": %lld, \"device_overhead_bytes\": %lld, "
         "\"device_limit_bytes\": %lld, ",
         p->device, (long long)p->device_peak_bytes, (long long)p->device_overhead_bytes,
         (long long)p->device_limit_bytes);
  printf("\"peak_bytes\": %lld, \"limit_bytes\": %lld, \"fits\": %s, \"steps\": %lld, \"tokens\": %lld, "
         "\"flops\": %.9g, \"flops_per_step\": %.9g, \"trainable\": %lld, \"parameters\": %lld, "
         "\"micro_batch_tokens\": %lld, \"ranks\": %d, \"memory\": {",
         (long long)p->peak_bytes, (long long)p->limit_bytes, p->fits ? "true" : "false", (long long)p->steps,
         (long long)p->tokens, p->flops, p->flops_per_step, (long long)p->trainable, (long long)p->parameters,
         (long long)p->micro_batch_tokens, p->ranks);
  for (int i = 0; i < p->n_categories; i++) {
    if (i) fputs(", ", stdout);
    cli_json_string(stdout, p->category_name[i]);
    printf(": %lld", (long long)p->category_bytes[i]);
  }
  fputs("}, \"tasks\": [", stdout);
  for (int i = 0; i < p->n_tasks; i++) {
    const esp_plan_task *t = &p->tasks[i];
    fputs(i ? ", {\"name\": " : "{\"name\": ", stdout);
    cli_json_string(stdout, t->name);
    printf(", \"samples\": %lld, \"rows\": %lld, \"steps\": %lld, \"tokens\": %lld, \"trained_tokens\": %.9g, "
           "\"flops\": %.9g}",
           (long long)t->samples, (long long)t->rows, (long long)t->steps, (long long)t->tokens, t->trained_tokens,
           t->flops);
  }
  puts("]}");
}

static void print_text(const esp_plan *p) {
  char a[24], b[24], c[24];
  printf("%-20s %10s %8s %8s %10s %12s %10s\n", "task", "samples", "rows", "steps", "tokens", "trained/ep.", "FLOP");
  for (int i = 0; i < p->n_tasks; i++) {
    const esp_plan_task *t = &p->tasks[i];
    printf("%-20s %10lld %8lld %8lld %10s %12s %10s\n", t->name, (long long)t->samples, (long long)t->rows,
           (long long)t->steps, cli_count((double)t->tokens, a, sizeof a), cli_count(t->trained_tokens, b, sizeof b),
           cli_count(t->flops, c, sizeof c));
  }
  printf("%-20s %10s %8s %8lld %10s %12s %10s\n\n", "all", "", "", (long long)p->steps,
         cli_count((double)p->tokens, a, sizeof a), "", cli_count(p->flops, c, sizeof c));
  printf("memory of one rank's own allocations at their peak (%d rank%s)\n", p->ranks, p->ranks == 1 ? "" : "s");
  for (int i = 0; i < p->n_categories; i++)
    if (p->category_bytes[i])
      printf("  %-24s %12s\n", p->category_name[i], cli_bytes((double)p->category_bytes[i], a, sizeof a));
  bool on_device = p->device_peak_bytes > 0, host_fits = p->peak_bytes <= p->limit_bytes;
  printf("  %-24s %12s of %s: %s\n", on_device ? "peak on the host" : "peak",
         cli_bytes((double)p->peak_bytes, a, sizeof a), cli_bytes((double)p->limit_bytes, b, sizeof b),
         host_fits ? "fits" : "DOES NOT FIT");
  if (on_device) {
    printf("  %-24s %12s and %s for CUDA itself", "peak on the device",
           cli_bytes((double)p->device_peak_bytes, a, sizeof a),
           cli_bytes((double)p->device_overhead_bytes, b, sizeof b));
    if (p->device_limit_bytes)
      printf(" of %s: %s\n", cli_bytes((double)p->device_limit_bytes, c, sizeof c),
             p->fits || !host_fits ? "fits" : "DOES NOT FIT");
    else
      puts("; this machine has no device to compare with");
  }
  putchar('\n');
  printf("trained %s of %s parameters, largest micro-batch %lld tokens, %s FLOP per step\n",
         cli_count((double)p->trainable, a, sizeof a), cli_count((double)p->parameters, b, sizeof b),
         (long long)p->micro_batch_tokens, cli_count(p->flops_per_step, c, sizeof c));
}

static int plan(cli_args *a) {
  esp_job *job;
  esp_plan *p = NULL;
  int code;
  if (!cli_open_job(a, &job, &code)) return code;
  if (cli_flag(a, "resolved")) {
    char *text = esp_job_resolved(job);
    code = cli_print_text(text ? ESP_OK : ESP_ERR_MEMORY, text);
    esp_job_close(job);
    return code;
  }
  esp_status st = esp_job_plan(job, &p);
  if (st == ESP_OK) {
    if (a->json)
      print_json(p);
    else
      print_text(p);
    if (!p->fits) {
      bool host = p->peak_bytes > p->limit_bytes;
      fprintf(stderr, "espalier plan: the run needs %lld bytes%s, memory.limit is %lld\n",
              (long long)(host ? p->peak_bytes : p->device_peak_bytes + p->device_overhead_bytes),
              host ? "" : " of the device", (long long)(host ? p->limit_bytes : p->device_limit_bytes));
      st = ESP_ERR_MEMORY;
    }
    code = (int)st;
  } else {
    code = cli_fail(st);
  }
  esp_plan_free(p);
  esp_job_close(job);
  return code;
}

const cli_verb cli_plan = {
    "plan",
    NULL,
    "RECIPE [key=value ...]",
    1,
    1,
    true,
    "say what memory, steps and tokens a run takes",
    "Runs the training step on a backend that only counts, so the prediction comes from the code that will run. No\n"
    "weight is read. Code 4 when the run does not fit memory.limit.",
    CLI_OPTIONS(options),
    plan};
