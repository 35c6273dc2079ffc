# Where packages of the building Python lie, without importing them (importing torch takes seconds).

# python_package_dir(<result> <module>): the module's folder, or "" if it is not installed.
function(python_package_dir result module)
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('${module}'); print(list(s.submodule_search_locations)[0] if s else '')"
    OUTPUT_VARIABLE dir
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(${result} "${dir}" PARENT_SCOPE)
endfunction()

# The roots of NVIDIA's CUDA 13 wheels. A virtual environment that sees the system's packages can hold the compiler while
# the system holds the runtime, so there may be several.
execute_process(
  COMMAND
    "${Python_EXECUTABLE}" -c
    "import importlib.util as u, os; s = u.find_spec('nvidia'); p = [os.path.join(d, 'cu13') for d in (s.submodule_search_locations if s else [])]; print(';'.join(d for d in p if os.path.isdir(d)))"
  OUTPUT_VARIABLE CUTE_KERNELS_CUDA_WHEELS
  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
