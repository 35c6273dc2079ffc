"""A quantised tensor: its elements, its scales, and what was done to it before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cute_kernels.fp8.rotation import rotate_back

E4M3 = torch.float8_e4m3fn
ROW_BLOCK = 64  # rows of Q and K that share a scale
KEY_PADDING = 16  # the keys of a transposed v are padded to a multiple of it
VALUE_KEYS = 128  # of which a packed sequence has whole blocks to itself in the transposed v


class Quantisation(NamedTuple):
    """How q, k and v are quantised: see `quantize_fp8`."""

    incoherent: bool
    seed: int
    smooth_k: bool
    qk_dtype: torch.dtype


def first_block(first_row: int, entry: int, rows: int) -> int:
    """Where packed sequence `entry`, whose slot begins at `first_row`, has its first block of
    `rows` rows among the blocks of all: as first_block() of attention/lengths.hpp."""
    return first_row // rows + entry


def blocks_of_all(total: int, batch: int, rows: int) -> int:
    return total // rows + batch


def packed_value_keys(total: int, batch: int) -> int:
    """The transposed v's, of packed sequences: as attention/fp8_problem.hpp has it."""
    return blocks_of_all(total, batch, VALUE_KEYS) * VALUE_KEYS


@dataclass(frozen=True)
class FP8Tensor:
    """A quantised tensor: `data` times `scale` is what it stands for, times M if there is a seed,
    less `shift` if there is one.

    Attributes:
        data: (batch, seqlen, heads, head_dim), float8_e4m3fn (or int8).
        scale: float32, (batch, heads, blocks) with one for every `block` rows, or
            (batch, heads, 1, head_dim) with one for every channel, if `block` is None.
        block: rows that share a scale; None for scales of channels.
        seed: of the signs of incoherent processing; None without.
        shift: float32, (batch, heads, head_dim), what was subtracted from every row; None without.
        keys: None, or for a v that was quantised on a GPU its seqlen: there `data` is (batch,
            heads, head_dim, padded keys) in the key order that the kernel reads.
    """

    data: Tensor
    scale: Tensor
    block: int | None = ROW_BLOCK
    seed: int | None = None
    shift: Tensor | None = None
    keys: int | None = None

    @property
    def shape(self) -> torch.Size:
        """(batch, seqlen, heads, head_dim)."""
        if self.keys is None:
            return self.data.shape
        batch, heads, head_dim, _ = self.data.shape
        return torch.Size((batch, self.keys, heads, head_dim))

    def rows(self) -> Tensor:
        """`data` as (batch, seqlen, heads, head_dim)."""
        if self.keys is None:
            return self.data
        batch, heads, head_dim, padded = self.data.shape
        keys = self.data.view(torch.uint8).reshape(batch, heads, head_dim, padded // 16, 4, 2, 2)
        ordered = keys.transpose(4, 5).reshape(batch, heads, head_dim, padded)[..., : self.keys]
        return ordered.permute(0, 3, 1, 2).contiguous().view(self.data.dtype)

    def row_scales(self) -> Tensor:
        """The scales, to be broadcast to data's shape."""
        if self.block is None:
            return self.scale.permute(0, 2, 1, 3)
        rows = self.scale.repeat_interleave(self.block, dim=2)[:, :, : self.shape[1]]
        return rows.transpose(1, 2).unsqueeze(-1)

    def dequantize(self) -> Tensor:
        """The float32 tensor that this stands for, with M and the shift undone."""
        x = self.rows().float() * self.row_scales()
        if self.seed is not None:
            x = rotate_back(x, self.seed)
        return x if self.shift is None else x + self.shift.unsqueeze(1)


def in_key_order(v: Tensor) -> Tensor:
    """An e4m3 v, (batch, seqlen, heads, head_dim), as the kernel reads it: (batch, heads, head_dim,
    padded keys), where position (a, b, c) of (4, 2, 2) keys holds key (b, a, c) of (2, 4, 2):
    value_key_order in fp8_traits.hpp."""
    batch, seqlen, heads, head_dim = v.shape
    turned = v.view(torch.uint8).permute(0, 2, 3, 1)
    padded = torch.nn.functional.pad(turned, (0, -seqlen % KEY_PADDING))
    keys = padded.reshape(batch, heads, head_dim, padded.shape[3] // 16, 2, 4, 2).transpose(4, 5)
    return keys.reshape(padded.shape).contiguous().view(v.dtype)
