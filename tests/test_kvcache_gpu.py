"""The CUDA kernels of attention to a cache of keys and values: every row against fp64."""

import dataclasses
import math
import random

import pytest
import torch
from oracle import NO_WINDOW, Attention, assert_rows, total
from parity import DTYPES

from cute_kernels import tile_configs

LENGTHS = [0, 1, 17, 63, 64, 65, 128, 1000, 5000]
QUERIES = [0, 1, 1, 1, 2, 4, 16]
FAR = 2**31 - 1


@dataclasses.dataclass
class Cache:
    """Sequences' own q, k and v, (1, seqlen, heads, head_dim) each, and the operator's tensors."""

    sequences: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cache_seqlens: torch.Tensor
    page_table: torch.Tensor | None = None
    cache_batch_idx: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None

    def tensors(self):
        return [getattr(self, field.name) for field in dataclasses.fields(self)[1:]]


def run(cache, sinks=None, softmax_scale=0.125, causal=True, window_size=NO_WINDOW, **options):
    left, right = (None if limit < 0 else limit for limit in window_size)
    return torch.ops.cute_kernels.flash_attn_kvcache_forward(
        *cache.tensors(),
        sinks,
        softmax_scale,
        causal,
        window_left=left,
        window_right=right,
        **options,
    )


def skip_unless_built(dtype, head_dim):
    for row in tile_configs("decode"):
        if DTYPES[row["dtype"]] == dtype and row["head_dim"] >= head_dim:
            return
    pytest.skip(f"this build has no decode row for {dtype} and head dim {head_dim}")


def normal(generator, *shape, dtype):
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return x.to(dtype)


def empty_cache(shape, head_dims, dtype, device, layout):
    """K and V full of NaN: each its own, of one tensor, or with heads before rows."""
    pages, rows, heads = shape
    if layout == "interleaved":
        both = torch.full(
            (pages, heads, rows, sum(head_dims)), math.nan, dtype=dtype, device=device
        )
        return both.transpose(1, 2).split(head_dims, dim=-1)
    if layout == "heads first":
        shapes = [(pages, heads, rows, d) for d in head_dims]
        return [
            torch.full(shape, math.nan, dtype=dtype, device=device).transpose(1, 2)
            for shape in shapes
        ]
    return [torch.full((*shape, d), math.nan, dtype=dtype, device=device) for d in head_dims]


