"""Attention "slmkernels" of transformers: windows, grouped heads, softcap, sinks, padding, documents."""

import torch
from torch import Tensor

from ...dispatch import Unsupported
from ...ops.sliding_window.function import sliding_window_attention
from . import masks

# What changes the result and has no kernel; None or False is as good as absent.
REFUSED = {
    "position_bias": "added to the scores",
    "head_mask": "a factor of each head",
    "indices": "a choice of keys for each query",
    "block_indices": "a choice of keys for each query",
    "output_attentions": "the weights of all keys, which are never all there",
}


def _refuse(module: torch.nn.Module, dropout: float, options: dict) -> None:
    for name, what in REFUSED.items():
        if options.get(name) is not None and options[name] is not False:
            raise Unsupported(f"attention: {name} ({what}) is not supported: use {masks.EAGER}")
    if dropout and module.training:
        raise Unsupported(
            f"attention: dropout is {dropout}; 0 is supported (attention_dropout of the config)"
        )


def _band(module, mask, sliding_window, is_causal) -> tuple[int | None, int | None]:
    """(left, right): from the mask, with which transformers itself computes, or by what the layer says."""
    if mask is not None:
        return mask.band
    if not is_causal:
        return (None, None) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    return None if sliding_window is None else sliding_window - 1, 0


def _explicit(cu_q: Tensor, cu_k: Tensor | None, q: Tensor) -> Tensor:
    """Offsets `[2, N + 1]` of the documents that the caller names."""
    if q.shape[0] != 1:
        raise Unsupported(f"attention: cu_seq_lens_q with batch {q.shape[0]}; 1 is supported")
    return torch.stack((cu_q, cu_q if cu_k is None else cu_k)).to(torch.int32)


def starts_again(position_ids: Tensor) -> Tensor:
    """`[B, T]` -> bool `[B, T - 1]`: does the next token begin a document? Positions grow by any steps."""
    return position_ids.diff() <= 0


def _by_positions(position_ids: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The same where positions start again within a text, or None where they do not."""
    T = q.shape[2]
    if (
        position_ids is None
        or position_ids.ndim != 2
        or T == 1
        or not T == k.shape[2] == position_ids.shape[1]
    ):
        return None
    again = starts_again(position_ids)
    if not torch.compiler.is_compiling() and not again.any():
        return None
    return masks.document_offsets(torch.nn.functional.pad(again.cumsum(1), (1, 0)).expand(q.shape[0], -1))


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:
    """An attention function of transformers' AttentionInterface.

    Args:
        module: the attention layer.
        query: `[B, Hq, T, D]`; key `[B, Hkv, S, D]`, value `[B, Hkv, S, Dv]`.
        attention_mask: what `masks.mask` made, or None: nothing is hidden but by what follows.
        sliding_window: keys that a query sees, itself included (both ways where it is not causal).
        scaling, softcap: of the scores; s_aux or sinks: `[Hq]`, a logit in the softmax's denominator.
        is_causal: module.is_causal if None, True if that is absent.
        position_ids, cu_seq_lens_q, cu_seq_lens_k: where packed documents begin, if no mask says so.

    Returns:
        o `[B, T, Hq, Dv]` and None for the weights. Padding: 0.

    Raises:
        Unsupported: dropout while training, a mask of another making, or an option that has no kernel.
    """
    _refuse(module, dropout, options)
    mask = attention_mask
    if mask is not None and not hasattr(mask, "band"):
        what = f"{mask.dtype}{list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise Unsupported(
            f"attention: attention_mask is a mask of the caller's own ({what}); `[B, S]` of padding, or "
            f"none, is supported: use {masks.EAGER}"
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    left, right = _band(module, mask, sliding_window, is_causal)
    if mask is not None and mask.shape[3] == 1:  # a static cache is filled up to here
        filled = int(mask[0, 0, 1, 0])
        key, value = key[:, :, :filled], value[:, :, :filled]
    if cu_seq_lens_q is not None:
        offsets = _explicit(cu_seq_lens_q, cu_seq_lens_k, query)
    elif mask is not None and mask.shape[3] > 1:
        offsets = mask[0, 0]
    elif mask is not None and torch.compiler.is_compiling():  # then the mask says where documents begin
        offsets = None
    else:
        offsets = _by_positions(position_ids, query, key)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, T, H, D]
    B, T = q.shape[:2]
    if offsets is not None:
        q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    o = sliding_window_attention(
        q,
        k,
        v,
        window=(left, right),
        causal=right == 0,
        scale=scaling,
        softcap=softcap,
        sinks=sinks if s_aux is None else s_aux,
        cu_seqlens=None if offsets is None else offsets[0],
        cu_seqlens_k=None if offsets is None else offsets[1],
    )
    return o.reshape(B, T, *o.shape[2:]), None
