"""The CUDA kernel of latent attention: shapes of its own, splits, graphs."""

import random

import pytest
import torch
from caches import attend, random_cache, random_queries
from latent import assert_latent_right, skip_unless_built

from cute_kernels import flash_attn_with_kvcache


def problem(seed, lengths, queries, heads, page_size, head_dims=(64, 512), key_heads=1):
    chance = random.Random(seed)
    dtype = torch.bfloat16
    cache = random_cache(chance, "cuda", dtype, lengths, page_size, key_heads, list(head_dims))
    (q, starts), (qv, _) = (
        random_queries(chance, "cuda", dtype, queries, heads, head_dim) for head_dim in head_dims
    )
    return cache, q, qv, starts


@pytest.mark.parametrize("heads", [1, 16, 64, 128, 192, 40])
@pytest.mark.parametrize("page_size", [None, 1, 64])
def test_heads(hopper, heads, page_size):
    """Of fewer rows than a tile, of several tiles, and of tiles that tokens share."""
    skip_unless_built(hopper, torch.bfloat16)
    lengths, queries = [0, 1, 64, 65, 700, 2000], [1, 4, 2, 1, 3, 1]
    cache, q, qv, starts = problem(heads, lengths, queries, heads, page_size)
    for options in ({}, {"causal": True}, {"window_size": (100, 0)}, {"num_splits": 1}):
        found = attend(q, starts, cache, qv=qv, **options)
        options.pop("num_splits", None)
        assert_latent_right(*found, q, qv, starts, cache, **options)


@pytest.mark.parametrize("page_size", [8, 16, 48, 100, 256, 528])
@pytest.mark.parametrize("heads", [16, 128, 256])
def test_pages(hopper, heads, page_size):
    """Boxes of a page and rows that are gathered, by one CTA and by pairs; with what is behind the
    last key, NaN, in the last block and in others."""
    skip_unless_built(hopper, torch.bfloat16)
    lengths, queries = [1, 63, 130, 517, 1500, 0], [2, 1, 4, 1, 2, 1]
    cache, q, qv, starts = problem(page_size, lengths, queries, heads, page_size)
    for options in ({}, {"causal": True}, {"causal": True, "num_splits": 1}):
        found = attend(q, starts, cache, qv=qv, **options)
        options.pop("num_splits", None)
        assert_latent_right(*found, q, qv, starts, cache, **options)


@pytest.mark.parametrize("heads", [16, 128])
def test_gathered_keys_are_those_of_boxes(hopper, heads):
    """A window that hides nothing has its keys gathered."""
    skip_unless_built(hopper, torch.bfloat16)
    cache, q, qv, starts = problem(6, [3000, 65, 200], [1, 1, 1], heads, 64)
    found, right = (
        attend(q, starts, cache, qv=qv, **options) for options in ({}, {"window_size": (4000, -1)})
    )
    for x, y in zip(found, right, strict=True):
        assert torch.equal(x, y)


def test_pairs_with_several_key_heads(hopper):
    skip_unless_built(hopper, torch.bfloat16)
    cache, q, qv, starts = problem(7, [700, 3, 130], [1, 2, 1], 256, 16, key_heads=2)
    found = attend(q, starts, cache, qv=qv, causal=True)
    assert_latent_right(*found, q, qv, starts, cache, causal=True)


@pytest.mark.parametrize("margin", [1, 131])
def test_few_multiprocessors(hopper, margin):
    skip_unless_built(hopper, torch.bfloat16)
    cache, q, qv, starts = problem(8, [700, 3, 130], [1, 2, 1], 128, 64)
    found = attend(q, starts, cache, qv=qv, sm_margin=margin)
    assert_latent_right(*found, q, qv, starts, cache)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("length", [63, 64, 129, 256])
def test_few_blocks(hopper, length, heads):
    """Parts of no block, of one and of several, of which either warpgroup has the first: of a CTA
    alone and of pairs."""
    skip_unless_built(hopper, torch.bfloat16)
    for batch in (1, 133, 264):
        lengths = [max(0, length - i % 3 * 64) for i in range(batch)]
        cache, q, qv, starts = problem(length, lengths, [1] * batch, heads, 16)
        found = attend(q, starts, cache, qv=qv, num_splits=random.Random(batch).choice([0, 1]))
        assert_latent_right(*found, q, qv, starts, cache)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_pages_that_are_not_there(hopper, heads, page_size):
    """Keys of such pages are 0, in whole blocks and in parts of one, gathered or in boxes."""
    skip_unless_built(hopper, torch.bfloat16)
    cache, q, qv, starts = problem(9, [300, 70], [2, 1], heads, page_size)
    pages = cache.k_cache.shape[0]
    for sequence, key, wrong in ((0, 0, -1), (0, 130, pages), (1, 69, 2**31 - 1), (1, 1, -(2**31))):
        page = key // page_size
        cache.places["page_table"][sequence, page] = wrong
        for rows in (cache.k, cache.v):
            rows[sequence][page * page_size : (page + 1) * page_size] = 0
    found = attend(q, starts, cache, qv=qv, causal=True)
    assert_latent_right(*found, q, qv, starts, cache, causal=True)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("page_size", [None, 1, 16])
