"""Attention of vLLM's models: ``vllm serve MODEL --attention-backend CUTE_KERNELS``.

vLLM finds `register` by itself, as an entry point of the group ``vllm.general_plugins``, in each of
its processes. It chooses the backend only where it is asked to.
"""

from __future__ import annotations

from typing import Any

from cute_kernels.integrations.enums import remove_member

NAME = "CUTE_KERNELS"
_CLASS = "cute_kernels.integrations.vllm.backend.CuteKernelsBackend"


def register() -> None:
    """Makes the backend "CUTE_KERNELS" known to vLLM, until `unregister`. Twice is once.

    Raises:
        ImportError: vLLM is not there, or older than its registry of attention backends.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, _CLASS)


def unregister() -> None:
    """Undoes `register`; without one, nothing."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    names: Any = AttentionBackendEnum
    member = names.__members__.get(NAME)
    if member is not None:
        member.clear_override()
        remove_member(names, member)
