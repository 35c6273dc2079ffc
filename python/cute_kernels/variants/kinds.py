"""The kinds of blocks that a mask in Python makes: it is asked about every query and key."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from cute_kernels.arguments import Window, window_of
from cute_kernels.reference import mask_of
from cute_kernels.variants.checks import Sizes, check_captured, expanded
from cute_kernels.variants.places import ask, places, seen_by
from cute_kernels.variants.variant import BoundVariant, bound

HIDDEN, PARTIAL, FULL = 0, 1, 2


def kinds_of(
    variant: object,
    sizes: tuple[int, int, int, int],
    causal: bool,
    window_size: Window,
    block_size: tuple[int, int],
    device: torch.device | str | None,
) -> Tensor:
    """(batch, heads, query blocks, key blocks), int8, of calls with as many batch entries, heads,
    queries and keys as `sizes` has; see `BlockMask.from_mask`."""
    given = bound(variant)
    if given.variant.python["mask"] is None:
        raise ValueError(f"variant {given.variant.name} has no mask_python to ask")
    if device is None:
        device = next((x.device for x in given.tensors), torch.device("cpu"))
    batch, heads, seqlen_q, seqlen_k = sizes
    given = _checked(given, Sizes(batch, heads, seqlen_q, seqlen_k, seqlen_q, seqlen_k), device)
    mask = mask_of(*window_of(window_size, causal))
    key = torch.arange(seqlen_k, device=device)
    batches = torch.arange(batch, device=device)
    of_queries, of_keys = block_size
    beyond = -seqlen_k % of_keys
    rows = []
    for start in range(0, seqlen_q, of_queries):
        query = torch.arange(start, min(start + of_queries, seqlen_q), device=device)[:, None]
        names = places(batches, heads, query, key, (seqlen_q, seqlen_k)) | given.captured()
        shown, seen = ask(given, "mask", names), seen_by(mask, names["position"], key)
        shown = (shown & torch.ones_like(seen))[(None,) * (4 - max(2, shown.dim()))]
        blocks = (*shown.shape[:3], (seqlen_k + beyond) // of_keys, of_keys)
        some = pad(shown & seen, (0, beyond), value=False).view(blocks).any(-1).any(2)
        every = pad(shown | ~seen, (0, beyond), value=True).view(blocks).all(-1).all(2)
        rows.append(some.to(torch.int8) * torch.where(every, FULL, PARTIAL))
    if not rows:
        return torch.zeros(1, 1, 0, (seqlen_k + beyond) // of_keys, dtype=torch.int8, device=device)
    return torch.stack(rows, 2).to(torch.int8)


def _checked(given: BoundVariant, sizes: Sizes, device: torch.device | str) -> BoundVariant:
    given = given.with_tensors(expanded(given, sizes))
    check_captured(given, torch.empty(0, device=device), sizes)
    return given
