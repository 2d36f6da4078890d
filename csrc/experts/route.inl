// Routing on the CPU, for one tier: scores, the k best experts, weights, and the means that losses want.
//
//     p_e = exp(x_e - lse),  or s_e / (sum s + 1e-20) with s = 1 / (1 + exp(-x))      lse = log sum exp(x)
//     entropy of p: log sum exp(x - top) + sum_e p_e (top - x_e), no term below 0; of sigmoids, -sum p log p
//
// and backward, with p recomputed from the logits and lse. g: d(weights); w: weights / scale; c: chosen;
// D: d(probabilities) / T; Z: 2 lse d(z) / T:
//
//     weights:  softmax among the chosen    d(x_c) += scale w_c (g_c - sum_c' g_c' w_c')
//               softmax                     d(x_e) += p_e (G_e - sum_f G_f p_f), G_c = scale g_c, else 0
//               sigmoid                     d(x_c) += scale g_c s_c (1 - s_c)
//               sigmoid, renormalised       d(x_c) += scale w_c (g_c - sum_c' g_c' w_c') (1 - s_c)
//     means:    softmax p                   d(x_e) += p_e (D_e + Z - sum_f D_f p_f)
//               sigmoid p                   d(x_e) += p_e (D_e - sum_f D_f p_f) (1 - s_e),  exp(x_e - lse) Z
//
// Forward, tokens lie across the lanes: a tile is one register of tokens, its logits are transposed in
// registers on the way in, masked, and nothing afterwards is horizontal. The k best of each lane stand in
// registers, sorted: every expert in turn is compared with all of them at once, and each slot keeps what it
// has, takes the newcomer, or takes what stood above it. No branch, and ties stay with the lower index.
// Backward, experts lie across the lanes, since few experts of a token have a gradient: without gradients of
// the means a row is zeros and k numbers.
//
// A task is kBlock tokens. Sums over tokens are made in the lanes of a block, then over the blocks, which
// follow from the shape, in their order: the same bits for any number of threads.
//
// Measured, one core of an AMD Zen 4, T = 2048, float32, renormalised softmax (sigmoids: + 40 % of either),
// us, beside PyTorch's softmax, topk, division, bincount, mean and logsumexp: E = 8, k = 2: forward 38 (450),
// backward 49 (300); E = 64, k = 2: 114 (1540), 84 (370); E = 64, k = 8: 173 (1840), 110 (385); E = 256, k =
// 8: 570 (5900), 248 (1300). One token, E = 64, k = 8: 12 (36), of which the seven outputs take most. Tried:
//   - backward with a token's chosen experts across the lanes: E = 64, k = 2: 178, since what is stored one by
//     one and loaded as a register stalls;
//   - partial registers always through a copy: E = 8: forward 56, backward 101.

#include "../common/sigmoid.h"
#include "route.h"

