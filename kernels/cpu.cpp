// The ops on a CPU: each selected row is read once, where it lies, and summed in fp32.
//
// Compiled by Inductor's C++ toolchain on the first call (see cpu.py); plain pointers, no torch headers,
// so that this takes a second. The references beside the Triton kernels say what each function computes.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  BFloat16() = default;
  BFloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    // To the nearest, ties to even; NaN stays NaN.
    bits = value != value ? 0x7fc0 : uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  }
};

// Sixteen elements, widened: the compiler splits this where registers are shorter.
typedef float Floats __attribute__((vector_size(64)));
template <class W>
using Sixteen __attribute__((vector_size(16 * sizeof(W)))) = W;

template <class W>
Floats load(const W* from) {
  Sixteen<W> narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return __builtin_convertvector(narrow, Floats);
}

Floats load(const BFloat16* from) {
  Sixteen<uint16_t> narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  auto wide = __builtin_convertvector(narrow, Sixteen<uint32_t>) << 16;
  Floats floats;
  std::memcpy(&floats, &wide, sizeof floats);
  return floats;
}

Floats load(const int8_t* from) {
  Sixteen<int8_t> narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  // Step by step: GCC takes a wider one apart into single elements.
  auto words = __builtin_convertvector(__builtin_convertvector(narrow, Sixteen<int16_t>), Sixteen<int32_t>);
  return __builtin_convertvector(words, Floats);
}

template <class W>
float dot(const W* w, const float* x, int64_t d) {
  // Four independent sums hide the latency of an addition.
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 64 <= d; i += 64) {
    sums[0] += load(w + i) * load(x + i);
    sums[1] += load(w + i + 16) * load(x + i + 16);
    sums[2] += load(w + i + 32) * load(x + i + 32);
    sums[3] += load(w + i + 48) * load(x + i + 48);
  }
  for (; i + 16 <= d; i += 16) sums[0] += load(w + i) * load(x + i);
  Floats all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float lanes[16];
  std::memcpy(lanes, &all, sizeof lanes);
  for (int half = 8; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  float total = lanes[0];
  for (; i < d; ++i) total += float(w[i]) * x[i];
  return total;
}

enum Activation { IDENTITY, RELU, RELU2, SILU, GELU, GELU_TANH };

float activate(float x, int activation) {
  switch (activation) {
    case RELU: return x <= 0 ? 0 : x;
    case RELU2: return x <= 0 ? 0 : x * x;
    case SILU: return x / (1 + std::exp(-x));
    case GELU: return 0.5f * x * (1 + std::erf(x * 0.70710678f));
    case GELU_TANH: {
      float y = 0.79788456f * (x + 0.044715f * x * x * x);
      return x / (1 + std::exp(-2 * y));
    }
    default: return x;
  }
}

template <class T>
std::vector<float> widened(const T* x, int64_t count) {
  std::vector<float> wide(count);
  for (int64_t i = 0; i < count; ++i) wide[i] = float(x[i]);
  return wide;
}

template <class T>
void rows(const T* x, const T* weight, const T* bias, const T* up, const T* up_bias, const int32_t* index,
          T* out, int64_t slots, int64_t tokens, int64_t d, int64_t out_stride, int64_t stride,
          int64_t up_stride, int activation, int threads) {
  auto wide = widened(x, tokens * d);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t slot = 0; slot < slots; ++slot) {
    int64_t unit = index ? index[slot] : slot;
    for (int64_t t = 0; t < tokens; ++t) {
      float y = dot(weight + unit * stride, wide.data() + t * d, d);
      y = activate(y + (bias ? float(bias[unit]) : 0), activation);
      if (up) {
        float u = dot(up + unit * up_stride, wide.data() + t * d, d);
        y *= u + (up_bias ? float(up_bias[unit]) : 0);
      }
      out[t * out_stride + slot] = T(y);
    }
  }
}

