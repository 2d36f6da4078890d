"""Hybrid attention inside PyTorch: layouts, autograd, compilers, operators; and its errors."""

import math

import pytest
import torch
from hybrid_cases import ALIGNMENTS, LEAVES, make, public
from rule import every_dtype, needs_native, rounded, run, same_bits, same_in_float64

from slmkernels import explain, hybrid_attention, use_backend
from slmkernels.ops.hybrid import function

every_alignment = pytest.mark.parametrize("alignment", ALIGNMENTS)
NATIVE = public("native")
TOKENS = ("q", "k", "v", "phi_q", "phi_k")
RESULTS = ("o", "state", "normalizer")


# --- inputs of any kind


@needs_native
@every_dtype
@every_alignment
def test_strides(alignment, dtype):
    """Any strides, also along the last dimension, and a gradient that `sum` expands from one number."""
    tensors, options = make(B=2, T=50, group=2, D=16, V=16, F=16, window=7, states=True, alignment=alignment)
    tensors = rounded(tensors, dtype)
    tensors["do"] = tensors["do"][:1, :1, :1, :1].expand_as(tensors["do"])

    def sliced(*, q, k, v, phi_q, phi_k, **rest):
        whole = torch.cat([x.flatten(2) for x in (q, k, v, phi_q, phi_k)], dim=-1)  # one projection
        parts = whole.split([64, 32, 32, 64, 32], dim=-1)
        return NATIVE(*(x.unflatten(-1, (-1, 16)) for x in parts), **rest)

    def transposed(**given):
        moved = {
            name: x.transpose(1, 2).contiguous().transpose(1, 2)
            for name, x in given.items()
            if name in TOKENS
        }
        moved |= {name: given[name].mT.contiguous().mT for name in ("state", "normalizer")}
        return NATIVE(**{**given, **moved})

    def strided(**given):
        moved = {name: torch.stack([given[name]] * 2, -1).flatten(-2)[..., ::2] for name in (*TOKENS, "mix")}
        return NATIVE(**{**given, **moved})

    plain = run(tensors, NATIVE, **options)
    for layout in (sliced, transposed, strided):
        same_bits(run(tensors, layout, **options), plain)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_mix_and_states_of_another_dtype(dtype):
    """Whatever floats they come in, they are computed in float32, and differentiated back."""
    tensors, options = make(T=30, states=True, window=5)
    tensors = {name: x.float() for name, x in tensors.items()}
    others = ("mix", "state", "normalizer")
    tensors |= {name: tensors[name].to(dtype) for name in others}
    got = run(tensors, NATIVE, **options)
    assert {got[name].dtype for name in RESULTS} == {torch.float32}
    assert {got[f"d{name}"].dtype for name in others} == {dtype}
    same = run({name: x.float() for name, x in tensors.items()}, NATIVE, **options)
    same_bits(got, {name: x.to(got[name].dtype) for name, x in same.items()})


# --- autograd


@needs_native
@every_alignment
@pytest.mark.parametrize("result", RESULTS)
def test_gradient_of_one_result_alone(result, alignment):
    """The others' gradients are absent, not zero."""
    tensors, options = make(T=70, states=True, alignment=alignment)
    alone = {n: x if n in LEAVES or n == f"d{result}" else torch.zeros_like(x) for n, x in tensors.items()}

    def only(**leaves):
        results = zip(RESULTS, NATIVE(**leaves), strict=True)
        return tuple(x if name == result else x.detach() for name, x in results)

    same_in_float64(run(alone, only, **options), run(alone, NATIVE, **options))


@needs_native
@every_alignment
def test_backward_twice_and_partial_gradients(alignment):
    tensors, _ = make(T=40, D=16, V=16)
    tokens = [tensors[name] for name in TOKENS]
    tokens[0].requires_grad_(), tokens[4].requires_grad_()  # the others without
    o = hybrid_attention(*tokens, window=6, alignment=alignment, backend="native")
    first = torch.autograd.grad(o, (tokens[0], tokens[4]), tensors["do"], retain_graph=True)
    second = torch.autograd.grad(o, (tokens[0], tokens[4]), tensors["do"])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_native
