// Gates per channel: M_ij = sum_c x_ic k_jc exp(G_ic - G_jc) is no matrix product, since the factor cannot
// be split between x and k with both parts bounded, unless a position between j and i splits the exponent
// (Yang et al. 2024, GLA, section 4.3). So:
//   - blocks of kSub tokens on the diagonal, pair by pair: down from j = i - 1 a product of gates runs
//     along in registers, f = exp(G_i - G_j), one multiplication a pair and register, and no
//     exponential;
//   - two neighbouring ranges of s = 16, 32, ... tokens meet at the end of the first: with x e^G from
//     the start of the second and k e^G up to the end of the first it is a matrix product. Going from
//     s to 2 s multiplies the rows by the other range's whole decay. At the top they are xr and kw, as
//     they meet the state.
// Every factor is a product of gates <= 1: what underflows is negligible. Exponentials: one a gate, and one
// a chunk and channel for e^{G_C}, which must not be a product: over thousands of tokens with gates near 1
// the rounding of each gate would add up in the state (T = 20000, gates of -1e-4: an error of 3e-5 instead
// of 7e-7). The backward runs the same levels with dM in hand, since it needs xr and kw of each level.

// dM, and what it gives: dx of the readers and dk of the keys, without the diagonal j = i, which no gate
// scales.
template <typename F>
struct ChannelGradient {
    const F* dM;  // [2m][C]
    F *dx, *dk;  // [2m][Kp], [m][Kp]; added to
    F* product;  // [C][Kp] scratch
};

template <typename F>
void read_channel_gates(Chunk<F>& chunk, int64_t b, int64_t t, int64_t h) {
    const LinearProblem& p = chunk.p;
    fill_zero(chunk.total, chunk.Kp);
    for (int64_t i = 0; i < chunk.m; ++i) {
        F* gate = chunk.gate + i * chunk.Kp;
        if (i < chunk.n)
            widen_row<F>(static_cast<const F*>(p.decay) + ((b * p.T + t + i) * p.H + h) * p.K, gate, p.K);
        else
            fill_zero(gate, chunk.Kp);
        for (int64_t d = 0; d < chunk.Kp; d += kLanes<F>) {
            const Vec<F> exponent = loadu<F>(gate + d) * kLog2e<F>;
            storeu<F>(chunk.total + d, loadu<F>(chunk.total + d) + exponent);
            storeu<F>(gate + d, exp2_nonpositive<F>(exponent));
        }
    }
    for (int64_t d = 0; d < chunk.Kp; d += kLanes<F>)
        storeu<F>(chunk.total + d, exp2_nonpositive<F>(loadu<F>(chunk.total + d)));
}

// Row i of a diagonal block that starts at s, N registers of channels: partial sums of products, [2][kSub]
// registers.
template <int N, typename F>
SLM_INLINE void pair_products(const Chunk<F>& chunk, int64_t s, int64_t i, int64_t d, Readers readers,
                              F* sums) {
    constexpr int L = kLanes<F>;
    const int64_t Kp = chunk.Kp;
    const F *keys = chunk.k() + d, *gates = chunk.gate + d;
    const bool queries = readers.first == 0, rates = readers.last == 2;
    Vec<F> f[N], q[N], k[N];
    for (int c = 0; c < N; ++c) {
        f[c] = splat<F>(1);
        q[c] = queries ? loadu<F>(chunk.q() + i * Kp + d + c * L) : Vec<F>{};
        k[c] = loadu<F>(keys + i * Kp + c * L);
    }
    if (queries) {
        Vec<F> sum = loadu<F>(sums + (i - s) * L);
        for (int c = 0; c < N; ++c) sum += q[c] * k[c];
        storeu<F>(sums + (i - s) * L, sum);
    }
    for (int64_t j = i - 1; j >= s; --j) {
        Vec<F> to_q{}, to_k{};
        for (int c = 0; c < N; ++c) {
            f[c] *= loadu<F>(gates + (j + 1) * Kp + c * L);
            const Vec<F> key = loadu<F>(keys + j * Kp + c * L) * f[c];
            to_q += q[c] * key;
            to_k += k[c] * key;
        }
        F* at = sums + (j - s) * L;
        if (queries) storeu<F>(at, loadu<F>(at) + to_q);
        if (rates) storeu<F>(at + kSub * L, loadu<F>(at + kSub * L) + to_k);
    }
}

template <int N, typename F>
SLM_INLINE void pair_gradients(const Chunk<F>& chunk, int64_t s, int64_t i, int64_t d,
                               const ChannelGradient<F>& g) {
    constexpr int L = kLanes<F>;
    const int64_t Kp = chunk.Kp, m = chunk.m;
    const F *keys = chunk.k() + d, *gates = chunk.gate + d;
    const F *to_q = g.dM + i * chunk.C, *to_k = g.dM + (m + i) * chunk.C;
    Vec<F> f[N], q[N], k[N], dq[N] = {}, dk[N] = {};
    for (int c = 0; c < N; ++c) {
        f[c] = splat<F>(1);
        q[c] = loadu<F>(chunk.q() + i * Kp + d + c * L);
        k[c] = loadu<F>(keys + i * Kp + c * L);
    }
    for (int64_t j = i - 1; j >= s; --j) {
        const F by_q = to_q[j], by_k = chunk.delta ? to_k[j] : F(0);
        for (int c = 0; c < N; ++c) {
            f[c] *= loadu<F>(gates + (j + 1) * Kp + c * L);
            const Vec<F> key = loadu<F>(keys + j * Kp + c * L) * f[c];
            dq[c] += by_q * key;
            dk[c] += by_k * key;
            F* at = g.dk + j * Kp + d + c * L;
            storeu<F>(at, loadu<F>(at) + f[c] * (by_q * q[c] + by_k * k[c]));
        }
    }
    for (int c = 0; c < N; ++c) {
        F* at = g.dx + i * Kp + d + c * L;
        storeu<F>(at, loadu<F>(at) + dq[c]);
        if (chunk.delta) storeu<F>(at + m * Kp, loadu<F>(at + m * Kp) + dk[c]);
    }
}

