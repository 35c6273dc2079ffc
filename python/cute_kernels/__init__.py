"""Exact attention for NVIDIA Hopper GPUs, with a CPU implementation for every other machine."""

from importlib.metadata import version as _version

from cute_kernels.fp8 import FP8Tensor, flash_attn_fp8_func, quantize_fp8
from cute_kernels.interface import flash_attn_func
from cute_kernels.qkvpacked import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func
from cute_kernels.tiles import get_include, tile_configs
from cute_kernels.varlen import flash_attn_varlen_func

__version__ = _version("cute-kernels")
__all__ = [
    "FP8Tensor",
    "__version__",
    "flash_attn_fp8_func",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "get_include",
    "quantize_fp8",
    "tile_configs",
]
