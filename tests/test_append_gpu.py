"""What the GPU writes into caches: the same bits as the CPU."""

import math
import random

import pytest
import torch
from appends import like, new_rows, random_append, tables
from caches import random_cache, rotated
from packed import starts

from cute_kernels import append_kv
from cute_kernels.cache import operators


def same(a, b):
    return torch.equal(a.cpu().view(torch.int16), b.cpu().view(torch.int16))


def turned(x, cos, sin, first, ends, interleaved, advance, append=operators.append):
    """x rotated as queries are, beside no new keys."""
    caches = x.new_zeros(2, len(first), 1, 1, x.shape[-1])
    new = caches[:, :, :0]
    nowhere = torch.zeros_like(first)
    inputs = (*caches, *new, nowhere, None, None, None, cos, sin, first, interleaved)
    return append(*inputs, x, ends, advance)[1]


@pytest.mark.parametrize("seed", range(120))
def test_random_appends(hopper, seed):
    chance = random.Random(seed)
    dtype = chance.choice([torch.bfloat16, torch.float16])
    cache, k, v, _, options = random_append(chance, dtype, dtype, 500, 40)
    if chance.random() < 0.7:
        pairs = 8 * chance.randint(1, k.shape[-1] // 16)
        cos, sin = tables(chance, pairs, chance.choice([dtype, torch.float32]))
        options |= {"rotary_cos": cos, "rotary_sin": sin}
        if chance.random() < 0.5:
            shift = [chance.randint(0, 2000) for _ in cache.lengths]
            options["rotary_seqlens"] = torch.tensor(shift, dtype=torch.int32)
    interleaved = chance.random() < 0.5
    on_gpu = {name: x.to(hopper) for name, x in options.items()}
    caches = (cache.k_cache, cache.v_cache)
    k_cache = like(cache.k_cache, hopper)
    v_cache = like(cache.v_cache, hopper)
    inputs = (like(x, hopper) for x in (k, v, cache.seqlens()))
    found = append_kv(k_cache, v_cache, *inputs, **on_gpu, rotary_interleaved=interleaved)
    right = append_kv(*caches, k, v, cache.seqlens(), **options, rotary_interleaved=interleaved)
    assert torch.equal(found.cpu(), right)
    assert same(k_cache, cache.k_cache)
    assert same(v_cache, cache.v_cache)


@pytest.mark.parametrize("seed", range(40))
def test_random_rotations(hopper, seed):
    chance = random.Random(seed)
    dtype = chance.choice([torch.bfloat16, torch.float16])
    dense, batch = chance.random() < 0.5, chance.randint(1, 5)
    lengths = [chance.choice([1, 5])] * batch
    if not dense:
        lengths = [chance.choice([0, 1, 16, 300]) for _ in range(batch)]
    heads, head_dim = chance.choice([1, 6, 64]), chance.choice([16, 64, 96, 128, 256])
    x = new_rows(chance, dtype, lengths, heads, head_dim, dense)
    cos, sin = tables(chance, 8 * chance.randint(1, head_dim // 16), torch.float32)
    first = torch.tensor([chance.randint(0, 2000) for _ in lengths], dtype=torch.int32)
    ends = None if dense else torch.tensor(starts(lengths), dtype=torch.int32)
    flags = (chance.random() < 0.5, chance.random() < 0.5)
    inputs = (cos, sin, first, ends)
    right = turned(x, *inputs, *flags)
    on_gpu = (t if t is None else t.to(hopper) for t in inputs)
    assert same(turned(like(x, hopper), *on_gpu, *flags), right)
    assert not same(right, x.contiguous()) or x.numel() == 0 or not first.any()


def test_subnormal_numbers_and_values_that_are_not_finite(hopper):
    tiny = torch.tensor([1e-40, -3e-39, 1e-38, 0.0, math.inf, -math.inf, 3e38, 1.0])
    x = tiny.repeat(4 * 8).view(1, 4, 8, 8).repeat(1, 1, 1, 4).to(torch.bfloat16)
    cos, sin = tables(random.Random(0), 16, torch.float32)
    first = torch.tensor([7], dtype=torch.int32)
    for interleaved in (False, True):
        right = turned(x, cos, sin, first, None, interleaved, True)
        inputs = (t.to(hopper) for t in (x, cos, sin, first))
        found = turned(*inputs, None, interleaved, True).cpu()
        assert torch.equal(found.isnan(), right.isnan())
        assert same(found.nan_to_num(1.0, 2.0, 3.0), right.nan_to_num(1.0, 2.0, 3.0))


@pytest.mark.parametrize("page_size", [None, 16])
def test_wrong_contents_write_nothing_else(hopper, page_size):
    """Rows beyond the cache, negative lengths, pages and entries that do not exist."""
    cache = random_cache(
        random.Random(0), hopper, torch.bfloat16, [20, 3, 9], page_size, 2, [64, 64], 4
    )
    k, v = (torch.ones(3, 4, 2, 64, device=hopper).bfloat16() for _ in range(2))
    capacity = cache.k_cache.shape[1]
    wrong = dict(cache.places)
    lengths = [-2, 2**31 - 1, 5]
    if page_size is None:
        wrong["cache_batch_idx"] = torch.tensor([0, 1, 3], dtype=torch.int32, device=hopper)
    else:
        capacity *= wrong["page_table"].shape[1]
        wrong["page_table"] = wrong["page_table"].clone()
        wrong["page_table"][2] = torch.tensor([-1, 2**31 - 1], dtype=torch.int32)[: capacity // 16]
    expected = cache.k_cache.clone()
    expected[cache.rows(0, 0, 2)] = 1.0  # of sequence 0 the last two rows have a place
    given = torch.tensor(lengths, dtype=torch.int32, device=hopper)
    after = append_kv(cache.k_cache, cache.v_cache, k, v, given, **wrong)
    assert after.tolist() == [2, capacity, 9]
    assert same(cache.k_cache.contiguous(), expected.contiguous())


def test_positions_beyond_the_tables_become_nan(hopper):
    x = torch.ones(2, 3, 2, 64, device=hopper).bfloat16()
    cos, sin = (t.to(hopper) for t in tables(random.Random(0), 16, torch.float32, 10))
    first = torch.tensor([8, -1], dtype=torch.int32, device=hopper)
    out = turned(x, cos, sin, first, None, True, True)
    assert out.isnan().all(-1).any(-1).any(-1).tolist() == [False, False]
    nan = out[..., :32].isnan()
    assert nan[0, 2].all() and nan[1, 0].all()
    assert not nan[0, :2].any() and not nan[1, 1:].any()
    assert (out[..., 32:] == 1).all()


def test_beyond_2_to_the_31_elements(hopper, much_memory):
    """Offsets of 64 bits, in the cache and in its strides."""
    much_memory(20)
    pages = 2**31 // (64 * 2 * 256) + 40
    whole = torch.zeros(pages, 64, 2, 512, dtype=torch.bfloat16, device=hopper)
    k_cache, v_cache = whole.split(256, -1)
    k, v = (torch.randn(2, 3, 2, 256, device=hopper).bfloat16() for _ in range(2))
    table = torch.tensor([[0, 5], [7, pages - 1]], dtype=torch.int32, device=hopper)
    lengths = torch.tensor([2, 63], dtype=torch.int32, device=hopper)
    append_kv(k_cache, v_cache, k, v, lengths, page_table=table)
    assert torch.equal(k_cache[0, 2:5], k[0]) and torch.equal(v_cache[0, 2:5], v[0])
    assert torch.equal(k_cache[pages - 1, :2], k[1, 1:])
    assert torch.equal(v_cache[pages - 1, :2], v[1, 1:])
    assert torch.equal(k_cache[7, 63], k[1, 0])
    written = sum(int(part.count_nonzero()) for part in whole.split(4096))
    assert written <= 12 * 2 * 256 and written > 12 * 2 * 250


def test_graph_with_other_lengths(hopper):
    cache = random_cache(random.Random(0), hopper, torch.bfloat16, [20, 3], 16, 2, [64, 64], 9)
    k, v = (torch.randn(2, 1, 2, 64, device=hopper).bfloat16() for _ in range(2))
    cos, sin = (t.to(hopper) for t in tables(random.Random(0), 16, torch.float32, 100))
    lengths = cache.seqlens()
    options = {**cache.places, "rotary_cos": cos, "rotary_sin": sin}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the first call is inside of it
        after = append_kv(cache.k_cache, cache.v_cache, k, v, lengths, **options)
    for at in ([20, 3], [21, 4], [25, 9]):
        lengths.copy_(torch.tensor(at, dtype=torch.int32))
        graph.replay()
        assert after.tolist() == [n + 1 for n in at]
        for i, n in enumerate(at):
            right = rotated(k[i].cpu(), cos.cpu(), sin.cpu(), torch.tensor([n]), True)
            assert same(cache.k_cache[cache.rows(i, n, n + 1)], right)
            assert same(cache.v_cache[cache.rows(i, n, n + 1)], v[i])


BAD = {
    "k on the CPU": ("k", lambda x: x.cpu(), ValueError, "v is on cuda:0, must be on cpu like k"),
    "float32": ("k", lambda x: x.float(), TypeError, "k has dtype torch.float32, must be float16"),
    "v of another dtype": ("v", lambda x: x.half(), TypeError, "v has dtype torch.float16, must"),
    "lengths of int64": (
        "cache_seqlens",
        lambda x: x.long(),
        TypeError,
        "cache_seqlens has dtype torch.int64, must be torch.int32",
    ),
    "heads": ("k_cache", lambda x: x[:, :, :1], ValueError, "v_cache has shape"),
    "tables": ("rotary_cos", lambda x: x[:, :7], ValueError, "rotary_sin has shape"),
}


@pytest.mark.parametrize("bad", BAD)
def test_refused_as_on_the_cpu(hopper, bad):
    name, change, error, message = BAD[bad]
    cache = random_cache(random.Random(0), hopper, torch.bfloat16, [20, 3], 16, 2, [64, 64], 9)
    cos, sin = (t.to(hopper) for t in tables(random.Random(0), 16, torch.float32, 100))
    arguments = {
        "k_cache": cache.k_cache,
        "v_cache": cache.v_cache,
        "k": torch.ones(2, 1, 2, 64, device=hopper).bfloat16(),
        "v": torch.ones(2, 1, 2, 64, device=hopper).bfloat16(),
        "cache_seqlens": cache.seqlens(),
        "rotary_cos": cos,
        "rotary_sin": sin,
        **cache.places,
    }
    append_kv(**arguments)
    with pytest.raises(error, match=f"^{message}"):
        append_kv(**{**arguments, name: change(arguments[name])})


def test_version_counters(hopper):
    """A gradient through what a cache held before is refused."""
    cache = random_cache(random.Random(0), hopper, torch.bfloat16, [20, 3], 16, 2, [64, 64], 9)
    loss = (cache.k_cache * torch.ones(64, device=hopper, requires_grad=True)).sum()
    new = torch.ones(2, 1, 2, 64, device=hopper).bfloat16()
    append_kv(cache.k_cache, cache.v_cache, new, new, cache.seqlens(), **cache.places)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
