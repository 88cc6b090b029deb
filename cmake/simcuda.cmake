# The simulated CUDA device: headers that let g++ and clang compile .cu files, and the runtime behind them. Needs the
# toolkit's headers only (ESP_CUDA_INCLUDE, cuda.cmake), no nvcc and no driver.
if(NOT ESP_CUDA_INCLUDE)
  return()
endif()

enable_language(CXX)
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(ESP_SIMCUDA ${CMAKE_SOURCE_DIR}/tests/simcuda)

# What every file compiled for the simulated device needs; .cu files need esp_simcuda_sources() as well.
add_library(simcuda_flags INTERFACE)
target_include_directories(simcuda_flags BEFORE INTERFACE ${ESP_SIMCUDA}/include)
target_include_directories(simcuda_flags SYSTEM INTERFACE ${ESP_CUDA_INCLUDE})
target_include_directories(simcuda_flags INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_definitions(simcuda_flags INTERFACE ESP_SIMCUDA _GNU_SOURCE)
target_compile_options(simcuda_flags INTERFACE -Wall -Wextra -Werror -Wno-unused-parameter -Wno-unknown-pragmas
                                               -fvisibility=hidden -ffp-contract=off
                                               -fno-strict-aliasing # kernels read values as vectors of others
                                               $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-maybe-uninitialized>) # guesses

# Kernels, runtime and plug-in have to agree: the sanitizer must know of every change of stack.
if(ESP_SANITIZE MATCHES address)
  set(sanitize -fsanitize=${ESP_SANITIZE} -fno-sanitize-recover=all)
  target_compile_options(simcuda_flags INTERFACE ${sanitize} -fno-omit-frame-pointer)
  target_link_options(simcuda_flags INTERFACE ${sanitize})
endif()

# .cu files as C++.
function(esp_simcuda_sources)
  set_source_files_properties(${ARGN} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
endfunction()

file(GLOB simcuda_runtime_sources CONFIGURE_DEPENDS ${ESP_SIMCUDA}/fibres*.cpp ${ESP_SIMCUDA}/runtime*.cpp)
file(GLOB simcuda_fault_sources CONFIGURE_DEPENDS ${ESP_SIMCUDA}/faults/*.cpp ${ESP_SIMCUDA}/faults/*.cu)
esp_simcuda_sources(${ESP_SIMCUDA}/faults/kernels.cu)

add_library(simcuda_runtime STATIC ${simcuda_runtime_sources})
target_link_libraries(simcuda_runtime PUBLIC simcuda_flags Threads::Threads dl)
add_library(simcuda ALIAS simcuda_runtime)

add_executable(simcuda_faults ${simcuda_fault_sources})
target_link_libraries(simcuda_faults PRIVATE simcuda_runtime)
add_test(NAME simcuda_faults COMMAND simcuda_faults)

# The same with AddressSanitizer, which is told about every change of stack.
add_executable(simcuda_faults_asan ${simcuda_fault_sources} ${simcuda_runtime_sources})
target_link_libraries(simcuda_faults_asan PRIVATE simcuda_flags Threads::Threads dl)
target_compile_options(simcuda_faults_asan PRIVATE -fsanitize=address,undefined -fno-sanitize-recover=all
                                                   -fno-omit-frame-pointer -g)
target_link_options(simcuda_faults_asan PRIVATE -fsanitize=address,undefined)
add_test(NAME simcuda_faults_asan COMMAND simcuda_faults_asan)
set_tests_properties(simcuda_faults simcuda_faults_asan PROPERTIES LABELS simcuda TIMEOUT 300)
