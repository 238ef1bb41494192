// One gradient step of a LeNet on the CPU: loss, number correct and all gradients of one batch.
//
// Compiled for one network by `compiler.py`, which defines these macros from the config:
//   CONVS       Conv<input channels, input side, output channels, kernel, padding>, ...; each has a 2x2 pool
//   DENSES      Dense<inputs, outputs>, ...; the last one has no activation
//   ACTIVATION  the name of an activation struct
//   POOL        the name of a pool struct
//
// The batch is the innermost dimension: every value of the network is a vector over V images (a *tile*).
// Each multiply-add is therefore one vector times one broadcast weight, for layers of any shape. A tile
// passes forward and backward through the convolutions while it is in the cache. Activation, pooling and
// their derivatives are applied to the convolution's result in registers. The weight gradients of the dense
// layers are computed in a second phase, as sums over the whole batch.
//
// The order of all sums depends on the batch size only: within a tile, tiles within their chunk, chunks in
// order, dense gradients example by example. Results are therefore bit-identical for any number of threads.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int V = 16, REGISTERS = 32;
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
constexpr int V = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int V = 4, REGISTERS = 32;
#else
#error "no vector unit that would be faster than torch"
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

namespace {

typedef float Vec __attribute__((vector_size(4 * V)));
typedef int32_t Int __attribute__((vector_size(4 * V)));
typedef float Loose __attribute__((vector_size(4 * V), aligned(4)));  // unaligned

constexpr int L1_BYTES = 26 * 1024;  // of the L1 cache, for one operand of a kernel
constexpr int CHUNKS = 16;           // gradient buffers of a batch; more threads than this do not help

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
// The block size that splits n evenly into the smallest number of blocks of at most `most`.
constexpr int block_of(int n, int most) { return ceil_div(n, ceil_div(n, most)); }
constexpr int to_vectors(int n) { return ceil_div(n, V) * V; }

template <int N> using Number = std::integral_constant<int, N>;

// Calls f(Number<size>, first) for 0..N in blocks of at most MOST; the last one may be smaller.
template <int N, int MOST, class F> INLINE void in_blocks(F f) {
    constexpr int B = block_of(N, MOST), WHOLE = N / B * B;
    for (int i = 0; i < WHOLE; i += B) f(Number<B>{}, i);
    if constexpr (WHOLE < N) f(Number<N - WHOLE>{}, WHOLE);
}

// ------------------------------------------------------------------------------ vector arithmetic

INLINE Vec splat(float x) { return Vec{} + x; }
INLINE Vec select(Int mask, Vec a, Vec b) { return (Vec)((mask & (Int)a) | (~mask & (Int)b)); }
// A NaN in the second operand of at_least and at_most is propagated, as in torch.
#if defined(__AVX512F__)
INLINE Vec at_least(float low, Vec x) { return _mm512_max_ps(_mm512_set1_ps(low), x); }
INLINE Vec at_most(float high, Vec x) { return _mm512_min_ps(_mm512_set1_ps(high), x); }
INLINE Vec reciprocal(Vec x) {  // 14 bits, doubled by a Newton step; x is finite and positive
    const Vec r = _mm512_rcp14_ps(x);
    return r + r * (1 - x * r);
}
INLINE Vec nearest(Vec x) { return _mm512_roundscale_ps(x, 0); }
INLINE Vec times_2_to(Vec whole, Vec x) { return _mm512_scalef_ps(x, whole); }
INLINE Vec to_floats(const uint8_t* bytes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes)));
}
#else
INLINE Vec at_least(float low, Vec x) { return select(x < low, splat(low), x); }
INLINE Vec at_most(float high, Vec x) { return select(x > high, splat(high), x); }
INLINE Vec reciprocal(Vec x) { return 1 / x; }
INLINE Vec nearest(Vec x) {
    constexpr float ROUND = 12582912;  // 1.5 * 2^23: adding it rounds x to an integer in the low bits
    return x + ROUND - ROUND;
}
INLINE Vec times_2_to(Vec whole, Vec x) { return (Vec)((Int)x + (__builtin_convertvector(whole, Int) << 23)); }
INLINE Vec to_floats(const uint8_t* bytes) {
#if defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes)));
#else
    Vec x;
    for (int i = 0; i < V; i++) x[i] = bytes[i];
    return x;
#endif
}
#endif

// 2^x with a relative error of 3e-7 for x from -126 to 126; x outside is clamped. With f the distance to the
// nearest integer, 2^f is the minimax polynomial of degree 5 among those with value 1 at f = 0.
INLINE Vec exp2(Vec x) {
    x = at_most(126, at_least(-126, x));
    const Vec whole = nearest(x), f = x - whole, f2 = f * f;
    // Estrin's scheme has a shorter chain of dependent operations than Horner's.
    const Vec high = (f * 1.3202982e-3f + 9.6749524e-3f) * f2 + (f * 5.5510473e-2f + 2.4022166e-1f);
    return times_2_to(whole, high * f2 + (f * 6.9314659e-1f + 1));
}
constexpr float LOG2_E = 1.44269504f;
INLINE Vec exp(Vec x) { return exp2(x * LOG2_E); }
INLINE Vec logistic(Vec x) { return reciprocal(1 + exp2(x * -LOG2_E)); }

