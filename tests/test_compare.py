"""The reference model on PyTorch's own attention beside ours."""

import pytest
import torch

from slmkernels import sliding_window_attention
from slmkernels.models import SmallLM, SmallLMConfig
from slmkernels.train.compare import ATTENTIONS, report, sdpa_band, training_step_times, use_attention
from slmkernels.train.data import encode


@pytest.mark.parametrize("window", [None, 1, 7, 100, (3, 2)])
def test_sdpa_with_a_band_mask_is_the_same_attention(window):
    causal = not isinstance(window, tuple)
    q, k, v = (torch.randn(2, 21, h, 16, dtype=torch.float64) for h in (4, 2, 2))
    ours = sliding_window_attention(q, k, v, window=window, causal=causal, backend="reference")
    torch.testing.assert_close(sdpa_band(q, k, v, window=window, causal=causal), ours)
    with pytest.raises(NotImplementedError, match=r"compared without softcap"):
        sdpa_band(q, k, v, window=window, causal=causal, softcap=3.0)


def test_attention_is_swapped_inside_the_block_only():
    model, seen = SmallLM(SmallLMConfig(num_layers=2)), []

    def spy(q, k, v, **options):
        seen.append(q.shape)
        return sdpa_band(q, k, v, **options)

    tokens = encode("import os")
    with use_attention(model, spy):
        torch.testing.assert_close(model(tokens), model(tokens))
    assert len(seen) == 4
    model(tokens)
    assert len(seen) == 4


def test_step_times_give_a_figure_or_a_reason():
    model = SmallLM(SmallLMConfig(num_layers=1))
    tokens = encode("import os")
    times = training_step_times(model, tokens, tokens, runs=2)
    assert list(times) == list(ATTENTIONS)
    assert times["slmkernels"] > 0
    assert times["SDPA with a band mask"] > 0
    assert times["FlexAttention"] == "FlexAttention does not support backward on CPU"
    text = report(times)
    assert "1.00 x ours" in text
    assert "cannot run: FlexAttention does not support backward" in text
