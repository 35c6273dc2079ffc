"""vLLM's backend of latent attention: selectors, metadata builder and layers, with the real package
where it is installed; the calls that it makes, recorded, everywhere.

    CUTE_KERNELS_RECORD=1 python -m pytest tests/test_integrations_vllm_latent.py   records them
"""

import random
import types

import engine_calls
import pytest
import torch
import vllm_engine
from engine_calls import assert_replayed

RECORDED = engine_calls.load("vllm_latent")
HEADS, LATENT, NOPE, ROPE, V = 16, 512, 128, 64, 128
BLOCK = 16


@pytest.mark.parametrize("call", RECORDED, ids=range(len(RECORDED)))
def test_recorded_calls(device, call):
    assert_replayed(call, device)


@pytest.fixture(scope="module")
def vllm():
    yield from vllm_engine.loaded()


@pytest.fixture(scope="module")
def recorded():
    yield from engine_calls.recorded("vllm_latent", "vllm")


def test_the_selector_takes_the_backend_or_says_why_not(vllm):
    from vllm.v1.attention.selector import AttentionSelectorConfig

    fits = AttentionSelectorConfig(576, torch.bfloat16, "auto", 64, use_mla=True)
    taken = [
        {},
        {"dtype": torch.float16, "head_size": 320, "block_size": None},
        {"kv_cache_dtype": "bfloat16", "block_size": 16},
        {"use_non_causal": True},
        {"use_dcp": True},
    ]
    refused = [
        ({"head_size": 512}, "head_size"),
        ({"dtype": torch.float32}, "dtype"),
        ({"kv_cache_dtype": "fp8"}, "there is no latent attention to caches of fp8 yet"),
        ({"kv_cache_dtype": "fp8_ds_mla"}, "no latent attention to caches of fp8_ds_mla yet"),
        ({"block_size": 8}, "block_size"),
        ({"use_mla": False}, "non-MLA"),
        ({"use_sparse": True}, "sparse"),
        ({"use_pcp": True}, "PCP"),
        ({"has_sliding_window": True}, "sliding window"),
        ({"use_batch_invariant": True}, "batch invariance"),
    ]
    vllm_engine.assert_selected(
        "CUTE_KERNELS_MLA", "latent.CuteKernelsMLABackend", fits, taken, refused
    )


def test_prompts_have_a_backend_of_their_own(vllm, monkeypatch):
    from vllm import platforms
    from vllm.config.attention import AttentionConfig
    from vllm.v1.attention.backends.mla.prefill import get_mla_prefill_backend

    from cute_kernels.integrations.vllm.latent import CuteKernelsMLAPrefill

    monkeypatch.setattr(platforms, "_current_platform", vllm_engine.hopper()())
    sizes = {"qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": V}
    model = types.SimpleNamespace(
        dtype=torch.bfloat16, hf_text_config=types.SimpleNamespace(**sizes)
    )
    attention = AttentionConfig(mla_prefill_backend="CUTE_KERNELS")
    config = types.SimpleNamespace(model_config=model, attention_config=attention)
    assert get_mla_prefill_backend(config) is CuteKernelsMLAPrefill
    model.hf_text_config.qk_nope_head_dim = 256
    with pytest.raises(ValueError, match=r"CUTE_KERNELS is not valid.*MLA dimensions"):
        get_mla_prefill_backend(config)


class Projection(torch.nn.Linear):
    """vLLM's layers return a bias too."""

    quant_method = None

    def forward(self, x):
        return super().forward(x), None


@pytest.fixture
def config(vllm):
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config

    config = VllmConfig(device_config=DeviceConfig("cpu"))
    config.model_config = types.SimpleNamespace(
        dtype=None,
        max_model_len=256,
        get_head_size=lambda: LATENT + ROPE,
        get_num_attention_heads=lambda _: HEADS,
    )
    config.cache_config.block_size = BLOCK
    before = torch.get_default_dtype()
    with set_current_vllm_config(config):
        yield config
    torch.set_default_dtype(before)


def make_layer(config, dtype, **options):
    """A layer of vLLM's, with weights, and the builder of its metadata."""
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    from cute_kernels.integrations.vllm import latent

    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    config.model_config.dtype = dtype
    layer = MLAAttention(
        num_heads=HEADS,
        scale=(NOPE + ROPE) ** -0.5,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=V,
        q_lora_rank=None,
        kv_lora_rank=LATENT,
        kv_b_proj=Projection(LATENT, HEADS * (NOPE + V), bias=False),
        attn_backend=latent.CuteKernelsMLABackend,
        prefill_backend_cls=latent.CuteKernelsMLAPrefill,
        prefix="layers.0",
        **options,
    )
    layer.process_weights_after_loading(dtype)
    spec = layer.get_kv_cache_spec(config)
    builder = layer.attn_backend.get_builder_cls()(spec, ["layers.0"], config, "cpu")
    return layer, builder


