"""Problems of latent attention, and what is right of them."""

import random

import pytest
import torch
from caches import (
    PAGE_SIZES,
    assert_attention_right,
    random_cache,
    random_lengths,
    random_queries,
)
from parity import DTYPES

from cute_kernels import tile_configs

HEAD_DIMS = [(64, 512), (64, 512), (64, 256), (32, 512), (8, 16), (48, 136)]


def random_problem(seed, device, dtype, head_dims=None, most=300, room=0):
    """A cache, queries of its keys and of its values, cu_seqlens_q and options of a call."""
    chance = random.Random(seed)
    head_dims = list(head_dims or chance.choice(HEAD_DIMS))
    key_heads, group = chance.choice([(1, 1), (1, 16), (1, 128), (1, 40), (2, 8)])
    batch = range(chance.randint(1, 4))
    lengths = random_lengths(chance, batch, most)
    page_size = chance.choice(PAGE_SIZES)
    places = {"leftpad": chance.random() < 0.5, "batch_idx": chance.random() < 0.5}
    cache = random_cache(
        chance, device, dtype, lengths, page_size, key_heads, head_dims, room, **places
    )
    queries = [chance.choice([1, 1, chance.randint(0, 4)]) for _ in batch]
    q, qv = (
        random_queries(chance, device, dtype, queries, key_heads * group, head_dim)[0]
        for head_dim in head_dims
    )
    ends = [sum(queries[:i]) for i in range(len(queries) + 1)]
    starts = torch.tensor(ends, dtype=torch.int32, device=device)
    options = {
        "causal": chance.random() < 0.5,
        "softmax_scale": chance.choice([None, None, 192**-0.5]),
        "window_size": chance.choice([(-1, -1), (-1, -1), (chance.randint(0, 90), 0), (5, 2)]),
        "softcap": chance.choice([0.0, 0.0, 0.0, 30.0]),
        "attention_chunk": chance.choice([0, 0, 0, 37]),
    }
    if chance.random() < 0.3:
        generator = torch.Generator(device).manual_seed(seed)
        options["sinks"] = 3 * torch.randn(q.shape[1], generator=generator, device=device)
    return chance, cache, q, qv, starts, options


def assert_latent_right(out, lse, q, qv, starts, cache, **options):
    """Against the definition of attention of the queries (q, qv) to the keys (k, v)."""
    keys = [torch.cat(pair, -1) for pair in zip(cache.k, cache.v, strict=True)]
    assert out.shape == qv.shape
    assert_attention_right(out, lse, torch.cat([q, qv], -1), starts, keys, cache.v, **options)


def skip_unless_built(device, dtype):
    """Builds may have no kernels of latent attention, and have none of wider dtypes."""
    if device == "cuda" and all(DTYPES[row["dtype"]] != dtype for row in tile_configs("latent")):
        pytest.skip(f"this build has no latent kernel for {dtype}")