INLINE float sum(Vec v) {
    float s = 0;
    for (int i = 0; i < V; i++) s += v[i];
    return s;
}

template <int... I> INLINE Vec zip_low(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I % 2 ? V + I / 2 : I / 2)...);
}
template <int... I> INLINE Vec zip_high(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I % 2 ? V + V / 2 + I / 2 : V / 2 + I / 2)...);
}
// Transpose a V x V matrix by log2(V) perfect shuffles of its rows.
INLINE void transpose(Vec (&a)[V]) {
    constexpr auto lanes = std::make_integer_sequence<int, V>{};
    Vec b[V];
    UNROLL for (int round = 1; round < V; round *= 2) {
        UNROLL for (int i = 0; i < V / 2; i++) {
            b[2 * i] = zip_low(a[i], a[i + V / 2], lanes);
            b[2 * i + 1] = zip_high(a[i], a[i + V / 2], lanes);
        }
        UNROLL for (int i = 0; i < V; i++) a[i] = b[i];
    }
}

// ------------------------------------------------------------- activations and their derivatives

// An activation has a function `value`, its derivative `slope` (from z and the value a), and the flag
// `monotone` if it is non-decreasing. `compiler.NATIVE_ACTIVATIONS` lists these structs.

struct Sigmoid {
    static constexpr bool monotone = true;
    static Vec value(Vec z) { return logistic(z); }
    static Vec slope(Vec, Vec a) { return a - a * a; }
};
struct Tanh {
    static constexpr bool monotone = true;
    static Vec value(Vec z) { return 2 * logistic(2 * z) - 1; }
    static Vec slope(Vec, Vec a) { return 1 - a * a; }
};
struct Relu {
    static constexpr bool monotone = true;
    static Vec value(Vec z) { return at_least(0, z); }
    static Vec slope(Vec z, Vec) { return select(z > 0, splat(1), Vec{}); }
};
struct LeakyRelu {
    static constexpr bool monotone = true;
    static Vec value(Vec z) { return select(z > 0, z, z * 0.01f); }
    static Vec slope(Vec z, Vec) { return select(z > 0, splat(1), splat(0.01f)); }
};
struct Silu {
    static constexpr bool monotone = false;
    static Vec value(Vec z) { return z * logistic(z); }
    static Vec slope(Vec z, Vec a) { return logistic(z) * (1 + z - a); }
};
struct Gelu {  // z times the normal CDF, by the erf of Abramowitz and Stegun, 7.1.26, with error 1.5e-7
    static constexpr bool monotone = false;
    static Vec density(Vec z) { return 0.39894228f * exp(-0.5f * z * z); }
    static Vec integral(Vec z) {
        const Vec size = select(z < 0, -z, z);
        const Vec t = reciprocal(1 + 0.3275911f * 0.70710678f * at_most(1e10f, size));
        Vec p = t * 1.061405429f - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 0.284496736f;
        p = p * t + 0.254829592f;
        const Vec tail = 0.5f * p * t * exp(-0.5f * z * z);
        return select(z < 0, tail, 1 - tail);
    }
    static Vec value(Vec z) { return z * integral(z); }
    static Vec slope(Vec z, Vec) { return integral(z) + z * density(z); }
};
using Act = ACTIVATION;

// A pool computes the pooled activation of a window from its four pre-activations z and, if LEARN, the
// derivative of the result with respect to each z. `compiler.NATIVE_POOLS` lists these structs.
struct Average {
    template <bool LEARN> INLINE Vec apply(const Vec (&z)[4], Vec (&slope)[4]) {
        Vec total{};
        UNROLL for (int q = 0; q < 4; q++) {
            const Vec a = Act::value(z[q]);
            total += a;
            if constexpr (LEARN) slope[q] = Act::slope(z[q], a) * 0.25f;
        }
        return total * 0.25f;
    }
};
struct Maximum {
    template <bool LEARN> INLINE Vec apply(const Vec (&z)[4], Vec (&slope)[4]) {
        Vec a[4];
        // For a non-decreasing activation, max(value(z)) == value(max(z)).
        UNROLL for (int q = 0; q < 4; q++) a[q] = Act::monotone ? z[q] : Act::value(z[q]);
        Vec best = a[0], at = z[0];
        UNROLL for (int q = 1; q < 4; q++) {
            const Int better = (a[q] > best) | (a[q] != a[q]);  // NaN wins, as in torch
            best = select(better, a[q], best);
            at = select(better, z[q], at);
        }
        const Vec value = Act::monotone ? Act::value(best) : best;
        if constexpr (LEARN) {
            const Vec steep = Act::slope(at, value);
            Int open = ~Int{};  // of equal values, the first gets the gradient
            UNROLL for (int q = 0; q < 4; q++) {
                const Int hit = (a[q] == best) & open;
                slope[q] = select(hit, steep, Vec{});
                open &= ~hit;
            }
        }
        return value;
    }
};

