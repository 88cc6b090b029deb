# Checks of the tree itself.
add_test(NAME repo_arrows COMMAND ${CMAKE_SOURCE_DIR}/tests/repo/arrows.sh)
add_test(NAME repo_headers COMMAND ${CMAKE_SOURCE_DIR}/tests/repo/headers.sh)
add_test(NAME repo_tour COMMAND ${CMAKE_SOURCE_DIR}/scripts/tour.py --check)
set_tests_properties(repo_arrows repo_headers repo_tour PROPERTIES LABELS repo)
if(TARGET espalier AND NOT ESP_SANITIZE)
  add_test(NAME repo_symbols COMMAND ${CMAKE_SOURCE_DIR}/tests/repo/symbols.sh $<TARGET_FILE:espalier>)
  set_tests_properties(repo_symbols PROPERTIES LABELS repo)
endif()
