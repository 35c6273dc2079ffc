"""What `flash_attn_varlen_func` does with a page table."""

from __future__ import annotations

from torch import Tensor

from cute_kernels.cache.attention import attend
from cute_kernels.checks import refuse_derivatives

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
    qv: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of sequences whose keys are in pages of k and v."""
    refuse_derivatives(_NAME, q, k, v, qv, sinks, where=" with page_table")
    for name, given in (("cu_seqlens_k", cu_seqlens_k), ("tile_config", tile_config)):
        if given is not None:
            raise ValueError(f"{name} is given, must be None with page_table")
    if seqused_q is not None:
        raise NotImplementedError(f"{_NAME}: seqused_q is not there yet with page_table")
    if seqused_k is None:
        raise ValueError("seqused_k is None, must be given with page_table")
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
        qv,
        max_seqlen_q,
        window_left,
        window_right,
        softcap,
        num_splits,
        sm_margin,
        None,
        attention_chunk,
    )
