"""Attention of vLLM's models: ``vllm serve MODEL --attention-backend CUTE_KERNELS``, and of those
with latent attention ``CUTE_KERNELS_MLA``.

vLLM finds `register` by itself, as an entry point of the group ``vllm.general_plugins``, in each of
its processes. It chooses the backends only where it is asked to.
"""

from __future__ import annotations

from typing import Any

from cute_kernels.integrations.enums import remove_member

NAME = "CUTE_KERNELS"
LATENT_NAME = "CUTE_KERNELS_MLA"
_PACKAGE = "cute_kernels.integrations.vllm"
_CLASSES = {
    NAME: f"{_PACKAGE}.backend.CuteKernelsBackend",
    LATENT_NAME: f"{_PACKAGE}.latent.CuteKernelsMLABackend",
}
_PREFILL_CLASS = f"{_PACKAGE}.latent.CuteKernelsMLAPrefill"


def register() -> None:
    """Makes the backends "CUTE_KERNELS" and "CUTE_KERNELS_MLA" known to vLLM, and "CUTE_KERNELS" as
    one for the prompts of latent attention, until `unregister`. Twice is once.

    Raises:
        ImportError: vLLM is not there, or older than its registries of attention backends.
    """
    from vllm.v1.attention.backends.mla.prefill.registry import (
        MLAPrefillBackendEnum,
        register_mla_prefill_backend,
    )
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, path in _CLASSES.items():
        if name not in AttentionBackendEnum.__members__:
            register_backend(name, path)
    if NAME not in MLAPrefillBackendEnum.__members__:
        register_mla_prefill_backend(NAME, _PREFILL_CLASS)


def unregister() -> None:
    """Undoes `register`; without one, nothing."""
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    registries: list[tuple[Any, list[str]]] = [
        (AttentionBackendEnum, list(_CLASSES)),
        (MLAPrefillBackendEnum, [NAME]),
    ]
    for members, names in registries:
        for name in names:
            member = members.__members__.get(name)
            if member is not None:
                member.clear_override()
                remove_member(members, member)
