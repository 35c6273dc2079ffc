"""The integration with transformers: tiny models of many architectures, against "eager"."""

import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from parity import skip_unless_answered
from torch._dynamo.testing import CompileCounterWithBackend

tiny = pytest.importorskip("tiny_models", reason="needs transformers 5 or newer")
transformers = tiny.transformers
from transformers.masking_utils import (  # noqa: E402
    AttentionMaskInterface,
    causal_mask_function,
)

from cute_kernels.cache import flash_attn_with_kvcache  # noqa: E402
from cute_kernels.integrations.transformers import (  # noqa: E402
    attention,
    fallback,
    masks,
    register,
    unregister,
)
from cute_kernels.interface import flash_attn_func  # noqa: E402

pytestmark = pytest.mark.usefixtures("in_transformers")

NAME = "cute_kernels"
SEQLEN = 23
POSITIONS = torch.cat([torch.arange(n) for n in (9, 3, 11)])[None].expand(3, -1)
HOLES = torch.ones(3, SEQLEN, dtype=torch.long)
HOLES[1, 4:8] = 0


def left_padding():
    return tiny.padding([18, 23, 12], SEQLEN, "left")


def right_padding():
    return tiny.padding([18, 23, 1], SEQLEN, "right")


BATCHES = {
    "dense": {},
    "ones": {"attention_mask": torch.ones(3, SEQLEN, dtype=torch.long)},
    "left": {"attention_mask": left_padding()},
    "right": {"attention_mask": right_padding()},
    "packed": {"position_ids": POSITIONS, "use_cache": False},
}


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions that answered attention, in order."""
    names = []

    def count(module, name):
        function = getattr(module, name)

        def counted(*inputs, **keywords):
            names.append(name)
            return function(*inputs, **keywords)

        monkeypatch.setattr(module, name, counted)

    count(attention, "flash_attn_func")
    count(attention, "flash_attn_varlen_func")
    count(fallback, "sdpa_attention_forward")
    return names


def results(model, kept, call=None, **inputs):
    """What is kept of the last layer's output, and the gradients of all weights."""
    output = (model if call is None else call)(**inputs)
    output = output.logits if hasattr(output, "logits") else output.last_hidden_state
    output = output[kept].float()
    weights = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(output.sin().sum(), weights, allow_unused=True)
    return output.detach(), torch.cat([g.flatten().float() for g in grads if g is not None])


def off(found, right):
    """How far results are from right ones, of 1."""
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True)]


def kept_of(inputs):
    return inputs.get("attention_mask", torch.ones(3, SEQLEN)).bool()


def implementations(architecture):
    """What has the features that an architecture needs, beside ours."""
    return ["eager"] if architecture.needs else ["eager", "sdpa"]


def assert_as_right_as_others(architecture, **inputs):
    """In fp32 nearly the same numbers, in bf16 at most twice as far from those in fp32 as the
    others are, and one rounding step."""
    kept = kept_of(inputs)
    right = results(architecture.build("eager"), kept, **inputs)
    for error, allowed in zip(
        off(results(architecture.build(NAME), kept, **inputs), right), (5e-6, 2e-5), strict=True
    ):
        assert error <= allowed
    # bf16's rounding of weights alone is no error of attention
    rounded = architecture.build("eager", torch.bfloat16).float()
    right = results(rounded, kept, **inputs)
    found = {
        name: off(results(architecture.build(name, torch.bfloat16), kept, **inputs), right)
        for name in (NAME, *implementations(architecture))
    }
    for error, *of_others in zip(*found.values(), strict=True):
        assert error <= 2 * min(of_others) + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_decoders(name, batch):
    architecture = tiny.DECODERS[name]
    assert_as_right_as_others(architecture, input_ids=tiny.random_ids(), **BATCHES[batch])


@pytest.mark.parametrize("batch", ["dense", "left", "right"])
@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_encoders(name, batch):
    architecture = tiny.ENCODERS[name]
    assert_as_right_as_others(architecture, input_ids=tiny.random_ids(), **BATCHES[batch])


