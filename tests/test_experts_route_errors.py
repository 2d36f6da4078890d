"""`route`: bad input, one test for each error, and the choice of backend."""

import math

import pytest
import torch
from rule import needs_native

import slmkernels
from slmkernels import explain, native, route, triton_support, update_selection_bias

LOGITS = torch.randn(6, 8)


def bools(*shape):
    return torch.ones(*shape, dtype=torch.bool)


BAD = {
    "logits no tensor": ({"logits": [1.0]}, TypeError, "logits is"),
    "logits of ints": ({"logits": torch.ones(6, 8, dtype=torch.int64)}, TypeError, "logits is int64"),
    "logits with three dimensions": ({"logits": LOGITS[None]}, ValueError, r"logits is float32\[1, 6, 8\]"),
    "logits without experts": ({"logits": LOGITS[:, :0]}, ValueError, r"logits is .*at least one expert"),
    "top_k 0": ({"top_k": 0}, ValueError, "top_k is 0 .*from 1 to 8"),
    "top_k beyond the experts": ({"top_k": 9}, ValueError, "top_k is 9 .*the number of experts"),
    "top_k a float": ({"top_k": 2.0}, TypeError, "top_k is 2.0 .*an int"),
    "top_k True": ({"top_k": True}, TypeError, "top_k is True"),
    "score unknown": ({"score": "tanh"}, ValueError, "score is 'tanh'.*softmax, sigmoid, softmax_after_topk"),
    "renormalize 1": ({"renormalize": 1}, TypeError, "renormalize is 1"),
    "route_scale a string": ({"route_scale": "2"}, TypeError, "route_scale is '2'"),
    "route_scale infinite": ({"route_scale": math.inf}, ValueError, "route_scale is inf .*finite"),
    "top_groups alone": ({"top_groups": 2}, ValueError, "top_groups is 2 .*num_groups, which is None"),
    "num_groups alone": ({"num_groups": 2}, ValueError, "top_groups is None .*num_groups, which is 2"),
    "num_groups no divisor": (
        {"num_groups": 3, "top_groups": 1},
        ValueError,
        "num_groups is 3 .*divisor of the number of experts, 8",
    ),
    "num_groups 0": ({"num_groups": 0, "top_groups": 1}, ValueError, "num_groups is 0 .*from 1 to 8"),
    "num_groups a float": ({"num_groups": 4.0, "top_groups": 1}, TypeError, "num_groups is 4.0"),
    "top_groups beyond the groups": (
        {"num_groups": 4, "top_groups": 5},
        ValueError,
        "top_groups is 5 .*from 1 to 4, num_groups",
    ),
    "top_k beyond the groups' experts": (
        {"top_k": 3, "num_groups": 4, "top_groups": 1},
        ValueError,
        "top_k is 3 .*2 experts of top_groups=1",
    ),
    "selection_bias a list": ({"selection_bias": [0.0] * 8}, TypeError, "selection_bias is"),
    "selection_bias of another size": (
        {"selection_bias": torch.zeros(7)},
        ValueError,
        r"selection_bias is float32\[7\].*\[8\] on cpu",
    ),
    "selection_bias with two dimensions": (
        {"selection_bias": torch.zeros(6, 8)},
        ValueError,
        r"selection_bias is .*tensor \[E\]",
    ),
    "selection_bias on another device": (
        {"selection_bias": torch.zeros(8, device="meta")},
        ValueError,
        "selection_bias is .*on cpu",
    ),
    "expert_mask of ints": (
        {"expert_mask": torch.ones(8, dtype=torch.int32)},
        TypeError,
        "expert_mask is int32.*True where allowed",
    ),
    "expert_mask a list": ({"expert_mask": [True] * 8}, TypeError, "expert_mask is"),
    "expert_mask of another size": (
        {"expert_mask": bools(5, 8)},
        ValueError,
        r"expert_mask is bool\[5, 8\].*\[8\] or \[6, 8\]",
    ),
    "expert_mask on another device": (
        {"expert_mask": bools(8).to("meta")},
        ValueError,
        "expert_mask is .*on cpu",
    ),
    "backend unknown": ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        route(**({"logits": LOGITS, "top_k": 2} | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"selection_bias": [0.0]}, TypeError, "selection_bias is"),
        ({"counts": torch.zeros(3)}, TypeError, r"counts is float32\[3\].*\[4\]"),
        ({"counts": [1, 2, 3, 4]}, TypeError, "counts is"),
        ({"rate": 0.0}, ValueError, "rate is 0.0 .*> 0"),
        ({"rate": "fast"}, TypeError, "rate is 'fast'"),
    ],
    ids=str,
)
def test_update_selection_bias_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        update_selection_bias(**({"selection_bias": torch.zeros(4), "counts": torch.ones(4)} | changes))


@needs_native
def test_raw_operators_refuse_what_does_not_fit():
    """The C++ side checks too: whoever calls the operator directly gets an error, not a crash."""
    x, bias, mask = LOGITS, torch.zeros(8), bools(8)
    forward, backward = torch.ops.slmkernels.route_forward, torch.ops.slmkernels.route_backward
    for message, call in {
        "logits must be": (x.int(), None, None, 2, 0, True, 1, 1, 1.0),
        "logits must": (x[0], None, None, 2, 0, True, 1, 1, 1.0),
        "E at least 1": (x[:, :0], None, None, 0, 0, True, 1, 1, 1.0),
        "top_k must be": (x, None, None, 9, 0, True, 1, 1, 1.0),
        "got 0": (x, None, None, 0, 0, True, 1, 1, 1.0),
        "score must": (x, None, None, 2, 3, True, 1, 1, 1.0),
        "num_groups must": (x, None, None, 2, 0, True, 3, 1, 1.0),
        "top_groups be": (x, None, None, 2, 0, True, 4, 5, 1.0),
        "selection_bias has": (x, bias.double(), None, 2, 0, True, 1, 1, 1.0),
        "expert_mask must": (x, None, bools(7), 2, 0, True, 1, 1, 1.0),
        "expert_mask must be": (x, None, bias, 2, 0, True, 1, 1, 1.0),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            forward(*call)
    indices, weights, _, mean, z, _, lse = forward(x, bias, mask, 2, 0, True, 1, 1, 1.0)
    for message, call in {
        "indices must": (weights, mean, z, x, mask, indices.long(), lse),
        "lse has": (weights, mean, z, x, mask, indices, lse[:5]),
        "dweights must": (weights[:, :1], mean, z, x, mask, indices, lse),
        "dprobabilities must": (weights, mean.double(), z, x, mask, indices, lse),
        "dz must": (weights, mean, mean, x, mask, indices, lse),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            backward(*call, 0, True, 1.0)
    wild = torch.full_like(indices, 1 << 30)  # no expert: skipped, not followed
    assert (backward(weights, None, None, x, mask, wild, lse, 0, True, 1.0) == 0).all()


def test_backends():
    report = explain(route, LOGITS, 2)
    assert "native" in report
    assert "triton" in report
    if not native.HAS_CUDA and not triton_support.INTERPRETED:
        with pytest.raises(slmkernels.Unsupported, match=r"backend 'triton' cannot run this call: .*cpu"):
            route(LOGITS, 2, backend="triton")


def test_meta_tensors_have_shapes():
    with slmkernels.use_backend("reference"):
        routing = route(torch.randn(6, 8, device="meta"), 2)
    assert routing.indices.shape == routing.weights.shape == (6, 2)
