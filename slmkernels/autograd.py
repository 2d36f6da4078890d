"""`apply` for the operations' autograd functions: quick in eager mode, and still open to torch.func."""

import torch


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


def apply_function(function: type[Function], *args):
    """`function.apply(*args)` by the quickest way that the surroundings allow."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return function.eager.apply(*args)
