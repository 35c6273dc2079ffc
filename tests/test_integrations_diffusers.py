"""diffusers' models with random weights on this package's backends, against its own on the CPU."""

import math
import sys
import types
import warnings

import pytest
import torch
from oracle import Attention
from parity import (
    assert_gradients_right,
    assert_right,
    random_qkv,
    skip_unless_answered,
    skip_unless_built,
)

from cute_kernels import flash_attn_fp8_func, flash_attn_func, tile_configs
from cute_kernels.integrations import diffusers as integration
from cute_kernels.integrations import torch as behind_sdpa

pytest.importorskip("diffusers", reason="needs diffusers: it is not installed")
dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

NAMES = [integration.NAME, integration.NAME_FP8]
REGISTRY, BACKENDS = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName


@pytest.fixture
def registered():
    integration._warn_once.cache_clear()
    integration.register()
    yield
    integration.unregister()


def flux():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(8, 12, 12),
    )
    return model, {
        "hidden_states": torch.randn(2, 70, 4),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([1.0, 0.5]),
        "img_ids": torch.randn(70, 3),
        "txt_ids": torch.zeros(7, 3),
    }


def wan():
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 2, 12, 10),
        "timestep": torch.tensor([10, 500]),
        "encoder_hidden_states": torch.randn(2, 9, 16),
    }


def random_model(make, dtype, device="cpu"):
    torch.manual_seed(0)
    model, inputs = make()
    model = model.to(device, dtype).eval()
    floating = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    return model, {n: x.to(device) for n, x in floating.items()}


def result(make, dtype, backend="native", device="cpu"):
    model, inputs = random_model(make, dtype, device)
    model.set_attention_backend(backend)
    with torch.no_grad():
        return model(**inputs).sample


def error(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("make", [flux, wan])
def test_models(registered, make):
    exact = result(make, torch.float64)
    assert error(result(make, torch.float64, integration.NAME), exact) < 1e-7  # of layers in fp32
    for dtype in (torch.float32, torch.bfloat16):
        theirs = error(result(make, dtype), exact)
        assert error(result(make, dtype, integration.NAME), exact) < 2 * theirs
    assert 1e-5 < error(result(make, torch.float32, integration.NAME_FP8), exact) < 0.02


@pytest.mark.parametrize("make", [flux, wan])
def test_gradients_of_models(registered, make):
    gradients = []
    for backend in ("native", integration.NAME):
        model, inputs = random_model(make, torch.float32)
        model.set_attention_backend(backend)
        model(**inputs).sample.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    native, ours = gradients
    assert native.keys() == ours.keys() and any("to_q" in name for name in native)
    for name in native:
        largest = native[name].abs().max()
        assert (ours[name] - native[name]).abs().max() <= 1e-4 * largest + 1e-6, name


def test_a_compiled_model(registered):
    model, inputs = random_model(flux, torch.float32)
    model.set_attention_backend(integration.NAME)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs).sample, model(**inputs).sample, atol=1e-5)


@pytest.mark.parametrize("make", [flux, wan])
def test_models_on_a_gpu(registered, hopper, make):
    skip_unless_built(torch.bfloat16, 32, False)
    exact = result(make, torch.float64)
    theirs = error(result(make, torch.bfloat16, device=hopper).cpu(), exact)
    ours = error(result(make, torch.bfloat16, integration.NAME, hopper).cpu(), exact)
    assert ours < 1.5 * theirs
    if tile_configs("forward_fp8"):
        in_8_bits = result(make, torch.bfloat16, integration.NAME_FP8, hopper)
        assert error(in_8_bits.cpu(), exact) < 2 * theirs + 0.02


def sd3():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=64,
        pooled_projection_dim=16,
        out_channels=4,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([1.0, 0.5]),
    }


def test_stable_diffusion_3_has_no_backends(registered):
    """Its attention calls SDPA itself."""
    model, _ = random_model(sd3, torch.float32)
    assert not any(hasattr(p, "_attention_backend") for p in model.attn_processors.values())
    given = result(sd3, torch.float32)
    assert torch.equal(result(sd3, torch.float32, integration.NAME_FP8), given)