def test_vision_encoder(calls):
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(3, 10, dtype=torch.bool)
    right = results(tiny.VIT.build("eager"), kept, pixel_values=pixels)
    found = results(tiny.VIT.build(NAME), kept, pixel_values=pixels)
    assert max(off(found, right)) <= 1e-5
    assert calls == ["flash_attn_func"] * 2


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_whisper(calls, side):
    """Cross-attention; the decoder's input may be padded."""
    features = torch.randn(3, 8, 30, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": features, "decoder_input_ids": tiny.random_ids()}
    mask = tiny.padding([18, 23, 12], SEQLEN, side) if side else torch.ones(3, SEQLEN)
    inputs["decoder_attention_mask"] = mask.long()
    right = results(tiny.WHISPER.build("eager"), mask.bool(), **inputs)
    found = results(tiny.WHISPER.build(NAME), mask.bool(), **inputs)
    assert max(off(found, right)) <= 2e-5
    assert calls.count("flash_attn_varlen_func") == (2 if side else 0)
    assert len(calls) == 6 and "sdpa_attention_forward" not in calls


@pytest.mark.parametrize("seqlen", [11, 23])
def test_padded_keys_of_cross_attention_take_no_queries_with_them(calls, seqlen):
    """Also where there are as many queries as keys."""
    model, right = (
        transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=tiny.VOCABULARY,
                d_model=64,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                init_std=0.3,
                attn_implementation=name,
            )
        ).eval()
        for name in (NAME, "eager")
    )
    model.load_state_dict(right.state_dict())
    inputs = {
        "input_ids": tiny.random_ids(),
        "attention_mask": right_padding(),
        "decoder_input_ids": tiny.random_ids(seqlen=seqlen, seed=1),
    }
    kept = torch.ones(3, seqlen, dtype=torch.bool)
    assert max(off(results(model, kept, **inputs), results(right, kept, **inputs))) <= 2e-5
    assert "sdpa_attention_forward" not in calls


def test_attention_matters():
    """Or a wrong one would not be seen."""
    for name, architecture in {**tiny.DECODERS, **tiny.ENCODERS}.items():
        model, ids = architecture.build(NAME), tiny.random_ids()
        other = ids.clone()
        other[:, -4] = (ids[:, -4] + 1) % tiny.VOCABULARY
        with torch.no_grad():
            change = (model(input_ids=ids).logits - model(input_ids=other).logits)[:, -1].norm()
        assert change > 1e-3, name


@pytest.mark.parametrize(
    ("name", "batch", "expected"),
    [
        ("llama", "dense", ["flash_attn_func"] * 2),
        ("llama", "ones", ["flash_attn_func"] * 2),
        ("llama", "left", ["flash_attn_varlen_func"] * 2),
        ("mistral", "dense", ["flash_attn_func"] * 2),
        ("gemma3", "right", ["flash_attn_varlen_func"] * 2),
        ("qwen3", "packed", ["flash_attn_varlen_func"] * 2),
        ("deepseek", "dense", ["flash_attn_func"] * 2),
        ("modernbert", "dense", ["flash_attn_func"] * 2),
        ("llama4", "left", ["flash_attn_varlen_func"] * 2),
    ],
)
def test_which_function_answers(calls, name, batch, expected):
    architecture = {**tiny.DECODERS, **tiny.ENCODERS}[name]
    architecture.build(NAME)(input_ids=tiny.random_ids(), **BATCHES[batch])
    assert calls == expected


def test_packed_by_positions_of_a_cached_call(calls):
    """As FlashAttention's integration does, one sequence after the other in a batch of one row."""
    model, ids = tiny.DECODERS["mistral"].build(NAME), tiny.random_ids(1)
    found = model(input_ids=ids, position_ids=POSITIONS[:1]).logits
    assert calls == ["flash_attn_varlen_func"] * 2
    parts = [
        model(input_ids=ids[:, part]).logits for part in (slice(9), slice(9, 12), slice(12, 23))
    ]
    torch.testing.assert_close(found, torch.cat(parts, dim=1), atol=1e-5, rtol=1e-5)
    calls.clear()
    model(input_ids=ids, position_ids=torch.arange(SEQLEN)[None])
    assert calls == ["flash_attn_func"] * 2


