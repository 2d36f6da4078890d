"""FlashAttention's functions: against a softmax over the visible keys, query by query in float64."""

import inspect
from itertools import pairwise

import pytest
import torch

import slmkernels
import slmkernels.integrations.flash_attn as fa

B, H, G, D = 2, 2, 4, 8  # G query heads on H of keys and values

# flash-attn 2.8: parameters and defaults.
COMMON = (
    "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1, -1) softcap=0.0 alibi_slopes=None "
    "deterministic=False return_attn_probs=False"
)
PACKED = f"cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {COMMON}"
SIGNATURES = {
    "flash_attn_func": f"q k v {COMMON}",
    "flash_attn_kvpacked_func": f"q kv {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv {COMMON}",
    "flash_attn_varlen_func": f"q k v {PACKED} block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q kv {PACKED}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {COMMON}",
    "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None "
    "cache_seqlens=None cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None "
    "causal=False window_size=(-1, -1) softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 "
    "return_softmax_lse=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    assert all(parameter.kind == parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert " ".join(shown) == SIGNATURES[name]


def draw(*shape, seed=0):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))
    )


def naive(q, k, v, softmax_scale=D**-0.5, causal=False, window_size=(-1, -1), softcap=0.0):
    """One sequence: q [T, G, D], k, v [S, H, D] -> o [T, G, D], lse [G, T]."""
    T, S = len(q), len(k)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    left, right = window_size
    outputs, sums = [], []
    for t in range(T):
        i = t + S - T
        visible = [
            j
            for j in range(S)
            if (left < 0 or j >= i - left) and (right < 0 or j <= i + right) and not (causal and j > i)
        ]
        if not visible:
            outputs.append(0 * q[t])
            sums.append(q.new_full((q.shape[1],), -torch.inf))
            continue
        s = softmax_scale * torch.einsum("hd,jhd->jh", q[t], k[visible])
        s = softcap * (s / softcap).tanh() if softcap > 0 else s
        outputs.append(torch.einsum("jh,jhd->hd", s.softmax(0), v[visible]))
        sums.append(s.logsumexp(0))
    return torch.stack(outputs), torch.stack(sums, 1)


def compare(call, oracle, tensors):
    """Results, and the gradients of all tensors through all results, in float64; -inf counts as no loss."""
    outcomes = []
    for function in (call, oracle):
        leaves = [x.clone().requires_grad_() for x in tensors]
        results = function(*leaves)
        loss = sum((x.where(x.isfinite(), 0) * draw(*x.shape, seed=9)).sum() for x in results)
        outcomes.append((*results, *torch.autograd.grad(loss, leaves)))
    for mine, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


OPTIONS = [
    {},
    {"causal": True},
    {"causal": True, "softmax_scale": 0.7},
    {"causal": True, "window_size": (2, 0)},
    {"causal": True, "window_size": (2, 5)},
    {"window_size": (-1, 0)},
    {"window_size": (1, 2)},
    {"window_size": (3, -1), "softcap": 1.5},
    {"softcap": -1.0},
]