template <bool Backward, typename F>
void mix_channels(Chunk<F>& chunk, Readers readers, ChannelGradient<F>* gradient) {
    constexpr int L = kLanes<F>;
    const int64_t C = chunk.C, Kp = chunk.Kp, m = chunk.m;
    F *const into = chunk.into, *const out = chunk.out, *const gate = chunk.gate;
    for (int64_t s = 0; s < m; s += kSub) {
        const int64_t e = s + kSub - 1;
        for (int64_t d = 0; d < Kp; d += L) {
            Vec<F> from_start = splat<F>(1), to_end = splat<F>(1);
            for (int64_t i = s; i <= e; ++i) {
                from_start *= loadu<F>(gate + i * Kp + d);
                storeu<F>(into + i * Kp + d, from_start);
                for (int half = readers.first; half < readers.last; ++half) {
                    const int64_t at = (half * m + i) * Kp + d;
                    storeu<F>(chunk.xr + at, loadu<F>(chunk.x + at) * from_start);
                }
            }
            for (int64_t j = e; j >= s; --j) {
                storeu<F>(out + j * Kp + d, to_end);
                storeu<F>(chunk.kw + j * Kp + d, loadu<F>(chunk.k() + j * Kp + d) * to_end);
                to_end *= loadu<F>(gate + j * Kp + d);
            }
        }
        if (readers.first == readers.last) continue;
        for (int64_t i = s; i <= e; ++i) {
            int64_t d = 0;
            if constexpr (Backward) {
                for (; d + 4 * L <= Kp; d += 4 * L) pair_gradients<4>(chunk, s, i, d, *gradient);
                for (; d < Kp; d += L) pair_gradients<1>(chunk, s, i, d, *gradient);
            } else {
                fill_zero(chunk.sums, 2 * kSub * L);
                for (; d + 4 * L <= Kp; d += 4 * L) pair_products<4>(chunk, s, i, d, readers, chunk.sums);
                for (; d < Kp; d += L) pair_products<1>(chunk, s, i, d, readers, chunk.sums);
                for (int half = readers.first; half < readers.last; ++half)
                    for (int64_t j = 0; j < kSub; j += L) {
                        Vec<F> partial[L];
                        for (int l = 0; l < L; ++l)
                            partial[l] = loadu<F>(chunk.sums + (half * kSub + j + l) * L);
                        const Vec<F> row = sum_lanes<F>(partial);
                        storeu<F>(chunk.M + (half * m + i) * C + s + j, half ? -row : row);
                    }
            }
        }
    }
    for (int64_t s = kSub; s < m; s *= 2)
        for (int64_t a = 0; a + s < m; a += 2 * s) {
            const int64_t b = a + s, rows = m - b < s ? m - b : s;  // ranges a.. of s, b.. of `rows`
            if (readers.first != readers.last && !Backward) {
                pack_transposed<Fma<F>>(chunk.kw + a * Kp, Kp, s, Kp, chunk.packed, C);
                for (int half = readers.first; half < readers.last; ++half) {
                    F* to = chunk.M + (half * m + b) * C + a;
                    gemm<Fma<F>, false>(rows, s / L, Kp, chunk.xr + (half * m + b) * Kp, Kp, 1, chunk.packed,
                                        C, to, C);
                    if (half)
                        for (int64_t i = 0; i < rows; ++i)
                            for (int64_t j = 0; j < s; j += L)
                                storeu<F>(to + i * C + j, -loadu<F>(to + i * C + j));
                }
            }
            if constexpr (Backward) {
                F* product = gradient->product;
                for (int half = readers.first; half < readers.last; ++half) {
                    const F* dM = gradient->dM + (half * m + b) * C + a;
                    gemm<Fma<F>, false>(rows, Kp / L, s, dM, C, 1, chunk.kw + a * Kp, Kp, product, Kp);
                    add_product(gradient->dx + (half * m + b) * Kp, product, into + b * Kp, rows * Kp);
                }
                for (int half = readers.first; half < readers.last; ++half) {
                    const F* dM = gradient->dM + (half * m + b) * C + a;
                    gemm<Fma<F>, false>(s, Kp / L, rows, dM, 1, C, chunk.xr + (half * m + b) * Kp, Kp,
                                        product, Kp);
                    add_product(gradient->dk + a * Kp, product, out + a * Kp, s * Kp);
                }
            }
            const F *first = into + (b - 1) * Kp, *second = into + (b + rows - 1) * Kp;  // whole decays
            for (int64_t d = 0; d < Kp; d += L) {
                const Vec<F> before = loadu<F>(first + d), after = loadu<F>(second + d);
                for (int64_t i = b; i < b + rows; ++i) {
                    storeu<F>(into + i * Kp + d, loadu<F>(into + i * Kp + d) * before);
                    for (int half = readers.first; half < readers.last; ++half) {
                        F* at = chunk.xr + (half * m + i) * Kp + d;
                        storeu<F>(at, loadu<F>(at) * before);
                    }
                }
                for (int64_t j = a; j < b; ++j) {
                    storeu<F>(out + j * Kp + d, loadu<F>(out + j * Kp + d) * after);
                    storeu<F>(chunk.kw + j * Kp + d, loadu<F>(chunk.kw + j * Kp + d) * after);
                }
            }
        }
}
