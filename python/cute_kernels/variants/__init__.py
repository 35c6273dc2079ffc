"""Variants of attention: definitions of one's own, and some ready-made ones."""

from cute_kernels.variants.block_mask import BlockMask
from cute_kernels.variants.ready import (
    alibi,
    bias,
    dilated,
    document,
    dropout,
    prefix_lm,
    softcap,
)
from cute_kernels.variants.variant import Variant

__all__ = [
    "BlockMask",
    "Variant",
    "alibi",
    "bias",
    "dilated",
    "document",
    "dropout",
    "prefix_lm",
    "softcap",
]