def random_cache(
    chance,
    lengths,
    queries,
    dtype=torch.bfloat16,
    head_dims=(128, 128),
    heads=(8, 1),
    page_size=None,
    leftpad=False,
    layout="dense",
    device="cuda",
):
    """What no sequence uses is NaN, and the page table holds anything there."""
    generator = torch.Generator(device).manual_seed(chance.randrange(2**31))
    batch, (query_heads, key_heads) = len(lengths), heads
    int32 = {"dtype": torch.int32, "device": device}
    pads = [chance.randint(0, n) if leftpad else 0 for n in lengths]
    # Room for more than is used
    room = max(lengths, default=0) + chance.choice([0, 1, 100])
    extra = {}
    if page_size is None:
        entries = batch + chance.choice([0, 2])
        places = chance.sample(range(entries), batch)
        shape = (entries, room, key_heads)
        extra["cache_batch_idx"] = torch.tensor(places, **int32)
    else:
        of_sequence = -(-room // page_size) or 1
        shape = (batch * of_sequence + 1, page_size, key_heads)
        pages = chance.sample(range(shape[0]), batch * of_sequence)
        table = [pages[i * of_sequence : (i + 1) * of_sequence] for i in range(batch)]
        for row, n in zip(table, lengths, strict=True):
            for i in range(-(-n // page_size), of_sequence):
                row[i] = chance.choice([-1, FAR, -FAR, 12345678])
        extra["page_table"] = torch.tensor(table, **int32)
    k_cache, v_cache = empty_cache(shape, head_dims, dtype, device, layout)
    sequences = []
    for i, (n, pad, seqlen_q) in enumerate(zip(lengths, pads, queries, strict=True)):
        q = normal(generator, 1, seqlen_q, query_heads, head_dims[0], dtype=dtype)
        kv = [normal(generator, 1, n - pad, key_heads, d, dtype=dtype) for d in head_dims]
        sequences.append((q, *kv))
        keys = torch.arange(pad, n, device=device)
        for cache, own in zip((k_cache, v_cache), kv, strict=True):
            if page_size is None:
                cache[places[i], keys] = own[0]
            else:
                cache[extra["page_table"][i, keys // page_size].long(), keys % page_size] = own[0]
    starts = [0]
    for seqlen_q in queries:
        starts.append(starts[-1] + seqlen_q)
    return Cache(
        sequences,
        torch.cat([s[0][0] for s in sequences]),
        k_cache,
        v_cache,
        torch.tensor(starts, **int32),
        torch.tensor(lengths, **int32),
        cache_leftpad=torch.tensor(pads, **int32) if leftpad else None,
        **extra,
    )


def exact_attention(q, k, v, softmax_scale, causal, window_size, softcap, sinks):
    """Attention in fp64, with a cap of the scores and sinks of the heads."""
    exact = Attention(q, k, v, softmax_scale, causal, window_size=window_size)
    if softcap > 0:
        scores = softcap * torch.tanh((exact.q @ exact.k.mT) * softmax_scale / softcap)
        scores = scores.masked_fill(~exact.seen, -math.inf)
        exact.lse = torch.logsumexp(scores, -1)
        exact.p = (scores - exact.lse.masked_fill(exact.unseen, 0.0)[..., None]).exp()
    if sinks is not None:
        with_sink = torch.logaddexp(exact.lse, sinks.double()[None, :, None])
        exact.p = exact.p * (exact.lse - with_sink).exp()[..., None]
        exact.lse = with_sink
        exact.unseen = with_sink == -math.inf
    exact.out_rows = total(exact.p, exact.v, exact.seen)
    return exact


def assert_right(
    results,
    cache,
    softmax_scale=0.125,
    causal=True,
    window_size=NO_WINDOW,
    softcap=0.0,
    sinks=None,
    **_,
):
    out, lse = results
    assert out.dtype == cache.q.dtype
    assert out.is_contiguous()
    starts = cache.cu_seqlens_q.tolist()
    for i, (q, k, v) in enumerate(cache.sequences):
        if q.shape[1] == 0:
            continue
        rows = slice(starts[i], starts[i + 1])
        exact = exact_attention(q, k, v, softmax_scale, causal, window_size, softcap, sinks)
        assert_rows(f"output of {i}", out[rows][None], exact.out, exact.out_allowed())
        own = lse[:, rows][None]
        assert torch.equal(own == -math.inf, exact.unseen)
        own, right, allowed = (
            x.masked_fill(exact.unseen, 0.0)[..., None]
            for x in (own, exact.lse, exact.lse_allowed())
        )
        assert_rows(f"LSE of {i}", own, right, allowed[..., 0])


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(hopper, seed):
    chance = random.Random(seed)
    batch = chance.choice([1, 2, 3, 7])
    head_dims = chance.choice([(64, 64), (128, 128), (256, 256), (96, 96), (192, 128), (40, 72)])
    key_heads = chance.choice([1, 2, 3])
    group = chance.choice([1, 4, 8, 16])
    dtype = chance.choice(list(DTYPES.values()))
    skip_unless_built(dtype, max(head_dims))
    cache = random_cache(
        chance,
        [chance.choice(LENGTHS) for _ in range(batch)],
        [chance.choice([*QUERIES, chance.randint(17, 90)]) for _ in range(batch)],
        dtype,
        head_dims,
        (key_heads * group, key_heads),
        page_size=chance.choice([None, 1, 16, 64, 100]),
        leftpad=chance.random() < 0.3,
        layout=chance.choice(["dense", "interleaved", "heads first"]),
    )
    sinks = torch.randn(key_heads * group, device="cuda") if chance.random() < 0.3 else None
    options = {
        "softmax_scale": chance.choice([0.05, 0.125, 0.4]),
        "causal": chance.random() < 0.6,
        "window_size": chance.choice([NO_WINDOW, NO_WINDOW, (127, 0), (0, 0), (3, 5), (700, -1)]),
        "num_splits": chance.choice([0, 0, 0, 1, 2, 5, 1000]),
        "sinks": sinks,
        "softcap": chance.choice([0.0, 0.0, 5.0]),
    }
    assert_right(run(cache, **options), cache, **options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [None, 1, 64])
def test_one_long_sequence_is_shared_by_all_multiprocessors(hopper, head_dim, page_size):
    skip_unless_built(torch.bfloat16, head_dim)
    chance = random.Random(head_dim)
    cache = random_cache(
        chance, [40000], [1], head_dims=(head_dim, head_dim), heads=(16, 2), page_size=page_size
    )
    assert_right(run(cache), cache)
    assert_right(run(cache, num_splits=1), cache)


def test_many_sequences(hopper):
    """More than the threads of the kernel that deals the work, many without queries or keys."""
    skip_unless_built(torch.bfloat16, 64)
    chance = random.Random(0)
    batch = 1300
    cache = random_cache(
        chance,
        [chance.choice([0, 1, 5, 70, 200]) for _ in range(batch)],
        [chance.choice([0, 1, 1, 3]) for _ in range(batch)],
        head_dims=(64, 64),
        heads=(2, 1),
        page_size=16,
    )
    assert_right(run(cache), cache)


def test_a_long_prompt(hopper):
    skip_unless_built(torch.bfloat16, 128)
    cache = random_cache(random.Random(1), [3000, 700], [2500, 700], heads=(8, 2), page_size=16)
    assert_right(run(cache), cache)


@pytest.mark.parametrize(("head_dim", "key_heads"), [(64, 1), (64, 2), (128, 1), (256, 1)])
@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("many_rows", [False, True])
def test_few_blocks(hopper, head_dim, key_heads, num_splits, many_rows):
    """Warpgroups take turns with the blocks of 64 rows or fewer (8 tokens), and share those of
    more, or have a key head each: parts of any few blocks come behind one another, wherever in the
    ring they begin. With more than 64 rows in the mean blocks may have other numbers of keys."""
    skip_unless_built(torch.bfloat16, head_dim)
    chance = random.Random(head_dim)
    block = 8192 // head_dim * (2 if many_rows and head_dim == 128 else 1)
    queries = [1, 8, 9, 16, 16, 17] if many_rows else [1, 1, 1, 8, 9, 16]
    lengths = [max(1, blocks * block + more) for blocks in range(8) for more in (-1, 0, 1)] * 20
    chance.shuffle(lengths)
    cache = random_cache(
        chance,
        lengths,
        [chance.choice(queries) for _ in lengths],
        head_dims=(head_dim, head_dim),
        heads=(8 * key_heads, key_heads),
        page_size=16,
    )
    # Fewer multiprocessors than sequences, or each has one part
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    assert_right(run(cache, num_splits=num_splits), cache)
    assert_right(run(cache, num_splits=num_splits, sm_margin=multiprocessors - 7), cache)


def spoil(cache, sequence, keys, head):
    """NaN in values, which are in pages of 16."""
    cache.sequences[sequence][2][:, keys, head] = math.nan
    pages = cache.page_table[sequence, keys // 16].long()
    cache.v_cache[pages, keys % 16, head] = math.nan


@pytest.mark.parametrize(("head_dim", "key_heads"), [(64, 1), (64, 2), (128, 1), (256, 1)])
@pytest.mark.parametrize("queries", [5, 9])
def test_values_that_some_queries_do_not_see(hopper, head_dim, key_heads, queries):
    """NaN in the last keys makes NaN of the queries that see them, and of no other: where
    warpgroups take turns with a tile's blocks, where they share its rows, and where each has a key
    head, of which only the last one has NaN."""
    skip_unless_built(torch.bfloat16, head_dim)
    cache = random_cache(
        random.Random(2),
        [777],
        [queries],
        head_dims=(head_dim, head_dim),
        heads=(8 * key_heads, key_heads),
        page_size=16,
    )
    spoil(cache, 0, torch.arange(777 - 4, 777 - 2, device="cuda"), -1)
    out, _ = run(cache)
    seen = Attention(*cache.sequences[0], 0.125, True)
    assert torch.equal(out.isfinite(), seen.out[0].isfinite())
    assert_right((out, _), cache)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_values_that_some_queries_do_not_see_in_turn(hopper, head_dim):
    """A CTA has sequences of one block, which one warpgroup looks at alone for NaN, and behind each
    of them one whose rows both share: the other one comes there meanwhile."""
    skip_unless_built(torch.bfloat16, head_dim)
    chance = random.Random(head_dim)
    lengths = [chance.randint(9, 32) for _ in range(24)]
    cache = random_cache(
        chance,
        lengths,
        [(8, 9)[i % 2] for i in range(len(lengths))],
        head_dims=(head_dim, head_dim),
        page_size=16,
    )
    for i, n in enumerate(lengths):
        spoil(cache, i, torch.arange(n - chance.randint(1, 8), n, device="cuda"), 0)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    assert_right(run(cache, max_seqlen_q=9, sm_margin=multiprocessors - 1), cache)


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize(
    ("page_size", "window_size"), [(1, (150, 0)), (48, (-1, 70)), (256, (0, 3))]
)
def test_many_rows(hopper, dtype, page_size, window_size):
    """More than 64 rows in the mean, and sequences of one row and of none: windows end anywhere in
    blocks, rows of a block see none of its keys, and NaN is where some rows do not look."""
    skip_unless_built(dtype, 128)
    chance = random.Random(page_size)
    queries = [16, 0, 1, 33, 9, 8, 17, 16, 16, 40]
    lengths = [2000, 100, 129, 777, 128, 127, 0, 1, 256, 30]
    cache = random_cache(
        chance, lengths, queries, dtype, (128, 128), heads=(8, 1), page_size=page_size, leftpad=True
    )
    sinks = torch.randn(8, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    options = {"causal": False, "window_size": window_size, "sinks": sinks}
    assert_right(run(cache, **options), cache, **options)
    assert_right(run(cache, **options, num_splits=3), cache, **options)
    first = run(cache, **options)
    for again, right in zip(run(cache, **options), first, strict=True):
        assert torch.equal(again, right)


@pytest.mark.parametrize("queries", [9, 16])
def test_values_that_some_queries_do_not_see_in_any_word(hopper, queries):
    """Of blocks of 128 keys, wherever in them the NaN is."""
    skip_unless_built(torch.bfloat16, 128)
    for length in (256 - 5, 256, 256 + 7, 256 + 31, 256 + 40, 256 + 64 + 5, 256 + 100):
        cache = random_cache(random.Random(length), [length], [queries], heads=(8, 1), page_size=16)
        spoil(cache, 0, torch.arange(length - 6, length - 2, device="cuda"), 0)
        out, lse = run(cache)
        seen = Attention(*cache.sequences[0], 0.125, True)
        assert torch.equal(out.isfinite(), seen.out[0].isfinite())
        assert_right((out, lse), cache)


def test_rows_that_no_sequence_uses(hopper):
    skip_unless_built(torch.bfloat16, 64)
    cache = random_cache(random.Random(3), [100, 0], [2, 3], head_dims=(64, 64), page_size=16)
    cache.q = torch.cat([torch.full_like(cache.q[:1], math.nan), cache.q, cache.q[:70]])
    cache.cu_seqlens_q += 1
    out, lse = run(cache)
    assert_right((out, lse), cache)
    for rows in (slice(0, 1), slice(6, None)):
        assert not out[rows].any()
        assert (lse[:, rows] == -math.inf).all()


@pytest.mark.parametrize("softcap", [1e-40, 1e4, 1e7, 1e30, 3e38])
def test_softcaps_of_every_size(hopper, softcap):
    """From all scores alike to none changed, however small the scores are beside it; keys of 0."""
    skip_unless_built(torch.bfloat16, 128)
    cache = random_cache(random.Random(8), [1, 70, 1000], [1, 2, 16])
    cache.k_cache[:, 0] = 0.0
    for _, k, _ in cache.sequences:
        k[:, 0] = 0.0
    results = run(cache, softcap=softcap)
    assert_right(results, cache, softcap=softcap)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_scale_that_leaves_one_key(hopper, head_dim, page_size):
    """Scaled scores beyond a float, some of them the largest of a row and negative."""
    skip_unless_built(torch.bfloat16, head_dim)
    sizes = [1, 1, 1, 17, 1000, 300], [1, 1, 1, 2, 16, 300]
    for options in ({}, {"num_splits": 3}, {"sinks": torch.full((8,), -math.inf, device=hopper)}):
        cache = random_cache(
            random.Random(7), *sizes, head_dims=(head_dim, head_dim), page_size=page_size
        )
        out, _ = run(cache, softmax_scale=3e38, **options)
        exact = [Attention(*qkv, 3e38, causal=True).out[0] for qkv in cache.sequences]
        assert torch.equal(out.double(), torch.cat(exact))


def test_lengths_that_lie_outside(hopper):
    """Nothing is read that is not there."""
    skip_unless_built(torch.bfloat16, 64)
    cache = random_cache(random.Random(4), [160, 160], [2, 2], head_dims=(64, 64), page_size=16)
    cache.page_table[:, 160 // 16 :] = cache.page_table[:, :1]  # for all that may be used
    right = run(cache)
    for wrong in (FAR, -FAR):
        cache.cache_seqlens.fill_(wrong)
        run(cache)
    cache.cache_seqlens.fill_(160)
    cache.cu_seqlens_q.copy_(torch.tensor([-5, 100, 7], dtype=torch.int32))
    run(cache)
    cache.cu_seqlens_q.copy_(torch.tensor([0, 2, 4], dtype=torch.int32))
    first_pages = cache.page_table[:, 0].clone()
    cache.page_table[:, 0] = FAR
    run(cache)
    cache.page_table[:, 0] = first_pages
    for again, before in zip(run(cache), right, strict=True):
        assert torch.equal(again, before)


@pytest.mark.parametrize("page_size", [None, 16])
def test_lengths_change_between_replays_of_a_graph(hopper, page_size):
    skip_unless_built(torch.bfloat16, 128)
    chance = random.Random(5)
    cache = random_cache(chance, [4000, 900, 2500], [1, 1, 1], heads=(32, 4), page_size=page_size)
    whole = [k.shape[1] for _, k, _ in cache.sequences]
    run(cache)
    graph = torch.cuda.CUDAGraph()
    scratch = torch.ones(1000, device="cuda")
    with torch.cuda.graph(graph):
        scratch.zero_()  # the kernel may start early behind whatever comes before it
        captured = run(cache)
    for _ in range(30):
        lengths = [chance.choice([0, 1, n // 3, n]) for n in whole]
        cache.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        shorter = dataclasses.replace(
            cache,
            sequences=[
                (q, k[:, :n], v[:, :n])
                for (q, k, v), n in zip(cache.sequences, lengths, strict=True)
            ],
        )
        if chance.random() < 0.2:
            assert_right(captured, shorter)
        for eager, replayed in zip(run(cache), captured, strict=True):
            assert torch.equal(eager, replayed)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_repeats_are_bit_equal(hopper, head_dim):
    skip_unless_built(torch.bfloat16, head_dim)
    cache = random_cache(
        random.Random(6),
        [5000, 1, 3000, 777],
        [1, 4, 2, 16],
        head_dims=(head_dim, head_dim),
        heads=(16, 2),
        page_size=16,
    )
    first = run(cache)
    for _ in range(64):
        for again, right in zip(run(cache), first, strict=True):
            assert torch.equal(again, right)


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("splits", "head_dim"), [(1, 64), (3, 128), (40, 256), (5, 7)])
def test_parts_made_one(hopper, splits, head_dim, out_dtype):
    generator = torch.Generator("cuda").manual_seed(splits)
    shape = (splits, 3, 5, 4)
    lse = 3 * normal(generator, *shape, dtype=torch.float32)
    lse[torch.rand(shape, generator=generator, device="cuda") < 0.3] = -math.inf
    lse[:, 0, 0] = -math.inf
    out = normal(generator, splits, 3, 4, 5, head_dim, dtype=torch.float32).transpose(2, 3)
    weights = torch.softmax(lse.double(), 0).nan_to_num(0.0)
    right = (weights[..., None] * out.double()).sum(0)
    out[lse == -math.inf] = math.nan
    combined, combined_lse = torch.ops.cute_kernels.flash_attn_combine(
        out, lse, out_dtype=out_dtype
    )
    assert combined.dtype == (out_dtype or torch.float32)
    assert combined_lse.shape == shape[1:]
    rounding = torch.finfo(combined.dtype).eps / 2 + 2.0**-19
    assert ((combined.double() - right).abs() <= rounding * (1 + right.abs())).all()
    exact = torch.logsumexp(lse.double(), 0)
    assert torch.equal(combined_lse == -math.inf, exact == -math.inf)
    gap = (combined_lse.double() - exact).masked_fill(exact == -math.inf, 0.0)
    assert (gap.abs() <= 1e-5 * (1 + exact.abs().nan_to_num(0.0, 0.0, 0.0))).all()
