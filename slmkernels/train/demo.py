"""`python -m slmkernels demo`: trains, speaks, draws and compares, in about a minute."""

from pathlib import Path

import torch

from .compare import report, training_step_times
from .data import decode_stream, encode, load_corpus, training_batch
from .settings import Settings
from .trainer import Trainer, train

PROMPT = "def "
SAMPLE_BYTES = 300


def run(settings: Settings, out: Path = Path("runs/demo"), device: torch.device | str = "cpu") -> None:
    """Train on Python's own library, print a sample, the figures and the times.

    An earlier demo in `out` is replaced.

    Raises:
        TrainError, Interrupted: as in `train`.
    """
    corpus = load_corpus(settings.data)
    trainer = Trainer(settings, corpus, device)
    size, megabytes = trainer.model.num_parameters(), (len(corpus.train) + len(corpus.valid)) / 1e6
    print(f"A model of {size:,} parameters, layers {settings.layers}, learns Python from its own library:")
    print(f"{corpus.documents} files, {megabytes:.1f} MB, the end of each held out.\n")
    valid = train(trainer, out)

    print(f"\nIt goes on from {PROMPT!r}:\n\n{PROMPT}", end="")
    generator = torch.Generator(device).manual_seed(settings.seed)
    prompt = encode(PROMPT).to(device)
    tokens = trainer.model.generate(prompt, SAMPLE_BYTES, temperature=0.7, top_k=40, generator=generator)
    for text in decode_stream(tokens):
        print(text, end="", flush=True)

    bpb, seconds = valid["bpb"], trainer.seconds
    print(f"\n\nHeld-out text: {bpb:.3f} bits per byte after {trainer.step} steps, {seconds:.0f} s in them.")
    print(f"Loss curve: {out / 'loss.png'}\n")

    if not {"S", "F"} & set(trainer.model.config.layers):
        print("No layer of sliding-window or full attention: there is no PyTorch attention to compare with.")
        return
    print(
        "Forward and backward of this model on the batch it trained on, and on as much text in one sequence,"
    )
    print("medians of interleaved runs:")
    for batch, length in (
        (settings.batch_size, settings.seq_len),
        (1, settings.batch_size * settings.seq_len),
    ):
        tokens, targets = training_batch(corpus, settings.seed, 0, batch, length)
        print(f"{batch} x {length} bytes")
        print(report(training_step_times(trainer.model, tokens.to(device), targets.to(device))))
