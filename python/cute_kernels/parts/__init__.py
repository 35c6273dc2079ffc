"""Attention to a part of the keys, and how parts become one: what context parallelism is made of.

Nothing here has a gradient: it is for the inside of functions that have one of their own. Tensors
are those of `flash_attn_func`, or with `packed` those of `flash_attn_varlen_func`.
"""

from cute_kernels.parts.attention import Mask, Packed, attend_part, part_gradients_
from cute_kernels.parts.merge import merge_part_, merge_parts

__all__ = ["Mask", "Packed", "attend_part", "merge_part_", "merge_parts", "part_gradients_"]
