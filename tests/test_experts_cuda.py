"""The CUDA C++ kernels of `expert_mlp` and `segment_mlp`, run by tests/executor on the CPU.

Against the float64 reference; the sort against a stable argsort; the same bits from run to run; refusals.
"""

import pytest
import torch
from executor import operators, take_conflicts
from experts_cases import FORMS, MATRICES, expected, luck, make
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import compare, rounded

from slmkernels.ops.experts import function
from slmkernels.ops.experts.reference import ACTIVATIONS, GATED, activate

DTYPES = (torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# By rows and experts the host chooses the tile: 16, 64 or 128 rows.
SMALL = {"T": 23, "d": 72, "n": 40, "E": 5, "k": 2, "absent": 0.2}
MIDDLE = {"T": 61, "d": 136, "n": 72, "E": 2, "k": 2, "absent": 0.1}
LARGE = {"T": 389, "d": 72, "n": 136, "E": 1, "k": 1, "absent": 0.1}  # several tiles a block
SEGMENTS = {"lengths": (9, 0, 70, 5, 1), "d": 72, "n": 40, "absent": 0.3, "seed": 2}
TILES = {"small": SMALL, "middle": MIDDLE, "large": LARGE, "segments": SEGMENTS}
every_tile = pytest.mark.parametrize("tile", TILES)


def forward(tensors, options, save=False):
    """y and h of the operator."""
    indices = options.get("indices", options.get("expert_of_segment"))
    matrices = [tensors.get(name) for name in MATRICES]
    form = ACTIVATIONS.index(options["activation"]), options["layout"] == "interleaved"
    return operators().expert_mlp_forward(
        tensors["x"], indices, tensors.get("weights"), options.get("cu_seqlens"), *matrices, *form, save
    )


def check(dtype, **case):
    """Assert the acceptance rule for y, and that ldmatrix meets no conflict."""
    tensors, options, same, truth = expected(dtype, **case)
    take_conflicts()
    ours = {"y": forward(tensors, options)[0]}
    assert take_conflicts() == 0
    compare(ours, {"y": same["y"]}, {"y": truth["y"]}, dtype, luck(dtype, **case))


def case(dtype=torch.bfloat16, **sizes):
    """Tensors of a call in dtype, and its options."""
    tensors, options = make(**sizes)
    return rounded(tensors, dtype), options


# ---- against the reference ---------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("transposed", [False, True])
@every_tile
def test_tiles(tile, transposed, dtype):
    check(dtype, transposed=transposed, **TILES[tile])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("activation", "layout"), FORMS)
def test_forms(activation, layout, transposed):
    for dtype in DTYPES:
        form = {"activation": activation, "layout": layout, "transposed": transposed}
        check(dtype, **SMALL | form)
        check(dtype, **SEGMENTS | form, biases=False)


@settings(max_examples=25)
@given(
    T=st.sampled_from([1, 2, 7, 16, 17, 40, 67]),
    eights=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    E=st.sampled_from([1, 2, 7, 40]),
    k=st.integers(1, 5),
    routing=st.sampled_from(["any", "one", "even", "none"]),
    absent=st.sampled_from([0.0, 0.3]),
    form=st.sampled_from(FORMS),
    biases=st.booleans(),
    transposed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 3),
)
def test_any_experts(T, eights, E, k, routing, absent, form, biases, transposed, dtype, seed):
    sizes = {"T": T, "d": 8 * eights[0], "n": 8 * eights[1], "E": E, "k": k, "seed": seed}
    options = {"routing": routing, "absent": absent, "biases": biases, "transposed": transposed}
    check(dtype, activation=form[0], layout=form[1], **sizes, **options)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 3, 16, 31, 70]), min_size=1, max_size=6),
    eights=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    E=st.sampled_from([1, 4]),
    absent=st.sampled_from([0.0, 0.4]),
    form=st.sampled_from(FORMS),
    transposed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_segments(lengths, eights, E, absent, form, transposed, dtype):
    sizes = {"lengths": tuple(lengths), "d": 8 * eights[0], "n": 8 * eights[1], "E": E, "absent": absent}
    check(dtype, activation=form[0], layout=form[1], transposed=transposed, **sizes)


@every_dtype
def test_no_tokens(dtype):
    for sizes in ({"T": 0, "k": 3}, {"lengths": ()}, {"lengths": (0, 0)}):
        y, h = forward(*case(dtype, d=16, n=8, **sizes), True)
        assert y.shape == (0, 16)
        assert h.shape == (0,)


