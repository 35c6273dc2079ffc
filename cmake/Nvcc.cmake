# Sets CMAKE_CUDA_COMPILER to an nvcc of CUDA 12.4 or newer: the one that was asked for (CUDACXX,
# -DCMAKE_CUDA_COMPILER), else a toolkit's, else that of PyPI's wheels.

set(CUTE_KERNELS_CUDA_FLOOR 12.4)
string(
  CONCAT _how
         "These kernels need nvcc of CUDA ${CUTE_KERNELS_CUDA_FLOOR} or newer. "
         "Install a CUDA toolkit, or run\n"
         "    python -m pip install --group build\n"
         "which brings nvcc from PyPI, or name one with CUDACXX=/path/to/nvcc.")

# nvcc_release(<result> <nvcc>): such as 13.0, or "" if it does not run.
function(nvcc_release result nvcc)
  execute_process(
    COMMAND "${nvcc}" --version
    RESULT_VARIABLE status
    OUTPUT_VARIABLE text
    ERROR_QUIET)
  set(${result} "" PARENT_SCOPE)
  if(status EQUAL 0 AND text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
  endif()
endfunction()

set(_candidates "")
if(CMAKE_CUDA_COMPILER)
  list(APPEND _candidates "${CMAKE_CUDA_COMPILER}")
elseif(DEFINED ENV{CUDACXX})
  list(APPEND _candidates "$ENV{CUDACXX}")
else()
  # Not cached: a later configure run may find a better one.
  find_program(
    _toolkit_nvcc nvcc NO_CACHE
    HINTS ENV CUDA_HOME ENV CUDA_PATH
    PATHS /usr/local/cuda
    PATH_SUFFIXES bin)
  if(_toolkit_nvcc)
    list(APPEND _candidates "${_toolkit_nvcc}")
  endif()
  foreach(_root IN LISTS CUTE_KERNELS_CUDA_WHEELS)
    if(EXISTS "${_root}/bin/nvcc")
      list(APPEND _candidates "${_root}/bin/nvcc")
    endif()
  endforeach()
endif()

set(_found "")
set(_refused "")
foreach(_candidate IN LISTS _candidates)
  nvcc_release(_release "${_candidate}")
  if(NOT _release)
    string(APPEND _refused "  ${_candidate} does not run, or is no nvcc.\n")
  elseif(_release VERSION_LESS CUTE_KERNELS_CUDA_FLOOR)
    string(APPEND _refused "  ${_candidate} is of CUDA ${_release}: too old.\n")
  else()
    set(_found "${_candidate}")
    break()
  endif()
endforeach()
if(NOT _found)
  if(NOT _refused)
    string(CONCAT _refused "  nvcc is neither in CUDA_HOME, on PATH, in /usr/local/cuda nor among "
                           "PyPI's wheels.\n")
  endif()
  message(FATAL_ERROR "No CUDA compiler that will do.\n${_refused}${_how}")
endif()
set(CMAKE_CUDA_COMPILER "${_found}")
message(STATUS "nvcc ${_release}: ${_found}")

# A toolkit finds its own headers and libraries. The wheels may lie in two site-packages, when a
# virtual environment sees the system's.
foreach(_root IN LISTS CUTE_KERNELS_CUDA_WHEELS)
  cmake_path(IS_PREFIX _root "${CMAKE_CUDA_COMPILER}" NORMALIZE _is_wheel)
  if(_is_wheel)
    foreach(_other IN LISTS CUTE_KERNELS_CUDA_WHEELS)
      string(APPEND CMAKE_CUDA_FLAGS_INIT " -I${_other}/include -L${_other}/lib")
    endforeach()
    break()
  endif()
endforeach()
