"""Writing to caches of 8 bits: what the numbers are, and the same bits on both devices."""

import math
import random
import re

import pytest
import torch
from appends import like, new_rows, random_append, tables
from caches import PAGE_SIZES, random_cache, rotated
from eight_bits import CACHES, E4M3, rotation
from packed import starts

from cute_kernels import append_kv, flash_attn_with_kvcache, tile_configs

LARGEST = {E4M3: 448.0, torch.int8: 127.0}


def skip_unless_built(device):
    if device == "cuda" and not tile_configs("decode_fp8"):
        pytest.skip("this build has no kernels for caches of 8 bits")


def random_append8(seed):
    """The same of a cache of 8 bits, with rotary tables, rotation and factors."""
    chance = random.Random(seed)
    dtype, cache_dtype = chance.choice([torch.bfloat16, torch.float16]), chance.choice(CACHES)
    cache, k, v, added, options = random_append(chance, dtype, cache_dtype, 300, 48)
    batch, heads, head_dim = len(cache.lengths), *k.shape[-2:]
    if chance.random() < 0.5:
        cos, sin = tables(chance, 8 * chance.randint(1, head_dim // 16), torch.float32)
        options |= {"rotary_cos": cos, "rotary_sin": sin}
        options["rotary_interleaved"] = chance.random() < 0.5
    if head_dim & (head_dim - 1) == 0 and chance.random() < 0.6:
        options |= {"incoherent": True, "seed": chance.choice([0, 9, 2**64 - 1])}
    rows = cache.k_cache.shape[:3]
    for name in "kv":
        kind = chance.choice([None, "descale", "rows", "pages", "scales", "scales"])
        shape = {"descale": (batch, heads), "rows": rows, "pages": (rows[0], 1, rows[2])}
        if kind == "scales":
            whole = torch.full((rows[0], rows[2], rows[1]), math.nan)
            options[f"{name}_scales"] = whole.transpose(1, 2)
        elif kind is not None:
            options[f"{name}_descale"] = 0.01 + torch.rand(shape[kind]) / 20
    return cache, k, v, added, options


def written_rows(cache, x, added, numbers, factors):
    """Of each sequence: what is to be written, in fp64, and the numbers and factors there."""
    x = x.reshape(-1, *x.shape[-2:])
    ends = starts(added)
    for i, (first, n) in enumerate(zip(cache.lengths, added, strict=True)):
        rows = cache.rows(i, first, first + n)
        yield x[ends[i] : ends[i] + n], numbers[rows].double(), factors(i, rows)


@pytest.mark.parametrize("seed", range(60))
def test_random_appends_are_as_near_as_rounding_allows(seed):
    cache, k, v, added, options = random_append8(seed)
    before = [x.clone() for x in (cache.k_cache, cache.v_cache)]
    after = append_kv(cache.k_cache, cache.v_cache, k, v, cache.seqlens(), **options)
    assert after.tolist() == [n + m for n, m in zip(cache.lengths, added, strict=True)]
    if "rotary_cos" in options:
        at = [first + torch.arange(n) for first, n in zip(cache.lengths, added, strict=True)]
        tables_ = options["rotary_cos"], options["rotary_sin"]
        packed = k.reshape(-1, *k.shape[-2:])
        k = rotated(packed, *tables_, torch.cat(at), options["rotary_interleaved"])
    k, v = k.double(), v.double()
    if "seed" in options:
        k = k @ rotation(k.shape[-1], options["seed"])
    for name, x, numbers, old in zip(
        "kv", (k, v), (cache.k_cache, cache.v_cache), before, strict=True
    ):
        descale = options.get(f"{name}_descale")
        scales = options.get(f"{name}_scales")
        largest = LARGEST[numbers.dtype]

        def factors(i, rows, descale=descale, scales=scales):
            if scales is not None:
                return scales[rows].double()[..., None]
            if descale is None:
                return torch.ones(1, dtype=torch.float64)
            if descale.dim() == 2:
                return descale[i].double()[:, None]
            page, row = rows
            return descale[page, row if descale.shape[1] > 1 else 0 * row].double()[..., None]

        for right, found, factor in written_rows(cache, x, added, numbers, factors):
            if scales is not None and found.numel():
                top = right.abs().amax(-1, keepdim=True)
                assert ((factor - top / largest).abs() <= 1e-6 * top).all()
            least = largest + (numbers.dtype == torch.int8)
            limited = right.clamp(-least * factor, largest * factor)
            step = 0.5 if numbers.dtype == torch.int8 else (limited / factor).abs() / 16 + 2.0**-10
            assert ((found * factor - limited).abs() <= 1.001 * factor * step).all()
        # Nothing else is written
        for i, (first, n) in enumerate(zip(cache.lengths, added, strict=True)):
            rows = cache.rows(i, first, first + n)
            old[rows] = numbers[rows]
        assert torch.equal(old.view(torch.uint8), numbers.view(torch.uint8))


@pytest.mark.parametrize("seed", range(60))
def test_both_devices_write_the_same_bits(hopper, seed):
    skip_unless_built(hopper)
    cache, k, v, _, options = random_append8(seed)
    on_gpu = {
        name: like(x, hopper) if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    caches = [like(x, hopper) for x in (cache.k_cache, cache.v_cache)]
    new = [like(x, hopper) for x in (k, v, cache.seqlens())]
    found = append_kv(*caches, *new, **on_gpu)
    right = append_kv(cache.k_cache, cache.v_cache, k, v, cache.seqlens(), **options)
    assert torch.equal(found.cpu(), right)
    for x, y in zip(caches, (cache.k_cache, cache.v_cache), strict=True):
        assert torch.equal(x.cpu().view(torch.uint8), y.view(torch.uint8))
    for name in ("k_scales", "v_scales"):
        if name in options:
            assert torch.equal(
                on_gpu[name].cpu().view(torch.int32), options[name].view(torch.int32)
            )


@pytest.mark.parametrize("dtype", CACHES)
def test_rows_that_are_zero_tiny_or_not_finite(device, dtype):
    skip_unless_built(device)
    rows = torch.zeros(6, 1, 64)
    rows[1] = 1e-38
    rows[2, 0, 3], rows[3, 0, 4] = math.inf, math.nan
    rows[4], rows[5, 0, 7] = 2.0**100, -1.0
    k = rows[None].bfloat16().to(device)
    caches = torch.ones(2, 1, 6, 1, 64, device=device).to(dtype)
    scales = torch.full((2, 1, 6, 1), 5.0, device=device)
    start = torch.zeros(1, dtype=torch.int32, device=device)
    append_kv(*caches, k, k, start, k_scales=scales[0], v_scales=scales[1])
    for numbers, factors in zip(caches, scales, strict=True):
        found = (numbers.float() * factors[..., None])[0, :, 0].cpu()
        assert not found[:2].any()
        assert factors[0, 2] == math.inf and factors[0, 3].isnan()
        assert found[3].isnan().all()
        assert torch.allclose(found[4:], k[0, 4:, 0].float().cpu(), rtol=1e-6)
    caches = torch.ones(2, 1, 6, 1, 64, device=device).to(dtype)
    append_kv(*caches, k, k, start)  # factors of 1: what is too large is the largest
    found = caches[0, 0, :, 0].float().cpu()
    most = {E4M3: 448.0, torch.int8: 127.0}[dtype]
    assert found[2, 3] == most and (found[4] == most).all()
    assert found[3, 4].isnan() if dtype == E4M3 else found[3, 4] == 0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *CACHES])
def test_no_heads(device, dtype, packed):
    """Nothing is written, and lengths grow all the same."""
    skip_unless_built(device)
    caches = torch.zeros(2, 3, 16, 0, 64, device=device).to(dtype)
    k = torch.zeros(3, 4, 0, 64, device=device, dtype=torch.bfloat16)
    lengths = torch.tensor([0, 5, 14], dtype=torch.int32, device=device)
    given, added = {}, [4, 4, 2]
    if packed:
        k, added = k.flatten(0, 1)[:9], [4, 3, 2]
        given["cu_seqlens_k_new"] = torch.tensor(starts(added), dtype=torch.int32, device=device)
    if dtype != torch.bfloat16:
        given["incoherent"] = True
    if not packed and device == "cpu":
        lengths[2] = 12  # the CPU refuses what has no room
        added[2] = 4
    after = append_kv(*caches, k, k, lengths, **given)
    assert after.tolist() == [n + m for n, m in zip(lengths.tolist(), added, strict=True)]


def random_stored(seed):
    """As random_append, of rows that have the cache's dtype already."""
    chance = random.Random(seed)
    dtype = chance.choice(CACHES)
    batch, dense = chance.randint(1, 6), chance.random() < 0.5
    lengths = [chance.choice([0, 1, 40, 300]) for _ in range(batch)]
    added = [chance.choice([1, 1, 7])] * batch
    if not dense:
        added = [chance.choice([0, 1, 16, 100]) for _ in range(batch)]
    heads = chance.choice([1, 2, 8])
    head_dims = chance.choice([[64, 64], [128, 128], [192, 128], [16, 48], [256, 256]])
    page_size = chance.choice(PAGE_SIZES)
    sizes = (page_size, heads, head_dims, max(added))
    cache = random_cache(chance, "cpu", dtype, lengths, *sizes, batch_idx=chance.random() < 0.5)
    new = [new_rows(chance, torch.float32, added, heads, n, dense) for n in head_dims]
    k, v = ((40 * x).round().clamp(-128, 127).to(dtype) for x in new)
    if dtype == E4M3:  # every bit is kept
        k.view(torch.uint8).random_(0, 256)
    if chance.random() < 0.5:  # parts of one tensor, at addresses that no vector may have
        whole = torch.cat([k[..., :2], k, v], -1)
        k, v = whole[..., 2 : 2 + head_dims[0]], whole[..., 2 + head_dims[0] :]
    options = dict(cache.places)
    if not dense:
        options["cu_seqlens_k_new"] = torch.tensor(starts(added), dtype=torch.int32)
    if chance.random() < 0.5:  # what numbers mean changes nothing
        options["k_descale"] = torch.rand(batch, heads)
    return cache, k, v, added, options


@pytest.mark.parametrize("seed", range(30))
def test_rows_of_8_bits_are_stored_as_they_are(device, seed):
    cache, k, v, added, options = random_stored(seed)
    right = [cache.k_cache.clone(), cache.v_cache.clone()]
    ends = starts(added)
    for i, (first, n) in enumerate(zip(cache.lengths, added, strict=True)):
        rows = cache.rows(i, first, first + n)
        for to, x in zip(right, (k, v), strict=True):
            to[rows] = x.reshape(-1, *x.shape[-2:])[ends[i] : ends[i] + n]
    given = {name: like(x, device) for name, x in options.items()}
    caches = [like(x, device) for x in (cache.k_cache, cache.v_cache)]
    new = [like(x, device) for x in (k, v, cache.seqlens())]
    after = append_kv(*caches, *new, **given)
    assert after.tolist() == [n + m for n, m in zip(cache.lengths, added, strict=True)]
    for found, x in zip(caches, right, strict=True):
        assert torch.equal(found.cpu().view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("seed", range(30))
def test_rotary_rounds_rows_of_8_bits_again(device, seed):
    """Keys, whatever descales say; values stay as they are."""
    skip_unless_built(device)
    cache, k, v, added, options = random_stored(seed)
    k = (30 * torch.randn(k.shape)).round().clamp(-128, 127).to(k.dtype)
    chance = random.Random(seed)
    dtype = chance.choice([torch.float32, torch.float16] + [E4M3] * (k.dtype == E4M3))
    cos, sin = tables(chance, 8 * chance.randint(1, k.shape[-1] // 16), torch.float32, 500)
    cos, sin = cos.to(dtype), sin.to(dtype)
    interleaved = chance.random() < 0.5
    given = {name: like(x, device) for name, x in options.items()}
    given |= {"rotary_cos": cos.to(device), "rotary_sin": sin.to(device)}
    caches = [like(x, device) for x in (cache.k_cache, cache.v_cache)]
    new = [like(x, device) for x in (k, v, cache.seqlens())]
    after = append_kv(*caches, *new, rotary_interleaved=interleaved, **given)
    assert after.tolist() == [n + m for n, m in zip(cache.lengths, added, strict=True)]
    ends = starts(added)
    for i, (first, n) in enumerate(zip(cache.lengths, added, strict=True)):
        rows = cache.rows(i, first, first + n)
        own = [x.reshape(-1, *x.shape[-2:])[ends[i] : ends[i] + n] for x in (k, v)]
        at = first + torch.arange(n)
        right = rotated(own[0].double(), cos.double(), sin.double(), at, interleaved)
        most, least = LARGEST[k.dtype], LARGEST[k.dtype] + (k.dtype == torch.int8)
        right = right.clamp(-least, most)
        step = 0.5 if k.dtype == torch.int8 else right.abs() / 16 + 2.0**-10
        step = step + right.abs() * 2.0**-11  # float16 in between
        assert ((caches[0].cpu()[rows].double() - right).abs() <= 1.001 * step).all()
        found = caches[1].cpu()[rows].float()
        assert torch.equal(found.nan_to_num(nan=999), own[1].float().nan_to_num(nan=999))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_rotates_queries_of_8_bits(device, causal):
    """As FlashAttention-3 takes them: rounded again, with tables of 8 bits, and at the positions of
    their keys if they are not all at one."""
    skip_unless_built(device)
    chance = random.Random(2)
    cache = random_cache(chance, device, E4M3, [40, 0, 17], 16, 2, [64, 64], 3)
    k, v = torch.randn(2, 3, 3, 2, 64, device=device).to(E4M3)
    q = torch.randn(3, 3, 4, 64, device=device).to(E4M3)
    cos, sin = (x.to(device) for x in tables(chance, 16, E4M3, 64))
    descale = 0.5 + torch.rand(3, 2, device=device)
    given = {"causal": causal, "k_descale": descale, "v_descale": descale, **cache.places}
    caches = (cache.k_cache, cache.v_cache)
    turned = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": False}
    lengths = cache.seqlens()
    out = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, **turned, **given)
    wide = [x.double() for x in (cos.cpu().float(), sin.cpu().float())]
    for i, first in enumerate(cache.lengths):
        at = first + torch.arange(3) * causal
        q[i] = rotated(q[i].cpu().double(), *wide, at, False).to(q.dtype).to(device)
        at = first + torch.arange(3)
        right = rotated(k[i].cpu().double(), *wide, at, False)
        found = cache.k_cache.cpu()[tuple(x.cpu() for x in cache.rows(i, first, first + 3))]
        assert ((found.double() - right).abs() <= right.abs() / 15 + 2.0**-10).all()
    right = flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths + 3, **given)
    assert out.dtype == torch.bfloat16 and out.any()
    assert ((out - right).abs() <= 0.02 * right.abs() + 0.02).all()  # a query at a tie's other side


@pytest.mark.parametrize("q_dtype", [torch.bfloat16, E4M3])
@pytest.mark.parametrize("dtype", CACHES)
def test_attention_to_rows_that_are_stored(device, dtype, q_dtype):
    """As if they had been in the cache before."""
    skip_unless_built(device)
    chance = random.Random(1)
    cache = random_cache(chance, device, dtype, [40, 0, 17], 16, 2, [64, 64], 2)
    k, v = (x.to(dtype) for x in 20 * torch.randn(2, 3, 2, 2, 64, device=device))
    q = torch.randn(3, 2, 4, 64, device=device).to(q_dtype)
    descale = 0.01 + torch.rand(3, 2, device=device) / 20
    given = {"causal": True, "k_descale": descale, "v_descale": descale, **cache.places}
    caches = (cache.k_cache, cache.v_cache)
    out = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=cache.seqlens(), **given)
    for i, first in enumerate(cache.lengths):
        rows = cache.rows(i, first, first + 2)
        for x, new in zip(caches, (k, v), strict=True):
            assert torch.equal(x[rows].view(torch.uint8), new[i].view(torch.uint8))
    right = flash_attn_with_kvcache(q, *caches, cache_seqlens=cache.seqlens() + 2, **given)
    assert out.dtype == torch.bfloat16 and out.any() and torch.equal(out, right)


def test_stored_rows_in_a_graph():
    cache, k, v, _, options = random_stored(0)
    lengths = cache.seqlens()

    def step(k_cache, v_cache, k, v):
        return append_kv(k_cache, v_cache, k, v, lengths, **options)

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        caches = [cache.k_cache.clone(), cache.v_cache.clone()]
        found.append([run(*caches, k, v), *(x.view(torch.uint8) for x in caches)])
    assert all(map(torch.equal, *found))


REFUSED = {
    "rotary and scales": (
        dict(zip(("rotary_cos", "rotary_sin", "k_scales"), torch.ones(3, 5, 16, 2), strict=True)),
        ValueError,
        "rotary_cos is given, must be left out for k of torch.float8_e4m3fn, which is stored as",
    ),
    "rotary and a descale of another shape": (
        {
            "rotary_cos": torch.ones(64, 16),
            "rotary_sin": torch.ones(64, 16),
            "k_descale": torch.ones(3, 3),
        },
        ValueError,
        "k_descale has shape (3, 3), must be (batch, key heads) = (2, 2)",
    ),
    "one rotary table": (
        {"rotary_cos": torch.ones(64, 16)},
        ValueError,
        "rotary_cos and rotary_sin must both be given, or neither",
    ),
    "scales": ({"v_scales": torch.ones(5, 16, 2)}, ValueError, "v_scales is given, must be left "),
    "rotation": ({"incoherent": True}, ValueError, "incoherent is given, must be left out for k "),
    "v of another dtype": (
        {"v": torch.ones(2, 4, 2, 64).bfloat16()},
        TypeError,
        "v has dtype torch.bfloat16, must be torch.float8_e4m3fn like k",
    ),
    "a cache of int8": (
        {"k_cache": torch.ones(5, 16, 2, 64).to(torch.int8)},
        TypeError,
        "k has dtype torch.float8_e4m3fn, must be wider or torch.int8 like k_cache",
    ),
    "a cache of 16 bits": (
        {"k_cache": torch.ones(5, 16, 2, 64).bfloat16()},
        TypeError,
        "k has dtype torch.float8_e4m3fn, must be torch.bfloat16 like k_cache",
    ),
    "an odd stride": (
        {"k": torch.ones(2, 4, 2, 65).to(E4M3)[..., :64]},
        ValueError,
        "k has strides (520, 130, 65, 1) and offset 0, must be multiples of 2 for k of",
    ),
    "an odd offset": (
        {"v": torch.ones(2, 4, 2, 66).to(E4M3)[..., 1:65]},
        ValueError,
        "v has strides (528, 132, 66, 1) and offset 1, must be multiples of 2 for k of",
    ),
}


@pytest.mark.parametrize("bad", REFUSED)
def test_stored_rows_are_refused(bad):
    changes, error, message = REFUSED[bad]
    k_cache, v_cache = torch.zeros(2, 5, 16, 2, 64).to(E4M3)
    k, v = torch.ones(2, 2, 4, 2, 64).to(E4M3)
    call = {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": k,
        "v": v,
        "cache_seqlens": torch.tensor([20, 3], dtype=torch.int32),
        "page_table": torch.tensor([[0, 1], [3, 2]], dtype=torch.int32),
    }
    assert append_kv(**call).tolist() == [24, 7]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        append_kv(**{**call, **changes})
