"""Which blocks of queries and keys a call looks at, in FlexAttention's form."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from cute_kernels.checks import INTS, check_device, check_int, check_tensor
from cute_kernels.variants.kinds import FULL, HIDDEN, PARTIAL, kinds_of

_CHECKS_CONTENTS = os.environ.get("CUTE_KERNELS_CHECK") == "1"
UNIT = 128  # queries and keys that kernels walk in: block sizes are multiples of it


class BlockLists(NamedTuple):
    """What kernels read of a block mask, in units of UNIT queries and UNIT keys; int32.

    Attributes:
        key_counts: (batch, heads, units of queries), how many units of keys are not hidden.
        keys: (batch, heads, units of queries, units of keys), their numbers, ascending, times 2,
            and 1 more of those that are full; what stands behind the count means nothing.
        query_counts, queries: the same of the units of queries that see a unit of keys.
        turns: of queries' shape, how many units of keys before this one those queries see.
    """

    key_counts: Tensor
    keys: Tensor
    query_counts: Tensor
    queries: Tensor
    turns: Tensor


class BlockMask:
    """Which blocks of a call's queries and keys are hidden, shown, or shown in part.

    Beside a `Variant`, the `mask` of the variant says what partial blocks show, and full ones show
    all; without one partial blocks show all, too. Blocks that are not listed are hidden and cost
    nothing. What ``causal`` and ``window_size`` of the call hide stays hidden in all of them.

    Args:
        kv_num_blocks: (batch, heads, query blocks), int32: how many blocks of keys are partial for
            each block of queries. Batch and heads of 1 are the same for all.
        kv_indices: (batch, heads, query blocks, key blocks), int32: which ones, in any order; what
            stands behind their number means nothing. What is the number of no block is refused on
            the CPU and where the environment had ``CUTE_KERNELS_CHECK=1``, else left out.
        full_kv_num_blocks, full_kv_indices: the same of full blocks; none if None. A block that is
            listed in both is full.
        block_size: queries and keys of a block, an int or (queries, keys): multiples of 128.

    Raises:
        ValueError, TypeError: an argument is not as described.
    """

    def __init__(
        self,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        full_kv_num_blocks: Tensor | None = None,
        full_kv_indices: Tensor | None = None,
        *,
        block_size: int | tuple[int, int] = UNIT,
    ) -> None:
        self.block_size = _checked_block_size(block_size)
        _check_list("kv_num_blocks", kv_num_blocks, "kv_indices", kv_indices)
        kinds = torch.full(kv_indices.shape, HIDDEN, dtype=torch.int8, device=kv_indices.device)
        kinds = _listed("kv_indices", kinds, kv_num_blocks, kv_indices, PARTIAL)
        if full_kv_num_blocks is not None and full_kv_indices is not None:
            _check_list(
                "full_kv_num_blocks", full_kv_num_blocks, "full_kv_indices", full_kv_indices
            )
            check_device("full_kv_indices", full_kv_indices, kv_indices, "kv_indices")
            if full_kv_indices.shape != kv_indices.shape:
                raise ValueError(
                    f"full_kv_indices has shape {tuple(full_kv_indices.shape)}, must have "
                    f"kv_indices' {tuple(kv_indices.shape)}"
                )
            kinds = _listed("full_kv_indices", kinds, full_kv_num_blocks, full_kv_indices, FULL)
        elif full_kv_num_blocks is not None or full_kv_indices is not None:
            raise ValueError("full_kv_num_blocks and full_kv_indices go together: one is None")
        self._set(kinds)

    def _set(self, kinds: Tensor) -> None:
        self.kinds = kinds  # (batch, heads, query blocks, key blocks), int8: HIDDEN and so on
        for axis, size in zip((-2, -1), self.block_size, strict=True):
            kinds = kinds.repeat_interleave(size // UNIT, axis)
        self.lists = block_lists(kinds)

    @classmethod
    def from_torch(cls, block_mask: Any) -> BlockMask:
        """Of a ``torch.nn.attention.flex_attention.BlockMask``: its blocks, not its ``mask_mod``,
        which a `Variant` says in C++.

        Raises:
            TypeError: it has not the attributes of one.
            ValueError: its blocks are of another size than multiples of 128.
        """
        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
        if not all(hasattr(block_mask, name) for name in (*names, "BLOCK_SIZE")):
            raise TypeError(
                f"block_mask is a {type(block_mask).__name__}, must be a BlockMask of "
                "torch.nn.attention.flex_attention"
            )
        lists = [getattr(block_mask, name) for name in names]
        seqlens = getattr(block_mask, "seq_lengths", None)
        for i, x in enumerate(lists):
            if x is None:
                continue
            x = x[(None,) * (3 + i % 2 - x.dim())]  # sliced ones may have fewer dimensions
            if i % 2 and seqlens is not None:  # lists may have no room for blocks that none has
                blocks = -(-seqlens[1] // block_mask.BLOCK_SIZE[1])
                x = pad(x, (0, max(0, blocks - x.shape[-1])))
            lists[i] = x
        return cls(*lists, block_size=block_mask.BLOCK_SIZE)

    @classmethod
    def from_mask(
        cls,
        variant: Any,
        batch: int,
        heads: int,
        seqlen_q: int,
        seqlen_k: int,
        *,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        block_size: int | tuple[int, int] = UNIT,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Of what the ``mask_python`` of a variant says, which is asked about every query and key.

        Args:
            variant: as ``variant=`` of the call; its captured tensors are on `device`.
            batch, heads, seqlen_q, seqlen_k: of the call. A mask that does not ask for the batch
                entry or the head gets a block mask of 1.
            causal, window_size: as in the call: blocks of which they hide all are left out. They
                hide nothing in the others, so give them to the call as well.
            block_size: as above.
            device: of the block mask; that of the variant's tensors if None, or the CPU.

        Raises:
            ValueError, TypeError: an argument is not as described, or there is no ``mask_python``.
        """
        self = cls.__new__(cls)
        self.block_size = _checked_block_size(block_size)
        for name, size in zip(
            ("batch", "heads", "seqlen_q", "seqlen_k"),
            (batch, heads, seqlen_q, seqlen_k),
            strict=True,
        ):
            check_int(name, size, least=0, none="")
        sizes = (batch, heads, seqlen_q, seqlen_k)
        self._set(kinds_of(variant, sizes, causal, window_size, self.block_size, device))
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """(batch, heads, query blocks, key blocks); batch and heads may be 1."""
        return tuple(self.kinds.shape)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same on another device."""
        other = object.__new__(type(self))  # torch 2.11 cannot trace copy.copy
        other.block_size = self.block_size
        other.kinds = self.kinds.to(device)
        other.lists = BlockLists(*(x.to(device) for x in self.lists))
        return other

    def sparsity(self) -> Tensor:
        """The share of blocks that are hidden, float32, ()."""
        return (self.kinds == HIDDEN).float().mean()

    def __repr__(self) -> str:
        return f"BlockMask(shape={self.shape}, block_size={self.block_size})"


def check_block_mask(block_mask: object, q: Tensor, k: Tensor) -> BlockMask:
    """Raises TypeError or ValueError unless it is a block mask for a dense call."""
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask is a {type(block_mask).__name__}, must be a cute_kernels.BlockMask or "
            "None; BlockMask.from_torch makes one of FlexAttention's"
        )
    check_device("block_mask", block_mask.kinds, q)
    batch, heads, *blocks = block_mask.shape
    for name, size, of_call in (("batch", batch, q.shape[0]), ("heads", heads, q.shape[2])):
        if size not in (1, of_call):
            raise ValueError(f"block_mask has {name} {size}, must have 1 or {of_call}, q's")
    lengths = (q.shape[1], k.shape[1])
    names = ("query", "key")
    for name, count, size, length in zip(
        names, blocks, block_mask.block_size, lengths, strict=True
    ):
        needed = (length + size - 1) // size
        if count != needed:
            raise ValueError(
                f"block_mask has {count} {name} blocks of {size}, must have {needed} for "
                f"{length} {'queries' if name == 'query' else 'keys'}"
            )
    return block_mask


def block_lists(kinds: Tensor) -> BlockLists:
    """Of the kinds of units, (batch, heads, units of queries, units of keys)."""
    shown = kinds != HIDDEN
    turns = shown.cumsum(-1, dtype=torch.int32) - 1
    return BlockLists(
        *_packed(shown, _numbers(kinds)),
        *_packed(shown.mT, _numbers(kinds.mT)),
        _packed(shown.mT, turns.mT)[1],
    )


def _numbers(kinds: Tensor) -> Tensor:
    number = torch.arange(kinds.shape[-1], dtype=torch.int32, device=kinds.device)
    return number * 2 + (kinds == FULL)


def _packed(chosen: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """How many are chosen of each row, and the chosen values, in their order, in front."""
    place = torch.where(chosen, chosen.cumsum(-1) - 1, chosen.shape[-1])
    room = chosen.new_zeros((*chosen.shape[:-1], chosen.shape[-1] + 1), dtype=torch.int32)
    packed = room.scatter(-1, place, values.to(torch.int32).expand(place.shape))
    return chosen.sum(-1, dtype=torch.int32).contiguous(), packed[..., :-1].contiguous()


def _listed(name: str, kinds: Tensor, counts: Tensor, indices: Tensor, kind: int) -> Tensor:
    """The kinds with that of the listed blocks. Numbers of no block go where nothing is read."""
    blocks = indices.shape[-1]
    is_listed = torch.arange(blocks, device=indices.device) < counts[..., None]
    exists = (indices >= 0) & (indices < blocks)
    if _reads_contents(indices) and ((counts < 0) | (counts > blocks)).any():
        count_name = name.replace("indices", "num_blocks")
        raise ValueError(
            f"{count_name} has numbers that are not from 0 to {blocks}, the key blocks"
        )
    if _reads_contents(indices) and (is_listed & ~exists).any():
        raise ValueError(f"{name} lists blocks that are not there: must be from 0 to {blocks - 1}")
    index = torch.where(is_listed & exists, indices, blocks).long()
    marks = kinds.new_zeros((*kinds.shape[:-1], blocks + 1), dtype=torch.bool)
    return kinds.masked_fill(marks.scatter(-1, index, True)[..., :-1], kind)


def _reads_contents(indices: Tensor) -> bool:
    """On CUDA nothing waits for the device unless asked to."""
    if torch.compiler.is_compiling() or type(indices) is not Tensor:
        return False
    return indices.device.type == "cpu" or _CHECKS_CONTENTS


def _checked_block_size(block_size: int | tuple[int, int]) -> tuple[int, int]:
    sizes = tuple(block_size) if isinstance(block_size, (tuple, list)) else (block_size,) * 2
    if len(sizes) != 2 or not all(isinstance(x, INTS) and not isinstance(x, bool) for x in sizes):
        raise TypeError(f"block_size is {block_size!r}, must be an int or two of them")
    if any(x <= 0 or x % UNIT for x in sizes):
        raise ValueError(f"block_size is {block_size!r}, must be multiples of {UNIT}")
    return int(sizes[0]), int(sizes[1])


def _check_list(count_name: str, counts: object, index_name: str, indices: object) -> None:
    for name, tensor, axes in (
        (index_name, indices, "(batch, heads, query blocks, key blocks)"),
        (count_name, counts, "(batch, heads, query blocks)"),
    ):
        check_tensor(name, tensor)
        assert isinstance(tensor, Tensor)
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {tensor.dtype}, must be torch.int32")
        if tensor.dim() != axes.count(",") + 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {axes}")
    assert isinstance(counts, Tensor)
    assert isinstance(indices, Tensor)
    check_device(count_name, counts, indices, index_name)
    if counts.shape != indices.shape[:3]:
        raise ValueError(
            f"{count_name} has shape {tuple(counts.shape)}, must have that of {index_name} without "
            f"the last dimension, {tuple(indices.shape[:3])}"
        )
