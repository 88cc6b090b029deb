# Tests that are scripts over the program: end to end, faults, ranks. Exit code 77 is a skip, with its reason printed.
if(NOT TARGET espalier_bin)
  return()
endif()
add_executable(make_tiny ${CMAKE_SOURCE_DIR}/tests/make_tiny.c)
target_link_libraries(make_tiny PRIVATE esp_upto_io)
target_include_directories(make_tiny PRIVATE ${CMAKE_SOURCE_DIR}/tests)

# esp_script_test(<name> <suite> <script> [ENV name=value ...]). They start programs with threads of their own, stop them
# by signals and wait for them: nothing runs beside them.
function(esp_script_test name suite script)
  cmake_parse_arguments(T "" "" "ENV" ${ARGN})
  add_test(NAME ${name} COMMAND bash ${CMAKE_SOURCE_DIR}/tests/${suite}/${script} WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
  set_tests_properties(${name} PROPERTIES LABELS ${suite} TIMEOUT 900 SKIP_RETURN_CODE 77 RUN_SERIAL TRUE ENVIRONMENT
    "ESPALIER=$<TARGET_FILE:espalier_bin>;MAKE_TINY=$<TARGET_FILE:make_tiny>;ESP_SOURCE_DIR=${CMAKE_SOURCE_DIR};ESP_BINARY_DIR=${CMAKE_BINARY_DIR};ESP_SHARED_DIR=${CMAKE_SOURCE_DIR}/../shared;CC=${CMAKE_C_COMPILER};${T_ENV}")
endfunction()

esp_script_test(faults_kill faults kill.sh)
esp_script_test(faults_disk_full faults disk_full.sh)
if(MPI_C_FOUND)
  esp_script_test(dist_ranks dist ranks.sh ENV "DIST_SUITE=$<TARGET_FILE:test_dist_comm>")
endif()
esp_script_test(e2e_bad_input e2e bad_input.sh)
set_property(TEST e2e_bad_input APPEND PROPERTY LABELS errors) # error paths: also under the sanitizers
esp_script_test(e2e_verbs e2e verbs.sh)
if(NOT ESP_SANITIZE)
  esp_script_test(e2e_install e2e install.sh)
endif()
add_test(NAME repo_docs COMMAND ${CMAKE_SOURCE_DIR}/tests/repo/docs.sh $<TARGET_FILE:espalier_bin>)
set_tests_properties(repo_docs PROPERTIES LABELS repo)
# tests/e2e/run_<what>.sh
file(GLOB e2e_scripts CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/e2e/run_*.sh)
foreach(path IN LISTS e2e_scripts)
  get_filename_component(file ${path} NAME)
  get_filename_component(name ${path} NAME_WE)
  esp_script_test(e2e_${name} e2e ${file})
endforeach()

# The example is built against the public interface alone, and run.
add_executable(example_finetune ${CMAKE_SOURCE_DIR}/examples/finetune.c)
target_include_directories(example_finetune PRIVATE ${CMAKE_SOURCE_DIR}/include)
target_link_libraries(example_finetune PRIVATE espalier)
target_compile_options(example_finetune PRIVATE -Wall -Wextra -Werror)
add_test(NAME e2e_example COMMAND bash ${CMAKE_SOURCE_DIR}/tests/e2e/example.sh WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
set_tests_properties(e2e_example PROPERTIES LABELS e2e TIMEOUT 600 ENVIRONMENT
  "ESPALIER=$<TARGET_FILE:espalier_bin>;MAKE_TINY=$<TARGET_FILE:make_tiny>;EXAMPLE=$<TARGET_FILE:example_finetune>;ESP_SOURCE_DIR=${CMAKE_SOURCE_DIR}")
