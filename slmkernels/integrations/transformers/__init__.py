"""transformers with our kernels: attention, experts and delta rules "slmkernels".

    from slmkernels.integrations.transformers import accelerated

    with accelerated(model) as report:
        model.generate(...)  # or train
    print(report)

or for good: `register()`, then `attn_implementation="slmkernels"` and `experts_implementation="slmkernels"`
as for any other, and `patch_gated_delta_rule()`. What cannot be served raises `slmkernels.Unsupported` with
the reason. Attention needs transformers 5.6; experts and delta rules 5.16.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

try:
    import transformers
except ImportError as error:
    raise ImportError("slmkernels.integrations.transformers needs transformers 5.6 or later") from error
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 6):
    raise ImportError(f"transformers is {transformers.__version__}; expected 5.6 or later")

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from ...dispatch import Unsupported
from ...validation import fail
from . import attention, delta_rule, experts, masks
from .delta_rule import patch_gated_delta_rule, unpatch_gated_delta_rule
from .speedup import Speedup, speedup

NAME = "slmkernels"
FIELDS = ("_attn_implementation_internal", "_experts_implementation_internal")  # where a config keeps them

__all__ = [
    "NAME",
    "Report",
    "Speedup",
    "accelerated",
    "patch_gated_delta_rule",
    "register",
    "speedup",
    "unpatch_gated_delta_rule",
]


def register() -> None:
    """Make attention and experts "slmkernels" known to transformers, for any model and in any process that
    calls it: `from_pretrained(..., attn_implementation="slmkernels", experts_implementation="slmkernels")`,
    `model.set_attn_implementation("slmkernels")`, `model.set_experts_implementation("slmkernels")`."""
    AttentionInterface.register(NAME, attention.attention)
    AttentionMaskInterface.register(NAME, masks.mask)
    ExpertsInterface.register(NAME, experts.experts)


@dataclass
class Report:
    """What `accelerated` replaced in a model, and what it left alone and why."""

    replaced: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            *(f"  runs on slmkernels: {x}" for x in self.replaced),
            *(f"  as before: {x}" for x in self.left),
        ]
        return "\n".join(lines)


def _configs(model: PreTrainedModel) -> list:
    """Every configuration of a model and its parts, once."""
    found = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    for config in list(found.values()):
        for name in getattr(config, "sub_configs", {}):
            if (below := getattr(config, name, None)) is not None:
                found.setdefault(id(below), below)
    return list(found.values())


def _counted(parts: list[nn.Module]) -> str:
    names = dict.fromkeys(type(part).__name__ for part in parts)
    return ", ".join(f"{sum(type(p).__name__ == name for p in parts)} x {name}" for name in names)


def _use_attention(model: PreTrainedModel, report: Report) -> None:
    if not model._can_set_attn_implementation():
        report.left.append(f"attention: {type(model).__name__} does not go through AttentionInterface")
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    report.replaced.append(f"attention, in the place of {before!r}")


def _use_experts(model: PreTrainedModel, report: Report) -> None:
    parts = [part for part in model.modules() if experts.has_experts(part)]
    if not parts:
        return
    before = model.config._experts_implementation
    try:
        for part in parts:
            experts.activation_of(part)
        model.set_experts_implementation(NAME)
    except Unsupported as reason:
        report.left.append(str(reason))
        return
    except ValueError as refusal:  # of transformers, which before 5.16 takes no names but its own
        report.left.append(f"experts: {refusal}")
        return
    report.replaced.append(f"experts, in the place of {before!r}: {_counted(parts)}")


def _needs_offsets(module: nn.Module, arguments: tuple, options: dict) -> None:
    """Delta rules see where documents begin by cu_seq_lens_q alone."""
    given = inspect.signature(module.forward).bind_partial(*arguments, **options).arguments
    given |= given.pop("kwargs", {})
    position_ids, mask = given.get("position_ids"), given.get("attention_mask")
    if position_ids is None or position_ids.ndim != 2 or given.get("cu_seq_lens_q") is not None:
        return
    padded = isinstance(mask, torch.Tensor) and not torch.compiler.is_compiling() and not mask.all()
    if torch.compiler.is_compiling() or padded:  # positions of padding are any
        return
    if attention.starts_again(position_ids).any():
        raise Unsupported(
            "position_ids start again, that is documents are packed, and cu_seq_lens_q is missing, which the "
            "delta rule needs: DataCollatorWithFlattening(return_flash_attn_kwargs=True) gives it"
        )


def _guarded(model: PreTrainedModel, stack: contextlib.ExitStack) -> None:
    """`_needs_offsets` before every part that takes position_ids, whichever of them is called."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and "position_ids" in inspect.signature(part.forward).parameters:
            stack.callback(part.register_forward_pre_hook(_needs_offsets, with_kwargs=True).remove)


@contextlib.contextmanager
def accelerated(model: PreTrainedModel) -> Iterator[Report]:
    """Inside the block `model` runs on our kernels, wherever they apply: the same function, faster.

    Its parameters and its class stay as they are, and what was replaced comes back at the end. Attention and
    experts are switched for this model; delta rules, which are functions of transformers' modules, for all
    models of its family. Blocks of one model end in the reverse order of their beginnings; a deep copy made
    inside keeps the names and the check of position_ids that the block sets.

    Args:
        model: a transformers model, on any device.

    Yields:
        A `Report` of what was replaced and what was left; `print` it.

    Raises:
        TypeError: model is no transformers model.
        Unsupported: there is nothing to replace; and inside the block, where a call asks for what no kernel
            does (dropout, attention weights, masks that are no windows ...).
    """
    if not isinstance(model, PreTrainedModel):
        fail("model", type(model).__name__, "a transformers.PreTrainedModel", TypeError)
    register()
    report = Report()
    with contextlib.ExitStack() as stack:
        stack.callback(
            _restore, [(c, {n: getattr(c, n) for n in FIELDS if hasattr(c, n)}) for c in _configs(model)]
        )
        _use_attention(model, report)
        _use_experts(model, report)
        functions = delta_rule.functions_of(delta_rule.modeling_modules(model))
        if functions and not delta_rule.CALLED_BY_NAME:
            report.left.append(delta_rule.OLDER)
        elif functions:
            stack.enter_context(delta_rule.held(functions))
            _guarded(model, stack)
            report.replaced.append(f"delta rule and convolution: {', '.join(name for _, name in functions)}")
        if not report.replaced:
            raise Unsupported(f"{type(model).__name__}: nothing to replace\n{report}")
        yield report


def _restore(before: list[tuple[object, dict]]) -> None:
    for config, values in before:
        for name, value in values.items():
            setattr(config, name, value)
