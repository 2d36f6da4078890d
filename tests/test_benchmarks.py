"""The benchmark's promises: no speed-up without a passed check, reasons for absent peers, honest ratios."""

import contextlib
import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import experts, experts_peers, hybrid, machine, memory, report, runner
from benchmarks.__main__ import main
from benchmarks.cases import OURS, Candidate, Run, Unavailable, registry, select
from benchmarks.check import Check, Expected
from benchmarks.hybrid_peers import decode_separate, hybrid_run
from benchmarks.linear_peers import our_reference
from benchmarks.peers import FLEX_BLOCK, flex_block_mask
from benchmarks.sliding_window import SHAPES, Shape, attention_case
from slmkernels.ops.experts.reference import expert_mlp
from slmkernels.ops.sliding_window.reference import attention, visible

CPU = torch.device("cpu")
SMALL = registry(small=True)
FORWARD = SMALL["sliding_window/standard/forward/fp32"]
BACKWARD = SMALL["sliding_window/standard/forward_backward/fp32"]
ENVIRONMENT = {"cpu": "a processor", "threads": 1, "torch": "2.13"}
RATES = machine.Rates(matmul=1e9, copy=1e9)
GOOD, BAD = Check(1e-7, 1e-6, "o"), Check(1e-3, 1e-6, "o")


def measured(name, *samples, check=GOOD):
    return runner.Measurement(name, check=check, samples=list(samples))


def result(*measurements):
    return runner.Result(FORWARD, "reference", RATES, list(measurements))


def printed(data):
    console = Console(file=io.StringIO(), width=140)
    report.print_result(console, data)
    return console.file.getvalue()


def broken(candidate, output):
    """The candidate with one of its results doubled."""

    def prepare(inputs):
        run = candidate.prepare(inputs)
        return Run(lambda: tuple(x * 2 if i == output else x for i, x in enumerate(run.call())), run.ours)

    return Candidate(candidate.name, prepare)


def measure(case, **options):
    return runner.measure(case, CPU, RATES, rounds=2, **{"with_memory": False, **options})


def without_compilers(case):
    return replace(case, peers=tuple(peer for peer in case.peers if not peer.compiles))


def test_speedup_is_the_ratio_of_medians_and_of_minima():
    ours, peer = measured(OURS, 2.0, 1.0, 9.0), measured("peer", 8.0, 6.0, 5.0)
    assert result(ours, peer).speedup(peer) == (3.0, 5.0)
    assert result(ours, peer).speedup(ours) is None


@pytest.mark.parametrize(("ours", "theirs"), [(BAD, GOOD), (GOOD, BAD), (Check(math.nan, 1e-6, "o"), GOOD)])
def test_no_speedup_without_two_passed_checks(ours, theirs):
    pair = result(measured(OURS, 1.0, check=ours), measured("peer", 2.0, check=theirs))
    assert pair.speedup(pair.measurements[1]) is None


@pytest.mark.parametrize("output", range(4))
def test_wrong_results_show_wrong_and_no_speedup(output):
    case = without_compilers(replace(BACKWARD, ours=broken(BACKWARD.ours, output)))
    found = measure(case)
    assert found.ours.check.output == case.outputs[output]
    data = report.to_json(ENVIRONMENT, [found])["results"][0]
    assert data["candidates"][0]["status"] == "wrong"
    assert data["candidates"][0]["of_matmul_rate"] is None
    assert all(candidate["speedup"] is None for candidate in data["candidates"])
    assert "WRONG" in printed(data)


def test_ours_is_checked_at_the_small_size_too():
    wrong_there = replace(FORWARD, ours=broken(FORWARD.ours, 0))
    assert not measure(without_compilers(FORWARD), small=wrong_there).ours.correct


