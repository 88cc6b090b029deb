/* libs_test.c: the stand-ins of cuBLASLt, cuDNN and NCCL on the simulated device. What each file was seen to catch
 * stands at its head. */
#include "libs_test.h"

#define LIBS_TESTS(X)                                                                                                  \
  X(libs_cublaslt_products)                                                                                            \
  X(libs_cublaslt_tf32)                                                                                                \
  X(libs_cublaslt_refusals)                                                                                            \
  X(libs_cublaslt_launch_refusals)                                                                                     \
  X(libs_cudnn_attention)                                                                                              \
  X(libs_cudnn_refusals)                                                                                               \
  X(libs_cudnn_graph_refusals)                                                                                         \
  X(libs_nccl_collectives)                                                                                             \
  X(libs_nccl_dead_rank)

#define DECLARE(name) void name(void **state);
LIBS_TESTS(DECLARE)
#define ENTRY(name) cmocka_unit_test(name),

int main(void) {
  const struct CMUnitTest tests[] = {LIBS_TESTS(ENTRY)};
  return cmocka_run_group_tests_name("simcuda_libs", tests, NULL, NULL);
}
