"""Attention whose q, k and v lie in one tensor, as a projection gives them: views, no copies."""

from __future__ import annotations

from torch import Tensor

from cute_kernels.arguments import Window, renamed
from cute_kernels.checks import check_int, check_tensor
from cute_kernels.interface import flash_attn_func
from cute_kernels.varlen import flash_attn_varlen_func

# Of the arguments of `flash_attn_varlen_qkvpacked_func`, by those of `flash_attn_varlen_func`.
_NAMES = {
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), "cu_seqlens"),
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), "max_seqlen"),
}


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    tile_config: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` of a q, k and v that lie in one tensor.

    Names and order of the arguments are those of FlashAttention-3's function of this name.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim), or with `num_heads_q` (batch, seqlen, heads of q,
            k and v one after the other, head_dim), k and v having as many heads as each other.
        num_heads_q: how many of the heads are q's; None for the first of these layouts.

    The other arguments, results and errors are those of `flash_attn_func`.
    """
    q, k, v = _apart(qkv, num_heads_q, ("batch", "seqlen"))
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        sinks=sinks,
        return_lse=return_lse or return_attn_probs,
        tile_config=tile_config,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    tile_config: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` of a q, k and v that lie in one tensor.

    Args:
        qkv: (total, 3, heads, head_dim), or with `num_heads_q` (total, heads of q, k and v one
            after the other, head_dim), k and v having as many heads as each other.
        cu_seqlens: (batch + 1,), int32, on qkv's device: of q, k and v.
        max_seqlen: at least what the longest sequence has; None if not known.
        num_heads_q: how many of the heads are q's; None for the first of these layouts.

    The other arguments, results and errors are those of `flash_attn_varlen_func`.
    """
    q, k, v = _apart(qkv, num_heads_q, ("total",))
    try:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            softmax_scale=softmax_scale,
            causal=causal,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            window_size=window_size,
            attention_chunk=attention_chunk,
            softcap=softcap,
            deterministic=deterministic,
            sm_margin=sm_margin,
            sinks=sinks,
            return_lse=return_lse or return_attn_probs,
            tile_config=tile_config,
        )
    except (TypeError, ValueError) as error:
        raise renamed(error, _NAMES) from None


def _apart(qkv: Tensor, num_heads_q: int | None, rows: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Views of q, k and v."""
    check_tensor("qkv", qkv)
    check_int("num_heads_q", num_heads_q, least=1)
    if num_heads_q is None:
        if qkv.dim() != len(rows) + 3 or qkv.shape[-3] != 3:
            raise ValueError(
                f"qkv has shape {tuple(qkv.shape)}, must be ({', '.join(rows)}, 3, heads, "
                "head_dim), or have num_heads_q given"
            )
        return qkv.unbind(-3)
    if qkv.dim() != len(rows) + 2:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, must be ({', '.join(rows)}, heads of q, k and v, "
            "head_dim) where num_heads_q is given"
        )
    others = qkv.shape[-2] - num_heads_q
    if others <= 0 or others % 2 != 0:
        raise ValueError(
            f"num_heads_q is {num_heads_q}, must leave an even number of qkv's {qkv.shape[-2]} "
            "heads, 2 or more, to k and v"
        )
    heads = (slice(num_heads_q), slice(num_heads_q, -others // 2), slice(-others // 2, None))
    return tuple(qkv[..., part, :] for part in heads)
