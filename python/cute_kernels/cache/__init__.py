"""Attention to caches of keys and values, and what is written into them."""

from cute_kernels.cache.append import append_kv
from cute_kernels.cache.attention import flash_attn_with_kvcache
from cute_kernels.cache.combine import flash_attn_combine
from cute_kernels.cache.metadata import get_scheduler_metadata

__all__ = ["append_kv", "flash_attn_combine", "flash_attn_with_kvcache", "get_scheduler_metadata"]
