# libespalier-cuda.so: the CUDA backend, a plug-in that the program opens at run time. Built where nvcc and the libraries
# are; without them the program is the same and says that this installation has none.
set(ESP_CUDA "AUTO" CACHE STRING "The CUDA plug-in: AUTO (where nvcc is), ON, OFF")
set(ESP_CUDA_ARCHS "80-real;90-real;100-real;120" CACHE STRING "CUDA architectures; the last one also as PTX")

# What the plug-in and its simulation are made of: kernels, and host code in C.
file(GLOB ESP_CUDA_KERNELS CONFIGURE_DEPENDS src/backend/cuda/*.cu)
file(GLOB ESP_CUDA_HOST CONFIGURE_DEPENDS src/backend/cuda/*.c)
list(APPEND ESP_CUDA_HOST ${CMAKE_SOURCE_DIR}/dist/cuda/nccl.c ${CMAKE_SOURCE_DIR}/src/core/dtype.c
     ${CMAKE_SOURCE_DIR}/src/core/cpu.c)

# The headers alone are enough for the simulation.
find_program(ESP_NVCC nvcc PATHS /usr/local/cuda/bin ENV CUDA_HOME PATH_SUFFIXES bin)
if(ESP_NVCC)
  get_filename_component(nvcc_real ${ESP_NVCC} REALPATH)
  get_filename_component(nvcc_bin ${nvcc_real} DIRECTORY)
endif()
find_path(ESP_CUDA_INCLUDE cuda_runtime_api.h HINTS ${nvcc_bin}/../include ${ESP_CUDA_HEADERS}
          PATHS /usr/local/cuda/include ENV CUDA_HOME PATH_SUFFIXES include)
find_path(ESP_CUDNN_INCLUDE cudnn.h HINTS ${ESP_CUDA_INCLUDE} ${ESP_CUDA_HEADERS})
find_path(ESP_NCCL_INCLUDE nccl.h HINTS ${ESP_CUDA_INCLUDE} ${ESP_CUDA_HEADERS})

function(esp_cuda_host_flags target)
  target_link_libraries(${target} PRIVATE esp_flags Threads::Threads dl m)
  target_link_options(${target} PRIVATE -Wl,--no-undefined)
  target_include_directories(${target} SYSTEM PRIVATE ${ESP_CUDA_INCLUDE})
endfunction()

if(ESP_CUDA STREQUAL "OFF")
  return()
endif()
include(CheckLanguage)
if(ESP_NVCC AND NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER ${ESP_NVCC})
endif()
set(CMAKE_CUDA_ARCHITECTURES ${ESP_CUDA_ARCHS})
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
check_language(CUDA)
find_library(ESP_CUBLASLT NAMES cublasLt libcublasLt.so.13 HINTS ${nvcc_bin}/../lib64 ${nvcc_bin}/../lib)
if(NOT CMAKE_CUDA_COMPILER OR NOT ESP_CUBLASLT OR NOT ESP_CUDNN_INCLUDE OR NOT ESP_NCCL_INCLUDE)
  if(ESP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "ESP_CUDA=ON: nvcc '${CMAKE_CUDA_COMPILER}', cublasLt '${ESP_CUBLASLT}', cudnn.h "
                        "'${ESP_CUDNN_INCLUDE}', nccl.h '${ESP_NCCL_INCLUDE}'")
  endif()
  message(STATUS "CUDA: the plug-in is not built (nvcc, cublasLt, cudnn.h and nccl.h are needed)")
  return()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

add_library(espalier-cuda MODULE ${ESP_CUDA_KERNELS} ${ESP_CUDA_HOST})
esp_cuda_host_flags(espalier-cuda)
target_include_directories(espalier-cuda PRIVATE ${CMAKE_SOURCE_DIR}/include ${CMAKE_SOURCE_DIR}/src ${CMAKE_SOURCE_DIR})
target_include_directories(espalier-cuda SYSTEM PRIVATE ${ESP_CUDNN_INCLUDE} ${ESP_NCCL_INCLUDE})
set_target_properties(espalier-cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin CUDA_STANDARD 17
                                               CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden LINKER_LANGUAGE CUDA)
target_compile_options(espalier-cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings;-Xcompiler=-Wall,-Wextra,-Wno-unused-parameter>")
target_link_libraries(espalier-cuda PRIVATE CUDA::cudart ${ESP_CUBLASLT})
install(TARGETS espalier-cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}/espalier)
