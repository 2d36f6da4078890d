"""What the benchmark promises on a GPU, as far as it can be tested without one: its cases and their bars, its
peers' arguments, its rows for our backends, its timing on a fake device."""

import contextlib
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import cases, linear_peers, machine, peers, report, runner, timing
from benchmarks.cases import OF_COPY, OURS, TERAFLOPS, Bar, Candidate, Run, Unavailable, registry, select
from benchmarks.check import Check, Expected
from slmkernels import dispatch
from slmkernels.ops.linear import reference as linear
from slmkernels.ops.sliding_window import reference as sliding_window

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FULL, SMALL = registry(), registry(small=True)
GPU = [name for name, case in FULL.items() if case.gpu]
RATES = machine.Rates(matmul=4e12, copy=2e9)
GOOD, BAD = Check(1e-7, 1e-6, "o"), Check(1e-3, 1e-6, "o")

WINDOW = (("FlexAttention", 1.3, 2), ("FlashAttention-4", 0.8, 1.2))
WINDOW_BACKWARD = (("FlexAttention", 1.2, 2),)
COPY = ((OF_COPY, 0.6, 0.85),)
TRAINING = "B=4 T=8192 Hq=16 Hkv=4 D=64 W="
EXPERTS = "T=16384 d=1024 n=512 E=32 k=4 swiglu"
TABLE = {
    "sliding_window/gpu_w256/forward": (TRAINING + "256", WINDOW),
    "sliding_window/gpu_w512/forward": (TRAINING + "512", WINDOW),
    "sliding_window/gpu_w256/forward_backward": (TRAINING + "256", WINDOW_BACKWARD),
    "sliding_window/gpu_w512/forward_backward": (TRAINING + "512", WINDOW_BACKWARD),
    "sliding_window/gpu_wide_head/forward": (
        "B=1 T=16384 Hq=64 Hkv=8 D=128 W=1024",
        ((TERAFLOPS, 260, 525),),
    ),
    **{
        f"linear/gpu_{row.replace(' ', '_')}_{D}/{mode}": (
            f"{row} B=8 T=2048 H=8 K=V={D}",
            (("fla *", must, 3),),
        )
        for row in ("gated delta", "scalar decay")
        for D in (64, 128)
        for mode, must in (("forward", 1.5), ("forward_backward", 1.3))
    },
    "sliding_window/gpu_decode/step": ("B=64 T=1 Hq=16 Hkv=4 D=64 W=1024", COPY),
    "linear/gpu_decode/step": ("gated delta B=64 T=1 H=8 K=V=128", COPY),
    "hybrid/gpu_decode/step": ("B=64 T=1 Hq=8 Hkv=8 D=V=64 F=64 W=256 sliding", COPY),
    "experts/gpu/forward": (EXPERTS, (("grouped_mm", 1.3, 2),)),
    "experts/gpu/forward_backward": (EXPERTS, (("grouped_mm", 1.3, 2),)),
}


# ---- the cases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_every_case_with_a_bar_is_there(name):
    case, (sizes, bars) = FULL[f"{name}/bf16"], TABLE[name]
    assert (case.dtype, case.sizes, case.bars) == (torch.bfloat16, sizes, bars)
    assert case.gpu
    assert case.graph == name.endswith("/step")
    peers = {peer.name for peer in case.peers}
    for against, _, _ in bars:
        assert against in (TERAFLOPS, OF_COPY) or any(cases.fnmatch.fnmatch(p, against) for p in peers)


def test_no_other_case_for_a_gpu_has_bars_and_no_small_one():
    assert {name for name, case in FULL.items() if case.bars and case.gpu} == {
        f"{name}/bf16" for name in TABLE
    }
    assert not any(case.bars or case.gpu for case in SMALL.values())


def test_cases_for_a_gpu_run_on_a_cpu_only_where_named_in_full():
    everything = select(FULL, [], [], gpu=False)
    assert set(everything) == set(FULL) - set(GPU)
    assert set(select(FULL, [GPU[0]], [], gpu=False)) == {GPU[0]}
    assert not any(case.gpu for case in select(FULL, ["experts"], ["bf16"], gpu=False).values())
    with pytest.raises(ValueError, match="matches cases for a GPU only"):
        select(FULL, ["*/gpu_decode/*"], [], gpu=False)
    assert set(GPU) <= set(select(FULL, [], []))