// Each thread owns some columns, and adds up all rows: no reduction, the same bits for any thread count.
template <class T>
void sum(const T* hidden, const T* weight, const int32_t* index, float* out, int64_t slots, int64_t tokens,
         int64_t n, int64_t d, int64_t stride, bool compacted, int threads) {
  constexpr int64_t COLUMNS = 128;
  int64_t blocks = (d + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part) {
    int64_t begin = blocks * part / threads * COLUMNS, end = blocks * (part + 1) / threads * COLUMNS;
    if (end > d) end = d;
    for (int64_t t = 0; t < tokens; ++t) {
      float* y = out + t * d;
      const T* h = hidden + t * n;
      for (int64_t c = begin; c < end; ++c) y[c] = 0;
      auto factor = [&](int64_t slot) { return float(h[compacted ? slot : index[slot]]); };
      auto row = [&](int64_t slot) { return weight + int64_t(index[slot]) * stride; };
      int64_t slot = 0;
      // Four rows at once: the sums are loaded and stored a quarter as often.
      for (; slot + 4 <= slots; slot += 4) {
        const T *w0 = row(slot), *w1 = row(slot + 1), *w2 = row(slot + 2), *w3 = row(slot + 3);
        float h0 = factor(slot), h1 = factor(slot + 1), h2 = factor(slot + 2), h3 = factor(slot + 3);
        int64_t c = begin;
        for (; c + 16 <= end; c += 16) {
          Floats total = load(y + c) + (h0 * load(w0 + c) + h1 * load(w1 + c)) +
                         (h2 * load(w2 + c) + h3 * load(w3 + c));
          std::memcpy(y + c, &total, sizeof total);
        }
        for (; c < end; ++c)
          y[c] += (h0 * float(w0[c]) + h1 * float(w1[c])) + (h2 * float(w2[c]) + h3 * float(w3[c]));
      }
      for (; slot < slots; ++slot) {
        const T* w = row(slot);
        float h0 = factor(slot);
        for (int64_t c = begin; c < end; ++c) y[c] += h0 * float(w[c]);
      }
    }
  }
}

// One pass over the mask [n]; the rest of the index is zero.
int32_t listed(const std::vector<uint8_t>& keep, int32_t* index) {
  int32_t count = 0, n = int32_t(keep.size());
  for (int32_t unit = 0; unit < n; ++unit) {
    index[count] = unit;
    count += keep[unit];
  }
  std::memset(index + count, 0, (n - count) * sizeof(int32_t));
  return count;
}

template <class T, class W>
void select(const T* source, const W* down, const W* up, const float* bias, int32_t* index, int32_t* count,
            int64_t tokens, int64_t width, int64_t rank, int64_t n, int threads) {
  auto wide = widened(source, tokens * width);
  std::vector<float> inner(tokens * rank);
  std::vector<uint8_t> keep(n);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t t = 0; t < tokens; ++t)
        inner[t * rank + r] = dot(down + r * width, wide.data() + t * width, width);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < n; ++unit) {
      uint8_t kept = 0;
      for (int64_t t = 0; t < tokens; ++t)
        // "not below", so that NaN is kept
        kept |= !(dot(up + unit * rank, inner.data() + t * rank, rank) + bias[unit] <= 0);
      keep[unit] = kept;
    }
  }
  *count = listed(keep, index);
}

template <class T>
void compact(const T* values, float threshold, int32_t* index, int32_t* count, int64_t tokens, int64_t n) {
  std::vector<uint8_t> keep(n);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t unit = 0; unit < n; ++unit)
      keep[unit] |= !(std::fabs(float(values[t * n + unit])) <= threshold);
  *count = listed(keep, index);
}

}  // namespace

#define FOR_TYPE(SUFFIX, T)                                                                                  \
  extern "C" void rows_##SUFFIX(const T* x, const T* weight, const T* bias, const T* up, const T* up_bias,  \
                                const int32_t* index, T* out, int64_t slots, int64_t tokens, int64_t d,      \
                                int64_t out_stride, int64_t stride, int64_t up_stride, int activation,       \
                                int threads) {                                                               \
    rows(x, weight, bias, up, up_bias, index, out, slots, tokens, d, out_stride, stride, up_stride,          \
         activation, threads);                                                                               \
  }                                                                                                          \
  extern "C" void sum_##SUFFIX(const T* hidden, const T* weight, const int32_t* index, float* out,          \
                               int64_t slots, int64_t tokens, int64_t n, int64_t d, int64_t stride,          \
                               int compacted, int threads) {                                                 \
    sum(hidden, weight, index, out, slots, tokens, n, d, stride, compacted != 0, threads);                   \
  }                                                                                                          \
  extern "C" void select_##SUFFIX(const T* source, const void* down, const void* up, const float* bias,     \
                                  int32_t* index, int32_t* count, int64_t tokens, int64_t width,             \
                                  int64_t rank, int64_t n, int int8, int threads) {                          \
    if (int8)                                                                                                \
      select(source, (const int8_t*)down, (const int8_t*)up, bias, index, count, tokens, width, rank, n,     \
             threads);                                                                                       \
    else                                                                                                     \
      select(source, (const T*)down, (const T*)up, bias, index, count, tokens, width, rank, n, threads);     \
  }                                                                                                          \
  extern "C" void compact_##SUFFIX(const T* values, float threshold, int32_t* index, int32_t* count,        \
                                   int64_t tokens, int64_t n) {                                              \
    compact(values, threshold, index, count, tokens, n);                                                     \
  }

FOR_TYPE(float32, float)
FOR_TYPE(bfloat16, BFloat16)
#ifdef __FLT16_MAX__
FOR_TYPE(float16, _Float16)
#endif
