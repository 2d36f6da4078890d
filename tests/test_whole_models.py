"""Whole small models under PyTorch's machinery: compilers, exporters, autocast, torch.func, checkpointing.

Compilers run with the "aot_eager" backend: Dynamo, fake kernels, functionalisation and the partitioned
backward, without the minutes that code generation takes.
"""

import copy
import functools
import io

import pytest
import torch
from rule import needs_native
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from whole_models import MODELS, Calls, close, gradients, same, small_lm, tokens_of

from slmkernels import use_backend
from slmkernels.nn.linear_attention import MODES

pytestmark = needs_native
every_model = pytest.mark.parametrize("name", list(MODELS))
# In the order of a forward of pattern SLHF with experts in every second layer.
FORWARD = [
    "sliding_window_forward", "causal_conv1d_forward", "linear_attention_forward", "route_forward",
    "expert_mlp_forward", "hybrid_attention_forward", "sliding_window_forward", "route_forward",
    "expert_mlp_forward",
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


# Compilers and exporters


@every_model
def test_compiled_equals_eager_at_every_length(name):
    """One graph for all lengths and batches (of more than one row), forward and backward, and one without
    gradients."""
    model, graphs = MODELS[name](), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)

    def dynamic(batch, length):
        tokens = tokens_of(batch, length)
        torch._dynamo.mark_dynamic(tokens, (0, 1))  # an error where the graph would hold for one size only
        return tokens

    for batch, length in ((2, 40), (2, 57), (3, 97), (2, 8)):
        tokens = dynamic(batch, length)
        (logits, loss), (expected, expected_loss) = compiled(tokens), model(tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        close(gradients(model, loss), gradients(model, expected_loss))
    assert graphs.frame_count == 1
    with torch.no_grad():
        for length in (40, 57):
            tokens = dynamic(2, length)
            torch.testing.assert_close(compiled(tokens)[0], model(tokens)[0], rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 2


def test_a_compiled_training_step_equals_an_eager_one():
    """The loss compiled, and what stands around it: recomputed layers, clipping, AdamW."""
    states = []
    for compiled in (False, True):
        model = small_lm(num_layers=2)()
        model.model.checkpoint_activations = True
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for seed in range(3):
            call(tokens_of(2, 40, seed))[1].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        states.append({name: x.float() for name, x in model.state_dict().items()})
    close(*states)


@pytest.mark.parametrize("name", ["gated_delta", "linear"])
def test_decoding_compiles_to_one_graph(name):
    """Steps of one token over caches that change in place, S, L, H and F. (A prompt does not: how it is cut
    depends on the caches' length, which is a tensor.)"""
    model, tokens = MODELS[name]().model, tokens_of(2, 30)
    graphs = CompileCounterWithBackend("aot_eager")

    def step(tokens, caches):
        return model.logits(model.hidden_states(tokens, caches=caches))

    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    with torch.no_grad():
        ours, theirs = model.new_caches(2, 30), model.new_caches(2, 30)
        for caches in (ours, theirs):
            step(tokens[:, :20], caches)
        for token in tokens[:, 20:].split(1, dim=1):
            torch.testing.assert_close(compiled(token, ours), step(token, theirs), rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match="full attention"):
            compiled(tokens[:, :1], ours)
    assert graphs.frame_count == 1
    assert [cache.length for cache in ours] == [30] * 4


@every_model
def test_exported_program_runs_at_other_lengths(name):
    model = MODELS[name]()
    length = torch.export.Dim("length", min=3, max=4096)  # the loss needs two tokens
    with torch.no_grad():
        program = torch.export.export(model, (tokens_of(2, 40),), dynamic_shapes=({1: length},))
        ours = [node.target for node in program.graph.nodes if str(node.target).startswith("slmkernels.")]
        expected = [op for op in FORWARD if name != "linear" or op != "causal_conv1d_forward"]
        assert [op._schema.name for op in ours] == [f"slmkernels::{op}" for op in expected]
        for batch_length in ((2, 40), (2, 57), (2, 3)):
            tokens = tokens_of(*batch_length)
            torch.testing.assert_close(program.module()(tokens), model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_generated_code_equals_eager():
    """Inductor: minutes of a C++ compiler. Its fast sibling: `test_compiled_equals_eager_at_every_length`."""
    model, tokens = MODELS["gated_delta"](), tokens_of(2, 40)
    logits, loss = torch.compile(model, fullgraph=True)(tokens)
    expected, expected_loss = model(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
    close(gradients(model, loss), gradients(model, expected_loss))


@pytest.mark.parametrize(
    "pattern", [pytest.param("L", id="small"), pytest.param("SLHF", marks=pytest.mark.slow, id="every mixer")]
)
def test_packaged_program_equals_eager(pattern, tmp_path):
    """AOTInductor: minutes of a C++ compiler, where there is more than a layer."""
    shape = {"pattern": pattern, "num_layers": len(pattern), "expert_every": len(pattern)}
    model, length = small_lm(**shape)(), torch.export.Dim("length", min=3, max=4096)
    with torch.no_grad():
        program = torch.export.export(model, (tokens_of(2, 40),), dynamic_shapes=({1: length},))
        package = tmp_path / "model.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        packaged = torch._inductor.aoti_load_package(str(package))
        for tokens in (tokens_of(2, 40), tokens_of(2, 57)):
            torch.testing.assert_close(list(packaged(tokens)), list(model(tokens)), rtol=1e-5, atol=2e-5)


# Precision


@every_model
def test_autocast_is_as_near_to_float32_as_the_reference(name):
    """At most twice as far as the same model on PyTorch operations under the same autocast, all gradients as
    one vector. Every expert is chosen: which ones are would turn on the last digits."""
    build, tokens = small_lm(name, expert_top_k=4), tokens_of(2, 48)

    def run(backend, enabled):
        model, calls = build(), Calls()
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=enabled), calls:
            logits, loss = model(tokens)
        got = gradients(model, loss)
        assert all(x.dtype == torch.float32 and x.isfinite().all() for x in got.values())
        return logits.float(), torch.cat([x.flatten() for x in got.values()]), calls.seen

    exact, ours, reference = run("native", False), run("native", True), run("reference", True)
    assert all(dtype == (torch.float32 if op == "route_forward" else torch.bfloat16) for op, dtype in ours[2])
    assert len(ours[2]) == len(exact[2]) >= 8
    assert reference[2] == []
    for x, y, z in zip(ours[:2], reference[:2], exact[:2], strict=True):
        assert 0 < (x - z).norm() <= 2 * (y - z).norm()
        assert (x - z).norm() < 0.2 * z.norm()


@every_model
def test_a_bfloat16_model_computes_and_learns(name):
    model, tokens = MODELS[name]().to(torch.bfloat16), tokens_of(2, 48)
    logits, loss = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert abs(loss - MODELS[name]()(tokens)[1]) < 0.05
    got = gradients(model, loss)
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() and x.any() for x in got.values())


# Autograd's other ways


@every_model
def test_recomputed_layers_give_the_same_bits(name):
    model, tokens = MODELS[name](), tokens_of(2, 48)
    expected = gradients(model, model(tokens)[1])
    model.model.checkpoint_activations = True
    calls = Calls()
    with calls:
        loss = model(tokens)[1]
        forward = len(calls.seen)
        same(gradients(model, loss), expected)
    again = [op for op, _ in calls.seen[forward:] if op.endswith("_forward")]
    assert len(again) == forward


def test_selective_checkpointing_keeps_what_our_operators_gave():
    """A policy that saves their results and computes the rest again runs none of them twice."""
    model, tokens, calls = MODELS["gated_delta"](), tokens_of(2, 48), Calls()
    expected = gradients(model, model(tokens)[1])

    def policy(ctx, op, *args, **kwargs):
        ours = op.namespace == "slmkernels"
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with calls:
        loss = checkpoint(model, tokens, use_reentrant=False, context_fn=contexts)[1]
        same(gradients(model, loss), expected)
    assert [op for op, _ in calls.seen if op.endswith("_forward")] == FORWARD


@every_model
def test_func_grad_equals_backward(name):
    model, tokens = MODELS[name](), tokens_of(2, 40)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (tokens,))[1]

    close(torch.func.grad(loss)(parameters), gradients(model, model(tokens)[1]))


def test_what_torch_func_cannot_do_is_said():
    model, tokens = MODELS["gated_delta"](), tokens_of(2, 40)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, tokens):
        return torch.func.functional_call(model, parameters, (tokens,))[1]

    def summed(parameters):
        return sum(x.sum() for x in torch.func.grad(loss)(parameters, tokens).values())

    with pytest.raises(NotImplementedError, match="gradients are of first order"):
        torch.func.grad(summed)(parameters)
    for each in (torch.func.grad(loss), loss):  # gradients of each sample; an ensemble
        with pytest.raises(RuntimeError, match="SlidingWindowAttention, but it does not have vmap support"):
            torch.vmap(each, in_dims=(None, 0))(parameters, tokens[:, None])
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda p: loss(p, tokens), (parameters,), (parameters,))