def test_work_and_traffic_counted_by_hand():
    forward, both = (FULL[f"sliding_window/gpu_w256/{m}/bf16"] for m in ("forward", "forward_backward"))
    pairs = 8192 * 256 - 256 * 255 // 2  # the first 255 queries see fewer keys
    assert forward.flops == 4 * 64 * pairs * 4 * 16
    assert both.flops == 3.5 * forward.flops
    assert forward.bytes == 2 * (2 * 4 * 8192 * 16 * 64 + 2 * 4 * 8192 * 4 * 64)  # q and o; k and v
    assert FULL["sliding_window/gpu_decode/step/bf16"].bytes == 2 * 2 * 64 * 4 * 1024 * 64
    assert FULL["linear/gpu_decode/step/bf16"].bytes == 2 * 4 * 64 * 8 * 128 * 128
    assert FULL["hybrid/gpu_decode/step/bf16"].bytes == 64 * 8 * (2 * 2 * 256 * 64 + 2 * 4 * 64 * 64)
    assert FULL["experts/gpu/forward/bf16"].flops == 6 * 16384 * 4 * 1024 * 512
    gates = 4 * 8 * 2048 * 8  # decay and beta are float32
    assert FULL["linear/gpu_gated_delta_64/forward/bf16"].bytes == 8 * 8 * 2048 * 8 * 64 + 2 * gates
    assert FULL["linear/gpu_scalar_decay_64/forward/bf16"].bytes == 8 * 8 * 2048 * 8 * 64 + gates


# ---- the peers ---------------------------------------------------------------------------------------------

ON_GPU_ONLY = ("FlashAttention-4", "flash-attn", "fla *", "scattermoe", "SDPA full causal")


@pytest.mark.parametrize("name", [name for name in GPU if "hybrid" not in name])
def test_peers_for_a_gpu_refuse_a_cpu_with_a_reason(name):
    case, refused = SMALL[name], 0
    for peer in case.peers:
        if any(cases.fnmatch.fnmatch(peer.name, pattern) for pattern in ON_GPU_ONLY):
            with pytest.raises(Unavailable, match="CUDA device"):
                peer.prepare(case.inputs(CPU))
            refused += 1
    assert refused or name == "sliding_window/gpu_decode/step/bf16"


def test_a_peer_that_cannot_be_imported_leaves_the_reason(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "peer_without_driver.py").write_text("raise RuntimeError('no driver\\nand more')")
    (tmp_path / "peer_of_another_version.py").write_text("")
    reasons = {
        "peer_that_is_nowhere": "not installed: No module named 'peer_that_is_nowhere'",
        "peer_without_driver": "does not import: RuntimeError: no driver",
        "peer_of_another_version": "does not import: AttributeError: module",
    }
    for module, reason in reasons.items():
        with pytest.raises(Unavailable) as error:
            peers.gpu_library(module, "attend", CUDA)
        assert str(error.value).startswith(reason)


def attend(q, k, v, left, right):
    return sliding_window.attention(q, k, v, None, left, right, q.shape[-1] ** -0.5, None)[0]


# Signatures of flash-attn-4 4.0.0b36 and fla-core 0.6.0, computed by our reference.
def flash_attn_func(q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
                    window_size=(None, None)):  # fmt: skip
    left, right = window_size
    return attend(q, k, v, left, 0 if causal else right), None


def parallel_attn(q, k, v, g=None, scale=None, window_size=None, cu_seqlens=None):
    return attend(q, k, v, None if window_size is None else window_size - 1, 0)


def fla_linear(q, k, v, decay, beta, scale, initial_state, l2norm_qk=False, normalize=False):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {"normalize": normalize, "l2norm_qk": l2norm_qk, "form": linear.recurrent}
    return linear.linear_attention(q, k, v, decay, beta, initial_state, scale=scale, **options)[:2]


def simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
    return fla_linear(q, k, v, g_gamma if g is None else g, None, scale, initial_state)


def chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True):
    return fla_linear(q, k, v, None, None, scale, initial_state, normalize=normalize)


def fused_recurrent_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False,
                                reverse=False, normalize=False):  # fmt: skip
    return fla_linear(q, k, v, None, None, scale, initial_state, normalize=normalize)


def gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                     use_qk_l2norm_in_kernel=False):  # fmt: skip
    return fla_linear(q, k, v, g, beta, scale, initial_state, use_qk_l2norm_in_kernel)


LIBRARIES = {
    ("flash_attn.cute", "flash_attn_func"): flash_attn_func,
    ("fla.ops.attn.parallel", "parallel_attn"): parallel_attn,
    **{("fla.ops", f"{form}_simple_gla"): simple_gla for form in ("chunk", "fused_chunk", "fused_recurrent")},
    **{("fla.ops", f"{form}_linear_attn"): chunk_linear_attn for form in ("chunk", "fused_chunk")},
    ("fla.ops", "fused_recurrent_linear_attn"): fused_recurrent_linear_attn,
    **{("fla.ops", f"{form}_gated_delta_rule"): gated_delta_rule for form in ("chunk", "fused_recurrent")},
}
WITH_LIBRARIES = [
    *(name for name in GPU if name.startswith(("sliding_window/gpu_w", "linear/gpu"))),
    *(f"linear/{label}/{mode}/fp32" for label in ("plain", "normalized", "retention")
      for mode in ("forward", "forward_backward")),
    "linear/decode/step/fp32",
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_LIBRARIES)
def test_libraries_are_called_for_the_function_of_the_case(name, monkeypatch):
    def library(module, function, device):
        try:
            return LIBRARIES[module, function]
        except KeyError:
            raise Unavailable("not here") from None

    for module in (peers, linear_peers):
        monkeypatch.setattr(module, "gpu_library", library)
    case, ran = SMALL[name], 0
    expected = Expected.of(case, case.inputs(CPU))
    for peer in case.peers:
        if peer.name.startswith(("fla ", "FlashAttention-4")):
            with contextlib.suppress(Unavailable):
                check, _ = expected.check(peer)
                assert check.passed, (peer.name, check)
                ran += 1
    assert ran


