"""`ExpertSet`: what `SparseExperts` and `DomainExperts` share: the experts, and how they come and go.

An expert is row i of every tensor in `ExpertSet.ROWS`. To add or remove one is to splice those tensors, and
with them what an optimizer keeps about them.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..autograd import Function, apply_function
from ..ops.experts.reference import ACTIVATIONS, GATED
from ..validation import check_flag, expect, fail
from .feed_forward import FeedForward


def splice(tensor: Tensor, at: int, row: Tensor | None = None) -> Tensor:
    """tensor `[E, ...]` without row `at`; or, with `row` given, with it before that one."""
    parts = (tensor[at + 1 :],) if row is None else (row[None].to(tensor), tensor[at:])
    return torch.cat((tensor[:at], *parts))


def splice_parameter(
    old: nn.Parameter, at: int, row: Tensor | None = None, optimizer: torch.optim.Optimizer | None = None
) -> nn.Parameter:
    """A parameter spliced, with its gradient, and put in the old one's place in the optimizer.

    Whatever the optimizer keeps in the parameter's shape (Adam's moments, SGD's momentum) is spliced alike,
    zeros for a new row; the rest, such as Adam's count of steps, stays.
    """

    def follow(kept: Tensor) -> Tensor:
        return splice(kept, at, None if row is None else torch.zeros_like(kept[0]))

    with torch.no_grad():
        new = nn.Parameter(splice(old, at, row), requires_grad=old.requires_grad)
        new.grad = None if old.grad is None else follow(old.grad)
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if old in optimizer.state:
                optimizer.state[new] = {
                    name: follow(kept) if isinstance(kept, Tensor) and kept.shape == old.shape else kept
                    for name, kept in optimizer.state.pop(old).items()
                }
    return new


class ZeroFrozen(Function):
    """A parameter `[E, ...]` as it is; its gradient is zero in the rows of frozen experts."""

    @staticmethod
    def forward(parameter, frozen):
        return parameter.view_as(parameter)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient):
        (frozen,) = ctx.saved_tensors
        return gradient.masked_fill(frozen.view(-1, *[1] * (gradient.ndim - 1)), 0.0), None


def hold_frozen(module: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Keep frozen experts bit for bit through every `optimizer.step()`, weight decay and momentum included.

    A gradient of zero alone holds a parameter still only in an optimizer without either. Around each step
    this copies the rows of the experts that are frozen by then, and puts them back.

    Args:
        module: an `ExpertSet` or `ExpertLoRA`, or any module with some in it; experts may come and go later.
        optimizer: what steps over them.

    Returns:
        a function that ends it.

    Raises:
        TypeError: an argument is not as above; the message names it.
    """
    expect(isinstance(module, nn.Module), "module", module, "a module with experts", TypeError)
    good = isinstance(optimizer, torch.optim.Optimizer)
    expect(good, "optimizer", optimizer, "a torch.optim.Optimizer", TypeError)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def save(*_) -> None:
        kept.clear()
        for part in module.modules():
            if getattr(part, "any_frozen", False):  # an ExpertSet or what stands in for one
                rows = part.frozen.nonzero()[:, 0]
                kept.extend((p, rows, p.detach()[rows]) for p in part.matrices() if p is not None)

    @torch.no_grad()
    def restore(*_) -> None:
        for parameter, rows, values in kept:
            parameter[rows] = values

    before, after = optimizer.register_step_pre_hook(save), optimizer.register_step_post_hook(restore)

    def release() -> None:
        before.remove()
        after.remove()

    return release


