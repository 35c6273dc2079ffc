"""What FlashAttention-3's callers make once a step."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.arguments import Window
from cute_kernels.checks import check_tensor


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """What FlashAttention-3's callers make once a step for all layers.

    Here the work is shared out by each call on the device, from the lengths of that call: nothing
    has to be known before, and the same metadata does for every call.

    Args:
        cache_seqlens: any tensor on the device of the calls. Names and order of the arguments are
            FlashAttention-3's; the others are not looked at.

    Returns:
        (0,), int32, on cache_seqlens' device, for `scheduler_metadata`.
    """
    check_tensor("cache_seqlens", cache_seqlens)
    return cache_seqlens.new_empty(0, dtype=torch.int32)


def check_metadata(scheduler_metadata: Tensor) -> None:
    check_tensor("scheduler_metadata", scheduler_metadata)
    if scheduler_metadata.dtype != torch.int32:
        raise TypeError(
            f"scheduler_metadata has dtype {scheduler_metadata.dtype}, must be torch.int32, as of "
            "get_scheduler_metadata"
        )
