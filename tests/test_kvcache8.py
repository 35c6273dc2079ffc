"""Attention to caches of 8 bits on both devices: every row against fp64."""

import math
import random

import pytest
import torch
from caches import attend, random_cache, random_queries
from eight_bits import CACHES, E4M3, problem_of, random_problem, rotation, skip_unless_built
from traces import launches

from cute_kernels import (
    append_kv,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    tile_configs,
)


def check(problem, mask, **options):
    options |= problem.options
    found = attend(problem.q, problem.starts, problem.cache, **options, **mask)
    problem.assert_right(*found, **mask)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(device, seed):
    problem, mask = random_problem(seed, device)
    skip_unless_built(device, (problem.q.shape[2], problem.cache.v_cache.shape[3]))
    check(problem, mask)
    check(problem, mask, max_seqlen_q=problem.q.shape[0])  # by the kernel of as many rows


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("tokens", "longest"), [(1, 1), (4, 4), (5, 5), (100, 100), (5, None)])
def test_few_rows_and_many_have_kernels_of_their_own(hopper, tmp_path, head_dim, tokens, longest):
    """The smallest tile that holds all rows of the longest sequence, 8 for each of its tokens."""
    rows = [row for row in tile_configs("decode_fp8") if row["head_dim"] == head_dim]
    if len(rows) < 2:
        pytest.skip(f"this build has not two kernels for caches of 8 bits and head dim {head_dim}")
    chance = random.Random(0)
    cache = random_cache(chance, hopper, E4M3, [300, 200], 16, 1, [head_dim, head_dim])
    q, starts = random_queries(chance, hopper, torch.bfloat16, [tokens, 1], 8, head_dim)
    problem = problem_of(chance, hopper, cache, q, starts, (False, None, None))
    mask = {"causal": True}
    check(problem, mask, max_seqlen_q=longest)
    queries = -(-q.shape[0] // 2) if longest is None else longest  # alike, where it is unknown
    fitting = [row["tile_m"] for row in rows if row["tile_m"] >= 8 * queries]
    tile_m = min(fitting, default=max(row["tile_m"] for row in rows))
    names = [row["name"] for row in rows if row["tile_m"] == tile_m]
    options = {**problem.options, **mask, "max_seqlen_q": longest}
    found = launches(lambda: attend(q, starts, cache, **options), tmp_path)
    assert sum(any(name in kernel for name in names) for kernel, *_ in found) == 1, found


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seed", range(12))
def test_long_calls(hopper, seed, head_dim):
    """Sequences whose keys are in parts; up to 64 tokens, which are several tiles."""
    skip_unless_built(hopper, (head_dim, head_dim))
    head_dims = (head_dim, head_dim)
    problem, mask = random_problem(seed, hopper, most=9000, tokens=64, head_dims=head_dims)
    out, lse = check(problem, mask)
    for num_splits in (1, 3):
        problem.assert_right(
            *attend(
                problem.q,
                problem.starts,
                problem.cache,
                **problem.options,
                **mask,
                num_splits=num_splits,
            ),
            **mask,
        )
    again = attend(problem.q, problem.starts, problem.cache, **problem.options, **mask)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_a_cta_of_many_sequences(hopper, head_dim, tokens):
    """Sequences without keys, of one block, of which only some warps have any, and of more blocks
    in turn: the stages that come round are the right ones."""
    skip_unless_built(hopper, (head_dim, head_dim))
    chance = random.Random(head_dim + tokens)
    lengths = [chance.choice([12, 20, 31, 65, 130, 300]) for _ in range(40)]
    lengths[:12] = [20] * 12
    lengths[14:24] = [0, 300, 0, 0, 1, 129, 1, 0, 64, 2]
    cache = random_cache(chance, hopper, E4M3, lengths, 16, 2, [head_dim, head_dim])
    q, starts = random_queries(
        chance, hopper, torch.bfloat16, [tokens] * len(lengths), 16, head_dim
    )
    problem = problem_of(chance, hopper, cache, q, starts, (False, "row", "row"))
    multiprocessors = torch.cuda.get_device_properties(hopper).multi_processor_count
    for ctas in (1, 3):
        check(problem, {"causal": True}, max_seqlen_q=tokens, sm_margin=multiprocessors - ctas)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float16, E4M3])
