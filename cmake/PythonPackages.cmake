# Where packages of the building Python lie, without importing them (importing torch takes seconds).

# python_package_dirs(<result> <module>): the module's folders; a namespace package has several.
function(python_package_dirs result module)
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" -c [[
import importlib.util, sys
spec = importlib.util.find_spec(sys.argv[1])
print(";".join(spec.submodule_search_locations or []) if spec else "")
]] "${module}"
    OUTPUT_VARIABLE dirs
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(${result} "${dirs}" PARENT_SCOPE)
endfunction()

# The roots of NVIDIA's CUDA 13 wheels. A virtual environment that sees the system's packages can
# hold the compiler while the system holds the runtime, so there may be several.
python_package_dirs(CUTE_KERNELS_CUDA_WHEELS nvidia)
list(TRANSFORM CUTE_KERNELS_CUDA_WHEELS APPEND "/cu13")
