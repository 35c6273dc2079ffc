"""bench/distributions.py: each is what it says, by its scores and values in fp64."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import providers
from bench.cells import Cell, on_data
from bench.check import Reference
from bench.check_backward import GradientReference
from bench.distributions import (
    ALL,
    BLOCK,
    DISTRIBUTIONS,
    STEP,
    alibi_slopes,
    chosen,
    draw,
    is_adversarial,
)

CELL = Cell(
    dtype="bf16", mask="full", batch=2, seqlen=96, heads=4, head_dim=64, seqlen_k=512, heads_kv=2
)


def drawn(name, **fields):
    return draw(replace(CELL, data=name, **fields), "cpu")


def scores(name, **fields):
    """(batch, heads, queries, keys)."""
    q, k, _ = (x.double().transpose(1, 2) for x in drawn(name, **fields))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return q @ k.mT * q.shape[-1] ** -0.5


def block_maxima(name, **fields):
    """The mean over rows of the largest score of each 64 keys, from the first keys to the last."""
    return scores(name, **fields).unflatten(-1, (-1, BLOCK)).amax(-1).mean((0, 1, 2))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_shapes_and_seeds(name, dtype):
    cell = replace(CELL, data=name, dtype=dtype, head_dim=256, seqlen=8, seqlen_k=4096, batch=1)
    q, k, v = draw(cell, "cpu")
    assert q.shape == (1, 8, 4, 256) and k.shape == v.shape == (1, 4096, 2, 256)
    for x, again, other in zip((q, k, v), draw(cell, "cpu"), draw(cell, "cpu", 1), strict=True):
        assert x.dtype == getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[dtype])
        assert x.isfinite().all()
        assert torch.equal(x, again) and not torch.equal(x, other)


def test_all_are_told_apart_and_say_what_they_stand_for():
    assert len({x.meaning for x in DISTRIBUTIONS.values()}) == len(DISTRIBUTIONS)
    seen = [torch.cat([x.flatten() for x in drawn(name)]) for name in DISTRIBUTIONS]
    for i, one in enumerate(seen):
        assert not any(torch.equal(one, other) for other in seen[:i])
    adversarial = [name for name in DISTRIBUTIONS if is_adversarial(name)]
    assert adversarial == ["rising", "falling", "shuffled", "alibi", "spike"]


@pytest.mark.parametrize(("name", "deviation"), [("normal", 1), ("sd3", 3), ("sd6", 6)])
def test_deviation_of_scores(name, deviation):
    assert scores(name).std().item() == pytest.approx(deviation, rel=0.02)


def test_a_few_channels_of_keys_are_large():
    deviation = drawn("channels")[1].double().std((0, 1, 2))
    assert deviation[:4].tolist() == pytest.approx([30] * 4, rel=0.1)
    assert deviation[4:].tolist() == pytest.approx([1] * 60, rel=0.1)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sink_and_local(head_dim):
    """Square, since the last query stands at the last key."""
    s = scores("sink+local", seqlen=512, head_dim=head_dim)
    far = s[..., 256:, 1:64]
    assert far.std().item() == pytest.approx(3, abs=1.5)  # what is left of the local part too
    own = s.diagonal(dim1=-2, dim2=-1)[..., 256:]
    local = 8 * 4.0**2 / math.sqrt(head_dim)
    assert (own.mean() - far.mean()).item() == pytest.approx(local, rel=0.4)
    beside = s.diagonal(offset=-1, dim1=-2, dim2=-1)[..., 256:]
    distant = s.diagonal(offset=-64, dim1=-2, dim2=-1)[..., 256:]
    assert own.mean() > beside.mean() > distant.mean() + 2
    assert (s[..., 256:, 0].mean() - far.mean()).item() == pytest.approx(16, abs=2)
    assert torch.softmax(s, -1)[..., 0].mean() > 0.15  # of 512 keys


def test_chunks_of_queries_stand_at_the_last_keys():
    whole, chunk = scores("sink+local", seqlen=512), scores("sink+local", seqlen=32)
    own = chunk.diagonal(offset=480, dim1=-2, dim2=-1)
    assert own.mean() > chunk.diagonal(dim1=-2, dim2=-1).mean() + 5
    assert own.mean().item() == pytest.approx(
        whole.diagonal(dim1=-2, dim2=-1).mean().item(), abs=1.5
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_levels_rise_by_32_along_the_walk_or_fall(head_dim):
    """The walk goes from the last key to the first."""
    along_walk = block_maxima("rising", head_dim=head_dim).flip(0)
    assert along_walk.diff().tolist() == pytest.approx([STEP] * 7, abs=1)
    assert STEP == 32
    along_walk = block_maxima("falling", head_dim=head_dim).flip(0)
    assert along_walk.diff().tolist() == pytest.approx([-STEP] * 7, abs=1)


def test_every_row_meets_every_level():
    """Also the longest of the paper's grid: 16 bits hold 256 levels exactly."""
    s = scores("rising", batch=1, heads=1, heads_kv=1, seqlen=4, seqlen_k=16384)
    rise = s.unflatten(-1, (-1, BLOCK)).amax(-1).flip(-1).diff()
    assert rise.shape == (1, 1, 4, 255)
    assert rise.min() > 24 and rise.max() < 40


