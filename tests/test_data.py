"""The corpus, its split, and the batches drawn from it."""

import pytest
import torch

from slmkernels.train import Corpus, Settings, Trainer, TrainError, load_corpus
from slmkernels.train.data import (
    DOCUMENT,
    decode_stream,
    encode,
    split,
    stdlib_files,
    training_batch,
    validation_batches,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus([str(file) for file in stdlib_files()[:12]])


def test_default_corpus_is_the_standard_library_without_its_tests():
    files = stdlib_files()
    assert files == sorted(files, key=str) or len(files) > 100
    assert len(files) > 100
    assert len(set(files)) == len(files)
    names = {file.name for file in files}
    assert "argparse.py" in names
    assert "test_argparse.py" not in names
    assert not any("site-packages" in file.parts or "test" in file.parts for file in files)


def test_corpus_is_the_same_every_time(tmp_path, corpus):
    (tmp_path / "b.txt").write_text("b" * 100)
    (tmp_path / "a.txt").write_text("a" * 100)
    one, two = load_corpus([str(tmp_path)]), load_corpus([str(tmp_path / "b.txt"), str(tmp_path / "*.txt")])
    assert one.fingerprint == two.fingerprint != corpus.fingerprint
    assert bytes(one.train.numpy()) == b"a" * 95 + b"\xff" + b"b" * 95 + b"\xff"
    assert bytes(one.valid.numpy()) == b"a" * 5 + b"\xff" + b"b" * 5 + b"\xff"
    assert one.train.dtype == torch.uint8
    assert one.documents == 2


def test_folders_give_text_files_at_any_depth(tmp_path):
    deep = tmp_path / "x" / "y"
    deep.mkdir(parents=True)
    for name in ("a.txt", "b.md", "c.py", "d.bin", "e.json"):
        (deep / name).write_text(name * 50)
    assert load_corpus([str(tmp_path)]).documents == 3
    assert (
        load_corpus([str(deep / "d.bin")]).documents == 1
    )  # a file that is named is read whatever its suffix
    assert load_corpus([str(tmp_path / "**" / "*.md")]).documents == 1


def test_split_loses_and_repeats_nothing():
    for document in (b"", b"x", b"line\n" * 500, b"no newline " * 50, bytes(range(32, 120)) * 9):
        kept, held_out = split(document)
        assert kept + held_out == document
        assert len(held_out) <= max(0.05 * len(document) + 1, 0.1 * len(document))
    kept, held_out = split(b"0123456789\n" * 100)
    assert kept.endswith(b"\n")
    assert 50 <= len(held_out) <= 66


def test_training_never_reads_held_out_text(tmp_path):
    lines = [f"line {i:05d}\n" for i in range(3000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    corpus = load_corpus([str(tmp_path)])
    trained, held_out = (bytes(part.numpy()).decode("latin-1") for part in (corpus.train, corpus.valid))
    trained, held_out = (set(part.split("\n")) - {"ÿ"} for part in (trained, held_out))
    assert len(held_out) > 100
    assert not trained & held_out
    seen = set()
    for index in range(50):
        seen.update(
            bytes(training_batch(corpus, 0, index, 8, 40)[0].byte().numpy()).decode("latin-1").split("\n")
        )
    assert not seen & held_out


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9 au lait", "'.*a.txt' is not UTF-8 text \\(byte 3\\)"), (b"", "every file is empty")],
)
def test_unusable_text_is_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(TrainError, match=message):
        load_corpus([str(tmp_path)])


def test_unusable_paths_are_named(tmp_path):
    for path, message in (
        ("none", "does not exist"),
        ("*.txt", "matches nothing"),
        ("", "holds no .txt, .md, .py"),
    ):
        with pytest.raises(TrainError, match=message):
            load_corpus([str(tmp_path / path)])


def test_a_corpus_too_small_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(TrainError, match=r"6 bytes to train on; seq_len needs at least 33"):
        Trainer(Settings(seq_len=32), load_corpus([str(tmp_path)]))


# Batches


def test_batches_are_a_function_of_seed_and_index(corpus):
    tokens, targets = training_batch(corpus, 5, 7, 4, 30)
    again = training_batch(corpus, 5, 7, 4, 30)
    assert torch.equal(tokens, again[0])
    assert torch.equal(targets, again[1])
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert tokens.shape == (4, 30)
    assert tokens.dtype == torch.int64
    for seed, index in ((5, 8), (6, 7)):
        assert not torch.equal(tokens, training_batch(corpus, seed, index, 4, 30)[0])


def test_batches_reach_the_first_and_the_last_byte():
    corpus = Corpus(torch.arange(10, dtype=torch.uint8), torch.arange(4, dtype=torch.uint8), 1)
    targets = torch.cat([training_batch(corpus, 0, i, 8, 8)[1] for i in range(20)])
    assert targets.min() == 1
    assert targets.max() == 9


def test_validation_windows_do_not_overlap():
    corpus = Corpus(torch.zeros(9, dtype=torch.uint8), torch.arange(250, dtype=torch.uint8), 1)
    for tokens in (1, 60, 120, 10_000):
        rows = torch.cat([targets for _, targets in validation_batches(corpus, tokens, 3, 12)])
        assert len(rows.flatten().unique()) == rows.numel()
        assert rows.shape == (max(1, min(tokens // 12, 20)), 12)
    [(tokens, _)] = validation_batches(corpus, 500, 3, 1000)  # held-out text shorter than a sequence
    assert tokens.shape == (1, 249)


def test_text_goes_there_and_back():
    tokens = encode("aé€😀")
    assert tokens[0, 0] == DOCUMENT
    pieces = list(decode_stream(tokens[:, 1:].T))
    assert pieces == ["a", "é", "€", "😀"]
    assert list(decode_stream(torch.tensor([[0xC3]]))) == ["\ufffd"]  # cut inside a character
    assert list(decode_stream(torch.tensor([[65], [DOCUMENT], [66]]))) == ["A"]