class Batch:
    """Requests' tokens, their metadata as vLLM's builder gets it, and a cache that has the tokens
    before them."""

    def __init__(self, chance, dtype, queries, keys, layout, causal=True):
        from vllm.v1.attention.backend import CommonAttentionMetadata
        from vllm.v1.kv_cache_layout import KVCacheLayout

        generator = torch.Generator().manual_seed(chance.randrange(2**31))

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

        self.queries, self.keys, self.causal = queries, keys, causal
        requests, tokens = len(queries), sum(queries)
        self.q = normal(tokens, HEADS, NOPE + ROPE)
        self.rows = [normal(n, LATENT + ROPE) for n in keys]
        blocks = 256 // BLOCK
        chosen = chance.sample(range(1, requests * blocks + 1), requests * blocks)
        table = torch.tensor(chosen, dtype=torch.int32).view(requests, blocks)
        slots = [
            table[i, j // BLOCK] * BLOCK + j % BLOCK
            for i in range(requests)
            for j in range(keys[i] - queries[i], keys[i])
        ]
        starts = torch.tensor([0, *queries]).cumsum(0).int()
        lengths = torch.tensor(keys, dtype=torch.int32)
        self.common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=requests,
            num_actual_tokens=tokens,
            max_query_len=max(queries),
            max_seq_len=max(keys),
            block_table_tensor=table,
            slot_mapping=torch.tensor(slots),
            causal=causal,
        )
        # Of two layers: this is the second.
        logical = (2, requests * blocks + 1, 1, BLOCK, LATENT + ROPE)
        order = KVCacheLayout[layout].stride_order
        whole = torch.full([logical[i] for i in order], torch.nan, dtype=dtype)
        self.kv_cache = whole.permute([order.index(i) for i in range(5)])[1]
        for i, (query, key) in enumerate(zip(queries, keys, strict=True)):
            old = torch.arange(key - query)  # those of this batch are written by the layer
            place = table[i, old // BLOCK].long(), old % BLOCK
            self.kv_cache[:, 0][place] = self.rows[i][: key - query]

    def new(self):
        ends = zip(self.rows, self.queries, strict=True)
        return torch.cat([x[len(x) - query :] for x, query in ends])

    def right(self, projection, scale):
        """By the definition, in fp64: keys and values are projections of latents."""
        weight, done, first = projection.weight.detach().double(), [], 0
        for rows, query in zip(self.rows, self.queries, strict=True):
            latents, rope = rows.double().split([LATENT, ROPE], -1)
            nope, v = (latents @ weight.T).view(-1, HEADS, NOPE + V).split([NOPE, V], -1)
            k = torch.cat([nope, rope[:, None].expand(-1, HEADS, -1)], -1)
            q = self.q[first : first + query].double()
            scores = scale * torch.einsum("qhd,khd->hqk", q, k)
            if self.causal:
                hidden = torch.ones(query, len(rows)).triu(len(rows) - query + 1).bool()
                scores.masked_fill_(hidden, -torch.inf)
            done.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
            first += query
        return torch.cat(done).flatten(1)


def write_to_slots(latents, ropes, cache, slot_mapping, kv_cache_dtype, scale, skip_scale):
    """What vLLM's kernel of this purpose does, which is not there on the CPU."""
    for latent, rope, slot in zip(latents, ropes, slot_mapping.tolist(), strict=True):
        cache[slot // BLOCK, slot % BLOCK] = torch.cat([latent, rope])


def gather(src_cache, dst, block_table, cu_seq_lens, token_to_seq, num_tokens, seq_starts, **_):
    """Likewise, of tokens before a prompt's."""
    for row in range(num_tokens):
        i = int(token_to_seq[row])
        j = int(row - cu_seq_lens[i] + seq_starts[i])
        dst[row] = src_cache[block_table[i, j // BLOCK], j % BLOCK]


def merge(output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None):
    """Likewise, of two parts of keys."""
    lse = torch.logaddexp(prefix_lse, suffix_lse)
    parts = ((prefix_output, prefix_lse), (suffix_output, suffix_lse))
    output.copy_(sum((of_part - lse).exp().T[..., None] * out for out, of_part in parts))
    if output_lse is not None:
        output_lse.copy_(lse)


BATCHES = {  # queries and keys of each request; those with more than 128 queries come last
    "decode": ([1, 1, 1, 1], [1, 63, 64, 200]),
    "speculative": ([4, 4, 4], [50, 4, 129]),
    "short prompts": ([1, 40, 1, 7], [90, 40, 17, 130]),
    "padded": ([1, 1, 0, 0], [70, 16, 0, 0]),
    "prompts": ([129, 140], [129, 140]),
    "mixed": ([1, 7, 130, 150], [90, 30, 130, 230]),
}
CASES = [(batch, "LBNHC") for batch in BATCHES] + [("mixed", "BLNHC"), ("decode", "LBHNC")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "layout"), CASES)
def test_a_layer(config, recorded, monkeypatch, batch, layout, dtype):
    assert_layer_right(config, recorded, monkeypatch, dtype, *BATCHES[batch], layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_not_causal(config, recorded, monkeypatch, dtype):
    """A diffusion model's drafts see one another."""
    queries, keys = BATCHES["speculative"]
    given = (config, recorded, monkeypatch, dtype, queries, keys, "LBNHC")
    assert_layer_right(*given, causal=False, non_causal_multi_token_decode=True)


def assert_layer_right(
    config, recorded, monkeypatch, dtype, queries, keys, layout, causal=True, **options
):
    from vllm import _custom_ops
    from vllm.model_executor.layers.attention import mla_attention
    from vllm.utils import torch_utils

    from cute_kernels.integrations.vllm import latent

    monkeypatch.setattr(_custom_ops, "concat_and_cache_mla", write_to_slots)
    monkeypatch.setattr(_custom_ops, "gather_and_maybe_dequant_cache", gather)
    monkeypatch.setattr(mla_attention, "merge_attn_states", merge)
    for module in (mla_attention, torch_utils):
        monkeypatch.setattr(module, "PIN_MEMORY", False)
    calls = engine_calls.record(latent, monkeypatch)
    layer, builder = make_layer(config, dtype, **options)
    problem = Batch(random.Random(f"{queries} {layout}"), dtype, queries, keys, layout, causal)
    metadata = builder.build(0, problem.common)
    layer.bind_kv_cache(problem.kv_cache)
    output = torch.full((sum(queries), HEADS * V), torch.nan)
    latents, ropes = problem.new().split([LATENT, ROPE], -1)
    with torch.inference_mode():
        cache = layer.kv_cache
        layer.update_kv_cache(
            *(latents, ropes[:, None], cache, metadata.slot_mapping, metadata),
            *(layer.kv_cache_dtype, layer._k_scale),
        )
        layer.forward_impl(problem.q, latents, ropes[:, None], cache, metadata, output)
    prompts = [(q, k) for q, k in zip(queries, keys, strict=True) if q > 128]
    assert len(calls) == (len(prompts) < len(queries)) + bool(prompts) + any(
        q < k for q, k in prompts
    )
    if dtype == torch.bfloat16:
        recorded.extend(calls)
    right = problem.right(layer.kv_b_proj, layer.scale)
    # In bf16 the layer rounds queries' projections, outputs of latents and those of parts.
    error = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(
        output.double(), right, rtol=0, atol=error * float(right.abs().max())
    )


def test_ranks_have_parts_of_the_keys(config, monkeypatch):
    """Their outputs merge by the LSE that vLLM asks for: rank r of 2 has keys r, r + 2, ..."""
    layer, builder = make_layer(config, torch.float32)
    queries, keys = BATCHES["decode"]
    problem = Batch(random.Random(0), torch.float32, queries, keys, "LBNHC")
    metadata = builder.build(0, problem.common)
    q = torch.randn(4, HEADS, LATENT + ROPE)
    cache = torch.full((4 * 16, BLOCK, LATENT + ROPE), torch.nan)
    metadata.decode.block_table = torch.arange(4 * 16, dtype=torch.int32).view(4, 16)

    def attend(rank, of_ranks):
        of_requests = [rows[rank::of_ranks] for rows in problem.rows]
        for i, rows in enumerate(of_requests):
            cache[16 * i : 16 * (i + 1)].flatten(0, 1)[: len(rows)] = rows
        metadata.decode.seq_lens = torch.tensor([*map(len, of_requests)], dtype=torch.int32)
        return layer.impl.forward_mqa(q, cache, metadata, layer)

    right, no_lse = attend(0, 1)
    assert no_lse is None
    layer.impl.need_to_return_lse_for_decode = True
    parts = [attend(rank, 2) for rank in range(2)]
    found = torch.empty_like(right)
    outs, lses = zip(*parts, strict=True)
    assert all(lse.shape == (4, HEADS) for lse in lses)
    assert lses[1][0].isneginf().all()  # that request has one key
    merge(found, outs[0], lses[0].T, outs[1], lses[1].T)
    torch.testing.assert_close(found, right)


def test_what_the_backend_lacks_is_refused(config):
    impl = make_layer(config, torch.bfloat16)[0].attn_backend.get_impl_cls()
    given = {"kv_cache_dtype": "auto", "attn_type": "decoder"}
    for changed, message in (
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is 'fp8', must be one of"),
        ({"attn_type": "encoder"}, "attn_type is 'encoder'"),
        ({"sliding_window": 24}, "sliding_window is given: choose another backend"),
        ({"logits_soft_cap": 5.0}, "logits_soft_cap is given"),
    ):
        with pytest.raises(NotImplementedError, match=f"CUTE_KERNELS_MLA: {message}"):
            impl(**{**given, **changed})