def test_every_number_is_itself(device, dtype, q_dtype):
    """All 256 bytes as K, one channel at a time, and as V: a softmax of one key is its value."""
    skip_unless_built(device, (64, 64))
    bytes_ = torch.arange(256, dtype=torch.uint8, device=device).view(dtype)
    k_cache = torch.zeros(256, 1, 1, 64, device=device).to(dtype)
    v_cache = bytes_[:, None, None, None].expand(256, 1, 1, 64).contiguous()
    k_cache.view(torch.uint8)[:, 0, 0, 5] = bytes_.view(torch.uint8)
    q = torch.zeros(256, 1, 1, 64, device=device)
    q[..., 5] = 1.0
    out, lse = flash_attn_with_kvcache(
        q.to(q_dtype), k_cache, v_cache, softmax_scale=1.0, return_softmax_lse=True
    )
    right = bytes_.double()
    assert out.dtype == (torch.bfloat16 if q_dtype == E4M3 else q_dtype)
    same = out.double() == right[:, None, None, None]
    assert (same | right.isnan()[:, None, None, None]).all()
    assert out[right.isnan()].isnan().all() and lse[right.isnan()].isnan().all()
    there = ~right.isnan()
    assert (lse[there, 0, 0].double() - right[there]).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", CACHES)
def test_queries_of_all_magnitudes(device, dtype):
    """Rows of q from 2^-120 to 2^120, beyond float16's numbers, against keys that are as small."""
    skip_unless_built(device, (64, 64))
    exponents = torch.arange(-120, 121, 8, device=device)
    rows = len(exponents)
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(1, rows, 1, 64, generator=generator, device=device)
    q = (q * torch.exp2(exponents.float())[:, None, None]).bfloat16()
    k_cache, v_cache = (20 * torch.randn(2, 1, 40, 1, 64, generator=generator, device=device)).to(
        dtype
    )
    for exponent in (-60, 0):  # of K, where scores are finite
        chosen = exponents <= (100 if exponent == 0 else 120)
        k_descale = torch.full((1, 1), 2.0**exponent, device=device)
        _, lse = flash_attn_with_kvcache(
            q[:, chosen],
            k_cache,
            v_cache,
            k_descale=k_descale,
            softmax_scale=1.0,
            return_softmax_lse=True,
        )
        scores = q[0, chosen, 0].double() @ k_cache[0, :, 0].double().T * 2.0**exponent
        right = scores.logsumexp(-1)
        error = (lse[0, 0].double() - right).abs()
        assert (error <= 2e-5 * (1 + scores.abs().amax(-1))).all()


@pytest.mark.parametrize("factor", [2.0**-60, 1e-3, 1.0, 2.0**60])
def test_values_of_all_magnitudes(device, factor):
    """Factors of V's rows that grow and shrink from row to row by 2^12 in all."""
    skip_unless_built(device, (64, 64))
    chance = random.Random(0)
    cache = random_cache(chance, device, E4M3, [300, 70], 16, 2, [64, 64])
    q, starts = random_queries(chance, device, torch.bfloat16, [2, 1], 4, 64)
    problem = problem_of(chance, device, cache, q, starts, (False, None, "row"))
    scale = factor * torch.exp2(torch.randint(-6, 7, cache.k_cache.shape[:3], device=device))
    problem.options["v_descale"] *= scale
    for i, last in enumerate(cache.lengths):
        problem.values[i] *= scale[cache.rows(i, 0, last)].double()[..., None]
    check(problem, {"causal": True})


