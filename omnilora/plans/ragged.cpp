// Low-rank updates of many adapters in one batch: y += s B (A x), every run of rows with its own A (r, in), B (out, r), s and rank.
// fp32, or bf16 with fp32 arithmetic. Rows that no run covers are neither read nor written. Sizes are 64-bit.
//
// The threads share the rows by cost (the sum of the ranks that meet a row), so that no barrier is needed, an adapter of a high
// rank is no straggler, and each matrix is read once where its rows lie in one part.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bf16.h"

namespace {

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif

constexpr int64_t L = LANES;
constexpr int64_t BLOCK = 32;          // rows that share one pass over a pair of matrices
constexpr int64_t GRAIN = 1 << 16;     // multiplications that pay for a thread
typedef float wide __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef uint16_t half_bits __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint16_t half_bits8 __attribute__((vector_size(16), aligned(2)));
typedef uint32_t word_bits __attribute__((vector_size(4 * LANES)));
typedef uint32_t word_bits8 __attribute__((vector_size(32)));
typedef int32_t lanes8 __attribute__((vector_size(32)));

inline wide load(const float* p) { return *reinterpret_cast<const wide*>(p); }
inline wide load(const bf16* p) {
    word_bits w = __builtin_convertvector(*reinterpret_cast<const half_bits*>(p), word_bits) << 16;
    return (wide)w;
}
inline vec load8(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline vec load8(const bf16* p) {
    word_bits8 w = __builtin_convertvector(*reinterpret_cast<const half_bits8*>(p), word_bits8) << 16;
    return (vec)w;
}

inline float total(wide v) {
    float sum = 0.f;
    for (int64_t i = 0; i < L; ++i) sum += v[i];
    return sum;
}

// h[m][j] = s · ⟨x_m, A_j⟩ for M rows and N ranks; x in fp32.
template <int M, int N, class T>
inline void dots(const float* const* x, int64_t in, const T* a, float* h, int64_t width, float s) {
    wide acc[M][N] = {};
    int64_t i = 0;
    for (; i + L <= in; i += L) {
        wide xs[M];
        for (int m = 0; m < M; ++m) xs[m] = load(x[m] + i);
        for (int n = 0; n < N; ++n) {
            wide as = load(a + n * in + i);
            for (int m = 0; m < M; ++m) acc[m][n] += xs[m] * as;
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            float sum = total(acc[m][n]);
            for (int64_t k = i; k < in; ++k) sum += x[m][k] * value(a[n * in + k]);
            h[m * width + n] = s * sum;
        }
}

template <int M, int N, class T>
inline void shrink_rows(const float* const* x, int64_t rows, int64_t in, const T* a, int64_t r, float* h, int64_t width, float s) {
    // N ranks stay in the nearest cache while all rows pass
    int64_t j = 0;
    for (; j + N <= r; j += N)
        for (int64_t m = 0; m < rows; m += M) dots<M, N>(x + m, in, a + j * in, h + m * width + j, width, s);
    for (; j < r; ++j)
        for (int64_t m = 0; m < rows; m += M) dots<M, 1>(x + m, in, a + j * in, h + m * width + j, width, s);
}

template <class T>
void shrink(const float* const* x, int64_t rows, int64_t in, const T* a, int64_t r, float* h, int64_t width, float s) {
    int64_t fours = rows / 4 * 4;
    if (fours) shrink_rows<4, 2>(x, fours, in, a, r, h, width, s);
    x += fours, h += fours * width, rows -= fours;
    if (rows >= 2) {
        shrink_rows<2, 4>(x, 2, in, a, r, h, width, s);
        x += 2, h += 2 * width, rows -= 2;
    }
    if (rows) shrink_rows<1, 8>(x, 1, in, a, r, h, width, s);
}

inline vec pick(vec a, vec b, lanes8 at) { return __builtin_shuffle(a, b, at); }

// The sums of eight vectors, as one.
inline vec sums(const vec* v) {
    const lanes8 even = {0, 8, 2, 10, 4, 12, 6, 14}, odd = {1, 9, 3, 11, 5, 13, 7, 15};
    const lanes8 low = {0, 1, 8, 9, 4, 5, 12, 13}, high = {2, 3, 10, 11, 6, 7, 14, 15};
    const lanes8 first = {0, 1, 2, 3, 8, 9, 10, 11}, second = {4, 5, 6, 7, 12, 13, 14, 15};
    vec pairs[4];
    for (int i = 0; i < 4; ++i) pairs[i] = pick(v[2 * i], v[2 * i + 1], even) + pick(v[2 * i], v[2 * i + 1], odd);
    vec a = pick(pairs[0], pairs[1], low) + pick(pairs[0], pairs[1], high);
    vec b = pick(pairs[2], pairs[3], low) + pick(pairs[2], pairs[3], high);
    return pick(a, b, first) + pick(a, b, second);
}

inline void turn(vec* v) {  // 8 × 8 in registers
    const lanes8 lo = {0, 8, 1, 9, 4, 12, 5, 13}, hi = {2, 10, 3, 11, 6, 14, 7, 15};
    const lanes8 lo2 = {0, 1, 8, 9, 4, 5, 12, 13}, hi2 = {2, 3, 10, 11, 6, 7, 14, 15};
    const lanes8 first = {0, 1, 2, 3, 8, 9, 10, 11}, second = {4, 5, 6, 7, 12, 13, 14, 15};
    vec a[8], b[8];
    for (int i = 0; i < 4; ++i) a[2 * i] = pick(v[2 * i], v[2 * i + 1], lo), a[2 * i + 1] = pick(v[2 * i], v[2 * i + 1], hi);
    for (int i = 0; i < 2; ++i) {
        b[4 * i] = pick(a[4 * i], a[4 * i + 2], lo2), b[4 * i + 1] = pick(a[4 * i], a[4 * i + 2], hi2);
        b[4 * i + 2] = pick(a[4 * i + 1], a[4 * i + 3], lo2), b[4 * i + 3] = pick(a[4 * i + 1], a[4 * i + 3], hi2);
    }
    for (int i = 0; i < 4; ++i) v[i] = pick(b[i], b[i + 4], first), v[i + 4] = pick(b[i], b[i + 4], second);
}

// Ranks [j, j + 8) of one row of B, zeros beyond r.
template <class T>
inline vec ranks(const T* b, int64_t j, int64_t r) {
    if (j + 8 <= r) return load8(b + j);
    vec out = {};
    for (int64_t i = j; i < r; ++i) out[i - j] = value(b[i]);
    return out;
}

// Sums of 8 rows of B ⊙ h, where a row is 4 long: two rows fill a vector.
template <class T>
inline vec fours(const T* b, vec hs) {
    const lanes8 even = {0, 8, 2, 10, 4, 12, 6, 14}, odd = {1, 9, 3, 11, 5, 13, 7, 15};
    const lanes8 low = {0, 1, 8, 9, 4, 5, 12, 13}, high = {2, 3, 10, 11, 6, 7, 14, 15}, back = {0, 4, 1, 5, 2, 6, 3, 7};
    vec v[4];
    for (int i = 0; i < 4; ++i) v[i] = load8(b + 8 * i) * hs;
    vec a = pick(v[0], v[1], even) + pick(v[0], v[1], odd), c = pick(v[2], v[3], even) + pick(v[2], v[3], odd);
    vec sum = pick(a, c, low) + pick(a, c, high);
    return __builtin_shuffle(sum, back);
}

inline void add8(bf16* y, vec v) {
    word_bits8 w = (word_bits8)(load8(y) + v);
    word_bits8 rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
    word_bits8 odd = (word_bits8)((w & 0x7fffffffu) > 0x7f800000u);  // NaN
    *reinterpret_cast<half_bits8*>(y) = __builtin_convertvector((odd & 0x7fc0u) | (~odd & rounded), half_bits8);
}
inline void add8(float* y, vec v) { *reinterpret_cast<vec*>(y) += v; }

// Few rows: y_m[o…o+8) += the sums of B's rows ⊙ h_m.
template <class T>
void expand_few(T* const* y, int64_t rows, int64_t out, const T* b, int64_t r, const float* h, int64_t width) {
    int64_t o = 0;
    if (r == 4)
        for (int64_t m = 0; m < rows; ++m) {
            const float* hm = h + m * width;
            vec hs = {hm[0], hm[1], hm[2], hm[3], hm[0], hm[1], hm[2], hm[3]};
            for (o = 0; o + 8 <= out; o += 8) add8(y[m] + o, fours(b + o * r, hs));
        }
    for (; o + 8 <= out; o += 8)
        for (int64_t m = 0; m < rows; ++m) {
            vec acc[8] = {};
            for (int64_t j = 0; j < r; j += 8) {
                vec hs = load8(h + m * width + j);
                for (int i = 0; i < 8; ++i) acc[i] += ranks(b + (o + i) * r, j, r) * hs;
            }
            add8(y[m] + o, sums(acc));
        }
    for (; o < out; ++o)
        for (int64_t m = 0; m < rows; ++m) {
            float sum = 0.f;
            for (int64_t j = 0; j < r; ++j) sum += h[m * width + j] * value(b[o * r + j]);
            store(y[m][o], value(y[m][o]) + sum);
        }
}

template <int M, class T>
inline void axpy16(T* const* y, int64_t o, const float* turned, int64_t r, const float* h, int64_t width) {
    constexpr int V = 16 / L;
    wide acc[M][V] = {};
    for (int64_t j = 0; j < r; ++j) {
        wide bs[V];
        for (int v = 0; v < V; ++v) bs[v] = load(turned + j * 16 + v * L);
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) acc[m][v] += bs[v] * h[m * width + j];
    }
    for (int m = 0; m < M; ++m) {
        add8(y[m] + o, reinterpret_cast<const vec*>(acc[m])[0]);
        add8(y[m] + o + 8, reinterpret_cast<const vec*>(acc[m])[1]);
    }
}

// Many rows: 16 rows of B are turned once and serve them all.
template <class T>
void expand_many(T* const* y, int64_t rows, int64_t out, const T* b, int64_t r, const float* h, int64_t width, float* turned) {
    int64_t o = 0;
    for (; o + 16 <= out; o += 16) {
        for (int64_t j = 0; j < r; j += 8)
            for (int part = 0; part < 2; ++part) {
                vec square[8];
                for (int i = 0; i < 8; ++i) square[i] = ranks(b + (o + part * 8 + i) * r, j, r);
                turn(square);
                for (int i = 0; i < 8; ++i) *reinterpret_cast<vec*>(turned + (j + i) * 16 + part * 8) = square[i];
            }
        int64_t m = 0;
        for (; m + 4 <= rows; m += 4) axpy16<4>(y + m, o, turned, r, h + m * width, width);
        for (; m < rows; ++m) axpy16<1>(y + m, o, turned, r, h + m * width, width);
    }
    if (o < out) {
        std::vector<T*> rest(rows);
        for (int64_t m = 0; m < rows; ++m) rest[m] = y[m] + o;
        expand_few(rest.data(), rows, out - o, b + o * r, r, h, width);
    }
}

struct Scratch {
    std::vector<float> x, h, turned;
};

inline const float* widened(const float* x, int64_t, float*) { return x; }
inline const float* widened(const bf16* x, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = value(x[i]);
    return to;
}

template <class T>
void run(const T* x, T* y, int64_t in, int64_t out, const int64_t* tokens, int64_t rows, const T* a, const T* b, int64_t r, float s,
         Scratch& scratch) {
    int64_t width = (r + 7) / 8 * 8;
    scratch.x.resize(BLOCK * in);
    scratch.h.assign(BLOCK * width, 0.f);
    scratch.turned.resize(width * 16);
    const float* xs[BLOCK];
    T* ys[BLOCK];
    for (int64_t at = 0; at < rows; at += BLOCK) {
        int64_t n = std::min(BLOCK, rows - at);
        for (int64_t m = 0; m < n; ++m) {
            xs[m] = widened(x + tokens[at + m] * in, in, scratch.x.data() + m * in);
            ys[m] = y + tokens[at + m] * out;
        }
        shrink(xs, n, in, a, r, scratch.h.data(), width, s);
        if (n < 4)
            expand_few(ys, n, out, b, r, scratch.h.data(), width);
        else
            expand_many(ys, n, out, b, r, scratch.h.data(), width, scratch.turned.data());
    }
}

// What to add. order (positions): the row at each position, or null. A row is `per` tokens. spans (k, 2): first and last position
// of each run; terms (k, 3): addresses of A and B, rank (0: nothing to do); scales (k).
struct Job {
    int64_t in, out, positions, per;
    const int64_t* order;
    int64_t k;
    const int64_t *spans, *terms;
    const float* scales;
};

template <class T>
void ragged(const T* x, T* y, const Job& job) {
    const int64_t in = job.in, out = job.out, positions = job.positions, per = job.per, k = job.k;
    const int64_t *order = job.order, *spans = job.spans, *terms = job.terms;
    static thread_local std::vector<int64_t> cost;
    cost.assign(positions + 1, 0);
    for (int64_t i = 0; i < k; ++i)
        for (int64_t p = spans[2 * i]; p < spans[2 * i + 1]; ++p) cost[p + 1] += terms[3 * i + 2];
    for (int64_t p = 0; p < positions; ++p) cost[p + 1] += cost[p];
    int64_t all = cost[positions];
    if (all == 0) return;
    int64_t wanted = all * per * (in + out) / GRAIN + 1;
    int threads = int(std::min<int64_t>({wanted, omp_get_max_threads(), positions * per}));
    const int64_t* costs = cost.data();
    auto part = [=, &job](int t, int n) {
        // tokens [begin, end) of this thread, by cost
        auto cut = [=](int64_t share) {
            int64_t p = std::upper_bound(costs, costs + positions + 1, share) - costs - 1;
            if (p >= positions) return positions * per;
            int64_t here = costs[p + 1] - costs[p];
            return p * per + (share - costs[p]) * per / std::max<int64_t>(here, 1);
        };
        int64_t begin = t == 0 ? 0 : cut(all * t / n), end = t == n - 1 ? positions * per : cut(all * (t + 1) / n);
        static thread_local Scratch scratch;
        static thread_local std::vector<int64_t> tokens;
        for (int64_t i = 0; i < k; ++i) {
            int64_t r = terms[3 * i + 2];
            int64_t from = std::max(begin, spans[2 * i] * per), to = std::min(end, spans[2 * i + 1] * per);
            if (r == 0 || from >= to) continue;
            tokens.resize(to - from);
            for (int64_t q = from; q < to; ++q) tokens[q - from] = order ? order[q / per] * per + q % per : q;
            run(x, y, in, out, tokens.data(), to - from, reinterpret_cast<const T*>(terms[3 * i]),
                reinterpret_cast<const T*>(terms[3 * i + 1]), r, job.scales[i], scratch);
        }
    };
    if (threads <= 1) {
        part(0, 1);
    } else {
#pragma omp parallel num_threads(threads)
        part(omp_get_thread_num(), omp_get_num_threads());
    }
}

}  // namespace

extern "C" {
void ragged_f32(const float* x, float* y, const Job* job) { ragged(x, y, *job); }
void ragged_bf16(const void* x, void* y, const Job* job) { ragged(static_cast<const bf16*>(x), static_cast<bf16*>(y), *job); }
}