// ------------------------------------------------------------------------------------- the network

template <int C_, int H_, int O_, int K_, int P_> struct Conv {
    static constexpr int C = C_, H = H_, O = O_, K = K_, P = P_;  // H: side of the input without padding
    static constexpr int S = H + 2 * P;                           // with padding
    static constexpr int R = S - K + 1, Q = R / 2;                // sides of the output: R, pooled: Q
    static constexpr int weights = O * C * K * K;
};
template <int I_, int O_> struct Dense {
    static constexpr int I = I_, O = O_;
    static constexpr int row = to_vectors(I);  // floats per example, as stored for the second phase
};

using Convs = std::tuple<CONVS>;
using Denses = std::tuple<DENSES>;
constexpr int CONV_LAYERS = std::tuple_size_v<Convs>, DENSE_LAYERS = std::tuple_size_v<Denses>;
template <int I> using ConvAt = std::tuple_element_t<I, Convs>;
template <int I> using DenseAt = std::tuple_element_t<I, Denses>;
using First = ConvAt<0>;
using Last = DenseAt<DENSE_LAYERS - 1>;
constexpr int PIXELS = First::H * First::H, CLASSES = Last::O;

template <class L> struct ConvTile {
    Vec in[L::C * L::S * L::S];        // with a border of zeros
    Vec slope[L::O * L::R * L::R];     // of the pooled result by each pre-activation; then its gradient
    Vec pooled_g[L::O * L::Q * L::Q];  // gradient of the pooled result
    Vec weight_g[L::weights + V], bias_g[L::O + V];
};
template <class L> struct DenseTile {
    Vec in[L::I], slope[L::O];
};
template <class T> struct TilesOf;
template <class... L> struct TilesOf<std::tuple<L...>> {
    using Conv = std::tuple<ConvTile<L>...>;
    using Dense = std::tuple<DenseTile<L>...>;
};
struct Tile {  // the working memory of one thread
    TilesOf<Convs>::Conv conv;
    TilesOf<Denses>::Dense dense;
    Vec logits[CLASSES];
};

template <int... I> constexpr int conv_gradients(std::integer_sequence<int, I...>) {
    return (0 + ... + (to_vectors(ConvAt<I>::weights) + to_vectors(ConvAt<I>::O)));
}
constexpr int CONV_GRADIENTS = conv_gradients(std::make_integer_sequence<int, CONV_LAYERS>{});
template <int LAYER> constexpr int conv_gradients_before = conv_gradients(std::make_integer_sequence<int, LAYER>{});

// Per example: the inputs of every dense layer (one row each) and the gradients of its pre-activations.
template <int... I> constexpr int dense_floats(std::integer_sequence<int, I...>) {
    return (0 + ... + (DenseAt<I>::row + DenseAt<I>::O));
}
constexpr int DENSE_FLOATS = dense_floats(std::make_integer_sequence<int, DENSE_LAYERS>{});
template <int LAYER> constexpr int dense_floats_before = dense_floats(std::make_integer_sequence<int, LAYER>{});

struct TileTotals {
    double loss;
    int64_t right;
};
struct Batch {
    const uint8_t* images;
    const int64_t *labels, *indices;  // indices may be null: then all examples in order
    int64_t size;
    int64_t at(int64_t i) const { return indices ? indices[i] : i; }
    int64_t tiles() const { return (size + V - 1) / V; }
};
struct Parameters {  // the convolutions, then the dense layers; of each the weight, then the bias
    float* const* tensors;
    const float* weight(int layer) const { return tensors[2 * layer]; }
    const float* bias(int layer) const { return tensors[2 * layer + 1]; }
};

// The layout of the working memory of a batch, and its size.
struct Workspace {
    Tile* tiles;         // one for each thread
    float* conv_g;       // CHUNKS x CONV_GRADIENTS
    float* dense;        // layer by layer: the inputs of all examples, then the gradients, tile by tile
    TileTotals* totals;  // one for each tile
    int64_t bytes;

    Workspace(char* start, int threads, int64_t batch_tiles) {
        char* next = start;
        tiles = take<Tile>(next, threads);
        conv_g = take<float>(next, int64_t(CHUNKS) * CONV_GRADIENTS);
        dense = take<float>(next, batch_tiles * V * DENSE_FLOATS);
        totals = take<TileTotals>(next, batch_tiles);
        bytes = next - start;
    }
    template <class T> static T* take(char*& next, int64_t count) {
        T* taken = (T*)next;
        next += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        return taken;
    }
};

