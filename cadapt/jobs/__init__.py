"""The work behind the commands that touch data: from an adapter file and a folder to a trained file or a figure.

Each public function is what a command calls once; it ties the layers below together and prints nothing.
"""

from cadapt.jobs.hold import hold_folder, new_folder
from cadapt.jobs.insertion import Insertion, insert_into
from cadapt.jobs.judging import Evaluated, evaluate_model, trained_model
from cadapt.jobs.merge_options import MergeOptions
from cadapt.jobs.merging import Merged, merge_bundle
from cadapt.jobs.run import TrainJob
from cadapt.jobs.shipping import Shipment, ship_adapter, ship_onnx, ship_timm
from cadapt.jobs.task import TaskOptions, Trained
from cadapt.jobs.training import train_bundle

__all__ = [
    "Evaluated",
    "Insertion",
    "MergeOptions",
    "Merged",
    "Shipment",
    "TaskOptions",
    "TrainJob",
    "Trained",
    "evaluate_model",
    "hold_folder",
    "insert_into",
    "merge_bundle",
    "new_folder",
    "ship_adapter",
    "ship_onnx",
    "ship_timm",
    "train_bundle",
    "trained_model",
]