def test_the_yardstick_is_causal_attention_without_the_window():
    case = SMALL["sliding_window/gpu_w256/forward_backward/bf16"]
    assert "without the window" in {peer.name: peer.yardstick for peer in case.peers}["SDPA full causal"]
    inputs = case.inputs(CPU)
    run = peers.attention_run(peers.flash_causal, inputs, backward=False, swap=True)
    exact = attend(*(inputs[name].double() for name in "qkv"), None, 0)
    torch.testing.assert_close(run.ours(run.call()[0]).double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_flexattention_runs_compiled_in_a_case_for_a_gpu():
    case = SMALL["sliding_window/gpu_w256/forward/bf16"]
    flex = next(peer for peer in case.peers if peer.name == "FlexAttention")
    assert Expected.of(case, case.inputs(CPU)).check(flex)[0].passed


# ---- our backends, the bars, the report --------------------------------------------------------------------

WINDOW_CASE = SMALL["sliding_window/gpu_w256/forward/bf16"]


def measured(name, *samples, check=GOOD):
    return runner.Measurement(name, check=check, samples=list(samples))


def result(*measurements, **changes):
    case = replace(WINDOW_CASE, flops=int(4e12), bytes=10**9, **changes)
    return runner.Result(case, "native", RATES, list(measurements))


def test_each_backend_of_ours_has_a_row_on_a_gpu():
    case = FULL[GPU[0]]
    names = {chosen: [c.name for c in case.on(CUDA, chosen).candidates[:3]] for chosen in dispatch.BACKENDS}
    assert names["native"] == [OURS, f"{OURS} triton", case.peers[0].name]
    assert names["triton"] == [OURS, f"{OURS} native", case.peers[0].name]
    assert names["reference"] == [OURS, f"{OURS} native", f"{OURS} triton"]
    on_cpu = case.on(CPU, "native")
    assert (on_cpu.peers, on_cpu.bars) == (case.peers, ())


def test_a_row_of_a_backend_is_held_to_it():
    seen = []

    def prepare(inputs):
        seen.append(dispatch._forced)
        return Run(lambda: (dispatch._forced,))

    before = dispatch._forced
    held = cases._held_to("triton", Candidate(OURS, prepare)).prepare({})
    assert dispatch._forced == before
    assert (seen, held.call()) == (["triton"], ("triton",))
    assert dispatch._forced == before


def test_rows_of_backends_are_checked_and_timed_like_ours(monkeypatch):
    """As on a GPU, but on the CPU's tensors; there the Triton kernels refuse, and say why."""
    monkeypatch.setattr(runner, "Timer", lambda device: timing.Timer(CPU))
    on_cpu = {"inputs": lambda device: WINDOW_CASE.inputs(CPU), "peers": ()}
    case = replace(WINDOW_CASE, backend=lambda inputs: "reference", **on_cpu)
    found = runner.measure(case, CUDA, RATES, rounds=2, small=case, with_memory=False)
    ours, native, triton = found.measurements
    assert ours.correct
    for m in (native, triton):
        ran = m.correct and len(m.samples) == 2
        assert ran != (m.reason is not None), m
        if m.reason:
            assert f"backend {m.name.split()[1]!r} cannot run this call" in m.reason


def test_a_wrong_backend_fails_the_run_and_an_absent_one_does_not():
    def status(*statuses):
        names = (OURS, f"{OURS} triton", "a peer")
        rows = zip(names, statuses, strict=True)
        return command._failed({"candidates": [{"name": n, "status": s} for n, s in rows]})

    assert not status("ok", "ok", "wrong")
    assert not status("ok", "absent", "absent")
    assert status("ok", "wrong", "ok")
    assert status("absent", "ok", "ok")


def test_bars_measure_the_fastest_peer_the_work_and_the_traffic():
    found = result(
        measured(OURS, 2.0, 1.0, 2.0),
        measured("fla chunk", 5.0),
        measured("fla fused", 3.0, 3.0, 9.0),
        measured("fla wrong", 0.1, check=BAD),
        measured("other", 1.0),
    )
    assert found.reached(Bar("fla *", 1.5, 3)) == 1.5
    assert found.reached(Bar("other", 1, 1)) == 0.5
    assert found.reached(Bar("fla wrong", 1, 1)) is None
    assert found.reached(Bar("absent", 1, 1)) is None
    assert found.reached(Bar(TERAFLOPS, 260, 525)) == 2.0
    assert found.reached(Bar(OF_COPY, 0.6, 0.85)) == 0.25
    wrong = result(measured(OURS, 1.0, check=BAD), measured("fla chunk", 5.0))
    assert [wrong.reached(Bar(x, 1, 1)) for x in ("fla *", TERAFLOPS, OF_COPY)] == [None] * 3


def test_verdicts():
    bar = Bar("a peer", 1.3, 2)
    figures = (None, 1.29, 1.3, 1.99, 2.0)
    assert [bar.verdict(x) for x in figures] == ["not measured", "miss", "pass", "pass", "aim reached"]


def test_the_report_shows_rates_bars_and_how_it_was_timed(tmp_path):
    bars = (Bar("a peer", 1.3, 2), Bar(OF_COPY, 0.6, 0.85), Bar("absent", 1, 2))
    events = measured("a peer", 3.0)
    events.timing = "events (no graph: RuntimeError: it waits)"
    run = report.to_json({"gpu": "A GPU"}, [result(measured(OURS, 2.0), events, bars=bars)])
    data = json.loads(json.dumps(run))["results"][0]
    assert data["copy_bytes_per_second"] == RATES.copy
    assert data["candidates"][0]["of_copy_bandwidth"] == 0.25
    assert [(bar["reached"], bar["verdict"]) for bar in data["bars"]] == [
        (1.5, "pass"),
        (0.25, "miss"),
        (None, "not measured"),
    ]
    console = Console(file=io.StringIO(), width=command.WIDTH)
    report.print_run(console, run)
    text = console.file.getvalue()
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    ours = next(row for row in rows if row[:2] == [OURS, "(native)"])
    assert ours[2:] == ["2000.000", "2000.000", "2", "50%", "0.5", "25%", "1.0e-07"]
    assert "copy 2 GB/s" in text
    assert "a peer: timed by events (no graph: RuntimeError: it waits)" in text
    assert [WINDOW_CASE.name, "a", "peer", "1.3", "2", "1.5", "pass"] in rows
    assert [WINDOW_CASE.name, "absent", "1", "2", "not", "measured"] in rows


def test_results_of_a_gpu_go_to_a_folder_of_each_operation(tmp_path, monkeypatch):
    other = replace(SMALL["linear/gpu_decode/step/bf16"], bars=())
    found = [result(measured(OURS, 1.0), measured("a peer", 2.0)) for _ in range(2)]
    found[1].case = other
    environment = {"gpu": "NVIDIA H200", "torch": "2.13"}
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    run, options = report.to_json(environment, found), command._parser().parse_args(["--device", "cuda"])
    command._write(run, options)
    for operation, case in (("sliding_window", WINDOW_CASE), ("linear", other)):
        folder = tmp_path / "nvidia-h200" / operation
        run = json.loads((folder / "results.json").read_text())
        assert [r["case"] for r in run["results"]] == [case.name]
        assert run["environment"] == environment
        assert case.name in (folder / "results.txt").read_text()
        assert (folder / f"{case.operation}.png").exists()


@pytest.mark.parametrize("given", [["--quick"], ["--json", "x"], ["--plot", "x"], ["--load", "x"]])
def test_other_runs_on_a_gpu_leave_the_results_alone(given):
    options = command._parser().parse_args(["--device", "cuda", *given])
    assert command._folders({"environment": {"gpu": "NVIDIA H200"}, "results": []}, options) == []


def test_a_case_that_fails_altogether_leaves_a_reason_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    names = [f"linear/{label}/step/{dtype}" for label, dtype in (("decode", "fp32"), ("gpu_decode", "bf16"))]

    def inputs(device):
        raise torch.OutOfMemoryError("out of memory\nand more")

    changed = {**SMALL, names[0]: replace(SMALL[names[0]], inputs=inputs)}
    monkeypatch.setattr(command, "registry", lambda small=False: changed)
    assert command.main([*names, "--quick", "--json", str(tmp_path / "run.json")]) == 1
    first, second = json.loads((tmp_path / "run.json").read_text())["results"]
    assert first["candidates"][0]["reason"] == "OutOfMemoryError: out of memory"
    assert second["candidates"][0]["status"] == "ok"
    assert "OutOfMemoryError" in capsys.readouterr().out


# ---- timing ------------------------------------------------------------------------------------------------


class FakeGPU:
    """Stands for `torch.cuda`: a clock that calls advance, a log, graphs that replay what they captured."""

    def __init__(self):
        self.now, self.log, self.captured, self.mode, self.synchronises = 0.0, [], None, 0, False

    def work(self, name, seconds):
        """A call that takes so long on the device."""

        def call():
            if self.synchronises and self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation\nwith details")
            if self.captured is None:
                self.log.append(name)
                self.now += seconds
            else:
                self.captured.append((name, seconds))

        return call

    def Event(self, enable_timing):
        event = SimpleNamespace(synchronize=lambda: None)

        def record():
            event.at = self.now
            self.log.append("event")

        event.record, event.elapsed_time = record, lambda stop: (stop.at - event.at) * 1e3
        return event

    def _sleep(self, cycles):
        self.log.append("sleep")
        self.now += 1

    def CUDAGraph(self):
        graph = SimpleNamespace(calls=[])

        def replay():
            for name, seconds in graph.calls:
                self.log.append(f"replayed {name}")
                self.now += seconds

        graph.replay = replay
        return graph

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.captured = graph.calls
        yield
        self.captured = None

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream):
        return contextlib.nullcontext()

    def synchronize(self):
        self.log.append("synchronize")

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGPU()
    monkeypatch.setattr(timing.torch, "cuda", fake)
    return fake


