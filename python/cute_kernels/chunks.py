"""Attention in chunks of the keys: each chunk of a sequence, with its queries, is a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.checks import check_int

# cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, diagonal
Lengths = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def check_chunk(attention_chunk: int) -> None:
    check_int("attention_chunk", attention_chunk, least=0, none="")


def in_chunks(
    attention_chunk: int,
    total_k: int,
    max_seqlen_k: int | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
) -> Lengths:
    """The chunks of packed sequences as sequences of their own, on the device, without waiting.

    Query i of a sequence stands at the key position i + used keys - used queries. The queries at
    the positions from c * attention_chunk up to before (c + 1) * attention_chunk, and the keys
    there, are a sequence. So are, before these, the queries at positions below 0, without keys.

    Args:
        attention_chunk: at least 1.
        total_k: the rows of k.
        max_seqlen_k: no sequence uses more keys; may be more than there are.
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k: as of `flash_attn_varlen_func`.

    Returns:
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k and the queries' diagonal as the varlen
        operators take them, of as many sequences for each as the longest has chunks, and one.
    """
    longest_k = total_k if max_seqlen_k is None else min(max_seqlen_k, total_k)
    size = max(1, min(attention_chunk, longest_k))  # a larger one has no edge that counts either
    count = (longest_k + size - 1) // size
    edges = torch.arange(count + 1, dtype=torch.int32, device=cu_seqlens_q.device) * size
    used_q = cu_seqlens_q.diff() if seqused_q is None else seqused_q
    used_k = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    first_position = (used_k - used_q)[:, None]
    edges_q = torch.minimum((edges - first_position).clamp(min=0), used_q[:, None])
    edges_k = torch.minimum(edges, used_k[:, None])

    def sequences(cu_seqlens: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Their cu_seqlens, how many rows they use, and (batch, count + 1) their first rows."""
        edges = torch.nn.functional.pad(edges, (1, 0))
        starts = cu_seqlens[:-1, None] + edges[:, :-1]
        return torch.cat([starts.flatten(), cu_seqlens[-1:]]), edges.diff().flatten(), edges[:, :-1]

    starts_q, counts_q, first_q = sequences(cu_seqlens_q, edges_q)
    starts_k, counts_k, first_k = sequences(cu_seqlens_k, edges_k)
    diagonal = first_q + first_position - first_k
    return starts_q, starts_k, counts_q, counts_k, diagonal.flatten()