def test_a_second_derivative_is_an_error():
    q = torch.rand(1, 9, 2, 16, requires_grad=True)
    o = hybrid_attention(q, q, q, q, q, window=3, backend="native")
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@needs_native
def test_nested_gradients_are_refused():
    q = torch.rand(1, 9, 2, 16)

    def loss(q):
        return hybrid_attention(q, q, q, q, q, window=3, backend="native").square().sum()

    with pytest.raises(NotImplementedError, match="first order"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(q)


@needs_native
def test_autocast_casts():
    tensors, _ = make(T=40, states=True)
    leaves = {name: tensors[name].float().requires_grad_() for name in (*TOKENS, "mix")}
    arguments = {**leaves, "window": 6, "return_state": True}
    with torch.autocast("cpu", torch.bfloat16):
        o, state = hybrid_attention(**arguments, backend="native")
        expected, _ = hybrid_attention(**arguments, backend="reference")
    assert (o.dtype, *(x.dtype for x in state)) == (torch.bfloat16, torch.float32, torch.float32)
    o.sum().backward()
    assert {x.grad.dtype for x in leaves.values()} == {torch.float32}
    torch.testing.assert_close(o, expected, rtol=2e-2, atol=2e-2)


@needs_native
@every_alignment
def test_checkpointing_and_func_grad(alignment):
    from torch.utils.checkpoint import checkpoint

    tensors, _ = make(T=30, D=16, V=16)
    names = (*TOKENS, "mix")
    leaves, do = [tensors[name].requires_grad_() for name in names], tensors["do"]

    def f(*leaves):
        named = dict(zip(names, leaves, strict=True))
        return hybrid_attention(**named, window=5, alignment=alignment, backend="native")

    plain = torch.autograd.grad(f(*leaves), leaves, do)
    saved = torch.autograd.grad(checkpoint(f, *leaves, use_reentrant=False), leaves, do)
    numbers = tuple(range(len(leaves)))
    func = torch.func.grad(lambda *x: (f(*x) * do).sum(), argnums=numbers)(*[x.detach() for x in leaves])
    for a, b, c in zip(plain, saved, func, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


# --- operators and compilers


@needs_native
@every_alignment
@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        (torch.float32, {"mix": False}),
        (torch.bfloat16, {"packed": (0, 5, 20)}),
        (torch.float16, {"states": True}),
        (torch.float64, {"states": True, "packed": (0, 0, 20)}),
    ],
)
def test_opcheck(dtype, case, alignment):
    ops = torch.ops.slmkernels
    tensors, options = make(T=20, group=2, D=8, V=4, F=6, **case)
    tensors = rounded(tensors, dtype)
    arguments = [*(tensors.get(name) for name in LEAVES), options.get("cu_seqlens")]
    block = alignment == "block"
    for segment in (0, function.segment_length(3, block)):
        tail = (3, block, 0.25, segment)
        torch.library.opcheck(ops.hybrid_attention_forward.default, (*arguments, *tail))
    o, _, _, *kept = ops.hybrid_attention_forward(*arguments, *tail)
    for states in ((tensors["dstate"], tensors["dnormalizer"]), (None, None)):
        backward = (tensors["do"], *states, *arguments, o, *kept, *tail)
        torch.library.opcheck(ops.hybrid_attention_backward.default, backward)


@needs_native
@every_alignment
@pytest.mark.parametrize("states", [False, True])
def test_compile_fullgraph(states, alignment):
    tensors, options = make(T=70, D=16, V=16, group=2, states=states, mix=states, alignment=alignment)
    tensors = rounded(tensors, torch.float32)

    def attend(q, **leaves):
        o, *end = NATIVE(1.5 * q, **leaves)
        return o.sin(), *end

    torch.compiler.reset()
    eager, compiled = run(tensors, attend, **options), torch.compile(attend, fullgraph=True)
    for name, x in run(tensors, compiled, **options).items():
        torch.testing.assert_close(x, eager[name])


