"""Many queries to a cache, beside few: every row against fp64. The calls have so many rows that the
prefill kernel is chosen on any Hopper."""

import dataclasses
import math
import random

import pytest
import torch
from oracle import NO_WINDOW, Attention
from parity import DTYPES
from test_kvcache_gpu import FAR, assert_right, random_cache, run, skip_unless_built

PAGE_SIZES = [None, None, 1, 8, 16, 48, 64, 100, 128, 256, 272]
TILES = 300  # of 192 rows, in a random call: two rounds of an H200
QUERIES = [0, 1, 1, 4, 16, 24]


def many_queries(chance, rows_of_query):
    """Numbers of queries that fill TILES tiles, of a few sequences with few or many."""
    queries, rows = [], 0
    while rows < TILES * 192:
        queries.append(chance.choice([*QUERIES, chance.randint(20, 200), chance.randint(200, 900)]))
        rows += queries[-1] * rows_of_query
    return queries


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(hopper, seed):
    chance = random.Random(seed)
    head_dims = chance.choice(
        [(64, 64), (128, 128), (128, 128), (256, 256), (96, 96), (192, 128), (40, 72)]
    )
    key_heads, group = chance.choice([(4, 8), (2, 16), (8, 4), (3, 5), (4, 3), (2, 7), (1, 40)])
    dtype = chance.choice(list(DTYPES.values()))
    skip_unless_built(dtype, max(head_dims))
    queries = many_queries(chance, key_heads * group)
    cache = random_cache(
        chance,
        [
            chance.choice([0, 1, 63, 64, 129, chance.randint(0, 3000), n + chance.randint(0, 500)])
            for n in queries
        ],
        queries,
        dtype,
        head_dims,
        (key_heads * group, key_heads),
        page_size=chance.choice(PAGE_SIZES),
        leftpad=chance.random() < 0.3,
        layout=chance.choice(["dense", "interleaved", "heads first"]),
    )
    options = {
        "softmax_scale": chance.choice([0.05, 0.125, 0.4]),
        "causal": chance.random() < 0.7,
        "window_size": chance.choice([NO_WINDOW, NO_WINDOW, (127, 0), (0, 0), (3, 5), (700, -1)]),
        "sinks": torch.randn(key_heads * group, device="cuda") if chance.random() < 0.3 else None,
    }
    longest = chance.choice([None, max(queries), 10000])
    assert_right(run(cache, max_seqlen_q=longest, **options), cache, **options)


@pytest.mark.parametrize("page_size", [None, 16, 64, 100])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sequences_of_one_length(hopper, head_dim, page_size):
    """Then no decode kernel runs."""
    skip_unless_built(torch.bfloat16, head_dim)
    cache = random_cache(
        random.Random(head_dim),
        [3000, 512, 2048, 700],
        [512] * 4,
        head_dims=(head_dim, head_dim),
        heads=(32, 4),
        page_size=page_size,
    )
    first = run(cache, max_seqlen_q=512)
    assert_right(first, cache)
    for _ in range(20):
        for again, right in zip(run(cache, max_seqlen_q=512), first, strict=True):
            assert torch.equal(again, right)


@pytest.mark.parametrize("page_size", [None, 16, 100])
def test_values_that_some_queries_do_not_see(hopper, page_size):
    """NaN in some keys makes NaN of the queries that see them, and of no other."""
    skip_unless_built(torch.bfloat16, 128)
    cache = random_cache(random.Random(2), [1777], [1000], heads=(32, 4), page_size=page_size)
    q, k, v = cache.sequences[0]
    bad = torch.tensor([800, 1401, 1774], device="cuda")
    v[:, bad] = math.nan
    v[:, 1200, :, 3] = math.inf
    for key in (*bad.tolist(), 1200):
        place = (
            (cache.cache_batch_idx[0].long(), key)
            if page_size is None
            else (cache.page_table[0, key // page_size].long(), key % page_size)
        )
        cache.v_cache[place] = v[0, key]
    for window in (NO_WINDOW, (100, 0)):
        out, lse = run(cache, window_size=window)
        seen = Attention(q, k, v, 0.125, True, window_size=window)
        assert torch.equal(out.isfinite(), seen.out[0].isfinite())
        assert not lse.isnan().any()
        assert_right((out, lse), cache, window_size=window)


def test_rows_that_no_sequence_uses(hopper):
    skip_unless_built(torch.bfloat16, 64)
    cache = random_cache(
        random.Random(3), [600, 900], [500, 500], head_dims=(64, 64), heads=(32, 4), page_size=16
    )
    cache.q = torch.cat([torch.full_like(cache.q[:1], math.nan), cache.q, cache.q[:70]])
    cache.cu_seqlens_q += 1
    for longest in (None, 500):
        out, lse = run(cache, max_seqlen_q=longest)
        assert_right((out, lse), cache)
        for rows in (slice(0, 1), slice(1001, None)):
            assert not out[rows].any()
            assert (lse[:, rows] == -math.inf).all()


def test_lengths_that_lie_outside(hopper):
    """Nothing is read that is not there."""
    skip_unless_built(torch.bfloat16, 64)
    cache = random_cache(
        random.Random(4), [640, 640], [500, 500], head_dims=(64, 64), heads=(32, 4), page_size=16
    )
    cache.page_table[:, 640 // 16 :] = cache.page_table[:, :1]  # for all that may be used
    right = run(cache)
    for wrong in (FAR, -FAR):
        cache.cache_seqlens.fill_(wrong)
        run(cache)
    cache.cache_seqlens.fill_(640)
    cache.cu_seqlens_q.copy_(torch.tensor([-5, 2000, 7], dtype=torch.int32))
    run(cache)
    cache.cu_seqlens_q.copy_(torch.tensor([0, 500, 1000], dtype=torch.int32))
    first_pages = cache.page_table[:, 0].clone()
    for wrong in (FAR, -FAR, -1):
        cache.page_table[:, 0] = wrong
        run(cache)
    cache.page_table[:, 0] = first_pages
    for again, before in zip(run(cache), right, strict=True):
        assert torch.equal(again, before)


def test_lengths_change_between_replays_of_a_graph(hopper):
    """Of keys and of queries: a sequence may become a long one, or none at all."""
    skip_unless_built(torch.bfloat16, 128)
    chance = random.Random(5)
    queries = [600, 1, 300, 16, 1]
    cache = random_cache(chance, [4000, 900, 2500, 70, 1200], queries, heads=(32, 4), page_size=64)
    whole = cache.sequences
    run(cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(cache)
    for _ in range(10):
        lengths = [chance.choice([0, 1, k.shape[1] // 3, k.shape[1]]) for _, k, _ in whole]
        cuts = sorted(chance.randint(0, sum(queries)) for _ in range(len(queries) - 1))
        starts = [0, *cuts, sum(queries)]
        cache.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        cache.cu_seqlens_q.copy_(torch.tensor(starts, dtype=torch.int32))
        graph.replay()
        now = dataclasses.replace(
            cache,
            sequences=[
                (cache.q[first:last][None], k[:, :n], v[:, :n])
                for first, last, n, (_, k, v) in zip(
                    starts[:-1], starts[1:], lengths, whole, strict=True
                )
            ],
        )
        assert_right(captured, now)