def test_packed_by_arguments(calls):
    ids = tiny.random_ids(1)
    model = tiny.DECODERS["llama"].build(NAME)
    ends = torch.tensor([0, 9, 12, 23])
    found = model(
        input_ids=ids,
        position_ids=POSITIONS[:1],
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=11,
        max_length_k=11,
    ).logits
    assert calls == ["flash_attn_varlen_func"] * 2
    right = tiny.DECODERS["llama"].build("eager")
    expected = right(input_ids=ids, position_ids=POSITIONS[:1], use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [HOLES, None], ids=["holes", "user's"])
def test_other_masks_fall_back_with_one_warning(calls, mask):
    """With holes, or of four dimensions."""
    ids = tiny.random_ids()
    if mask is None:
        chance = torch.rand(3, 1, SEQLEN, SEQLEN, generator=torch.Generator().manual_seed(0))
        mask = (chance < 0.5) | torch.eye(SEQLEN, dtype=torch.bool)
    kept = mask.bool() if mask.dim() == 2 else torch.ones(3, SEQLEN, dtype=torch.bool)
    sdpa = results(tiny.DECODERS["mistral"].build("sdpa"), kept, input_ids=ids, attention_mask=mask)
    model = tiny.DECODERS["mistral"].build(NAME)
    with pytest.warns(UserWarning, match="mask is not one of padding") as caught:
        found = results(model, kept, input_ids=ids, attention_mask=mask)
    assert len([w for w in caught if "slower attention" in str(w.message)]) == 1
    assert max(off(found, sdpa)) <= 1e-6
    assert calls == ["sdpa_attention_forward"] * 2


def test_position_bias_falls_back(calls):
    inputs = {"input_ids": tiny.random_ids(), "decoder_input_ids": tiny.random_ids(seed=1)}
    kept = torch.ones(3, SEQLEN, dtype=torch.bool)
    for mask in ({}, {"attention_mask": left_padding(), "decoder_attention_mask": right_padding()}):
        kept = mask.get("decoder_attention_mask", kept).bool()
        right = results(tiny.T5.build("eager"), kept, **inputs, **mask)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = results(tiny.T5.build(NAME), kept, **inputs, **mask)
        assert max(off(found, right)) <= 1e-5
    assert "sdpa_attention_forward" in calls


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_softcap_and_sinks_are_the_layers_own(monkeypatch, name):
    asked = []

    def kernel(q, k, v, **options):
        asked.append(options)
        return flash_attn_func(q, k, v, **options)

    monkeypatch.setattr(attention, "flash_attn_func", kernel)
    model = tiny.DECODERS[name].build(NAME)
    model(input_ids=tiny.random_ids())
    if name == "gemma2":
        assert {options["softcap"] for options in asked} == {2.0}
    else:
        for layer, options in zip(model.model.layers, asked, strict=True):
            assert torch.equal(options["sinks"], layer.self_attn.sinks)
    assert [options.get("window_size") for options in asked] == [(6, 0), None]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("batch", ["dense", "left", "packed"])
def test_fallback_with_softcap_and_sinks(monkeypatch, name, batch):
    """PyTorch's attention has neither: the model's own answers."""
    monkeypatch.setattr(attention, "unsupported", lambda *_: "nothing goes")
    inputs = {"input_ids": tiny.random_ids(), **BATCHES[batch]}
    kept = kept_of(inputs)
    right = results(tiny.DECODERS[name].build("eager"), kept, **inputs)
    with pytest.warns(UserWarning, match="nothing goes"):
        found = results(tiny.DECODERS[name].build(NAME), kept, **inputs)
    assert max(off(found, right)) <= 1e-6


def test_dropout_is_refused():
    config = transformers.LlamaConfig(**tiny.DECODER, attention_dropout=0.1)
    model = transformers.LlamaForCausalLM(config)
    model.set_attn_implementation(NAME)
    model.eval()(input_ids=tiny.random_ids())
    with pytest.raises(NotImplementedError, match=r"dropout is 0\.1.*variants\.dropout"):
        model.train()(input_ids=tiny.random_ids())


GENERATIONS = list(itertools.product(["llama", "mistral"], [None, "static"], [None, "left"]))
GENERATIONS += [(name, None, "left") for name in tiny.DECODERS if name not in ("llama", "mistral")]
GENERATIONS += [("gemma3", "static", "left")]


