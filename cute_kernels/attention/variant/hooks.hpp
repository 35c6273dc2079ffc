#pragma once

// All that kernels of rows with variants, the library's own and users', are compiled from.
#include "cute_kernels/attention/softcap.hpp"
#include "cute_kernels/attention/variant/captured.hpp"
#include "cute_kernels/attention/variant/math.hpp"
#include "cute_kernels/attention/variant/variant.hpp"
