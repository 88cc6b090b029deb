# cmake --install: program, libraries, headers, pkg-config, man page, bash completion.
file(RELATIVE_PATH ESP_PC_UP "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/") # the installed tree can be moved
string(REGEX REPLACE "/$" "" ESP_PC_UP "${ESP_PC_UP}")
configure_file(packaging/espalier.pc.in ${CMAKE_BINARY_DIR}/espalier.pc @ONLY)
install(TARGETS espalier espalier_static LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/espalier DESTINATION include FILES_MATCHING PATTERN "*.h")
install(FILES ${CMAKE_BINARY_DIR}/espalier.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/espalier)
if(TARGET espalier_bin AND EXISTS ${CMAKE_SOURCE_DIR}/src/cli/pages.c)
  install(TARGETS espalier_bin RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  # Both are written by the program itself from its verb table, so they cannot drift from it.
  set(man ${CMAKE_BINARY_DIR}/espalier.1)
  set(completion ${CMAKE_BINARY_DIR}/espalier.bash)
  add_custom_command(OUTPUT ${man} ${completion} DEPENDS espalier_bin
    COMMAND espalier_bin help --man > ${man} COMMAND espalier_bin help --completion > ${completion} VERBATIM)
  add_custom_target(espalier_help ALL DEPENDS ${man} ${completion})
  install(FILES ${man} DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
  install(FILES ${completion} DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions RENAME espalier)
endif()
