"""Training: the loop, checkpoints and pictures."""

from aeup.train.checkpoint import CheckpointError, load_model, save_model
from aeup.train.loop import Interrupted, TrainConfig, TrainingError, train

__all__ = ["CheckpointError", "Interrupted", "TrainConfig", "TrainingError", "load_model", "save_model", "train"]
