"""The operators of parts of the keys in PyTorch's machinery: schemas, shapes, compilers."""

import random

import torch
from key_parts import dense_call, lengths_of, random_results
from packed import random_grads, random_packed
from parity import random_qkv
from torch._subclasses import FakeTensorMode

from cute_kernels.parts import Mask, attend_part, merge_part_, merge_parts, part_gradients_


def packed_call():
    call = random_packed(random.Random(1), "cpu", torch.float32, [5, 3], [4, 9], (16, 8), (4, 2))
    packed = lengths_of(call)
    out, lse = attend_part(*call.qkv, 0.3, Mask(right=0), packed)
    grads = [torch.ones(x.shape) for x in call.qkv]
    return grads, (*random_grads(call), *call.qkv, out, lse, *packed.lengths)


def opcheck(operator, *inputs, **keywords):
    done = torch.library.opcheck(operator, inputs, keywords)
    assert set(done.values()) == {"SUCCESS"}


def test_operators():
    operators = torch.ops.cute_kernels
    grads, results = dense_call()
    options = {"window_left": 3, "sm_margin": 4}
    into = operators.flash_attn_backward_into.default
    opcheck(into, *grads, False, True, *results, 0.3, True, False, **options)
    opcheck(into, *grads, True, False, *results, 0.3, False, False, None, torch.zeros(4))
    grads, results = packed_call()
    into = operators.flash_attn_varlen_backward_into.default
    opcheck(into, *grads, True, True, *results, 0.3, True, max_seqlen_q=5, sm_margin=4)
    parts = [x.nan_to_num(0.0) if x.dim() == 4 else x for x in random_results(
        "cpu", (2, 7, 4, 16), (torch.float32, torch.bfloat16)
    )]  # fmt: skip
    opcheck(operators.flash_attn_merge.default, *parts, out_dtype=torch.float16)
    opcheck(operators.flash_attn_merge_.default, *parts)


def test_shape_inference():
    parts = random_results("cpu", (7, 4, 16), (torch.float32, torch.bfloat16))
    real = merge_parts(*parts, torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = merge_parts(*map(mode.from_tensor, parts), torch.bfloat16)
        merge_part_(*map(mode.from_tensor, parts))
        how = {"device": "cuda", "dtype": torch.bfloat16}
        q, (k, v) = torch.empty(1, 9, 4, 16, **how), torch.empty(2, 1, 12, 2, 16, **how).unbind()
        out, lse = attend_part(q, k, v, 0.3, Mask(right=0, diagonal=2))
        grads = [torch.empty(x.shape, device="cuda") for x in (q, k, v)]
        sinks = torch.zeros(4, device="cuda")
        of_sinks = part_gradients_(*grads, out, q, k, v, out, lse, 0.3, sinks=sinks)
        assert of_sinks.shape == (4,) and of_sinks.device == q.device
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_compiled():
    torch.compiler.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(q, k, v, out, lse):
        out, lse = out.clone(), lse.clone()
        merge_part_(out, lse, *attend_part(q, k, v, 0.3, Mask(right=0, diagonal=1)))
        grads = [torch.zeros(x.shape) for x in (q, k, v)]
        part_gradients_(*grads, q, q, k, v, out, lse, 0.3, add_to_q=True)
        return out, lse, *grads

    q, k, v = random_qkv("cpu", torch.float32, 1, 9, 12, 4, 2, 16)
    inputs = (q, k, v, *attend_part(q, k, v, 0.3))
    with torch.compiler.set_stance("force_eager"):
        eager = step(*inputs)
    for a, b in zip(step(*inputs), eager, strict=True):
        assert torch.equal(a, b)
