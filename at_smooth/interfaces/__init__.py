"""What a plugin is: the interfaces of the core.

The base classes are the neutral choice already: a bare :class:`Regularizer` leaves the loss as it is, a bare
:class:`WeightSmoother` smooths nothing.
"""

from at_smooth.interfaces.analysis import Analysis, Study
from at_smooth.interfaces.architecture import Architecture
from at_smooth.interfaces.dataset import Dataset, Images, Size
from at_smooth.interfaces.evaluator import Evaluator, Outcome, Task, percent
from at_smooth.interfaces.plugin import Plugin
from at_smooth.interfaces.training import (
    Batch,
    Method,
    Regularizer,
    Schedule,
    Step,
    Teachers,
    Terms,
    TrainingPlugin,
    WeightSmoother,
    total,
)

__all__ = [
    "Analysis",
    "Architecture",
    "Batch",
    "Dataset",
    "Evaluator",
    "Images",
    "Method",
    "Outcome",
    "Plugin",
    "Regularizer",
    "Schedule",
    "Size",
    "Step",
    "Study",
    "Task",
    "Teachers",
    "Terms",
    "TrainingPlugin",
    "WeightSmoother",
    "percent",
    "total",
]