def test_stable_diffusion_3_behind_sdpa(hopper, monkeypatch):
    skip_unless_built(torch.bfloat16, 32, False)
    name, calls = "_scaled_dot_product_flash_attention", []

    def counted(*inputs, **options):
        answer = behind_sdpa.aten.scaled_dot_product_flash_attention(*inputs, **options)
        calls.append(answer is not NotImplemented)
        return answer

    monkeypatch.setitem(behind_sdpa._ANSWERS, name, counted)
    exact = result(sd3, torch.float64)
    theirs = error(result(sd3, torch.bfloat16, device=hopper).cpu(), exact)
    behind_sdpa.activate()
    try:
        ours = error(result(sd3, torch.bfloat16, device=hopper).cpu(), exact)
    finally:
        behind_sdpa.deactivate()
    assert calls == [True, True]
    assert ours < 1.5 * theirs


def attend(*inputs, backend=integration.NAME, **options):
    kwargs = {"return_lse": options.pop("return_lse")} if "return_lse" in options else {}
    return dispatch.dispatch_attention_fn(
        *inputs, attention_kwargs=kwargs, backend=BACKENDS(backend), **options
    )


def qkv(seed=0, seqlens=(20, 33), heads=(4, 4), dtype=torch.float32):
    return random_qkv("cpu", dtype, 2, *seqlens, *heads, 16, seed=seed)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("scale", [None, 0.1])
def test_the_lse_has_the_heads_last(registered, backend, scale):
    q, k, v = qkv(heads=(4, 2))
    out, lse = attend(q, k, v, scale=scale, enable_gqa=True, return_lse=True, backend=backend)
    assert lse.shape == (2, 20, 4)
    if backend == integration.NAME:
        assert_right(out, lse.transpose(1, 2), q, k, v, scale or 0.25, False)
    else:
        right = flash_attn_fp8_func(q, k, v, scale, return_lse=True)
        assert torch.equal(out, right[0]) and torch.equal(lse, right[1].transpose(1, 2))
    alone = attend(q, k, v, scale=scale, enable_gqa=True, backend=backend)
    assert torch.equal(alone, out)


def test_8_bits_have_an_lse_only_where_it_is_asked_for(registered, monkeypatch):
    """It is another kernel's, which takes longer."""
    asked = []

    def recorded(*inputs, **options):
        asked.append(options.get("return_lse", False))
        return flash_attn_fp8_func(*inputs, **options)

    monkeypatch.setattr(integration, "flash_attn_fp8_func", recorded)
    for wanted in (False, True):
        attend(*qkv(), return_lse=wanted, backend=integration.NAME_FP8)
        ctx, options = Context(), (None, 0.0, False, None, False, wanted)
        integration.forward_op(ctx, *qkv(), *options, attention=integration.in_8_bits)
    assert asked == [False, False, True, True]


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("seqlens", [(20, 33), (33, 20), (20, 20)])
def test_a_causal_mask_is_aligned_top_left(registered, backend, seqlens):
    q, k, v = qkv(seqlens=seqlens)
    out = attend(q, k, v, is_causal=True, backend=backend)
    right = attend(q.double(), k.double(), v.double(), is_causal=True, backend="native")
    in_8_bits = backend == integration.NAME_FP8 and seqlens == (20, 20)
    assert error(out, right) < (0.05 if in_8_bits else 1e-6)


