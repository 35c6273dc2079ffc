"""Batches for tiny_models, what comes out of a model, how far that is from what is right."""

import tiny_models as tiny
import torch

from cute_kernels.integrations.transformers import attention, fallback

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


def noted_calls(monkeypatch):
    """A fixture: names of the functions that answered attention, in order."""
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