namespace slm::route {
namespace {

template <typename F>
constexpr F kEps = F(1e-20);  // reference.EPS

SLM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Logits of token t, experts [e, e + n), n at most a register: -inf where forbidden and past the last.
template <typename F, typename E>
SLM_INLINE Vec<F> load_logits(const Problem& p, int64_t t, int64_t e, int64_t n) {
    constexpr int L = kLanes<F>;
    typedef uint8_t Bytes __attribute__((vector_size(L), aligned(1), may_alias));
    const E* from = static_cast<const E*>(p.logits) + t * p.logits_row + e;
    if (n == L && p.mask == nullptr) return load<F>(from);
    Mask<F> kept;
    for (int l = 0; l < L; ++l) kept[l] = Int<F>(l);
    kept = kept < Int<F>(n);
    if (p.mask != nullptr) {
        uint8_t allowed[L] = {};
        __builtin_memcpy(allowed, p.mask + t * p.mask_row + e, size_t(n));
        kept &= __builtin_convertvector(*reinterpret_cast<const Bytes*>(allowed), Mask<F>) != 0;
    }
    E part[L] = {};
    if ((p.T - 1 - t) * p.logits_row + p.E - e < L) {  // a whole register would end past the tensor
        __builtin_memcpy(part, from, size_t(n) * sizeof(E));
        from = part;
    }
    return select<F>(kept, load<F>(from), splat<F>(-kInf<F>));
}

// 0 where no expert is allowed and where the greatest logit is inf (which leaves NaN and zeros), else 1 /
// sum.
template <typename F>
SLM_INLINE Vec<F> reciprocal(Vec<F> sum, Vec<F> top) {
    return select<F>((sum == F(0)) | (top == kInf<F>), Vec<F>{}, F(1) / sum);
}

template <typename F>
SLM_INLINE Vec<F> shift_of(Vec<F> top) {  // -inf - -inf must not become NaN
    return select<F>(top == -kInf<F>, Vec<F>{}, top);
}

template <typename F>
SLM_INLINE Vec<F> exp(Vec<F> x) {
    return exp2_nonpositive<F>(x * kLog2e<F>);
}

// The sigmoid s, exactly 0 of a forbidden expert, and 1 - s.
template <typename F>
SLM_INLINE void score_of(Vec<F> x, Vec<F>& s, Vec<F>& rest) {
    sigmoid<F>(x, s, rest);
    s = select<F>(x == -kInf<F>, Vec<F>{}, s);
}

// ---- forward

// The k greatest of `choice` [n][L] in each lane and their numbers, sorted, in slots 1 to k; slot 0 is
// none's. -inf is nobody's (its number is -1), NaN counts as inf.
template <typename F, int K>
void find_best(const F* choice, int64_t n, int64_t k, Vec<F>* values, Mask<F>* numbers) {
    Vec<F> held[K + 1];
    Mask<F> held_numbers[K + 1];
    Vec<F>* v = K > 0 ? held : values;
    Mask<F>* number = K > 0 ? held_numbers : numbers;
    const int slots = K > 0 ? K : int(k);
    for (int j = 0; j <= slots; ++j) v[j] = splat<F>(j > 0 ? -kInf<F> : kInf<F>), number[j] = Mask<F>{} - 1;
    for (int64_t i = 0; i < n; ++i) {
        const Vec<F> x = loadu<F>(choice + i * kLanes<F>), c = select<F>(x == x, x, splat<F>(kInf<F>));
        const Mask<F> e = Mask<F>{} + Int<F>(i);
#pragma GCC unroll 8
        for (int j = slots; j > 0; --j) {
            const Mask<F> here = c > v[j], above = c > v[j - 1];
            v[j] = here ? (above ? v[j - 1] : c) : v[j];
            number[j] = here ? (above ? number[j - 1] : e) : number[j];
        }
    }
    for (int j = 1; j <= K; ++j) values[j] = v[j], numbers[j] = number[j];
}

template <typename F>
using FindBest = void (*)(const F*, int64_t, int64_t, Vec<F>*, Mask<F>*);

template <typename F>
FindBest<F> find_best_of(int64_t k) {
    constexpr FindBest<F> table[] = {find_best<F, 0>, find_best<F, 1>, find_best<F, 2>,
                                     find_best<F, 3>, find_best<F, 4>, find_best<F, 5>,
                                     find_best<F, 6>, find_best<F, 7>, find_best<F, 8>};
    return table[k < int64_t(sizeof(table) / sizeof(*table)) ? k : 0];
}

template <typename F, typename E>
struct ForwardTask {
    static constexpr int L = kLanes<F>;

    const Choice& c;
    const Problem& p;
    const bool sigmoids, logits_choose;
    Arena arena;
    F *x, *s, *mean, *choice, *group;  // [E][L], `group` [groups][L]
    Vec<F>*best, *best_group, *weight;
    Mask<F>*number, *group_number;

    static size_t bytes(const Choice& c) {
        const int64_t rows = 4 * c.problem.E + 3 * c.problem.k + 3 * c.groups + 4;
        return size_t(rows) * SLM_BYTES + 1024;
    }

