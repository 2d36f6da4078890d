"""Checkpoints: one file of plain tensors, numbers and strings, written whole or not at all."""

import os
from pathlib import Path

import torch

from ..models import SmallLM, SmallLMConfig
from .errors import TrainError

NAME = "checkpoint.pt"
FORMAT = 1
KEYS = {"format", "config", "settings", "corpus", "step", "seconds", "model", "optimizer", "rng"}


def write(content: dict, path: Path) -> None:
    """Write beside `path`, wait for the disk, rename: a crash at any point leaves the file that was there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = str(error).splitlines()[0]
        raise TrainError(f"checkpoint {str(path)!r} cannot be written: {reason}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, device: torch.device | str = "cpu") -> dict:
    """A checkpoint's content; runs no code from the file (`weights_only`).

    Args:
        path: the file, or the folder of the run that wrote it.

    Raises:
        TrainError: there is no such file, or it is not one of ours.
    """
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise TrainError(
            f"no checkpoint at {str(path)!r}; expected a file that `slmkernels train` wrote, or its folder"
        )
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a file that is no checkpoint fails in any way the unpickler knows
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrainError(f"checkpoint {str(path)!r} cannot be read: {reason}") from None
    if not isinstance(content, dict) or set(content) != KEYS:
        raise TrainError(f"checkpoint {str(path)!r} was not written by `slmkernels train`")
    if content["format"] != FORMAT:
        raise TrainError(f"checkpoint {str(path)!r} has format {content['format']}; expected {FORMAT}")
    return content


def load_model(path: Path | str, device: torch.device | str = "cpu") -> SmallLM:
    """The model of a checkpoint, ready to run.

    Raises:
        TrainError: there is no checkpoint, or it does not fit.
    """
    content = read(Path(path), device)
    try:
        model = SmallLM(SmallLMConfig(**content["config"])).to(device)
        model.load_state_dict(content["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainError(
            f"checkpoint {str(path)!r} does not fit this version: {str(error).splitlines()[0]}"
        ) from None
    return model.eval()
