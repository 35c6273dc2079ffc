"""Inputs for calls as FlashAttention's modules take them."""

import math
import random

import torch
from packed import random_packed
from parity import random_qkv, skip_unless_answered, skip_unless_built

SCALE = 0.3
MASKS = [(False, (-1, -1)), (True, (-1, -1)), (False, (5, 9))]


def dtype_of(device):
    return torch.bfloat16 if device == "cuda" else torch.float32


def skip_without_rows(device):
    skip_unless_answered(device, torch.bfloat16)
    for causal in (False, True) if device == "cuda" else ():
        skip_unless_built(torch.bfloat16, 64, causal)


def inputs_of(device, **sizes):
    skip_without_rows(device)
    sizes = {"seqlen_q": 33, "seqlen_k": 47, "heads": 4, "key_heads": 2, **sizes}
    return random_qkv(device, dtype_of(device), **sizes)


def packed_of(device, **options):
    skip_without_rows(device)
    chance = random.Random(0)
    slots = ([9, 0, 31], [12, 5, 40])
    return random_packed(chance, device, dtype_of(device), *slots, (64, 64), (4, 2), **options)


def like(*tensors):
    """Where gradients are to be written: NaN, and with strides of their own."""
    return [torch.full((*x.shape[:-1], 80), math.nan).to(x)[..., : x.shape[-1]] for x in tensors]
