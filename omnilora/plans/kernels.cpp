// Elementwise parts of fused passes: RMS norm, gated activation, rotation, dropout, magnitudes, the slope of cross-entropy, weights
// of four bits. One pass over memory each.
// Plain C functions over contiguous arrays, in fp32 and bf16 (sums and arithmetic in fp32). Sizes are 64-bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

#include "bf16.h"

namespace {

constexpr int64_t GRAIN = 32768;  // numbers below which a second thread costs more than it brings

template <class T>
inline float rounded(float x) {
    T held;
    store(held, x);
    return value(held);
}

// y = w ⊙ x / √(mean x² + eps); `between`: x / √… is rounded before w meets it; `shift` is added to w.
template <class T>
void rms_forward(const T* x, const T* w, T* y, float* rstd, int64_t rows, int64_t d, float eps, float shift, int64_t between) {
#pragma omp parallel for schedule(static) if (rows * d > GRAIN)
    for (int64_t t = 0; t < rows; ++t) {
        const T* xt = x + t * d;
        T* yt = y + t * d;
        float sum = 0.f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; ++i) sum += value(xt[i]) * value(xt[i]);
        float r = 1.f / std::sqrt(sum / float(d) + eps);
        rstd[t] = r;
        if (between) {
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) store(yt[i], (value(w[i]) + shift) * rounded<T>(value(xt[i]) * r));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) store(yt[i], (value(w[i]) + shift) * (value(xt[i]) * r));
        }
    }
}

// dx = rstd (v − x̂ mean(v ⊙ x̂)) + add,  v = w ⊙ dy,  x̂ = x rstd
template <class T>
void rms_backward(const T* dy, const T* x, const T* w, const float* rstd, const T* add, T* dx, int64_t rows, int64_t d, float shift) {
#pragma omp parallel for schedule(static) if (rows * d > GRAIN)
    for (int64_t t = 0; t < rows; ++t) {
        const T *g = dy + t * d, *xt = x + t * d;
        T* out = dx + t * d;
        float r = rstd[t], dot = 0.f;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < d; ++i) dot += value(g[i]) * (value(w[i]) + shift) * value(xt[i]);
        float k = dot * r * r / float(d);
        if (add) {
            const T* a = add + t * d;
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) store(out[i], r * (value(g[i]) * (value(w[i]) + shift) - value(xt[i]) * k) + value(a[i]));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) store(out[i], r * (value(g[i]) * (value(w[i]) + shift) - value(xt[i]) * k));
        }
    }
}

