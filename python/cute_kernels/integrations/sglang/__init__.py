"""Attention of SGLang's models: ``--attention-backend cute_kernels``.

SGLang finds `register` by itself, as an entry point of the group ``sglang.srt.plugins``, in each of
its processes. It chooses the backend only where it is asked to.
"""

from __future__ import annotations

from typing import Any

NAME = "cute_kernels"


def register() -> None:
    """Makes the backend "cute_kernels" known to SGLang, until `unregister`. Twice is once.

    Raises:
        ImportError: SGLang is not there, or older than its registry of attention backends.
    """
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    ATTENTION_BACKENDS[NAME] = _make
    if NAME not in ATTENTION_BACKEND_CHOICES:
        ATTENTION_BACKEND_CHOICES.append(NAME)


def unregister() -> None:
    """Undoes `register`; without one, nothing."""
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    ATTENTION_BACKENDS.pop(NAME, None)
    if NAME in ATTENTION_BACKEND_CHOICES:
        ATTENTION_BACKEND_CHOICES.remove(NAME)


def _make(runner: Any) -> Any:
    from cute_kernels.integrations.sglang.backend import CuteKernelsBackend

    return CuteKernelsBackend(runner)
