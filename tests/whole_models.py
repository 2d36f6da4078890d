"""Whole small models as one kind of module, for the tests of PyTorch's machinery around them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slmkernels.models import SmallLM, SmallLMConfig

VOCABULARY = 61


class Whole(nn.Module):
    """A language model as the tests call it: tokens `[B, T]` -> logits `[B, T, V]`, the training loss []."""

    def __init__(self, model: SmallLM):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits, routings = self.model(tokens, return_routings=True)
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())
        return logits, loss + self.model.routing_loss(routings)


def small_lm(linear_mode: str = "gated_delta", **changes) -> Callable[[], Whole]:
    """A factory of a model with every mixer, and experts in its second and fourth layer."""
    shape = {"dim": 32, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1, "hidden": 40, "max_seq_len": 128}
    parts = {"pattern": "SLHF", "window": 9, "sinks": True, "softcap": 20.0, "linear_mode": linear_mode}
    experts = {"experts": 4, "expert_shared": 16, "expert_every": 2, "expert_bias_rate": 0.01}
    config = SmallLMConfig(vocab_size=VOCABULARY, **{**shape, **parts, **experts, **changes})

    def build() -> Whole:
        torch.manual_seed(0)
        return Whole(SmallLM(config))

    return build


# Factories: each call gives the same model, with parameters of its own, called as `Whole` is. Other families
# of models join here.
MODELS: dict[str, Callable[[], nn.Module]] = {
    mode: small_lm(mode) for mode in ("gated_delta", "kda", "linear")
}


def tokens_of(batch: int, length: int, seed: int = 1) -> Tensor:
    """Tokens `[batch, length]`, the same for the same seed."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """What the loss gives every parameter, by name."""
    named = dict(module.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal bit for bit."""
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(ours[name], x), name


def close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Equal but for the rounding of float32 in another order: `tolerance` of a tensor's largest element."""
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        atol = tolerance * x.abs().max().item()
        torch.testing.assert_close(ours[name], x, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


class Calls(TorchDispatchMode):
    """Inside it, `seen` gathers our operators as they run: (name, dtype of the first argument)."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "slmkernels":
            self.seen.append((op._schema.name.removeprefix("slmkernels::"), args[0].dtype))
        return op(*args, **(kwargs or {}))
