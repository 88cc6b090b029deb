/* faults.cpp: does the simulated device find what it is for? Each case runs in a child process, once for every
 * schedule: without its fault it must be right in all of them, with it some schedule must report it, in the words
 * expected here, or give a wrong result. faults_host.cpp has the cases about streams, memory and errors.
 *
 * A mutation it was seen to catch: a barrier that releases its threads when the first of them arrives (sync_block). */
#include "tests/simcuda/faults/faults.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

#if defined(__SANITIZE_ADDRESS__)
static const bool sanitized = true;
/* Found by name by the sanitizer, so not hidden. */
extern "C" __attribute__((visibility("default"))) const char *__asan_default_options() {
  return "detect_leaks=0:exitcode=99";
}
extern "C" __attribute__((visibility("default"))) const char *__ubsan_default_options() {
  return "exitcode=99";
}
#else
static const bool sanitized = false;
#endif

static const Mode modes[] = {
    {"forward", "forward", "0", nullptr},           {"reverse", "reverse", "0", nullptr},
    {"shuffle", "shuffle:7", "0", nullptr},         {"lazy", "forward", "lazy", nullptr},
    {"hasty", "forward", "hasty", nullptr},         {"crosscheck", "forward", "0", "SIMCUDA_CROSSCHECK"},
    {"protect", "reverse", "1", "SIMCUDA_PROTECT"},
};

struct Outcome {
  enum { Right, Wrong, Reported } kind;
  std::string message;
};

/* In a child, so that ends by a signal are seen and settings are read anew. */
static Outcome run(const Case &c, int fault, const Mode &mode) {
  int ends[2];
  if (pipe(ends) != 0) abort();
  fflush(nullptr);
  pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    alarm(20);
    setenv("SIMCUDA_ORDER", mode.order, 1);
    setenv("SIMCUDA_DEFER", mode.defer, 1);
    if (mode.flag) setenv(mode.flag, "1", 1);
    if (c.setting && fault != CONTROL) setenv(c.setting, c.value, 1);
    _exit(c.run(fault) ? 0 : 1);
  }
  close(ends[1]);
  Outcome outcome = {Outcome::Right, ""};
  char text[4096];
  for (ssize_t n; (n = read(ends[0], text, sizeof text)) > 0;) outcome.message.append(text, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  bool wrong = WIFEXITED(status) && WEXITSTATUS(status) == 1;
  if (wrong) outcome.kind = Outcome::Wrong;
  if (!wrong && status != 0) outcome.kind = Outcome::Reported;
  return outcome;
}

static bool as_expected(const Case &c, const Outcome &o) {
  const char *words = sanitized && c.sanitized_words ? c.sanitized_words : c.words;
  if (strcmp(words, "wrong result") == 0) return o.kind == Outcome::Wrong;
  return o.kind == Outcome::Reported && o.message.find(words) != std::string::npos;
}

static bool check(const Case &c) {
  bool good = true;
  std::string found, others;
  for (const Mode &mode : modes) {
    /* Pages are protected only where no sanitizer has its own memory around them. */
    if (sanitized && mode.flag && strcmp(mode.flag, "SIMCUDA_PROTECT") == 0) continue;
    Outcome control = run(c, CONTROL, mode);
    if (control.kind != Outcome::Right) {
      printf("  %s without its fault, %s: %s\n", c.name, mode.name,
             control.kind == Outcome::Wrong ? "wrong result" : "reported");
      good = false;
    }
    if (!control.message.empty()) printf("%s", control.message.c_str());
    if (c.fault == CONTROL) continue;
    Outcome planted = run(c, c.fault, mode);
    if (as_expected(c, planted)) found += std::string(" ") + mode.name;
    others += planted.message;
  }
  if (c.fault != CONTROL && found.empty()) printf("%s", others.c_str());
  if (c.fault != CONTROL && found.empty()) good = false;
  if (c.fault == CONTROL) found = good ? " right in every schedule" : "";
  printf("%-4s %-44s%s\n", good ? "ok" : "FAIL", c.name, found.empty() ? " not found" : found.c_str());
  return good;
}

/* Arguments choose cases by a part of their name. */
int main(int argc, char **argv) {
  int failed = 0, ran = 0;
  for (const std::vector<Case> *table : {&kernel_cases(), &host_cases()}) {
    for (const Case &c : *table) {
      bool chosen = argc < 2;
      for (int i = 1; i < argc; i++) chosen = chosen || strstr(c.name, argv[i]);
      if (!chosen) continue;
      ran++;
      failed += !check(c);
    }
  }
  printf("%d of %d cases failed\n", failed, ran);
  return failed > 0 || ran == 0;
}