// eˣ = 2ⁿ e^f, |f| ≤ ln 2 / 2, by a polynomial: vectorized everywhere, within 2 units of the last place
inline float exponential(float x) {
    x = x < -87.f ? -87.f : (x > 88.f ? 88.f : x);
    float n = std::nearbyint(x * 1.44269504f);
    float f = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = std::fma(p, f, 1.3981999507e-3f);
    p = std::fma(p, f, 8.3334519073e-3f);
    p = std::fma(p, f, 4.1665795894e-2f);
    p = std::fma(p, f, 1.6666665459e-1f);
    p = std::fma(p, f, 5.0000001201e-1f);
    p = std::fma(p, f * f, f + 1.f);
    uint32_t power = uint32_t(int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

inline float sigmoid(float x) { return 1.f / (1.f + exponential(-x)); }

constexpr int64_t CHUNK = 2048;

// p = silu(g) ⊙ u
template <class T>
void swiglu_forward(const T* g, const T* u, T* p, int64_t n) {
#pragma omp parallel for schedule(static) if (n > GRAIN)
    for (int64_t c = 0; c < n; c += CHUNK) {
        int64_t end = c + CHUNK < n ? c + CHUNK : n;
#pragma omp simd
        for (int64_t i = c; i < end; ++i) {
            float a = value(g[i]);
            store(p[i], rounded<T>(a * sigmoid(a)) * value(u[i]));
        }
    }
}

// dg, du and p again, from dp
template <class T>
void swiglu_backward(const T* dp, const T* g, const T* u, T* dg, T* du, T* p, int64_t n) {
#pragma omp parallel for schedule(static) if (n > GRAIN)
    for (int64_t c = 0; c < n; c += CHUNK) {
        int64_t end = c + CHUNK < n ? c + CHUNK : n;
#pragma omp simd
        for (int64_t i = c; i < end; ++i) {
            float a = value(g[i]), b = value(u[i]), go = value(dp[i]), s = sigmoid(a), silu = a * s;
            store(dg[i], go * b * (s * (1.f + a * (1.f - s))));
            store(du[i], go * silu);
            store(p[i], rounded<T>(silu) * b);
        }
    }
}

// x (batch, length, heads, d) of any strides → y contiguous: (x₁, x₂) → (x₁ cos₁ − x₂ sin₁, x₂ cos₂ + x₁ sin₂); `back`: the
// transposed map. x may be y. The tables (batch or 1, length, d) step by `table` from one batch to the next.
template <class T>
void rope(const T* x, T* y, const T* cosine, const T* sine, int64_t batch, int64_t length, int64_t heads, int64_t d, int64_t sb,
          int64_t sl, int64_t sh, int64_t table, int64_t back) {
    int64_t half = d / 2;
#pragma omp parallel for schedule(static) if (batch * length * heads * d > GRAIN)
    for (int64_t t = 0; t < batch * length; ++t) {
        int64_t n = t / length, l = t % length;
        const T *c = cosine + n * table + l * d, *s = sine + n * table + l * d;
        for (int64_t h = 0; h < heads; ++h) {
            const T* from = x + n * sb + l * sl + h * sh;
            T* to = y + (t * heads + h) * d;
            if (back) {
#pragma omp simd
                for (int64_t i = 0; i < half; ++i) {
                    float a = value(from[i]), b = value(from[half + i]);
                    store(to[i], a * value(c[i]) + b * value(s[half + i]));
                    store(to[half + i], b * value(c[half + i]) - a * value(s[i]));
                }
            } else {
#pragma omp simd
                for (int64_t i = 0; i < half; ++i) {
                    float a = value(from[i]), b = value(from[half + i]);
                    store(to[i], a * value(c[i]) - b * value(s[i]));
                    store(to[half + i], b * value(c[half + i]) + a * value(s[half + i]));
                }
            }
        }
    }
}

// 32 bits for position i: multiply, xor and shift, three rounds, two words of seed
inline uint32_t mixed(uint32_t i, uint32_t s0, uint32_t s1) {
    uint32_t h = i * 0x9e3779b1u ^ s0;
    h ^= h >> 16;
    h *= 0x7feb352du;
    h ^= h >> 15;
    h = (h + s1) * 0x846ca68bu;
    h ^= h >> 16;
    h *= 0xc2b2ae35u;
    return h ^ (h >> 15);
}

// y = x · scale where the hash is at least `limit`, 0 elsewhere
template <class T>
void drop(const T* x, T* y, int64_t n, int64_t s0, int64_t s1, int64_t limit, float scale) {
    uint32_t a = uint32_t(s0), b = uint32_t(s1), low = uint32_t(limit);
#pragma omp parallel for schedule(static) if (n > GRAIN)
    for (int64_t c = 0; c < n; c += CHUNK) {
        int64_t end = c + CHUNK < n ? c + CHUNK : n;
#pragma omp simd
        for (int64_t i = c; i < end; ++i) store(y[i], mixed(uint32_t(i), a, b) >= low ? value(x[i]) * scale : 0.f);
    }
}

// to += the same of v
template <class T>
void drop_add(const T* v, T* to, int64_t n, int64_t s0, int64_t s1, int64_t limit, float scale) {
    uint32_t a = uint32_t(s0), b = uint32_t(s1), low = uint32_t(limit);
#pragma omp parallel for schedule(static) if (n > GRAIN)
    for (int64_t c = 0; c < n; c += CHUNK) {
        int64_t end = c + CHUNK < n ? c + CHUNK : n;
#pragma omp simd
        for (int64_t i = c; i < end; ++i)
            store(to[i], value(to[i]) + (mixed(uint32_t(i), a, b) >= low ? value(v[i]) * scale : 0.f));
    }
}

// a factor kept from 0, so that y / c tells z
inline float away(float c) { return std::fabs(c) < 1e-20f ? 1e-20f : c; }

// y (rows, d) = c ⊙ z; the two may be one array
template <class T>
void scale_columns(const T* z, const float* c, T* y, int64_t rows, int64_t d) {
#pragma omp parallel for schedule(static) if (rows * d > GRAIN)
    for (int64_t t = 0; t < rows; ++t) {
        const T* zt = z + t * d;
        T* yt = y + t * d;
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) store(yt[i], away(c[i]) * value(zt[i]));
    }
}

// gz = c ⊙ g;  sum[i] = Σ_t g ⊙ y, over c where `divided`
template <class T>
void scale_backward(const T* g, const T* y, const float* c, T* gz, float* sum, int64_t rows, int64_t d, int64_t divided) {
    std::fill(sum, sum + d, 0.f);
#pragma omp parallel if (rows * d > GRAIN)
    {
        std::vector<float> part(d, 0.f);
        float* held = part.data();
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; ++t) {
            const T *gt = g + t * d, *yt = y + t * d;
            T* out = gz + t * d;
#pragma omp simd
            for (int64_t i = 0; i < d; ++i) {
                float go = value(gt[i]);
                held[i] += go * value(yt[i]);
                store(out[i], go * away(c[i]));
            }
        }
#pragma omp critical
        for (int64_t i = 0; i < d; ++i) sum[i] += held[i];
    }
    if (divided)
        for (int64_t i = 0; i < d; ++i) sum[i] /= away(c[i]);
}