    explicit ForwardTask(const Choice& of)
        : c(of),
          p(c.problem),
          sigmoids(p.score == Score::sigmoid),
          logits_choose(c.bias == nullptr && c.groups == 1),
          arena(bytes(c)),
          x(arena.take<F>(p.E * L)),
          s(arena.take<F>(p.E * L)),
          mean(arena.take<F>(p.E * L)),
          choice(logits_choose ? x : arena.take<F>(p.E * L)),
          group(arena.take<F>(c.groups * L)),
          best(arena.take<Vec<F>>(p.k + 1)),
          best_group(arena.take<Vec<F>>(c.groups + 1)),
          weight(arena.take<Vec<F>>(p.k)),
          number(arena.take<Mask<F>>(p.k + 1)),
          group_number(arena.take<Mask<F>>(c.groups + 1)) {}

    void run(int64_t block) {
        const int64_t end = least(p.T, (block + 1) * kBlock);
        const FindBest<F> find = find_best_of<F>(p.k);
        int32_t* counts = c.counts + block * p.E;
        __builtin_memset(counts, 0, size_t(p.E) * sizeof(int32_t));
        __builtin_memset(mean, 0, size_t(p.E * L) * sizeof(F));
        Vec<F> z{}, entropy{};
        for (int64_t t = block * kBlock; t < end; t += L) {
            const int64_t rows = least(L, end - t);
            read(t, rows);
            const Scored scored = score();
            z += scored.lse * scored.lse, entropy += scored.entropy;
            if (!logits_choose) choose(scored.factor);
            find(choice, p.E, p.k, best, number);
            weigh(scored.factor);
            write(t, rows, scored.lse, counts);
        }
        F* sums = static_cast<F*>(c.sums) + block * (p.E + 2);
        for (int64_t e = 0; e < p.E; ++e) sums[e] = reduce_add<F>(loadu<F>(mean + e * L));
        sums[p.E] = reduce_add<F>(z), sums[p.E + 1] = reduce_add<F>(entropy);
    }

    // Tokens [t, t + rows) -> x. A lane without a token is a token without experts, and adds 0 to every sum.
    void read(int64_t t, int64_t rows) {
        for (int64_t e = 0; e < p.E; e += L) {
            const int64_t n = least(L, p.E - e);
            Vec<F> square[L];
            for (int l = 0; l < L; ++l)
                square[l] = l < rows ? load_logits<F, E>(p, t + l, e, n) : splat<F>(-kInf<F>);
            transpose<F>(square);
            for (int64_t i = 0; i < n; ++i) storeu<F>(x + (e + i) * L, square[i]);
        }
    }

    struct Scored {
        Vec<F> lse, entropy, factor;  // p = factor s
    };

    // s: sigmoids, or exp(x - top); adds p to `mean`.
    Scored score() {
        Vec<F> top = splat<F>(-kInf<F>), sum{}, total{}, spread{};
        for (int64_t e = 0; e < p.E; ++e) top = vmax<F>(loadu<F>(x + e * L), top);  // passes over NaN
        const Vec<F> shift = shift_of<F>(top);
        for (int64_t e = 0; e < p.E; ++e) {
            const Vec<F> v = loadu<F>(x + e * L), power = exp<F>(v - shift);
            sum += power;
            if (sigmoids) {
                Vec<F> y, rest;
                score_of<F>(v, y, rest);
                total += y;
                storeu<F>(s + e * L, y);
            } else {
                spread += select<F>(power == F(0), Vec<F>{}, power * (v - shift));
                storeu<F>(s + e * L, power);
            }
        }
        const Mask<F> none = sum == F(0);
        const Vec<F> log_sum = log<F>(sum);
        Scored of;
        of.lse = select<F>(none, Vec<F>{}, select<F>(top == kInf<F>, top, shift + log_sum));
        of.factor = sigmoids ? F(1) / (total + kEps<F>) : reciprocal<F>(sum, top);
        of.entropy = sigmoids ? Vec<F>{} : select<F>(none, Vec<F>{}, log_sum - spread * of.factor);
        for (int64_t e = 0; e < p.E; ++e) {
            const Vec<F> q = loadu<F>(s + e * L) * of.factor;
            storeu<F>(mean + e * L, loadu<F>(mean + e * L) + q);
            if (sigmoids) of.entropy -= select<F>(q == F(0), Vec<F>{}, q * log<F>(q));
        }
        return of;
    }

