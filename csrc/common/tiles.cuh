// Tiles of 16-bit numbers in shared memory, and how tensor cores read them.
//
// A tile has rows of C numbers, C a multiple of 64. The 16-byte pieces of a row are permuted within each 128 bytes,
// piece p of row r lying at p ^ (r % 8): then the eight rows that ldmatrix reads at a time lie in different banks,
// and so do eight neighbouring pieces of one row. g = lane / 4 and t = lane % 4 as in hardware.cuh.
#pragma once

#include "hardware.cuh"

namespace slm {

template <int C>
struct Tile {
    static_assert(C % 64 == 0);
    static constexpr int kPieces = C / 8;  // of 16 bytes, in a row
    static constexpr int bytes(int rows) { return rows * C * 2; }

    Shared base;  // a multiple of 128

    SLM_DEVICE Shared piece(int row, int piece) const {
        return base + Shared(row * C * 2 + ((piece ^ (row & 7)) << 4));
    }
    // The tile that begins at a row, a multiple of 8.
    SLM_DEVICE Tile from(int row) const { return {base + Shared(row * C * 2)}; }
    SLM_DEVICE Shared at(int row, int column) const { return piece(row, column >> 3) + ((column & 7) << 1); }
};

// Begins to copy `rows` rows into a tile, by `threads` threads of which this is `thread`. Row r comes from
// from(r) where valid(r), and only its first `columns` numbers, a multiple of 8; the rest become zeros.
template <int C, typename E, typename From, typename Valid>
SLM_DEVICE void copy_rows(Tile<C> to, int rows, int columns, int thread, int threads, From from,
                          Valid valid) {
    for (int n = thread; n < rows * Tile<C>::kPieces; n += threads) {
        const int row = n / Tile<C>::kPieces, piece = n % Tile<C>::kPieces;
        const bool read = valid(row) && piece * 8 < columns;
        const E* source = read ? from(row) + piece * 8 : nullptr;
        copy_async(to.piece(row, piece), source, read);
    }
}

// Where lane-dependent `lane_row` and `lane_piece` (0 or 1) of a [16, 16] lie that begins at `row`, `column`,
// which are multiples of 8 and 16: then these flip and add constants to one address a lane.
template <int C>
SLM_DEVICE Shared matrix_row(Tile<C> tile, int row, int column, int lane_row, int lane_piece) {
    const int bytes = column * 2;
    return (tile.piece(lane_row, lane_piece) ^ Shared(bytes & 127)) + Shared((bytes & ~127) + row * C * 2);
}

// The operand a [16, 16] of `multiply`: rows from `row`, columns from `column` of a tile.
template <int C>
SLM_DEVICE void load_a(uint32_t (&a)[4], Tile<C> tile, int row, int column) {
    const int lane = lane_of_thread();
    load_matrices(a, matrix_row(tile, row, column, lane % 16, lane / 16));
}
// a = transpose of the tile's [16 (k), 16 (m)] at `row`, `column`.
template <int C>
SLM_DEVICE void load_a_transposed(uint32_t (&a)[4], Tile<C> tile, int row, int column) {
    const int lane = lane_of_thread();
    load_matrices_transposed(a, matrix_row(tile, row, column, lane % 8 + lane / 16 * 8, lane / 8 % 2));
}
// Two operands b [16 (k), 8 (n)] side by side, {b[0], b[1]} and {b[2], b[3]}, of a tile whose rows are n and whose
// columns are k: 16 rows from `row`.
template <int C>
SLM_DEVICE void load_b(uint32_t (&b)[4], Tile<C> tile, int row, int column) {
    const int lane = lane_of_thread();
    load_matrices(b, matrix_row(tile, row, column, lane % 8 + lane / 16 * 8, lane / 8 % 2));
}
// The same of a tile whose rows are k and whose columns are n: 16 columns from `column`.
template <int C>
SLM_DEVICE void load_b_transposed(uint32_t (&b)[4], Tile<C> tile, int row, int column) {
    const int lane = lane_of_thread();
    load_matrices_transposed(b, matrix_row(tile, row, column, lane % 16, lane / 16));
}

// Two neighbouring results d [16, 8] of `multiply` as an operand a [16, 16].
template <typename E>
SLM_DEVICE void as_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack<E>(left[0], left[1]), a[1] = pack<E>(left[2], left[3]);
    a[2] = pack<E>(right[0], right[1]), a[3] = pack<E>(right[2], right[3]);
}

// Stores a result d [16, 8] at `row`, `column` of a tile.
template <typename E, int C>
SLM_DEVICE void store_d(Tile<C> tile, int row, int column, const float (&d)[4]) {
    const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    store(tile.at(row + g, column + 2 * t), pack<E>(d[0], d[1]));
    store(tile.at(row + g + 8, column + 2 * t), pack<E>(d[2], d[3]));
}

// Over the four lanes that share a row of results.
SLM_DEVICE float max_of_row(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
SLM_DEVICE float sum_of_row(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

}  // namespace slm
