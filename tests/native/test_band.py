"""The window geometry of csrc/common/band.h against a mask, exhaustively on small sizes."""

import itertools

import numpy as np
import pytest

from slmkernels import native

host = native.host
pytestmark = pytest.mark.skipif(host is None, reason=str(native.REASONS))

SIDES = [None, 0, 1, 3, 7]
LEFTS = [*SIDES, (1,), (3,), (5,)]  # the last three: blocks of that size, the query's own and the one before


def mask(left, right, i, j):
    """Does query i see key j? For arrays of positions."""
    seen = np.ones(np.broadcast(i, j).shape, bool)
    if isinstance(left, tuple):
        seen &= j >= i // left[0] * left[0] - left[0]
    elif left is not None:
        seen &= j >= i - left
    if right is not None:
        seen &= j <= i + right
    return seen


def lowest(left):
    """Positions before the first have no block."""
    return 0 if isinstance(left, tuple) else -99


@pytest.mark.parametrize(("left", "right"), list(itertools.product(LEFTS, SIDES)))
def test_ranges(left, right):
    S, low = 9, lowest(left)
    for begin, end in itertools.combinations(range(max(-6, low), 14), 2):
        seen = mask(left, right, np.arange(begin, end)[:, None], np.arange(S)[None]).any(0)
        a, b = host.band_keys(left, right, begin, end, S)
        assert 0 <= a <= S
        assert b >= a
        assert np.flatnonzero(seen).tolist() == list(range(a, b))
    for begin, end in itertools.combinations(range(S + 1), 2):
        queries = np.arange(max(-4, low), 12)
        seen = mask(left, right, queries[:, None], np.arange(begin, end)[None]).any(1)
        a, b = host.band_queries(left, right, begin, end, int(queries[0]), 12)
        assert queries[seen].tolist() == list(range(a, b))
    for i0, i1 in itertools.combinations(range(max(-2, low), 8), 2):
        for j0, j1 in itertools.combinations(range(8), 2):
            full = mask(left, right, np.arange(i0, i1)[:, None], np.arange(j0, j1)[None]).all()
            assert host.band_full(left, right, i0, i1, j0, j1) == full


@pytest.mark.parametrize(("left", "right"), list(itertools.product(LEFTS, SIDES)))
@pytest.mark.parametrize("step", [1, 2])
def test_runs(left, right, step):
    width, starts = 4, range(max(-3, lowest(left)), 9)
    for i0, lanes, begin, size in itertools.product(starts, (1, 4, 7, 16), (0, 1, 5), (1, 2, 7, 20)):
        runs = host.band_runs(left, right, i0, lanes, width, step, begin, begin + size)
        keys = [j for (a, b), _, _ in runs for j in range(a, b)]
        assert keys == list(range(begin, begin + size)), "every key once, in order"
        for (a, b), (first, last), masked in runs:
            assert (b - a) % step == 0 or b == begin + size
            i = i0 + np.arange(-(-lanes // width) * width)
            seen = mask(left, right, i[:, None], np.arange(a, b)[None])
            seen[lanes:] = False
            used = np.flatnonzero(seen.any(1)) // width
            assert set(used) <= set(range(first, last)), "no lane that sees a key is left out"
            inside = mask(
                left, right, i[first * width : min(last * width, lanes)][:, None], np.arange(a, b)[None]
            )
            assert masked or inside.all(), "no mask only where everything is seen"
            for j in range(a, b, step):  # and nothing is computed that no pair of keys needs
                pair = np.flatnonzero(seen[:, j - a : j - a + step].any(1)) // width
                if len(pair):
                    assert (first, last) == (pair[0], pair[-1] + 1)
