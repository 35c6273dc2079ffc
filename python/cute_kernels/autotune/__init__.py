"""Finds the fastest kernel for calls of a kind, and remembers it."""

from cute_kernels.autotune.tuned import Tuned
from cute_kernels.autotune.tuner import tune, use_tuned

__all__ = ["Tuned", "tune", "use_tuned"]
