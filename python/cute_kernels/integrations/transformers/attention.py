"""A layer's attention as transformers calls it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from cute_kernels.cache import flash_attn_with_kvcache
from cute_kernels.integrations.transformers import NAME
from cute_kernels.integrations.transformers.fallback import Result, fall_back
from cute_kernels.integrations.transformers.masks import (
    Lengths,
    Seen,
    decode,
    packed_by_positions,
)
from cute_kernels.integrations.transformers.support import attends_to_caches, unsupported
from cute_kernels.interface import flash_attn_func
from cute_kernels.varlen import flash_attn_varlen_func

_HALF = (torch.float16, torch.bfloat16)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **options: Any,
) -> Result:
    """A function of transformers' AttentionInterface.

    Args:
        module: the layer; its `is_causal` and the window of its `config` are looked at.
        query, key, value: (batch, heads, seqlen, head_dim), key and value with their own heads.
        attention_mask: what `masks.mask` gave, or a mask of four dimensions as "sdpa" takes it.
        sliding_window: how many keys a query sees, its own among them; the mask says whether.
        s_aux: (heads,), sinks.
        position_ids: (1, seqlen), from which packed sequences are told apart where no mask does,
            as FlashAttention's integration does. Not in compiled models.
        cu_seq_lens_q, cu_seq_lens_k: (sequences + 1,), of packed sequences; no mask is looked at.

    Returns:
        (batch, seqlen, heads, value's head_dim), and None in place of probabilities.

    Raises:
        NotImplementedError: dropout, or a feature that the model's own attention lacks, too.
    """
    if dropout:
        raise NotImplementedError(
            f"{NAME}: attention dropout is {dropout}, must be 0: set it in the config, or take "
            "another attn_implementation; cute_kernels.variants.dropout is for calls of your own"
        )
    query, key, value = _of_one_dtype(module, query, key, value)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = _mask(module, key.shape[2], causal, attention_mask, sliding_window)
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if not isinstance(mask, Seen):
            mask = _by_arguments(key.shape[2], causal, sliding_window)
        ends = (cu_seq_lens_q.to(torch.int32), cu_seq_lens_k.to(torch.int32))
        mask = Seen(mask.causal, mask.left, mask.keys, mask.chunk, Lengths(*ends))
    elif isinstance(mask, Seen) and mask.causal and not mask.lengths and position_ids is not None:
        packed = packed_by_positions(position_ids, query, mask.keys)
        if packed is not None:
            mask = mask._replace(lengths=packed)

    reason = unsupported(query, key, value, isinstance(mask, Seen), position_bias)
    if reason is not None:
        options.update(scaling=scaling, position_bias=position_bias, softcap=softcap, s_aux=s_aux)
        return fall_back(reason, module, query, key, value, mask, **options)
    seen = cast(Seen, mask)
    chosen: dict[str, Any] = {"causal": seen.causal, "softmax_scale": scaling}
    if seen.left is not None:
        chosen["window_size"] = (seen.left, 0 if seen.causal else seen.left)
    if seen.chunk is not None:
        chosen["attention_chunk"] = seen.chunk
    if softcap is not None:
        chosen["softcap"] = softcap
    if s_aux is not None:
        chosen["sinks"] = s_aux
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return _attend(seen, q, k, v, chosen), None


def _attend(seen: Seen, q: Tensor, k: Tensor, v: Tensor, chosen: dict[str, Any]) -> Tensor:
    """(batch, seqlen, heads, v's head_dim), of tensors in that order."""
    is_batch = seen.lengths is None or seen.ends is not None
    is_step = q.shape[1] == 1 and not _needs_gradient(q, k, v, chosen.get("sinks"))
    if is_step and is_batch and attends_to_caches(q):
        starts, stops = seen.ends or (None, seen.keys)
        out = flash_attn_with_kvcache(q, k, v, cache_leftpad=starts, cache_seqlens=stops, **chosen)
        return cast(Tensor, out)
    if seen.lengths is None:
        k, v = k[:, : seen.keys], v[:, : seen.keys]
        return cast(Tensor, flash_attn_func(q, k, v, **chosen))
    starts_q, starts_k, used_q, used_k = seen.lengths
    packed = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        starts_q,
        starts_k,
        q.shape[1],
        k.shape[1],
        used_q,
        used_k,
        **chosen,
    )
    out = cast(Tensor, packed)
    return out.view(*q.shape[:2], *out.shape[1:])


def _of_one_dtype(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors; norms in float32 may have left some of a model of 16 bits in float32."""
    query = tensors[0]
    dtype, device = query.dtype, query.device.type
    if dtype == torch.float32:
        config: Any = getattr(module, "config", None)
        # Asked only where it may be False: the compilers of torch 2.10 and 2.11 do not trace it.
        has_autocast = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
        if has_autocast and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        elif hasattr(config, "_is_quantized"):
            dtype = config.dtype
        else:
            weights = (x.weight for x in module.modules() if isinstance(x, nn.Linear))
            dtype = next((x.dtype for x in weights if x.dtype in _HALF), dtype)
    if dtype not in _HALF:
        dtype = query.dtype
    return tuple(x.to(dtype) for x in tensors)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    needing = (x is not None and x.requires_grad for x in tensors)
    return torch.is_grad_enabled() and any(needing)


def _mask(
    module: nn.Module,
    keys: int,
    causal: bool,
    attention_mask: Tensor | None,
    sliding_window: int | None,
) -> Seen | Tensor:
    """What a layer's queries see, or the mask if it is one of four dimensions."""
    if attention_mask is None:
        return Seen(causal, None, keys)
    window = _width(module, "sliding_window", sliding_window)
    chunk = _width(module, "attention_chunk_size", None)
    return decode(attention_mask, keys, window, chunk)


def _by_arguments(keys: int, causal: bool, sliding_window: int | None) -> Seen:
    """The same where the mask is not looked at."""
    window = sliding_window is not None and keys > sliding_window
    return Seen(causal, sliding_window - 1 if sliding_window and window else None, keys)


def _width(module: nn.Module, name: str, given: int | None) -> int | None:
    """What the mask was made of: the layer's argument may mean another number where it is not
    causal."""
    width: int | None = getattr(getattr(module, "config", None), name, None)
    return given if width is None else width
