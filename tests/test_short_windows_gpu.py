"""Kernels for short windows (rows with `grouped`), called by name, against the oracle."""

import dataclasses
import math
import random

import pytest
import torch
from packed import assert_packed_right, random_packed, starts
from parity import DTYPES, assert_right, check, random_qkv, run, widest_window
from test_hidden import HUGE, WILD
from test_sinks import some_sinks

from cute_kernels import flash_attn_func, flash_attn_varlen_func, tile_configs

ROWS = [pytest.param(row, id=row["name"]) for row in tile_configs("forward") if row["grouped"]]
WINDOWS = [(0, 0), (127, 0), (0, 5), (60, 60), (3, 90), (100, 20)]


def random_window(chance, row, group):
    """window_size, from one key to all that the row takes."""
    most = widest_window(row, group)
    window = chance.choice([most, most, 1, 2, chance.randint(3, most), min(most, 128)])
    right = chance.choice([0, 0, window - 1, chance.randrange(window)])
    return window - 1 - right, right


def groups(row):
    return [group for group in (4, 8, 16, 32, 64) if widest_window(row, group) > 0]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("row", ROWS)
def test_packed_calls(hopper, row, seed):
    """Lengths around those of tiles, unused tokens of NaN, sinks."""
    chance = random.Random(seed)
    group = chance.choice(groups(row))
    heads_kv = chance.randint(1, 3)
    tokens = row["tile_m"] // group
    lengths = [0, 1, 2, tokens - 1, tokens, tokens + 1, 2 * tokens + 3, 300, chance.randint(3, 700)]
    slots_q = chance.sample(lengths, 7)
    slots_k = slots_q if chance.random() < 0.4 else [chance.choice(lengths) for _ in slots_q]
    head_dims = chance.choice([(64, 64), (64, 64), (48, 64), (64, 40)])
    heads = group * heads_kv, heads_kv
    used = chance.random() < 0.7
    packed = random_packed(
        chance, hopper, DTYPES[row["dtype"]], slots_q, slots_k, head_dims, heads, used, tail=5
    )
    window_size = random_window(chance, row, group)
    sinks = some_sinks(heads[0], hopper, seed=seed) if chance.random() < 0.5 else None
    spoilt = packed.spoilt(chance.choice([math.nan, math.inf, 0.0]))
    results = spoilt.run(window_size=window_size, sinks=sinks, tile_config=row["name"])
    assert_packed_right(results, packed, window_size=window_size, sinks=sinks)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("row", ROWS)
def test_dense_calls(hopper, row, seed):
    chance = random.Random(seed)
    group = chance.choice(groups(row))
    sizes = chance.randint(1, 3), chance.choice([1, 65, 300, 511]), chance.choice([0, 64, 300, 777])
    heads_kv = chance.randint(1, 2)
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], *sizes, group * heads_kv, heads_kv, 64)
    causal = chance.random() < 0.5
    left, right = random_window(chance, row, group)
    window_size = (left + right, 0) if causal else (left, right)
    check(q, k, v, causal, window_size=window_size, tile_config=row["name"])


@pytest.mark.parametrize("row", ROWS)
def test_scores_far_from_0(hopper, row):
    """Beyond what exponents can subtract at once, and all keys alike."""
    group = groups(row)[0]
    for factor in (0.0, 30.0, 3e3):
        q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 1, 200, 200, group, 1, 64)
        q = (q.float() * factor).to(q.dtype)
        check(q, k, v, window_size=(100, 0), tile_config=row["name"])


@pytest.mark.parametrize("row", ROWS)
def test_every_group_and_window(hopper, row):
    for group in groups(row):
        for left, right in WINDOWS:
            if left + right + 1 > widest_window(row, group):
                continue
            for seqlens in [(1, 1), (1, 300), (200, 150), (333, 500)]:
                q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 1, *seqlens, group, 1, 64)
                check(q, k, v, window_size=(left, right), tile_config=row["name"])


@pytest.mark.parametrize("row", ROWS)
def test_layouts(hopper, row):
    """Heads first, every second token, heads and entries that are one."""
    group = groups(row)[-1]
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 2, 300, 400, 2 * group, 2, 64)
    options = {"window_size": (80, 10), "tile_config": row["name"]}
    layouts = [
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        [x[:, ::2] for x in (q, k, v)],
        [q, *(x[:1].expand(2, -1, -1, -1) for x in (k, v))],
        [q, *(x[:, :, :1].expand(-1, -1, 2, -1) for x in (k, v))],
        [q[:, :, :1].expand(-1, -1, 2 * group, -1), k[:, :1].expand(-1, 400, -1, -1), v],
    ]
    for inputs in layouts:
        out, lse = run(*inputs, **options)
        dense = run(*(x.contiguous() for x in inputs), **options)
        assert torch.equal(out, dense[0])
        assert torch.equal(lse, dense[1])
        assert_right(out, lse, *inputs, 64**-0.5, False, window_size=(80, 10))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", ROWS)
