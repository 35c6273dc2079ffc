"""FlashAttention-3 and FlashMLA of vLLM's wheel, as libraries of operators."""

from __future__ import annotations

import argparse
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VARIABLE = "CUTE_KERNELS_VLLM_LIBRARY"
FLASHMLA_VARIABLE = "CUTE_KERNELS_FLASHMLA_LIBRARY"
_WHEEL = "of `python -m pip download --no-deps vllm==0.33.0`"
HOW_TO_GET = (
    f"--vllm-library PATH or {VARIABLE} names it: vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so {_WHEEL}"
)
HOW_TO_GET_FLASHMLA = (
    f"--flashmla-library PATH or {FLASHMLA_VARIABLE} names it: vllm/_flashmla_C.abi3.so {_WHEEL}"
)

# What the operator takes besides q, k and v; it has no defaults.
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("k_new", "v_new", "q_v", "out")),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new")),
    **dict.fromkeys(("seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k")),
    **dict.fromkeys(("page_table", "kv_batch_idx", "leftpad_k")),
    **dict.fromkeys(("rotary_cos", "rotary_sin", "seqlens_rotary")),
    **dict.fromkeys(("q_descale", "k_descale", "v_descale")),
    "is_causal": True,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "is_rotary_interleaved": True,
    "scheduler_metadata": None,
    "num_splits": 0,
    "pack_gqa": None,
    "sm_margin": 0,
    "s_aux": None,
    "cp_world_size": 1,
    "cp_rank": 0,
    "cp_tot_seqused_k": None,
}


def add_option(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--vllm-library",
        type=Path,
        metavar="PATH",
        help=f"_vllm_fa3_C.abi3.so of vLLM, for the peer fa3-vllm; default: what {VARIABLE} names",
    )


@cache
def load(path: Path, namespace: str, operator: str):
    """The operators that the library registers.

    Raises:
        OSError: it is not there, does not load or has no such operator.
    """
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    torch.ops.load_library(str(path.resolve()))
    operators = getattr(torch.ops, namespace)
    if not hasattr(operators, operator):
        raise OSError(f"{path} has no operator {namespace}.{operator}")
    return operators


load_attention = partial(load, namespace="_vllm_fa3_C", operator="fwd")
load_flashmla = partial(load, namespace="_flashmla_C", operator="dense_decode_fwd")


def attention(operators: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any):
    """The output of causal attention of packed queries."""
    scale = {"softmax_scale": q.shape[-1] ** -0.5}
    return operators.fwd(q, k, v, **{**_DEFAULTS, **scale, **options})[0]


def scheduler_metadata(
    operators: Any, lengths: torch.Tensor, starts: torch.Tensor, dtype: torch.dtype, **sizes: Any
) -> torch.Tensor:
    """What a step of decoding makes once for all its layers. `sizes`: by the operator's names."""
    absent = ("cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "leftpad_k", "pack_gqa")
    return operators.get_scheduler_metadata(
        seqused_k=lengths,
        cu_seqlens_q=starts,
        qkv_dtype=dtype,
        max_seqlen_k_new=0,
        is_causal=True,
        has_softcap=False,
        num_splits=0,
        sm_margin=0,
        **dict.fromkeys(absent),
        **sizes,
    )


def latent(
    operators: Any,
    q: torch.Tensor,
    head_dim_v: int,
    lengths: torch.Tensor,
    table: torch.Tensor,
    cache: torch.Tensor,
    plan: tuple[Any, Any] = (None, None),
) -> tuple[torch.Tensor, Any, Any]:
    """FlashMLA of (batch, seqlen_q, heads, head_dim) queries to pages of 64: the output, (batch,
    seqlen_q, heads, head_dim_v), and its plan, how work is shared out, for calls of the same
    lengths."""
    scale = q.shape[-1] ** -0.5
    out, _, *plan = operators.dense_decode_fwd(
        q, cache, head_dim_v, lengths, table, scale, True, *plan, None
    )
    return out, *plan
