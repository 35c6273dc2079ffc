"""A kernel of one's own: a row that the build does not have, compiled here, loaded and chosen.

The first time nvcc takes a minute; afterwards the kernel comes from the cache. On the CPU the
kernel is compiled, loaded and chosen, but does not run: there the result is the CPU's own.
"""

from __future__ import annotations

import sys

import torch

import cute_kernels
from cute_kernels import TileConfig, flash_attn_func

HEAD_DIM = 64


def refused() -> str:
    """What is said of a row that cannot become a kernel."""
    try:
        TileConfig("forward", name="large", dtype="bf16", head_dim=HEAD_DIM, tile_m=256, tile_n=256)
    except ValueError as error:
        return str(error)
    raise AssertionError("256 x 256 does not fit into registers")


def mine() -> TileConfig:
    """One warpgroup, which has nobody to take turns with: for few queries."""
    return TileConfig(
        "forward",
        name="bf16_mine",
        dtype="bf16",
        head_dim=HEAD_DIM,
        tile_m=64,
        tile_n=64,
        pingpong=False,
        speed=0.6,
        overhead=100,
    )


def chosen(queries: int) -> str:
    """The row that a call of 8 heads would run on an H100."""
    choose = torch.ops.cute_kernels.choose_tile_config
    return choose(torch.bfloat16, 1, queries, queries, 8, HEAD_DIM, False, 132)


def milliseconds(**options: str) -> float:
    q = torch.randn(1, 64, 8, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(60):
        if i == 10:
            begin.record()
        flash_attn_func(q, q, q, **options)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 50


def has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def main() -> int:
    print(f"refused: {refused()}")
    before = [chosen(queries) for queries in (64, 16384)]
    row = mine()
    cute_kernels.add_tile_config(row)
    for queries, old in zip((64, 16384), before, strict=True):
        print(f"{queries} queries: {old} -> {chosen(queries)}")

    device = "cuda" if has_hopper() else "cpu"
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 100, 8, HEAD_DIM, device=device, dtype=torch.bfloat16)
    out = flash_attn_func(q, k, v, causal=True, tile_config=row.name)
    wide = (x.float().transpose(1, 2) for x in (q, k, v))
    right = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True).transpose(1, 2)
    error = (out.float() - right).abs().max().item()
    print(f"on the {device}: largest error {error:.1e}")
    if device == "cuda":
        mine_ms, others_ms = milliseconds(tile_config=row.name), milliseconds(tile_config=before[0])
        print(f"64 queries: {row.name} {mine_ms:.3f} ms, {before[0]} {others_ms:.3f} ms")
    passed = error < 0.02 and chosen(64) == row.name
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