def test_a_value_that_is_not_finite_is_in_the_rows_that_see_it(hopper, row, value):
    """Those alone, the others with the bits of 0 in its place; also where its weight is 0."""
    group = groups(row)[0]
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 1, 400, 400, group, 1, 64)
    q[..., 0], k[..., 0] = 40.0, 0.0
    options = {"window_size": (90, 20), "tile_config": row["name"]}
    query = torch.arange(400, device=hopper)
    for token in (0, 31, 127, 128, 300, 399):
        weightless, zero = k.clone(), v.clone()
        weightless[:, token, :, 0], zero[:, token, :, 5] = -100.0, 0.0
        wild = zero.clone()
        wild[:, token, :, 5] = value
        sees = (query >= token - 20) & (query <= token + 90)
        for keys in (k, weightless):
            out = flash_attn_func(q, keys, wild, **options)
            right = flash_attn_func(q, keys, zero, **options)
            shown = out[0, sees, :, 5]
            assert not shown.isfinite().any()
            if keys is k:
                torch.testing.assert_close(shown, torch.full_like(shown, value), equal_nan=True)
            right[0, sees, :, 5] = shown
            assert torch.equal(out.view(torch.int16), right.view(torch.int16))


@pytest.mark.parametrize("row", ROWS)
def test_infinities_of_both_signs_make_nan(hopper, row):
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 1, 300, 300, groups(row)[0], 1, 64)
    v[:, 100, :, 7], v[:, 130, :, 7] = math.inf, -math.inf
    out = flash_attn_func(q, k, v, window_size=(50, 0), tile_config=row["name"])[0, :, :, 7]
    assert (out[100:130] == math.inf).all()
    assert out[130:151].isnan().all()
    assert (out[151:181] == -math.inf).all()
    assert out[:100].isfinite().all() and out[181:].isfinite().all()


@pytest.mark.parametrize("row", ROWS)
def test_values_of_nan_everywhere(hopper, row):
    """Several tiles a CTA, whose results are NaN or those of queries without keys."""
    group = groups(row)[0]
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 1, 5000, 4000, group * 8, 8, 64)
    options = {"window_size": (90, 0), "tile_config": row["name"], "return_lse": True}
    right_lse = flash_attn_func(q, k, v, **options)[1]
    out, lse = flash_attn_func(q, k, torch.full_like(v, math.nan), **options)
    assert not out[:, :1000].any()
    assert out[:, 1000:].isnan().all()
    assert torch.equal(lse, right_lse)


@pytest.mark.parametrize("row", ROWS)
def test_what_no_sequence_uses_and_other_sequences(hopper, row):
    """The same bits, whatever stands there."""
    chance = random.Random(5)
    dtype, group = DTYPES[row["dtype"]], groups(row)[0]
    slots_q, slots_k = [70, 1, 300, 0, 129, 64], [70, 40, 300, 5, 500, 3]
    packed = random_packed(
        chance, hopper, dtype, slots_q, slots_k, (64, 64), (2 * group, 2), tail=40
    )
    packed = dataclasses.replace(
        packed, used_q=[66, 1, 255, 0, 129, 9], used_k=[70, 2, 300, 5, 0, 3]
    )
    options = {"window_size": (widest_window(row, group) - 11, 10), "tile_config": row["name"]}
    right = packed.spoilt(0.0).run(**options)
    for value in (*WILD, HUGE[dtype]):
        for again, before in zip(packed.spoilt(value).run(**options), right, strict=True):
            assert torch.equal(again, before), value
        for i, (of_q, of_k) in enumerate(packed.sequences()):
            q, k, v = (x.clone() for x in packed.qkv)
            q[of_q], k[of_k], v[of_k] = value, value, value
            out, lse = dataclasses.replace(packed, q=q, k=k, v=v).run(**options)
            others = torch.ones(q.shape[0], dtype=torch.bool, device=hopper)
            others[of_q] = False
            assert torch.equal(out[others], right[0][others]), (value, i)
            assert torch.equal(lse[:, others], right[1][:, others]), (value, i)


@pytest.mark.parametrize("row", ROWS)
def test_without_queries_or_without_keys(hopper, row):
    group = groups(row)[0]
    for slots_q, slots_k in [([0, 0], [5, 300]), ([1, 0, 200], [0, 0, 0]), ([1, 1, 1], [1, 0, 1])]:
        packed = random_packed(
            random.Random(2),
            hopper,
            DTYPES[row["dtype"]],
            slots_q,
            slots_k,
            (64, 64),
            (group, 1),
        )
        results = packed.run(window_size=(100, 0), tile_config=row["name"])
        assert_packed_right(results, packed, window_size=(100, 0))


