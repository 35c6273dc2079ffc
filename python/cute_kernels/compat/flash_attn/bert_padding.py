"""FlashAttention-2's module `flash_attn.bert_padding`: between batches with padding and rows that
lie one behind the other."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

_OF_EINOPS = ("rearrange", "repeat")


def __getattr__(name: str) -> Any:
    """Functions of einops, which FlashAttention-2's module has imported, and libraries (verl, for
    one) import from there."""
    if name in _OF_EINOPS:
        return getattr(importlib.import_module("einops"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Those rows of x, (rows, ...)."""
    return x.index_select(0, indices)


def index_first_axis_residual(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Those rows of x, and x, without a gradient through the latter."""
    return index_first_axis(x, indices), x.detach()


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...): the values in those rows, 0 in the others. Indices of int32, as
    transformers has them of a step of generation, are taken, too."""
    rows = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return rows.index_copy(0, indices.long(), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of a batch that are not padding.

    Waits for a GPU.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), not 0 where a row is not padding.
        unused_mask: (batch, seqlen), not 0 where a row is kept, too, but not used.

    Returns:
        (rows, ...); where they were in (batch * seqlen); cu_seqlens, (batch + 1,), int32; the
        largest number in a sequence; and how many are used, (batch,), int32.
    """
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.amax()) if lengths.numel() else 0
    return rows, indices, cu_seqlens, longest, used.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`unpad_input` of rows of a batch that hold several sequences one behind the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), of each row of the batch the lengths of its
            sequences, in their order, and 0 behind the last one. What they leave over is padding.

    Returns:
        The first four of `unpad_input`.
    """
    total = attention_mask_in_length.sum(-1, keepdim=True)
    position = torch.arange(attention_mask_in_length.shape[-1], device=total.device)
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths != 0].int()
    indices = (position < total).flatten().nonzero().flatten()
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.amax()) if lengths.numel() else 0
    return rows, indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse: (batch, seqlen, ...), 0 where there was padding."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.view(batch, seqlen, *rows.shape[1:])