def test_lengths_that_lie_outside(hopper, heads, page_size):
    """Nothing is read that is not there, and all CTAs end."""
    skip_unless_built(hopper, torch.bfloat16)
    cache, q, qv, starts = problem(10, [160, 70], [2, 2], heads, page_size)
    lengths = cache.seqlens()

    def run():
        return attend(q, starts, cache, lengths, qv=qv, causal=True)

    right, good_lengths, good_starts = run(), lengths.clone(), starts.clone()
    for wrong in (2**31 - 1, -(2**31)):
        lengths.fill_(wrong)
        run()
    lengths.copy_(good_lengths)
    starts.copy_(torch.tensor([-5, 100, 7], dtype=torch.int32))
    run()
    starts.copy_(good_starts)
    for again, before in zip(run(), right, strict=True):
        assert torch.equal(again, before)
    assert_latent_right(*right, q, qv, starts, cache, causal=True)


def test_one_long_sequence_is_shared_by_all_multiprocessors(hopper):
    skip_unless_built(hopper, torch.bfloat16)
    for queries in ([1], [4]):
        cache, q, qv, starts = problem(0, [40000], queries, 128, 64)
        found = attend(q, starts, cache, qv=qv, causal=True)
        assert_latent_right(*found, q, qv, starts, cache, causal=True)


def test_large_scores(hopper):
    """Maxima that move with every block, and probabilities that are 0 or 1."""
    skip_unless_built(hopper, torch.bfloat16)
    cache, q, qv, starts = problem(1, [1500, 900], [1, 2], 128, 64)
    for factor in (8, 64):
        found = attend(q * factor, starts, cache, qv=qv * factor, causal=True)
        assert_latent_right(*found, q * factor, qv * factor, starts, cache, causal=True)


def test_trees(hopper):
    """Each token sees the cache and itself, as the CPU does it."""
    skip_unless_built(hopper, torch.bfloat16)
    cache, q, qv, starts = problem(2, [300, 70], [4, 3], 16, 16)
    tree = torch.tensor([1, 2, 5, 8, 1, 3, 4], device="cuda")
    found = attend(q, starts, cache, qv=qv, tree_mask=tree)
    places = {name: x.cpu() for name, x in cache.places.items()}
    # Of rows that no sequence uses the CPU reads nothing, and NaN is NaN.
    right = flash_attn_with_kvcache(
        q.cpu(),
        cache.k_cache.cpu(),
        cache.v_cache.cpu(),
        qv=qv.cpu(),
        cache_seqlens=cache.seqlens().cpu(),
        cu_seqlens_q=starts.cpu(),
        tree_mask=tree.cpu(),
        return_softmax_lse=True,
        **places,
    )
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=2e-2, atol=2e-3)


def test_repeats_are_bit_equal(hopper):
    skip_unless_built(hopper, torch.bfloat16)
    cache, q, qv, starts = problem(3, [5000, 1, 3000, 777], [1, 4, 2, 3], 128, 16)
    first = attend(q, starts, cache, qv=qv, causal=True)
    for _ in range(64):
        for again, right in zip(attend(q, starts, cache, qv=qv, causal=True), first, strict=True):
            assert torch.equal(again, right)


def test_lengths_change_between_replays_of_a_graph(hopper):
    skip_unless_built(hopper, torch.bfloat16)
    chance = random.Random(4)
    whole = [4000, 900, 2500]
    cache, q, qv, starts = problem(4, whole, [1, 1, 1], 128, 64)
    lengths = cache.seqlens()

    def call():
        return attend(q, starts, cache, lengths, qv=qv)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(20):
        lengths.copy_(torch.tensor([chance.choice([0, 1, n // 3, n]) for n in whole]))
        graph.replay()
        for eager, replayed in zip(call(), captured, strict=True):
            assert torch.equal(eager, replayed)


def test_rows_that_no_sequence_uses(hopper):
    skip_unless_built(hopper, torch.bfloat16)
    cache, q, qv, starts = problem(5, [100, 0], [2, 3], 16, 16)
    q, qv = (torch.cat([x[:1] * torch.nan, x, x[:70]]) for x in (q, qv))
    out, lse = attend(q, starts + 1, cache, qv=qv)
    assert_latent_right(out[1:6], lse[:, 1:6], q[1:6], qv[1:6], starts, cache)
    for rows in (slice(0, 1), slice(6, None)):
        assert not out[rows].any()
        assert (lse[:, rows] == -torch.inf).all()
