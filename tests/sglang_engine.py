"""SGLang's package, where it is installed."""

import functools
import random
import sys
import types

import pytest
import torch

E4M3 = torch.float8_e4m3fn


def loaded():
    """A fixture: the plugin is loaded as SGLang's own processes do."""
    if not torch.cuda.is_available():  # its kernels do not load, and are not needed
        kernels = types.ModuleType("sgl_kernel")
        kernels.merge_state_v2 = None
        kernels.flash_attn = attention = types.ModuleType("sgl_kernel.flash_attn")
        for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata"):
            setattr(attention, name, None)
        sys.modules.setdefault("sgl_kernel", kernels)
        sys.modules.setdefault("sgl_kernel.flash_attn", attention)
    plugins = pytest.importorskip("sglang.srt.plugins", reason="needs SGLang 0.5.23 or newer")
    from cute_kernels.integrations.sglang import register, unregister

    plugins.load_plugins()
    register()  # SGLang loads plugins once a process
    yield
    unregister()


def configure(monkeypatch):
    """Sets what SGLang's server would have set, of what the backend asks for."""
    from sglang.srt.layers.attention import flashattention_backend as module

    values = {
        "get_parallel": {
            "attn_cp_size": 1,
            "attn_tp_size": 1,
            "enable_prefill_cp": False,
            "attn_dp_enabled": False,
        },
        "get_spec": {
            "speculative_eagle_topk": 0,
            "speculative_num_draft_tokens": None,
            "speculative_algorithm": None,
        },
        "get_exec": {"deterministic": types.SimpleNamespace(enable_deterministic_inference=False)},
        "get_model": {"is_embedding": False},
        "get_schedule": {"chunked_prefill_size": 8192, "disable_chunked_prefix_cache": False},
        "get_memory": {"disable_radix_cache": False},
    }
    for name, of_name in values.items():
        answer = types.SimpleNamespace(**of_name)
        monkeypatch.setattr(module, name, functools.partial(lambda x: x, answer))
    monkeypatch.setattr(module, "get_device_capability", lambda: (9, 0))


def make_runner(page_size, key_heads=2, dtype=torch.bfloat16, **changed):
    """What the backend reads of SGLang's model runner, with its own pools."""
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

    config = types.SimpleNamespace(
        is_encoder_decoder=False,
        context_len=256,
        attention_arch=AttentionArch.MHA,
        is_local_attention_model=False,
        head_dim=64,
        hf_text_config=types.SimpleNamespace(num_attention_heads=4),
        get_num_kv_heads=lambda _: key_heads,
    )
    pool = MHATokenToKVPool(1024, page_size, dtype, key_heads, 64, 2, "cpu", False)
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.view(dtype).fill_(torch.nan)
    return types.SimpleNamespace(
        **{
            "use_mla_backend": False,
            "sliding_window_size": None,
            "model_config": config,
            "device": "cpu",
            "req_to_token_pool": ReqToTokenPool(8, 256, "cpu", False),
            "token_to_kv_pool": pool,
            "kv_cache_dtype": dtype,
            "kv_cache_dtype_str": "fp8_e4m3" if dtype == E4M3 else "auto",
            "page_size": page_size,
            "kv_index_translator": types.SimpleNamespace(is_translating=False),
            "is_draft_worker": False,
            **changed,
        }
    )


def make_batch(runner, queries, keys):
    """SGLang's batch of requests that have places in a runner's pools, and the slots of each one's
    tokens."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    chance, size = random.Random(len(keys)), runner.page_size
    pages = iter(chance.sample(range(1, 1024 // size), 1024 // size - 1))
    indices, slots = torch.arange(1, len(keys) + 1), []
    for i, key in enumerate(keys):
        own = torch.tensor([next(pages) for _ in range(-(-key // size))])
        rows = torch.arange(key)
        slots.append(own[rows // size] * size + rows % size)
        runner.req_to_token_pool.req_to_token[indices[i], :key] = slots[i].int()
    decode = all(query == 1 for query in queries)
    lengths, extended = torch.tensor(keys), torch.tensor(queries)
    old = [key - query for query, key in zip(queries, keys, strict=True)]
    batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        batch_size=len(keys),
        input_ids=torch.zeros(sum(queries), dtype=torch.int64),
        req_pool_indices=indices,
        seq_lens=lengths,
        out_cache_loc=torch.cat([x[n:] for x, n in zip(slots, old, strict=True)]),
        seq_lens_sum=sum(keys),
        seq_lens_cpu=lengths,
        extend_num_tokens=sum(queries),
        extend_seq_lens=extended,
        extend_prefix_lens=lengths - extended,
        extend_seq_lens_cpu=queries,
        extend_prefix_lens_cpu=old,
    )
    return batch, slots
