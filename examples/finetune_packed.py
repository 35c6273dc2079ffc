"""Trains a model of transformers on documents of many lengths, packed without padding.

transformers' own collator puts the documents of a batch one behind the other; with
attn_implementation="cute_kernels" each attends to itself alone, and no row is computed for nothing.
Beside it the same documents are padded for PyTorch's attention: the losses agree, the rows that are
computed do not. `--model` finetunes a model of yours instead of a tiny one with random weights.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

import torch
import transformers
from torch import Tensor

from cute_kernels.integrations.transformers import register

IGNORED = -100  # what transformers' loss leaves out
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def make_documents(count: int, seed: int) -> list[str]:
    """Counting up or down, from a line to a page of it."""
    draw = random.Random(seed)
    documents = []
    for _ in range(count):
        lines = []
        for _ in range(min(int(draw.lognormvariate(1, 1)) + 1, 40)):
            start, length = draw.randrange(7), draw.randint(2, 4)
            counted = NUMBERS[start : start + length][:: draw.choice((1, -1))]
            lines.append(" ".join(counted) + ".")
        documents.append("\n".join(lines))
    return documents


def tokenize(documents: list[str], name: str | None) -> list[list[int]]:
    """By the model's tokenizer, or into bytes."""
    if name is None:
        return [list(document.encode()) for document in documents]
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    return [tokenizer(document)["input_ids"] for document in documents]


def build(name: str | None, attention: str, device: str) -> Any:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if name is not None:
        auto = transformers.AutoModelForCausalLM
        return auto.from_pretrained(name, attn_implementation=attention, dtype=dtype).to(device)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, attn_implementation=attention)
    return transformers.LlamaForCausalLM(config).to(device, dtype)


def pack(batch: list[list[int]]) -> dict[str, Any]:
    """One row, and where each document of it begins; no label crosses from one to the next."""
    collate = transformers.DataCollatorWithFlattening(
        return_tensors="pt", return_flash_attn_kwargs=True
    )
    return dict(collate([{"input_ids": tokens} for tokens in batch]))


def pad(batch: list[list[int]]) -> dict[str, Tensor]:
    """A row for each document, as long as the longest."""
    tensors = [torch.tensor(tokens) for tokens in batch]
    padded = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": padded(tensors, batch_first=True),
        "labels": padded(tensors, batch_first=True, padding_value=IGNORED),
        "attention_mask": padded([torch.ones_like(x) for x in tensors], batch_first=True),
    }


def train(model: Any, batches: list[dict[str, Any]], device: str) -> list[float]:
    """The loss of each step, a mean over the same tokens however they are laid out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches:
        on_device = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in batch.items()}
        loss = model(**on_device, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="documents of a step")
    parser.add_argument("--model", help="a folder or a name that transformers can load")
    chosen = parser.parse_args(arguments)
    if chosen.steps < 1:
        parser.error(f"--steps is {chosen.steps}, must be at least 1")
    device = chosen.device or ("cuda" if has_hopper() else "cpu")

    register()
    documents = tokenize(make_documents(chosen.steps * chosen.batch, seed=0), chosen.model)
    groups = [documents[i : i + chosen.batch] for i in range(0, len(documents), chosen.batch)]
    curves = {}
    for name, collate in (("cute_kernels", pack), ("sdpa", pad)):
        batches = [collate(group) for group in groups]
        rows = sum(batch["input_ids"].numel() for batch in batches)
        model = build(chosen.model, name, device)
        begin = time.perf_counter()
        losses = curves[name] = train(model, batches, device)
        seconds = time.perf_counter() - begin
        layout = "packed" if collate is pack else "padded"
        print(
            f"{name:>12}, {layout}: loss {losses[0]:.4f} to {losses[-1]:.4f}, "
            f"{rows} rows, {seconds:.1f} s"
        )
    ours, other = (torch.tensor(curve) for curve in curves.values())
    apart, fell = (ours - other).abs().max().item(), (ours[0] - ours[-1]).item()
    agree = apart <= 0.05 * max(abs(fell), 0.1)
    print(f"largest distance {apart:.1e}: the losses {'agree' if agree else 'DIFFER'}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
