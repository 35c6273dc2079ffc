"""The CPU path of the operators of this folder, in PyTorch operations.

What tensors hold is checked here, and all of it before anything is written. Rows of a cache that a
sequence does not use, and what its page table names beyond them, are not looked at.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cute_kernels import reference
from cute_kernels.cache import eight_bits
from cute_kernels.cache.eight_bits import TREE_TOKENS, factor_of, quantised, rotated
from cute_kernels.varlen_checks import rows_of_sequences


class Places(NamedTuple):
    """Where a sequence's rows are: in an entry of the cache, or in pages."""

    entries: int  # or pages
    page_size: int
    page_table: Tensor | None
    cache_batch_idx: Tensor | None

    @property
    def capacity(self) -> int:
        """How many rows a sequence can have."""
        return self.page_size * (1 if self.page_table is None else self.page_table.shape[1])

    def rows(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Page or entry, and row there, of a sequence's rows first to last."""
        rows = torch.arange(first, last)
        if self.page_table is None:
            entry = sequence
            if self.cache_batch_idx is not None:
                entry = int(self.cache_batch_idx[sequence])
                if not 0 <= entry < self.entries:
                    raise ValueError(
                        f"cache_batch_idx[{sequence}] is {entry}, must be from 0 to below "
                        f"{self.entries}, k_cache's batch_cache"
                    )
            return torch.full_like(rows, entry), rows
        of_row = rows // self.page_size
        pages = self.page_table[sequence, of_row].long()
        wrong = (pages < 0) | (pages >= self.entries)
        if wrong.any():
            place = int(of_row[wrong.nonzero()[0, 0]])
            raise ValueError(
                f"page_table[{sequence}, {place}] is {int(self.page_table[sequence, place])}, "
                f"must be from 0 to below {self.entries}, k_cache's pages"
            )
        return pages, rows % self.page_size


def places_of(k_cache: Tensor, page_table: Tensor | None, cache_batch_idx: Tensor | None) -> Places:
    return Places(k_cache.shape[0], k_cache.shape[1], page_table, cache_batch_idx)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    sinks: Tensor | None,
    softmax_scale: float,
    causal: bool,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    tree_mask: Tensor | None = None,
    qv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    num_splits: int = 0,
    sm_margin: int = 0,
    rotation_seed: int | None = None,
    attention_chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """Each sequence's attention to its keys; rows of q that no sequence has get 0 and -inf."""
    places = places_of(k_cache, page_table, cache_batch_idx)
    sequences = rows_of_sequences("q", q, cu_seqlens_q, None, max_seqlen_q)
    mask = reference.mask_of(causal, window_left, window_right)
    wide = reference.accumulator_dtype(q.dtype)
    group = q.shape[1] // max(1, k_cache.shape[2])
    out, lse = reference.empty_outputs(q, v_cache, eight_bits.output_dtype(q))
    out.zero_()
    lse.fill_(-math.inf)
    for i, queries in enumerate(sequences):
        last = _length("cache_seqlens", cache_seqlens, i, places.capacity)
        first = 0
        if cache_leftpad is not None:
            first = _length("cache_leftpad", cache_leftpad, i, last, "cache_seqlens")
        keys = places.rows(i, first, last)
        own_q = rotated(q[queries].to(wide), rotation_seed)
        if q_descale is not None:
            own_q = own_q * q_descale[i].repeat_interleave(group)[:, None]
        own_k = k_cache[keys].to(wide) * factor_of(k_descale, i, keys)
        own_v = v_cache[keys].to(wide) * factor_of(v_descale, i, keys)
        if qv is not None:
            own_q = torch.cat([own_q, qv[queries].to(wide)], -1)
            own_k = torch.cat([own_k, own_v], -1)
        hidden = _hidden_by_chunks(own_q.shape[0], last - first, attention_chunk)
        if tree_mask is not None:
            by_tree = _hidden_by_tree(tree_mask[queries], last - first, i)
            hidden = by_tree if hidden is None else hidden | by_tree
        mask = mask._replace(hidden=hidden)
        (part,), (part_lse,) = reference.attention_forward(
            own_q[None], own_k[None], own_v[None], softmax_scale, mask, sinks, softcap
        )
        out[queries], lse[:, queries] = part.to(out.dtype), part_lse
    return out, lse


def _hidden_by_chunks(seqlen_q: int, seqlen_k: int, attention_chunk: int) -> Tensor | None:
    """(seqlen_q, seqlen_k): which keys are not in a query's chunk."""
    if attention_chunk == 0:
        return None
    of_query = (torch.arange(seqlen_q) + seqlen_k - seqlen_q)[:, None] // attention_chunk
    return torch.arange(seqlen_k) // attention_chunk != of_query


def _hidden_by_tree(tree_mask: Tensor, seqlen_k: int, sequence: int) -> Tensor:
    """(seqlen_q, seqlen_k): which of a sequence's last keys, one for each query, a query does not
    see."""
    count = tree_mask.shape[0]
    if count > TREE_TOKENS:
        raise ValueError(
            f"tree_mask is given, but sequence {sequence} has {count} queries, must have at most "
            f"{TREE_TOKENS}"
        )
    token = torch.arange(seqlen_k) - (seqlen_k - count)
    return (token >= 0) & ((tree_mask[:, None] >> token.clamp(0)) & 1 == 0)


def attention_out(out: Tensor, *inputs: Any, **options: Any) -> Tensor:
    """The same with its output in `out`."""
    result, lse = attention(*inputs, **options)
    out.copy_(result)
    return lse


def _length(
    name: str, lengths: Tensor, sequence: int, most: int, of: str = "the rows of its cache"
) -> int:
    length = int(lengths[sequence])
    if not 0 <= length <= most:
        raise ValueError(f"{name}[{sequence}] is {length}, must be from 0 to {most}, {of}")
    return length


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_k_new: Tensor | None,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_seqlens: Tensor | None,
    rotary_interleaved: bool,
    q: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    q_advance: bool = True,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    rotation_seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes k, rotated, and v behind what the caches hold; returns the lengths afterwards, and q
    rotated, or without q nothing."""
    places = places_of(k_cache, page_table, cache_batch_idx)
    sequences = _sequences("k_new", k, cu_seqlens_k_new)
    k, v = (x.flatten(0, -3) for x in (k, v))
    lengths, targets = [], []
    for i, new in enumerate(sequences):
        first = _length("cache_seqlens", cache_seqlens, i, places.capacity)
        last = first + new.stop - new.start
        if last > places.capacity:
            raise ValueError(
                f"cache_seqlens[{i}] is {first}, must be at most "
                f"{places.capacity - (last - first)}: the cache has {places.capacity} rows for a "
                f"sequence, and {last - first} are added"
            )
        lengths.append(last)
        targets.append(places.rows(i, first, last))
    turned = k.new_empty(0)
    if rotary_cos is not None and rotary_sin is not None:
        starts = cache_seqlens if rotary_seqlens is None else rotary_seqlens
        rotary = (rotary_cos, rotary_sin, starts, rotary_interleaved)
        k = _rotate(k, sequences, *rotary, True)
        if q is not None:
            rows = q.flatten(0, -3)
            turned = _rotate(rows, _sequences("q", q, cu_seqlens_q), *rotary, q_advance)
            turned = turned.view(q.shape)
    k = rotated(k, rotation_seed)
    of_k, of_v = (k_cache, k, k_descale, k_scales), (v_cache, v, v_descale, v_scales)
    for cache, rows, descale, scales in (of_k, of_v):
        for i, (new, target) in enumerate(zip(sequences, targets, strict=True)):
            if rows.dtype == cache.dtype:
                cache[target] = rows[new]
                continue
            factor = None if scales is not None else factor_of(descale, i, target)
            cache[target], written = quantised(rows[new], factor, cache.dtype)
            if scales is not None:
                scales[target] = written
    return torch.tensor(lengths, dtype=torch.int32), turned


def _sequences(which: str, x: Tensor, cu_seqlens: Tensor | None) -> list[slice]:
    """The rows of each sequence in x, packed or to be packed."""
    if cu_seqlens is not None:
        return rows_of_sequences(which, x, cu_seqlens, None, None)
    batch, seqlen = x.shape[:2]
    return [slice(i * seqlen, (i + 1) * seqlen) for i in range(batch)]


def _rotate(
    x: Tensor,
    sequences: list[slice],
    cos: Tensor,
    sin: Tensor,
    starts: Tensor,
    interleaved: bool,
    advance: bool,
) -> Tensor:
    """(total, heads, head_dim), rotated; rows that no sequence has become 0.

    In fp32, rounded after each product and after their sum: the bits of the GPU's kernel.
    """
    pairs = cos.shape[1]
    rotated = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for i, rows in enumerate(sequences):
        count = rows.stop - rows.start
        positions = int(starts[i]) + torch.arange(count) * int(advance)
        if count > 0 and not 0 <= int(positions[0]) <= int(positions[-1]) < cos.shape[0]:
            raise ValueError(
                f"rotary_cos has {cos.shape[0]} positions, but sequence {i} stands at "
                f"{int(positions[0])} to {int(positions[-1])}"
            )
        wide = x[rows].to(reference.accumulator_dtype(x.dtype))
        c, s = (table[positions, None].to(wide.dtype) for table in (cos, sin))
        parts = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        if not interleaved:
            parts = slice(0, pairs), slice(pairs, 2 * pairs)
        first, second = (wide[..., part] for part in parts)
        turned = wide.clone()
        turned[..., parts[0]] = first * c - second * s
        turned[..., parts[1]] = first * s + second * c
        rotated[rows] = turned.to(x.dtype)
    return rotated


def combine(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """What attention to all keys gives, from the results of parts of them. A part without a weight,
    as one without keys, whose LSE is -inf, adds nothing, even if it is NaN."""
    if out_partial.shape[0] == 0:
        out = out_partial.new_zeros(out_partial.shape[1:])
        lse = lse_partial.new_full(lse_partial.shape[1:], -math.inf)
    else:
        largest = lse_partial.amax(0)
        origin = largest.masked_fill(largest == -math.inf, 0.0)
        weights = (lse_partial - origin).exp()
        total = weights.sum(0)
        parts = out_partial.masked_fill((weights == 0)[..., None], 0.0)
        out = (weights[..., None] * parts).sum(0) / total.masked_fill(total == 0, 1.0)[..., None]
        lse = origin + total.log()
    return out.to(out_dtype or out_partial.dtype), heads_first(lse)


def heads_first(lse: Tensor) -> Tensor:
    """(batch, seqlen, heads) in the memory of (batch, heads, seqlen)."""
    return lse.transpose(1, 2).contiguous().transpose(1, 2)
