# Writes the kernels' sources from the table of tiles, with python/cute_kernels/compile, which also
# compiles users' rows. Sets CUTE_KERNELS_TILE_SOURCES (.cu), CUTE_KERNELS_TABLE_SOURCES (.cpp),
# CUTE_KERNELS_TILE_FOLDER (of a header), CUTE_KERNELS_TILE_JSON and CUTE_KERNELS_TILE_OPTIONS.

set(_package "${CMAKE_CURRENT_SOURCE_DIR}/python/cute_kernels")
set(_table "${CUTE_KERNELS_TILE_CONFIGS}")
if(NOT _table)
  set(_table "cute_kernels/attention/tile_configs.toml")
endif()
cmake_path(ABSOLUTE_PATH _table BASE_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}" NORMALIZE)
set(_out "${CMAKE_CURRENT_BINARY_DIR}/tiles")

set(_passes forward backward decode prefill latent)
if(CUTE_KERNELS_FP8)
  list(APPEND _passes forward_fp8 decode_fp8)
endif()
execute_process(
  COMMAND
    "${CMAKE_COMMAND}" -E env --modify "PYTHONPATH=path_list_prepend:${_package}" --
    "${Python_EXECUTABLE}" -B -m compile.generate --table "${_table}" --include
    "${CMAKE_CURRENT_SOURCE_DIR}" --out "${_out}" --head-dims "${CUTE_KERNELS_HEAD_DIMS}" --dtypes
    "${CUTE_KERNELS_DTYPES}" --passes "${_passes}"
  RESULT_VARIABLE _status
  OUTPUT_VARIABLE CUTE_KERNELS_TILE_SOURCES
  ERROR_VARIABLE _error)
if(NOT _status EQUAL 0)
  # Indented lines are printed as they are, not refilled.
  string(REPLACE "\n" "\n  " _error "${_error}")
  message(FATAL_ERROR "The table of tiles was refused.\n  ${_error}")
endif()
# The headers are in the digest that plug-ins must agree with.
file(GLOB_RECURSE _headers CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/cute_kernels/*.hpp"
     "${CMAKE_CURRENT_SOURCE_DIR}/cute_kernels/sm90/tensor_map.cpp")
file(GLOB _generator CONFIGURE_DEPENDS "${_package}/compile/*")
list(FILTER _generator INCLUDE REGEX "\\.(py|txt)$")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${_generator} ${_headers} "${_table}")

set(CUTE_KERNELS_TABLE_SOURCES ${CUTE_KERNELS_TILE_SOURCES})
list(FILTER CUTE_KERNELS_TABLE_SOURCES INCLUDE REGEX "\\.cpp$")
list(FILTER CUTE_KERNELS_TILE_SOURCES INCLUDE REGEX "\\.cu$")
set(CUTE_KERNELS_TILE_FOLDER "${_out}")
set(CUTE_KERNELS_TILE_JSON "${_out}/tile_configs.json")
file(STRINGS "${_package}/compile/nvcc_options.txt" CUTE_KERNELS_TILE_OPTIONS REGEX "^-")
list(LENGTH CUTE_KERNELS_TILE_SOURCES _count)
message(STATUS "${_count} kernels from ${_table}")