// --------------------------------------------------------------------------------------- forward

// Scale the uint8 pixels of V images to [0, 1] and write them inside the zero border of the first input.
INLINE void load_images(const Batch& batch, int64_t first, Vec* in) {
    const uint8_t* image[V];
    for (int i = 0; i < V; i++) {  // the last tile is filled up with copies of its first image
        const int64_t j = first + i < batch.size ? first + i : first;
        image[i] = batch.images + batch.at(j) * PIXELS;
    }
    static_assert(First::H >= V);
    for (int h = 0; h < First::H; h++) {
        Vec* row = in + (h + First::P) * First::S + First::P;
        for (int w = 0; w < First::H; w += V) {
            const int from = w + V <= First::H ? w : First::H - V;  // the last block overlaps the one before
            Vec a[V];
            UNROLL for (int i = 0; i < V; i++) {
                a[i] = to_floats(image[i] + h * First::H + from) * (1 / 255.0f);
            }
            transpose(a);
            UNROLL for (int i = 0; i < V; i++) row[from + i] = a[i];
        }
    }
}

// B output channels of one pooling window: convolution, bias, activation, pool. PLANE: plane size of `out`.
template <class L, int B, int PLANE, bool LEARN>
INLINE void conv_window(const Vec* x, const float* weight, const float* bias, Vec* slope, Vec* out) {
    Vec z[B][4];
    UNROLL for (int o = 0; o < B; o++) UNROLL for (int q = 0; q < 4; q++) z[o][q] = splat(bias[o]);
    for (int c = 0; c < L::C; c++)
        for (int kh = 0; kh < L::K; kh++) {
            const Vec* row = x + (c * L::S + kh) * L::S;
            const float* w = weight + (c * L::K + kh) * L::K;
#pragma GCC unroll 8
            for (int kw = 0; kw < L::K; kw++) {
                const Vec x0 = row[kw], x1 = row[kw + 1], x2 = row[L::S + kw], x3 = row[L::S + kw + 1];
                UNROLL for (int o = 0; o < B; o++) {
                    const Vec ww = splat(w[o * L::C * L::K * L::K + kw]);
                    z[o][0] += x0 * ww, z[o][1] += x1 * ww, z[o][2] += x2 * ww, z[o][3] += x3 * ww;
                }
            }
        }
    UNROLL for (int o = 0; o < B; o++) {
        Vec steep[4];
        out[o * PLANE] = POOL::template apply<LEARN>(z[o], steep);
        if constexpr (LEARN) {
            Vec* s = slope + o * L::R * L::R;
            s[0] = steep[0], s[1] = steep[1], s[L::R] = steep[2], s[L::R + 1] = steep[3];
        }
    }
}

// A whole layer. PLANE and ROW: plane size and row length of the pooled output `out`.
template <class L, int PLANE, int ROW, bool LEARN>
static void conv_forward(ConvTile<L>& t, const float* weight, const float* bias, Vec* out) {
    for (int h = 0; h < L::Q; h++)
        for (int w = 0; w < L::Q; w++)
            in_blocks<L::O, REGISTERS == 32 ? 4 : 2>([&](auto block, int o) __attribute__((always_inline)) {
                conv_window<L, block(), PLANE, LEARN>(t.in + 2 * h * L::S + 2 * w,
                    weight + o * L::C * L::K * L::K, bias + o, t.slope + (o * L::R + 2 * h) * L::R + 2 * w,
                    out + o * PLANE + h * ROW + w);
            });
}

template <class L, bool LEARN>
static void dense_forward(DenseTile<L>& t, const float* weight, const float* bias, Vec* out) {
    in_blocks<L::O, REGISTERS == 32 ? 20 : 10>([&](auto block, int o) __attribute__((always_inline)) {
        constexpr int B = block();
        Vec z[B];
        UNROLL for (int i = 0; i < B; i++) z[i] = splat(bias[o + i]);
        const float* w = weight + o * L::I;
        for (int k = 0; k < L::I; k++)
            UNROLL for (int i = 0; i < B; i++) z[i] += t.in[k] * w[i * L::I + k];
        UNROLL for (int i = 0; i < B; i++) out[o + i] = z[i];
    });
    if constexpr (std::is_same_v<L, Last>) return;
    for (int o = 0; o < L::O; o++) {
        const Vec z = out[o];
        out[o] = Act::value(z);
        if constexpr (LEARN) t.slope[o] = Act::slope(z, out[o]);
    }
}

