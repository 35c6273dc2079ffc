"""Other attention, for what the kernels cannot answer."""

from __future__ import annotations

import sys
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cute_kernels.integrations.transformers import NAME
from cute_kernels.integrations.transformers.masks import Seen

Result = tuple[Tensor, Tensor | None]

_warned: set[str] = set()


def fall_back(
    reason: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Seen | Tensor,
    **options: Any,
) -> Result:
    """PyTorch's attention, or where that lacks a feature the model's own, and once a warning.

    Args:
        reason: of the warning.
        query, key, value: (batch, heads, seqlen, head_dim).
        mask: what the queries see, or a mask of four dimensions.
        options: what else the layer was called with; those that are None count as not given.
    """
    if reason not in _warned and not torch.compiler.is_compiling():
        _warned.add(reason)
        warnings.warn(f"{NAME}: a slower attention answers some calls: {reason}", stacklevel=3)
    options = {name: value for name, value in options.items() if value is not None}
    if "softcap" not in options and "s_aux" not in options:
        causal = isinstance(mask, Seen) and mask.is_square_causal(query.shape[2])
        explicit = None if causal else _explicit(mask, query, key)
        return cast(
            Result,
            sdpa_attention_forward(
                module, query, key, value, explicit, is_causal=causal, **options
            ),
        )
    added = _explicit(mask, query, key)
    if added is not None and added.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        added = torch.zeros_like(added, dtype=query.dtype).masked_fill(~added, hidden)
    out, _ = _eager(module)(module, query, key, value, added, **options)
    return out, None


def _eager(module: nn.Module) -> Any:
    """The attention of the file that the model stands in."""
    for owner in type(module).__mro__:
        eager = getattr(sys.modules.get(owner.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise NotImplementedError(
        f"{NAME}: {type(module).__name__} asks for softcap or sinks, which PyTorch's attention "
        "does not have, and its module has no eager_attention_forward to fall back to"
    )


def _explicit(mask: Seen | Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """(batch or 1, 1, queries, keys), True where a query sees a key; None if each sees all."""
    if isinstance(mask, Tensor):
        return mask
    (batch, _, queries, _), keys, device = query.shape, key.shape[2], query.device
    if mask.lengths is None:
        if not mask.causal and mask.left is None and mask.chunk is None and mask.keys == keys:
            return None
        q_place = torch.arange(queries, device=device)[None, :, None] + mask.keys - queries
        k_place = torch.arange(keys, device=device)[None, None]
        shown = (k_place < mask.keys).expand(1, queries, keys)
    else:
        starts_q, starts_k, used_q, used_k = mask.lengths
        used_q = starts_q.diff() if used_q is None else used_q
        used_k = starts_k.diff() if used_k is None else used_k
        q_sequence, q_place, q_used = _places(starts_q, used_q, batch, queries)
        q_place = q_place + (used_k - used_q)[q_sequence]
        q_sequence, q_place, q_used = (x[:, :, None] for x in (q_sequence, q_place, q_used))
        k_sequence, k_place, k_used = (x[:, None] for x in _places(starts_k, used_k, batch, keys))
        shown = (q_sequence == k_sequence) & q_used & k_used
    if mask.causal:
        shown = shown & (k_place <= q_place)
    if mask.left is not None:
        shown = shown & (q_place - k_place <= mask.left)
        if not mask.causal:
            shown = shown & (k_place - q_place <= mask.left)
    if mask.chunk is not None:
        shown = shown & (q_place // mask.chunk == k_place // mask.chunk)
    return shown[:, None]


def _places(starts: Tensor, used: Tensor, batch: int, seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, (batch, seqlen): its sequence, its place there, and whether that is used."""
    row = torch.arange(batch * seqlen, device=starts.device)
    sequence = torch.searchsorted(starts.contiguous(), row, right=True) - 1
    sequence = sequence.clamp(0, used.shape[0] - 1)
    place = row - starts[sequence]
    of_rows = (sequence, place, place < used[sequence])
    sequence, place, is_used = (x.view(batch, seqlen) for x in of_rows)
    return sequence, place, is_used
