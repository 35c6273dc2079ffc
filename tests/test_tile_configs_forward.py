"""Rows of forward kernels: which make one, and the arithmetic that others are refused with."""

import pytest
from tile_rows import good, refusal, table

from cute_kernels.compile import table as generator


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"stagse": 2}, ["row 1 (d128_m128n176)", "unknown field stagse", "stages"]),
        ({"tile_n": None}, ["tile_n is missing"]),
        ({"why": None}, ["why is missing"]),
        ({"why": " "}, ["why is empty"]),
        ({"stages": True}, ["stages is True, expected int"]),
        ({"pingpong": 1}, ["pingpong is 1, expected bool"]),
        ({"name": "D 128"}, ["'D 128' must be lower case"]),
        ({"dtypes": []}, ["at least one"]),
        ({"dtypes": ["bf16", "bf16"]}, ["once"]),
        ({"dtypes": ["fp8"]}, ["'fp8' is none of bf16, fp16"]),
        ({"mask": "window"}, ["'window' is none of any, full, causal"]),
        ({"head_dim": 80}, ["head_dim = 80 must be a multiple of 32"]),
        ({"head_dim_v": 80}, ["head_dim_v = 80 must be a multiple of 32"]),
        ({"softcap": True}, ["softcap needs any_call = true"]),
        ({"any_call": True, "mask": "causal"}, ["any_call needs mask = 'any', but it is 'causal'"]),
        ({"head_dim": 320}, ["head_dim = 320", "at most 256"]),
        ({"head_dim_v": 256}, ["head_dim_v = 256 > head_dim = 128", "separate_output"]),
        ({"tile_n": 136}, ["tile_n = 136 must be a multiple of 16", "K of P V"]),
        ({"tile_n": 272}, ["tile_n = 272", "at most 256"]),
        ({"tile_m": 96}, ["tile_m = 96 must be 64, 128, 192 or 256"]),
        ({"tile_m": 320}, ["tile_m = 320 must be 64, 128, 192 or 256"]),
        ({"tile_m": 64}, ["pingpong needs two or more", "has one"]),
        ({"stages": 0}, ["stages = 0"]),
        ({"speed": 0.0}, ["speed = 0.0 must be above 0"]),
        ({"speed": 1}, ["speed is 1, expected float"]),
        ({"overhead": -1}, ["overhead = -1", "at least 0"]),
    ],
)
def test_a_row_that_makes_no_kernel_is_refused(changes, reasons):
    message = refusal(good(**changes))
    for reason in reasons:
        assert reason in message


def test_one_consumer_warpgroup_without_pingpong_is_a_row():
    assert generator.read_table(table(good(tile_m=64, pingpong=False)))


def test_head_dims_of_half_a_swizzled_row_and_of_v_are_rows():
    (row, _) = generator.read_table(table(good(head_dim=96, head_dim_v=64, tile_n=128)))
    assert (row["head_dim"], row["head_dim_v"]) == (96, 64)


def test_v_and_the_output_have_their_own_head_dim():
    wide = {"head_dim": 192, "tile_n": 128, "separate_output": True}
    assert generator.read_table(table(good(**wide, head_dim_v=128)))
    message = refusal(good(**wide))
    assert "98304 K + 98304 V + 49152 Q + 24576 O + 1024 barriers = 271360 > 232448" in message
    message = refusal(good(head_dim=192, head_dim_v=128, tile_n=224, stages=1))
    assert "112 scores + 64 output + 56 packed P + 16 working = 248 > 240" in message


def test_shared_memory_is_refused_with_its_sum():
    # K and V: 3 stages of 176 * 128 elements of 2 bytes; Q: 128 * 128 of them
    message = refusal(good(stages=3))
    assert (
        "shared memory: 135168 K + 135168 V + 32768 Q + 1024 barriers = 304128 > 232448 bytes"
        in message
    )
    message = refusal(good(separate_output=True, tile_m=192, tile_n=160))
    assert "+ 49152 Q + 49152 O + 1024 barriers = 263168 > 232448 bytes" in message


def test_two_warpgroups_share_an_output_buffer_where_two_do_not_fit():
    assert generator.read_table(table(good(separate_output=True)))
    message = refusal(good(separate_output=True, tile_n=192))
    assert "+ 32768 Q + 16384 O + 1024 barriers = 246784 > 232448 bytes" in message


def test_four_warpgroups_share_no_output_buffer():
    """Turns of one parity would let the third pass beside the first."""
    changes = {"tile_m": 256, "tile_n": 32, "stages": 7, "separate_output": True}
    text = refusal(good(**changes))
    assert "shared memory" in text
    assert "65536 O" in text


WINDOW = {"head_dim": 64, "tile_m": 256, "tile_n": 136, "grouped": True, "pingpong": False}


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"tile_n": 216}, ["16 for each warpgroup but one, = 272 must be up to 256"]),
        ({"tile_n": 140}, ["tile_n = 140 must be a multiple of 8"]),
        ({"head_dim": 128}, ["grouped needs head dims of 64"]),
        ({"any_call": True}, ["grouped needs any_call, softcap and pingpong = false"]),
        ({"separate_output": False}, ["separate_output = true"]),
        (
            {"stages": 4},
            ["98304 K + 98304 V + 65536 Q + 32768 O + 1024 barriers = 295936 > 232448"],
        ),
    ],
)
def test_rows_of_short_windows(changes, reasons):
    row = good(**WINDOW, separate_output=True)
    assert generator.read_table(table(row))
    message = refusal({**row, **changes})
    for reason in reasons:
        assert reason in message


def test_registers_are_refused_with_their_sum():
    # 64 * 256 scores and 64 * 128 outputs over 128 threads, the scores once more as packed halves
    message = refusal(good(tile_n=256, stages=1))
    assert (
        "registers of a consumer thread: 128 scores + 64 output + 64 packed P + 16 working = 272 "
        "> 240 with 2 consumer warpgroups" in message
    )
    # What fits two warpgroups need not fit three
    row = {"head_dim": 64, "tile_n": 176, "stages": 1}
    assert generator.read_table(table(good(**row)))
    assert "> 160 with 3 consumer warpgroups" in refusal(good(tile_m=192, **row))
    row = {"head_dim": 64, "tile_n": 96, "stages": 1}
    assert generator.read_table(table(good(tile_m=192, **row)))
    assert "> 112 with 4 consumer warpgroups" in refusal(good(tile_m=256, **row))
