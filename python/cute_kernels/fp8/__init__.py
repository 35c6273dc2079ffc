"""FP8 attention: quantisation, the public functions, and the CPU path of the kernel's arithmetic.

Every input has a defined result: what is beyond +-SATURATION counts as +-SATURATION, NaN stays NaN
(in its whole row after incoherent processing; in int8, which has none, in its block by the scale),
and a block of zeros has a finite scale.
"""

import cute_kernels.fp8.operators  # noqa: F401  registers what is not compiled
from cute_kernels.fp8.attention import (
    QK_DTYPE,
    e4m3_operands,
    flash_attn_e4m3,
    flash_attn_fp8_func,
)
from cute_kernels.fp8.kernels import GPU_BUILT
from cute_kernels.fp8.quantize import SATURATION, quantize_fp8
from cute_kernels.fp8.reference import uses_linear_exp
from cute_kernels.fp8.rotation import random_signs, rotate, rotate_back
from cute_kernels.fp8.tensor import ROW_BLOCK, FP8Tensor
from cute_kernels.fp8.varlen import flash_attn_fp8_varlen_func, flash_attn_varlen_e4m3

__all__ = [
    "GPU_BUILT",
    "QK_DTYPE",
    "ROW_BLOCK",
    "SATURATION",
    "FP8Tensor",
    "e4m3_operands",
    "flash_attn_e4m3",
    "flash_attn_fp8_func",
    "flash_attn_fp8_varlen_func",
    "flash_attn_varlen_e4m3",
    "quantize_fp8",
    "random_signs",
    "rotate",
    "rotate_back",
    "uses_linear_exp",
]