@needs_native
def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, phi_q, phi_k, mix):
            return hybrid_attention(q, k, v, phi_q, phi_k, mix=mix, window=6, return_state=True)

    tensors, _ = make(B=2, T=30, group=2, D=16, V=16)
    arguments = tuple(tensors[name].float() for name in (*TOKENS, "mix"))
    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(Model(), arguments, dynamic_shapes=(*({0: batch},) * 5, None))
    assert any("hybrid_attention_forward" in str(node.target) for node in program.graph.nodes)
    more = [*(torch.cat([x, x]) for x in arguments[:5]), arguments[5]]
    torch.testing.assert_close(program.module()(*more), Model()(*more))


@needs_native
@every_alignment
@pytest.mark.parametrize("case", [{}, {"packed": (0, 5, 20), "B": 1}, {"T": 600}], ids=str)
def test_fake_tensors_have_shapes(case, alignment):
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = {"B": 2, "T": 20, "group": 2, "D": 8, "V": 4, "states": True, "alignment": alignment, **case}
    tensors, options = make(**case)
    real = run(tensors, NATIVE, **options)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in tensors.items()}
        options = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
        fake = run(fake, NATIVE, **options)
    for name, x in real.items():
        seen = fake[name].shape, fake[name].dtype, fake[name].stride()
        assert seen == (x.shape, x.dtype, x.stride()), name


def test_meta_tensors_have_shapes():
    q, k, v = (torch.randn(1, 8, *shape, device="meta") for shape in ((4, 16), (2, 16), (2, 12)))
    with use_backend("reference"):
        o, state = hybrid_attention(q, k, v, q, k, window=3, return_state=True)
    assert o.shape == (1, 8, 4, 12)
    assert [x.shape for x in state] == [(1, 2, 16, 12), (1, 2, 16)]


@needs_native
def test_the_choice_is_native():
    q = torch.rand(1, 8, 2, 16)
    arguments = (hybrid_attention, q, q, q, q, q)
    assert explain(*arguments, window=3).startswith("hybrid_attention: native")
    assert explain(*arguments, window=3, backend="reference").startswith("hybrid_attention: reference")


# --- errors


def good(B=2, **changes):
    sizes = {"q": (4, 16), "k": (2, 16), "v": (2, 12), "phi_q": (4, 6), "phi_k": (2, 6)}
    return {name: torch.rand(B, 8, *size) for name, size in sizes.items()} | {"window": 3} | changes


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