@pytest.mark.parametrize(("name", "cache", "side"), GENERATIONS)
def test_greedy_tokens(name, cache, side):
    mask = left_padding() if side else torch.ones(3, SEQLEN, dtype=torch.long)
    options = {"max_new_tokens": 9, "do_sample": False}
    if cache is not None:
        options["cache_implementation"] = cache
    tokens = [
        tiny.DECODERS[name]
        .build(implementation)
        .generate(tiny.random_ids(), attention_mask=mask, **options)
        for implementation in ("eager", NAME)
    ]
    assert torch.equal(*tokens)
    assert tokens[0].shape == (3, SEQLEN + 9)


@pytest.mark.parametrize(("name", "option"), [("gemma2", "softcap"), ("gpt_oss", "sinks")])
def test_a_steps_softcap_and_sinks_go_to_the_attention_of_caches(monkeypatch, name, option):
    asked = []

    def with_kvcache(q, *caches, **options):
        asked.append(options)
        return flash_attn_with_kvcache(q, *caches, **options)

    monkeypatch.setattr(attention, "flash_attn_with_kvcache", with_kvcache)
    options = {"max_new_tokens": 4, "do_sample": False}
    tokens = [
        tiny.DECODERS[name].build(implementation).generate(tiny.random_ids(), **options)
        for implementation in ("eager", NAME)
    ]
    assert torch.equal(*tokens)
    assert [option in options for options in asked] == [True] * 6  # of two layers, three steps
    assert {options.get("softcap") for options in asked} == {2.0 if name == "gemma2" else None}


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("side", [None, "left"])
def test_single_queries_go_to_the_attention_of_caches(monkeypatch, calls, cache, side):
    """Keys stay where they are, whatever their strides: sequences by where they start and stop."""
    lengths = []

    def with_kvcache(q, k, v, cache_leftpad, cache_seqlens, causal, softmax_scale):
        assert q.shape[:2] == (3, 1) and not k.requires_grad
        stops = cache_seqlens.tolist() if isinstance(cache_seqlens, torch.Tensor) else None
        stops = [cache_seqlens] * 3 if stops is None else stops
        starts = [0] * 3 if cache_leftpad is None else cache_leftpad.tolist()
        lengths.append([b - a for a, b in zip(starts, stops, strict=True)])
        options = {"causal": causal, "softmax_scale": softmax_scale}
        one_by_one = [
            flash_attn_func(q[i : i + 1], k[i : i + 1, a:b], v[i : i + 1, a:b], **options)
            for i, (a, b) in enumerate(zip(starts, stops, strict=True))
        ]
        return torch.cat(one_by_one)

    monkeypatch.setattr(attention, "flash_attn_with_kvcache", with_kvcache)
    mask = left_padding() if side else torch.ones(3, SEQLEN, dtype=torch.long)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    if cache is not None:
        options["cache_implementation"] = cache
    tokens = [
        tiny.DECODERS["llama"].build(name).generate(tiny.random_ids(), **options)
        for name in ("eager", NAME)
    ]
    assert torch.equal(*tokens)
    assert len(calls) == 2  # of two layers, for the prompt
    prompt = mask.sum(1)
    expected = [(prompt + i).tolist() for i in range(1, 6) for _ in range(2)]
    assert lengths == expected


