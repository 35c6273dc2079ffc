"""Incoherent processing (FlashAttention-3, arXiv 2407.08608, section 3.3).

Q and K are multiplied by the same random orthogonal matrix M before they are rounded, which leaves
Q K^T as it is and spreads outliers over channels.

M = H diag(signs) / sqrt(d), with H a Hadamard matrix where d is a power of two. Other d = m 2^n
(m odd) take the Kronecker product of the reflection I - (2/m) J of order m and a Hadamard matrix.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

U64 = 2**64 - 1


def random_signs(head_dim: int, seed: int) -> list[int]:
    """+1 or -1 for every channel: the top bit of SplitMix64's output number `channel`.

    A function of seed and channel alone, which the CUDA kernel computes in the same bits.
    """
    signs = []
    for channel in range(head_dim):
        z = (seed + (channel + 1) * 0x9E3779B97F4A7C15) & U64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & U64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & U64
        z ^= z >> 31
        signs.append(-1 if z >> 63 else 1)
    return signs


@functools.lru_cache(maxsize=64)
def _signs_tensor(head_dim: int, seed: int, device: torch.device) -> Tensor:
    return torch.tensor(random_signs(head_dim, seed), dtype=torch.float32, device=device)


def norm_of(head_dim: int) -> float:
    """What `_hadamard` lacks to be orthogonal."""
    return float((head_dim & -head_dim) ** -0.5)


def _hadamard(x: Tensor) -> Tensor:
    """x H over the last dimension, in fp32: butterflies of stride 1, 2, 4, ..., as the CUDA
    kernel's, then the reflection of order m over the d / m runs. Its own inverse, but for the
    norm."""
    head_dim = x.shape[-1]
    power = head_dim & -head_dim
    odd = head_dim // power
    stride = 1
    while stride < power:
        pairs = x.reshape(*x.shape[:-1], head_dim // (2 * stride), 2, stride)
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        stride *= 2
    if odd > 1:
        runs = x.reshape(*x.shape[:-1], odd, power)
        x = (runs - runs.sum(-2, keepdim=True) * (2 / odd)).view(x.shape)
    return x


def rotate_unscaled(x: Tensor, seed: int) -> Tensor:
    """M x for every row, in float32, but for the norm."""
    return _hadamard(x.float() * _signs_tensor(x.shape[-1], seed, x.device))


def rotate(x: Tensor, seed: int) -> Tensor:
    """M x for every row, in float32."""
    return rotate_unscaled(x, seed) * norm_of(x.shape[-1])


def rotate_back(x: Tensor, seed: int) -> Tensor:
    """M^T x for every row, in float32."""
    return _hadamard(x.float()) * norm_of(x.shape[-1]) * _signs_tensor(x.shape[-1], seed, x.device)
