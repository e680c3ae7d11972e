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

template <int LANES, class E>
using Lanes __attribute__((vector_size(LANES * sizeof(E)))) = E;

// The sum of all lanes, half to half.
template <int LANES>
inline float folded(Lanes<LANES, float> sum) {
  if constexpr (LANES == 1) {
    return sum[0];
  } else {
    Lanes<LANES / 2, float> low, high;
    std::memcpy(&low, &sum, sizeof low);
    std::memcpy(&high, (const char*)&sum + sizeof low, sizeof high);
    return folded<LANES / 2>(low + high);
  }
}

// y[r] = row[r] . x for ROWS rows at once. A core asks for more lines at a time along several rows than
// along one: half as much bandwidth again.
template <int ROWS, class W>
void dots(const W* const* row, const float* x, int64_t d, float* y) {
  Floats sums[ROWS][2] = {};
  int64_t i = 0;
  for (; i + 32 <= d; i += 32) {
    Floats x0 = load(x + i), x1 = load(x + i + 16);
    for (int r = 0; r < ROWS; ++r) {
      sums[r][0] += load(row[r] + i) * x0;
      sums[r][1] += load(row[r] + i + 16) * x1;
    }
  }
  if (i + 16 <= d) {
    for (int r = 0; r < ROWS; ++r) sums[r][0] += load(row[r] + i) * load(x + i);
    i += 16;
  }
  for (int r = 0; r < ROWS; ++r) y[r] = folded<16>(sums[r][0] + sums[r][1]);
  for (; i < d; ++i)
    for (int r = 0; r < ROWS; ++r) y[r] += float(row[r][i]) * x[i];
}

// Eight columns in four signed bits each: four bytes of each half of a packed row (see nibbles.py).
struct Nibbles {
  int32_t word;
};

template <class W>
constexpr int64_t stored(int64_t columns) {
  return columns;
}

template <>
constexpr int64_t stored<Nibbles>(int64_t columns) {
  return columns / 8;
}

// Element `column` of the vector that `dots` multiplies a matrix of W with, where `dots` expects it. Widening bytes
// to words is most of the time that int8 takes. Of words of nibbles no byte is moved: elements that belong to the
// same nibble of neighbouring words lie side by side, for as many words as `dots` takes at a time, and are scaled
// down by what the nibble's place in its half of a word multiplies it with.
template <class W>
void put(float* x, int64_t column, int64_t columns, float value) {
  x[column] = value;
}

template <>
void put<Nibbles>(float* x, int64_t column, int64_t columns, float value) {
  constexpr float scale[4] = {1, 0x1p-4f, 0x1p-8f, 0x1p-12f};
  int64_t half = columns / 2, high = column >= half, byte = column - high * half, nibble = byte % 4 * 2 + high;
  int64_t word = byte / 4, words = half / 4, begin = 0;
  for (int64_t lanes : {16, 8, 4, 1}) {
    int64_t end = begin + (words - begin) / lanes * lanes;
    if (word < end) {
      int64_t block = begin + (word - begin) / lanes * lanes;
      x[8 * block + nibble * lanes + word - block] = value * scale[nibble % 4];
      return;
    }
    begin = end;
  }
}

