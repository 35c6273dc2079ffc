"""Attention on this machine's Hopper GPU, else on its CPU; checks itself against PyTorch."""

import sys
import time

import torch

from cute_kernels import flash_attn_func


def has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def plain_attention(q, k, v, causal):
    """PyTorch's own attention, which wants (batch, heads, seqlen, head_dim)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    )
    return out.transpose(1, 2)


def timed(function, device: str) -> tuple[torch.Tensor, float]:
    """The result of a second call and its time in milliseconds."""

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    function()
    wait()
    begin = time.perf_counter()
    result = function()
    wait()
    return result, (time.perf_counter() - begin) * 1e3


def main() -> int:
    device = "cuda" if has_hopper() else "cpu"
    seqlen = 4096 if device == "cuda" else 512
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU (no Hopper GPU here)"
    print(f"{name}: batch 2, {seqlen} tokens, 16 query heads, 4 key heads, head dim 128, bf16")

    torch.manual_seed(0)
    options = {"device": device, "dtype": torch.bfloat16}
    q = torch.randn(2, seqlen, 16, 128, **options)
    k = torch.randn(2, seqlen, 4, 128, **options)
    v = torch.randn(2, seqlen, 4, 128, **options)

    passed = True
    for causal in (False, True):
        (out, lse), ms = timed(
            lambda c=causal: flash_attn_func(q, k, v, causal=c, return_lse=True), device
        )
        exact = plain_attention(q.float(), k.float(), v.float(), causal)
        error = (out.float() - exact).abs().max().item()
        # The field's rule: at most twice the error of PyTorch's own attention, and one rounding.
        torch_error = (plain_attention(q, k, v, causal).float() - exact).abs().max().item()
        allowed = 2 * torch_error + exact.abs().max().item() * torch.finfo(q.dtype).eps
        right = error <= allowed
        passed &= right
        print(
            f"{'causal' if causal else 'full':>6}: out {tuple(out.shape)}, lse {tuple(lse.shape)}, "
            f"{ms:.2f} ms, largest error {error:.1e} (allowed {allowed:.1e}) "
            f"{'ok' if right else 'WRONG'}"
        )
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
