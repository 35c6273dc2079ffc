"""This package behind PyTorch's own attention: its flash attention operators run these kernels.

``activate()`` is all there is to do. `F.scaled_dot_product_attention` with its flash backend,
`torch.nn.attention.varlen.varlen_attn`, nested tensors, `CausalBias` and `context_parallel` all
call these operators, eagerly and compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, get_kernel
from torch.nn import attention

from cute_kernels.integrations import aten, torch_choice

NAME = "cute_kernels"

# By the name of the ATen operator. Another PyTorch may lack the last.
_ANSWERS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": aten.scaled_dot_product_flash_attention,
    "_scaled_dot_product_flash_attention_backward": (
        aten.scaled_dot_product_flash_attention_backward
    ),
    "_flash_attention_forward": aten.flash_attention_forward,
    "_flash_attention_backward": aten.flash_attention_backward,
    "_flash_attention_forward_no_dropout_inplace": aten.flash_attention_forward_no_dropout_inplace,
}

# Which implementation was active before this one; only `activate` and `deactivate` change it.
_before: str | None = None


def activate() -> None:
    """Has PyTorch's flash attention operators on CUDA run this package's kernels, in this process,
    until `deactivate` or until another implementation is activated.

    Registers the name "cute_kernels" with `torch.nn.attention`'s flash attention implementations
    and activates it, and puts SDPA's flash backend before its cuDNN backend. A call that this
    package does not answer (dropout, a dtype or head dim without a kernel, another GPU than Hopper,
    pages, ALiBi) goes on to PyTorch's own implementation. Calls on the CPU stay as they are. On a
    machine with a GPU this initialises CUDA on the current device.

    What `torch.compile` has compiled in this process keeps the backend that it chose: activate
    first, or call `torch.compiler.reset`. Its caches are told apart.

    Raises:
        RuntimeError: PyTorch is older than 2.11, whose registry can restore its own.
    """
    global _before
    if current() == NAME:
        return
    if not hasattr(attention, "restore_flash_attention_impl"):
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.nn.attention.restore_flash_attention_impl: "
            "cute_kernels.integrations.torch needs torch 2.11 or newer"
        )
    _before = current()
    attention.register_flash_attention_impl(NAME, register_fn=Overrides)
    attention.activate_flash_attention_impl(NAME)


def deactivate() -> None:
    """Undoes `activate`: the operators, the registry and the order of SDPA's backends are what they
    were, and an implementation that was active before is active again."""
    global _before
    if current() == NAME:
        attention.restore_flash_attention_impl()
        if _before is not None:
            attention.activate_flash_attention_impl(_before)
    _before = None
    torch_choice.forget_implementation(NAME)


def current() -> str | None:
    """The active implementation of flash attention, None for PyTorch's own."""
    named: Callable[[], str | None] = getattr(
        attention, "current_flash_attention_impl", lambda: None
    )
    return named()


class Overrides:
    """The operators' kernels for one dispatch key while it is alive: what the registry calls a
    handle."""

    def __init__(self, dispatch_key: str = "CUDA") -> None:
        self._undo: list[Callable[[], None]] = []
        if dispatch_key == "CUDA":
            self._undo = [torch_choice.put_flash_before_cudnn(), torch_choice.tag_caches(NAME)]
            if torch.cuda.is_available():
                aten.keep_unread(torch.device("cuda", torch.cuda.current_device()))
                self._undo.append(aten.drop_unread)
        library: Any = Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        self._library = library
        with warnings.catch_warnings():  # that a kernel is overridden, once in a process
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, answer in _ANSWERS.items():
                if hasattr(torch.ops.aten, name):
                    kernel = _or_previous(name, answer, dispatch_key)
                    library.impl(name, kernel, dispatch_key, with_keyset=True, allow_override=True)

    def remove(self) -> None:
        """Gives the operators the kernels back that they had. To be called once."""
        self._library = None
        for undo in self._undo:
            undo()


def _or_previous(name: str, answer: Callable[..., Any], dispatch_key: str) -> Callable[..., Any]:
    """A kernel of an ATen operator: this package's answer, or that of the kernel before it."""
    try:
        previous = get_kernel(getattr(torch.ops.aten, name).default, dispatch_key)
    except RuntimeError:  # there is none: this PyTorch is without CUDA
        return _answer_only(name, answer)

    def kernel(keys: Any, *inputs: Any, **options: Any) -> Any:
        result = answer(*inputs, **options)
        if result is NotImplemented:
            return previous.call_boxed(keys, *inputs, **options)
        return result

    return kernel


def _answer_only(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(_: Any, *inputs: Any, **options: Any) -> Any:
        result = answer(*inputs, **options)
        if result is NotImplemented:
            raise NotImplementedError(f"aten::{name} has no other kernel for such a call")
        return result

    return kernel
