"""What hooks of the CPU's are told and asked."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from cute_kernels.compile.hooks import COORDINATES
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


def ask(
    variant: BoundVariant, hook: str, names: dict[str, Any], seen: Tensor | None = None
) -> Tensor:
    """What a hook says, with the values of its parameters; about pairs that are `seen` only,
    (batch, heads, queries, keys): of others it may say anything."""
    function = variant.variant.python[hook]
    assert function is not None
    asked = {name: names[name] for name in inspect.signature(function).parameters}
    if seen is not None:
        asked = _about_seen(asked, seen)
    result = function(**asked)
    answer = torch.as_tensor(result, device=names["key"].device)
    return answer.bool() if hook == "mask" else answer  # any number but 0 shows, as in C++


def _about_seen(names: dict[str, Any], seen: Tensor) -> dict[str, Any]:
    """The names, where for pairs that are not seen everything is that of a pair that is: so what a
    hook says of them and its derivatives, which are multiplied by 0, are finite if they are so of
    that one, and no index leaves its axis."""
    if seen.numel() == 0:
        return names
    first = seen.flatten().to(torch.uint8).argmax().view(1)
    place: list[Tensor] = []
    sizes = seen.shape
    for size in reversed(sizes):
        place.insert(0, first % size)
        first = first // size
    any_seen = seen.any()
    told = {}
    for name, x in names.items():
        if name in (*COORDINATES, "position", "score"):
            x = x.expand(sizes)
            one = x.detach()[tuple(place)]
            told[name] = torch.where(seen, x, torch.where(any_seen, one, torch.zeros_like(one)))
        elif isinstance(x, Tensor) and x.is_floating_point():
            told[name] = torch.where(any_seen, x, x.detach())
        else:
            told[name] = x
    return told


def seen_by(mask: Mask, position: Tensor, key: Tensor) -> Tensor:
    seen = torch.ones_like(position * key, dtype=torch.bool)
    if mask.left is not None:
        seen = seen & (position - key <= mask.left)
    if mask.right is not None:
        seen = seen & (key - position <= mask.right)
    return seen
