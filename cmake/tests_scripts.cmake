# Tests that are scripts over the program: end to end, faults, ranks. Exit code 77 is a skip, with its reason printed.
if(NOT TARGET espalier_bin)
  return()
endif()
add_executable(make_tiny ${CMAKE_SOURCE_DIR}/tests/make_tiny.c)
target_link_libraries(make_tiny PRIVATE esp_upto_io)
target_include_directories(make_tiny PRIVATE ${CMAKE_SOURCE_DIR}/tests)

# esp_script_test(<name> <suite> <script> [ENV name=value ...])
function(esp_script_test name suite script)
  cmake_parse_arguments(T "" "" "ENV" ${ARGN})
  add_test(NAME ${name} COMMAND bash ${CMAKE_SOURCE_DIR}/tests/${suite}/${script} WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
  set_tests_properties(${name} PROPERTIES LABELS ${suite} TIMEOUT 900 SKIP_RETURN_CODE 77 ENVIRONMENT
    "ESPALIER=$<TARGET_FILE:espalier_bin>;MAKE_TINY=$<TARGET_FILE:make_tiny>;ESP_SOURCE_DIR=${CMAKE_SOURCE_DIR};ESP_BINARY_DIR=${CMAKE_BINARY_DIR};ESP_SHARED_DIR=${CMAKE_SOURCE_DIR}/../shared;CC=${CMAKE_C_COMPILER};${T_ENV}")
endfunction()

esp_script_test(faults_kill faults kill.sh)
esp_script_test(faults_disk_full faults disk_full.sh)
if(MPI_C_FOUND)
  esp_script_test(dist_ranks dist ranks.sh ENV "DIST_SUITE=$<TARGET_FILE:test_dist_comm>")
endif()
# tests/e2e/run_<what>.sh
file(GLOB e2e_scripts CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/e2e/run_*.sh)
foreach(path IN LISTS e2e_scripts)
  get_filename_component(file ${path} NAME)
  get_filename_component(name ${path} NAME_WE)
  esp_script_test(e2e_${name} e2e ${file})
endforeach()