@pytest.mark.parametrize(("T", "S"), [(5, 5), (3, 7), (7, 3), (1, 6)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_func(options, T, S):
    q, k, v = draw(B, T, G, D), draw(B, S, H, D, seed=1), draw(B, S, H, D, seed=2)

    def call(q, k, v):
        o, lse, probabilities = fa.flash_attn_func(q, k, v, **options, return_attn_probs=True)
        assert probabilities.shape == (0,)
        return o, lse

    def oracle(q, k, v):
        rows = [naive(*row, **options) for row in zip(q, k, v, strict=True)]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    compare(call, oracle, (q, k, v))
    o = fa.flash_attn_func(q, k, v, **options, deterministic=True)
    assert torch.equal(o, call(q, k, v)[0])


def test_window_counts_keys():
    """(W - 1, 0) are W keys: with W = 1 a query sees itself alone."""
    q, k, v = (draw(B, 6, H, D, seed=seed) for seed in range(3))
    torch.testing.assert_close(fa.flash_attn_func(q, k, v, window_size=(0, 0)), v)
    o = fa.flash_attn_func(q, k, v, causal=True, window_size=(2, 0))
    torch.testing.assert_close(o, slmkernels.sliding_window_attention(q, k, v, window=3))


def test_rows_that_see_nothing():
    o, lse, _ = fa.flash_attn_func(
        draw(B, 5, G, D), draw(B, 2, H, D), draw(B, 2, H, D), causal=True, return_attn_probs=True
    )
    assert (o[:, :3] == 0).all()
    assert (lse[:, :, :3] == -torch.inf).all()
    assert (o[:, 3:] != 0).all()


@pytest.mark.parametrize("options", [{}, {"causal": True, "window_size": (2, 0), "softcap": 2.0}], ids=str)
def test_packed_tensors(options):
    """qkv and kv in one tensor."""
    qkv, q = draw(B, 5, 3, H, D), draw(B, 5, G, D)

    def stacked(*tensors):
        return [
            torch.stack(parts)
            for parts in zip(*(naive(*row, **options) for row in zip(*tensors, strict=True)), strict=True)
        ]

    compare(
        lambda qkv: fa.flash_attn_qkvpacked_func(qkv, **options, return_attn_probs=True)[:2],
        lambda qkv: stacked(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]),
        (qkv,),
    )
    compare(
        lambda q, kv: fa.flash_attn_kvpacked_func(q, kv, **options, return_attn_probs=True)[:2],
        lambda q, kv: stacked(q, kv[:, :, 0], kv[:, :, 1]),
        (q, qkv[:, :, 1:].contiguous()),
    )
    assert fa.flash_attn_qkvpacked_func(qkv).shape == (B, 5, H, D)
    assert fa.flash_attn_kvpacked_func(q, qkv[:, :, 1:]).shape == q.shape


OFFSETS_Q, OFFSETS_K = [0, 3, 3, 5, 9], [0, 4, 6, 7, 11]


def by_sequences(q, k, v, offsets_q, offsets_k, **options):
    parts = [
        naive(q[a:b], k[c:d], v[c:d], **options)
        for (a, b), (c, d) in zip(pairwise(offsets_q), pairwise(offsets_k), strict=True)
        if b > a
    ]
    return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts], 1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_varlen(options):
    """Sequences of 3, 0, 2 and 4 queries on 4, 2, 1 and 4 keys; then on as many keys, in one tensor."""
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in (OFFSETS_Q, OFFSETS_K))
    q, kv, qkv = draw(9, G, D), draw(11, 2, H, D), draw(9, 3, H, D)

    def call(q, kv):
        k, v = kv.unbind(1)
        o, lse, probabilities = fa.flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, 4, 4, **options, return_attn_probs=True
        )
        assert probabilities.shape == (0,)
        return o, lse

    def packed(q, kv):
        return fa.flash_attn_varlen_kvpacked_func(q, kv, cu_q, cu_k, 4, 4, **options, return_attn_probs=True)[
            :2
        ]

    def oracle(q, kv):
        return by_sequences(q, kv[:, 0], kv[:, 1], OFFSETS_Q, OFFSETS_K, **options)

    compare(call, oracle, (q, kv))
    compare(packed, oracle, (q, kv))
    compare(
        lambda x: fa.flash_attn_varlen_qkvpacked_func(x, cu_q, 4, **options, return_attn_probs=True)[:2],
        lambda x: by_sequences(*x.unbind(1), OFFSETS_Q, OFFSETS_Q, **options),
        (qkv,),
    )
    assert fa.flash_attn_varlen_qkvpacked_func(qkv, cu_q, 4).shape == (9, H, D)


