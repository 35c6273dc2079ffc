#include <Python.h>

#include <atomic>
#include <cstdint>
#include <sstream>
#include <string>

#include "cute_kernels/torch/tensor.hpp"

namespace cute_kernels::binding {

void warn_of_copy(Argument const& a, int element_bytes) {
  static std::atomic<bool> said{false};
  if (said.exchange(true)) return;
  std::ostringstream parts;
  parts << "cute_kernels: " << a.name
        << " is copied in full before the kernel reads it: TMA wants an address and "
        << "strides that are multiples of " << kTmaBytes << " bytes, but the address of " << a.name
        << " is " << reinterpret_cast<uintptr_t>(a.tensor.data_ptr()) % kTmaBytes
        << " bytes beyond one and its strides are " << Shape{a.strides} << " elements of "
        << element_bytes << " bytes. Slices that start and step by multiples of "
        << kTmaBytes / element_bytes << " elements, with a contiguous last dimension, or a "
        << "contiguous() tensor that is made once need no copies. This warning comes once in a "
        << "process.";
  std::string const text = parts.str();
  // Operators run without the interpreter's lock.
  PyGILState_STATE const state = PyGILState_Ensure();
  bool const is_error = PyErr_WarnEx(PyExc_UserWarning, text.c_str(), 1) != 0;
  if (is_error) PyErr_Clear();
  PyGILState_Release(state);
  if (is_error) fail(text);  // by the user's filter of warnings
}

}  // namespace cute_kernels::binding
