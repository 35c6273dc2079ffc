"""What `flash_attn_varlen_func` does with a page table."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from cute_kernels.arguments import renamed
from cute_kernels.cache.attention import attend
from cute_kernels.checks import check_tensor, refuse_derivatives
from cute_kernels.varlen_checks import check_int32, rows_of_sequences

_NAME = "flash_attn_varlen_func"
# Of its arguments, by the operator's.
_NAMES = {"k_cache": "k", "v_cache": "v", "cache_seqlens": "seqused_k"}

# What the operator has as its defaults: what is not passed costs no time.
_USUAL_HINTS = (None, None, 0.0, 0, 0, None, 0)


def attend_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    num_splits: int,
    sm_margin: int,
    sinks: Tensor | None,
    page_table: Tensor,
    tile_config: str | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    tree_mask: Tensor | None,
    attention_chunk: int,
    qv: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of sequences whose keys are in pages of k and v."""
    descales = (q_descale, k_descale, v_descale)
    refuse_derivatives(_NAME, q, k, v, qv, sinks, *descales, where=" with page_table")
    for name, given in (("cu_seqlens_k", cu_seqlens_k), ("tile_config", tile_config)):
        if given is not None:
            raise ValueError(f"{name} is given, must be None with page_table")
    if seqused_k is None:
        raise ValueError("seqused_k is None, must be given with page_table")
    unused = None
    if seqused_q is not None:
        if tree_mask is not None:
            raise ValueError("tree_mask is given, must be None with seqused_q")
        _check_used(q, cu_seqlens_q, max_seqlen_q, seqused_q, seqused_k, page_table)
        cu_seqlens_q, unused = _halves(q, cu_seqlens_q, seqused_q)
        max_seqlen_q = None  # unused rows may be more
        seqused_k = torch.stack([seqused_k, torch.zeros_like(seqused_k)], 1).flatten()
        page_table = _twice(page_table)
        q_descale, k_descale, v_descale = (
            _twice(x) if isinstance(x, Tensor) and x.dim() == 2 else x
            for x in (q_descale, k_descale, v_descale)
        )
    hints: tuple[Any, ...] = (window_left, window_right, softcap, num_splits, sm_margin)
    hints = (*hints, None, attention_chunk)
    try:
        out, lse = attend(
            None,
            q,
            k,
            v,
            cu_seqlens_q,
            seqused_k,
            page_table,
            None,
            None,
            sinks,
            softmax_scale,
            causal,
            q_descale,
            k_descale,
            v_descale,
            tree_mask,
            qv,
            max_seqlen_q,
            *(() if hints == _USUAL_HINTS else hints),
        )
    except (TypeError, ValueError, NotImplementedError) as error:
        raise _in_own_words(error, unused is not None) from None
    if unused is not None and sinks is not None:  # which all other rows without keys have as LSE
        lse = lse.masked_fill(unused, -math.inf)
    return out, lse


def _in_own_words(error: Exception, is_halved: bool) -> Exception:
    """`is_halved`: sequences were two of the operator's."""
    error = renamed(error, _NAMES)
    if not is_halved:
        return error
    entry = r"\b(seqused_k|page_table)\[(\d+)"
    own = re.sub(entry, lambda match: f"{match[1]}[{int(match[2]) // 2}", str(error))
    return type(error)(own)


def _check_used(
    q: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int | None,
    seqused_q: Tensor,
    seqused_k: Tensor,
    page_table: Tensor,
) -> None:
    """What the operator does not see of a call with seqused_q."""
    batch = _check_lengths(q, cu_seqlens_q, seqused_q=seqused_q, seqused_k=seqused_k)
    check_int32("page_table", page_table, q, dims=2)
    if page_table.shape[0] != batch:
        raise ValueError(
            f"page_table has shape {tuple(page_table.shape)}, must be (batch, max_pages) with "
            f"batch {batch}"
        )
    if q.device.type == "cpu" and not torch.compiler.is_compiling() and type(q) is Tensor:
        rows_of_sequences("q", q, cu_seqlens_q, seqused_q, max_seqlen_q)


def _check_lengths(q: Tensor, cu_seqlens_q: Tensor, **used: Tensor) -> int:
    """The batch."""
    check_tensor("q", q)
    check_int32("cu_seqlens_q", cu_seqlens_q, q)
    batch = cu_seqlens_q.shape[0] - 1
    for name, lengths in used.items():
        check_int32(name, lengths, q)
        if lengths.shape[0] != batch:
            raise ValueError(
                f"{name} has shape ({lengths.shape[0]},), must be (batch,) = ({batch},)"
            )
    return batch


def _halves(q: Tensor, cu_seqlens_q: Tensor, seqused_q: Tensor) -> tuple[Tensor, Tensor]:
    """cu_seqlens of twice as many sequences, which are the used rows of a slot and then the others,
    and which rows of q are such others."""
    first, end = cu_seqlens_q[:-1], cu_seqlens_q[1:]
    middle = torch.minimum(first + seqused_q.clamp(min=0), end)
    starts = torch.cat([torch.stack([first, middle], 1).flatten(), cu_seqlens_q[-1:]])
    rows = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
    started = torch.searchsorted(starts, rows, right=True)
    return starts, started % 2 == 0


def _twice(of_sequences: Tensor) -> Tensor:
    """Each row two times, one behind the other."""
    return of_sequences[:, None].expand(-1, 2, -1).flatten(0, 1)
