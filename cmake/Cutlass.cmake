# cute_kernels::cutlass, the header-only CUTLASS and CuTe, and cute_kernels::cuda_headers for C++
# that calls the CUDA runtime.

python_package_dirs(_cutlass_library cutlass_library)
find_path(
  CUTLASS_INCLUDE_DIR cute/tensor.hpp NO_CACHE
  HINTS "${CUTLASS_INCLUDE_DIR}" "${_cutlass_library}/source/include"
  NO_DEFAULT_PATH)
if(NOT CUTLASS_INCLUDE_DIR)
  string(
    CONCAT _message
           "CUTLASS's headers not found. `python -m pip install --group build` brings them "
           "(nvidia-cutlass), or name their folder with "
           "-C cmake.define.CUTLASS_INCLUDE_DIR=/path/to/cutlass/include.")
  message(FATAL_ERROR "${_message}")
endif()
message(STATUS "CUTLASS: ${CUTLASS_INCLUDE_DIR}")

list(TRANSFORM CUTE_KERNELS_CUDA_WHEELS APPEND "/include" OUTPUT_VARIABLE _wheel_includes)
find_path(
  _cuda_include cuda_runtime_api.h NO_CACHE REQUIRED
  HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} ${_wheel_includes}
  NO_DEFAULT_PATH)
# CUDA 13 keeps libcu++ apart from the rest.
find_path(
  _cccl_include cuda/std/type_traits NO_CACHE REQUIRED
  HINTS ${_cuda_include} ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} ${_wheel_includes}
  PATH_SUFFIXES cccl
  NO_DEFAULT_PATH)

add_library(cute_kernels_cuda_headers INTERFACE)
add_library(cute_kernels::cuda_headers ALIAS cute_kernels_cuda_headers)
target_include_directories(
  cute_kernels_cuda_headers SYSTEM INTERFACE "${_cuda_include}" "${_cccl_include}")

add_library(cute_kernels_cutlass INTERFACE)
add_library(cute_kernels::cutlass ALIAS cute_kernels_cutlass)
target_include_directories(
  cute_kernels_cutlass SYSTEM INTERFACE "${CUTLASS_INCLUDE_DIR}" "${_cccl_include}")
