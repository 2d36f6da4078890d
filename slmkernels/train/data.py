"""Text as bytes: reads a corpus, splits it, draws batches.

Documents stand one after the other in one uint8 tensor, each followed by `DOCUMENT` (0xFF, which UTF-8 never
uses). The last 5 to 10 % of every document, from the start of a line, are held out: no byte is in both parts,
and two equal documents have equal tails, so that a copied file leaks nothing either.

Batches are a pure function of (seed, index): there is no sampler state to save, and a resumed run reads
exactly what an uninterrupted one would have.
"""

import codecs
import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..models.small_lm import DOCUMENT
from .errors import TrainError

TEXT_SUFFIXES = (".txt", ".md", ".py")  # what is read from a folder
HELD_OUT = 0.05
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """Text to train on and text to validate on, uint8 `[bytes]`, and where it came from."""

    train: Tensor
    valid: Tensor
    documents: int

    @property
    def fingerprint(self) -> str:
        """A hash of all the bytes: equal for equal corpora."""
        digest = hashlib.sha256(self.train.numpy())
        digest.update(self.valid.numpy())
        return digest.hexdigest()


def stdlib_files() -> list[Path]:
    """Python's own library, where it is installed: its .py files but tests and added packages, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py") if not SKIPPED.intersection(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def find_files(paths: Iterable[str]) -> list[Path]:
    """The files that paths name: a file, a folder's *.txt, *.md and *.py at any depth, a glob's matches."""
    found = set()
    for text in paths:
        path = Path(text).expanduser()
        is_glob = not path.exists() and glob.has_magic(text)
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)] if is_glob else [path]
        if not matches:
            raise TrainError(f"--data {text!r} matches nothing; expected files of text")
        for match in matches:
            if match.is_dir():
                found.update(
                    file for file in match.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file()
                )
            elif match.is_file():
                found.add(match)
            else:
                raise TrainError(f"--data {text!r} does not exist; expected a file, a folder or a glob")
    if not found:
        raise TrainError(f"--data {' '.join(paths)!r} holds no {', '.join(TEXT_SUFFIXES)} file")
    return sorted(found)


def split(document: bytes) -> tuple[bytes, bytes]:
    """What to train on and what is held out: the last 5 to 10 %, from the start of a line if there is one."""
    held_out = int(len(document) * HELD_OUT)
    cut = len(document) - held_out
    newline = document.rfind(b"\n", cut - held_out, cut)
    cut = newline + 1 if newline >= 0 else cut
    return document[:cut], document[cut:]


def load_corpus(paths: Iterable[str] = ()) -> Corpus:
    """Read text files, or Python's own library if there are no paths.

    Raises:
        TrainError: a path does not exist, a file is not UTF-8, or there is no text.
    """
    paths = tuple(paths)
    files = find_files(paths) if paths else stdlib_files()
    parts, end = (bytearray(), bytearray()), bytes([DOCUMENT])
    documents = 0
    for file in files:
        try:
            document = file.read_bytes()
            document.decode("utf-8")
        except UnicodeDecodeError as error:
            if not paths:
                continue  # a few files of the library are Latin-1 on purpose
            raise TrainError(f"--data {str(file)!r} is not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            raise TrainError(f"--data {str(file)!r} cannot be read: {error.strerror}") from None
        if not document:
            continue
        documents += 1
        for part, text in zip(parts, split(document), strict=True):
            part += text + end if text else b""
    if not documents:
        raise TrainError(f"--data {' '.join(paths)!r}: every file is empty; expected some text")
    train, valid = (
        torch.frombuffer(part, dtype=torch.uint8) if part else torch.empty(0).byte() for part in parts
    )
    return Corpus(train, valid, documents)


def training_batch(
    corpus: Corpus, seed: int, index: int, batch_size: int, seq_len: int
) -> tuple[Tensor, Tensor]:
    """Micro-batch number `index` of a run: tokens and the bytes after them, int64 `[batch_size, seq_len]`."""
    places = len(corpus.train) - seq_len
    starts = np.random.default_rng([seed, index]).integers(0, places, size=(batch_size, 1))
    return _rows(corpus.train, torch.from_numpy(starts), seq_len)


def validation_batches(
    corpus: Corpus, tokens: int, batch_size: int, seq_len: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """About `tokens` bytes of the held-out text, in windows spread evenly over it that do not overlap."""
    seq_len = min(seq_len, len(corpus.valid) - 1)
    whole = (len(corpus.valid) - 1) // seq_len  # windows there are
    rows = max(1, min(tokens // seq_len, whole))
    starts = (torch.arange(rows) * whole // rows * seq_len)[:, None]
    for some in starts.split(batch_size):
        yield _rows(corpus.valid, some, seq_len)


def _rows(data: Tensor, starts: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    rows = data[starts + torch.arange(seq_len + 1)].long()  # [B, T + 1]
    return rows[:, :-1], rows[:, 1:]


def encode(text: str) -> Tensor:
    """Text -> tokens int64 `[1, T]`, behind the document token."""
    return torch.tensor([[DOCUMENT, *text.encode("utf-8")]])


def decode_stream(tokens: Iterable[Tensor]) -> Iterator[str]:
    """Tokens `[1]` as they come -> text as soon as its characters are whole; stops at the document token."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if int(token) == DOCUMENT:
            break
        if text := decoder.decode(bytes([int(token)])):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
