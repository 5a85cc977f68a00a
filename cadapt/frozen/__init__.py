"""Training around frozen layers: folds, recomputation and lean operations, in memory only.

:func:`prepare` turns an adapted model into a program of the same loss and gradients that keeps far less for backward.
"""

from cadapt.frozen.prepare import MEMORIES, Memory, Prepared, prepare

__all__ = ["MEMORIES", "Memory", "Prepared", "prepare"]