META = {"device": "meta"}
STATE, NORMALIZER = (2, 2, 6, 12), (2, 2, 6)
BAD = {
    "q is no tensor": (good(q=[1.0]), TypeError, "q is"),
    "q of ints": (good(q=zeros(2, 8, 4, 16).long()), TypeError, "q is int64"),
    "q with three dimensions": (good(q=zeros(2, 8, 16)), ValueError, r"q is float32\[2, 8, 16\]"),
    "q without channels": (good(q=zeros(2, 8, 4, 0), k=zeros(2, 8, 2, 0)), ValueError, "q is .* dimension"),
    "q without heads": (good(q=zeros(2, 8, 0, 16), phi_q=zeros(2, 8, 0, 6)), ValueError, "q is .* divide"),
    "k is no tensor": (good(k=None), TypeError, "k is None"),
    "k of another dtype": (good(k=zeros(2, 8, 2, 16).double()), TypeError, "k is float64"),
    "k of another batch": (good(k=zeros(3, 8, 2, 16)), ValueError, "k is .* to go with q"),
    "k of another length": (good(k=zeros(2, 9, 2, 16)), ValueError, "k is .* to go with q"),
    "k of another size": (good(k=zeros(2, 8, 2, 8)), ValueError, "k is .* to go with q"),
    "k elsewhere": (good(k=zeros(2, 8, 2, 16, **META)), ValueError, "k is .* meta"),
    "heads that do not divide": (good(k=zeros(2, 8, 3, 16)), ValueError, "q is .* 3 heads divide"),
    "k without heads": (good(k=zeros(2, 8, 0, 16)), ValueError, "q is .* 0 heads divide"),
    "v with three dimensions": (good(v=zeros(2, 8, 12)), ValueError, "v is"),
    "v of another dtype": (good(v=zeros(2, 8, 2, 12).half()), TypeError, "v is float16"),
    "v of another length": (good(v=zeros(2, 9, 2, 12)), ValueError, "v is .* to go with k"),
    "v of other heads": (good(v=zeros(2, 8, 4, 12)), ValueError, "v is .* to go with k"),
    "v without channels": (good(v=zeros(2, 8, 2, 0)), ValueError, "v is .* at least 1"),
    "phi_q is no tensor": (good(phi_q=1.0), TypeError, "phi_q is 1.0"),
    "phi_q of another dtype": (good(phi_q=zeros(2, 8, 4, 6).double()), TypeError, "phi_q is float64"),
    "phi_q of other heads": (good(phi_q=zeros(2, 8, 2, 6)), ValueError, "phi_q is .* to go with q"),
    "phi_q of another length": (good(phi_q=zeros(2, 7, 4, 6)), ValueError, "phi_q is .* to go with q"),
    "phi_q without features": (good(phi_q=zeros(2, 8, 4, 0)), ValueError, "phi_q is .* at least 1"),
    "phi_k with five dimensions": (good(phi_k=zeros(2, 8, 2, 6, 1)), ValueError, "phi_k is"),
    "phi_k of another size": (good(phi_k=zeros(2, 8, 2, 7)), ValueError, r"phi_k is .* \[2, 8, 2, 6\]"),
    "phi_k of other heads": (good(phi_k=zeros(2, 8, 4, 6)), ValueError, r"phi_k is .* \[2, 8, 2, 6\]"),
    "phi_k elsewhere": (good(phi_k=zeros(2, 8, 2, 6, **META)), ValueError, "phi_k is .* meta"),
    "window 0": (good(window=0), ValueError, "window is 0"),
    "window -1": (good(window=-1), ValueError, "window is -1"),
    "window True": (good(window=True), TypeError, "window is True"),
    "window 2.5": (good(window=2.5), TypeError, "window is 2.5"),
    "window None": (good(window=None), TypeError, "window is None"),
    "window a pair": (good(window=(3, 0)), TypeError, "window is"),
    "alignment unknown": (good(alignment="blocks"), ValueError, "alignment is 'blocks'.* sliding, block"),
    "alignment None": (good(alignment=None), ValueError, "alignment is None"),
    "mix a number": (good(mix=0.5), TypeError, "mix is 0.5"),
    "mix of ints": (good(mix=torch.ones(4).int()), TypeError, "mix is int32"),
    "mix of other heads": (good(mix=torch.ones(2)), ValueError, r"mix is .* \[4\]"),
    "mix with two dimensions": (good(mix=torch.ones(1, 4)), ValueError, "mix is"),
    "mix elsewhere": (good(mix=torch.ones(4, **META)), ValueError, "mix is .* meta"),
    "scale inf": (good(scale=math.inf), ValueError, "scale is inf"),
    "scale nan": (good(scale=math.nan), ValueError, "scale is nan"),
    "scale text": (good(scale="1"), TypeError, "scale is '1'"),
    "return_state 0": (good(return_state=0), TypeError, "return_state is 0"),
    "state without a normaliser": (good(initial_state=zeros(STATE)), TypeError, "initial_state is .* a pair"),
    "a pair of one": (good(initial_state=(zeros(STATE),)), TypeError, "initial_state is .* a pair"),
    "state is no tensor": (good(initial_state=(0.0, zeros(NORMALIZER))), TypeError, "initial_state is 0.0"),
    "state transposed": (
        good(initial_state=(zeros(2, 2, 12, 6), zeros(NORMALIZER))), ValueError, r"initial_state\[0\] is",
    ),
    "normaliser of another size": (
        good(initial_state=(zeros(STATE), zeros(2, 2, 12))), ValueError, r"initial_state\[1\] is",
    ),
    "state elsewhere": (
        good(initial_state=(zeros(STATE, **META), zeros(NORMALIZER))), ValueError, r"\[0\] is .* meta",
    ),
    "states for the batch, not the sequences": (
        good(1, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32),
             initial_state=(zeros(1, 2, 6, 12), zeros(1, 2, 6))),
        ValueError, r"initial_state\[0\] is .* \[2, 2, 6, 12\]",
    ),
    "cu_seqlens with a batch": (
        good(cu_seqlens=torch.tensor([0, 8], dtype=torch.int32)), ValueError, "q is .* batch 1",
    ),
    "backend unknown": (good(backend="cuda"), ValueError, "backend is 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        hybrid_attention(**arguments)


@pytest.mark.parametrize(
    ("cu", "error"),
    [([0, 9], ValueError), ([1, 8], ValueError), ([0, 5, 3, 8], ValueError), ([0.0, 8.0], TypeError)],
)
def test_bad_cu_seqlens(cu, error):
    cu = torch.tensor(cu, dtype=torch.int32 if isinstance(cu[0], int) else torch.float32)
    with pytest.raises(error, match="cu_seqlens"):
        hybrid_attention(**good(1, cu_seqlens=cu))


@needs_native
def test_raw_operators_refuse_what_does_not_fit():
    """The C++ side checks too: whoever calls the operators directly gets an error, not a crash."""
    cu = torch.tensor([0, 8], dtype=torch.int32)
    fits = {name: x for name, x in good(1).items() if name in TOKENS} | {
        "mix": torch.ones(4), "state": zeros(1, 2, 6, 12), "normalizer": zeros(1, 2, 6), "cu": cu,
        "window": 3, "block": False, "scale": 0.25, "segment": function.SEGMENT,
    }  # fmt: skip
    forward, backward = (
        getattr(torch.ops.slmkernels, f"hybrid_attention_{x}") for x in ("forward", "backward")
    )
    o, _, _, *kept = forward(*fits.values())
    q, k, v, phi_k = (fits[name] for name in ("q", "k", "v", "phi_k"))
    misfits = (
        {"k": k[:, :5]}, {"k": k.double()}, {name: fits[name].int() for name in TOKENS}, {"v": v[:, :, :1]},
        {"v": v[:, :5]}, {"k": k[..., :8]}, {"phi_q": fits["phi_q"][..., :5]}, {"phi_k": phi_k[:, :5]},
        {"phi_q": fits["phi_q"][:, :, :2]}, {"phi_k": phi_k.double()}, {"q": q[:, :, :3]},
        {"k": k[:, :, :0], "v": v[:, :, :0], "phi_k": phi_k[:, :, :0]}, {"q": q[0]},
        {"mix": torch.ones(2)}, {"mix": torch.ones(4).double()}, {"state": zeros(2, 2, 6, 12)},
        {"state": zeros(1, 2, 12, 6)}, {"state": zeros(1, 2, 6, 12).double()}, {"state": None},
        {"normalizer": None}, {"normalizer": zeros(1, 2, 12)}, {"cu": cu.long()}, {"cu": cu + cu // 8},
        {"cu": torch.tensor([0, 5, 3, 8], dtype=torch.int32)}, {"window": 0}, {"window": -(2**40)},
        {"scale": math.nan}, {"segment": -512},
    )  # fmt: skip
    *tensors, window, block, scale, segment = fits.values()
    for change in misfits:
        with pytest.raises(RuntimeError):
            forward(*(fits | change).values())
    given = {
        "do": o, "dstate": zeros(1, 2, 6, 12), "dnormalizer": zeros(1, 2, 6), "o": o,
        **dict(zip(("shift", "top", "denominator", "kept"), kept, strict=True)),
    }  # fmt: skip
    for change in (
        {"do": o[:, :5]}, {"do": o.double()}, {"dstate": zeros(1, 2, 12, 6)}, {"o": o[..., :8]},
        {"dstate": zeros(1, 2, 6, 12).double()}, {"dnormalizer": zeros(1, 2, 5)}, {"o": o.half()},
        {"shift": zeros(1, 8, 4)}, {"top": kept[1].long()}, {"denominator": kept[2].double()},
        {"denominator": zeros(0)}, {"kept": zeros(1, 5, 2, 78)}, {"kept": kept[3].double()},
    ):  # fmt: skip
        do, dstate, dnormalizer, *saved = (given | change).values()
        with pytest.raises(RuntimeError):
            backward(do, dstate, dnormalizer, *tensors, *saved, window, block, scale, segment)
    for top in (-1, 8, 2**30):  # no row of k
        saved = o, kept[0], torch.full_like(kept[1], top), *kept[2:]
        with pytest.raises(RuntimeError):
            backward(o, None, None, *tensors, *saved, window, block, scale, segment)