// Adds the words from `at` on, LANES at a time, to the first lanes of `totals`; returns where it stopped.
template <int LANES, int ROWS>
int64_t add_words(const Nibbles* const* row, const float* x, int64_t at, int64_t words, Floats* totals) {
  if (at + LANES > words) return at;
  Lanes<LANES, float> sums[ROWS];
  for (int r = 0; r < ROWS; ++r) std::memcpy(&sums[r], &totals[r], sizeof sums[r]);
  for (; at + LANES <= words; at += LANES) {
    Lanes<LANES, int32_t> word[ROWS][2];
    for (int r = 0; r < ROWS; ++r) {
      std::memcpy(&word[r][0], row[r] + at, sizeof word[r][0]);
      // With its sign bit flipped, a nibble of two's complement is 8 more than it says.
      word[r][0] ^= int32_t(0x88888888);
      word[r][1] = word[r][0] >> 16;
    }
#pragma GCC unroll 8
    for (int nibble = 0; nibble < 8; ++nibble) {
      const int shift = nibble % 4 * 4;
      Lanes<LANES, float> factor;
      std::memcpy(&factor, x + 8 * at + nibble * LANES, sizeof factor);
      for (int r = 0; r < ROWS; ++r) {
        // As the last bits of 2^23: nothing is shifted or converted.
        Lanes<LANES, int32_t> bits = (word[r][nibble / 4] & (15 << shift)) | 0x4b000000;
        Lanes<LANES, float> value;
        std::memcpy(&value, &bits, sizeof value);
        sums[r] += (value - float((1 << 23) + (8 << shift))) * factor;
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) std::memcpy(&totals[r], &sums[r], sizeof sums[r]);
  return at;
}

template <int ROWS>
void dots(const Nibbles* const* row, const float* x, int64_t d, float* y) {
  Floats totals[ROWS] = {};
  int64_t words = d / 8, at = add_words<16, ROWS>(row, x, 0, words, totals);
  at = add_words<8, ROWS>(row, x, at, words, totals);
  at = add_words<4, ROWS>(row, x, at, words, totals);
  add_words<1, ROWS>(row, x, at, words, totals);
  for (int r = 0; r < ROWS; ++r) y[r] = folded<16>(totals[r]);
}

// The same for `count` <= 4 rows.
template <class W>
void some_dots(const W* const* row, int64_t count, const float* x, int64_t d, float* y) {
  if (count == 4) return dots<4>(row, x, d, y);
  for (int64_t r = 0; r < count; ++r) dots<1>(row + r, x, d, y + r);
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
          int64_t up_stride, int activation, bool in_place, int threads) {
  auto wide = widened(x, tokens * d);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < slots; first += 4) {
    int64_t count = slots - first < 4 ? slots - first : 4, unit[4];
    const T *row[4], *up_row[4];
    for (int64_t r = 0; r < count; ++r) {
      unit[r] = index ? index[first + r] : first + r;
      row[r] = weight + unit[r] * stride;
      up_row[r] = up + unit[r] * up_stride;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      float y[4], u[4];
      some_dots(row, count, wide.data() + t * d, d, y);
      if (up) some_dots(up_row, count, wide.data() + t * d, d, u);
      for (int64_t r = 0; r < count; ++r) {
        float value = activate(y[r] + (bias ? float(bias[unit[r]]) : 0), activation);
        if (up) value *= u[r] + (up_bias ? float(up_bias[unit[r]]) : 0);
        out[t * out_stride + (in_place ? unit[r] : first + r)] = T(value);
      }
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

// y[r] = row[r] . x for 4 rows of two bits a column (see pairs.py), as 0 to 3; `bytes` a row.
void pair_dots(const uint8_t* row, const float* x, int64_t bytes, float* y) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    Sixteen<int32_t> codes[4];
    for (int r = 0; r < 4; ++r) {
      Sixteen<uint8_t> narrow;
      std::memcpy(&narrow, row + r * bytes + i, sizeof narrow);
      codes[r] = __builtin_convertvector(__builtin_convertvector(narrow, Sixteen<int16_t>), Sixteen<int32_t>);
    }
    for (int quarter = 0; quarter < 4; ++quarter) {
      Floats factor = load(x + quarter * bytes + i);
      for (int r = 0; r < 4; ++r) {
        sums[r] += __builtin_convertvector(codes[r] & 3, Floats) * factor;
        codes[r] >>= 2;
      }
    }
  }
  for (int r = 0; r < 4; ++r) y[r] = folded<16>(sums[r]);
  for (; i < bytes; ++i)
    for (int r = 0; r < 4; ++r)
      for (int quarter = 0; quarter < 4; ++quarter)
        y[r] += float(row[r * bytes + i] >> 2 * quarter & 3) * x[quarter * bytes + i];
}

// See sketch.py. `numbers` [5, n]: of the gate, of the other factor, and the mean square that this misses.
template <class T>
void sketch(const T* x, const Nibbles* gate, const uint8_t* up, const float* numbers, float* score, int64_t tokens,
            int64_t width, int64_t n, int activation, int threads) {
  auto wide = widened(x, tokens * width);
  std::vector<float> placed(tokens * width), middle(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) {
      put<Nibbles>(placed.data() + t * width, i, width, wide[t * width + i]);
      sum += wide[t * width + i];
    }
    middle[t] = float(1.5 * sum);
  }
  const float *a = numbers, *b = a + n, *c = b + n, *d = c + n, *f = d + n;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < n; first += 4) {
    // The last four rows are whole too: where four doesn't divide n, some are computed again, and not stored.
    int64_t begin = first + 4 <= n ? first : n - 4;
    const Nibbles* row[4];
    for (int64_t r = 0; r < 4; ++r) row[r] = gate + (begin + r) * stored<Nibbles>(width);
    for (int64_t t = 0; t < tokens; ++t) {
      float g[4], u[4];
      dots<4>(row, placed.data() + t * width, width, g);
      pair_dots(up + begin * (width / 4), wide.data() + t * width, width / 4, u);
      for (int64_t r = first - begin; r < 4; ++r) {
        int64_t unit = begin + r;
        float other = (u[r] - middle[t]) * c[unit] + d[unit];
        float gated = activate(g[r] * a[unit] + b[unit], activation);
        score[t * n + unit] = std::fabs(gated) * std::sqrt(other * other + f[unit]);
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
  std::vector<float> wide(tokens * width), inner(tokens * rank);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t column = 0; column < width; ++column)
      put<W>(wide.data() + t * width, column, width, float(source[t * width + column]));
  std::vector<uint8_t> keep(n);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rank; first += 4) {
      int64_t some = rank - first < 4 ? rank - first : 4;
      const W* row[4];
      for (int64_t r = 0; r < 4; ++r) row[r] = down + (first + r) * stored<W>(width);
      for (int64_t t = 0; t < tokens; ++t) {
        float y[4];
        some_dots(row, some, wide.data() + t * width, width, y);
        for (int64_t r = 0; r < some; ++r) put<W>(inner.data() + t * rank, first + r, rank, y[r]);
      }
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < n; first += 4) {
      int64_t some = n - first < 4 ? n - first : 4;
      const W* row[4];
      for (int64_t r = 0; r < 4; ++r) row[r] = up + (first + r) * stored<W>(rank);
      for (int64_t t = 0; t < tokens; ++t) {
        float score[4];
        some_dots(row, some, inner.data() + t * rank, rank, score);
        for (int64_t r = 0; r < some; ++r)
          // "not below", so that NaN is kept
          keep[first + r] |= !(score[r] + bias[first + r] <= 0);
      }
    }
  }
  *count = listed(keep, index);
}