class ExpertSet(nn.Module):
    """E experts, each an MLP, and shared ones that every token goes through.

    Arguments and parameters: see `SparseExperts`. A subclass calls `reset_parameters` once its own are there.
    """

    # Tensors of one row an expert; what follows row E - 1 in some of them (null experts) has no place here.
    ROWS = ("w_gate_up", "w_down", "b_gate_up", "b_down", "router", "selection_bias", "expert_mask", "frozen")
    STATE = ("expert_mask", "frozen")  # of an expert here, not of its copy elsewhere

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        num_null: int,
        *,
        shared_hidden: int,
        activation: str,
        bias: bool,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ):
        super().__init__()
        for name, value in (("dim", dim), ("hidden", hidden), ("num_experts", num_experts)):
            expect(type(value) is int and value >= 1, name, value, "an int >= 1")
        for name, value in (("num_null", num_null), ("shared_hidden", shared_hidden)):
            expect(type(value) is int and value >= 0, name, value, "an int >= 0; 0: none")
        expect(activation in ACTIVATIONS, "activation", activation, f"one of {', '.join(ACTIVATIONS)}")
        check_flag("bias", bias)
        self.dim, self.hidden, self.activation = dim, hidden, activation
        kind = {"dtype": dtype, "device": device}
        rows = (2 if activation in GATED else 1) * hidden
        self.w_gate_up = nn.Parameter(torch.empty(num_experts, rows, dim, **kind))
        self.w_down = nn.Parameter(torch.empty(num_experts, dim, hidden, **kind))
        self.b_gate_up = nn.Parameter(torch.empty(num_experts, rows, **kind)) if bias else None
        self.b_down = nn.Parameter(torch.empty(num_experts, dim, **kind)) if bias else None
        self.register_buffer(
            "expert_mask", torch.empty(num_experts + num_null, dtype=torch.bool, device=device)
        )
        self.register_buffer("frozen", torch.empty(num_experts, dtype=torch.bool, device=device))
        self.any_frozen = False  # what `frozen` says, without a wait for the device
        self.splices = 0  # how often experts came or went
        self.shared = None
        if shared_hidden:
            self.shared = FeedForward(dim, shared_hidden, activation=activation, bias=bias, **kind)

    @property
    def num_experts(self) -> int:
        """E, the experts there are, masked ones included."""
        return self.w_down.shape[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value (class docstring); no expert is masked or frozen."""
        for name, tensor in self._rows():
            self._initialize(name, tensor)
        self.any_frozen = False
        if self.shared is not None:
            self.shared.reset_parameters()

    def matrices(self) -> tuple[Tensor | None, ...]:
        """w_gate_up, w_down, b_gate_up, b_down."""
        return self.w_gate_up, self.w_down, self.b_gate_up, self.b_down

    def options(self) -> dict:
        """Keyword arguments of `expert_mlp` and `segment_mlp`: the matrices, with gradients of zero where
        frozen, and the activation."""
        tensors = self.matrices()
        if self.any_frozen:
            tensors = (None if t is None else apply_function(ZeroFrozen, t, self.frozen) for t in tensors)
        names = ("w_gate_up", "w_down", "b_gate_up", "b_down")
        return {**dict(zip(names, tensors, strict=True)), "activation": self.activation}

    # Experts come and go

    def expert(self, i: int) -> dict[str, Tensor]:
        """Copies of all that is expert i's, by name; `add_expert(from_=...)` of another module takes them."""
        self._check_index(i)
        return {n: t.detach()[i].clone() for n, t in self._rows() if n not in self.STATE}

    @torch.no_grad()
    def add_expert(
        self, from_: int | Mapping[str, Tensor] | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> int:
        """Append an expert: expert E, neither masked nor frozen. Parameters become new ones, a row longer.

        Args:
            from_: a copy of the expert of this index; or of tensors as `expert` gives them, in which what is
                the router's may be missing; or None. What is not copied has its initial value.
            optimizer: the one that holds this module's parameters, with a state in their shape (not LBFGS
                or Adafactor): it goes on with the new ones, its state of the new expert is zero, and its
                count of steps stays: in Adam's long run the first steps of the new rows are up to
                `(1 - beta1) / sqrt(1 - beta2)` times the learning rate.

        Returns:
            the index of the new expert.

        Raises:
            TypeError, ValueError: an argument is not as above, or experts are routed in groups; the message
                names it.
        """
        self._check_surgery(optimizer)
        if isinstance(from_, int):
            self._check_index(from_, "from_")
            from_ = self.expert(from_)
        E, copied = self.num_experts, self._check_expert(from_)
        rows = {}
        for name, tensor in self._rows():
            row = copied.get(name)
            if row is None:
                row = torch.empty_like(tensor[0])
                self._initialize(name, row)
            rows[name] = row
        self._splice(E, rows, optimizer)
        return E

    @torch.no_grad()
    def remove_expert(self, i: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take expert i out: what stays computes, and trains on, as a module that never had it.

        Experts after it move down by one. Parameters become new ones, a row shorter.

        Args:
            i: 0 to E-1.
            optimizer: the one that holds this module's parameters: it goes on with the new ones, and with its
                state of the experts that stay.

        Raises:
            TypeError, ValueError: an argument is not as above, it is the last expert, or experts are routed
                in groups; the message names it.
        """
        self._check_index(i)
        expect(self.num_experts > 1, "i", i, "more than one expert to be there")
        self._check_surgery(optimizer)
        self._splice(i, {}, optimizer)
        self.any_frozen = bool(self.frozen.any())

    @torch.no_grad()
    def mask_expert(self, i: int, masked: bool = True) -> None:
        """Send nothing to expert i, or again: outputs, gradients and losses are those without it.

        Its own gradients are zero; `freeze` and `hold_frozen` keep weight decay off it too.
        """
        self._check_index(i)
        self.expert_mask[i] = not check_flag("masked", masked)

    @torch.no_grad()
    def freeze(self, i: int, frozen: bool = True) -> None:
        """Let expert i work and not learn, or learn again: its matrices and biases get gradients of zero.

        The router goes on learning. With weight decay or momentum zero gradients do not hold a parameter:
        `hold_frozen(module, optimizer)` does.
        """
        self._check_index(i)
        self.frozen[i] = check_flag("frozen", frozen)
        self.any_frozen = bool(self.frozen.any())

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden={self.hidden}, experts={self.num_experts}, {self.activation}"

    def _rows(self) -> list[tuple[str, Tensor]]:
        tensors = ((name, getattr(self, name, None)) for name in self.ROWS)
        return [(name, tensor) for name, tensor in tensors if tensor is not None]

    def _initialize(self, name: str, tensor: Tensor) -> None:
        fan_in = {"w_gate_up": self.dim, "router": self.dim, "w_down": self.hidden}.get(name)
        if fan_in is None:
            tensor.fill_(name == "expert_mask")
        else:
            nn.init.normal_(tensor, std=fan_in**-0.5)

    def _splice(self, at: int, rows: dict[str, Tensor], optimizer) -> None:
        self.splices += 1
        for name, old in self._rows():
            if isinstance(old, nn.Parameter):
                setattr(self, name, splice_parameter(old, at, rows.get(name), optimizer))
            else:
                setattr(self, name, splice(old, at, rows.get(name)))

    def _check_index(self, i, name: str = "i") -> None:
        inside = type(i) is int and 0 <= i < self.num_experts
        expect(inside, name, i, f"an int from 0 to {self.num_experts - 1}, an expert")

    def _check_surgery(self, optimizer) -> None:
        if optimizer is None:
            return
        good = isinstance(optimizer, torch.optim.Optimizer)
        expect(good, "optimizer", optimizer, "a torch.optim.Optimizer, or None", TypeError)
        held = {p for group in optimizer.param_groups for p in group["params"]}
        ours = [p for _, p in self._rows() if isinstance(p, nn.Parameter) and p in held]
        expect(ours != [], "optimizer", type(optimizer), "one that holds parameters of this module")
        row_by_row = not isinstance(optimizer, torch.optim.LBFGS) and all(
            kept.shape in ((), p.shape)
            for p in ours
            for kept in optimizer.state.get(p, {}).values()
            if isinstance(kept, Tensor)
        )
        hint = "one whose state is numbers and tensors of a parameter's shape (not LBFGS or Adafactor)"
        expect(row_by_row, "optimizer", type(optimizer), hint)

    def _check_expert(self, copied) -> Mapping[str, Tensor]:
        """Tensors to copy an expert from, by name: all there, none too many, of the right shapes."""
        if copied is None:
            return {}
        hint = "an int, the tensors of an expert as `expert` gives them, or None"
        expect(isinstance(copied, Mapping), "from_", copied, hint, TypeError)
        wanted = {name: tensor for name, tensor in self._rows() if name not in self.STATE}
        needed = wanted.keys() - {"router", "selection_bias"}
        if not needed <= copied.keys() <= wanted.keys():
            names = f"the tensors {', '.join(sorted(needed))}"
            more = sorted(wanted.keys() - needed)
            fail("from_", sorted(copied), f"{names}{', and perhaps ' if more else ''}{', '.join(more)}")
        for name, row in copied.items():
            shape = wanted[name].shape[1:]
            fits = isinstance(row, Tensor) and row.shape == shape
            expect(fits, f"from_[{name!r}]", row, f"a tensor of shape {list(shape)}")
        return copied

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        theirs = state_dict.get(f"{prefix}w_down")
        if theirs is not None and theirs.shape[0] != self.num_experts:
            errors.append(
                f"{prefix or 'the module'} has {self.num_experts} experts and the state {theirs.shape[0]}: "
                "add_expert and remove_expert bring the module there"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self.any_frozen = bool(self.frozen.any())
