"""Which rows of a page table sequences have, and which rows of q they use."""

import math
import random
from dataclasses import replace

import pytest
import torch
from caches import (
    assert_attention_right,
    attend,
    random_cache,
    random_problem,
    random_queries,
    skip_unless_attended,
)
from eight_bits import Exact, skip_unless_built
from packed import starts

from cute_kernels import append_kv, flash_attn_varlen_func

LENGTHS = [70, 0, 33, 1]


def with_rows_elsewhere(chance, cache):
    """The places of a cache whose table has rows of others, too, in another order."""
    table = cache.places["page_table"]
    batch = len(table)
    rows = chance.sample(range(batch + 3), batch)
    whole = table.new_full((batch + 3, table.shape[1]), 2**31 - 1)
    whole[rows] = table
    index = torch.tensor(rows, dtype=torch.int32, device=table.device)
    return {**cache.places, "page_table": whole, "cache_batch_idx": index}


@pytest.mark.parametrize("seed", range(12))
def test_rows_of_the_table_are_chosen(device, seed):
    dtype = [torch.bfloat16, torch.float16][seed % 2]
    chance, cache, q, cu_seqlens_q, options = random_problem(100 + seed, device, dtype)
    if "page_table" not in cache.places:
        cache = random_cache(chance, device, dtype, LENGTHS, 16, 2, [64, 64])
        q, cu_seqlens_q = random_queries(chance, device, dtype, [1, 2, 5, 0], 4, 64)
        options = {}
    skip_unless_attended(device, dtype, (q.shape[2], cache.v_cache.shape[3]))
    right = attend(q, cu_seqlens_q, cache, **options)
    cache.places = with_rows_elsewhere(chance, cache)
    out, lse = attend(q, cu_seqlens_q, cache, **options)
    assert torch.equal(out, right[0]) and torch.equal(lse, right[1])


def test_rows_are_appended_through_chosen_rows(device):
    chance = random.Random(0)
    skip_unless_attended(device, torch.bfloat16, (64, 64))
    cache = random_cache(chance, device, torch.bfloat16, LENGTHS, 16, 2, [64, 64], room=3)
    k, v = torch.randn(2, 4, 3, 2, 64, device=device).bfloat16()
    copies = [cache.k_cache.clone(), cache.v_cache.clone()]
    after = append_kv(*copies, k, v, cache.seqlens(), **cache.places)
    table, lengths = cache.places["page_table"], cache.seqlens()
    cache.places = with_rows_elsewhere(chance, cache)
    q, ends = random_queries(chance, device, torch.bfloat16, [3] * 4, 4, 64)
    out, lse = attend(q.view(4, 3, 4, 64), None, cache, k=k, v=v, causal=True)
    for found, right in zip((cache.k_cache, cache.v_cache), copies, strict=True):
        assert torch.equal(found.view(torch.int16), right.view(torch.int16))
    assert torch.equal(append_kv(*copies, k, v, lengths, **cache.places), after)
    rows = [torch.arange(n, device=device) for n in after.tolist()]
    places = [(table[i, at // 16].long(), at % 16) for i, at in enumerate(rows)]
    keys, values = ([x[place] for place in places] for x in copies)
    lse = lse.transpose(0, 1).reshape(4, 12)
    assert_attention_right(out.flatten(0, 1), lse, q, ends, keys, values, causal=True)


def test_a_row_that_is_not_there(device):
    """An error on the CPU; on a GPU nothing is read and nothing written."""
    skip_unless_attended(device, torch.bfloat16, (64, 64))
    chance = random.Random(0)
    cache = random_cache(chance, device, torch.bfloat16, LENGTHS, 16, 2, [64, 64], room=3)
    rows = torch.tensor([0, 4, 2, -1], dtype=torch.int32, device=device)
    places = {**cache.places, "cache_batch_idx": rows}
    new = torch.randn(2, 4, 3, 2, 64, device=device).bfloat16()
    before = cache.k_cache.clone()
    if device == "cpu":
        message = r"^cache_batch_idx\[1\] is 4, must be from 0 to below 4, page_table's batch$"
        with pytest.raises(ValueError, match=message):
            append_kv(cache.k_cache, cache.v_cache, *new, cache.seqlens(), **places)
        too_few = {**cache.places, "cache_batch_idx": rows[:1]}
        with pytest.raises(ValueError, match=r"^cache_batch_idx has shape \(1,\), must be"):
            append_kv(cache.k_cache, cache.v_cache, *new, cache.seqlens(), **too_few)
        assert torch.equal(before.view(torch.int16), cache.k_cache.view(torch.int16))
        return
    append_kv(cache.k_cache, cache.v_cache, *new, cache.seqlens(), **places)
    for i in (0, 2):
        before[cache.rows(i, LENGTHS[i], LENGTHS[i] + 3)] = new[0, i]
    assert torch.equal(before.view(torch.int16), cache.k_cache.view(torch.int16))


def test_no_rows_for_no_sequences():
    table = torch.zeros(0, 3, dtype=torch.int32)
    caches = torch.ones(2, 5, 16, 2, 64).bfloat16()
    new = torch.ones(2, 0, 3, 2, 64).bfloat16()
    index = torch.zeros(0, dtype=torch.int32)
    after = append_kv(*caches, *new, index, page_table=table, cache_batch_idx=index)
    assert after.shape == (0,)


SLOTS = [5, 3, 0, 40, 1]
USED = [2, 3, 0, 37, 0]
KEYS = [70, 1, 9, 50, 20]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (6, 0)},
        {"attention_chunk": 16, "causal": True},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "causal": True},
    ],
)
def test_used_rows_of_slots(device, options):
    """Rows that are not used may be NaN; their results are 0 and -inf."""
    skip_unless_attended(device, torch.bfloat16, (64, 64))
    chance = random.Random(1)
    cache = random_cache(chance, device, torch.bfloat16, KEYS, 16, 2, [64, 64])
    q, cu_seqlens_q = random_queries(chance, device, torch.bfloat16, [*SLOTS, 4], 4, 64)
    cu_seqlens_q = cu_seqlens_q[:-1]
    options = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    first = cu_seqlens_q.tolist()[:-1]
    used = torch.zeros(len(q), dtype=torch.bool, device=device)
    for start, count in zip(first, USED, strict=True):
        used[start : start + count] = True
    q[~used] = math.nan

    def call(seqused_q, **changed):
        return flash_attn_varlen_func(
            q,
            cache.k_cache,
            cache.v_cache,
            cu_seqlens_q,
            seqused_q=seqused_q,
            seqused_k=cache.seqlens(),
            return_lse=True,
            **cache.places,
            **{**options, **changed},
        )

    seqused_q = torch.tensor(USED, dtype=torch.int32, device=device)
    for longest in (None, max(USED)):
        out, lse = call(seqused_q, max_seqlen_q=longest)
        assert not out[~used].any() and (lse[:, ~used] == -math.inf).all()
        ends = torch.tensor(starts(USED))
        packed = (out[used], lse[:, used], q[used], ends)
        assert_attention_right(*packed, cache.k, cache.v, **options)