template <class T>
void compact(const T* values, float threshold, const float* scale, int32_t* index, int32_t* count, int64_t tokens,
             int64_t n) {
  std::vector<uint8_t> keep(n);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t unit = 0; unit < n; ++unit)
      keep[unit] |= !(std::fabs(float(values[t * n + unit])) * (scale ? scale[unit] : 1.0f) <= threshold);
  *count = listed(keep, index);
}

// One query per head. A slot that the mask rules out is not read; a head without any slot gives 0, and so
// does one that isn't `chosen`, of which nothing is read.
template <class T>
void attention(const T* q, const T* k, const T* v, const float* added, const bool* kept,
               const bool* chosen, T* out, int64_t batch, int64_t heads, int64_t kv_heads, int64_t slots,
               int64_t d, int64_t d_out, const int64_t* strides, float scale, float softcap, int threads) {
  const int64_t *q_at = strides, *k_at = strides + 2, *v_at = strides + 5, *mask_at = strides + 8;
  // Chosen heads lie anywhere: they are dealt out one by one.
#pragma omp parallel for num_threads(threads) schedule(dynamic) collapse(2)
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t head = 0; head < heads; ++head) {
      T* y = out + (b * heads + head) * d_out;
      if (chosen && !chosen[b * heads + head]) {
        for (int64_t c = 0; c < d_out; ++c) y[c] = T(0.0f);
        continue;
      }
      int64_t group = head * kv_heads / heads, mask = b * mask_at[0] + head * mask_at[1];
      auto query = widened(q + b * q_at[0] + head * q_at[1], d);
      for (auto& element : query) element *= scale;
      std::vector<float> score(slots);
      std::vector<int64_t> live;
      live.reserve(slots);
      for (int64_t slot = 0; slot < slots; ++slot) {
        int64_t at = mask + slot * mask_at[2];
        score[slot] = kept ? (kept[at] ? 0 : -INFINITY) : added ? added[at] : 0;
        if (score[slot] != -INFINITY) live.push_back(slot);
      }
      float largest = -INFINITY;
      int64_t held = int64_t(live.size());
      for (int64_t first = 0; first < held; first += 4) {
        int64_t some = held - first < 4 ? held - first : 4;
        const T* row[4];
        float y[4];
        for (int64_t r = 0; r < some; ++r) row[r] = k + b * k_at[0] + group * k_at[1] + live[first + r] * k_at[2];
        some_dots(row, some, query.data(), d, y);
        for (int64_t r = 0; r < some; ++r) {
          float total = score[live[first + r]] += softcap ? softcap * std::tanh(y[r]) : y[r];
          // "not below", so that NaN is kept
          if (!(total <= largest)) largest = total;
        }
      }
      std::vector<float> sum(d_out);
      float total = 0;
      for (int64_t slot : live) {
        float weight = std::exp(score[slot] - largest);
        total += weight;
        const T* row = v + b * v_at[0] + group * v_at[1] + slot * v_at[2];
        int64_t c = 0;
        for (; c + 16 <= d_out; c += 16) {
          Floats next = load(sum.data() + c) + weight * load(row + c);
          std::memcpy(sum.data() + c, &next, sizeof next);
        }
        for (; c < d_out; ++c) sum[c] += weight * float(row[c]);
      }
      for (int64_t c = 0; c < d_out; ++c) y[c] = T(total == 0 ? 0 : sum[c] / total);
    }
}

}  // namespace

