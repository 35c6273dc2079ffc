"""Packed sequences and windows on a GPU: what only kernels can do wrong."""

import dataclasses
import math
import random

import pytest
import torch
from packed import Packed, assert_packed_right, random_packed, starts
from parity import assert_right, check, random_qkv, run, skip_unless_answered

from cute_kernels import flash_attn_func, flash_attn_varlen_func, tile_configs
from cute_kernels.operators import flash_attn_varlen_forward

ROWS = [
    pytest.param(row, id=row["name"])
    for row in tile_configs("forward")
    if row["any_call"] and row["dtype"] == "bf16" and not row["softcap"]
]


def packed_on(device, slots_q, slots_k=None, head_dims=(64, 64), heads=(4, 2), **options):
    skip_unless_answered(device, torch.bfloat16, *head_dims)
    slots_k = slots_q if slots_k is None else slots_k
    chance = random.Random(len(slots_q))
    return random_packed(
        chance, device, torch.bfloat16, slots_q, slots_k, head_dims, heads, **options
    )


@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (127, 0), (300, 60), (0, 0)], ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_table(hopper, row, window_size):
    """Packed and dense, lengths around the row's tiles."""
    head_dims = row["head_dim"], row["head_dim_v"]
    m, n = row["tile_m"], row["tile_n"]
    slots_q = [1, m - 1, m, m + 1, 0, 63, 2 * m + 65, 64]
    slots_k = [n, n + 1, 1, 5 * n - 1, 7, 0, 900, 64]
    packed = packed_on(hopper, slots_q, slots_k, head_dims, used=True, tail=3)
    options = {"window_size": window_size, "tile_config": row["name"]}
    results = packed.spoilt(math.nan).run(**options)
    assert_packed_right(results, packed, window_size=window_size)
    for seqlen_q, seqlen_k in [(m + 1, 5 * n - 1), (700, 300), (300, 900)]:
        q, k, _ = random_qkv(hopper, torch.bfloat16, 2, seqlen_q, seqlen_k, 4, 2, head_dims[0])
        _, _, v = random_qkv(hopper, torch.bfloat16, 2, seqlen_q, seqlen_k, 4, 2, head_dims[1])
        check(q, k, v, **options)


def test_many_short_sequences(hopper):
    chance = random.Random(1)
    packed = packed_on(hopper, [chance.randint(0, 40) for _ in range(3000)], heads=(2, 1))
    assert_packed_right(packed.run(causal=True), packed, causal=True)


def test_one_long_sequence_among_short_ones(hopper):
    packed = packed_on(hopper, [5, 17, 9000, 1, 0, 130, 64], heads=(8, 1))
    for options in ({"causal": True}, {"window_size": (1000, 0)}, {}):
        assert_packed_right(packed.run(**options), packed, **options)


@pytest.mark.parametrize("window_size", [(127, 0), (4095, 0), (1023, 1023)], ids=str)
def test_windows_of_long_sequences(hopper, window_size):
    skip_unless_answered(hopper, torch.bfloat16)
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 9000, 9000, 4, 1)
    out, lse = run(q, k, v, window_size=window_size)
    part = slice(8000, 9000)
    inputs = (q[:, part], k, v, q.shape[-1] ** -0.5)
    left, right = window_size
    mask = {"window_size": (left, right), "diagonal": 8000}
    assert_right(out[:, part], lse[:, :, part], *inputs, False, **mask)


def test_lengths_may_change_under_a_captured_graph(hopper):
    packed = packed_on(hopper, [100, 200, 300], tail=50)
    lengths = packed.lengths()
    used = torch.tensor([100, 200, 300], dtype=torch.int32, device=hopper)
    lengths["seqused_k"] = used

    def call():
        return flash_attn_varlen_func(*packed.qkv, **lengths, causal=True, return_lse=True)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for slots, used_k in [([100, 200, 300], [3, 200, 77]), ([0, 640, 10], [0, 640, 9])]:
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            lengths[name].copy_(torch.tensor(starts(slots), dtype=torch.int32))
        used.copy_(torch.tensor(used_k, dtype=torch.int32))
        graph.replay()
        now = dataclasses.replace(packed, slots_q=slots, slots_k=slots, used_k=used_k)
        assert_packed_right(results, now, causal=True)


