/* faults.h: one planted fault, and how it has to show. */
#ifndef SIMCUDA_FAULTS_FAULTS_H
#define SIMCUDA_FAULTS_FAULTS_H

#include <vector>

#include "tests/simcuda/faults/kernels.h"

struct Mode {
  const char *name, *order, *defer;
  const char *flag; /* a setting that is switched on, or null */
};

struct Case {
  const char *name;
  bool (*run)(int fault);      /* is the result right? */
  int fault;                   /* CONTROL: only the run without fault */
  const char *words;           /* of the message, or "wrong result" */
  const char *sanitized_words; /* with AddressSanitizer, if others */
  const char *setting, *value; /* of the environment, for the faulty run; or null */
};

const std::vector<Case> &kernel_cases();
const std::vector<Case> &host_cases();

/* Device memory with these values in it, on the default stream. */
float *on_device(const std::vector<float> &values);
std::vector<float> from_device(const float *values, size_t n);
/* Ends the child with a message unless e is what was expected. */
void expect(cudaError_t e, cudaError_t expected, int line);
#define OK(call) expect((call), cudaSuccess, __LINE__)
#define EXPECT(call, error) expect((call), (error), __LINE__)

#endif