#define FOR_TYPE(SUFFIX, T)                                                                                  \
  extern "C" void rows_##SUFFIX(const T* x, const T* weight, const T* bias, const T* up, const T* up_bias,  \
                                const int32_t* index, T* out, int64_t slots, int64_t tokens, int64_t d,      \
                                int64_t out_stride, int64_t stride, int64_t up_stride, int activation,       \
                                int in_place, int threads) {                                                 \
    rows(x, weight, bias, up, up_bias, index, out, slots, tokens, d, out_stride, stride, up_stride,          \
         activation, in_place != 0, threads);                                                                \
  }                                                                                                          \
  extern "C" void sum_##SUFFIX(const T* hidden, const T* weight, const int32_t* index, float* out,          \
                               int64_t slots, int64_t tokens, int64_t n, int64_t d, int64_t stride,          \
                               int compacted, int threads) {                                                 \
    sum(hidden, weight, index, out, slots, tokens, n, d, stride, compacted != 0, threads);                   \
  }                                                                                                          \
  extern "C" void select_##SUFFIX(const T* source, const void* down, const void* up, const float* bias,     \
                                  int32_t* index, int32_t* count, int64_t tokens, int64_t width,             \
                                  int64_t rank, int64_t n, int bits, int threads) {                          \
    if (bits == 4)                                                                                           \
      select(source, (const Nibbles*)down, (const Nibbles*)up, bias, index, count, tokens, width, rank, n,   \
             threads);                                                                                       \
    else if (bits == 8)                                                                                      \
      select(source, (const int8_t*)down, (const int8_t*)up, bias, index, count, tokens, width, rank, n,     \
             threads);                                                                                       \
    else                                                                                                     \
      select(source, (const T*)down, (const T*)up, bias, index, count, tokens, width, rank, n, threads);     \
  }                                                                                                          \
  extern "C" void sketch_##SUFFIX(const T* x, const void* gate, const uint8_t* up, const float* numbers,     \
                                  float* score, int64_t tokens, int64_t width, int64_t n, int activation,   \
                                  int threads) {                                                            \
    sketch(x, (const Nibbles*)gate, up, numbers, score, tokens, width, n, activation, threads);             \
  }                                                                                                         \
  extern "C" void compact_##SUFFIX(const T* values, float threshold, const float* scale, int32_t* index,    \
                                   int32_t* count, int64_t tokens, int64_t n) {                              \
    compact(values, threshold, scale, index, count, tokens, n);                                              \
  }                                                                                                          \
  extern "C" void attention_##SUFFIX(const T* q, const T* k, const T* v, const float* added,                \
                                     const bool* kept, const bool* chosen, T* out, int64_t batch, int64_t heads,               \
                                     int64_t kv_heads, int64_t slots, int64_t d, int64_t d_out,              \
                                     const int64_t* strides, float scale, float softcap, int threads) {      \
    attention(q, k, v, added, kept, chosen, out, batch, heads, kv_heads, slots, d, d_out, strides, scale,    \
              softcap, threads);                                                                             \
  }

FOR_TYPE(float32, float)
FOR_TYPE(bfloat16, BFloat16)
#ifdef __FLT16_MAX__
FOR_TYPE(float16, _Float16)
#endif
