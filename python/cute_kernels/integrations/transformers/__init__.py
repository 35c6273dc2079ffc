"""Attention of the models of Hugging Face's transformers 5.

    from cute_kernels.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cute_kernels")

Continuous batching takes only implementations of its own list: transformers has no hook there for
one that is registered, and says so itself.
"""

from __future__ import annotations

from importlib.metadata import version

NAME = "cute_kernels"  # without "flash", which transformers takes for a package to look for

_OLDEST = 5


def register(*, fullgraph: bool = False) -> None:
    """Makes `attn_implementation="cute_kernels"` known to transformers, until `unregister`.

    Models that transformers' "sdpa" is right for are right with it. What the kernels cannot answer
    goes to PyTorch's attention, or to the model's own where that has no such feature either, and a
    UserWarning says once why. Dropout raises NotImplementedError.

    Args:
        fullgraph: which of two ways compiled models take with padded and packed sequences. False:
            the sequences are looked for outside of the graph, which breaks it once for a forward
            pass of the model. True: no break, as ``torch.compile(fullgraph=True)`` asks for;
            then such calls go to PyTorch's attention, unless the model is given ``cu_seq_lens_q``
            and ``cu_seq_lens_k``.

    Raises:
        ImportError: transformers is not there or older than 5.
    """
    found = version("transformers")
    if int(found.partition(".")[0]) < _OLDEST:
        raise ImportError(f"transformers is of version {found}, must be {_OLDEST} or newer")
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from cute_kernels.integrations.transformers.attention import attention
    from cute_kernels.integrations.transformers.masks import mask, mask_without_breaks

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask_without_breaks if fullgraph else mask)


def unregister() -> None:
    """Undoes `register`; without one, nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)
