# The suites written for the cpu backend, on CUDA (tests/backend_env.h): <name>_cuda_sim on the simulation (label
# simcuda), <name>_gpu on a device (label gpu; 77, with the reason, where there is none). Included after tests.cmake.
set(ESP_CUDA_SUITES
    test_adapters_conformance_train test_adapters_conformance_files test_adapters_conformance_life test_merge_conformance
    test_optim_lora_init
    test_backend_ops test_backend_kinds test_backend_blocks test_backend_gate test_backend_matmul test_backend_attention test_backend_golden test_backend_teacher
    test_adapters_conformance test_optim_peft_parity test_optim_rules test_optim_task_ranks test_model_golden test_model_real
    test_model_step test_model_weights test_eval_score test_eval_virtual test_adapters_target test_adapters_files)
file(GLOB strategy_suites CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/tasks/test_*.c) # each strategy, by itself
foreach(source IN LISTS strategy_suites)
  get_filename_component(name ${source} NAME_WE)
  list(APPEND ESP_CUDA_SUITES ${name})
endforeach()
foreach(name IN LISTS ESP_CUDA_SUITES)
  if(NOT TARGET ${name})
    continue()
  endif()
  if(TARGET espalier-cuda-sim)
    add_test(NAME ${name}_cuda_sim COMMAND ${name} WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
    # The operations also belong to the suites of a sanitizer build: an access out of bounds is seen there alone.
    set(labels simcuda)
    if(name MATCHES "^test_backend_")
      list(APPEND labels ops)
    endif()
    set_tests_properties(${name}_cuda_sim PROPERTIES LABELS "${labels}" TIMEOUT 900 ENVIRONMENT
      "ASAN_OPTIONS=detect_leaks=0;ESP_TEST_BACKEND=cuda;ESP_TEST_QUICK=1;XDG_CACHE_HOME=${CMAKE_BINARY_DIR}/cache;ESPALIER_CUDA_PLUGIN=$<TARGET_FILE:espalier-cuda-sim>")
    add_dependencies(${name} espalier-cuda-sim)
  endif()
  if(TARGET espalier-cuda)
    add_test(NAME ${name}_gpu COMMAND ${name} WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
    set_tests_properties(${name}_gpu PROPERTIES LABELS gpu TIMEOUT 600 SKIP_RETURN_CODE 77 RESOURCE_LOCK gpu ENVIRONMENT
      "ESP_TEST_BACKEND=cuda;ESP_TEST_SKIP=1;XDG_CACHE_HOME=${CMAKE_BINARY_DIR}/cache;ESPALIER_CUDA_PLUGIN=$<TARGET_FILE:espalier-cuda>")
    add_dependencies(${name} espalier-cuda)
  endif()
endforeach()

# Every launch in three orders, with equal bits of all memory that it can reach: barriers that are missing, blocks that race.
foreach(name test_backend_ops test_backend_attention test_backend_kinds test_backend_blocks test_backend_gate test_backend_teacher)
  if(TEST ${name}_cuda_sim AND NOT ESP_SANITIZE)
    get_test_property(${name}_cuda_sim ENVIRONMENT env)
    add_test(NAME ${name}_crosscheck_cuda_sim COMMAND ${name} WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
    set_tests_properties(${name}_crosscheck_cuda_sim PROPERTIES LABELS simcuda TIMEOUT 600 ENVIRONMENT
                         "${env};SIMCUDA_CROSSCHECK=1")
  endif()
endforeach()

# What cuDNN takes by itself is also the own kernels'.
foreach(on cuda_sim gpu)
  if(TEST test_backend_attention_${on})
    get_test_property(test_backend_attention_${on} ENVIRONMENT env)
    get_test_property(test_backend_attention_${on} LABELS labels)
    add_test(NAME test_backend_attention_own_${on} COMMAND test_backend_attention WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
    set_tests_properties(test_backend_attention_own_${on} PROPERTIES LABELS "${labels}" TIMEOUT 600 SKIP_RETURN_CODE 77
                         ENVIRONMENT "${env};ESPALIER_CUDA_ATTENTION=flash")
  endif()
endforeach()

if(TARGET espalier-cuda-sim AND COMMAND esp_script_test AND TARGET make_tiny)
  foreach(part train memory faults ranks)
    esp_script_test(cuda_sim_${part} e2e cuda_sim_${part}.sh
                    ENV "ESPALIER_CUDA_PLUGIN=$<TARGET_FILE:espalier-cuda-sim>")
    set_tests_properties(cuda_sim_${part} PROPERTIES LABELS simcuda)
  endforeach()
endif()
