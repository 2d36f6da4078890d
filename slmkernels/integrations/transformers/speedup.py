"""How much faster a transformers model runs on our kernels, here and now."""

import contextlib
import statistics
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...validation import expect


@dataclass(frozen=True)
class Speedup:
    """Seconds a call took on either path, and how far the results are apart."""

    what: str
    theirs: list[float]
    ours: list[float]
    difference: float  # of the logits, relative to their norm
    report: object  # what was replaced

    @property
    def ratio(self) -> float:
        """How many times as long transformers' own path takes, by medians."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    def __str__(self) -> str:
        times = (f"{statistics.median(x) * 1e3:.1f} ms" for x in (self.theirs, self.ours))
        before, after = times
        head = f"{self.what}: {before} -> {after}, {self.ratio:.2f} times as fast"
        return f"{head}; logits differ by {self.difference:.1e}\n{self.report}"


def speedup(model: PreTrainedModel, tokens: int = 1024, batch: int = 1, rounds: int = 5) -> Speedup:
    """Time a model with and without `accelerated`, in turn in this process: `print` the result.

    A training step without its optimizer (forward and backward of the mean logit) if the model is in training
    mode, else a forward pass without gradients. Both paths are run once before. Random tokens; the model's
    gradients are cleared.

    Args:
        model: a causal language model of transformers, or another that takes `input_ids` and gives logits.
        tokens: the length of a text; batch: how many.
        rounds: calls of each path.

    Raises:
        ValueError: a size below 1.
        Unsupported: nothing of the model can be replaced, or it does what no kernel does.
    """
    from . import accelerated

    for name, value in (("tokens", tokens), ("batch", batch), ("rounds", rounds)):
        expect(type(value) is int and value >= 1, name, value, "an int >= 1")
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, tokens), device=model.device)

    def call() -> torch.Tensor:
        if not model.training:
            with torch.no_grad():
                return model(input_ids=ids, use_cache=False).logits
        logits = model(input_ids=ids, use_cache=False).logits
        logits.float().mean().backward()
        model.zero_grad()
        return logits.detach()

    def timed(path) -> float:
        with path:
            start = time.perf_counter()
            call()
            if ids.is_cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - start

    expected = call()
    with accelerated(model) as report:
        difference = ((call() - expected).norm() / expected.norm()).item()
    theirs, ours = [], []
    for _ in range(rounds):
        theirs.append(timed(contextlib.nullcontext()))
        ours.append(timed(accelerated(model)))
    kind = "forward and backward" if model.training else "forward"
    what = f"{type(model).__name__}, {kind}, {batch} x {tokens} tokens"
    return Speedup(what, theirs, ours, difference, report)
