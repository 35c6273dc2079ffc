"""The rules of variant_rules as FlashAttention-4 takes them: functions in CuTe's Python, and lists
of blocks. Needs flash-attn-4."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cutlass
from cutlass import cute
from flash_attn.cute import flash_attn_func, utils
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from torch import Tensor

from bench.variant_rules import WINDOW


@cute.jit
def _alibi(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    slope = utils.scalar_to_ssa(aux_tensors[0][head[0]], cutlass.Float32)
    return score + slope * (kv_idx - q_idx).to(cutlass.Float32)


@cute.jit
def _alibi_gradient(grad, score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return grad


@cute.jit
def _document(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    numbers = aux_tensors[0]
    of_query = utils.scalar_to_ssa(numbers[batch[0], q_idx[0]], cutlass.Int32)
    of_key = utils.scalar_to_ssa(numbers[batch[0], kv_idx[0]], cutlass.Int32)
    return (kv_idx <= q_idx) & (of_query == of_key)


@cute.jit
def _prefix_lm(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    prefix = utils.scalar_to_ssa(aux_tensors[0][batch[0]], cutlass.Int32)
    return (kv_idx <= q_idx) | (kv_idx < prefix)


@cute.jit
def _window(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return (kv_idx <= q_idx) & (q_idx - kv_idx < cute.full_like(q_idx, WINDOW))


MASKS = {"document": _document, "prefix_lm": _prefix_lm, "window": _window}


def call(rule: str, tensors: list[Tensor], blocks: Any) -> Callable[..., Tensor]:
    """Of dense q, k and v. `tensors`: what the rule's hooks read; `blocks`: torch's BlockMask."""
    if rule == "alibi":
        return partial(
            flash_attn_func,
            causal=True,
            score_mod=_alibi,
            score_mod_bwd=_alibi_gradient,
            aux_tensors=tensors,
        )

    def lists(of: str) -> BlockSparseTensorsTorch:
        """Partial and full blocks of keys ("kv"), or transposed, of queries ("q")."""
        names = (f"{of}_num_blocks", f"{of}_indices")
        names += tuple(f"full_{name}" for name in names)
        tensors = (getattr(blocks, name) for name in names)
        return BlockSparseTensorsTorch(*tensors, block_size=blocks.BLOCK_SIZE)

    return partial(
        flash_attn_func,
        mask_mod=MASKS[rule],
        aux_tensors=tensors or None,
        block_sparse_tensors=lists("kv"),
        block_sparse_tensors_bwd=lists("q"),
    )