def test_tokens_without_a_cache_are_the_same():
    model = tiny.DECODERS["mistral"].build(NAME)
    options = {"attention_mask": left_padding(), "max_new_tokens": 5, "do_sample": False}
    cached, plain = (
        model.generate(tiny.random_ids(), use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


def test_chunks_of_a_prompt(calls):
    """More queries than one after others: bottom-right aligned."""
    model = tiny.DECODERS["mistral"].build(NAME)
    ids, mask = tiny.random_ids(), left_padding()
    whole = model(input_ids=ids, attention_mask=mask).logits
    cache = model(input_ids=ids[:, :15], attention_mask=mask[:, :15]).cache
    rest = model(input_ids=ids[:, 15:], attention_mask=mask, cache=cache).logits
    kept = mask[:, 15:].bool()
    torch.testing.assert_close(rest[kept], whole[:, 15:][kept], atol=1e-5, rtol=1e-5)
    assert set(calls) == {"flash_attn_varlen_func"}


@pytest.mark.parametrize("batch", ["dense", "left", "packed"])
def test_gradient_checkpointing(batch):
    architecture, ids = tiny.DECODERS["mistral"], tiny.random_ids()
    inputs = {"input_ids": ids, **BATCHES[batch], "use_cache": False}
    right = results(architecture.build("eager"), kept_of(inputs), **inputs)
    model = architecture.build(NAME).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert max(off(results(model, kept_of(inputs), **inputs), right)) <= 2e-5


def test_norms_in_float32_do_not_widen_attention(calls):
    """As they are left by adapters: only values are in 16 bits then."""
    model = tiny.DECODERS["qwen3"].build(NAME, torch.bfloat16)
    expected = model(input_ids=tiny.random_ids()).logits
    for layer in model.model.layers:
        layer.self_attn.q_norm.float()
        layer.self_attn.k_norm.float()
    found = model(input_ids=tiny.random_ids()).logits
    assert found.dtype == torch.bfloat16
    assert ((found - expected).norm() / expected.norm()).item() < 0.03
    assert calls == ["flash_attn_func"] * 4


def test_autocast(calls):
    ids, kept = tiny.random_ids(), torch.ones(3, SEQLEN, dtype=torch.bool)
    found = {}
    for name in (NAME, "sdpa"):
        model = tiny.DECODERS["llama"].build(name)
        with torch.autocast("cpu", torch.bfloat16):
            found[name] = results(model, kept, input_ids=ids)
    right = results(tiny.DECODERS["llama"].build("eager"), kept, input_ids=ids)
    for error, of_sdpa in zip(*(off(x, right) for x in found.values()), strict=True):
        assert error <= 2 * of_sdpa + torch.finfo(torch.bfloat16).eps
    assert calls.count("flash_attn_func") == 2


def test_compiled_around_padding():
    """The graph breaks once, where the sequences are looked for."""
    torch._dynamo.reset()
    architecture, ids, mask = tiny.DECODERS["mistral"], tiny.random_ids(), left_padding()
    compiled = torch.compile(architecture.build(NAME), backend="eager")
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    with torch.no_grad():
        right = architecture.build("eager")(input_ids=ids, attention_mask=mask).logits
        found = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert len(breaks) == 1
    torch.testing.assert_close(found[mask.bool()], right[mask.bool()], atol=1e-5, rtol=1e-5)


def test_exported():
    """With explicit masks, as contents cannot be looked at."""
    model = tiny.DECODERS["mistral"].build(NAME).requires_grad_(False)
    inputs = {"input_ids": tiny.random_ids(), "use_cache": False, "attention_mask": left_padding()}
    program = torch.export.export(model, (), inputs, strict=False).module()
    kept = left_padding().bool()
    found, right = (call(**inputs).logits[kept] for call in (program, model))
    torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-5)


def test_compiled_whole_with_lengths():
    """As padding-free training has them, with gradients."""
    register(fullgraph=True)
    torch._dynamo.reset()
    architecture, kept = tiny.DECODERS["llama"], torch.ones(1, SEQLEN, dtype=torch.bool)
    ends = torch.tensor([0, 9, 12, 23])
    inputs = {"input_ids": tiny.random_ids(1), "position_ids": POSITIONS[:1], "use_cache": False}
    right = results(architecture.build("eager"), kept, **inputs)
    model = architecture.build(NAME)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = results(model, kept, compiled, **inputs, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    assert max(off(found, right)) <= 2e-5


def test_compiled_step_on_a_static_cache():
    """One graph serves all steps, without reading how far the cache is filled."""
    torch._dynamo.reset()
    model = tiny.DECODERS["llama"].build(NAME)
    ids = tiny.random_ids()
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    whole = model(input_ids=ids).logits
    with torch.no_grad():
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        model(input_ids=ids[:, :18], cache=cache)
        for i in range(18, SEQLEN):
            logits = step(input_ids=ids[:, i : i + 1], cache=cache).logits
            torch.testing.assert_close(logits[:, 0], whole[:, i], atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2


def test_meta_tensors_have_no_contents(calls):
    with torch.device("meta"):
        model = tiny.DECODERS["llama"].make()
    model.set_attn_implementation(NAME)
    ids = torch.empty(3, SEQLEN, dtype=torch.long, device="meta")
    mask = torch.ones(3, SEQLEN, dtype=torch.long, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert model(input_ids=ids, attention_mask=mask).logits.shape == (3, SEQLEN, 97)


def test_unregister_leaves_nothing_behind():
    unregister()
    unregister()
    assert NAME not in transformers.AttentionInterface._global_mapping
    assert NAME not in AttentionMaskInterface._global_mapping
    with pytest.raises(ValueError, match=NAME):
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**tiny.DECODER, attn_implementation=NAME)
        )


def test_the_package_does_not_import_transformers():
    code = "import sys, cute_kernels; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# On the GPU


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_decoders_on_a_gpu(hopper, name, batch):
    """bf16: at most twice as far from fp32 as the others."""
    skip_unless_answered(hopper, torch.bfloat16, *((192, 128) if name == "deepseek" else (64,)))
    architecture = tiny.DECODERS[name]
    inputs = {"input_ids": tiny.random_ids(), **BATCHES[batch]}
    kept = kept_of(inputs)
    right = results(architecture.build("eager", torch.bfloat16).float(), kept, **inputs)
    on_gpu = {k: x.to(hopper) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    found = {}
    for implementation in (NAME, *implementations(architecture)):
        model = architecture.build(implementation, torch.bfloat16).to(hopper)
        found[implementation] = [x.cpu() for x in results(model, kept.to(hopper), **on_gpu)]
    errors = [off(x, right) for x in found.values()]
    for error, *of_others in zip(*errors, strict=True):
        assert error <= 2 * min(of_others) + torch.finfo(torch.bfloat16).eps


def test_fp32_on_a_gpu_falls_back(hopper, calls):
    model = tiny.DECODERS["llama"].build(NAME).to(hopper)
    with pytest.warns(UserWarning, match="no float32 on cuda"):
        model(input_ids=tiny.random_ids().to(hopper))
    assert calls == ["sdpa_attention_forward"] * 2


def test_a_step_on_a_static_cache_does_not_wait(hopper):
    skip_unless_answered(hopper, torch.bfloat16)
    layer = torch.nn.Module()
    layer.is_causal = True
    q, k, v = (
        torch.randn(3, heads, seqlen, 64, device=hopper, dtype=torch.bfloat16)
        for heads, seqlen in ((4, 1), (2, 40), (2, 40))
    )
    filled = torch.tensor(18, device=hopper)

    def step():
        mask = masks.mask(3, 1, 40, filled, 0, causal_mask_function, None, device=hopper)
        return attention.attention(layer, q, k, v, mask)[0]

    first = step()  # loads what is waited for
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = flash_attn_func(*(x.transpose(1, 2) for x in (q, k[:, :, :19], v[:, :, :19])))
    for found in (first, second):
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_on_a_gpu(hopper, cache):
    """Static caches run compiled steps."""
    options = {"max_new_tokens": 9, "do_sample": False}
    if cache is not None:
        options["cache_implementation"] = cache
    skip_unless_answered(hopper, torch.bfloat16)
    mask = left_padding().to(hopper)
    model = tiny.DECODERS["mistral"].build(NAME, torch.bfloat16).to(hopper)
    tokens = model.generate(tiny.random_ids().to(hopper), attention_mask=mask, **options)
    assert tokens.shape == (3, SEQLEN + 9)
    # Each token is one of nearly the largest logits of the model in fp32 that sees what came before
    right = tiny.DECODERS["mistral"].build("eager", torch.bfloat16).float()
    whole = torch.cat([left_padding(), torch.ones(3, 9, dtype=torch.long)], dim=1)
    logits = right(input_ids=tokens.cpu(), attention_mask=whole).logits[:, SEQLEN - 1 : -1]
    chosen = logits.gather(2, tokens.cpu()[:, SEQLEN:, None])[..., 0]
    assert (logits.amax(-1) - chosen <= 0.05 * logits.abs().amax()).all()
