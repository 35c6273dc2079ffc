"""Attention to caches of keys and values."""

import inspect
import math
import random

import pytest
import torch
from caches import (
    PAGE_SIZES,
    assert_attention_right,
    attend,
    random_cache,
    random_problem,
    random_queries,
    rotated,
    skip_unless_attended,
)
from oracle import visible
from parity import WINDOWS, one_hot

from cute_kernels import (
    append_kv,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)


def dtype_of(device, seed):
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    return dtypes[seed % (2 if device == "cuda" else 4)]


@pytest.mark.parametrize("seed", range(120))
def test_random_calls(device, seed):
    """Packed queries; NaN in everything that is not a key, garbage in what the page table does not
    need."""
    dtype = dtype_of(device, seed)
    chance, cache, q, cu_seqlens_q, options = random_problem(seed, device, dtype)
    skip_unless_attended(device, dtype, (q.shape[2], cache.v_cache.shape[3]))
    hints = {"num_splits": chance.choice([0, 1, 7]), "max_seqlen_q": chance.choice([None, 16])}
    out, lse = attend(q, cu_seqlens_q, cache, **options, **hints)
    assert_attention_right(out, lse, q, cu_seqlens_q, cache.k, cache.v, **options)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("seqlen_q", [0, 1, 5])
def test_dense_queries_are_packed_ones(device, seqlen_q, page_size):
    skip_unless_attended(device, torch.bfloat16, (64, 64))
    chance = random.Random(seqlen_q)
    cache = random_cache(chance, device, torch.bfloat16, [9, 0, 133], page_size, 2, [64, 64])
    q, starts = random_queries(chance, device, torch.bfloat16, [seqlen_q] * 3, 4, 64)
    sinks = torch.zeros(4, device=device)
    for options in ({}, {"causal": True}, {"window_size": (4, 0), "sinks": sinks}):
        right, right_lse = attend(q, starts, cache, **options)
        dense = q.view(3, seqlen_q, 4, 64)
        heads_first = dense.transpose(1, 2).contiguous().transpose(1, 2)
        for x in (dense, heads_first):
            out, lse = attend(x, None, cache, **options)
            assert torch.equal(out, right.view_as(x))
            assert torch.equal(lse, right_lse.view(4, 3, seqlen_q).transpose(0, 1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [None, 16, 100])
def test_every_visible_key_has_its_weight(causal, page_size):
    """Scores are all 0 and V is one-hot by row: a query that sees n keys has 1 / n of each."""
    lengths, queries = [0, 1, 30, 100, 101, 200], [1, 3, 1, 16, 2, 16]
    cache = random_cache(random.Random(1), "cpu", torch.float32, lengths, page_size, 1, [8, 256])
    for i, n in enumerate(lengths):
        rows = cache.rows(i, 0, n)
        cache.k_cache[rows] = 0.0
        cache.v_cache[rows] = one_hot(n, 0, 256, 256)[0, :n] if n else 0.0
    q, starts = random_queries(random.Random(0), "cpu", torch.float32, queries, 2, 8)
    for window_size in [(-1, -1), *WINDOWS[::5]]:
        options = {"causal": causal, "window_size": window_size}
        out, _ = attend(torch.zeros_like(q), starts, cache, **options)
        for i, (rows, keys) in enumerate(zip(queries, lengths, strict=True)):
            seen = visible(rows, keys, causal, window_size)
            right = seen / seen.sum(-1, keepdim=True).clamp(min=1)
            part = out[starts[i] : starts[i + 1], :, :keys]
            torch.testing.assert_close(part, right[:, None].expand_as(part), rtol=1e-5, atol=0)


def tables(positions, rotary_dim, dtype, device):
    angles = torch.outer(torch.arange(positions), 0.8 ** torch.arange(rotary_dim // 2)).double()
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


@pytest.mark.parametrize("seed", range(40))
def test_append_and_attend(device, seed):
    """New keys are rotated, written and seen; queries are rotated by where they stand."""
    dtype = dtype_of(device, seed)
    chance, cache, q, starts, options = random_problem(seed, device, dtype, most=80, room=16)
    skip_unless_attended(device, dtype, (q.shape[2], cache.v_cache.shape[3]))
    dense = chance.random() < 0.5
    batch, heads = len(cache.k), q.shape[1]
    lengths = [chance.randint(1, 8)] * batch if dense else [chance.randint(0, 16) for _ in cache.k]
    q, starts = random_queries(chance, device, dtype, lengths, heads, q.shape[2])
    key_heads, head_dims = cache.k_cache.shape[2], [cache.k_cache.shape[3], cache.v_cache.shape[3]]
    new_k, new_v = (
        random_queries(chance, device, dtype, lengths, key_heads, head_dim)[0]
        for head_dim in head_dims
    )
    before = cache.lengths
    keywords = {"cache_seqlens": cache.seqlens(), **cache.places, **options}
    right_q, right_k = q, new_k
    if chance.random() < 0.7:
        interleaved = chance.random() < 0.5
        positions = [chance.randint(0, 50) for _ in before]
        shift = chance.random() < 0.5
        rotary_dim = 16 * chance.randint(1, head_dims[0] // 16)
        cos, sin = tables(300, rotary_dim, chance.choice([dtype, torch.float32]), device)
        keywords |= {
            "rotary_cos": cos,
            "rotary_sin": sin,
            "rotary_interleaved": interleaved,
            "rotary_seqlens": torch.tensor(positions, dtype=torch.int32, device=device),
        }
        if not shift:
            del keywords["rotary_seqlens"]
        at = [
            p + torch.arange(n, device=device)
            for p, n in zip(positions if shift else before, lengths, strict=True)
        ]
        moves = options["causal"] or options["window_size"] != (-1, -1)
        moves = moves or options["attention_chunk"] > 0
        of_q = torch.cat(at if moves else [p[:1].expand(len(p)) for p in at])
        right_k = rotated(new_k, cos, sin, torch.cat(at), interleaved)
        right_q = rotated(q, cos, sin, of_q, interleaved)
    right_caches = cache.k_cache.clone(), cache.v_cache.clone()
    for i, n in enumerate(lengths):
        rows, new = cache.rows(i, before[i], before[i] + n), slice(starts[i], starts[i + 1])
        right_caches[0][rows], right_caches[1][rows] = right_k[new], new_v[new]
        cache.k[i] = torch.cat([cache.k[i], right_k[new]])
        cache.v[i] = torch.cat([cache.v[i], new_v[new]])
    if dense:
        rows = (batch, lengths[0])
        given = [x.unflatten(0, rows) for x in (q, new_k, new_v)]
    else:
        given = [q, new_k, new_v]
        keywords |= {"cu_seqlens_q": starts, "cu_seqlens_k_new": starts}
    out, lse = flash_attn_with_kvcache(
        given[0], cache.k_cache, cache.v_cache, *given[1:], **keywords, return_softmax_lse=True
    )
    for held, right in zip((cache.k_cache, cache.v_cache), right_caches, strict=True):
        assert torch.equal(held.nan_to_num(123.0), right.nan_to_num(123.0))
    if dense:
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    assert_attention_right(out, lse, right_q, starts, cache.k, cache.v, **options)


def test_append_returns_the_lengths():
    cache = random_cache(random.Random(0), "cpu", torch.bfloat16, [3, 0, 7], 16, 2, [64, 32], 5)
    k, v = torch.ones(7, 2, 64).bfloat16(), torch.ones(7, 2, 32).bfloat16()
    ends = torch.tensor([0, 5, 5, 7], dtype=torch.int32)
    places = {**cache.places, "cu_seqlens_k_new": ends}
    lengths = append_kv(cache.k_cache, cache.v_cache, k, v, cache.seqlens(), **places)
    assert lengths.tolist() == [8, 0, 9]
    assert lengths.dtype == torch.int32
    assert (cache.k_cache[cache.rows(0, 3, 8)] == 1).all()
    assert (cache.v_cache[cache.rows(2, 7, 9)] == 1).all()
    assert cache.k_cache[cache.rows(0, 0, 3)].equal(cache.k[0])


@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_varlen_with_pages(device, page_size):
    """As vLLM calls it: no cu_seqlens_k, lengths in seqused_k."""
    skip_unless_attended(device, torch.bfloat16, (64, 64))
    cache = random_cache(
        random.Random(page_size), device, torch.bfloat16, [50, 1, 0, 210], page_size, 2, [64, 64]
    )
    q, starts = random_queries(random.Random(0), device, torch.bfloat16, [3, 1, 2, 9], 8, 64)
    sinks = torch.ones(8, device=device).bfloat16()
    for options in ({"causal": True}, {"window_size": [20, 0], "sinks": sinks}):
        result = flash_attn_varlen_func(
            q,
            cache.k_cache,
            cache.v_cache,
            starts,
            max_seqlen_q=9,
            seqused_k=cache.seqlens(),
            max_seqlen_k=210,
            num_splits=0,
            return_lse=True,
            **cache.places,
            **options,
        )
        assert_attention_right(*result, q, starts, cache.k, cache.v, **options)


def test_a_cache_in_order_is_no_cache():
    q, k, v = torch.randn(3, 2, 70, 2, 64).bfloat16()
    q = q[:, :9]
    for options in ({"causal": True}, {"window_size": (30, 2)}):
        out, lse = flash_attn_with_kvcache(q, k, v, **options, return_softmax_lse=True)
        right, right_lse = flash_attn_func(q, k, v, **options, return_lse=True)
        assert torch.equal(out, right)
        assert torch.equal(lse, right_lse)
        half = flash_attn_with_kvcache(q, k, v, cache_seqlens=35, **options)
        assert torch.equal(half, flash_attn_func(q, k[:, :35], v[:, :35], **options))


def test_out(device):
    """Also where it is a part of another tensor, and is copied into."""
    skip_unless_attended(device, torch.bfloat16, (64, 64))
    cache = random_cache(random.Random(0), device, torch.bfloat16, [40, 5], 16, 2, [64, 32])
    q, starts = random_queries(random.Random(0), device, torch.bfloat16, [2, 2], 4, 64)
    right, right_lse = attend(q, starts, cache)
    whole = torch.full((4, 4, 50), math.nan, device=device).bfloat16()
    for given in (whole[..., 3:35], torch.full_like(right, math.nan)):
        out, lse = attend(q, starts, cache, out=given)
        assert out is given
        assert torch.equal(out, right)
        assert torch.equal(lse, right_lse)
        rows = given.clone().fill_(math.nan).view(2, 2, 4, 32)
        assert attend(q.view(2, 2, 4, 64), None, cache, out=rows)[0] is rows
        assert torch.equal(rows.view_as(right), right)
    assert whole[..., :3].isnan().all() and whole[..., 35:].isnan().all()


def test_scheduler_metadata_is_accepted():
    cache = random_cache(random.Random(0), "cpu", torch.bfloat16, [40, 5], 16, 2, [64, 64])
    q, starts = random_queries(random.Random(0), "cpu", torch.bfloat16, [2, 2], 4, 64)
    metadata = get_scheduler_metadata(2, 2, 40, 4, 2, 64, cache.seqlens(), causal=True)
    assert metadata.dtype == torch.int32 and metadata.device == q.device
    right = attend(q, starts, cache)[0]
    assert torch.equal(attend(q, starts, cache, scheduler_metadata=metadata)[0], right)


def shown(function, kind):
    return [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(function).parameters.values()
        if p.kind is kind
    ]


def test_signatures():
    """FlashAttention-3's names, order and defaults, and own arguments by name."""
    kind = inspect.Parameter
    names = shown(flash_attn_with_kvcache, kind.POSITIONAL_OR_KEYWORD)
    assert ", ".join(names) == (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, "
        "cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, "
        "q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, "
        "return_softmax_lse=False"
    )
    assert shown(flash_attn_with_kvcache, kind.KEYWORD_ONLY) == [
        "sinks=None",
        "out=None",
        "k_scales=None",
        "v_scales=None",
        "incoherent=False",
        "seed=0",
        "tree_mask=None",
    ]
    names = shown(get_scheduler_metadata, kind.POSITIONAL_OR_KEYWORD)
    assert ", ".join(names) == (
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, "
        "cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, "
        "cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, "
        "causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0, "
        "pack_gqa=None, sm_margin=0"
    )
