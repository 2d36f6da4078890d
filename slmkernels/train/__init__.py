"""Training of the reference model: data, trainer, checkpoints, plots."""

from .checkpoint import load_model
from .data import Corpus, load_corpus
from .errors import Interrupted, TrainError
from .settings import Settings
from .trainer import Trainer, train

__all__ = ["Corpus", "Interrupted", "Settings", "TrainError", "Trainer", "load_corpus", "load_model", "train"]
