# Runs tile_configs.py. Sets CUTE_KERNELS_TILE_SOURCES (.cu), CUTE_KERNELS_REGISTRY_SOURCES (.cpp)
# and CUTE_KERNELS_TILE_JSON.

set(_generator "${CMAKE_CURRENT_LIST_DIR}/tile_configs.py")
set(_passes_module "${CMAKE_CURRENT_LIST_DIR}/tile_passes.py")
set(_table "${CUTE_KERNELS_TILE_CONFIGS}")
if(NOT _table)
  set(_table "cute_kernels/attention/tile_configs.toml")
endif()
cmake_path(ABSOLUTE_PATH _table BASE_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}" NORMALIZE)
set(_out "${CMAKE_CURRENT_BINARY_DIR}/tiles")

set(_passes forward backward)
if(CUTE_KERNELS_FP8)
  list(APPEND _passes forward_fp8)
endif()
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${_generator}" --table "${_table}" --out "${_out}" --head-dims
          "${CUTE_KERNELS_HEAD_DIMS}" --dtypes "${CUTE_KERNELS_DTYPES}" --passes "${_passes}"
  RESULT_VARIABLE _status
  OUTPUT_VARIABLE CUTE_KERNELS_TILE_SOURCES
  ERROR_VARIABLE _error)
if(NOT _status EQUAL 0)
  # Indented lines are printed as they are, not refilled.
  string(REPLACE "\n" "\n  " _error "${_error}")
  message(FATAL_ERROR "The table of tiles was refused.\n  ${_error}")
endif()
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${_generator}" "${_passes_module}"
                                                    "${_table}")

set(CUTE_KERNELS_REGISTRY_SOURCES ${CUTE_KERNELS_TILE_SOURCES})
list(FILTER CUTE_KERNELS_REGISTRY_SOURCES INCLUDE REGEX "\\.cpp$")
list(FILTER CUTE_KERNELS_TILE_SOURCES INCLUDE REGEX "\\.cu$")
set(CUTE_KERNELS_TILE_JSON "${_out}/tile_configs.json")
list(LENGTH CUTE_KERNELS_TILE_SOURCES _count)
message(STATUS "${_count} kernels from ${_table}")