@pytest.fixture
def timer(gpu):
    timer = timing.Timer(CPU)
    timer.cuda = True
    timer._flush = SimpleNamespace(zero_=gpu.work("flush", 5.0))
    return timer


def test_events_bracket_the_call_alone_behind_a_flush_and_a_lead(gpu, timer):
    sampler = timer.sampler([gpu.work("call", 0.25), gpu.work("another", 1)])
    gpu.log.clear()
    assert (sampler.seconds(), sampler.how) == (0.25, "events")
    assert gpu.log == ["flush", "sleep", "event", "call", "event"]


def test_short_calls_between_events_are_repeated(gpu, timer):
    sampler = timer.sampler([gpu.work("call", 5e-4)])
    gpu.log.clear()
    assert sampler.seconds() == pytest.approx(5e-4)
    assert 4 <= gpu.log.count("call") == gpu.log.count("flush") <= timing.MOST_EVENTS


def test_a_graph_replays_every_call_several_times(gpu, timer):
    times = {"a": 1e-5, "b": 3e-5}
    sampler = timer.sampler([gpu.work(*item) for item in times.items()], graph=True)
    gpu.log.clear()
    assert (sampler.seconds(), sampler.how) == (pytest.approx(2e-5), "graph")
    assert gpu.log[:4] == ["sleep", "event", "replayed a", "replayed b"]
    assert gpu.log.count("replayed a") == gpu.log.count("replayed b") >= timing.SHORTEST_SAMPLE / 4e-5
    assert gpu.mode == 0


