"""Caches of keys and values, with or without pages, and what is right of attention to them."""

import dataclasses
import math
import random

import pytest
import torch
from oracle import NO_WINDOW
from packed import starts
from parity import DTYPES, assert_right

from cute_kernels import flash_attn_with_kvcache, tile_configs

PAGE_SIZES = [None, 1, 16, 64, 100]  # None: no pages


@dataclasses.dataclass
class Cache:
    """Keys and values of sequences, and the same in a cache; what else it holds is NaN."""

    k: list  # (rows, key heads, head_dim) of each sequence, from its leftpad on
    v: list
    leftpad: list | None
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    places: dict  # page_table, cache_batch_idx and cache_leftpad as keyword arguments

    @property
    def lengths(self):
        pads = self.leftpad or [0] * len(self.k)
        return [pad + len(k) for pad, k in zip(pads, self.k, strict=True)]

    def seqlens(self):
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.k_cache.device)

    def rows(self, sequence, first, last):
        """Index of a sequence's rows in the caches."""
        rows = torch.arange(first, last, device=self.k_cache.device)
        table, index = self.places.get("page_table"), self.places.get("cache_batch_idx")
        if table is not None:
            size = self.k_cache.shape[1]
            return table[sequence, rows // size].long(), rows % size
        entry = sequence if index is None else int(index[sequence])
        return torch.full_like(rows, entry), rows


def empty_caches(chance, device, dtype, shape, head_dims):
    """NaN, in one of the layouts that caches have: (pages, rows, heads, head_dim)."""
    pages, rows, heads = shape
    whole = sum(head_dims)
    layout = chance.choice(["dense", "heads first", "interleaved", "heads first, interleaved"])

    def nan(*sizes):
        wrong = math.nan if dtype.is_floating_point else 99
        return torch.full(sizes, wrong, dtype=dtype, device=device)

    if layout == "dense":
        return [nan(*shape, head_dim) for head_dim in head_dims]
    if layout == "heads first":
        return [nan(pages, heads, rows, head_dim).transpose(1, 2) for head_dim in head_dims]
    if layout == "interleaved":
        caches = nan(*shape, whole).split(head_dims, -1)
    else:
        caches = nan(pages, heads, rows, whole).transpose(1, 2).split(head_dims, -1)
    if heads == 1 and chance.random() < 0.5:  # a stride that nobody should read
        sizes = [(*shape, head_dim) for head_dim in head_dims]
        odd = [(*x.stride()[:2], 1, 1) for x in caches]
        caches = [x.as_strided(n, s) for x, n, s in zip(caches, sizes, odd, strict=True)]
    return list(caches)


def random_cache(
    chance,
    device,
    dtype,
    lengths,
    page_size,
    key_heads,
    head_dims,
    room=0,
    leftpad=False,
    batch_idx=False,
):
    """Caches of N(0, 1), of int8 of N(0, 1600); `room`: rows that sequences may get beyond what
    they have."""
    generator = torch.Generator(device).manual_seed(chance.randrange(2**31))

    def normal(rows, head_dim):
        shape = (rows, key_heads, head_dim)
        numbers = torch.randn(shape, generator=generator, device=device)
        if not dtype.is_floating_point:
            numbers = (40 * numbers).round().clamp(-128, 127)
        return numbers.to(dtype)

    batch, most = len(lengths), max(lengths, default=0) + room + 1
    k, v = ([normal(n, head_dim) for n in lengths] for head_dim in head_dims)
    pads, places = None, {}
    if leftpad:
        pads = [chance.randint(0, 9) for _ in lengths]
        if page_size is not None:  # whole pages, too
            pads = [pad + chance.choice([0, page_size]) for pad in pads]
        places["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32, device=device)
        most += max(pads, default=0)
    if page_size is None:
        entries = batch + (2 if batch_idx else 0)
        if batch_idx:
            chosen = chance.sample(range(entries), batch)
            places["cache_batch_idx"] = torch.tensor(chosen, dtype=torch.int32, device=device)
        shape = (entries, most, key_heads)
    else:
        of_sequence = -(-most // page_size)
        firsts = [pad // page_size for pad in pads or [0] * batch]
        ends = [n + pad + room for n, pad in zip(lengths, pads or [0] * batch, strict=True)]
        used = [range(a, -(-b // page_size)) for a, b in zip(firsts, ends, strict=True)]
        pages = sum(map(len, used)) + 2
        chosen = iter(chance.sample(range(pages), pages))
        # What is not needed is wrong in every way.
        table = [
            [
                next(chosen) if j in own else chance.choice([-1, pages, 2**31 - 1, -(2**31)])
                for j in range(of_sequence)
            ]
            for own in used
        ]
        table = torch.tensor(table, dtype=torch.int32, device=device).view(batch, of_sequence)
        if chance.random() < 0.5:  # a part of a larger one
            table = torch.cat([table, table + 7], 1)[:, :of_sequence]
        places["page_table"] = table
        shape = (pages, page_size, key_heads)
    cache = Cache(k, v, pads, *empty_caches(chance, device, dtype, shape, head_dims), places)
    for i, last in enumerate(cache.lengths):
        rows = cache.rows(i, last - len(k[i]), last)
        cache.k_cache[rows], cache.v_cache[rows] = k[i], v[i]
    return cache


def random_queries(chance, device, dtype, lengths, heads, head_dim):
    """Packed, and cu_seqlens_q."""
    generator = torch.Generator(device).manual_seed(chance.randrange(2**31))
    shape = (sum(lengths), heads, head_dim)
    q = torch.randn(shape, generator=generator, device=device).to(dtype)
    return q, torch.tensor(starts(lengths), dtype=torch.int32, device=device)


def rotated(x, cos, sin, positions, interleaved):
    """(rows, heads, head_dim), rotated: in fp32 (fp64), rounded once."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    pairs = cos.shape[1]
    turned, plain = wide[..., : 2 * pairs], wide[..., 2 * pairs :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    c, s = (table[positions].to(wide.dtype)[:, None] for table in (cos, sin))
    a, b = a * c - b * s, a * s + b * c
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned, plain], -1).to(x.dtype)


def assert_attention_right(
    out,
    lse,
    q,
    cu_seqlens_q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    window_size=NO_WINDOW,
    sinks=None,
    softcap=0.0,
    attention_chunk=0,
):
    """Packed results, against the definition in fp64 of each sequence, row by row."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    ends = cu_seqlens_q.tolist()
    assert out.shape == (*q.shape[:2], v[0].shape[2] if v else out.shape[2])
    assert out.dtype == q.dtype
    assert lse.shape == (q.shape[1], q.shape[0])
    for first, last, keys, values in zip(ends[:-1], ends[1:], k, v, strict=True):
        of_sequence = slice(first, last)
        assert_right(
            out[None, of_sequence],
            lse[None, :, of_sequence],
            q[None, of_sequence],
            keys[None],
            values[None],
            scale,
            causal,
            window_size=window_size,
            sinks=sinks,
            softcap=softcap,
            attention_chunk=attention_chunk,
        )
    assert not out[ends[-1] :].any()


def attend(q, cu_seqlens_q, cache, cache_seqlens=None, **options):
    """Output and LSE of a packed call; `cache_seqlens` are the cache's if None."""
    return flash_attn_with_kvcache(
        q,
        cache.k_cache,
        cache.v_cache,
        cache_seqlens=cache.seqlens() if cache_seqlens is None else cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        return_softmax_lse=True,
        **cache.places,
        **options,
    )


def skip_unless_attended(device, dtype, head_dims):
    """Builds may hold only some rows for caches, and none for wider dtypes."""
    if device == "cuda" and not any(
        DTYPES[row["dtype"]] == dtype and row["head_dim"] >= max(head_dims)
        for row in tile_configs("decode")
    ):
        pytest.skip(f"this build has no decode kernel for {dtype} and head dims {head_dims}")


def random_lengths(chance, batch, most):
    return [chance.choice([0, 1, chance.randint(2, 30), chance.randint(2, most)]) for _ in batch]


def random_problem(seed, device, dtype, most=400, head_dims=None, room=0):
    """A cache, queries, cu_seqlens_q and options of a call."""
    chance = random.Random(seed)
    batch = range(chance.randint(1, 5))
    page_size = chance.choice(PAGE_SIZES)
    key_heads, group = chance.choice([1, 1, 2, 3]), chance.choice([1, 2, 4, 8])
    if head_dims is None:
        head_dims = chance.choice([(64, 64), (64, 64), (128, 128), (96, 96), (192, 128), (16, 40)])
    cache = random_cache(
        chance,
        device,
        dtype,
        random_lengths(chance, batch, most),
        page_size,
        key_heads,
        list(head_dims),
        room,
        leftpad=chance.random() < 0.5,
        batch_idx=chance.random() < 0.5,
    )
    queries = [chance.choice([1, 1, chance.randint(0, 16)]) for _ in batch]
    q, cu_seqlens_q = random_queries(
        chance, device, dtype, queries, key_heads * group, head_dims[0]
    )
    options = {
        "causal": chance.random() < 0.5,
        "softmax_scale": chance.choice([None, 0.05, 0.4]),
        "window_size": chance.choice([(-1, -1), (-1, -1), (chance.randint(0, 60), 0), (5, 2)]),
    }
    options["softcap"] = chance.choice([0.0, 0.0, 0.7, 30.0])
    options["attention_chunk"] = chance.choice([0, 0, 0, 1, 37, 64, 10**6])
    if chance.random() < 0.4:
        generator = torch.Generator(device).manual_seed(seed)
        options["sinks"] = 3 * torch.randn(q.shape[1], generator=generator, device=device)
        if chance.random() < 0.3:
            options["sinks"][0] = -math.inf
    return chance, cache, q, cu_seqlens_q, options
