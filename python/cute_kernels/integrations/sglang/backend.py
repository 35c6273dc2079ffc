"""SGLang's backend for FlashAttention-3, on this package's functions.

What SGLang knows of batches, caches, CUDA graphs and speculative decoding stays its own: of the
backend only the two functions that attend are others.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
from torch import Tensor

from cute_kernels.cache import flash_attn_with_kvcache
from cute_kernels.cache.eight_bits import E4M3
from cute_kernels.integrations.sglang import NAME
from cute_kernels.varlen import flash_attn_varlen_func

_DTYPES = (torch.float16, torch.bfloat16)
_REFUSED = ("score_mod", "mask_mod", "rel_bias")
_UNREAD = ("aux_tensors", "max_seqlen_k", "rel_bias_prep_cache", "scheduler_metadata", "ver")


def attend_to_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    page_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    cu_seqlens_k_new: Tensor | None = None,
    softcap: float | None = 0.0,
    **options: Any,
) -> Any:
    """`flash_attn_with_kvcache` as SGLang calls it: of keys that are in the cache already, though
    it says where new ones end, and with metadata of FlashAttention's."""
    return flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        page_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        softcap=softcap or 0.0,
        **_known(options),
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    out: Tensor | None = None,
    softcap: float | None = 0.0,
    return_softmax_lse: bool = False,
    **options: Any,
) -> Any:
    """`flash_attn_varlen_func` as SGLang calls it."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = {**_known(options), "softcap": softcap or 0.0, "return_lse": True}
    result, lse = flash_attn_varlen_func(q, k, v, *lengths, **options)
    if out is not None:
        result = out.copy_(result)
    return (result, lse) if return_softmax_lse else result


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Without what is refused if it is asked for, and what does not matter without it."""
    for name in _REFUSED:
        if options.get(name) is not None:
            raise NotImplementedError(
                f"{NAME}: {name} is given: caches have none here, choose fa3 or fa4 for this model"
            )
    return {name: x for name, x in options.items() if name not in (*_REFUSED, *_UNREAD)}


def _with(function: Callable[..., Any], **names: Callable[..., Any]) -> Callable[..., Any]:
    """The function with others in place of globals that it calls by these names."""
    missing = set(names) - set(function.__code__.co_names) - set(_names_inside(function.__code__))
    if missing:
        raise RuntimeError(f"{NAME}: this SGLang's {function.__qualname__} calls no {missing}")
    known = {**function.__globals__, **names}
    inputs = (function.__code__, known, function.__name__, function.__defaults__)
    changed = types.FunctionType(*inputs, function.__closure__)
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed


def _names_inside(code: types.CodeType) -> list[str]:
    inner = [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return [name for x in inner for name in (*x.co_names, *_names_inside(x))]


class CuteKernelsBackend(FlashAttentionBackend):
    """Caches of 16 bits, and of e4m3 where attention is not latent; Hopper."""

    def __init__(self, model_runner: Any, **options: Any) -> None:
        dtype, name = model_runner.kv_cache_dtype, model_runner.kv_cache_dtype_str
        latent = model_runner.use_mla_backend
        if dtype not in (_DTYPES if latent else (*_DTYPES, E4M3)) or name == "mxfp8":
            known = (
                "auto or bfloat16 with latent attention" if latent else "auto, bfloat16 or fp8_e4m3"
            )
            raise NotImplementedError(
                f"{NAME}: --kv-cache-dtype is {name}, of {dtype}, must be {known}"
            )
        super().__init__(model_runner, **options)
        self.flash_attn_with_kvcache = attend_to_cache
        self.flash_attn_varlen_func = attend
        self._get_scheduler_metadata = None  # the kernels share out work by themselves

    def prepare_paged_mha_query(
        self,
        q: Tensor,
        q_rope: Tensor | None,
        k_rope: Tensor | None,
        layer: Any,
        *,
        logical_batch_size: int,
        kv_head_num: int,
        is_prefill: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """What is attended with, and the descales of K and V: queries have 16 bits whatever the
        cache has, where SGLang's own rounds them to e4m3."""
        if self.kv_cache_dtype != E4M3:
            if q_rope is not None:
                q_rope = q_rope.to(self.kv_cache_dtype)
            return q.to(self.kv_cache_dtype), q_rope, k_rope, None, None
        if layer.k_scale is None or (is_prefill and self.fa_skip_kv_cache):
            return q, q_rope, k_rope, None, None
        shape = (logical_batch_size, kv_head_num)
        return q, q_rope, k_rope, layer.k_scale.expand(shape), layer.v_scale.expand(shape)

    forward_extend = _with(
        FlashAttentionBackend.forward_extend,
        flash_attn_with_kvcache=attend_to_cache,
        flash_attn_varlen_func=attend,
    )
    forward_decode = _with(
        FlashAttentionBackend.forward_decode, flash_attn_with_kvcache=attend_to_cache
    )