KEEP = torch.tensor([[0, 1] * 16 + [1], [0] * 4 + [1] * 20 + [0] * 9]).bool()
MASKS = {
    "batch": KEEP,
    "one of a batch": KEEP[:1],
    "one": KEEP[1],
    "with heads and queries": KEEP[:, None, None],
    "of one": KEEP[:1, None, None],
    "expanded": KEEP[:, None, None].expand(2, 4, 20, 33),
    "none hidden": torch.ones(2, 33, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("backend", NAMES)
def test_masks_of_keys(registered, backend, mask, recwarn):
    q, k, v = qkv(heads=(4, 2), dtype=torch.bfloat16)
    visible = (mask if mask.dim() < 4 else mask[:, 0, 0]).expand(2, 33)
    spoilt = [x.masked_fill(~visible[..., None, None], math.nan) for x in (k, v)]
    inputs = [x.requires_grad_() for x in (q, *spoilt)]
    out, lse = attend(*inputs, attn_mask=mask, scale=0.3, return_lse=True, backend=backend)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad_out)
    for i, keys in enumerate(visible):
        one = [q[i : i + 1].detach(), k[i : i + 1, keys], v[i : i + 1, keys]]
        assert_right(
            out[i : i + 1].detach(), lse[i : i + 1].detach().transpose(1, 2), *one, 0.3, False
        )
        seen = [grads[0][i : i + 1], *(x[i : i + 1, keys] for x in grads[1:])]
        assert_gradients_right(seen, grad_out[i : i + 1], None, *one, 0.3, False)
        assert not any(x[i, ~keys].any() for x in grads[1:])
    assert not recwarn.list


def test_masks_do_not_wait_for_the_gpu(registered, hopper):
    skip_unless_answered(hopper, torch.bfloat16)
    q, k, v = (x.to(hopper) for x in qkv(dtype=torch.bfloat16))
    mask = KEEP.to(hopper)
    attend(q, k, v, attn_mask=mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attend(q, k, v, attn_mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    right = attend(q.double(), k.double(), v.double(), attn_mask=mask, backend="native")
    assert error(out, right) < 0.01


def test_no_visible_key_gives_0(registered):
    mask = torch.stack([torch.zeros(33), torch.ones(33)]).bool()
    out = attend(*qkv(), attn_mask=mask)
    assert not out[0].any() and out[1].any()


OTHERS = {
    "additive": (MASKS["batch"].float(), {}),
    "by query": (torch.ones(20, 33, dtype=torch.bool).tril(), {}),
    "by head": (torch.rand(2, 4, 1, 33) > 0.5, {}),
    "by query, of 4 dimensions": (torch.ones(1, 1, 20, 33, dtype=torch.bool).tril(), {}),
    "3 dimensions": (torch.rand(4, 20, 33) > 0.5, {}),
    "dropout": (None, {"dropout_p": 0.5}),
    "dropout with a mask": (MASKS["batch"], {"dropout_p": 0.5}),
}


@pytest.mark.parametrize(("mask", "options"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("backend", NAMES)
def test_other_calls_go_to_diffusers_own_backend(registered, backend, mask, options):
    results = []
    for name in ("native", backend, backend):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            results.append(attend(*qkv(), attn_mask=mask, backend=name, **options))
        messages = [str(w.message) for w in said if "cute_kernels does not take" in str(w.message)]
        assert len(messages) == (len(results) == 2)  # once
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_masks_are_compiled_whole(registered):
    def block(q, k, v, mask):
        return attend(q, k, v, attn_mask=mask)

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for mask in (MASKS["batch"], MASKS["with heads and queries"], OTHERS["by query"][0]):
        arguments = (*qkv(), mask)
        assert torch.allclose(compiled(*arguments), block(*arguments), atol=1e-6)


class Context:
    """What an autograd function gives its passes."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def test_steps_of_ring_attention():
    """Parts of the keys, merged as diffusers merges them, and gradients of the whole."""
    q, k, v = qkv(seqlens=(20, 40))
    ctx, parts = Context(), []
    for i, part in enumerate((slice(0, 20), slice(20, 40))):
        arguments = (q, k[:, part], v[:, part], None, 0.0, False, None, False, True)
        options = {"_save_ctx": i == 0, "attention": integration.exact}
        parts.append(integration.forward_op(ctx, *arguments, **options))
    (out, lse), (other, other_lse) = parts
    weight = torch.sigmoid(other_lse - lse)[..., None]
    out, lse = out - weight * (out - other), torch.logaddexp(lse, other_lse)
    exact = Attention(q, k, v, 0.25, False)
    assert (out - exact.out).abs().max() < 1e-5
    assert (lse.transpose(1, 2) - exact.lse).abs().max() < 1e-5

    grad_out = torch.randn_like(out)
    first = integration.backward_op(ctx, grad_out, query=q, out=out, lse=lse)
    second = integration.backward_op(
        ctx, grad_out, query=q, key=k[:, 20:], value=v[:, 20:], out=out, lse=lse
    )
    grads = (first[0] + second[0], *map(torch.cat, zip(first[1:], second[1:], strict=True), (1, 1)))
    for grad, (right, _) in zip(grads, exact.gradients(grad_out), strict=True):
        assert (grad - right).abs().max() < 1e-4


def parallel(ring, ulysses):
    degrees = types.SimpleNamespace(ring_degree=ring, ulysses_degree=ulysses)
    return types.SimpleNamespace(context_parallel_config=degrees)


@pytest.fixture
def in_parallel(monkeypatch):
    """The calls of diffusers' context parallelism, which needs processes."""
    calls = []

    def templated(query, key, value, *options, forward_op, backward_op, _parallel_config):
        calls.append((options, forward_op, backward_op))
        return query

    monkeypatch.setattr(dispatch, "_templated_context_parallel_attention", templated)
    return calls


def test_context_parallelism(in_parallel, registered):
    q, k, v = qkv()
    for backend in NAMES:
        assert BACKENDS(backend).value in REGISTRY._supports_context_parallel
        assert attend(q, k, v, scale=0.5, parallel_config=parallel(1, 2), backend=backend) is q
    assert [options for options, *_ in in_parallel] == [(None, 0.0, False, 0.5, False, False)] * 2
    attend(q, k, v, parallel_config=parallel(2, 1))
    with pytest.raises(NotImplementedError, match="cute_kernels_fp8 has no ring attention"):
        attend(q, k, v, parallel_config=parallel(2, 1), backend=integration.NAME_FP8)
    ctx = Context()
    out = in_parallel[1][1](ctx, q, k, v, None, 0.0, False, None, False, False)
    assert torch.equal(out, flash_attn_fp8_func(q, k, v))
    with pytest.raises(NotImplementedError, match="cute_kernels_fp8 has no gradient"):
        in_parallel[1][2](ctx, out)


def test_8_bits_have_no_gradient(registered):
    q, k, v = qkv()
    with pytest.raises(NotImplementedError):
        attend(q.requires_grad_(), k, v, backend=integration.NAME_FP8)


def state():
    """What `register` changes."""
    tables = ("_backends", "_constraints", "_supported_arg_names", "_supports_context_parallel")
    copies = [type(getattr(REGISTRY, name))(getattr(REGISTRY, name)) for name in tables]
    return list(BACKENDS), dict(vars(BACKENDS)), len(BACKENDS), REGISTRY._active_backend, copies


def test_registration_is_undone():
    before = state()
    members = dict(BACKENDS._member_map_), dict(BACKENDS._value2member_map_)
    for _ in range(2):
        integration.register()
        integration.register()
        assert [x.value for x in BACKENDS][-2:] == NAMES and len(BACKENDS) == before[2] + 2
        ours = BACKENDS(integration.NAME)
        assert BACKENDS["CUTE_KERNELS"] is ours is BACKENDS.CUTE_KERNELS
        assert ours == "cute_kernels" and ours in BACKENDS and ours.name == "CUTE_KERNELS"
        with dispatch.attention_backend(integration.NAME_FP8):
            assert REGISTRY._active_backend is BACKENDS(integration.NAME_FP8)
        REGISTRY._active_backend = ours
        integration.unregister()
        integration.unregister()
        assert state() == before
        assert (dict(BACKENDS._member_map_), dict(BACKENDS._value2member_map_)) == members
        with pytest.raises(ValueError, match="cute_kernels"):
            BACKENDS(integration.NAME)


def test_a_backend_chosen_later_stays():
    integration.register()
    REGISTRY._active_backend = BACKENDS.FLEX
    integration.unregister()
    assert REGISTRY._active_backend is BACKENDS.FLEX
    REGISTRY._active_backend = BACKENDS.NATIVE


def test_a_diffusers_without_a_registry_is_named(monkeypatch):
    monkeypatch.delattr(dispatch, "_AttentionBackendRegistry")
    with pytest.raises(RuntimeError, match="diffusers has no registry of attention backends"):
        integration.register()


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models.attention_dispatch", None)
    with pytest.raises(ImportError, match="diffusers"):
        integration.register()


def test_the_exact_backend_is_flash_attn_func(registered):
    q, k, v = qkv()
    assert torch.equal(attend(q, k, v), flash_attn_func(q, k, v))