def test_many_segments():
    """More than the block that cuts them has threads."""
    lengths = tuple(1 if s % 9 == 0 else 0 for s in range(1300))
    check(torch.bfloat16, lengths=lengths, d=8, n=8, E=3)


def test_little_shared_memory(monkeypatch):
    """Where a block has 99 KB, large tiles do not fit: others take their place."""
    monkeypatch.setenv("SLM_EXECUTOR_ARCHITECTURE", "86")
    check(torch.bfloat16, **LARGE)


@every_dtype
@pytest.mark.parametrize("tile", ["small", "segments"])
def test_strides(tile, dtype):
    """Rows apart, columns apart, addresses and rows that are no multiple of 16 bytes: the same bits."""
    tensors, options = case(dtype, **TILES[tile])
    y, h = forward(tensors, options, True)

    def apart(x, rows, columns, offset):
        wide = x.new_zeros(*x.shape[:-1], x.shape[-1] * columns + rows + offset)
        view = wide[..., offset : offset + columns * x.shape[-1] : columns]
        return view.copy_(x)

    for rows, columns, offset in ((8, 1, 8), (3, 1, 0), (8, 1, 1), (0, 2, 0), (0, 1, 0)):
        views = {name: apart(x, rows, columns, offset) for name, x in tensors.items() if name != "dy"}
        assert all(map(torch.equal, forward(views, options, True), (y, h)))
    shifted = {
        name: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for name, x in tensors.items()
    }
    assert all(map(torch.equal, forward(shifted, options, True), (y, h)))


@every_dtype
def test_matrices_of_one_expert_for_all(dtype):
    """Expanded matrices and biases have a stride of 0."""
    tensors, options = case(dtype, **SMALL | {"absent": 0.0})
    same = tensors | {name: tensors[name][:1].expand_as(tensors[name]) for name in MATRICES}
    copies = {name: x.contiguous() for name, x in same.items()}
    assert torch.equal(forward(same, options)[0], forward(copies, options)[0])


# ---- properties --------------------------------------------------------------------------------------------


@every_dtype
@every_tile
def test_two_runs_are_equal_and_saving_changes_nothing(tile, dtype, monkeypatch):
    """The second run has blocks and threads in the opposite order."""
    tensors, options = case(dtype, **TILES[tile])
    y, h = forward(tensors, options, True)
    monkeypatch.setenv("SLM_EXECUTOR_ORDER", "reverse")
    assert all(map(torch.equal, forward(tensors, options, True), (y, h)))
    again, none = forward(tensors, options)
    assert torch.equal(again, y)
    assert none.shape == (0,)


@pytest.mark.parametrize(("activation", "layout"), FORMS)
@pytest.mark.parametrize("tile", ["small", "segments"])
def test_h_is_the_pre_activation_in_the_order_of_experts(tile, activation, layout):
    """As Triton's kernels keep it: rows by expert and, inside, by slot; columns as rows of w_gate_up. Absent
    experts' rows come last, zeros; of segments they are where the tokens are."""
    tensors, options = case(activation=activation, layout=layout, **TILES[tile])
    E, n = tensors["w_down"].shape[::2]
    H = (2 if activation in GATED else 1) * n
    if "indices" in options:
        experts = options["indices"].flatten()
        ranges = torch.where((experts >= 0) & (experts < E), experts, E)
        order = ranges.argsort(stable=True)
        tokens, experts = order // options["indices"].shape[1], ranges[order]
    else:
        options["expert_of_segment"][2] = -1
        tokens = torch.arange(len(tensors["x"]))
        experts = options["expert_of_segment"].repeat_interleave(options["cu_seqlens"].diff())
    h = forward(tensors, options, True)[1].view(-1, H)
    absent = (experts < 0) | (experts >= E)
    e = experts.masked_fill(absent, 0).long()
    x, w, b = (tensors[name].double() for name in ("x", "w_gate_up", "b_gate_up"))
    exact = (torch.einsum("rd,rhd->rh", x[tokens], w[e]) + b[e]).masked_fill(absent[:, None], 0)
    assert absent.any()
    assert not h[absent].any()
    torch.testing.assert_close(h.double(), exact, rtol=2**-8, atol=1e-3)


