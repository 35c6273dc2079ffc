"""Outputs and LSE against the definition of attention: dtypes, head dims, heads, lengths."""

import pytest
import torch
from parity import (
    DTYPES,
    GRID,
    assert_right,
    check,
    common_head_dim,
    poison,
    random_qkv,
    run,
    short_window,
    skip_unless_built,
)

import cute_kernels

MASKS = {"full": False, "causal": True}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "seqlens", "head_dim", "heads"), GRID)
def test_matches_the_definition(request, device, seqlens, head_dim, heads, dtype, mask):
    if device == "cuda":
        request.getfixturevalue("hopper")
        skip_unless_built(DTYPES[dtype], head_dim, MASKS[mask])
    seqlen_q, seqlen_k = seqlens
    batch = 1 if max(seqlens) > 4000 else 2
    q, k, v = random_qkv(
        device, DTYPES[dtype], batch, seqlen_q, seqlen_k, *heads, head_dim=head_dim
    )
    check(q, k, v, MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_more_tiles_than_multiprocessors(hopper, head_dim, mask):
    """Every CTA of the persistent grid walks over several tiles, of several heads."""
    skip_unless_built(torch.bfloat16, head_dim, MASKS[mask])
    q, k, v = random_qkv(
        hopper, torch.bfloat16, 6, 700, 900, heads=16, key_heads=4, head_dim=head_dim
    )
    check(q, k, v, MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_number_of_query_blocks(hopper, head_dim, mask):
    """The scheduler's bands: short and long sequences, last bands of every width."""
    skip_unless_built(torch.bfloat16, head_dim, MASKS[mask])
    for seqlen_q in range(1900, 4200, 190):
        q, k, v = random_qkv(
            hopper, torch.bfloat16, 2, seqlen_q, seqlen_q + 77, 3, 1, head_dim=head_dim
        )
        check(q, k, v, MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seqlen_k", [1, 15, 64, 80, 81, 128, 129, 176, 177, 353, 512])
def test_lengths_around_the_blocks(device, seqlen_k, mask):
    head_dim = 128 if seqlen_k % 2 else 64
    if device == "cuda":
        skip_unless_built(torch.float16, head_dim, MASKS[mask])
    for seqlen_q in (1, 63, 64, 65, 128, 191, 193, 257):
        q, k, v = random_qkv(
            device, torch.float16, 1, seqlen_q, seqlen_k, 2, 1, head_dim=head_dim, seed=seqlen_q
        )
        check(q, k, v, MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(device, head_dim, mask):
    if device == "cuda":
        skip_unless_built(torch.bfloat16, head_dim, MASKS[mask])
    q, k, v = random_qkv(device, torch.bfloat16, 1, 130, 190, 2, 1, head_dim=head_dim)
    check(q, k, v, MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("softmax_scale", [0.02, 0.3, 1.0, 4])
def test_softmax_scale(device, softmax_scale, mask):
    """From nearly uniform weights to nearly one-hot ones."""
    if device == "cuda":
        skip_unless_built(torch.bfloat16, 64, MASKS[mask])
    q, k, v = random_qkv(device, torch.bfloat16, 2, 200, 300, 4, 2)
    check(q, k, v, MASKS[mask], softmax_scale=softmax_scale)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rise", [3.0, -3.0, 60.0, -60.0, 400.0, -400.0, 3000.0, -3000.0])
def test_scores_with_a_slope(device, rise, head_dim, dtype, mask):
    """Row maxima that creep or leap from block to block, in both directions of the walk; the
    steepest leap by more than the exponent of a float."""
    if device == "cuda":
        skip_unless_built(DTYPES[dtype], head_dim, MASKS[mask])
    q, k, v = random_qkv(device, DTYPES[dtype], 1, 300, 1100, 2, 2, head_dim=head_dim)
    q[..., 0] = head_dim**0.5  # divided out by the scale: a key's first element adds to its scores
    k[..., 0] = torch.linspace(0.0, rise, k.shape[1], device=device)[:, None]
    check(q, k, v, MASKS[mask])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_infinities_and_nan_stay_in_their_rows(device, head_dim):
    """What the definition makes NaN is NaN, everything else is as if it were not there."""
    if device == "cuda":
        skip_unless_built(torch.bfloat16, head_dim, causal=False)
    q, k, v = random_qkv(device, torch.bfloat16, 1, 300, 700, 2, 2, head_dim=head_dim)
    spoilt = q.clone()
    spoilt[:, 17, 0] = torch.nan
    spoilt[:, 200, 1] = torch.inf  # scores of both signs, and inf - inf
    (out, lse), (right, right_lse) = run(spoilt, k, v), check(q, k, v)
    bad = torch.zeros(1, 300, 2, dtype=torch.bool, device=device)
    bad[:, 17, 0] = bad[:, 200, 1] = True
    assert out[bad].isnan().all()
    assert lse.transpose(1, 2)[bad].isnan().all()
    torch.testing.assert_close(out[~bad], right[~bad], rtol=0.016, atol=2e-3)
    lse, right_lse = (t.transpose(1, 2)[~bad] for t in (lse, right_lse))
    torch.testing.assert_close(lse, right_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scores_of_minus_infinity(device, head_dim, mask):
    """Of all keys in the first blocks of the walk, without a mask; later scores far below 0."""
    if device == "cuda":
        skip_unless_built(torch.bfloat16, head_dim, MASKS[mask])
    q, k, v = random_qkv(device, torch.bfloat16, 1, 300, 1100, 2, 2, head_dim=head_dim)
    q[..., 0] = head_dim**0.5  # divided out by the scale
    k[..., 0] = -1000.0
    q[..., 1] = q[..., 1].abs() + 0.1
    k[:, 600:, :, 1] = -torch.inf
    check(q, k, v, MASKS[mask])


def test_rows_that_see_no_key(device):
    """Causal and bottom-right aligned: the first seqlen_q - seqlen_k queries see nothing."""
    for dtype in DTYPES.values():
        for seqlen_q, seqlen_k in [(300, 1), (300, 100), (1000, 437), (130, 129)]:
            if device == "cuda":
                skip_unless_built(dtype, 64, causal=True)
            q, k, v = random_qkv(device, dtype, 2, seqlen_q, seqlen_k, 4, 2)
            out, lse = check(q, k, v, causal=True)
            unseen = seqlen_q - seqlen_k
            assert (lse[:, :, :unseen] == -torch.inf).all()
            assert (out[:, :unseen] == 0).all()
            assert lse[:, :, unseen:].isfinite().all()


def test_what_is_returned(device):
    if device == "cuda":
        skip_unless_built(torch.float16, 64, causal=False)
    q, k, v = random_qkv(device, torch.float16)
    out = cute_kernels.flash_attn_func(q, k, v)
    with_lse = cute_kernels.flash_attn_func(q, k, v, return_lse=True)
    with_probs = cute_kernels.flash_attn_func(q, k, v, return_attn_probs=True)
    assert isinstance(out, torch.Tensor)
    assert len(with_lse) == len(with_probs) == 2
    for other, lse in (with_lse, with_probs):
        assert torch.equal(out, other)
        assert torch.equal(lse, with_lse[1])


def test_poison_reaches_the_outputs(hopper):
    """Otherwise the other tests could not see an element that no kernel wrote."""
    q, _, v = random_qkv(hopper, torch.bfloat16, 3, 799, 3, 7)
    poison(q, v)
    out = torch.empty_like(q)
    lse = torch.empty(3, 7, 799, device=hopper)
    assert out.isnan().all()
    assert lse.isnan().all()


ROWS = [
    pytest.param(row, id=row["name"])
    for row in cute_kernels.tile_configs("forward")
    if not row["softcap"]
]


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_build(hopper, row):
    masks = MASKS.values() if row["mask"] in ("any", "none") else [MASKS[row["mask"]]]
    for causal in masks:
        mask, heads = {"causal": causal}, (4, 2)
        if row["grouped"]:
            short = short_window(row, causal)
            mask, heads = (
                {"window_size": short["window_size"]},
                (short["heads"], short["key_heads"]),
            )
        for head_dim in (common_head_dim(row), common_head_dim(row) - 24):
            for seqlen_q, seqlen_k in [(1, 1), (113, 203), (300, 64), (64, 1111), (1023, 1024)]:
                q, k, v = random_qkv(
                    hopper, DTYPES[row["dtype"]], 2, seqlen_q, seqlen_k, *heads, head_dim
                )
                check(q, k, v, **mask, tile_config=row["name"])


def many_elements(device, seqlen, heads, head_dim, seed):
    """More than 2^31 random elements, without a temporary of another dtype."""
    x = torch.empty(1, seqlen, heads, head_dim, device=device, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    return x.normal_(generator=torch.Generator(device).manual_seed(seed))


def test_more_than_2_31_elements_of_queries(hopper, much_memory):
    skip_unless_built(torch.bfloat16, 128, causal=False)
    much_memory(24)
    seqlen_q = 2**20 + 200
    q = many_elements(hopper, seqlen_q, 16, 128, seed=0)
    _, k, v = random_qkv(hopper, torch.bfloat16, 1, 1, 130, 2, head_dim=128)
    out, lse = run(q, k, v)
    for first in (0, 2**19, seqlen_q - 300):
        rows = slice(first, first + 300)
        assert_right(out[:, rows], lse[:, :, rows], q[:, rows], k, v, 128**-0.5, False)


@pytest.mark.parametrize("mask", MASKS)
def test_more_than_2_31_elements_of_keys(hopper, much_memory, mask):
    skip_unless_built(torch.bfloat16, 128, MASKS[mask])
    much_memory(24)
    seqlen_k = 2**20 + 200
    k = many_elements(hopper, seqlen_k, 16, 128, seed=0)
    v = many_elements(hopper, seqlen_k, 16, 128, seed=1)
    q, _, _ = random_qkv(hopper, torch.bfloat16, 1, 70, 1, 16, head_dim=128)
    out, lse = run(q, k, v, MASKS[mask])
    for heads in (slice(0, 1), slice(15, 16)):
        part = (q[:, :, heads], k[:, :, heads], v[:, :, heads])
        assert_right(out[:, :, heads], lse[:, heads], *part, 128**-0.5, MASKS[mask])