def test_absent_and_failing_peers_leave_a_reason():
    def absent(inputs):
        raise Unavailable("not here")

    def fails(inputs):
        return Run(lambda: 1 / 0)

    case = replace(FORWARD, peers=(Candidate("absent", absent), Candidate("fails", fails)))
    found = measure(case)
    assert [m.reason for m in found.measurements] == [None, "not here", "ZeroDivisionError: division by zero"]
    assert found.ours.samples
    text = printed(report.to_json(ENVIRONMENT, [found])["results"][0])
    assert "absent: not here" in text


def test_ours_absent_fails_the_run_but_prints():
    found = result(runner.Measurement(OURS, reason="no kernel"), measured("peer", 1.0))
    data = report.to_json(ENVIRONMENT, [found])["results"][0]
    assert data["candidates"][0]["status"] == "absent"
    assert "no kernel" in printed(data)


@pytest.mark.parametrize("name", list(SMALL))
def test_every_case_passes_its_check_with_every_peer_at_hand(name):
    case = without_compilers(SMALL[name])
    expected, ran = Expected.of(case, case.inputs(CPU)), []
    for candidate in case.candidates:
        with contextlib.suppress(Unavailable):
            check, _ = expected.check(candidate)
            if not candidate.yardstick:
                assert check.passed, (candidate.name, check)
                ran.append(candidate.name)
    assert ran[0] == OURS
    assert len(ran) > 1, "a case without a peer says nothing"


