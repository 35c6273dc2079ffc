"""What PyTorch has no public names for in its choice of an attention kernel, all of it.

Where another PyTorch lacks one of them, what stands in its place does without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention
from torch.nn.attention import SDPBackend

_backends: Any = SDPBackend
_registry: Any = getattr(torch.nn.attention, "_registry", None)
_get_order: Callable[[], list[int]] | None = getattr(torch._C, "_get_sdp_priority_order", None)
_set_order: Callable[[list[int]], None] | None = getattr(torch._C, "_set_sdp_priority_order", None)


def forget_implementation(name: str) -> None:
    """Takes a name out of the registry of flash attention implementations."""
    getattr(_registry, "_FLASH_ATTENTION_IMPLS", {}).pop(name, None)


def put_flash_before_cudnn() -> Callable[[], None]:
    """Has `F.scaled_dot_product_attention` take its flash backend where it could take cuDNN's, as
    PyTorch would on Hopper. What is returned undoes it."""
    if _get_order is None or _set_order is None or not hasattr(_backends, "CUDNN_ATTENTION"):
        return _nothing
    if torch.cuda.is_available():
        # The order has its default only with the first choice, which would undo another.
        x = torch.empty((1, 1, 1, 8), dtype=torch.float16, device="cuda")
        torch._fused_sdp_choice(x, x, x)
    before = _get_order()
    flash, cudnn = int(_backends.FLASH_ATTENTION), int(_backends.CUDNN_ATTENTION)
    if before.index(flash) < before.index(cudnn):
        return _nothing
    set_order, get_order = _set_order, _get_order
    ours = [flash, *(backend for backend in before if backend != flash)]
    set_order(ours)

    def undo() -> None:
        if get_order() == ours:
            set_order(before)

    return undo


def tag_caches(tag: str) -> Callable[[], None]:
    """Keeps `torch.compile` from programs in its caches, also on disk, that it compiled without the
    tag: they hold the backend that SDPA chose then. What is returned undoes it."""
    config: Any = getattr(torch.compiler, "config", None)
    if not hasattr(config, "cache_key_tag"):
        return _nothing
    before = config.cache_key_tag
    config.cache_key_tag = ours = before + tag

    def undo() -> None:
        if config.cache_key_tag == ours:
            config.cache_key_tag = before

    return undo


def _nothing() -> None:
    pass
