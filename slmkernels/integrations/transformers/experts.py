"""Experts "slmkernels" of transformers: every layout of its expert modules, and absent experts."""

import weakref

import torch
from torch import Tensor

from ...dispatch import Unsupported
from ...ops.experts import reference
from ...ops.experts.function import expert_mlp

# Values that tell the activations apart, and show clamps: of n gates and n ups each.
_PROBE = torch.linspace(-12, 12, 97, dtype=torch.float64)
_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # module -> its numbers, what it computes


def _grid() -> tuple[Tensor, Tensor]:
    gate, up = torch.meshgrid(_PROBE, _PROBE, indexing="ij")
    return gate.flatten(), up.flatten()


def has_experts(module: torch.nn.Module) -> bool:
    """Is it an expert module of transformers' ExpertsInterface?"""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def recognise(module: torch.nn.Module) -> tuple[str, bool]:
    """The activation of an expert module, by what it computes, and whether gates and ups stand in turn.

    Raises:
        Unsupported: it computes something that `expert_mlp` does not.
    """
    if module.has_gate:
        gate, up = _grid()
        h, act, names = torch.cat((gate, up))[None], module._apply_gate, reference.GATED  # [1, 2n]
    else:
        h, act, names = _PROBE[None], module.act_fn, reference.PLAIN
    found = act(h)
    for name in names:
        for interleaved in (False, True):
            if _equal(reference.activate(h, name, interleaved), found):
                return name, interleaved
    raise Unsupported(
        f"experts: the activation of {type(module).__name__} is none of {', '.join(names)}: use "
        'experts_implementation="eager" or "grouped_mm"'
    )


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs.to(ours.dtype), rtol=1e-6, atol=1e-6)


@torch.compiler.assume_constant_result
def _recognised(module: torch.nn.Module) -> tuple[str, bool]:
    # What its activation may depend on: that may change, a limit say.
    numbers = [x for x in vars(module).values() if isinstance(x, (int, float))]
    key = (getattr(module, "act_fn", None), *numbers)
    if module not in _known or _known[module][0] != key:
        with torch.no_grad():
            _known[module] = key, recognise(module)
    return _known[module][1]


def activation_of(module: torch.nn.Module) -> tuple[str, bool]:
    """`recognise`, remembered; raises Unsupported for an expert module that `experts` cannot serve."""
    if getattr(module, "has_post_expert_norm", False):
        raise Unsupported(
            f"experts: {type(module).__name__} has a norm behind each expert, which has no kernel"
        )
    return _recognised(module)


def experts(
    module: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """An experts function of transformers' ExpertsInterface.

    Args:
        module: the experts, with `gate_up_proj` (or `up_proj`), `down_proj` and perhaps biases.
        hidden_states: `[T, d]`; top_k_index `[T, k]`, those of absent experts (expert parallelism) at
            num_experts or above; top_k_weights `[T, k]`.

    Returns:
        `[T, d]`.

    Raises:
        Unsupported: an activation that `expert_mlp` does not have, or a norm behind the experts.
    """
    activation, interleaved = activation_of(module)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)  # views: the kernels take either
    return expert_mlp(
        hidden_states,
        top_k_index,
        top_k_weights,
        up,
        down,
        b_gate_up=getattr(module, f"{name}_bias") if module.has_bias else None,
        b_down=module.down_proj_bias if module.has_bias else None,
        activation=activation,
        layout="interleaved" if interleaved else "concatenated",
    )
