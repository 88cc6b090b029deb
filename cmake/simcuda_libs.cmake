# Stand-ins of cuBLASLt, cuDNN and NCCL for the simulated device, with the toolkit's own headers; the test of them; and
# the test that has the real cuDNN compile every attention graph for devices that are not here.
find_path(ESP_CBLAS_INCLUDE NAMES cblas.h PATH_SUFFIXES openblas-pthread)
if(NOT ESP_CUDA_INCLUDE OR NOT ESP_CUDNN_INCLUDE OR NOT ESP_NCCL_INCLUDE OR NOT ESP_CBLAS_INCLUDE)
  return()
endif()
set(simcuda_libs_headers ${ESP_CUDA_INCLUDE} ${ESP_CUDNN_INCLUDE} ${ESP_NCCL_INCLUDE} ${ESP_CBLAS_INCLUDE})
file(GLOB simcuda_libs_sources CONFIGURE_DEPENDS tests/simcuda/cublaslt*.c tests/simcuda/cudnn*.c tests/simcuda/nccl*.c)
add_library(simcuda_libs STATIC EXCLUDE_FROM_ALL ${simcuda_libs_sources})
target_compile_definitions(simcuda_libs PRIVATE _GNU_SOURCE)
# The plug-in finds some of these by name, as it finds the real ones: no hidden symbols.
target_compile_options(simcuda_libs PRIVATE -Wall -Wextra -Werror -fvisibility=default -ffp-contract=off -O2)
target_include_directories(simcuda_libs SYSTEM PRIVATE ${simcuda_libs_headers})
target_include_directories(simcuda_libs PUBLIC tests/simcuda/include)
target_link_libraries(simcuda_libs PUBLIC ${ESP_OPENBLAS} Threads::Threads m rt)

if(TARGET simcuda_runtime) # the simulated runtime that they queue their work on
  pkg_check_modules(CMOCKA REQUIRED IMPORTED_TARGET cmocka)
  file(GLOB simcuda_libs_tests CONFIGURE_DEPENDS tests/simcuda/libs_test*.c)
  add_executable(simcuda_libs_test ${simcuda_libs_tests} src/backend/cuda/sdpa_graph.c src/core/error.c)
  target_compile_options(simcuda_libs_test PRIVATE -Wall -Wextra -Werror)
  target_include_directories(simcuda_libs_test SYSTEM PRIVATE ${simcuda_libs_headers})
  target_link_libraries(simcuda_libs_test PRIVATE simcuda_libs simcuda_runtime esp_flags PkgConfig::CMOCKA)
  add_test(NAME simcuda_libs_test COMMAND simcuda_libs_test)
  set_tests_properties(simcuda_libs_test PROPERTIES LABELS simcuda TIMEOUT 300)
endif()

# The real cuDNN, with a driver of our own that only loads kernels: every attention graph is accepted and compiled for
# the described devices. Each plan takes it half a second; Ampere, the older one, is sampled.
find_library(ESP_CUDNN NAMES libcudnn.so.9 PATHS /usr/local/cuda/lib64 /usr/local/cuda/lib)
if(ESP_CUDNN)
  get_filename_component(cudnn_directory ${ESP_CUDNN} DIRECTORY)
  add_library(fake_driver SHARED tests/cudnn/fake_driver.c)
  target_include_directories(fake_driver SYSTEM PRIVATE ${ESP_CUDA_INCLUDE})
  target_compile_options(fake_driver PRIVATE -Wall -Wextra -Werror -Wno-unused-parameter)
  set_target_properties(fake_driver PROPERTIES OUTPUT_NAME cuda SUFFIX .so.1 NO_SONAME TRUE
                                               LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/fake_driver)
  add_executable(cudnn_plans tests/cudnn/cudnn_plans.c src/backend/cuda/sdpa_graph.c src/backend/cuda/sdpa_plan.c
                             src/core/error.c)
  target_link_libraries(cudnn_plans PRIVATE esp_flags Threads::Threads dl)
  target_include_directories(cudnn_plans SYSTEM PRIVATE ${ESP_CUDA_INCLUDE} ${ESP_CUDNN_INCLUDE})
  add_dependencies(cudnn_plans fake_driver)
  foreach(case IN ITEMS "h200;1" "a100;4")
    list(GET case 0 device)
    list(GET case 1 every)
    add_test(NAME cudnn_plans_${device} COMMAND cudnn_plans ${CMAKE_BINARY_DIR}/fake_driver
             ${CMAKE_SOURCE_DIR}/tests/cudnn/${device}.json ${every})
    set_tests_properties(cudnn_plans_${device} PROPERTIES LABELS cudnn TIMEOUT 600 SKIP_RETURN_CODE 77 ENVIRONMENT
                         "LD_LIBRARY_PATH=${cudnn_directory}")
  endforeach()
endif()