def test_a_second_derivative_is_an_error():
    model = MODELS["gated_delta"]()
    got = torch.autograd.grad(model(tokens_of(2, 20))[1], list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(x.sum() for x in got).backward()


@every_model
def test_a_second_backward_gives_the_same_bits(name):
    model = MODELS[name]()
    loss = model(tokens_of(2, 48))[1]
    for _ in range(2):
        loss.backward(retain_graph=True)
    once = gradients(model, loss)
    same({n: p.grad for n, p in model.named_parameters()}, {n: 2 * x for n, x in once.items()})


# Copies and places


@every_model
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_compute_the_same(name, way):
    model, tokens, file = MODELS[name](), tokens_of(2, 40), io.BytesIO()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)  # not what a new model has
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model if way == "pickle" else model.state_dict(), file)
        file.seek(0)
        twin = torch.load(file, weights_only=way == "state_dict")
        if way == "state_dict":
            state, twin = twin, MODELS[name]()
            twin.load_state_dict(state)
    (logits, loss), (expected, expected_loss) = twin(tokens), model(tokens)
    assert torch.equal(logits, expected)
    same(gradients(twin, loss), gradients(model, expected_loss))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("mode", list(MODES))
def test_a_model_made_on_meta_is_whole_once_loaded(mode):
    """Whatever `to_empty` leaves in memory."""
    model, tokens = small_lm(mode)(), tokens_of(1, 40)
    with torch.device("meta"):
        twin = small_lm(mode)()
    assert all(x.is_meta for x in (*twin.parameters(), *twin.buffers()))
    twin.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(twin(tokens)[0], model(tokens)[0])


@every_model
def test_inference_mode_computes_the_same(name):
    model, tokens = MODELS[name](), tokens_of(2, 40)
    with torch.inference_mode():
        logits, _ = model(tokens)
        assert torch.equal(logits, model(tokens)[0])
    assert torch.equal(logits, model(tokens)[0])