    // `choice`: scores and biases, or the logits where there is none; -inf outside the best groups.
    void choose(Vec<F> factor) {
        const F* bias = static_cast<const F*>(c.bias);
        for (int64_t e = 0; e < p.E; ++e) {
            const Vec<F> v = loadu<F>(x + e * L), y = loadu<F>(s + e * L);
            Vec<F> by = p.score == Score::softmax ? y * factor : sigmoids ? y : v;
            if (bias != nullptr) by += bias[e];
            by = select<F>(by == by, by, splat<F>(kInf<F>));
            storeu<F>(choice + e * L, select<F>(v == -kInf<F>, v, by));
        }
        if (c.groups == 1) return;
        const int64_t size = p.E / c.groups;
        for (int64_t g = 0; g < c.groups; ++g) {
            Vec<F> first = splat<F>(-kInf<F>), second = first;
            for (int64_t e = g * size; e < (g + 1) * size; ++e) {
                const Vec<F> v = loadu<F>(choice + e * L);
                second = vmax<F>(second, first < v ? first : v);
                first = vmax<F>(first, v);
            }
            storeu<F>(group + g * L, first + shift_of<F>(second));
        }
        find_best<F, 0>(group, c.groups, c.top_groups, best_group, group_number);
        const Vec<F> least_value = best_group[c.top_groups];
        const Mask<F> last = group_number[c.top_groups];
        const F* from = bias == nullptr ? x : choice;
        for (int64_t g = 0; g < c.groups; ++g) {
            const Vec<F> value = loadu<F>(group + g * L);
            const Mask<F> kept = (value > least_value) | ((value == least_value) & (last >= Int<F>(g)));
            for (int64_t e = g * size; e < (g + 1) * size; ++e)
                storeu<F>(choice + e * L, select<F>(kept, loadu<F>(from + e * L), splat<F>(-kInf<F>)));
        }
    }

    void weigh(Vec<F> factor) {
        const bool among = p.among_chosen();
        const F *from = among ? x : s, absent = among ? -kInf<F> : F(0);
        Vec<F> top = splat<F>(-kInf<F>), sum{};
        for (int64_t j = 0; j < p.k; ++j) {
            Vec<F> v;
            for (int l = 0; l < L; ++l) {
                const Int<F> e = number[j + 1][l];
                v[l] = e < 0 ? absent : from[e * L + l];
            }
            weight[j] = v, top = vmax<F>(v, top), sum += v;
        }
        if (among) {
            sum = Vec<F>{};
            for (int64_t j = 0; j < p.k; ++j)
                weight[j] = exp<F>(weight[j] - shift_of<F>(top)), sum += weight[j];
            factor = reciprocal<F>(sum, top);
        } else if (sigmoids) {
            factor = p.renormalize ? F(1) / (sum + kEps<F>) : splat<F>(F(1));
        }
        for (int64_t j = 0; j < p.k; ++j)  // absent: 0 beside NaN too
            weight[j] = select<F>(number[j + 1] < 0, Vec<F>{}, weight[j] * factor * F(p.scale));
    }

