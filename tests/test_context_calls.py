"""What calls of context parallelism refuse, and what happens if ranks do not agree or are gone."""

import os
import re
import types

import pytest
import ranks as processes
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

from cute_kernels import distributed
from cute_kernels.distributed.exchange import is_nccl


@pytest.fixture(scope="module")
def alone():
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


FORMS = {
    "ring": distributed.ring_attn_func,
    "all_gather": distributed.all_gather_attn_func,
    "ulysses": distributed.ulysses_attn_func,
}


def qkv(*shape):
    return [torch.randn(shape or (1, 8, 4, 8)) for _ in range(3)]


REFUSED = {
    "layout": (ValueError, "layout is 'helix', must be 'zigzag' or", {"layout": "helix"}),
    "layout's type": (TypeError, "layout is 3, must be", {"layout": 3}),
    "group": (TypeError, "group is a int, must be a torch.distributed.ProcessGroup", {"group": 4}),
    "dtype": (
        TypeError,
        "k has dtype torch.float64, must be torch.float32 like q",
        {"k": torch.zeros(1, 8, 4, 8, dtype=torch.float64)},
    ),
    "rows": (
        ValueError,
        "k has seqlen 6, must be 8 like q",
        {"k": torch.zeros(1, 6, 4, 8), "v": torch.zeros(1, 6, 4, 8)},
    ),
    "batch": (
        ValueError,
        "k has batch 2, must be 1",
        {"k": torch.zeros(2, 8, 4, 8), "v": torch.zeros(2, 8, 4, 8)},
    ),
    "scale": (ValueError, "softmax_scale is -1.0, must be", {"softmax_scale": -1.0}),
    "scale's type": (TypeError, "softmax_scale is '1', must be a number", {"softmax_scale": "1"}),
    "no tensor": (TypeError, "q is a list, must be a torch.Tensor", {"q": [1.0]}),
    "no dimensions": (ValueError, r"q has shape \(\), must have 4 dim", {"q": torch.ones(())}),
    "no channels": (ValueError, "q has head_dim 0, must be a", {"q": torch.ones(1, 8, 4, 0)}),
    "window": (ValueError, "window_size is", {"window_size": (-3, 0)}),
    "softcap": (ValueError, "softcap is -2.0", {"softcap": -2.0}),
    "sinks": (ValueError, "sinks has shape", {"sinks": torch.zeros(3)}),
    "packed rank": (ValueError, "q has shape .* must have 3 dim", {"cu_seqlens": [0, 8]}),
}
PACKED_REFUSED = {
    "start": (ValueError, "must be 0", [1, 8]),
    "order": (ValueError, r"cu_seqlens\[2\] is 3, must be at least cu_seqlens\[1\] = 5", [0, 5, 3]),
    "end": (ValueError, r"cu_seqlens\[1\] is 9, must be at most 8", [0, 9]),
    "empty": (ValueError, "must be 0", []),
    "number": (TypeError, r"cu_seqlens\[1\] is 8.0, must be an int", [0, 8.0]),
    "kind": (TypeError, "cu_seqlens is a str", "08"),
    "dtype": (TypeError, "must be .* of torch.int32", torch.tensor([0.0, 8.0])),
    "device": (
        ValueError,
        "cu_seqlens is on meta, must be on the CPU",
        torch.zeros(2, dtype=torch.int32, device="meta"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("error", "message", "changes"), REFUSED.values(), ids=REFUSED)
def test_refused(alone, form, error, message, changes):
    call = dict(zip("qkv", qkv(), strict=True)) | changes
    with pytest.raises(error, match=message):
        FORMS[form](**call)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("error", "message", "cu_seqlens"), PACKED_REFUSED.values(), ids=PACKED_REFUSED
)
def test_refused_documents(alone, form, error, message, cu_seqlens):
    with pytest.raises(error, match=message):
        FORMS[form](*qkv(8, 4, 8), cu_seqlens=cu_seqlens)


def test_without_a_process_group(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match="init_process_group"):
        distributed.ring_attn_func(*qkv())


def test_all_gather_has_no_stripes(alone):
    with pytest.raises(ValueError, match="must be 'zigzag' or 'contiguous'"):
        distributed.all_gather_attn_func(*qkv(), layout="stripe")


def test_second_derivatives_are_refused(alone):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = distributed.ring_attn_func(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode_is_refused(alone, form):
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=r"no torch\.func transforms"):
        torch.func.jvp(lambda x: FORMS[form](x, k, v), (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode deriv"):
        FORMS[form](forward_ad.make_dual(q, q), k, v)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_for_any_size(alone, form):
    """Head dims and windows whose numbers compilers do not know."""
    compiled = torch.compile(
        lambda q, left: FORMS[form](q, q, q, window_size=(left, 0)),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for head_dim, left in ((8, 2), (16, 3)):
        q = torch.randn(1, 8, 4, head_dim)
        right = FORMS[form](q, q, q, window_size=(left, 0))
        assert torch.equal(compiled(q, left), right)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: distributed.shard(x, dim=5), ValueError, "dim is 5, must be below 2"),
        (lambda x: distributed.shard(x, dim=-3), ValueError, "dim is -3, must be at least -2"),
        (lambda x: distributed.shard(x, dim="a"), TypeError, "dim is 'a', must be an int"),
        (lambda x: distributed.shard([1, 2], dim=0), TypeError, "x is a list"),
        (lambda x: distributed.positions(-4), ValueError, "tokens is -4, must be at least 0"),
    ],
)
def test_shards_that_are_refused(alone, call, error, message):
    with pytest.raises(error, match=message):
        call(torch.arange(12).view(2, 6))


def test_shards_of_one(alone):
    x = torch.arange(12).view(2, 6)
    assert torch.equal(distributed.shard(x), x)
    assert torch.equal(distributed.unshard(x), x)
    with pytest.raises(NotImplementedError, match="no gradient"):
        distributed.unshard(x.float().requires_grad_())


def test_labels_and_positions(alone):
    text = torch.arange(10, 18)
    assert distributed.next_tokens(text).tolist() == [*range(11, 18), -100]
    by_document = distributed.next_tokens(text[None], [0, 3, 3, 7], -1)
    assert by_document.tolist() == [[11, 12, -1, 14, 15, 16, -1, -1]]
    assert distributed.positions(8).tolist() == list(range(8))
    assert distributed.positions(8, cu_seqlens=[0, 3, 3, 7]).tolist() == [0, 1, 2, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("form", FORMS)
def test_the_default_device_may_be_another(alone, form):
    """As after torch.set_default_device("cuda"): documents stay on the CPU."""
    call = [x[0] for x in qkv()]
    starts = [0, 3, 3, 8]
    expected = FORMS[form](*call, causal=True, cu_seqlens=starts)
    with torch.device("meta"):
        assert distributed.positions(8, cu_seqlens=starts).device.type == "meta"
        positions = distributed.positions(8, cu_seqlens=starts, device="cpu")
        assert torch.equal(FORMS[form](*call, causal=True, cu_seqlens=starts), expected)
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def disagree(rank):
    """What ranks are told whose calls differ, or cannot be shared."""
    told = []

    def call(function, *inputs, **options):
        try:
            function(*inputs, **options)
            told.append(None)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")

    for form in (distributed.ring_attn_func, distributed.all_gather_attn_func):
        call(form, *qkv(1, 8, 2, 8 * (rank + 1)))
        call(form, *qkv(), causal=rank == 0)
        call(form, *qkv(8, 4, 8), cu_seqlens=[0, 8 + rank])
        call(form, *qkv(), layout=("zigzag", "contiguous")[rank])
        call(form, *qkv())  # all is well after that
    call(distributed.ring_attn_func, *qkv(1, 3, 2, 8))
    call(distributed.ulysses_attn_func, *qkv(1, 8, 3, 8))
    call(distributed.shard, torch.zeros(1, 6))
    machine = distributed.measure(None, 256, 2, 16, torch.float32)
    told.append((machine.node, machine.link > 0, machine.forward > 0, machine.backward > 0))
    return told


def test_ranks_that_do_not_agree():
    first, second = processes.run(2, disagree)
    assert first == second
    shape, mask, documents, layout, well, *rest = first
    assert (
        "the shape of q must be the same on all ranks, but is (1, 8, 2, 8) on rank 0, (1, 8, "
        in shape
    )
    assert re.search(r"causal .* is \(None, 0\) on rank 0, \(None, None\) on rank 1", mask)
    assert "cu_seqlens must be the same" in documents
    assert "zigzag on rank 0, contiguous on rank 1" in layout
    assert well is None
    assert rest[4] is None
    odd, heads, cut, measured = rest[5:]
    assert measured == (2, True, True, True)
    assert "has 6 tokens, must be a multiple of 4" in odd and "pad it to 8" in odd
    assert "q has 3 heads, which 2 ranks cannot share evenly" in heads and "1 or 3 ranks" in heads
    assert "has 6 tokens" in cut


def lose_a_rank(rank, folder):
    inputs = qkv()
    distributed.ring_attn_func(*inputs)
    if rank == 1:
        torch.save("gone", f"{folder}/told-1.pt")
        os._exit(0)
    try:
        distributed.ring_attn_func(*inputs)
        told = "a result"
    except RuntimeError as error:
        told = str(error)
    torch.save(told, f"{folder}/told-0.pt")
    os._exit(0)


def test_a_rank_that_is_gone_is_an_error(tmp_path):
    processes.run(2, lose_a_rank, tmp_path, results=False)
    assert torch.load(tmp_path / "told-1.pt") == "gone"
    assert "onnection" in torch.load(tmp_path / "told-0.pt")


def describe(rank):
    group = dist.group.WORLD
    machine = distributed.measure(None, 256, 2, 16, torch.float32)
    return dist.get_backend(group), is_nccl(group, torch.device("cpu")), machine.node


def test_a_group_whose_maker_named_no_backend():
    """As a DeviceMesh that begins it."""
    without_gpus = {"CUDA_VISIBLE_DEVICES": ""}
    for told in processes.run(2, describe, backend="", environment=without_gpus):
        assert told == ("undefined", False, 2)


@pytest.mark.parametrize("named", ["nccl", "cpu:gloo,cuda:nccl", "undefined", "gloo"])
def test_which_groups_are_nccls(monkeypatch, named):
    class Group:
        def _get_backend(self, device):
            if named == "gloo":
                raise RuntimeError("no backend")
            return types.SimpleNamespace(name=lambda: "nccl")

    monkeypatch.setattr(dist, "get_backend", lambda _: named)
    assert is_nccl(Group(), torch.device("cuda")) == (named != "gloo")
