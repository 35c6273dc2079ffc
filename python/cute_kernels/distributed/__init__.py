"""Context parallelism: one sequence over many GPUs, on torch.distributed."""

from cute_kernels.distributed.cost import H100, Machine, Prediction, choose
from cute_kernels.distributed.interface import (
    all_gather_attn_func,
    ring_attn_func,
    ulysses_attn_func,
)
from cute_kernels.distributed.measure import measure
from cute_kernels.distributed.shards import next_tokens, positions, shard, unshard

__all__ = [
    "H100",
    "Machine",
    "Prediction",
    "all_gather_attn_func",
    "choose",
    "measure",
    "next_tokens",
    "positions",
    "ring_attn_func",
    "shard",
    "ulysses_attn_func",
    "unshard",
]
