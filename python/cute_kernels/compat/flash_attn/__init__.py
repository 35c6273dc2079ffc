"""FlashAttention-2's package `flash_attn`: its functions."""

from cute_kernels.compat.flash_attn import flash_attn_gpu, flash_attn_interface
from cute_kernels.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

# Where FlashAttention-2 has its compiled module, whose functions call those of the interface here.
flash_attn_interface.flash_attn_gpu = flash_attn_gpu  # type: ignore[attr-defined]

__version__ = "2.8.3"  # whose functions these are
__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
