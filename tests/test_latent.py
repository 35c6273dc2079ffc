"""Latent attention: `qv` of attention to a cache, whose values are keys too."""

import contextlib
import math
import random
import re

import pytest
import torch
from caches import (
    PAGE_SIZES,
    assert_attention_right,
    attend,
    random_cache,
    random_lengths,
    random_queries,
    rotated,
)
from parity import changed
from torch._subclasses import FakeTensorMode

from cute_kernels import append_kv, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

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


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(seed):
    """NaN in everything that is not a key, garbage in what the page table does not need."""
    dtype = [torch.bfloat16, torch.float16, torch.float32, torch.float64][seed % 4]
    chance, cache, q, qv, starts, options = random_problem(seed, "cpu", dtype)
    hints = {"num_splits": chance.choice([0, 1, 7]), "max_seqlen_q": chance.choice([None, 4])}
    out, lse = attend(q, starts, cache, qv=qv, **options, **hints)
    assert_latent_right(out, lse, q, qv, starts, cache, **options)


def test_dense_queries_are_packed_ones():
    _, cache, *_ = random_problem(0, "cpu", torch.bfloat16, (64, 512))
    batch, heads = len(cache.k), 4 * cache.k_cache.shape[2]
    q, qv = (torch.randn(batch, 3, heads, n).bfloat16() for n in (64, 512))
    starts = torch.arange(batch + 1, dtype=torch.int32) * 3
    right, right_lse = attend(
        q.flatten(0, 1), starts, cache, qv=qv.flatten(0, 1).clone(), causal=True
    )
    heads_first = qv.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (qv, heads_first):
        out, lse = attend(q, None, cache, qv=given, causal=True)
        assert torch.equal(out.flatten(0, 1), right)
        assert torch.equal(lse.transpose(0, 1).flatten(1), right_lse)


def test_both_products_count():
    """One key, known in each: the weights of two keys are those of their scores."""
    k, v = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 16)
    q, qv = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 16)
    k[0, 1, 0, 0], q[..., 0] = 2.0, 3.0
    v[0, 1, 0, 1], qv[..., 1] = 5.0, 7.0
    score = (2 * 3 + 5 * 7) / math.sqrt(24)
    out, lse = flash_attn_with_kvcache(q, k, v, qv=qv, return_softmax_lse=True)
    weight = math.exp(score) / (1 + math.exp(score))
    torch.testing.assert_close(out[0, 0, 0, 1], torch.tensor(5 * weight))
    torch.testing.assert_close(lse[0, 0, 0], torch.tensor(math.log(1 + math.exp(score))))