def sorted_tokens(indices, E):
    """The tokens of the rows that the sort makes of indices: those of h, where experts' matrices are ones."""
    T, k = indices.shape
    x = torch.zeros(T, 8, dtype=torch.float16)
    x[:, 0], x[:, 1] = torch.arange(T) % 1024, torch.arange(T) // 1024
    up = torch.eye(8, dtype=torch.float16).expand(E, 8, 8)
    relu2 = ACTIVATIONS.index("relu2")
    weights = torch.ones(T, k)
    h = (
        operators()
        .expert_mlp_forward(x, indices, weights, None, up, up, None, None, relu2, False, True)[1]
        .view(T * k, 8)
    )
    return (h[:, 0] + 1024 * h[:, 1].float()).long()


@pytest.mark.parametrize(
    ("T", "k", "E", "architecture"),
    [
        (1, 1, 1, 80), (3, 2, 300, 80), (700, 3, 5, 80), (60, 5, 700, 80), (4100, 1, 3, 80),
        (1030, 1, 10300, 80), (600, 1, 2**14, 86),
    ],
    ids=["one", "few", "several", "many-experts", "long", "several-blocks", "little-memory"],
)  # fmt: skip
def test_sort(T, k, E, architecture, monkeypatch):
    """A stable sort of slots by expert, absent ones last; in one block, or in several."""
    monkeypatch.setenv("SLM_EXECUTOR_ARCHITECTURE", str(architecture))
    generator = torch.Generator().manual_seed(T)
    indices = torch.randint(-1, E + 1, (T, k), dtype=torch.int32, generator=generator)
    if E > 1000:  # of 60 of them, which are fewer tiles
        indices = indices.flatten()[torch.randint(60, (T, k), generator=generator)]
    ranges = torch.where((indices >= 0) & (indices < E), indices, E).flatten()
    order = ranges.argsort(stable=True)
    present = ranges[order] < E
    assert torch.equal(sorted_tokens(indices, E)[present], (order // k)[present])


def test_experts_do_not_see_each_other():
    """A token's y has the same bits alone, among others, and with another's NaN beside it."""
    tensors, options = case(**SMALL | {"absent": 0.0})
    y = forward(tensors, options)[0]
    one = {name: x[:1] if name in ("x", "weights") else x for name, x in tensors.items()}
    assert torch.equal(forward(one, options | {"indices": options["indices"][:1]})[0], y[:1])
    x = tensors["x"].clone()
    x[1] = torch.nan
    noisy = forward(tensors | {"x": x}, options)[0]
    assert noisy[1].isnan().all()
    others = [t for t in range(len(x)) if t != 1]
    assert torch.equal(noisy[others], y[others])


def test_absent_experts_add_nothing_whatever_their_weights():
    tensors, options = case(**SMALL)
    absent = (options["indices"] < 0) | (options["indices"] >= SMALL["E"])
    weights = tensors["weights"].masked_fill(absent, torch.nan)
    assert absent.any()
    assert torch.equal(forward(tensors | {"weights": weights}, options)[0], forward(tensors, options)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out(activation):
    """Of 0, large, infinite and undefined pre-activations, as the reference has them."""
    h = torch.tensor([0, 1e-4, 0.5, 3, 9, 60, 3e4, torch.inf, torch.nan], dtype=torch.float16)
    h = torch.cat([h, -h[1:7]])
    E, width = len(h), 16 if activation in GATED else 8
    up, down = torch.zeros(E, width, 8, dtype=torch.float16), torch.zeros(E, 8, 8, dtype=torch.float16)
    bias = torch.zeros(E, width, dtype=torch.float16)
    bias[:, 0], bias[:, 8:9], down[:, 0, 0] = h, 1, 1
    tensors = {"x": up[:, 0], "weights": torch.ones(E, 1), "w_gate_up": up, "w_down": down, "b_gate_up": bias}
    options = {"activation": activation, "layout": "concatenated", "indices": torch.arange(E).int()[:, None]}
    ours = forward(tensors, options)[0][:, 0].double()
    units = torch.stack([h, torch.ones_like(h)], 1) if activation in GATED else h
    exact = activate(units.double(), activation, False).flatten().half().double()
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-5, equal_nan=True)


# ---- what is refused ---------------------------------------------------------------------------------------


def test_raw_operator_refuses_what_does_not_fit():
    tensors, options = case(T=4, d=16, n=8, E=2, k=2, biases=True)

    def changed(**changes):
        return forward(tensors | changes, options | {k: v for k, v in changes.items() if k == "indices"})

    def zeros(*shape):
        return torch.zeros(*shape, dtype=torch.bfloat16)

    changed()
    float32 = {name: x.float() for name, x in tensors.items()}
    with pytest.raises(RuntimeError, match="bfloat16 or float16"):
        forward(float32, options)
    for sizes in ({"d": 12}, {"n": 12}):
        with pytest.raises(RuntimeError, match="multiples of 8"):
            forward(*case(T=4, **{"d": 16, "n": 8, "E": 2, "k": 2} | sizes))
    for misfit in (
        {"x": zeros(4, 8)}, {"x": zeros(4, 16).half()}, {"x": zeros(5, 16)}, {"weights": zeros(4, 2)},
        {"weights": torch.zeros(4, 3)}, {"indices": torch.zeros(4, 2).long()},
        {"indices": torch.zeros(4).int()}, {"w_gate_up": zeros(2, 8, 16)}, {"w_down": zeros(2, 16, 16)},
        {"b_gate_up": zeros(2, 8)}, {"b_down": zeros(1, 16)},
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="must be"):
            changed(**misfit)
    one = torch.zeros(2, 1, dtype=torch.int32)
    for d, n in ((2**29, 8), (8, 2**29)):
        x = zeros(1, 1).expand(2, d)
        wide = {"w_gate_up": zeros(1, 1, 1).expand(1, 2 * n, d), "w_down": zeros(1, 1, 1).expand(1, d, n)}
        with pytest.raises(RuntimeError, match="up to 268435456"):
            forward({"x": x, "weights": torch.zeros(2, 1)} | wide, options | {"indices": one})
    segments, of = case(lengths=(3, 2), d=16, n=8)
    cu, experts = of["cu_seqlens"], of["expert_of_segment"]
    for misfit in (
        {"cu_seqlens": cu.long()}, {"cu_seqlens": cu[:2]}, {"cu_seqlens": cu[None]},
        {"cu_seqlens": cu[:1], "expert_of_segment": experts[:0]},
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="must"):
            forward(segments, of | misfit)
    with pytest.raises(RuntimeError, match="weights must be absent"):
        forward(segments | {"weights": torch.ones(5, 1)}, of)


def test_wrong_offsets_touch_no_other_memory():
    """The host cannot look at them; the executor would report what lies outside."""
    most = 2**31 - 1
    for offsets in (
        [3, 7], [0, 3], [0, 90], [0, most, 0, most], [0, 9, 2, 50], [-9, most, -most, 4], [0, most] * 700,
    ):  # fmt: skip
        tensors, options = case(lengths=(50,) + (0,) * (len(offsets) - 2), d=16, n=8)
        forward(tensors, options | {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32)})


def call(dtype=torch.bfloat16, d=16, n=8, **sizes):
    """A checked call, with its tensors on the CPU."""
    tensors, options = case(dtype, d=d, n=n, **sizes)
    del tensors["dy"]
    return function.prepare(**tensors, **options)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
        ({"d": 12}, "multiples of 8 up to 268435456, not d = 12, n = 8"),
        ({"n": 20}, "multiples of 8 up to 268435456, not d = 16, n = 20"),
        ({"d": 8, "E": 2**14 + 1}, "up to 16384 experts and 536870912 rows, not E = 16385"),
    ],
)
def test_reasons(changes, reason):
    assert function.reason_against_cuda(call()) is None
    assert reason in function.reason_against_cuda(call(**changes))


