"""What a transformers mask hides, as a window and as sequences packed side by side; nothing of size T S.

transformers describes a mask by a function of positions, and padding and documents by tensors beside it.
`mask` reads both and returns what `attention` needs, an int32 tensor `[1, 1, 2, M]`: the offsets of M - 1
packed sequences in the flattened queries (row 0) and keys (row 1). M = 0: all rows are whole. M = 1: so they
are, and the keys end at the number in row 1, up to which a static cache has been filled. It has four
dimensions since transformers passes on as it is what has four. The window stands in its attribute `band`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from ...dispatch import Unsupported


class Pattern(NamedTuple):
    """Query i sees the keys i - left <= j <= i + right (None: no bound) of its own document."""

    left: int | None
    right: int | None
    documents: Tensor | None = None  # [B, T], equal where tokens are of one document

    def intersect(self, other: "Pattern") -> "Pattern":
        """What both show."""
        if self.documents is not None and other.documents is not None:
            raise Unsupported("attention_mask: two packings at once; one is supported")
        sides = ((a, b) for a, b in zip(self[:2], other[:2], strict=True))
        left, right = (min((x for x in side if x is not None), default=None) for side in sides)
        return Pattern(left, right, other.documents if self.documents is None else self.documents)


def _codes() -> dict:
    """The code of each of transformers' mask functions that we know -> what it is. (A function made inside
    another has the same code each time.)"""
    makers = {
        "sliding_window_overlay": (1,),
        "sliding_window_bidirectional_overlay": (1,),
        "packed_sequence_mask_function": (None,),
        "remap_positions_for_packed_sequence": (masking_utils.causal_mask_function, None),
        "and_masks": (),
    }
    there = {name: arguments for name, arguments in makers.items() if hasattr(masking_utils, name)}
    return {getattr(masking_utils, name)(*a).__code__: name for name, a in there.items()}


_CODES = _codes()
EAGER = 'attn_implementation="eager" or "sdpa"'


def read(mask_function) -> Pattern:
    """The pattern of a mask function of transformers, exactly.

    Raises:
        Unsupported: it is none that a window can express, such as bidirectional blocks in a causal text.
    """
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(None, 0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern(None, None)
    name = _CODES.get(getattr(mask_function, "__code__", None))
    if name is None:
        what = getattr(mask_function, "__qualname__", repr(mask_function)).split(".<locals>")[0]
        raise Unsupported(
            f"attention_mask is made by {what}; causal, bidirectional, sliding and packed masks and their "
            f"intersections are supported: use {EAGER}"
        )
    cells = zip(mask_function.__code__.co_freevars, mask_function.__closure__, strict=True)
    values = {key: cell.cell_contents for key, cell in cells}
    if name == "and_masks":
        pattern = Pattern(None, None)
        for part in values["mask_functions"]:
            pattern = pattern.intersect(read(part))
        return pattern
    if name == "remap_positions_for_packed_sequence":  # positions within a document have the same distances
        return read(values["mask_function"])
    if name == "packed_sequence_mask_function":
        return Pattern(None, None, values["packed_sequence_mask"])
    window = values["sliding_window"]
    return Pattern(window - 1, None) if name == "sliding_window_overlay" else Pattern(window, window)


def read_compiled(mask_function, local_size, skips_bidirectional: bool, use_vmap: bool) -> Pattern:
    """The same, but for documents, while torch.compile traces, which cannot look into functions: from what
    goes beside them."""
    if use_vmap:
        raise Unsupported(f"attention_mask is made by a function of the model's own: use {EAGER}")
    if local_size is not None:
        return Pattern(local_size, local_size) if skips_bidirectional else Pattern(local_size - 1, 0)
    bidirectional = skips_bidirectional or mask_function is masking_utils.bidirectional_mask_function
    return Pattern(None, None if bidirectional else 0)


def documents_of(mask_function, B: int, T: int, device) -> Tensor:
    """Numbers of documents `[B, T]` by what the function says: one begins at a token that does not see the
    one before it. (In a window of one token they do not matter.)"""
    index = torch.arange(T, device=device)[None]
    rows = torch.arange(B, device=device)[:, None]
    sees = mask_function(rows, 0, index, (index - 1).clamp(min=0)).expand(B, T)
    return (~sees).cumsum(1)


def agrees(mask_function, pattern: Pattern, B: int, T: int, q_offset, last, device) -> Tensor:
    """Does the function say what the pattern says, of the keys beside every query and at the pattern's edges?

    `last` is the last key's position. Blocks both ways show at the next key, chunks at the window's end.
    """
    expected = {0: True, 1: pattern.right is None or pattern.right > 0}
    if pattern.left is not None:
        expected |= {-pattern.left: True, -pattern.left - 1: False}
    if pattern.right:
        expected |= {pattern.right: True, pattern.right + 1: False}
    rows, q = torch.arange(B, device=device)[:, None], torch.arange(T, device=device)[None] + q_offset
    good = torch.ones(B, T, dtype=torch.bool, device=device)
    for distance, visible in expected.items():
        k = q + distance
        counts = (k >= 0) & (k <= last)
        k = k.clamp(min=0, max=last)
        if pattern.documents is not None:  # then positions are indices
            counts = counts & (pattern.documents == pattern.documents.gather(1, k.expand(B, T)))
        good = good & ((mask_function(rows, 0, q, k) == visible) | ~counts)
    return good.all()


def document_offsets(documents: Tensor) -> Tensor:
    """Numbers of documents `[B, T]`, equal within one -> int32 `[2, N + 1]`, offsets in the flattened rows.

    While torch.compile traces, N is B T, a bound, and most sequences are empty.
    """
    B, T = documents.shape
    starts = torch.ones(B, T, dtype=torch.bool, device=documents.device)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = starts.flatten()
    if torch.compiler.is_compiling():
        index = torch.arange(B * T, device=starts.device)
        first = torch.where(starts, index, B * T).sort().values
    else:
        first = starts.nonzero()[:, 0]
    offsets = torch.nn.functional.pad(first, (0, 1), value=B * T).to(torch.int32)
    return offsets.expand(2, -1)


def row_offsets(q_first: Tensor, q_end: Tensor, first: Tensor, end: Tensor, T: int, S: int) -> Tensor:
    """Of each row the queries from q_first to q_end, of T, see the keys from first to end, of S; `[B]` all.
    -> int32 `[2, 5 B + 1]`, offsets in the flattened rows.

    A row is five sequences: queries that see nothing, keys that nothing sees, the ones that meet, and the
    first two again, behind.
    """
    rows = torch.arange(first.shape[0], device=first.device)[:, None]
    zero = torch.zeros_like(first)
    q = torch.stack((q_first, q_first, q_end, q_end, zero + T), 1) + rows * T  # [B, 5]
    k = torch.stack((zero, first, end, zero + S, zero + S), 1) + rows * S
    return torch.nn.functional.pad(torch.stack((q.flatten(), k.flatten())), (1, 0)).to(torch.int32)


def real_keys(attention_mask: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """Padding `[B, n]`, true where a token is real -> first and end `[B]` of the real keys of S.

    Raises:
        Unsupported: padding between the real tokens of a row (looked for in eager mode; on a GPU the device
            asserts it).
    """
    real = attention_mask[:, :S] != 0
    index = torch.arange(1, real.shape[1] + 1, device=real.device)
    end = (index * real).amax(1)  # 0 of a row of padding alone
    count = real.sum(1)
    first = end - count
    whole = ((real.int().argmax(1) == first) | (count == 0)).all()
    if not torch.compiler.is_compiling():
        where = "between the real tokens of a row; at its ends it is supported"
        message = f"attention_mask has padding {where}: use {EAGER}"
        if whole.device.type != "cpu":
            torch._assert_async(whole, message)
        elif not whole:
            raise Unsupported(message)
    return first, end


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options,
) -> Tensor:
    """The mask function of attention "slmkernels" in transformers' AttentionMaskInterface; its arguments.

    Args:
        batch_size, q_length, kv_length: B, T and S of the call to come.
        q_offset, kv_offset: the positions of the first query and the first key.
        mask_function: what a query sees, by positions.
        attention_mask: `[B, n]`, true where a token is real; from position 0.
        local_size, use_vmap, device, options: what transformers says besides.

    Returns:
        int32 `[1, 1, 2, M]` with `band`, see the head of this file.

    Raises:
        Unsupported: a mask that is no window over sequences, or padding between real tokens.
    """
    if torch.compiler.is_compiling():
        skips = "allow_is_bidirectional_skip" in options
        pattern = read_compiled(mask_function, local_size, skips, use_vmap)
        plain = mask_function in (
            masking_utils.causal_mask_function,
            masking_utils.bidirectional_mask_function,
        )
        if not plain:
            if attention_mask is None and isinstance(q_offset, int) and q_length == kv_length:
                pattern = pattern._replace(
                    documents=documents_of(mask_function, batch_size, q_length, device)
                )
            edges = batch_size, q_length, q_offset, kv_length + kv_offset - 1, device
            what = f"attention_mask is no window over packed documents: use {EAGER}"
            torch._assert_async(agrees(mask_function, pattern, *edges), what)
    else:
        pattern = read(mask_function)
    offset = q_offset - kv_offset  # of the first query among the keys
    offsets = None
    if pattern.documents is not None:
        offsets = document_offsets(pattern.documents)
    elif attention_mask is not None or not isinstance(offset, int) or offset + q_length < kv_length:
        offsets = _padded(attention_mask, pattern, batch_size, q_length, kv_length, offset, kv_offset, device)
    if offsets is None:
        offsets = torch.empty(2, 0, dtype=torch.int32, device=device)
    result = offsets[None, None].contiguous()
    result.band = pattern.left, pattern.right
    return result


def _padded(attention_mask, pattern, B, T, S, offset, kv_offset, device) -> Tensor | None:
    """The offsets of rows with padding, or with keys behind the last query; None if there is neither.

    Query i stands at key `offset + i`, and is padding where that is. Where nothing but padding is hidden, the
    keys may be of another text, and every query counts.
    """
    first = torch.zeros(B, dtype=torch.int64, device=device)
    end = first + S
    if attention_mask is not None:
        first, end = real_keys(attention_mask[:, kv_offset:], S)
    filled = offset + T if pattern.right == 0 else S
    if torch.device(device).type == "cpu" and not torch.compiler.is_compiling():
        filled = int(filled)
        if not first.any() and (end >= filled).all():
            return None if filled == S else torch.tensor([[T], [filled]], dtype=torch.int32)
    end = end.clamp(max=filled)
    if pattern.left is None and pattern.right is None:
        q_first, q_end = torch.zeros_like(first), torch.zeros_like(first) + T
    else:
        q_first, q_end = (first - offset).clamp(0, T), (end - offset).clamp(0, T)
    return row_offsets(q_first, q_end, first, end, T, S)
