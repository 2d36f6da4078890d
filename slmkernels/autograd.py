"""`apply` for the operations' autograd functions: quick in eager mode, and still open to torch.func."""

import torch

PLAIN = {type(None), bool, int, float, str}  # what operators take beside tensors


class Function(torch.autograd.Function):
    """An autograd function written with `setup_context`, as torch.func and Dynamo want it.

    `Function.apply` of such a class inspects the signature of `forward` on every call, 40 us. In eager mode
    `apply_function` therefore goes through a subclass with the older `forward(ctx, ...)`, 5 us.
    """

    eager: type[torch.autograd.Function]

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)

        def forward(ctx, *args):
            output = cls.forward(*args)
            cls.setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)}
        cls.eager = type(torch.autograd.Function)(f"Eager{cls.__name__}", (torch.autograd.Function,), members)


def _refuse_nested_gradients() -> None:
    """`once_differentiable` does not see torch.func's levels: a second gradient would silently be 0."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if sum(level.key() == torch._C._functorch.TransformType.Grad for level in levels) > 1:
        raise NotImplementedError(
            "slmkernels' gradients are of first order: torch.func.grad cannot be nested"
        )


def mark_changed(*tensors: torch.Tensor | None) -> None:
    """Tell autograd that an operator has written into these, as torch's own in-place operations do."""
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if x is not None and not x.is_inference():
            torch.autograd.graph.increment_version(x)


def wants_gradient(*tensors) -> bool:
    """Will autograd ask for the backward of a call with these arguments, of which some are tensors?"""
    if torch.is_grad_enabled():
        for x in tensors:
            if type(x) not in PLAIN and x.requires_grad:  # isinstance(None, Tensor) takes longer
                return True
    return False


def apply_function(function: type[Function], *args):
    """`function.apply(*args)` by the quickest way that the surroundings allow."""
    if torch.compiler.is_compiling():
        return function.apply(*args)
    if torch._C._are_functorch_transforms_active():
        _refuse_nested_gradients()
        return function.apply(*args)
    if torch.autograd.forward_ad._current_level < 0 and not wants_gradient(*args):
        return function.forward(*args)  # a node that nobody asks for takes 4 us
    return function.eager.apply(*args)
