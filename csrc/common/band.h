// The window's geometry, in one place: which keys a query sees, which queries see a key.
//
// Query i (a position, not a row: row t stands at i = t + S - T) sees the keys
// i - left <= j <= i + right; a side of kUnbounded has no bound. With `block`, positions stand in blocks of
// that size, and the first key is that of the block before the query's own. All ranges are half open.
#pragma once

#include <cstdint>

namespace slm {

struct Range {
    int64_t begin, end;
    constexpr int64_t size() const { return end > begin ? end - begin : 0; }
};

struct Band {
    static constexpr int64_t kUnbounded = -1;
    int64_t left, right;
    int64_t block = 0;

    // The first key that a query sees if there is a bound; may be negative.
    constexpr int64_t first(int64_t i) const { return block > 0 ? i / block * block - block : i - left; }
    // The last query that sees a key.
    constexpr int64_t last(int64_t j) const { return block > 0 ? (j / block + 2) * block - 1 : j + left; }

    constexpr bool sees(int64_t i, int64_t j) const {
        return (left < 0 || j >= first(i)) && (right < 0 || j <= i + right);
    }

    // Keys of [0, S) that at least one of the queries [i.begin, i.end) sees.
    constexpr Range keys(Range i, int64_t S) const {
        const int64_t begin = left < 0 ? 0 : first(i.begin);
        const int64_t end = right < 0 ? S : i.end + right;
        return clip({begin, end}, {0, S});
    }

    // Queries of `all` that see at least one of the keys [j.begin, j.end).
    constexpr Range queries(Range j, Range all) const {
        const int64_t begin = right < 0 ? all.begin : j.begin - right;
        const int64_t end = left < 0 ? all.end : last(j.end - 1) + 1;
        return clip({begin, end}, all);
    }

    // Do all queries of i see all keys of j? Then no mask is needed.
    constexpr bool full(Range i, Range j) const {
        return sees(i.begin, j.end - 1) && sees(i.end - 1, j.begin);
    }

    static constexpr Range clip(Range x, Range bounds) {
        const int64_t low = x.begin < bounds.begin ? bounds.begin : x.begin;
        const int64_t begin = low > bounds.end ? bounds.end : low;
        const int64_t end = x.end > bounds.end ? bounds.end : x.end;
        return {begin, end < begin ? begin : end};
    }
};

// A run: consecutive keys that are seen by the same vectors of a block of query lanes. Lane l of the
// block stands at position i0 + l; vectors [v.begin, v.end) hold the lanes that see any key of the run.
// Lanes past the block's last query may hold anything.
struct Run {
    Range j, v;
    bool masked;  // some lane of those vectors does not see some key of the run
};

// The run that begins at key j and ends before `end`. Keys are taken `step` at a time (2 where a
// kernel multiplies pairs of keys), so runs have even length except at the end.
inline Run next_run(const Band& band, int64_t i0, int64_t lanes, int64_t width, int64_t step, int64_t j,
                    int64_t end) {
    const Range all{i0, i0 + lanes};
    const auto look = [&](int64_t a, Range& v) {
        const Range keys{a, a + step < end ? a + step : end};
        const Range seen = band.queries(keys, all);
        v = {(seen.begin - i0) / width, (seen.end - i0 + width - 1) / width};
        if (seen.size() == 0) v = {0, 0};
        return !band.full(Band::clip({i0 + v.begin * width, i0 + v.end * width}, all), keys);
    };
    Run run{{j, j}, {0, 0}, false};
    run.masked = look(j, run.v);
    for (run.j.end = j + step; run.j.end < end; run.j.end += step) {
        Range v{0, 0};
        const bool masked = look(run.j.end, v);
        if (v.begin != run.v.begin || v.end != run.v.end || masked != run.masked) break;
    }
    if (run.j.end > end) run.j.end = end;
    return run;
}

}  // namespace slm
