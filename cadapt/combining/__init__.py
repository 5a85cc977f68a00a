"""Combining: whether adapters that were trained on the same base can be one, and that one.

``vectors`` says what is combined, ``conflicts`` how far it disagrees; ``linear``, ``ties`` and ``dare`` hold a method
each, ``methods`` lists them; ``heads`` joins the tasks' classifiers, ``assemble`` makes the model, ``judge`` measures
it on each task's pictures, ``report`` holds the figures. A further method is one file and an entry in ``methods``.
"""

from cadapt.combining.assemble import Combination, check_tasks, combine
from cadapt.combining.methods import METHODS, Settings
from cadapt.combining.report import CombineReport

__all__ = ["METHODS", "Combination", "CombineReport", "Settings", "check_tasks", "combine"]