# Rows whose keys are dealt to warps by slices of 8, few and many rows
@pytest.mark.parametrize(("tokens", "heads"), [(4, 2), (5, 4), (9, 4)])
@pytest.mark.parametrize("factor", [math.nan, math.inf, 2.0**30])
def test_factors_of_unseen_rows_may_be_anything(device, tokens, heads, factor):
    """Of rows that some queries of a tile see, and others do not, which lose no precision."""
    skip_unless_built(device, (64, 64))
    chance = random.Random(3)
    cache = random_cache(chance, device, torch.int8, [90], 16, 1, [64, 64])
    q, starts = random_queries(chance, device, torch.bfloat16, [tokens], heads, 64)
    problem = problem_of(chance, device, cache, q, starts, (False, "row", "row"))
    last, others = cache.rows(0, 88, 90), tokens - 2
    problem.options["v_descale"][last] = factor
    if math.isnan(factor):
        problem.options["k_descale"][last] = factor
    out, lse = attend(q, starts, cache, causal=True, **problem.options)
    assert out[:others].isfinite().all()
    if not math.isfinite(factor):
        assert not out[others:].isfinite().any()
    short = problem_of(random.Random(3), device, cache, q, starts, (False, None, None))
    short.keys, short.values = ([x[0][:88]] for x in (problem.keys, problem.values))
    short.q, short.wide_q = q[:others], problem.wide_q[:others]
    short.starts = torch.tensor([0, others])
    short.assert_right(out[:others], lse[:, :others], causal=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [2, 6, 16])  # 8 rows, whose slices have 8 keys; 24 and 64
def test_nan_stays_with_those_who_see_it(device, head_dim, heads):
    """Of one column of V, of a key that some rows of a tile see, and of a row of queries."""
    skip_unless_built(device, (head_dim, head_dim))
    chance = random.Random(heads)
    lengths, tokens, column = [4, 9, 12, 61, 64, 67, 100, 128, 300], 4, 5
    cache = random_cache(chance, device, E4M3, lengths, 16, 1, [head_dim, head_dim])
    q, starts = random_queries(
        chance, device, torch.bfloat16, [tokens] * len(lengths), heads, head_dim
    )
    problem = problem_of(chance, device, cache, q, starts, (False, "row", "row"))
    options = {"causal": True, "max_seqlen_q": tokens, **problem.options}
    right, right_lse = check(problem, {"causal": True}, max_seqlen_q=tokens)
    assert right.isfinite().all()

    spoiled_q = q.clone()
    spoiled_q[9, 1, 3] = math.nan
    out, lse = attend(spoiled_q, starts, cache, **options)
    assert out[9, 1].isnan().all() and lse[1, 9].isnan()
    out[9, 1], lse[1, 9] = right[9, 1], right_lse[1, 9]
    assert torch.equal(out, right) and torch.equal(lse, right_lse)

    for i, n in enumerate(lengths):
        page, row = cache.rows(i, n - 2, n - 1)  # the third token's
        cache.v_cache.view(torch.uint8)[page, row, 0, column] = 0x7F
    out, lse = attend(q, starts, cache, **options)
    spoiled = torch.zeros_like(out, dtype=torch.bool)
    spoiled.view(len(lengths), tokens, heads, head_dim)[:, 2:, :, column] = True
    assert torch.equal(out.isnan(), spoiled)
    assert torch.equal(out[~spoiled], right[~spoiled]) and torch.equal(lse, right_lse)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_varlen_with_pages(device, page_size):
    """As vLLM calls it: e4m3 queries, one number for all heads and sequences, expanded."""
    skip_unless_built(device, (64, 64))
    chance = random.Random(page_size)
    cache = random_cache(chance, device, E4M3, [50, 1, 0, 210], page_size, 2, [64, 64])
    q, starts = random_queries(chance, device, E4M3, [3, 1, 2, 9], 8, 64)
    problem = problem_of(chance, device, cache, q, starts, (False, None, None))
    descales = {
        f"{x}_descale": torch.full((1,), n, device=device).expand(4, 2)
        for x, n in zip("qkv", (0.5, 2.0, 3.0), strict=True)
    }
    problem.wide_q, problem.keys = problem.wide_q * 0.5, [2.0 * x for x in problem.keys]
    problem.values = [3.0 * x for x in problem.values]
    found = flash_attn_varlen_func(
        q,
        cache.k_cache,
        cache.v_cache,
        starts,
        max_seqlen_q=9,
        seqused_k=cache.seqlens(),
        max_seqlen_k=210,
        causal=True,
        num_splits=0,
        return_lse=True,
        **descales,
        **cache.places,
    )
    problem.assert_right(*found, causal=True)


