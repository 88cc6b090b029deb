# Each tests/fuzz/fuzz_<room>_<what>.c is one fuzz target, linked to <room> and the rooms it may use; its corpus is
# tests/fuzz/corpus/<room>_<what>. With ESP_FUZZ (clang) it becomes a libFuzzer program and `ninja fuzz_short` runs each
# for ESP_FUZZ_RUNS executions; without, tests/fuzz/replay.c runs it over its corpus as a test.
set(ESP_FUZZ_RUNS 20000 CACHE STRING "Executions per target in fuzz_short")
if(ESP_FUZZ)
  # A finding must end the program, also one of the undefined-behaviour checks.
  target_compile_options(esp_flags INTERFACE -fsanitize=fuzzer-no-link -fno-sanitize-recover=all)
  add_custom_target(fuzz_short)
endif()
set(seen)
foreach(room IN LISTS ESP_ROOMS)
  if(TARGET esp_${room})
    list(APPEND seen $<TARGET_OBJECTS:esp_${room}>)
    if(NOT TARGET esp_upto_${room})
      add_library(esp_upto_${room} STATIC EXCLUDE_FROM_ALL ${seen})
      target_link_libraries(esp_upto_${room} PUBLIC esp_libs)
    endif()
  endif()
endforeach()
file(GLOB fuzz_sources CONFIGURE_DEPENDS tests/fuzz/fuzz_*.c)
foreach(source IN LISTS fuzz_sources)
  get_filename_component(name ${source} NAME_WE)
  string(REGEX REPLACE "^fuzz_([a-z]+)_.*$" "\\1" room ${name})
  string(REGEX REPLACE "^fuzz_" "" case ${name})
  set(corpus ${CMAKE_SOURCE_DIR}/tests/fuzz/corpus/${case})
  if(NOT TARGET esp_upto_${room})
    message(STATUS "fuzz target ${name}: room '${room}' is not built yet, skipped")
    continue()
  endif()
  if(ESP_FUZZ)
    add_executable(${name} ${source})
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
    # What it finds new goes into the build folder, a crashing input as well.
    add_custom_target(${name}_short
      COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/corpus/${case}
      COMMAND ${name} -runs=${ESP_FUZZ_RUNS} -max_len=4096 -timeout=20 -print_final_stats=1
              -artifact_prefix=${CMAKE_BINARY_DIR}/crash-${case}- ${CMAKE_BINARY_DIR}/corpus/${case} ${corpus}
      USES_TERMINAL)
    add_dependencies(fuzz_short ${name}_short)
  else()
    add_executable(${name} ${source} tests/fuzz/replay.c)
    add_test(NAME ${name} COMMAND ${name} ${corpus})
    set_tests_properties(${name} PROPERTIES LABELS fuzz TIMEOUT 300)
  endif()
  target_link_libraries(${name} PRIVATE esp_upto_${room})
endforeach()