def test_used_rows_with_descales(device):
    """Factors are of sequences, whichever rows these use."""
    skip_unless_built(device, (64, 64))
    chance = random.Random(2)
    cache = random_cache(chance, device, torch.float8_e4m3fn, KEYS, 16, 2, [64, 64])
    q, cu_seqlens_q = random_queries(chance, device, torch.bfloat16, SLOTS, 4, 64)
    descale = torch.linspace(0.5, 2.0, 10, device=device).view(5, 2)
    out, lse = flash_attn_varlen_func(
        q,
        cache.k_cache,
        cache.v_cache,
        cu_seqlens_q,
        seqused_q=torch.tensor(USED, dtype=torch.int32, device=device),
        seqused_k=cache.seqlens(),
        k_descale=descale,
        v_descale=descale[:1].expand(5, 2),
        causal=True,
        return_lse=True,
        **cache.places,
    )
    wide = descale.double()[..., None]
    for i, (start, count) in enumerate(zip(cu_seqlens_q.tolist()[:-1], USED, strict=True)):
        rows = slice(start, start + count)
        keys, values = cache.k[i].double() * wide[i], cache.v[i].double() * wide[0]
        exact = Exact(q[rows].double(), keys, values, 64**-0.5, torch.bfloat16, causal=True)
        exact.assert_right(out[None, rows], lse[None, :, rows])
        assert not out[start + count : start + SLOTS[i]].any()


def test_both_in_one_graph():
    """Nothing asks for what tensors hold."""
    chance = random.Random(3)
    cache = random_cache(chance, "cpu", torch.bfloat16, KEYS, 16, 2, [64, 64])
    q, cu_seqlens_q = random_queries(chance, "cpu", torch.bfloat16, SLOTS, 4, 64)
    used, lengths = torch.tensor(USED, dtype=torch.int32), cache.seqlens()
    places = with_rows_elsewhere(chance, cache)
    elsewhere = replace(cache, places=places)

    def call(q, used):
        of_slots = flash_attn_varlen_func(
            q,
            cache.k_cache,
            cache.v_cache,
            cu_seqlens_q,
            seqused_q=used,
            seqused_k=lengths,
            **cache.places,
        )
        chosen, _ = attend(q, cu_seqlens_q, elsewhere)
        return of_slots, chosen

    inputs = (q, used)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    for found, right in zip(compiled, call(*inputs), strict=True):
        assert torch.equal(found, right)
