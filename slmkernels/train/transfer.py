"""From softmax attention to hybrid attention: convert a trained model, then teach the feature maps.

    hybrid = hybridize(model, window=64)
    losses = attention_transfer(model, hybrid, batches_of_tokens)

The hybrid layers then stand in for the softmax layers they come from as far as their maps can. What is still
missing comes back with training the model on as it was trained before (LoLCATs: with LoRA).
Source: Zhang et al. 2024 (LoLCATs), section 3.1, attention transfer.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import SmallLM
from ..nn import HybridAttention, SlidingWindowAttention, hybrid_from_softmax
from ..validation import expect


def hybridize(
    model: SmallLM,
    letters: str = "F",
    *,
    window: int | None = None,
    alignment: str = "sliding",
    feature_map: str = "hedgehog",
    feature_dim: int | None = None,
) -> SmallLM:
    """A copy of a model in which layers of softmax attention became hybrid ones.

    Args:
        model: stays as it is and shares nothing with the copy.
        letters: which layers, "F", "S" or "FS". Keys beyond an S layer's window had no weight, which feature
            maps can come near to at best; the layer is as cheap as it is.
        window: of the hybrid layers; the model's if None.
        alignment, feature_map, feature_dim: as in `nn.HybridAttention`.

    Raises:
        ValueError: no such layers, hybrid ones already, another window than the S layers that stay, sinks or
            a softcap; the message names it.
    """
    expect(isinstance(model, SmallLM), "model", model, "a SmallLM", TypeError)
    old = model.config
    expect(letters in ("F", "S", "FS", "SF"), "letters", letters, "'F', 'S' or 'FS'")
    layers = "".join("H" if letter in letters else letter for letter in old.layers)
    fits = layers != old.layers and "H" not in old.layers
    expect(fits, "model.config.layers", old.layers, f"some of {letters!r}, and no H yet")
    window = old.window if window is None else window
    hint = f"{old.window}, that of the S layers that stay"
    expect(window == old.window or "S" not in layers, "window", window, hint)
    options = {"alignment": alignment, "feature_map": feature_map, "feature_dim": feature_dim}
    changes = {f"hybrid_{name}": value for name, value in options.items()}
    hybrid = copy.deepcopy(model)
    hybrid.config = dataclasses.replace(old, pattern=layers, window=window, **changes)
    for letter, block in zip(layers, hybrid.blocks, strict=True):
        if letter == "H":
            block.mixer = hybrid_from_softmax(block.mixer, window=window, **options)
    return hybrid


def attention_transfer(
    softmax: nn.Module, hybrid: nn.Module, batches: Iterable[Tensor], *, lr: float = 1e-2
) -> list[float]:
    """Train the feature maps and the mix of hybrid layers until they give what softmax layers give.

    Each hybrid layer sees the inputs of its softmax layer, those of the softmax model, and learns from the
    squared error between the outputs; nothing else changes, and all layers learn at once.

    Args:
        softmax: the teacher: a `SlidingWindowAttention`, or any module with some, such as a `SmallLM`.
        hybrid: a `HybridAttention`, or a module with some where softmax has its own (`hybridize`).
        batches: inputs of `softmax`, one for each step: hidden states `[B, T, C]`, or tokens `[B, T]`.
        lr: Adam's, without decay.

    Returns:
        the mean squared error of every step, before it, averaged over the layers.

    Raises:
        ValueError: no hybrid layer has a softmax layer as its teacher.
    """
    pairs, teachers = [], dict(softmax.named_modules())
    for name, layer in hybrid.named_modules():
        teacher = teachers.get(name)
        if isinstance(layer, HybridAttention) and isinstance(teacher, SlidingWindowAttention):
            pairs.append((teacher, layer))
    expect(
        pairs, "hybrid", type(hybrid), "one with HybridAttention where `softmax` has SlidingWindowAttention"
    )
    learned = [p for _, h in pairs for p in (*h.q_map.parameters(), *h.k_map.parameters(), h.mix_logit)]
    optimizer, losses, calls = torch.optim.Adam(learned, lr), [], {}

    def record(layer, inputs, options, output):
        calls[layer] = inputs, options, output

    with torch.enable_grad(), contextlib.ExitStack() as undo:
        for teacher, _ in pairs:
            undo.callback(teacher.register_forward_hook(record, with_kwargs=True).remove)
        for parameter in hybrid.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for parameter in learned:
            parameter.requires_grad_(True)
        for batch in batches:
            with torch.no_grad():
                softmax(batch)
            loss = 0.0
            for teacher, layer in pairs:
                inputs, options, output = calls.pop(teacher)
                loss = loss + F.mse_loss(layer(*inputs, **options), output) / len(pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    optimizer.zero_grad()
    return losses