def test_a_call_that_waits_is_timed_by_events_and_says_why(gpu, timer):
    gpu.synchronises = True
    sampler = timer.sampler([gpu.work("call", 0.25)], graph=True)
    assert sampler.how == "events (no graph: RuntimeError: called a synchronizing CUDA operation)"
    assert (sampler.seconds(), gpu.mode, gpu.captured) == (0.25, 0, None)


def test_copies_of_the_inputs_fill_more_than_a_cache():
    assert [timing.copies(size) for size in (0, 1, timing.FLUSH_BYTES // 3, timing.FLUSH_BYTES)] == [
        timing.MOST_COPIES,
        timing.MOST_COPIES,
        4,
        1,
    ]


def test_a_graph_rotates_through_inputs_of_its_own(monkeypatch):
    """What the runner hands to the timer of a GPU for a decode step."""
    seen = []

    def sampler(calls, graph):
        seen.append((calls, graph))
        return timing.Sampler(lambda: 1.0, "graph")

    monkeypatch.setattr(runner, "Timer", lambda device: SimpleNamespace(cuda=True, sampler=sampler))
    step, inputs = SMALL["linear/gpu_decode/step/bf16"], []

    def prepare(given):
        inputs.append(given["state"])
        return step.ours.prepare(given)

    ours = Candidate(OURS, prepare)
    case = replace(step, ours=ours, peers=(), bytes=timing.FLUSH_BYTES // 3)
    found = runner.measure(
        replace(case, inputs=lambda device: step.inputs(CPU)), CUDA, RATES, rounds=2, with_memory=False
    )
    calls, graph = seen[0]
    assert graph
    assert len(calls) == 4
    assert len({x.data_ptr() for x in inputs[-4:]}) == 4
    exact = step.reference(step.inputs(CPU))[0]
    for call in calls[1:]:  # the first one has advanced its state in the check
        torch.testing.assert_close(call()[0].double(), exact, rtol=0.02, atol=0.02)
    assert found.ours.timing == "graph"


def test_rates_on_the_cpu():
    assert machine.copy_bandwidth(CPU) > 1e8
    assert machine.matmul_rate(torch.float32, CPU) > 1e8


def test_a_gpu_case_runs_on_a_cpu_when_quick(capsys):
    assert command.main(["linear/gpu_decode", "experts/gpu/forward", "--quick", "--rounds", "2"]) == 0
    text = capsys.readouterr().out
    assert "needs a CUDA device" in text
    assert "What ours must be" not in text
