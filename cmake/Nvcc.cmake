# Sets CMAKE_CUDA_COMPILER to nvcc: CUDACXX or -DCMAKE_CUDA_COMPILER, else a CUDA toolkit's, else that of PyPI's wheels.

set(CUTE_KERNELS_CUDA_FLOOR 12.4)
set(_how
    "Install a CUDA toolkit (${CUTE_KERNELS_CUDA_FLOOR} or newer), or `python -m pip install --group build`, which brings \
nvcc from PyPI, or name one with CUDACXX=/path/to/nvcc.")

if(NOT CMAKE_CUDA_COMPILER AND DEFINED ENV{CUDACXX})
  set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
endif()
if(NOT CMAKE_CUDA_COMPILER)
  # Not cached: what was found once may be gone or older than a new one. Python's wheels come last.
  find_program(
    _nvcc nvcc NO_CACHE
    HINTS ENV CUDA_HOME ENV CUDA_PATH
    PATHS /usr/local/cuda
    PATH_SUFFIXES bin)
  if(NOT _nvcc)
    list(TRANSFORM CUTE_KERNELS_CUDA_WHEELS APPEND "/bin" OUTPUT_VARIABLE _wheel_bins)
    find_program(_nvcc nvcc NO_CACHE PATHS ${_wheel_bins} NO_DEFAULT_PATH)
  endif()
  if(NOT _nvcc)
    message(FATAL_ERROR "No CUDA compiler found: nvcc is neither on PATH, nor in CUDA_HOME, /usr/local/cuda or PyPI's "
                        "wheels.\n${_how}")
  endif()
  set(CMAKE_CUDA_COMPILER "${_nvcc}")
endif()

execute_process(
  COMMAND "${CMAKE_CUDA_COMPILER}" --version
  RESULT_VARIABLE _status
  OUTPUT_VARIABLE _text
  ERROR_VARIABLE _text)
if(NOT _status EQUAL 0 OR NOT _text MATCHES "release ([0-9]+\\.[0-9]+)")
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} --version did not answer as nvcc does:\n${_text}\n${_how}")
endif()
set(_release "${CMAKE_MATCH_1}")
if(_release VERSION_LESS CUTE_KERNELS_CUDA_FLOOR)
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} is CUDA ${_release}; these kernels need ${CUTE_KERNELS_CUDA_FLOOR} or newer.\n"
                      "${_how}")
endif()
message(STATUS "nvcc ${_release}: ${CMAKE_CUDA_COMPILER}")

# A toolkit finds its own headers and libraries; the wheels may have spread them.
foreach(_root IN LISTS CUTE_KERNELS_CUDA_WHEELS)
  cmake_path(IS_PREFIX _root "${CMAKE_CUDA_COMPILER}" NORMALIZE _is_wheel)
  if(_is_wheel)
    foreach(_other IN LISTS CUTE_KERNELS_CUDA_WHEELS)
      string(APPEND CMAKE_CUDA_FLAGS_INIT " -I${_other}/include -L${_other}/lib")
    endforeach()
    break()
  endif()
endforeach()