template <int LAYER, bool LEARN> static void convs_forward(Tile& t, Parameters p) {
    using L = ConvAt<LAYER>;
    auto& mine = std::get<LAYER>(t.conv);
    if constexpr (LAYER + 1 < CONV_LAYERS) {
        using N = ConvAt<LAYER + 1>;
        conv_forward<L, N::S * N::S, N::S, LEARN>(
            mine, p.weight(LAYER), p.bias(LAYER), std::get<LAYER + 1>(t.conv).in + N::P * N::S + N::P);
        convs_forward<LAYER + 1, LEARN>(t, p);
    } else {
        conv_forward<L, L::Q * L::Q, L::Q, LEARN>(mine, p.weight(LAYER), p.bias(LAYER), std::get<0>(t.dense).in);
    }
}
template <int LAYER, bool LEARN> static void denses_forward(Tile& t, Parameters p) {
    Vec* out;
    if constexpr (LAYER + 1 < DENSE_LAYERS) out = std::get<LAYER + 1>(t.dense).in;
    else out = t.logits;
    dense_forward<DenseAt<LAYER>, LEARN>(
        std::get<LAYER>(t.dense), p.weight(CONV_LAYERS + LAYER), p.bias(CONV_LAYERS + LAYER), out);
    if constexpr (LAYER + 1 < DENSE_LAYERS) denses_forward<LAYER + 1, LEARN>(t, p);
}

// Cross-entropy of the logits, which are overwritten by the gradient of the batch's mean loss.
static TileTotals cross_entropy(Vec (&logits)[CLASSES], const Batch& batch, int64_t first, int64_t* predicted) {
    Vec top = logits[0];
    Int best{}, label;
    for (int c = 1; c < CLASSES; c++) {
        const Int greater = logits[c] > top;
        top = select(greater, logits[c], top);
        best = (greater & c) | (~greater & best);
    }
    const int lanes = batch.size - first < V ? int(batch.size - first) : V;
    Vec weight{};
    for (int i = 0; i < V; i++) label[i] = i < lanes ? int(batch.labels[batch.at(first + i)]) : 0;
    for (int i = 0; i < lanes; i++) weight[i] = 1.0f / float(batch.size);
    Vec total{}, own{}, e[CLASSES];
    for (int c = 0; c < CLASSES; c++) {
        const Vec below = logits[c] - top;
        e[c] = exp(below);
        total += e[c];
        own = select(label == c, below, own);
    }
    for (int c = 0; c < CLASSES; c++)
        logits[c] = (e[c] / total - select(label == c, splat(1), Vec{})) * weight;
    TileTotals sums{0, 0};
    for (int i = 0; i < lanes; i++) {
        sums.loss += std::log(total[i]) - own[i];
        sums.right += best[i] == label[i];
        if (predicted) predicted[first + i] = best[i];
    }
    return sums;
}

// -------------------------------------------------------------------------------------- backward

// Store the inputs of a dense layer (one row per example) and the gradients of its pre-activations for the
// second phase.
template <class L> static void keep(const Vec* in, const Vec* g, float* rows, float* gradients) {
    for (int k = 0; k < L::row; k += V) {
        Vec a[V];
        UNROLL for (int i = 0; i < V; i++) a[i] = k + i < L::I ? in[k + i] : Vec{};
        transpose(a);
        UNROLL for (int i = 0; i < V; i++) *(Loose*)(rows + i * L::row + k) = a[i];
    }
    memcpy(gradients, g, L::O * sizeof(Vec));
}

template <class L> static void dense_input_gradient(const Vec* g, const float* weight, Vec* in_g) {
    in_blocks<L::I, REGISTERS == 32 ? 20 : 10>([&](auto block, int k) __attribute__((always_inline)) {
        constexpr int B = block();
        Vec sums[B];
        UNROLL for (int i = 0; i < B; i++) sums[i] = Vec{};
        const float* w = weight + k;
        for (int o = 0; o < L::O; o++, w += L::I)
            UNROLL for (int i = 0; i < B; i++) sums[i] += g[o] * w[i];
        UNROLL for (int i = 0; i < B; i++) in_g[k + i] = sums[i];
    });
}

// `g`: the gradients of this layer's pre-activations. The first dense layer writes those of the last pool.
template <int LAYER> static void denses_backward(Tile& t, Parameters p, const Vec* g, float* kept, int64_t tile, int64_t tiles) {
    using L = DenseAt<LAYER>;
    float* const base = kept + tiles * V * dense_floats_before<LAYER>;
    keep<L>(std::get<LAYER>(t.dense).in, g, base + tile * V * L::row, base + tiles * V * L::row + tile * V * L::O);
    const float* weight = p.weight(CONV_LAYERS + LAYER);
    if constexpr (LAYER > 0) {
        Vec in_g[L::I];
        dense_input_gradient<L>(g, weight, in_g);
        const auto& before = std::get<LAYER - 1>(t.dense);
        for (int i = 0; i < L::I; i++) in_g[i] *= before.slope[i];
        denses_backward<LAYER - 1>(t, p, in_g, kept, tile, tiles);
    } else {
        dense_input_gradient<L>(g, weight, std::get<CONV_LAYERS - 1>(t.conv).pooled_g);
    }
}

