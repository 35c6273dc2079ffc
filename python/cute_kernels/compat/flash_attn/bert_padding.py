"""FlashAttention-2's module `flash_attn.bert_padding`: between batches with padding and rows that
lie one behind the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Those rows of x, (rows, ...)."""
    return x.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...): the values in those rows, 0 in the others."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


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


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse: (batch, seqlen, ...), 0 where there was padding."""
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.view(batch, seqlen, *rows.shape[1:])
