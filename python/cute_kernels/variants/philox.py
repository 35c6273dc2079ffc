"""The random numbers of hooks, for the CPU: those of `uniform` in attention/variant/math.hpp."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as an int64


def uniform(
    seed: Tensor, offset: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor
) -> Tensor:
    """From 0 to below 1, float32, of the shape that the arguments, int64, broadcast to: Philox 4x32
    with ten rounds, of which four neighbouring keys share a result."""
    stream = seed + offset * _GOLDEN
    round_key = [stream & _LOW, stream >> 32 & _LOW]
    shape = (key + query + head + batch).shape
    counter = [(word & _LOW).expand(shape) for word in (key // 4, query, head, batch)]
    for _ in range(10):
        products = [m * counter[2 * i] for i, m in enumerate(_MULTIPLIERS)]
        low, high = ([p >> shift & _LOW for p in products] for shift in (0, 32))
        counter = [
            high[1] ^ counter[1] ^ round_key[0],
            low[1],
            high[0] ^ counter[3] ^ round_key[1],
            low[0],
        ]
        round_key = [k + step & _LOW for k, step in zip(round_key, _STEPS, strict=True)]
    which = (key % 4).expand(shape)
    bits = torch.stack(counter).gather(0, which[None])[0]
    return (bits >> 8).float() * 2.0**-24
