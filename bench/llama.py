"""Llama's shapes with random weights, from transformers, and the attentions to compare in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cute_kernels.integrations.transformers import register

OURS = "cute_kernels"
VARLEN = "torch_varlen"

# How the models of Llama 3 are shaped, but for the number of layers that a test may want.
SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {  # runs on a CPU
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}
VOCABULARY = 128256

_SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


def build(shape: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The same weights with each call."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"vocab_size": VOCABULARY, "rope_theta": 500000.0, **SHAPES[shape]},
        max_position_embeddings=1 << 17,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def choose(model: Any, attention: str) -> None:
    """Has a model run one of the attentions: "cute_kernels", "torch_varlen", "sdpa", or one of the
    backends of SDPA above."""
    register()
    transformers.AttentionInterface.register(VARLEN, _varlen_attention)
    name = attention.replace("flash", "fa")  # a name with "flash" is a package to transformers
    if attention in _SDPA:
        transformers.AttentionInterface.register(name, _sdpa_attention(_SDPA[attention]))
        AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def _sdpa_attention(backend: SDPBackend) -> Callable[..., tuple[Tensor, None]]:
    def attention(*inputs: Any, **options: Any) -> tuple[Tensor, None]:
        with sdpa_kernel(backend):  # in the graph, so that no other's is taken for it
            return sdpa_attention_forward(*inputs, **options)

    return attention


def _varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Packed sequences by PyTorch's own FlashAttention-2."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(q, k, v, *lengths, scale=scaling, window_size=(-1, 0))
    return out[None], None


def loss_of(model: Any) -> Callable[..., Tensor]:
    """(hidden, labels) -> the mean loss of the next token; compiled with a model's layers."""

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden[:, :-1], model.lm_head.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())

    return loss
