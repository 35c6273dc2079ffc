"""Exact attention for NVIDIA Hopper GPUs, with a CPU implementation for every other machine."""

from importlib.metadata import version as _version

from cute_kernels.interface import flash_attn_func
from cute_kernels.tiles import get_include, tile_configs

__version__ = _version("cute-kernels")
__all__ = ["__version__", "flash_attn_func", "get_include", "tile_configs"]
