"""The CUDA kernels of attention to a cache, two key heads in a tile: every row against fp64."""

import random

import pytest
import torch
from oracle import NO_WINDOW
from parity import DTYPES
from test_kvcache_gpu import LENGTHS, assert_right, random_cache, run, skip_unless_built
from traces import launches

from cute_kernels import tile_configs


@pytest.mark.parametrize("seed", range(24))
def test_two_heads_of_a_tile(hopper, seed):
    """Of head dim 64, also where a sequence has several tiles of each head."""
    chance = random.Random(seed)
    dtype = chance.choice(list(DTYPES.values()))
    skip_unless_built(dtype, 64)
    key_heads, group = chance.choice([2, 4, 6]), chance.choice([1, 2, 8, 16])
    head_dims = chance.choice([(64, 64), (64, 64), (40, 64), (64, 24)])
    batch = chance.choice([1, 2, 7])
    cache = random_cache(
        chance,
        [chance.choice(LENGTHS) for _ in range(batch)],
        [chance.choice([1, 1, 2, 4, 0]) for _ in range(batch - 1)]
        + [chance.choice([1, 3, 64 // group, 65, 150])],
        dtype,
        head_dims,
        (key_heads * group, key_heads),
        page_size=chance.choice([None, 1, 16, 64, 100]),
        leftpad=chance.random() < 0.3,
        layout=chance.choice(["dense", "interleaved", "heads first"]),
    )
    options = {
        "causal": chance.random() < 0.6,
        "window_size": chance.choice([NO_WINDOW, NO_WINDOW, (127, 0), (0, 0), (700, -1)]),
        "num_splits": chance.choice([0, 0, 1, 2, 1000]),
        "sinks": torch.randn(key_heads * group, device="cuda") if chance.random() < 0.5 else None,
        "softcap": chance.choice([0.0, 0.0, 5.0]),
    }
    longest = max(q.shape[1] for q, _, _ in cache.sequences)
    options["max_seqlen_q"] = chance.choice([None, longest])
    assert_right(run(cache, **options), cache, **options)


@pytest.mark.parametrize(
    ("tokens", "key_heads", "heads"), [(1, 2, 2), (8, 2, 2), (9, 2, 1), (1, 3, 1)]
)
def test_which_calls_have_two_heads_in_a_tile(hopper, tmp_path, tokens, key_heads, heads):
    rows = [
        row for row in tile_configs("decode") if (row["dtype"], row["head_dim"]) == ("bf16", 64)
    ]
    if {row["heads"] for row in rows} != {1, 2}:
        pytest.skip("this build has not both kernels of head dim 64")
    cache = random_cache(
        random.Random(7),
        [300, 200],
        [tokens, 1],
        head_dims=(64, 64),
        heads=(8 * key_heads, key_heads),
        page_size=16,
    )
    names = [row["name"] for row in rows if row["heads"] == heads]
    found = launches(lambda: run(cache, max_seqlen_q=tokens), tmp_path)
    assert sum(any(name in kernel for name in names) for kernel, *_ in found) == 1, found
    assert_right(run(cache, max_seqlen_q=tokens), cache)