@pytest.mark.parametrize("row", ROWS)
def test_lengths_may_change_under_a_captured_graph(hopper, row):
    """Of a call whose first time is the capture."""
    group = groups(row)[0]
    packed = random_packed(
        random.Random(4),
        hopper,
        DTYPES[row["dtype"]],
        [100, 200, 300],
        [100, 200, 300],
        (64, 64),
        (2 * group, 2),
        tail=50,
    )
    lengths = packed.lengths()
    used = torch.tensor([100, 200, 300], dtype=torch.int32, device=hopper)
    lengths["seqused_k"] = used
    options = {"window_size": (90, 7), "tile_config": row["name"], "return_lse": True}
    sizes = {"max_seqlen_q": 640, "max_seqlen_k": 640}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = flash_attn_varlen_func(*packed.qkv, **lengths, **sizes, **options)
    slots_and_used = [
        ([100, 200, 300], [100, 200, 300]),
        ([100, 200, 300], [3, 0, 77]),
        ([0, 640, 10], [0, 640, 9]),
        ([1, 0, 0], [1, 0, 0]),
    ]
    for slots, used_k in slots_and_used:
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            lengths[name].copy_(torch.tensor(starts(slots), dtype=torch.int32))
        used.copy_(torch.tensor(used_k, dtype=torch.int32))
        graph.replay()
        now = dataclasses.replace(packed, slots_q=slots, slots_k=slots, used_k=used_k)
        assert_packed_right(results, now, window_size=(90, 7))


@pytest.mark.parametrize("row", ROWS)
def test_scores_and_scales_at_the_ends_of_a_float(hopper, row):
    """Of the largest group, in packed calls; parity.FORWARD_KERNELS have dense ones."""
    group, dtype = groups(row)[-1], DTYPES[row["dtype"]]
    slots, options = [1, 200, 77], {"window_size": (60, 3), "tile_config": row["name"]}
    packed = random_packed(random.Random(6), hopper, dtype, slots, slots, (64, 64), (group, 1))
    for scale in (5e-39, 2.0**-100):
        results = packed.run(**options, softmax_scale=scale)
        assert_packed_right(results, packed, softmax_scale=scale, window_size=(60, 3))
    # Beyond a float, scaled scores of either sign
    out, _ = packed.run(window_size=(0, 0), tile_config=row["name"], softmax_scale=3e38)
    assert torch.equal(out, packed.v.repeat_interleave(group, 1))
    alike = [torch.full_like(x, 30000.0) for x in packed.qkv]
    out, lse = dataclasses.replace(packed, q=alike[0], k=alike[1], v=alike[2]).run(**options)
    assert (out == 30000.0).all()
    score = alike[0][0, 0, 0].double().item() ** 2 * 8
    assert (lse.double() / score - 1).abs().max() < 2**-16


@pytest.mark.parametrize("row", ROWS)
def test_the_same_bits_each_time(hopper, row):
    chance = random.Random(1)
    group = groups(row)[0]
    slots = [700, 3, 0, 1300, 64, 200]
    heads = 2 * group, 2
    packed = random_packed(
        chance, hopper, DTYPES[row["dtype"]], slots, slots, (64, 64), heads, tail=9
    )
    options = {"window_size": (widest_window(row, group) - 1, 0), "tile_config": row["name"]}
    results = [packed.run(**options) for _ in range(100)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("row", ROWS)
def test_many_tiles_on_few_multiprocessors(hopper, row):
    """Several tiles a CTA, one and another number of them."""
    group = groups(row)[0]
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 2, 1500, 1500, group * 4, 4, 64)
    for margin in (0, 100, 131):
        check(q, k, v, True, window_size=(100, 0), tile_config=row["name"], sm_margin=margin)


@pytest.mark.parametrize("row", ROWS)
def test_calls_that_it_does_not_take(hopper, row):
    group = groups(row)[0]
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 1, 600, 600, group, 1, 64)
    most = widest_window(row, group)
    run(q, k, v, window_size=(most - 1, 0), tile_config=row["name"])
    for window_size in ((most, 0), (-1, 0), (10, -1), (-1, -1)):
        with pytest.raises((ValueError, RuntimeError), match=row["name"]):
            flash_attn_func(q, k, v, window_size=window_size, tile_config=row["name"])
    k = k.expand(-1, -1, group, -1)  # groups of one head
    with pytest.raises((ValueError, RuntimeError), match=row["name"]):
        flash_attn_func(q, k, k, window_size=(10, 0), tile_config=row["name"])


@pytest.mark.parametrize("window_size", [(127, 0), (60, 60)], ids=str)
def test_the_automatic_choice_is_right(hopper, window_size):
    chance = random.Random(3)
    packed = random_packed(
        chance, hopper, torch.bfloat16, [900, 40, 0, 1000], [900, 90, 3, 700], (64, 64), (16, 2)
    )
    packed = dataclasses.replace(packed, used_q=[800, 40, 0, 999], used_k=[900, 0, 3, 650])
    assert_packed_right(packed.run(window_size=window_size), packed, window_size=window_size)
