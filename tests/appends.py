"""Rows that are written to caches."""

import torch
from caches import PAGE_SIZES, random_cache, random_queries
from packed import starts


def like(x, device):
    """On another device, with the same strides and storage."""
    whole = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype)
    whole.copy_(torch.as_strided(x, whole.shape, (1,), 0))
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def tables(chance, pairs, dtype, positions=3000):
    angles = torch.outer(torch.arange(positions), 0.9 ** torch.arange(pairs)).double()
    whole = torch.cat([angles.cos(), angles.sin()], 1).to(dtype)
    cos, sin = whole.chunk(2, 1)
    return (cos, sin) if chance.random() < 0.5 else (cos.contiguous(), sin.contiguous())


def new_rows(chance, dtype, lengths, heads, head_dim, dense):
    """Packed or (batch, seqlen), in one of the layouts that they have: dense, heads first, a part
    of a wider tensor, or one that no vector can read."""
    x, _ = random_queries(chance, "cpu", dtype, lengths, heads, head_dim)
    if dense:
        x = x.unflatten(0, (len(lengths), lengths[0]))
    kind = chance.choice(["dense", "heads first", "wide", "odd"])
    if kind == "heads first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if kind == "wide":
        return torch.cat([x, x], -2)[..., heads:, :]
    if kind == "odd":
        return torch.cat([x, x[..., :1]], -1)[..., :-1]
    return x


def random_append(chance, dtype, cache_dtype, longest, smallest_v):
    """A cache on the CPU, new rows of k and v, how many of each sequence, and keyword arguments of
    append_kv that say where they go. `smallest_v`: V's head dim beside keys of 16."""
    batch, dense = chance.randint(1, 6), chance.random() < 0.5
    lengths = [chance.choice([0, 1, 40, longest]) for _ in range(batch)]
    added = [chance.choice([1, 1, 7])] * batch
    if not dense:
        added = [chance.choice([0, 1, 16, longest // 2]) for _ in range(batch)]
    heads = chance.choice([1, 2, 8])
    head_dims = chance.choice(
        [[64, 64], [128, 128], [96, 96], [192, 128], [16, smallest_v], [256, 256]]
    )
    page_size = chance.choice(PAGE_SIZES)
    batch_idx = chance.random() < 0.5
    where = (lengths, page_size, heads, head_dims, max(added))
    cache = random_cache(chance, "cpu", cache_dtype, *where, batch_idx=batch_idx)
    k, v = (new_rows(chance, dtype, added, heads, head_dim, dense) for head_dim in head_dims)
    options = dict(cache.places)
    if not dense:
        options["cu_seqlens_k_new"] = torch.tensor(starts(added), dtype=torch.int32)
    return cache, k, v, added, options