    void write(int64_t t, int64_t rows, Vec<F> lse, int32_t* counts) {
        int32_t* indices = c.indices + t * p.k;
        F* weights = static_cast<F*>(c.weights) + t * p.k;
        for (int64_t l = 0; l < rows; ++l) {
            static_cast<F*>(c.lse)[t + l] = lse[l];
            for (int64_t j = 0; j < p.k; ++j) {
                const int32_t e = int32_t(number[j + 1][l]);
                indices[l * p.k + j] = e, weights[l * p.k + j] = weight[j][l];
                if (e >= 0) ++counts[e];
            }
        }
    }
};

template <typename F, typename E>
void forward_blocks(const Choice& c, int64_t begin, int64_t end) {
    ForwardTask<F, E> task(c);
    for (int64_t block = begin; block < end; ++block) task.run(block);
}

// ---- backward

template <typename F, typename E>
struct BackwardTask {
    static constexpr int L = kLanes<F>;

    const Gradient& g;
    const Problem& p;
    const bool sigmoids, dense;  // dense: every expert of a token has a gradient
    const int64_t width;
    Arena arena;
    F *x, *s, *rest, *dx;  // of a token: logits, scores (softmax: p), 1 - sigmoid, gradients [E]
    F *chosen, *dweights;  // of a tile of tokens: logits, then weights, and scale d(weights) [k][L]
    Vec<F>* dchosen;  // d(chosen logits) [k]
    Int<F>* number;  // [k][L]

    static size_t bytes(const Problem& p) {
        return size_t(4 * round_up(p.E, L)) * sizeof(F) + size_t(4 * p.k) * SLM_BYTES + 1024;
    }

    explicit BackwardTask(const Gradient& of)
        : g(of),
          p(g.problem),
          sigmoids(p.score == Score::sigmoid),
          dense(g.dense || (g.dweights != nullptr && !sigmoids && !p.among_chosen())),
          width(round_up(p.E, L)),
          arena(bytes(p)),
          x(arena.take<F>(width)),
          s(arena.take<F>(width)),
          rest(arena.take<F>(width)),
          dx(arena.take<F>(width)),
          chosen(arena.take<F>(p.k * L)),
          dweights(arena.take<F>(p.k * L)),
          dchosen(arena.take<Vec<F>>(p.k)),
          number(arena.take<Int<F>>(p.k * L)) {}

    void run(int64_t block) {
        const int64_t end = least(p.T, (block + 1) * kBlock), k = g.dweights == nullptr ? 0 : p.k;
        const F* lse = static_cast<const F*>(g.lse);
        for (int64_t t = block * kBlock; t < end; t += L) {
            const int64_t rows = least(L, end - t);
            Vec<F> lses{}, through{};
            for (int64_t l = 0; l < rows; ++l) lses[l] = lse[t + l];
            if (k > 0) gather(t, rows), through = among(lses);
            for (int64_t l = 0; l < rows; ++l) {
                if (dense)
                    means(t + l, lse[t + l], through[l]);
                else
                    __builtin_memset(dx, 0, size_t(width) * sizeof(F));
                for (int64_t j = 0; j < k; ++j)
                    if (number[j * L + l] >= 0) dx[number[j * L + l]] += dchosen[j][l];
                narrow_row<F>(dx, static_cast<E*>(g.dlogits) + (t + l) * p.E, p.E);
            }
        }
    }

    // The experts of tokens [t, t + rows), their logits and d(weights); an absent one is -1, -inf and 0.
    void gather(int64_t t, int64_t rows) {
        for (int64_t j = 0; j < p.k; ++j)
            for (int64_t l = 0; l < L; ++l) {
                const int64_t e = l < rows ? g.indices[(t + l) * p.k + j] : -1, at = j * L + l;
                const bool present = e >= 0 && e < p.E;
                const E* logits = static_cast<const E*>(p.logits) + (t + l) * p.logits_row;
                const F* from =
                    static_cast<const F*>(g.dweights) + (t + l) * g.dweights_row + j * g.dweights_column;
                number[at] = present ? Int<F>(e) : Int<F>(-1);
                chosen[at] = present ? widen<F>(logits[e]) : -kInf<F>;
                dweights[at] = present ? F(p.scale) * *from : F(0);
            }
    }