def test_yardstick_is_timed_and_named_as_one():
    peer = FORWARD.peers[0]._replace(yardstick="another function")
    found = measure(replace(FORWARD, peers=(peer,)))
    data = report.to_json(ENVIRONMENT, [found])["results"][0]
    ours, other = data["candidates"]
    assert (ours["status"], ours["yardstick"]) == ("ok", None)
    assert (other["status"], other["yardstick"]) == ("yardstick", "another function")
    assert other["speedup"]["medians"] == pytest.approx(other["median_s"] / ours["median_s"])
    assert other["max_error"] is None
    assert other["of_matmul_rate"] is None
    assert f"{peer.name}: a yardstick, not this function: another function" in printed(data)


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("label", ["standard", "gqa"])
def test_hybrid_yardsticks_are_window_and_linear_attention(label, mode):
    case = SMALL[f"hybrid/{label}/{mode}/fp32"]
    shape, inputs = hybrid.SHAPES[label].small(), case.inputs(CPU)

    def both(q, k, v, phi_q, phi_k):
        near = attention(q, k, v, None, shape.window - 1, 0, shape.D**-0.5, None)[0]
        v, phi_k = (x.repeat_interleave(shape.Hq // shape.H, 2) for x in (v, phi_k))
        return near + our_reference({"normalize": False, "l2norm_qk": False})(phi_q, phi_k, v)

    exact = hybrid_run(both, {name: x.double() for name, x in inputs.items()}, mode != "forward").call()
    yardsticks = [peer for peer in case.peers if peer.yardstick]
    assert len(yardsticks) == 2
    for peer in yardsticks:
        for found, expected in zip(peer.prepare(inputs).call(), exact, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_hybrid_decode_yardsticks_are_the_two_steps(normalize):
    case = SMALL["hybrid/decode/step/fp32"]
    inputs = case.inputs(CPU)
    found = decode_separate(normalize).prepare(inputs).call()[0]
    x = {name: y.double() for name, y in inputs.items()}
    k, v = (torch.cat([x[f"past_{name}"], x[name]], 1)[:, 1:] for name in "kv")
    near = attention(x["q"], k, v, None, None, None, x["q"].shape[-1] ** -0.5, None)[0]
    phi_q, phi_k = (x[name][:, 0] for name in ("phi_q", "phi_k"))
    state = x["state"] + phi_k[..., :, None] * x["v"][:, 0, :, None]
    far = (phi_q[..., None, :] @ state)[..., 0, :]
    sums = (phi_q * (x["normalizer"] + phi_k)).sum(-1, keepdim=True) + 1e-6
    far = far / sums if normalize else far * phi_q.shape[-1] ** -0.5
    torch.testing.assert_close(found.double(), near + far[:, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", hybrid.SHAPES.values(), ids=hybrid.SHAPES)
def test_hybrid_flops_count_near_pairs_and_the_state(shape):
    small = shape.small()
    j = torch.arange(small.T)
    far = j < hybrid.reference.first_near(j[:, None], small.window, small.block)
    pairs, readers, written = ((j <= j[:, None]) & ~far).sum(), far.any(1).sum(), far.any(0).sum()
    near, state = 4 * small.D * pairs * small.Hq, 2 * small.F * small.D
    read, write = state * readers * small.Hq, state * written * small.H
    assert small.flops(backward=False) == small.B * (near + read + write)
    assert small.flops(backward=True) == small.B * (3.5 * near + 3 * read + 4 * write)


def test_hybrid_last_rows_check_sees_an_error_in_any_gradient():
    for alignment in ("sliding", "block"):
        shape = hybrid.Shape(T=1152, Hq=4, H=2, D=16, F=24, window=64, alignment=alignment)
        assert shape.checked_rows < shape.T
        long = hybrid.hybrid_case("long", shape, "forward_backward", "fp32")
        expected = Expected.of(long, long.inputs(CPU))
        assert expected.check(long.ours)[0].passed
        for output in range(6):
            assert not expected.check(broken(long.ours, output))[0].passed


EXPERTS = [name for name in SMALL if name.startswith("experts/") and "/forward_backward/fp32" in name]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_check_sees_an_error_in_any_result(name):
    case = SMALL[name]
    expected = Expected.of(case, case.inputs(CPU))
    for output in range(len(case.outputs)):
        assert not expected.check(broken(case.ours, output))[0].passed, case.outputs[output]


def test_check_takes_integers_exactly():
    def off_by_one(inputs):
        run = SMALL[name].ours.prepare(inputs)

        def call():
            indices, weights, counts, *rest = run.call()
            return indices, weights, counts + torch.eye(len(counts), dtype=torch.int32)[0], *rest

        return Run(call, run.ours)

    name = "experts/route/forward/bf16"
    check = Expected.of(SMALL[name], SMALL[name].inputs(CPU)).check(Candidate("", off_by_one))[0]
    assert (check.output, check.max_error, check.allowed) == ("counts", 1, 0)


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("label", ["standard", "segments"])
def test_expert_yardsticks_are_the_products(label, mode):
    case = SMALL[f"experts/{label}/{mode}/fp32"]
    shape, backward = experts.SHAPES[label].small(), mode != "forward"
    inputs = case.inputs(CPU)
    alone, dense = (peer.prepare(inputs) for peer in case.peers if peer.yardstick)
    expert, order = inputs["indices"].flatten().long().sort()
    rows, dy = (inputs[name].double()[order // shape.k] for name in ("x", "dy"))
    up, down = (inputs[name].double() for name in ("w_gate_up", "w_down"))
    h = (up[expert] @ rows[..., None])[..., 0]
    a = experts_peers.gated(h)
    exact = [h, (down[expert] @ a[..., None])[..., 0]]
    if backward:
        exact += [(h[:, None] @ up[expert])[:, 0], (dy[:, None] @ down[expert])[:, 0]]
        members = torch.nn.functional.one_hot(expert, shape.E).double()
        exact += [torch.einsum("re,ri,rj->eij", members, *pair) for pair in ((h, rows), (dy, a))]
    for found, expected in zip(alone.call(), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    everyone = torch.arange(shape.k).expand(shape.T, -1)
    weights = torch.ones(shape.T, shape.k, dtype=torch.float64)
    x = inputs["x"].double()
    y = expert_mlp(x, everyone, weights, up, down, None, None, "swiglu", False)
    torch.testing.assert_close(dense.call()[0].double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["forward", "forward_backward"])
@pytest.mark.parametrize("label", experts.SHAPES)
def test_expert_flops_are_those_of_the_products(label, mode):
    case = SMALL[f"experts/{label}/{mode}/fp32"]
    peers = {peer.name: peer for peer in case.peers}
    for name in ("eager loop", "dense"):
        run = peers[name].prepare(case.inputs(CPU))
        with FlopCounterMode(display=False) as counter:
            run.call()
        assert counter.get_total_flops() == case.flops, name


def test_expert_cases_are_what_they_are_called():
    inputs = SMALL["experts/skewed/forward/fp32"].inputs(CPU)
    assert (inputs["indices"] == 0).sum() * 2 == inputs["indices"].numel()
    assert (inputs["indices"].sort(1).values.diff() > 0).all()
    inputs = registry()["experts/segments/forward/bf16"].inputs(CPU)
    lengths = inputs["cu_seqlens"].diff()
    assert (len(lengths), lengths.sum(), lengths.min() > 0) == (16, 2048, True)
    logits = registry()["experts/route/forward/bf16"].inputs(CPU)["logits"]
    assert (logits.sort(1).values.diff() > 0).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("label", experts.SHAPES)
def test_experts_keep_x_the_preactivation_indices_and_weights(label, dtype):
    case, shape = SMALL[f"experts/{label}/forward_backward/{dtype}"], experts.SHAPES[label].small()
    inputs = case.inputs(CPU)
    if case.backend(inputs) == "reference":
        pytest.skip("autograd keeps more for the reference")
    saved = {c.name: memory.saved_for_backward(c.prepare(inputs)) for c in (case.ours, *case.peers[:3])}
    rows = shape.T * shape.k
    values = inputs["x"].numel() + 2 * rows * shape.n
    named = [inputs[name] for name in ("indices", "weights", "cu_seqlens", "experts") if name in inputs]
    indices = sum(x.numel() * x.element_size() for x in named)
    assert saved.pop(OURS) <= values * case.dtype.itemsize + indices
    # the gathered rows and, to be weighted, the second product's; the pre-activation, silu(gate), its product
    theirs = rows * ((1 + ("weights" in inputs)) * shape.d + 4 * shape.n) * case.dtype.itemsize
    assert all(size >= theirs for size in saved.values()), saved


def test_saved_for_backward_counts_storages_once_without_parameters():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    run = Run(lambda: torch.autograd.grad(((x @ w) * (x @ w.mT)).sum(), (x, w)), parameters=(w,))
    assert memory.saved_for_backward(run) == 3 * x.numel() * 4  # x and both products


def test_what_is_kept_for_the_backward_is_reported():
    case = without_compilers(BACKWARD)
    runs = {candidate.name: candidate.prepare(case.inputs(CPU)) for candidate in (case.ours, case.peers[0])}
    found = result(measured(OURS, 1.0), measured(case.peers[0].name, 2.0), measured("failed"))
    runner._fill_saved(replace(found, case=case), runs)
    ours, peer, failed = found.measurements
    assert min(ours.saved, peer.saved) > 0
    assert failed.saved is None
    data = report.to_json(ENVIRONMENT, [found])["results"][0]
    assert data["candidates"][0]["saved_for_backward_bytes"] == ours.saved
    assert f"kept for the backward, without parameters: {OURS} {ours.saved / 2**20:.2f}" in printed(data)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pairs_counts_the_visible_keys(shape):
    small = shape.small()
    assert small.pairs() == visible(small.T, small.T, *small.bounds).sum().item()


@pytest.mark.parametrize("bounds", [(255, 0), (None, 0), (128, 128), (0, 0), (300, None), (1, 130)])
@pytest.mark.parametrize("T", [128, 512, 700])
def test_flex_blocks_cover_the_window(T, bounds):
    mask = flex_block_mask(T, *bounds, CPU)
    n = -(-T // FLEX_BLOCK)
    dense = torch.zeros(n * FLEX_BLOCK, n * FLEX_BLOCK, dtype=torch.bool)
    dense[:T, :T] = visible(T, T, *bounds)
    blocks = dense.view(n, FLEX_BLOCK, n, FLEX_BLOCK)
    whole, some = blocks.all(dim=3).all(dim=1), blocks.any(dim=3).any(dim=1)
    listed = mask.to_dense()[0, 0].bool()
    assert torch.equal(listed, some)
    full = [
        set(row[:k].tolist())
        for row, k in zip(mask.full_kv_indices[0, 0], mask.full_kv_num_blocks[0, 0], strict=True)
    ]
    assert full == [set(row.nonzero().flatten().tolist()) for row in whole]


def test_last_rows_check_sees_an_error_in_any_gradient():
    shape = Shape(T=1100, Hq=4, H=2, D=16, window=70)
    assert shape.checked_rows < shape.T
    long = attention_case("long", shape, "forward_backward", "fp32")
    expected = Expected.of(long, long.inputs(CPU))
    assert expected.check(long.ours)[0].passed
    for output in range(4):
        assert not expected.check(broken(long.ours, output))[0].passed


def test_measured_memory_grows_with_scratch():
    try:
        found = memory.measure(FORWARD, [OURS, "SDPA band mask"], CPU, small=True)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert set(found) == {OURS, "SDPA band mask"}
    assert all(isinstance(size, int) and size >= 0 for size in found.values())


def test_memory_sees_what_torch_does_not_allocate():
    if not memory.RESET_PEAK.exists():
        pytest.skip("needs Linux's /proc")

    def scratch():
        bytearray(b"1" * 2**26)
        return ()

    assert memory._cpu_growth(scratch) > 2**25


def test_select_takes_globs_prefixes_and_dtypes():
    assert set(select(SMALL, ["sliding_window/decode"], ["fp32"])) == {"sliding_window/decode/step/fp32"}
    assert all("/forward/" in name for name in select(SMALL, ["*/forward/*"], []))
    assert select(SMALL, [], []) == SMALL
    with pytest.raises(ValueError, match="no case matches 'nothing'"):
        select(SMALL, ["nothing"], [])


def test_command_line_writes_json_tables_and_figures(tmp_path, capsys):
    case = "sliding_window/decode/step/fp32"
    assert main([case, "--quick", "--rounds", "2", "--out", str(tmp_path)]) == 0
    run = json.loads((tmp_path / "results.json").read_text())
    assert run["schema"] == report.SCHEMA
    assert {"date", "commit", "torch", "triton", "cpu", "isa", "threads"} <= set(run["environment"])
    ours, peer = run["results"][0]["candidates"]
    assert run["results"][0]["case"] == case
    assert (ours["name"], ours["status"], ours["rounds"]) == (OURS, "ok", 2)
    assert ours["max_error"] <= ours["allowed_error"]
    assert peer["speedup"]["medians"] == pytest.approx(peer["median_s"] / ours["median_s"])
    assert peer["speedup"]["minima"] == pytest.approx(peer["min_s"] / ours["min_s"])
    figures = {path.name for path in tmp_path.glob("sliding_window_attention_step.*")}
    assert figures == {"sliding_window_attention_step.svg", "sliding_window_attention_step.png"}
    assert case in (tmp_path / "results.txt").read_text()
    capsys.readouterr()
    assert main(["--load", str(tmp_path / "results.json")]) == 0
    assert case in capsys.readouterr().out


def test_nan_becomes_null_in_json(tmp_path):
    run = report.to_json(ENVIRONMENT, [result(measured(OURS, 1.0, check=Check(math.nan, 1.0, "o")))])
    report.write_json(run, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["results"][0]["candidates"][0]["max_error"] is None


def test_command_line_rejects_unknown_cases(capsys):
    with pytest.raises(SystemExit):
        main(["no/such/case"])
    assert "no case matches" in capsys.readouterr().err
