"""What hooks of the CPU's are told and asked."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from cute_kernels.reference import Mask
from cute_kernels.variants.variant import BoundVariant


def places(
    batch: Tensor,
    heads: int,
    query: Tensor,
    key: Tensor,
    lengths: tuple[int, int],
    row_q: int = 0,
    row_k: int = 0,
) -> dict[str, Any]:
    """The names that hooks may use beside captured ones, which broadcast to (batch, heads, queries,
    keys): of these batch entries and all heads, `query` being (queries, 1) and `key` (keys,).
    `lengths` are seqlen_q and seqlen_k; the rows are those of query and key 0."""
    seqlen_q, seqlen_k = lengths
    return {
        "batch": batch[:, None, None, None],
        "head": torch.arange(heads, device=key.device)[:, None, None],
        "query": query,
        "key": key,
        "query_row": query + row_q,
        "key_row": key + row_k,
        "position": query + seqlen_k - seqlen_q,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
    }


def ask(variant: BoundVariant, hook: str, names: dict[str, Any]) -> Tensor:
    """What a hook says, with the values of its parameters."""
    function = variant.variant.python[hook]
    assert function is not None
    result = function(**{name: names[name] for name in inspect.signature(function).parameters})
    answer = torch.as_tensor(result, device=names["key"].device)
    return answer.bool() if hook == "mask" else answer  # any number but 0 shows, as in C++


def seen_by(mask: Mask, position: Tensor, key: Tensor) -> Tensor:
    seen = torch.ones_like(position * key, dtype=torch.bool)
    if mask.left is not None:
        seen = seen & (position - key <= mask.left)
    if mask.right is not None:
        seen = seen & (key - position <= mask.right)
    return seen