def turned(x, position, cos, sin, interleaved):
    """One token x [H, D] by the angles of a position, as complex numbers."""
    R = 2 * cos.shape[1]
    turn = torch.complex(cos[position], sin[position])
    if interleaved:
        z = torch.complex(x[:, 0:R:2], x[:, 1:R:2]) * turn
        pairs = torch.stack([z.real, z.imag], -1).flatten(1)
    else:
        z = torch.complex(x[:, : R // 2], x[:, R // 2 : R]) * turn
        pairs = torch.cat([z.real, z.imag], -1)
    return torch.cat([pairs, x[:, R:]], -1)


CACHES = {
    "int": {"cache_seqlens": 5},
    "one length": {"cache_seqlens": [5, 5]},
    "lengths": {"cache_seqlens": [0, 9]},
    "rows": {"cache_seqlens": [4, 6], "cache_batch_idx": [3, 1]},
    "rows of one length": {"cache_seqlens": 6, "cache_batch_idx": [2, 0]},
    "left padding": {"cache_seqlens": [4, 7], "cache_leftpad": [3, 1]},
    "half rotation": {"cache_seqlens": [4, 7], "rotary": False},
    "interleaved": {"cache_seqlens": [4, 7], "rotary": True, "cache_leftpad": [0, 2]},
    "nothing new": {"cache_seqlens": [4, 7], "new": 0},
    "the whole cache": {"cache_seqlens": None, "new": 0},
    "fewer new than queries": {"cache_seqlens": [4, 7], "new": 1},
}
WINDOWS = [{"causal": True}, {"causal": True, "window_size": (2, 0), "softcap": 2.0}, {}]


@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("case", CACHES)
def test_with_kvcache(case, options):
    case = dict(CACHES[case])
    T, S, Bc = 3, 12, 4 if "cache_batch_idx" in case else B
    n, rotary = case.pop("new", T), case.pop("rotary", None)
    q, k, v = draw(B, T, G, D), draw(B, n, H, D, seed=1), draw(B, n, H, D, seed=2)
    caches = draw(Bc, S, H, D, seed=3), draw(Bc, S, H, D, seed=4)
    tables = (draw(S, 3).cos(), draw(S, 3).sin()) if rotary is not None else None

    lengths = case["cache_seqlens"]
    lengths = [S if lengths is None else lengths] * B if not isinstance(lengths, list) else lengths
    rows, starts = case.get("cache_batch_idx", range(B)), case.get("cache_leftpad", [0] * B)
    wanted_caches, wanted = [x.clone() for x in caches], []
    for b in range(B):
        query = q[b]
        for t in range(n):
            key = k[b, t] if tables is None else turned(k[b, t], lengths[b] + t, *tables, rotary)
            wanted_caches[0][rows[b], lengths[b] + t] = key
            wanted_caches[1][rows[b], lengths[b] + t] = v[b, t]
        if tables is not None:
            ahead = range(T) if options else [0] * T
            query = torch.stack(
                [turned(x, lengths[b] + t, *tables, rotary) for x, t in zip(query, ahead, strict=True)]
            )
        keys, values = (x[rows[b], starts[b] : lengths[b] + n] for x in wanted_caches)
        wanted.append(naive(query, keys, values, **options))

    call = {
        name: torch.tensor(x, dtype=torch.int32) if isinstance(x, list) else x for name, x in case.items()
    }
    if n:
        call |= {"k": k, "v": v}
    if tables is not None:
        call |= {"rotary_cos": tables[0], "rotary_sin": tables[1], "rotary_interleaved": rotary}
    o, lse = fa.flash_attn_with_kvcache(q, *caches, **call, **options, return_softmax_lse=True)
    for mine, expected in zip((o, lse, *caches), (*zip(*wanted, strict=True), *wanted_caches), strict=True):
        expected = torch.stack(expected) if isinstance(expected, tuple) else expected
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)
    again = fa.flash_attn_with_kvcache(q, *caches, **call, **options, num_splits=3)
    assert torch.equal(again, o)


def test_decoding_token_by_token():
    """A cache filled step by step gives what one causal call gives."""
    q, k, v = draw(B, 9, G, D), draw(B, 9, H, D, seed=1), draw(B, 9, H, D, seed=2)
    caches = torch.zeros(B, 9, H, D, dtype=torch.float64), torch.zeros(B, 9, H, D, dtype=torch.float64)
    options = {"causal": True, "window_size": (3, 0)}
    steps = [
        fa.flash_attn_with_kvcache(
            q[:, t : t + 1], *caches, k[:, t : t + 1], v[:, t : t + 1], cache_seqlens=t, **options
        )
        for t in range(9)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), fa.flash_attn_func(q, k, v, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    q, k, v = (x.to(dtype) for x in (draw(B, 5, G, D), draw(B, 5, H, D), draw(B, 5, H, D, seed=1)))
    o, lse, probabilities = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (o.dtype, lse.dtype, probabilities.dtype) == (dtype, torch.float32, dtype)
    eps = torch.finfo(dtype).eps
    for b in range(B):
        wanted, wanted_lse = naive(q[b].double(), k[b].double(), v[b].double(), causal=True)
        torch.testing.assert_close(o[b].double(), wanted, rtol=2 * eps, atol=2 * eps)
        torch.testing.assert_close(lse[b].double(), wanted_lse, rtol=1e-5, atol=1e-5)


q, kv = torch.zeros(B, 3, G, D), torch.zeros(B, 3, H, D)
cache = torch.zeros(B, 8, H, D)
UNSUPPORTED = [
    ("flash_attn_func", (q, kv, kv), {"dropout_p": 0.1}),
    ("flash_attn_func", (q, kv, kv), {"alibi_slopes": torch.ones(G)}),
    ("flash_attn_varlen_func", (q[0], kv[0], kv[0], None, None, 3, 3), {"block_table": torch.zeros(1)}),
    ("flash_attn_with_kvcache", (q, cache, cache), {"block_table": torch.zeros(1)}),
    ("flash_attn_with_kvcache", (q, cache, cache), {"alibi_slopes": torch.ones(G)}),
]


@pytest.mark.parametrize(("name", "tensors", "options"), UNSUPPORTED)
def test_unsupported(name, tensors, options):
    with pytest.raises(slmkernels.Unsupported, match=f"^{next(iter(options))} is .*expected"):
        getattr(fa, name)(*tensors, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window_size": 4}, TypeError, "window_size is 4"),
        ({"window_size": (2.0, 0)}, TypeError, "window_size is "),
        ({"window_size": (-2, 0)}, ValueError, "window_size is "),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale is '1'"),
        ({"softcap": None}, TypeError, "softcap is None"),
        ({"causal": 1}, TypeError, "causal is 1"),
        ({"deterministic": 1}, TypeError, "deterministic is 1"),
        ({"return_attn_probs": 1}, TypeError, "return_attn_probs is 1"),
        ({"sinks": None}, TypeError, ".*unexpected.*sinks"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fa.flash_attn_func(q, kv, kv, **options)


def test_errors_of_packed_tensors():
    cu = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^qkv is .*\[B, T, 3, H, D\]"):
        fa.flash_attn_qkvpacked_func(torch.zeros(B, 3, 2, H, D))
    with pytest.raises(ValueError, match=r"^kv is .*\[total_k, 2, H, D\]"):
        fa.flash_attn_varlen_kvpacked_func(q[0], torch.zeros(3, 3, H, D), cu, cu, 3, 3)
    with pytest.raises(ValueError, match=r"^q is .*\[total_q, H, D\]"):
        fa.flash_attn_varlen_func(q, kv[0], kv[0], cu, cu, 3, 3)
    with pytest.raises(TypeError, match=r"^cu_seqlens_q is .*int32"):
        fa.flash_attn_varlen_func(q[0], kv[0], kv[0], cu.long(), cu, 3, 3)
    with pytest.raises(TypeError, match=r"^cu_seqlens_k is None"):
        fa.flash_attn_varlen_func(q[0], kv[0], kv[0], cu, None, 3, 3)
    bad = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^cu_seqlens is \[0, 2\]"):
        fa.flash_attn_varlen_qkvpacked_func(torch.zeros(3, 3, H, D), bad, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": kv}, ValueError, "v is None"),
        ({"k": kv, "v": kv}, ValueError, "cache_seqlens is None"),
        ({"k": kv, "v": kv[:, 1:], "cache_seqlens": 0}, ValueError, "v is "),
        ({"k": kv.double(), "v": kv, "cache_seqlens": 0}, ValueError, "k is .*go into k_cache"),
        ({"k": kv, "v": kv, "cache_seqlens": 6}, ValueError, r"cache_seqlens is \[6, 6\].*0 to 5"),
        ({"cache_seqlens": -1}, ValueError, "cache_seqlens is "),
        ({"cache_seqlens": 2.0}, TypeError, "cache_seqlens is 2.0"),
        ({"cache_seqlens": torch.zeros(3, dtype=torch.int32)}, ValueError, "cache_seqlens is "),
        ({"cache_batch_idx": torch.tensor([0, 2])}, ValueError, r"cache_batch_idx is \[0, 2\]"),
        ({"cache_seqlens": 2, "cache_leftpad": torch.tensor([0, 3])}, ValueError, "cache_leftpad is "),
        (
            {"rotary_cos": torch.ones(8, 2), "rotary_sin": torch.ones(8, 2)},
            ValueError,
            "rotary_cos is .*without k",
        ),
        ({"k_cache": torch.zeros(3, 8, H, D), "v_cache": torch.zeros(3, 8, H, D)}, ValueError, "k_cache is "),
        ({"v_cache": cache[:, 1:]}, ValueError, "v_cache is "),
        ({"v_cache": cache.clone().requires_grad_()}, ValueError, "v_cache is .*no_grad"),
        ({"return_softmax_lse": None}, TypeError, "return_softmax_lse is None"),
    ],
)
def test_errors_with_kvcache(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fa.flash_attn_with_kvcache(**({"q": q, "k_cache": cache, "v_cache": cache} | options))


@pytest.mark.parametrize(
    ("cos", "sin", "message"),
    [
        (torch.ones(8, 5), torch.ones(8, 5), "rotary_cos is .*R up to 8"),
        (torch.ones(8, 2), torch.ones(8, 3), "rotary_sin is "),
        (torch.ones(4, 2), torch.ones(4, 2), "rotary_cos is .*at least 5 positions"),
    ],
)
def test_errors_of_rotary_tables(cos, sin, message):
    before = cache.clone()
    with pytest.raises(ValueError, match=f"^{message}"):
        fa.flash_attn_with_kvcache(
            q, before, before, kv, kv, cos, sin, cache_seqlens=2, causal=True, rotary_interleaved=False
        )
    assert torch.equal(before, cache)


def test_compiles_into_one_graph():
    q, k, v = draw(B, 5, G, D), draw(B, 5, H, D), draw(B, 5, H, D, seed=1)
    compiled = torch.compile(fa.flash_attn_func, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, causal=True), fa.flash_attn_func(q, k, v, causal=True))
