"""Latent attention: `qv` of attention to a cache, whose values are keys too."""

import contextlib
import math
import random
import re

import pytest
import torch
from caches import assert_attention_right, attend, random_cache, random_queries, rotated
from host_program import host_program, needs_cxx
from latent import assert_latent_right, random_problem, skip_unless_built
from parity import changed
from torch._subclasses import FakeTensorMode

from cute_kernels import append_kv, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(device, seed):
    """NaN in everything that is not a key, garbage in what the page table does not need."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    dtype = dtypes[seed % (2 if device == "cuda" else 4)]
    skip_unless_built(device, dtype)
    chance, cache, q, qv, starts, options = random_problem(seed, device, dtype)
    hints = {"num_splits": chance.choice([0, 1, 7]), "max_seqlen_q": chance.choice([None, 4])}
    out, lse = attend(q, starts, cache, qv=qv, **options, **hints)
    assert_latent_right(out, lse, q, qv, starts, cache, **options)


def test_dense_queries_are_packed_ones(device):
    skip_unless_built(device, torch.bfloat16)
    _, cache, *_ = random_problem(0, device, torch.bfloat16, (64, 512))
    batch, heads = len(cache.k), 4 * cache.k_cache.shape[2]
    q, qv = (torch.randn(batch, 3, heads, n, device=device).bfloat16() for n in (64, 512))
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * 3
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
def test_varlen_with_pages(device, page_size):
    """As vLLM calls it: one tensor of pages, of whose rows the first 512 columns are the latent."""
    skip_unless_built(device, torch.bfloat16)
    pages = torch.randn(400 // page_size, page_size, 1, 576, device=device).bfloat16()
    v, k = pages.split([512, 64], -1)
    lengths, queries = [50, 130], [1, 3]
    chosen = torch.randperm(len(pages), device=device)[: 2 * (192 // page_size)]
    table = chosen.int().view(2, -1)
    q, qv = (torch.randn(4, 16, n, device=device).bfloat16() for n in (64, 512))
    starts = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)
    out, lse = flash_attn_varlen_func(
        q,
        k,
        v,
        starts,
        max_seqlen_q=3,
        seqused_k=torch.tensor(lengths, dtype=torch.int32, device=device),
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


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("first", [1, 63, 64, 130])
def test_keys_that_some_queries_do_not_see(device, first, wrong):
    """What is not finite in the last keys reaches the queries that see them, and no other: of three
    tokens the first sees the keys up to number `first`."""
    skip_unless_built(device, torch.bfloat16)
    length = first + 3
    generator = torch.Generator(device).manual_seed(first)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    k, v = normal(1, length, 1, 64), normal(1, length, 1, 512)
    q, qv = normal(1, 3, 128, 64), normal(1, 3, 128, 512)
    right, right_lse = flash_attn_with_kvcache(q, k, v, qv=qv, causal=True, return_softmax_lse=True)
    v[:, -2:, :, ::3] = wrong
    k[:, -1:, :, 5] = wrong
    out, lse = flash_attn_with_kvcache(q, k, v, qv=qv, causal=True, return_softmax_lse=True)
    assert torch.equal(out[:, 0], right[:, 0])
    assert torch.equal(lse[..., 0], right_lse[..., 0])
    assert not out[:, 1:, :, ::3].isfinite().any()


def test_append_kv_takes_latents_of_512(device):
    cache = torch.zeros(2, 16, 1, 576, device=device).bfloat16()
    v_cache, k_cache = cache.split([512, 64], -1)
    k, v = (torch.randn(2, 3, 1, n, device=device).bfloat16() for n in (64, 512))
    lengths = torch.tensor([5, 0], dtype=torch.int32, device=device)
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


HEADS = """
#include <iostream>
#include "cute_kernels/attention/latent/problem.hpp"
using namespace cute_kernels::attention;

int main() {
  int heads_q, heads_kv;
  while (std::cin >> heads_q >> heads_kv) {
    LatentProblem problem{};
    CachedCall& call = problem.call;
    call.heads_kv = heads_kv;
    call.group = heads_q / heads_kv;
    divide_key_heads(problem, 64);
    std::cout << problem.heads_of_key << ' ' << call.group << ' ' << call.heads_kv << '\\n';
  }
}
"""


@needs_cxx
def test_key_heads_of_tiles(tmp_path):
    """Of several tiles a token's rows are divided: each query head stays with its key head."""
    cases = [(128, 1), (128, 2), (64, 1), (192, 1), (16, 1), (40, 1), (96, 1), (256, 2), (8, 8)]
    found = host_program(tmp_path, HEADS, "-O1")(cases)
    for (heads, key_heads), (of_key, group, heads_kv) in zip(cases, found, strict=True):
        assert (of_key * group * heads_kv, heads_kv) == (heads, key_heads)
        assert group == 64 or (of_key == 1 and heads // key_heads % 64 != 0)


BOXES = """
#include <iostream>
#include "cute_kernels/attention/latent/boxes.hpp"
using namespace cute_kernels::attention;

int main() {
  int page_size, has_table, left, chunk, has_leftpad;
  int const any = 0;
  while (std::cin >> page_size >> has_table >> left >> chunk >> has_leftpad) {
    LatentProblem problem{};
    CachedCall& call = problem.call;
    call.heads_kv = 1;
    call.most_keys = 1000;
    call.mask.right = 0;
    if (left >= 0) call.mask.left = left;
    call.chunk = chunk;
    if (has_leftpad != 0) call.lengths.leftpad = &any;
    problem.pages = {has_table != 0 ? &any : nullptr, 1, nullptr, 10, page_size, 100};
    problem.k = problem.v = {nullptr, page_size * 576, 576, 576};
    std::cout << rows_of_latent_boxes(problem, 64) << '\\n';
  }
}
"""


@needs_cxx
def test_which_keys_come_in_boxes(tmp_path):
    """Rows of a box by (page size, pages, window, chunk, left padding); 0: keys are gathered."""
    paged = {1: 0, 16: 16, 48: 16, 64: 64, 100: 0, 256: 64}
    cases = {(size, 1, -1, 0, 0): rows for size, rows in paged.items()}
    cases |= {(64, 1, 90, 0, 0): 0, (64, 1, -1, 37, 0): 0, (64, 1, -1, 0, 1): 0}
    cases |= {(500, 0, *rest): 64 for rest in [(-1, 0, 0), (90, 0, 0), (-1, 37, 0), (-1, 0, 1)]}
    found = host_program(tmp_path, BOXES, "-O1")(list(cases))
    assert [rows for (rows,) in found] == list(cases.values())


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
