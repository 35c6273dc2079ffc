"""Tiny models of transformers with random weights, in which attention matters."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

transformers = pytest.importorskip("transformers", "5", reason="needs transformers 5 or newer")

transformers.logging.set_verbosity_error()

VOCABULARY = 97
# Scores of some size: weights of the usual size make every token see the mean of the others.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
DECODER = {
    **SIZES,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
EXPERTS = {"n_group": 1, "topk_group": 1, "n_routed_experts": 2, "num_experts_per_tok": 1}


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))


def _mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**DECODER, sliding_window=7))


def _qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER))


def _gemma2():
    config = transformers.Gemma2Config(
        **DECODER, sliding_window=7, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
    )
    return transformers.Gemma2ForCausalLM(config)


def _gemma3():
    config = transformers.Gemma3TextConfig(
        **DECODER,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
    )
    return transformers.Gemma3ForCausalLM(config)


def _gpt_oss():
    config = transformers.GptOssConfig(
        **DECODER, sliding_window=7, num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.GptOssForCausalLM(config)


def _deepseek():
    """Head dims 192 and 128."""
    config = transformers.DeepseekV3Config(
        **{**DECODER, "head_dim": 64, "num_key_value_heads": 4},
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=2,
        moe_intermediate_size=32,
        **EXPERTS,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def _llama4():
    """Chunks of keys in one of the layers, which it skips no rotary embedding in."""
    config = transformers.Llama4TextConfig(
        **DECODER,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
        num_local_experts=2,
        intermediate_size_mlp=64,
        moe_layers=[],
    )
    return transformers.Llama4ForCausalLM(config)


def _bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def _modernbert():
    config = transformers.ModernBertConfig(
        **{**SIZES, "initializer_range": 0.1},
        local_attention=8,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return transformers.ModernBertForMaskedLM(config)


def _t5():
    """With a bias of its own, which the kernels lack."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config)


def _vit():
    config = transformers.ViTConfig(
        **{k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")},
        image_size=24,
        patch_size=8,
    )
    return transformers.ViTModel(config)


def _whisper():
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=15,
        max_target_positions=64,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


@dataclasses.dataclass(frozen=True)
class Architecture:
    make: Callable
    needs: str | None = None  # of what no implementation but "eager" has

    def build(self, attention, dtype=torch.float32, seed=0):
        """A model of the same weights for each implementation of attention."""
        torch.manual_seed(seed)
        model = self.make().eval()
        # Biases, sinks and norms too are other than what they are made as.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        model = model.to(dtype)
        model.set_attn_implementation(attention)
        return model


DECODERS = {
    "llama": Architecture(_llama),
    "mistral": Architecture(_mistral),
    "qwen3": Architecture(_qwen3),
    "gemma2": Architecture(_gemma2, needs="softcap"),
    "gemma3": Architecture(_gemma3),
    "gpt_oss": Architecture(_gpt_oss, needs="sinks"),
    "deepseek": Architecture(_deepseek),
    "llama4": Architecture(_llama4),
}
ENCODERS = {"bert": Architecture(_bert), "modernbert": Architecture(_modernbert)}
VIT, WHISPER, T5 = Architecture(_vit), Architecture(_whisper), Architecture(_t5)


def random_ids(batch=3, seqlen=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, seqlen), generator=generator)


def padding(lengths, seqlen, side):
    """(batch, seqlen): 1 where a sequence is."""
    place = torch.arange(seqlen)[None]
    lengths = torch.tensor(lengths)[:, None]
    return (place < lengths if side == "right" else place >= seqlen - lengths).long()
