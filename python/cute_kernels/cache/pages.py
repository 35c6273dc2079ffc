"""What `flash_attn_varlen_func` does with a page table."""

from __future__ import annotations

from torch import Tensor

from cute_kernels.cache.attention import attend
from cute_kernels.checks import check_tensor, refuse_derivatives
from cute_kernels.varlen_checks import check_int32

_NAME = "flash_attn_varlen_func"


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
) -> tuple[Tensor, Tensor]:
    """Output and LSE of sequences whose keys are in pages of k and v."""
    refuse_derivatives(_NAME, q, k, v, sinks, where=" with page_table")
    for name, given in (("cu_seqlens_k", cu_seqlens_k), ("tile_config", tile_config)):
        if given is not None:
            raise ValueError(f"{name} is given, must be None with page_table")
    if seqused_q is not None:
        raise NotImplementedError(f"{_NAME}: seqused_q is not there yet with page_table")
    if seqused_k is None:
        raise ValueError("seqused_k is None, must be given with page_table")
    try:
        return attend(
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
            max_seqlen_q,
            window_left,
            window_right,
            softcap,
            num_splits,
            sm_margin,
            None,
            attention_chunk,
        )
    except (TypeError, ValueError):
        _check_used(q, cu_seqlens_q, seqused_k)
        raise


def _check_used(q: Tensor, cu_seqlens_q: Tensor, seqused_k: Tensor) -> None:
    """Raises what a refused seqused_k is refused for: the operator calls it cache_seqlens."""
    check_tensor("q", q)
    check_int32("cu_seqlens_q", cu_seqlens_q, q)
    check_int32("seqused_k", seqused_k, q)
    batch = cu_seqlens_q.shape[0] - 1
    if seqused_k.shape[0] != batch:
        raise ValueError(
            f"seqused_k has shape ({seqused_k.shape[0]},), must be (batch,) = ({batch},)"
        )
