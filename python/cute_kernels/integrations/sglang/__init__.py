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
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    ATTENTION_BACKENDS[NAME] = _make
    for names in _lists_of_names():
        if NAME not in names:
            names.append(NAME)


def unregister() -> None:
    """Undoes `register`; without one, nothing."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    ATTENTION_BACKENDS.pop(NAME, None)
    for names in _lists_of_names():
        if NAME in names:
            names.remove(NAME)


def _lists_of_names() -> list[list[str]]:
    """Of all backends, and of those that latent attention can give parts of a prompt's keys."""
    from sglang.srt.arg_groups import choices

    return [
        choices.ATTENTION_BACKEND_CHOICES,
        choices.CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS,
    ]


def _make(runner: Any) -> Any:
    from cute_kernels.integrations.sglang.backend import CuteKernelsBackend

    backend = CuteKernelsBackend(runner)
    if runner.use_mla_backend:
        _tell_models()
    return backend


def _tell_models() -> None:
    """Models with latent attention ask for a backend's name, how to call it: as fa3. They are not
    there yet when `register` runs, and without the backend what they know is of no use."""
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers
    from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS

    handlers.AttentionBackendRegistry.register(NAME, handlers.handle_attention_fa3)
    if NAME not in FORWARD_ABSORB_CORE_ATTENTION_BACKENDS:
        FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.append(NAME)