@pytest.mark.parametrize("captured", [False, True])
def test_what_the_kernel_before_writes(hopper, captured):
    """Kernels start early, and read lengths, queries, keys and values only when these are there:
    each call's are written just before it, over those that the last one has read."""
    chance = random.Random(4)
    calls = []
    for _ in range(30):
        ends = sorted(chance.randint(0, 4000) for _ in range(7))
        slots = [b - a for a, b in zip([0, *ends], [*ends, 4000], strict=True)]
        packed = packed_on(hopper, slots, head_dims=(128, 128))
        q, k, v = (x.roll(len(calls), 0) for x in packed.qkv)
        calls.append(dataclasses.replace(packed, q=q, k=k, v=v))
    right = [packed.run(causal=True) for packed in calls]
    qkv = [torch.empty_like(x) for x in calls[0].qkv]
    lengths = [torch.tensor(starts(c.slots_q), dtype=torch.int32, device=hopper) for c in calls]
    at = torch.empty_like(lengths[0])

    def run_all():
        results = []
        for packed, own in zip(calls, lengths, strict=True):
            for to, x in zip((*qkv, at), (*packed.qkv, own), strict=True):
                torch.add(x, 0, out=to)
            results.append(flash_attn_varlen_func(*qkv, at, at, causal=True, return_lse=True))
        return results

    run_all()
    torch.cuda.synchronize()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run_all()
        graph.replay()
    else:
        results = run_all()
    for (out, lse), (right_out, right_lse) in zip(results, right, strict=True):
        assert torch.equal(out, right_out)
        assert torch.equal(lse, right_lse)


def test_the_same_bits_each_time(hopper):
    packed = packed_on(hopper, [700, 3, 0, 1300, 64, 200], head_dims=(64, 64), tail=9)
    results = [packed.run(window_size=(200, 0)) for _ in range(50)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_a_nan_that_a_window_shows_is_in_the_output(hopper):
    """At both of its ends, where V goes through the guard."""
    skip_unless_answered(hopper, torch.bfloat16)
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 600, 600, 2, 1)
    for token in (0, 127, 128, 300, 599):
        wild = v.clone()
        wild[:, token, :, 5] = math.inf
        out = flash_attn_func(q, k, wild, window_size=(150, 20))
        right = flash_attn_func(q, k, v, window_size=(150, 20))
        query = torch.arange(600, device=hopper)
        sees = (query >= token - 20) & (query <= token + 150)
        assert (out[0, sees, :, 5] == math.inf).all()
        assert torch.equal(out[0, ~sees], right[0, ~sees])
        others = [channel for channel in range(64) if channel != 5]
        assert torch.equal(out[..., others], right[..., others])


def test_other_streams_and_devices_memory(hopper):
    """Behind a kernel that is still writing lengths, on a stream of one's own."""
    packed = packed_on(hopper, [500, 20, 300])
    lengths = packed.lengths()
    right = packed.run(causal=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            final = lengths[name].clone()
            lengths[name].zero_()
            torch.cuda._sleep(10**7)
            lengths[name].copy_(final)
        results = flash_attn_varlen_func(*packed.qkv, **lengths, causal=True, return_lse=True)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, right, strict=True))


def test_gaps_between_sequences(hopper):
    """As in a padded batch that is seen as packed."""
    lengths = [150, 3, 0, 256]
    packed = packed_on(hopper, [256] * 4)
    packed = dataclasses.replace(packed, used_q=lengths, used_k=lengths)
    results = packed.spoilt(math.inf).run(causal=True)
    assert_packed_right(results, packed, causal=True)


def test_diagonals_of_sequences(hopper):
    packed = packed_on(hopper, [300, 40, 129], [200, 90, 700])
    diagonal = [-150, 70, 300]
    lengths = (*packed.lengths().values(), packed.q.new_tensor(diagonal, dtype=torch.int32))
    for causal, left, right in [(True, None, None), (False, 100, 30), (False, None, 60)]:
        results = flash_attn_varlen_forward(
            *packed.qkv, *lengths, 0.2, causal, window_left=left, window_right=right
        )
        window_size = tuple(-1 if n is None else n for n in (left, right))
        mask = {"causal": causal, "window_size": window_size, "diagonal": diagonal}
        assert_packed_right(results, packed, softmax_scale=0.2, **mask)


@pytest.mark.filterwarnings("ignore:cute_kernels. . is copied in full")
def test_strides_that_tma_cannot_read_are_copied(hopper):
    packed = packed_on(hopper, [100, 60], heads=(2, 1))
    odd = [torch.cat([x, x[..., :4]], -1)[..., :64] for x in packed.qkv]
    results = Packed(*odd, [100, 60], [100, 60]).run(causal=True)
    assert_packed_right(results, packed, causal=True)
