"""Random block masks, and what each of them means in fp64."""

import torch

from cute_kernels import BlockMask

UNIT = 128


def blocks(length, size=UNIT):
    return (length + size - 1) // size


def random_kinds(shape, seed=0):
    """0 hidden, 1 partial, 2 full; some rows and columns of hidden ones only."""
    chance = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 3, shape, generator=chance)
    kinds[:, :, torch.rand(shape[2], generator=chance) < 0.2] = 0
    kinds[..., torch.rand(shape[3], generator=chance) < 0.2] = 0
    return kinds


def listed(kinds, kind):
    """How many blocks of a kind, and their numbers in some order; garbage behind them."""
    is_kind = kinds == kind
    order = torch.where(is_kind, torch.rand(kinds.shape, device=kinds.device), 2.0).argsort(-1)
    counts = is_kind.sum(-1)
    behind = torch.arange(kinds.shape[-1], device=kinds.device) >= counts[..., None]
    return counts.int(), order.masked_fill(behind, 1 << 30).int()


def mask_of(kinds, block_size=UNIT):
    return BlockMask(*listed(kinds, 1), *listed(kinds, 2), block_size=block_size)


def with_blocks(changes, kinds, block_size=(UNIT, UNIT)):
    """A variant's changes of fp64 attention, beside a block mask."""

    def mask(b, h, i, j):
        entry, head = (x if n > 1 else 0 * x for x, n in zip((b, h), kinds.shape, strict=False))
        kind = kinds[entry, head, i // block_size[0], j // block_size[1]]
        shown = kind == 1
        if changes.mask:
            shown = shown & changes.mask(b, h, i, j)
        return (kind == 2) | shown

    return changes._replace(mask=mask)