def test_a_graph_serves_other_lengths_and_factors(hopper):
    skip_unless_built(hopper, (64, 64))
    chance = random.Random(1)
    cache = random_cache(chance, hopper, torch.int8, [700, 90], 16, 2, [64, 64], room=8)
    q, starts = random_queries(chance, hopper, torch.bfloat16, [1, 1], 8, 64)
    problem = problem_of(chance, hopper, cache, q, starts, (True, "row", "row"), rotated=True)
    k, v = torch.randn(2, 2, 1, 2, 64, device=hopper).bfloat16()
    options = dict(problem.options)
    scales = {"k_scales": options.pop("k_descale"), "v_scales": options.pop("v_descale")}
    lengths = cache.seqlens()

    def step():
        return flash_attn_with_kvcache(
            q.view(2, 1, 8, 64),
            cache.k_cache,
            cache.v_cache,
            k,
            v,
            cache_seqlens=lengths,
            causal=True,
            **scales,
            **options,
            **cache.places,
        )

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for added in (0, 3, 1):
        lengths.copy_(cache.seqlens() - 40 + added)
        k.normal_()
        graph.replay()
        found = out.clone()
        assert torch.equal(found, step())


def outliers(rows, heads=2, head_dim=128):
    """N(0, 1) with 4 channels that are 30 times larger."""
    x = torch.randn(rows, heads, head_dim, generator=torch.Generator().manual_seed(rows))
    x[..., [3, 40, 77, 101]] *= 30
    return x


def test_rotated_keys_survive_outliers(device):
    """RMSE at most a third of e4m3's with one factor."""
    skip_unless_built(device, (128, 128))
    generator, rows = torch.Generator().manual_seed(2), 500
    k, v = outliers(rows), torch.randn(rows, 2, 128, generator=generator)
    q = torch.randn(64, 8, 128, generator=generator) / 10
    k, v, q = (x.bfloat16().to(device) for x in (k, v, q))
    shape, lengths = (32, 16, 2, 128), torch.zeros(1, dtype=torch.int32, device=device)
    table = torch.arange(32, dtype=torch.int32, device=device)[None]
    wide = [x.double().transpose(0, 1) for x in (q, k, v)]
    group = [x.repeat_interleave(4, 0) for x in wide[1:]]
    exact = torch.softmax(wide[0] @ group[0].mT / 128**0.5, -1) @ group[1]

    def error(dtype, **factors):
        caches = torch.zeros(2, *shape, device=device).to(dtype)
        common = {"page_table": table, **factors}
        after = append_kv(*caches, k[None], v[None], lengths, **common)
        out = flash_attn_with_kvcache(q[None], *caches, cache_seqlens=after, **common)
        return (out[0].double().transpose(0, 1) - exact).square().mean().sqrt()

    one = {f"{x}_descale": torch.full((1, 2), 120 / 448, device=device) for x in "kv"}
    scales = {f"{x}_scales": torch.full(shape[:3], math.nan, device=device) for x in "kv"}
    plain, rotated = error(E4M3, **one), error(torch.int8, incoherent=True, seed=7, **scales)
    assert rotated < plain / 3


def test_rotation_is_the_definition():
    """append_kv writes k M, rounded: M of its own definition."""
    k, v = torch.randn(2, 1, 9, 2, 64)
    caches = torch.zeros(2, 1, 9, 2, 64, dtype=torch.int8)
    scales = torch.zeros(2, 1, 9, 2)
    lengths = torch.zeros(1, dtype=torch.int32)
    how = {"k_scales": scales[0], "v_scales": scales[1], "incoherent": True, "seed": 3}
    append_kv(*caches, k, v, lengths, **how)
    found = caches.double() * scales[..., None]
    for x, right in zip(found, (k.double() @ rotation(64, 3), v.double()), strict=True):
        assert ((x - right).abs() <= right.abs().amax(-1, keepdim=True) / 253).all()