// Backward pass of pool and activation for `rows` rows from `r0`. Overwrites the slopes by the gradients of
// the pre-activations and adds up the bias gradients.
template <class L> static void unpool(ConvTile<L>& t, int r0, int rows, bool first) {
    for (int o = 0; o < L::O; o++) {
        Vec total = first && r0 == 0 ? Vec{} : t.bias_g[o];
        for (int r = r0; r < r0 + rows; r += 2) {
            Vec *upper = t.slope + (o * L::R + r) * L::R, *lower = upper + L::R;
            const Vec* pooled = t.pooled_g + (o * L::Q + r / 2) * L::Q;
            for (int w = 0; w < L::Q; w++) {
                const Vec g = pooled[w];
                upper[2 * w] *= g, upper[2 * w + 1] *= g, lower[2 * w] *= g, lower[2 * w + 1] *= g;
                total += (upper[2 * w] + upper[2 * w + 1]) + (lower[2 * w] + lower[2 * w + 1]);
            }
        }
        t.bias_g[o] = total;
    }
}

// Gradients of T weights of a kernel's row for B output channels, summed over `rows` rows of the output.
template <class L, int B, int T>
INLINE void conv_weight_block(const Vec* x, const Vec* g, int rows, Vec* weight_g, bool first) {
    constexpr int NEXT = L::C * L::K * L::K;
    Vec sums[B][T];
    UNROLL for (int o = 0; o < B; o++)
        UNROLL for (int k = 0; k < T; k++) sums[o][k] = first ? Vec{} : weight_g[o * NEXT + k];
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int w = 0; w < L::R; w++)
            UNROLL for (int o = 0; o < B; o++) {
                const Vec gg = g[o * L::R * L::R + r * L::R + w];
                UNROLL for (int k = 0; k < T; k++) sums[o][k] += x[r * L::S + w + k] * gg;
            }
    UNROLL for (int o = 0; o < B; o++) UNROLL for (int k = 0; k < T; k++) weight_g[o * NEXT + k] = sums[o][k];
}

constexpr int MOST_TAPS = REGISTERS == 32 ? 8 : 5;
template <class L> constexpr int weight_channels = block_of(L::O, clamp((REGISTERS - 9) / (L::K < MOST_TAPS ? L::K : MOST_TAPS), 1, 6));
// Rows of the output that stay in the L1 cache while they are used by all weights and input channels.
template <class L> constexpr int strip_rows = clamp(L1_BYTES / int(weight_channels<L> * L::R * sizeof(Vec)) / 2 * 2, 2, L::R);

template <class L> static void conv_weight_gradient(ConvTile<L>& t, int r0, int rows, bool first) {
    in_blocks<L::O, weight_channels<L>>([&](auto channels, int o) __attribute__((always_inline)) {
        for (int c = 0; c < L::C; c++)
            for (int kh = 0; kh < L::K; kh++)
                in_blocks<L::K, MOST_TAPS>([&](auto taps, int k) __attribute__((always_inline)) {
                    conv_weight_block<L, channels(), taps()>(t.in + (c * L::S + r0 + kh) * L::S + k,
                        t.slope + (o * L::R + r0) * L::R, rows,
                        t.weight_g + ((o * L::C + c) * L::K + kh) * L::K + k, first);
                });
    });
}

// Gradient of X values of row h of input channel c: adds the terms of output channels o0 to o1 to `in_g`.
template <class L, int X, int X0>
INLINE void conv_input_row(const Vec* g, const float* weight, int c, int h, int o0, int o1, Vec* in_g) {
    Vec sums[X];
    UNROLL for (int x = 0; x < X; x++) sums[x] = o0 ? in_g[x] : Vec{};
    // Kernel row kh at output row h + P - kh covers row h of the input.
    const int low = h + L::P - L::R + 1 > 0 ? h + L::P - L::R + 1 : 0, high = h + L::P < L::K - 1 ? h + L::P : L::K - 1;
    for (int o = o0; o < o1; o++)
        for (int kh = low; kh <= high; kh++) {
            const Vec* row = g + (o * L::R + h + L::P - kh) * L::R;
            const float* w = weight + ((o * L::C + c) * L::K + kh) * L::K;
            UNROLL for (int r = 0; r < L::R; r++) UNROLL for (int k = 0; k < L::K; k++) {
                const int x = r + k - L::P - X0;
                if (0 <= x && x < X) sums[x] += row[r] * w[k];
            }
        }
    UNROLL for (int x = 0; x < X; x++) in_g[x] = sums[x];
}

template <class L, int X0 = 0> INLINE void conv_input_rows(const Vec* g, const float* weight, int c, int h, int o0, int o1, Vec* in_g) {
    constexpr int X = block_of(L::H, REGISTERS == 32 ? 14 : 7), HERE = X0 + X <= L::H ? X : L::H - X0;
    conv_input_row<L, HERE, X0>(g, weight, c, h, o0, o1, in_g + X0);
    if constexpr (X0 + HERE < L::H) conv_input_rows<L, X0 + HERE>(g, weight, c, h, o0, o1, in_g);
}

