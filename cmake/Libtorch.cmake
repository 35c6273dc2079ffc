# cute_kernels::libtorch, PyTorch's stable ABI: its header-only part and C shims. The CPU build of
# PyTorch serves as well as the CUDA one.

set(CUTE_KERNELS_TORCH_FLOOR 2.10)

python_package_dirs(_torch torch)
if(NOT _torch)
  message(FATAL_ERROR "PyTorch is not installed for ${Python_EXECUTABLE}; install torch first.")
endif()
file(READ "${_torch}/version.py" _version)
if(NOT _version MATCHES "__version__ = '([0-9]+\\.[0-9]+)")
  message(FATAL_ERROR "${_torch}/version.py names no version.")
endif()
set(_version "${CMAKE_MATCH_1}")
if(_version VERSION_LESS CUTE_KERNELS_TORCH_FLOOR)
  message(FATAL_ERROR "PyTorch ${_version} in ${_torch} is too old: "
                      "its stable ABI is needed as of ${CUTE_KERNELS_TORCH_FLOOR}.")
endif()
message(STATUS "PyTorch ${_version}: ${_torch}")

add_library(cute_kernels_libtorch INTERFACE)
add_library(cute_kernels::libtorch ALIAS cute_kernels_libtorch)
target_include_directories(cute_kernels_libtorch SYSTEM INTERFACE "${_torch}/include")
# 2.10: a call of anything newer does not compile, so that the extension runs under every PyTorch
# from there on.
target_compile_definitions(
  cute_kernels_libtorch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# Its checks hold __FILE__.
target_compile_options(cute_kernels_libtorch INTERFACE "-ffile-prefix-map=${_torch}/=")
# libtorch.so alone names every other library of a PyTorch, with or without CUDA; it defines nothing
# itself, so the linker would drop it.
target_link_options(
  cute_kernels_libtorch INTERFACE
  "LINKER:--no-as-needed,${_torch}/lib/libtorch.so,--as-needed")