def test_reasons_of_size():
    fits = call(k=1)
    x, down = fits.x[:1, :1], fits.w_down[:1, :1, :1]
    for T, d, reason in (
        (2, 2**29, "up to 268435456, not d = 536870912"),
        (2**29 + 8, 8, "not E = 1, T k = 536870920"),
        (2**20, 2**14, "fewer than 17179869184 numbers"),
    ):
        large = {"x": x.expand(T, d), "indices": fits.indices[:1].expand(T, 1)}
        with torch.no_grad():
            found = function.reason_against_cuda(fits._replace(**large, w_down=down.expand(1, d, 8)))
        assert reason in found


@pytest.mark.parametrize(
    ("rows", "capability", "slower"),
    [(512, (9, 0), True), (508, (9, 0), False), (512, (8, 0), False), (4096, (10, 0), False)],
)
def test_triton_is_preferred_where_it_has_wgmma(rows, capability, slower):
    many = call(E=4, k=4)
    changed = many._replace(indices=many.indices[:1].expand(rows // 4, 4))
    assert (function.slower_than_triton(changed, capability) is not None) == slower


def test_gradients_are_not_for_cuda_yet():
    fits = call()
    for name in ("x", "weights", *MATRICES):
        wanted = fits._replace(**{name: getattr(fits, name).clone().requires_grad_()})
        assert "no native CUDA backward" in function.reason_against_cuda(wanted)
        with torch.no_grad():
            assert function.reason_against_cuda(wanted) is None