// n[i] = w[i] + ⟨2 u_i + b_i G, b_i⟩: squared norms of the rows of W + B A, with w = ‖W‖², u = W Aᵀ (rows, r), G = A Aᵀ
template <class T>
void low_rank_squares(const T* w, const T* u, const T* b, const T* gram, T* n, int64_t rows, int64_t r) {
#pragma omp parallel for schedule(static) if (rows * r * r > GRAIN)
    for (int64_t i = 0; i < rows; ++i) {
        const T *ui = u + i * r, *bi = b + i * r;
        T sum = 0;
        for (int64_t k = 0; k < r; ++k) {
            T inner = 0;
#pragma omp simd reduction(+ : inner)
            for (int64_t j = 0; j < r; ++j) inner += gram[k * r + j] * bi[j];
            sum += (2 * ui[k] + inner) * bi[k];
        }
        n[i] = w[i] + sum;
    }
}

// z (rows, n) logits before their factor s: loss = log Σ e^{sz} − s z_y; `slope`: z becomes softmax(sz) − e_y
template <class T>
void cross_entropy(T* z, const int64_t* y, float* loss, int64_t rows, int64_t n, float s, int64_t slope) {
#pragma omp parallel if (rows * n > GRAIN)
    {
        std::vector<float> row(n);
        float* e = row.data();
#pragma omp for schedule(static)
        for (int64_t t = 0; t < rows; ++t) {
            T* zt = z + t * n;
            float top = -INFINITY, mass = 0.f;
#pragma omp simd reduction(max : top)
            for (int64_t i = 0; i < n; ++i) {
                e[i] = s * value(zt[i]);
                top = e[i] > top ? e[i] : top;
            }
            float own = e[y[t]] - top;
#pragma omp simd reduction(+ : mass)
            for (int64_t i = 0; i < n; ++i) {
                e[i] = exponential(e[i] - top);
                mass += e[i];
            }
            loss[t] = std::log(mass) - own;
            if (!slope) continue;
            float share = 1.f / mass;
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) store(zt[i], e[i] * share);
            store(zt[y[t]], e[y[t]] * share - 1.f);
        }
    }
}

// Sixteen at a time: how many of `count` numbers were looked up in t by nibbles of c, the first of each byte the higher one.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
inline __m128i nibbles(const uint8_t* c) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(c)), low = _mm_set1_epi8(15);
    return _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(v, 4), low), _mm_and_si128(v, low));
}
inline int64_t look_up(const uint8_t* c, const float* t, float* to, int64_t count) {
    const __m512 table = _mm512_loadu_ps(t);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(nibbles(c + i / 2)), table));
    return i;
}
inline int64_t look_up(const uint8_t* c, const bf16* t, bf16* to, int64_t count) {
    const __m256i table = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t));
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_permutexvar_epi16(_mm256_cvtepu8_epi16(nibbles(c + i / 2)), table));
    return i;
}
#else
template <class T>
inline int64_t look_up(const uint8_t*, const T*, T*, int64_t) {
    return 0;
}
#endif

