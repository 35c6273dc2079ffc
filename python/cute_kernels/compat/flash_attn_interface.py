"""FlashAttention-3's module `flash_attn_interface`.

The public functions are the package's, which have the same names and order, with four differences:
tensors whose last dimension is not contiguous are copied, max_seqlen may be a tensor, which is not
looked at, sinks are also taken as `s_aux`, as vLLM's fork has them and transformers passes
them: it looks at the signatures, and `flash_attn_with_kvcache` returns four tensors where it is
asked for the LSE, as there. The functions below are FlashAttention-3's torch operators, as
Transformer Engine's context parallelism and Megatron's inference call them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cute_kernels
from cute_kernels.cache.checks import check_output
from cute_kernels.cache.metadata import check_metadata
from cute_kernels.compat.operators import (
    Sequences,
    backward,
    longest,
    rows_contiguous,
    without_gradient,
)

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


_E4M3 = torch.float8_e4m3fn
_LONGEST = {"max_seqlen_q", "max_seqlen_k"}
# Copies of these would take what is written to them.
_WRITTEN = {"k_cache", "v_cache", "out", "k_scales", "v_scales"}


def _with_sinks(
    function: Callable[..., Any], run: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """The function, with `s_aux` in its signature, where transformers looks what it may pass.
    `run`: what is called in its place."""

    @functools.wraps(function)
    def call(*inputs: Any, **options: Any) -> Any:
        s_aux = options.pop("s_aux", None)
        if s_aux is not None:
            if options.get("sinks") is not None:
                raise ValueError("s_aux is given, must be None with sinks, which it is a name of")
            options["sinks"] = s_aux
        given = [taken(name, x) for name, x in zip(names, inputs, strict=False)]
        options = {name: taken(name, x) for name, x in options.items()}
        attend = run or function
        q = given[0] if given else options.get(names[0])
        if run is None and getattr(q, "dtype", None) is _E4M3:
            attend = functools.partial(without_gradient, function)
        return attend(*given, *inputs[len(given) :], **options)

    def taken(name: str, x: Any) -> Any:
        if name in _LONGEST:
            return longest(x)
        return x if name in _WRITTEN else rows_contiguous(x)[0]

    signature = inspect.signature(function)
    names, parameters = list(signature.parameters), list(signature.parameters.values())
    parameters.append(inspect.Parameter("s_aux", inspect.Parameter.KEYWORD_ONLY, default=None))
    call.__module__ = __name__  # where pickle finds it
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


def _with_kvcache(*inputs: Any, **options: Any) -> Any:
    """With two empty tensors behind the LSE, in place of the parts of a split."""
    results = without_gradient(cute_kernels.flash_attn_with_kvcache, *inputs, **options)
    return (*results, *_no_parts(results[0])) if isinstance(results, tuple) else results


def _no_parts(out: Tensor) -> tuple[Tensor, Tensor]:
    nothing = torch.empty(0, dtype=torch.float32, device=out.device)
    return nothing, nothing


flash_attn_func = _with_sinks(cute_kernels.flash_attn_func)
flash_attn_varlen_func = _with_sinks(cute_kernels.flash_attn_varlen_func)
flash_attn_qkvpacked_func = _with_sinks(cute_kernels.flash_attn_qkvpacked_func)
flash_attn_with_kvcache = _with_sinks(cute_kernels.flash_attn_with_kvcache, _with_kvcache)
flash_attn_combine = cute_kernels.flash_attn_combine
get_scheduler_metadata = cute_kernels.get_scheduler_metadata


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    *,
    out: Tensor | None = None,
    window_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of every kind: of batches, packed sequences and caches.

    Args:
        q: (batch, seqlen_q, heads, head_dim), or with cu_seqlens_q (total_q, heads, head_dim).
        k, v: (batch, seqlen_k, key heads, head_dim), with cu_seqlens_k (total_k, key heads,
            head_dim), or a cache, as of `flash_attn_with_kvcache`.
        out_: if given, what the output is written to.
        out, window_size: names that older versions had for `out_` and the two sides of a window.

    The other arguments are those of `flash_attn_func`, `flash_attn_varlen_func` and
    `flash_attn_with_kvcache`, whose `cache_seqlens` is `seqused_k` here, and so are the errors.

    Returns:
        Output, LSE, and two empty tensors in place of the parts of a split.
    """
    out_ = out if out_ is None else out_
    window = (window_size_left, window_size_right) if window_size is None else window_size
    common: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "qv": qv,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "window_size": window,
        "attention_chunk": attention_chunk,
        "softcap": softcap,
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
        "sm_margin": sm_margin,
    }
    of_cache = {
        "k": k_new,
        "v": v_new,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "cache_batch_idx": kv_batch_idx,
        "cache_leftpad": leftpad_k,
        "page_table": page_table,
        "cu_seqlens_k_new": cu_seqlens_k_new,
        "rotary_seqlens": seqlens_rotary,
    }
    if scheduler_metadata is not None:  # which changes nothing
        check_metadata(scheduler_metadata)
    is_packed = cu_seqlens_q is not None and cu_seqlens_k is not None
    is_batch = cu_seqlens_q is None and cu_seqlens_k is None
    asked = [name for name, x in of_cache.items() if x is not None]
    if asked and cu_seqlens_k is not None:
        raise ValueError(f"cu_seqlens_k is given, must be None with {asked[0]}: seqused_k counts")
    if seqused_q is not None and asked == ["page_table"] and cu_seqlens_q is not None:
        result, lse = without_gradient(
            flash_attn_varlen_func,
            q,
            k,
            v,
            cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            page_table=page_table,
            return_attn_probs=True,
            **common,
        )
    elif asked or not (is_packed or is_batch):
        if seqused_q is not None:
            raise NotImplementedError(
                "seqused_q is given, must be None with a cache but for packed queries of pages, "
                "without new keys"
            )
        result, lse, *_ = flash_attn_with_kvcache(
            q,
            k,
            v,
            cache_seqlens=seqused_k,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            rotary_interleaved=rotary_interleaved,
            return_softmax_lse=True,
            **of_cache,
            **common,
        )
    elif is_packed:
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
        result, lse = flash_attn_varlen_func(q, k, v, *lengths, return_attn_probs=True, **common)
    elif seqused_q is None and seqused_k is None:
        result, lse = flash_attn_func(q, k, v, return_attn_probs=True, **common)
    else:
        sequences = Sequences.of_batch(q, k, seqused_q, seqused_k)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        result, lse = flash_attn_varlen_func(
            *flat, **sequences._asdict(), return_attn_probs=True, **common
        )
        result, lse = (
            result.unflatten(0, q.shape[:2]),
            lse.unflatten(1, q.shape[:2]).transpose(0, 1),
        )
    if out_ is not None:
        check_output(out_, result.shape, result)
        result = out_.copy_(result)
    return result, lse, *_no_parts(q)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    *,
    causal: bool | None = None,
    window_size: tuple[int, int] | None = None,
) -> Tensor:
    """Writes the gradients of `_flash_attn_forward` into dq, dk and dv.

    Args:
        out, softmax_lse: of these keys, or of more, of which k and v are a part: so context
            parallelism adds up its gradients.
        sm_margin: no matter what, none of the multiprocessors is left alone.
        causal, window_size: names that older versions had for `is_causal` and the two sides.

    Returns:
        An empty tensor, in place of FlashAttention-3's sums of dout * out.

    Raises:
        ValueError, TypeError: an argument is not as described, or dq, dk or dv is not given.
    """
    window = (window_size_left, window_size_right) if window_size is None else window_size
    sequences = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        used = (sequed_q, sequed_k)
        sequences = Sequences(cu_seqlens_q, cu_seqlens_k, *used, max_seqlen_q, max_seqlen_k)
    elif sequed_q is not None or sequed_k is not None:
        sequences = Sequences.of_batch(q, k, sequed_q, sequed_k)
    backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        (dq, dk, dv),
        sequences,
        softmax_scale,
        is_causal if causal is None else causal,
        window,
        softcap,
        deterministic,
    )
    return torch.empty(0, dtype=torch.float32, device=q.device)