@pytest.mark.parametrize("page_size", [1, 64])
def test_varlen_with_pages(page_size):
    """As vLLM calls it: one tensor of pages, of whose rows the first 512 columns are the latent."""
    pages = torch.randn(400 // page_size, page_size, 1, 576).bfloat16()
    v, k = pages.split([512, 64], -1)
    lengths, queries = [50, 130], [1, 3]
    table = torch.randperm(len(pages))[: 2 * (192 // page_size)].int().view(2, -1)
    q, qv = torch.randn(4, 16, 64).bfloat16(), torch.randn(4, 16, 512).bfloat16()
    starts = torch.tensor([0, 1, 4], dtype=torch.int32)
    out, lse = flash_attn_varlen_func(
        q,
        k,
        v,
        starts,
        max_seqlen_q=3,
        seqused_k=torch.tensor(lengths, dtype=torch.int32),
        max_seqlen_k=130,
        softmax_scale=192**-0.5,
        causal=True,
        qv=qv,
        page_table=table,
        num_splits=0,
        return_lse=True,
    )
    rows = [pages[of_pages.long()].flatten(0, 1) for of_pages in table]
    keys = [x[:n].roll(64, -1) for x, n in zip(rows, lengths, strict=True)]  # k, then v
    values = [x[..., 64:] for x in keys]
    whole = torch.cat([q, qv], -1)
    options = {"softmax_scale": 192**-0.5, "causal": True}
    assert queries == starts.diff().tolist()
    assert_attention_right(out, lse, whole, starts, keys, values, **options)


def test_append_and_attend():
    """New rows are rotated in k alone, written and seen; q is rotated, qv is not."""
    _, cache, *_ = random_problem(3, "cpu", torch.float32, (64, 512), room=8)
    batch, key_heads = len(cache.k), cache.k_cache.shape[2]
    q, qv = (torch.randn(batch, 2, 4 * key_heads, n) for n in (64, 512))
    k, v = (torch.randn(batch, 2, key_heads, n) for n in (64, 512))
    angles = torch.outer(torch.arange(400.0), 0.7 ** torch.arange(32))
    cos, sin, before = angles.cos(), angles.sin(), cache.lengths
    out, lse = flash_attn_with_kvcache(
        q,
        cache.k_cache,
        cache.v_cache,
        k,
        v,
        qv,
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=cache.seqlens(),
        causal=True,
        return_softmax_lse=True,
        **cache.places,
    )
    turned = []
    for i, first in enumerate(before):
        positions = first + torch.arange(2)
        turned.append(rotated(q[i], cos, sin, positions, True))
        cache.k[i] = torch.cat([cache.k[i], rotated(k[i], cos, sin, positions, True)])
        cache.v[i] = torch.cat([cache.v[i], v[i]])
        rows = cache.rows(i, first, first + 2)
        assert torch.equal(cache.v_cache[rows], v[i])
    starts = torch.arange(batch + 1, dtype=torch.int32) * 2
    found = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    assert_latent_right(*found, torch.cat(turned), qv.flatten(0, 1), starts, cache, causal=True)


def test_append_kv_takes_latents_of_512():
    cache = torch.zeros(2, 16, 1, 576).bfloat16()
    v_cache, k_cache = cache.split([512, 64], -1)
    k, v = torch.randn(2, 3, 1, 64).bfloat16(), torch.randn(2, 3, 1, 512).bfloat16()
    lengths = torch.tensor([5, 0], dtype=torch.int32)
    assert append_kv(k_cache, v_cache, k, v, lengths).tolist() == [8, 3]
    for i, first in enumerate(lengths.tolist()):
        assert torch.equal(cache[i, first : first + 3], torch.cat([v[i], k[i]], -1))


def test_operator():
    chance = random.Random(0)
    cache = random_cache(chance, "cpu", torch.float32, [20, 3], 16, 1, [16, 32])
    for x in (cache.k_cache, cache.v_cache):
        x.nan_to_num_(0.0)
    q, starts = random_queries(chance, "cpu", torch.float32, [2, 1], 4, 16)
    qv, _ = random_queries(chance, "cpu", torch.float32, [2, 1], 4, 32)
    places = (cache.places["page_table"], None, None, None, 0.3, True)
    inputs = (q, cache.k_cache, cache.v_cache, starts, cache.seqlens(), *places)
    operators = torch.ops.cute_kernels
    for operator, before in (
        (operators.flash_attn_kvcache_forward.default, ()),
        (operators.flash_attn_kvcache_forward_out.default, (torch.empty(3, 4, 32),)),
    ):
        done = torch.library.opcheck(operator, (*before, *inputs), {"qv": qv})
        assert set(done.values()) == {"SUCCESS"}


def test_compile():
    torch._dynamo.reset()
    _, cache, q, qv, starts, options = random_problem(8, "cpu", torch.float32, (64, 512))

    def step(q, qv):
        return attend(q.sin(), starts, cache, qv=qv + 1, **options)

    right = step(q, qv)
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(q, qv)
    torch.testing.assert_close(found, right)


def good_call():
    _, cache, q, qv, starts, _ = random_problem(1, "cpu", torch.bfloat16, (64, 512))
    return {
        "q": q,
        "qv": qv,
        "k_cache": cache.k_cache,
        "v_cache": cache.v_cache,
        "cache_seqlens": cache.seqlens(),
        "cu_seqlens_q": starts,
        **cache.places,
    }


BAD = {
    "a list": ({"qv": lambda x: [1.0]}, TypeError, "qv is a list, must be a torch.Tensor"),
    "numbers": ({"qv": lambda x: torch.zeros(2)}, ValueError, "qv has shape (2,), must be "),
    "another dtype": ({"qv": lambda x: x.half()}, TypeError, "qv has dtype torch.float16, must be"),
    "fewer heads": ({"qv": lambda x: x[:, :-1]}, ValueError, "qv has shape "),
    "another head_dim": ({"qv": lambda x: x[..., :256]}, ValueError, "qv has shape "),
    "strided": (
        {"qv": lambda x: x.repeat_interleave(2, -1)[..., ::2]},
        ValueError,
        "qv has strides ",
    ),
    "values of 520": (
        {
            "v_cache": lambda x: torch.zeros(*x.shape[:-1], 520).bfloat16(),
            "qv": lambda x: torch.zeros(*x.shape[:-1], 520).bfloat16(),
        },
        ValueError,
        "v_cache has head_dim 520, must be a multiple of 8 from 8 to 512",
    ),
    "without it": (
        {"qv": lambda x: None},
        ValueError,
        "v_cache has head_dim 512, must be a multiple of 8 from 8 to 256",
    ),
    "keys of 72": (
        {name: lambda x: torch.zeros(*x.shape[:-1], 72).bfloat16() for name in ("q", "k_cache")},
        NotImplementedError,
        "qv is not there yet for q with head_dim 72, only up to 64",
    ),
    "8 bits": (
        {
            "k_cache": lambda x: torch.zeros(x.shape, dtype=torch.int8),
            "v_cache": lambda x: torch.zeros(x.shape, dtype=torch.int8),
        },
        NotImplementedError,
        "qv is not there yet for a cache of torch.int8",
    ),
    "a gradient": (
        {"qv": lambda x: x.clone().requires_grad_()},
        NotImplementedError,
        "flash_attn_with_kvcache has no gradient",
    ),
}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_refused(bad, fake):
    changes, error, message = BAD[bad]
    good = good_call()
    assert flash_attn_with_kvcache(**good).isfinite().all()
    arguments = changed(good, changes)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with mode, pytest.raises(error, match=f"^{re.escape(message)}"):
        flash_attn_with_kvcache(**arguments)


def test_refused_without_a_cache():
    q, k, v, qv = (torch.zeros(1, 4, 2, n).bfloat16() for n in (64, 64, 256, 256))
    with pytest.raises(NotImplementedError, match=r"^flash_attn_func: qv is not there yet"):
        flash_attn_func(q, k, v, qv=qv)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    packed = [x[0] for x in (q, k, v)]
    message = r"^flash_attn_varlen_func: qv is not there yet without page_table$"
    with pytest.raises(NotImplementedError, match=message):
        flash_attn_varlen_func(*packed, starts, starts, qv=qv[0])


def test_shapes_on_cuda():
    """Of a call as SGLang makes it, with one tensor of pages."""
    with FakeTensorMode():
        how = {"device": "cuda", "dtype": torch.bfloat16}
        v, k = torch.empty(100, 64, 1, 576, **how).split([512, 64], -1)
        q, qv = torch.empty(4, 1, 128, 64, **how), torch.empty(4, 1, 128, 512, **how)
        lengths = torch.empty(4, dtype=torch.int32, device="cuda")
        table = torch.empty(4, 9, dtype=torch.int32, device="cuda")
        out, lse = flash_attn_with_kvcache(
            q, k, v, qv=qv, cache_seqlens=lengths, page_table=table, return_softmax_lse=True
        )
        assert out.shape == (4, 1, 128, 512) and out.dtype == q.dtype
        assert lse.shape == (4, 128, 1)