// out (n) = levels[code] · scale[block], the product in fp32 and rounded once; blocks of `size` numbers, an even count
template <class T>
void dequantize(const uint8_t* codes, const float* levels, const float* scale, T* out, int64_t n, int64_t size) {
    const int64_t blocks = (n + size - 1) / size;
#pragma omp parallel for schedule(static) if (n > GRAIN)
    for (int64_t b = 0; b < blocks; ++b) {
        T t[16];
        for (int k = 0; k < 16; ++k) store(t[k], levels[k] * scale[b]);
        const uint8_t* c = codes + b * (size / 2);
        T* to = out + b * size;
        const int64_t count = std::min(size, n - b * size);
        for (int64_t i = look_up(c, t, to, count); i < count; ++i) to[i] = t[i % 2 ? c[i / 2] & 15 : c[i / 2] >> 4];
    }
}

}  // namespace

#define BOTH(NAME, PARAMETERS, ...)                                   \
    void NAME##_f32 PARAMETERS(float) { NAME<float>(__VA_ARGS__); }   \
    void NAME##_bf16 PARAMETERS(bf16) { NAME<bf16>(__VA_ARGS__); }

extern "C" {
#define P(T) (const T* x, const T* w, T* y, float* rstd, int64_t rows, int64_t d, float eps, float shift, int64_t between)
BOTH(rms_forward, P, x, w, y, rstd, rows, d, eps, shift, between)
#undef P
#define P(T) (const T* dy, const T* x, const T* w, const float* rstd, const T* add, T* dx, int64_t rows, int64_t d, float shift)
BOTH(rms_backward, P, dy, x, w, rstd, add, dx, rows, d, shift)
#undef P
#define P(T) (const T* g, const T* u, T* p, int64_t n)
BOTH(swiglu_forward, P, g, u, p, n)
#undef P
#define P(T) (const T* dp, const T* g, const T* u, T* dg, T* du, T* p, int64_t n)
BOTH(swiglu_backward, P, dp, g, u, dg, du, p, n)
#undef P
#define P(T)                                                                                                                 \
    (const T* x, T* y, const T* cosine, const T* sine, int64_t batch, int64_t length, int64_t heads, int64_t d, int64_t sb, \
     int64_t sl, int64_t sh, int64_t table, int64_t back)
BOTH(rope, P, x, y, cosine, sine, batch, length, heads, d, sb, sl, sh, table, back)
#undef P
#define P(T) (const T* x, T* y, int64_t n, int64_t s0, int64_t s1, int64_t limit, float scale)
BOTH(drop, P, x, y, n, s0, s1, limit, scale)
#undef P
#define P(T) (const T* v, T* to, int64_t n, int64_t s0, int64_t s1, int64_t limit, float scale)
BOTH(drop_add, P, v, to, n, s0, s1, limit, scale)
#undef P
#define P(T) (const T* z, const float* c, T* y, int64_t rows, int64_t d)
BOTH(scale_columns, P, z, c, y, rows, d)
#undef P
#define P(T) (const T* g, const T* y, const float* c, T* gz, float* sum, int64_t rows, int64_t d, int64_t divided)
BOTH(scale_backward, P, g, y, c, gz, sum, rows, d, divided)
#undef P
void low_rank_squares_f32(const float* w, const float* u, const float* b, const float* gram, float* n, int64_t rows, int64_t r) {
    low_rank_squares(w, u, b, gram, n, rows, r);
}
#define P(T) (T* z, const int64_t* y, float* loss, int64_t rows, int64_t n, float s, int64_t slope)
BOTH(cross_entropy, P, z, y, loss, rows, n, s, slope)
#undef P
#define P(T) (const uint8_t* codes, const float* levels, const float* scale, T* out, int64_t n, int64_t size)
BOTH(dequantize, P, codes, levels, scale, out, n, size)
#undef P
}
