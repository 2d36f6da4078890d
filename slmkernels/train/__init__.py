"""Training of the reference model: data, trainer, checkpoints, plots."""

from .checkpoint import load_model
from .data import Corpus, load_corpus
from .errors import Interrupted, TrainError
from .settings import Settings
from .trainer import Trainer, train
from .transfer import attention_transfer, hybridize

__all__ = [
    "Corpus",
    "Interrupted",
    "Settings",
    "TrainError",
    "Trainer",
    "attention_transfer",
    "hybridize",
    "load_corpus",
    "load_model",
    "train",
]