template <class L> static void conv_input_gradient(const ConvTile<L>& t, const float* weight, Vec* in_g) {
    // Output channels whose rows under one kernel stay in the L1 cache while all input channels use them.
    constexpr int O = clamp(L1_BYTES / int(L::K * L::R * sizeof(Vec)), 1, L::O);
    for (int h = 0; h < L::H; h++)
        for (int o = 0; o < L::O; o += O)
            for (int c = 0; c < L::C; c++)
                conv_input_rows<L>(t.slope, weight, c, h, o, o + O < L::O ? o + O : L::O, in_g + (c * L::H + h) * L::H);
}

template <int LAYER> static void convs_backward(Tile& t, Parameters p, bool first) {
    using L = ConvAt<LAYER>;
    auto& mine = std::get<LAYER>(t.conv);
    for (int r = 0; r < L::R; r += strip_rows<L>) {
        const int rows = r + strip_rows<L> < L::R ? strip_rows<L> : L::R - r;
        unpool(mine, r, rows, first);
        conv_weight_gradient(mine, r, rows, first && r == 0);
    }
    if constexpr (LAYER > 0) {
        conv_input_gradient(mine, p.weight(LAYER), std::get<LAYER - 1>(t.conv).pooled_g);
        convs_backward<LAYER - 1>(t, p, first);
    }
}

// -------------------------------------------------------------------------- sums over the examples

// The sum over the lanes of each of n vectors, V vectors at a time.
INLINE void sum_lanes(const Vec* in, int n, float* out) {
    for (int j = 0; j < n; j += V) {
        Vec a[V], total{};
        UNROLL for (int i = 0; i < V; i++) a[i] = in[j + i];
        transpose(a);
        UNROLL for (int i = 0; i < V; i++) total += a[i];
        *(Loose*)(out + j) = total;
    }
}
template <int LAYER> static void sum_chunk(const Tile& t, float* out) {
    using L = ConvAt<LAYER>;
    const auto& mine = std::get<LAYER>(t.conv);
    out += conv_gradients_before<LAYER>;
    sum_lanes(mine.weight_g, L::weights, out);
    sum_lanes(mine.bias_g, L::O, out + to_vectors(L::weights));
    if constexpr (LAYER + 1 < CONV_LAYERS) sum_chunk<LAYER + 1>(t, out - conv_gradients_before<LAYER>);
}

// The second phase. All threads of the team call these functions and share the loops (`omp for`).
template <int LAYER> static void conv_sums(const float* chunks, int count, float* const* gradients) {
    using L = ConvAt<LAYER>;
    const float* from = chunks + conv_gradients_before<LAYER>;
    for (int part = 0; part < 2; part++) {
        const int n = part ? L::O : L::weights;
        float* to = gradients[2 * LAYER + part];
#pragma omp for schedule(static) nowait
        for (int j = 0; j < n; j++) {
            float total = 0;
            for (int c = 0; c < count; c++) total += from[c * CONV_GRADIENTS + j];
            to[j] = total;
        }
        from += to_vectors(L::weights);
    }
    if constexpr (LAYER + 1 < CONV_LAYERS) conv_sums<LAYER + 1>(chunks, count, gradients);
}

