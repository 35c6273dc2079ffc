"""Exact attention for NVIDIA Hopper GPUs, with a CPU implementation for every other machine."""

from importlib.metadata import version as _version

import cute_kernels.parts.operators  # noqa: F401  programs that were exported may call them
from cute_kernels.autotune import Tuned, tune, use_tuned
from cute_kernels.cache import (
    append_kv,
    flash_attn_combine,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)
from cute_kernels.compile.config import TileConfig
from cute_kernels.fp8 import (
    FP8Tensor,
    flash_attn_fp8_func,
    flash_attn_fp8_varlen_func,
    quantize_fp8,
)
from cute_kernels.interface import flash_attn_func
from cute_kernels.plugins import (
    add_tile_config,
    compile_tile_config,
    load_named_by_environment,
    load_tile_configs,
)
from cute_kernels.qkvpacked import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func
from cute_kernels.tiles import get_include, tile_configs
from cute_kernels.variants import BlockMask, Variant
from cute_kernels.varlen import flash_attn_varlen_func

__version__ = _version("cute-kernels")
__all__ = [
    "BlockMask",
    "FP8Tensor",
    "TileConfig",
    "Tuned",
    "Variant",
    "__version__",
    "add_tile_config",
    "append_kv",
    "compile_tile_config",
    "flash_attn_combine",
    "flash_attn_fp8_func",
    "flash_attn_fp8_varlen_func",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_include",
    "get_scheduler_metadata",
    "load_tile_configs",
    "quantize_fp8",
    "tile_configs",
    "tune",
    "use_tuned",
]

load_named_by_environment()