    // d(logits) of the chosen by way of the weights -> dchosen. Returns sum_f G_f p_f, which a softmax over
    // all experts takes from every one.
    Vec<F> among(Vec<F> lse) {
        const bool relative = p.among_chosen(), divided = relative || (sigmoids && p.renormalize);
        Vec<F> shift = splat<F>(-kInf<F>), sum{}, product{};
        for (int64_t j = 0; j < p.k; ++j) shift = vmax<F>(loadu<F>(chosen + j * L), shift);
        shift = relative ? shift_of<F>(shift) : lse;
        for (int64_t j = 0; j < p.k; ++j) {
            const Vec<F> v = loadu<F>(chosen + j * L);
            Vec<F> w, slope = splat<F>(F(1));
            if (sigmoids)
                score_of<F>(v, w, slope);
            else
                w = exp<F>(v - shift);
            sum += w, product += w * loadu<F>(dweights + j * L);
            storeu<F>(chosen + j * L, w), dchosen[j] = slope;
        }
        Vec<F> factor = splat<F>(F(1));
        if (divided) factor = F(1) / (sum + (sigmoids ? kEps<F> : F(0)));
        product *= factor;
        for (int64_t j = 0; j < p.k; ++j) {
            const Vec<F> dw = loadu<F>(dweights + j * L), w = loadu<F>(chosen + j * L) * factor;
            dchosen[j] *= w * (divided ? dw - product : dw);
        }
        return sigmoids || relative ? Vec<F>{} : product;
    }

    // d(logits) of all experts by way of the means and, `through`, of a softmax over all -> dx.
    void means(int64_t t, F lse, F through) {
        Vec<F> total{}, product{};
        for (int64_t e = 0; e < p.E; e += L) {
            const Vec<F> v = load_logits<F, E>(p, t, e, least(L, p.E - e));
            Vec<F> y, slope;
            if (sigmoids)
                score_of<F>(v, y, slope), storeu<F>(rest + e, slope);
            else
                y = exp<F>(v - lse);
            total += y, product += y * loadu<F>(static_cast<const F*>(g.dmean) + e);
            storeu<F>(x + e, v), storeu<F>(s + e, y);
        }
        const F factor = sigmoids ? F(1) / (reduce_add<F>(total) + kEps<F>) : F(1);
        const F mean = reduce_add<F>(product) * factor, dlse = F(g.dz) * lse;
        for (int64_t e = 0; e < p.E; e += L) {
            const Vec<F> v = loadu<F>(x + e), y = loadu<F>(s + e) * factor,
                         d = loadu<F>(static_cast<const F*>(g.dmean) + e) - mean;
            Vec<F> dv;
            if (sigmoids)
                dv = y * d * loadu<F>(rest + e) + exp<F>(v - lse) * dlse;
            else
                dv = y * (d + (dlse - through));
            storeu<F>(dx + e, select<F>(v == -kInf<F>, Vec<F>{}, dv));  // forbidden: 0 beside NaN too
        }
    }
};

template <typename F, typename E>
void backward_blocks(const Gradient& g, int64_t begin, int64_t end) {
    BackwardTask<F, E> task(g);
    for (int64_t block = begin; block < end; ++block) task.run(block);
}

// ---- by dtype

void forward(const Choice& c, int64_t begin, int64_t end) {
    SLM_DISPATCH_STORAGE(forward_blocks, c.problem.dtype, c, begin, end);
}

void backward(const Gradient& g, int64_t begin, int64_t end) {
    SLM_DISPATCH_STORAGE(backward_blocks, g.problem.dtype, g, begin, end);
}

}  // namespace

#define SLM_JOIN(a, b) a##b
#define SLM_NAME(a, b) SLM_JOIN(a, b)
const Kernels SLM_NAME(kernels_, SLM_TIER) = {forward, backward};

}  // namespace slm::route