// Weight gradients of B outputs for W vectors of inputs, starting at input k.
template <class L, int B, int W>
INLINE void dense_weight_block(const float* rows, const float* g, int64_t tiles, int o, int k, float* weight_g) {
    Vec sums[B][W];
    UNROLL for (int i = 0; i < B; i++) UNROLL for (int w = 0; w < W; w++) sums[i][w] = Vec{};
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int lane = 0; lane < V; lane++) {
            const float* row = rows + (tile * V + lane) * L::row + k;
            const float* gg = g + (tile * L::O + o) * V + lane;
            Vec in[W];
            UNROLL for (int w = 0; w < W; w++) in[w] = *(const Loose*)(row + w * V);
            UNROLL for (int i = 0; i < B; i++) UNROLL for (int w = 0; w < W; w++) sums[i][w] += in[w] * gg[i * V];
        }
    UNROLL for (int i = 0; i < B; i++) UNROLL for (int w = 0; w < W; w++) {
        const int left = L::I - k - w * V;
        memcpy(weight_g + (o + i) * L::I + k + w * V, &sums[i][w], (left < V ? left : V) * sizeof(float));
    }
}
template <int LAYER> static void dense_sums(const float* kept, int64_t tiles, float* const* gradients) {
    using L = DenseAt<LAYER>;
    constexpr int W = L::row == V ? 1 : 2, B = block_of(L::O, (REGISTERS - 8) / W);
    constexpr int COLUMNS = ceil_div(L::row, W * V), BLOCKS = ceil_div(L::O, B);
    const float* rows = kept + tiles * V * dense_floats_before<LAYER>;
    const float* g = rows + tiles * V * L::row;
    float *weight_g = gradients[2 * (CONV_LAYERS + LAYER)], *bias_g = gradients[2 * (CONV_LAYERS + LAYER) + 1];
#pragma omp for schedule(dynamic, 4) nowait
    for (int task = 0; task < COLUMNS * BLOCKS; task++) {
        const int k = task / BLOCKS * W * V, o = task % BLOCKS * B;
        const bool narrow = k + W * V > L::row, low = o + B > L::O;
        auto block = [&](auto outputs, auto width) __attribute__((always_inline)) {
            dense_weight_block<L, outputs(), width()>(rows, g, tiles, o, k, weight_g);
        };
        constexpr int B_LEFT = L::O % B ? L::O % B : B, W_LEFT = L::row / V % W ? L::row / V % W : W;
        if (!low && !narrow) block(Number<B>{}, Number<W>{});
        else if (!low) block(Number<B>{}, Number<W_LEFT>{});
        else if (!narrow) block(Number<B_LEFT>{}, Number<W>{});
        else block(Number<B_LEFT>{}, Number<W_LEFT>{});
    }
#pragma omp for schedule(static) nowait
    for (int o = 0; o < L::O; o++) {
        Vec total{};
        for (int64_t tile = 0; tile < tiles; tile++) total += *(const Loose*)(g + (tile * L::O + o) * V);
        bias_g[o] = sum(total);
    }
    if constexpr (LAYER + 1 < DENSE_LAYERS) dense_sums<LAYER + 1>(kept, tiles, gradients);
}

int this_thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

void add_up(const Workspace& work, int64_t tiles, double* totals) {
    totals[0] = totals[1] = 0;
    for (int64_t tile = 0; tile < tiles; tile++) totals[0] += work.totals[tile].loss, totals[1] += double(work.totals[tile].right);
}

}  // namespace

extern "C" {

// Bytes of zeroed, 64-byte aligned memory that the functions below need for batches of up to `size` examples.
int64_t workspace_bytes(int threads, int64_t size) { return Workspace(nullptr, threads, (size + V - 1) / V).bytes; }

// Writes totals (sum of losses, number correct) and gradients (of the batch's mean loss).
void gradients(float* const* parameters, float* const* gradients, const uint8_t* images, const int64_t* labels,
               const int64_t* indices, int64_t size, int threads, char* workspace, double* totals) {
    const Batch batch{images, labels, indices, size};
    const Parameters p{parameters};
    const int64_t tiles = batch.tiles();
    const Workspace work(workspace, threads, tiles);
    const int chunks = tiles < CHUNKS ? int(tiles) : CHUNKS;
#pragma omp parallel num_threads(threads)
    {
        Tile& mine = work.tiles[this_thread()];
#pragma omp for schedule(dynamic)
        for (int chunk = 0; chunk < chunks; chunk++) {
            const int64_t start = chunk * tiles / chunks, end = (chunk + 1) * tiles / chunks;
            for (int64_t tile = start; tile < end; tile++) {
                load_images(batch, tile * V, std::get<0>(mine.conv).in);
                convs_forward<0, true>(mine, p);
                denses_forward<0, true>(mine, p);
                work.totals[tile] = cross_entropy(mine.logits, batch, tile * V, nullptr);
                denses_backward<DENSE_LAYERS - 1>(mine, p, mine.logits, work.dense, tile, tiles);
                convs_backward<CONV_LAYERS - 1>(mine, p, tile == start);
            }
            sum_chunk<0>(mine, work.conv_g + int64_t(chunk) * CONV_GRADIENTS);
        }
        dense_sums<0>(work.dense, tiles, gradients);
        conv_sums<0>(work.conv_g, chunks, gradients);
    }
    add_up(work, tiles, totals);
}

// The forward pass only. Writes totals and, unless `predicted` is null, the most likely classes.
void evaluate(float* const* parameters, const uint8_t* images, const int64_t* labels, int64_t size, int threads,
              char* workspace, double* totals, int64_t* predicted) {
    const Batch batch{images, labels, nullptr, size};
    const Parameters p{parameters};
    const Workspace work(workspace, threads, batch.tiles());
#pragma omp parallel num_threads(threads)
    {
        Tile& mine = work.tiles[this_thread()];
#pragma omp for schedule(dynamic, 8)
        for (int64_t tile = 0; tile < batch.tiles(); tile++) {
            load_images(batch, tile * V, std::get<0>(mine.conv).in);
            convs_forward<0, false>(mine, p);
            denses_forward<0, false>(mine, p);
            work.totals[tile] = cross_entropy(mine.logits, batch, tile * V, predicted);
        }
    }
    add_up(work, batch.tiles(), totals);
}
}
