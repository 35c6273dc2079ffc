"""Which row the automatic choice takes. Nothing here needs a GPU."""

import pytest
import torch

from cute_kernels import tile_configs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = [row for row in tile_configs("forward") if not row["softcap"] and not row["grouped"]]
BUILT = sorted({(row["dtype"], row["head_dim"]) for row in ROWS})
MULTIPROCESSORS = 132


def choose(dtype, head_dim, batch=1, seqlen_q=1024, seqlen_k=None, heads=16, causal=False):
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    operator = torch.ops.cute_kernels.choose_tile_config
    name = operator(
        DTYPES[dtype], batch, seqlen_q, seqlen_k, heads, head_dim, causal, MULTIPROCESSORS
    )
    return next(row for row in ROWS if row["name"] == name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "built"), BUILT)
def test_the_smallest_head_dim_that_fits(dtype, built, causal):
    smaller = max((d for t, d in BUILT if t == dtype and d < built), default=0)
    for head_dim in (smaller + 8, built):
        row = choose(dtype, head_dim, causal=causal)
        assert (row["dtype"], row["head_dim"]) == (dtype, built)
        assert row["mask"] in ("any", "causal" if causal else "full")
        dense = [r for r in ROWS if r["head_dim"] == built and not r["any_call"]]
        assert row["any_call"] == (not dense)  # those for any call only where there are no others


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "head_dim"), BUILT)
def test_small_grids_get_tiles_no_larger_than_large_ones(dtype, head_dim, causal):
    large = choose(dtype, head_dim, batch=16, seqlen_q=16384, causal=causal)
    small = choose(dtype, head_dim, seqlen_q=64, causal=causal)
    assert small["tile_m"] <= large["tile_m"]
    smallest = min(
        row["tile_m"] for row in ROWS if (row["dtype"], row["head_dim"]) == (dtype, head_dim)
    )
    assert small["tile_m"] == smallest


@pytest.mark.parametrize(
    ("head_dim", "seqlen", "causal", "name"),
    [
        (64, 512, False, "d64_m256n64"),
        (64, 512, True, "d64_m256n64"),
        (64, 2048, False, "d64_m256n64"),
        (64, 16384, False, "d64_m192n128"),
        (128, 512, False, "d128_m192n64"),
        (128, 1024, True, "d128_m192n64"),
        (128, 2048, False, "d128_m192n64"),
        (128, 16384, True, "d128_m192n64"),
    ],
)
def test_what_was_fastest_on_the_papers_grid_is_chosen(head_dim, seqlen, causal, name):
    """16k tokens in all, heads * head_dim = 2048; the winners of bench/results/search_bf16.json."""
    if ("bf16", head_dim) not in BUILT:
        pytest.skip(f"this build has no bf16 kernel for head_dim {head_dim}")
    shape = {"batch": 16384 // seqlen, "heads": 2048 // head_dim}
    row = choose("bf16", head_dim, seqlen_q=seqlen, causal=causal, **shape)
    assert row["name"] == f"bf16_{name}"


def test_chunks_of_a_long_prompt_are_chosen_as_if_there_were_no_mask():
    """512 queries see nearly the same keys with a causal mask at their end and without."""
    shape = {"seqlen_q": 512, "seqlen_k": 32768, "heads": 64}
    for dtype, head_dim in BUILT:
        full, causal = (choose(dtype, head_dim, causal=c, **shape) for c in (False, True))
        if full["mask"] == "any":
            assert causal == full


def test_a_causal_call_is_not_faster_than_its_longest_tile():
    """16 heads of 2048 queries: 1.3 rounds of 192-row tiles take as long as two."""
    if ("bf16", 128) in BUILT:
        assert choose("bf16", 128, seqlen_q=2048, causal=True)["tile_m"] == 128


def test_a_head_dim_without_a_kernel_is_an_error():
    with pytest.raises(
        RuntimeError, match=r"no forward kernel for bf16, head_dim 320, full in this build"
    ):
        choose("bf16", 320)


def test_nonsense_is_an_error():
    with pytest.raises(RuntimeError, match="seqlen_q is 0"):
        choose("bf16", 64, seqlen_q=0)
    for wrong in (-1, 2**30, 2**40):
        with pytest.raises(RuntimeError, match=f"{wrong} is not a size from 0 to below 2"):
            choose("bf16", 64, seqlen_k=wrong)


@pytest.mark.parametrize("causal", [False, True])
def test_the_choice_answers_calls_of_any_size(causal):
    for seqlen_q in (1, 64, 65, 1000, 2**30 - 1):
        for seqlen_k in (0, 1, 77, 2**30 - 1):
            row = choose(*BUILT[0], seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal)
            assert (row["dtype"], row["head_dim"]) == BUILT[0]