def test_shuffled_has_the_same_levels_in_another_order():
    shuffled, rising = block_maxima("shuffled"), block_maxima("rising")
    assert sorted(shuffled.tolist()) == pytest.approx(sorted(rising.tolist()), abs=1.5)
    steps = shuffled.diff()
    assert (steps > STEP / 2).any() and (steps < -STEP / 2).any()


@pytest.mark.parametrize("seqlen_k", [100, 512])
def test_alibi_slopes(seqlen_k):
    """A line through the mean score of each key: its slope is the head's."""
    s = scores("alibi", seqlen=256, seqlen_k=seqlen_k).mean((0, 2))
    key = torch.arange(seqlen_k, dtype=torch.float64)
    key -= key.mean()
    slope = (s @ key) / key.square().sum()
    assert slope.tolist() == pytest.approx(alibi_slopes(4).tolist(), rel=0.01, abs=5e-4)
    left = s - slope[:, None] * key
    assert (left - left.mean(-1, keepdim=True)).abs().max() < 1
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]


def test_one_spike_at_the_end_of_the_walk():
    s = scores("spike")
    assert s[..., 0].mean().item() == pytest.approx(64, abs=0.5)
    assert s[..., 0].amin() > s[..., 1:].amax() + 40
    assert s[..., 1:].std().item() == pytest.approx(1, rel=0.02)


def test_values_with_a_mean():
    v = drawn("v-mean")[2].double()
    assert v.mean((0, 1, 2)).tolist() == pytest.approx([1.0] * 64, abs=0.12)
    assert v.std().item() == pytest.approx(1, rel=0.02)
    drift = drawn("v-drift", seqlen_k=4096)[2].double()
    early, late = drift[:, :2048].mean((0, 1, 2)), drift[:, 2048:].mean((0, 1, 2))
    c = torch.linspace(0.5, 1.5, 64)
    assert early.tolist() == pytest.approx((2 * c).tolist(), abs=0.06)
    assert late.tolist() == pytest.approx((-c).tolist(), abs=0.06)
    for name in ("v-mean", "v-drift"):  # nothing else changes
        for x, same in zip(drawn(name)[:2], drawn("normal")[:2], strict=True):
            assert torch.equal(x, same)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_check_tells_right_from_wrong(name, dtype, mask):
    """bench/check.py and check_backward.py, on two implementations that run on the CPU."""
    fields = {"mask": mask, "dtype": dtype, "seqlen": 256, "seqlen_k": 256, "heads_kv": 4}
    cell = replace(CELL, data=name, batch=1, **fields)
    qkv = draw(cell, "cpu")
    grad_out = draw(replace(cell, data="normal"), "cpu", 1)[0]
    reference, gradients = Reference(cell, *qkv), GradientReference(cell, *qkv, grad_out)
    for forward in (providers.ours(), providers.PEERS["sdpa-flash"]()):
        out = forward.output(forward.bind(cell, *qkv)())
        assert reference.error(out) <= reference.tolerance
        step = providers.training_step_of(forward)
        with step.context():
            grads = step.output(step.bind(cell, *qkv, grad_out)())
        assert gradients.error(grads) <= gradients.tolerance
    wrong = out.clone()
    wrong[:, -1, 1] *= 1.03  # of all rows one
    assert reference.error(wrong) > reference.tolerance
    wrong[0, 100, 0, 0] = math.nan
    assert reference.error(wrong) == math.inf
    wrong = [grad.clone() for grad in grads]
    wrong[2][0, :, 3] *= 1.03
    assert gradients.error(wrong) > gradients.tolerance
    wrong[0][0, 0, 1, 0] = math.inf
    assert gradients.error(wrong) == math.inf


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_check_misses_a_block(name):
    """Attention all in bf16, whose error is the field's measure, rounds scores of `rising` by 16
    and more: by twice that this would pass."""
    cell = replace(CELL, data=name, seqlen=32, seqlen_k=1024)
    q, k, v = draw(cell, "cpu")
    reference = Reference(cell, q, k, v)
    ours = providers.ours()
    assert reference.error(ours.bind(cell, q, k, v)()) <= reference.tolerance
    if name not in ("falling", "shuffled"):  # where the last block has no weight
        without = ours.bind(cell, q, k[:, BLOCK:], v[:, BLOCK:])()
        assert reference.error(without) > 3 * reference.tolerance


def test_the_axis():
    grid = on_data([CELL, replace(CELL, mask="causal")], ["normal", "sd6"])
    assert [str(cell) for cell in grid] == [
        "bf16 D=64 full S=96 on 512 keys 4/2 heads",
        "bf16 D=64 full S=96 on 512 keys 4/2 heads sd6",
        "bf16 D=64 causal S=96 on 512 keys 4/2 heads",
        "bf16 D=64 causal S=96 on 512 keys 4/2 heads sd6",
    ]
    assert "data" not in grid[0].as_dict() and grid[1].as_dict()["data"] == "sd6"
    assert chosen([ALL, "sd6"]) == list(DISTRIBUTIONS)
    assert chosen(["sd6", "sd3", "sd6"]) == ["sd6", "sd3"]
