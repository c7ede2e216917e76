"""Training: configuration, the step, the loop, checkpoints and pictures."""

from aeup.train.checkpoint import CheckpointError, load_model, save_model
from aeup.train.config import ConfigError, TrainConfig, TrainingError, make_config
from aeup.train.distributed import connect
from aeup.train.loop import train
from aeup.train.signals import Interrupted

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Interrupted",
    "TrainConfig",
    "TrainingError",
    "connect",
    "load_model",
    "make_config",
    "save_model",
    "train",
]
