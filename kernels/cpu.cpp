// The ops on a CPU: each selected row is read once, where it lies, and summed in fp32.
//
// Compiled by Inductor's C++ toolchain on the first call (see cpu.py); plain pointers, no torch headers,
// so that this takes a second. The references beside the Triton kernels say what each function computes.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

// A product that is added is rounded once, in one instruction, where the processor has it; torch's flags forbid it.
#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

// By how much the bits of a nibble, among the last of 2^23, say too much, by its place. Not const: the compiler would
// read a constant from memory at each use, where loads are what limits a predictor.
extern "C" {
float dejavu_nibble_offset[4] = {(1 << 23) + 8, (1 << 23) + (8 << 4), (1 << 23) + (8 << 8), (1 << 23) + (8 << 12)};
}

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

// Asks for COUNT elements, to be read soon: into the second cache, which has room for what waits.
template <int COUNT, class W>
void ask(const W* from) {
  for (size_t at = 0; at < COUNT * sizeof(W); at += 64) __builtin_prefetch((const char*)from + at, 0, 2);
}

// y[r] = row[r] . x for ROWS rows at once. A core asks for more lines at a time along several rows than
// along one: half as much bandwidth again. It asks for the rows `next` meanwhile: what the processor itself looks
// ahead ends with the page, which may be the row.
template <int ROWS, class W>
void dots(const W* const* row, const W* const* next, const float* x, int64_t d, float* y) {
  Floats sums[ROWS][2] = {};
  int64_t i = 0;
  for (; i + 32 <= d; i += 32) {
    Floats x0 = load(x + i), x1 = load(x + i + 16);
    for (int r = 0; r < ROWS; ++r) {
      ask<32>(next[r] + i);
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

// The vector that `dots` multiplies a matrix of W with, `columns` of them, as `dots` expects it. Widening bytes
// to words is most of the time that int8 takes. Of words of nibbles no byte is moved: elements that belong to the
// same nibble of neighbouring words lie side by side, for as many words as `dots` takes at a time, and are scaled
// down by what the nibble's place in its half of a word multiplies it with.
template <class W, class T>
void spread(const T* from, int64_t columns, float* x) {
  if constexpr (!std::is_same_v<W, Nibbles>) {
    for (int64_t column = 0; column < columns; ++column) x[column] = float(from[column]);
  } else {
    constexpr float scale[4] = {1, 0x1p-4f, 0x1p-8f, 0x1p-12f};
    int64_t word = 0, words = columns / 8;
    for (int64_t lanes : {16, 8, 4, 1})
      for (; word + lanes <= words; word += lanes)
        for (int64_t nibble = 0; nibble < 8; ++nibble)
          for (int64_t lane = 0; lane < lanes; ++lane)
            *x++ = scale[nibble % 4] * float(from[nibble % 2 * 4 * words + (word + lane) * 4 + nibble / 2]);
  }
}

// Adds the words from `at` on, LANES at a time, to the first lanes of `totals`; returns where it stopped.
template <int LANES, int ROWS>
int64_t add_words(const Nibbles* const* row, const Nibbles* const* next, const float* x, int64_t at, int64_t words,
                  Floats* totals) {
  if (at + LANES > words) return at;
  Lanes<LANES, float> sums[ROWS];
  for (int r = 0; r < ROWS; ++r) std::memcpy(&sums[r], &totals[r], sizeof sums[r]);
  for (; at + LANES <= words; at += LANES) {
    Lanes<LANES, int32_t> word[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      std::memcpy(&word[r], row[r] + at, sizeof word[r]);
      if constexpr (LANES == 16) ask<LANES>(next[r] + at);
      // With its sign bit flipped, a nibble of two's complement is 8 more than it says.
      word[r] ^= int32_t(0x88888888);
    }
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
      for (int nibble = 0; nibble < 4; ++nibble) {
        Lanes<LANES, float> factor;
        std::memcpy(&factor, x + 8 * at + (4 * half + nibble) * LANES, sizeof factor);
        for (int r = 0; r < ROWS; ++r) {
          // As the last bits of 2^23: nothing is shifted or converted.
          Lanes<LANES, int32_t> bits = (word[r] & (15 << 4 * nibble)) | 0x4b000000;
          Lanes<LANES, float> value;
          std::memcpy(&value, &bits, sizeof value);
          sums[r] += (value - dejavu_nibble_offset[nibble]) * factor;
        }
      }
      for (int r = 0; r < ROWS; ++r) word[r] >>= 16;
    }
  }
  for (int r = 0; r < ROWS; ++r) std::memcpy(&totals[r], &sums[r], sizeof sums[r]);
  return at;
}

template <int ROWS>
void dots(const Nibbles* const* row, const Nibbles* const* next, const float* x, int64_t d, float* y) {
  Floats totals[ROWS] = {};
  int64_t words = d / 8, at = add_words<16, ROWS>(row, next, x, 0, words, totals);
  at = add_words<8, ROWS>(row, next, x, at, words, totals);
  at = add_words<4, ROWS>(row, next, x, at, words, totals);
  add_words<1, ROWS>(row, next, x, at, words, totals);
  for (int r = 0; r < ROWS; ++r) y[r] = folded<16>(totals[r]);
}

// The same for `count` <= 4 rows.
template <class W>
void some_dots(const W* const* row, const W* const* next, int64_t count, const float* x, int64_t d, float* y) {
  if (count == 4) return dots<4>(row, next, x, d, y);
  for (int64_t r = 0; r < count; ++r) dots<1>(row + r, next + r, x, d, y + r);
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
    const T *row[4], *up_row[4], *next[4], *next_up[4];
    for (int64_t r = 0; r < count; ++r) {
      int64_t later = first + 4 + r < slots ? first + 4 + r : slots - 1;
      unit[r] = index ? index[first + r] : first + r;
      later = index ? index[later] : later;
      row[r] = weight + unit[r] * stride;
      up_row[r] = up + unit[r] * up_stride;
      next[r] = weight + later * stride;
      next_up[r] = up + later * up_stride;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      float y[4], u[4];
      some_dots(row, next, count, wide.data() + t * d, d, y);
      if (up) some_dots(up_row, next_up, count, wide.data() + t * d, d, u);
      for (int64_t r = 0; r < count; ++r) {
        float value = activate(y[r] + (bias ? float(bias[unit[r]]) : 0), activation);
        if (up) value *= u[r] + (up_bias ? float(up_bias[unit[r]]) : 0);
        out[t * out_stride + (in_place ? unit[r] : first + r)] = T(value);
      }
    }
  }
}

// y[c] += sum over r of factor[r] * row[r][c], for the columns from `begin` to `end` of ROWS rows: of four at once
// the sums are loaded and stored a quarter as often. Asks for the rows `next` meanwhile.
template <int ROWS, class T>
void add_rows(const T* const* row, const T* const* next, const float* factor, int64_t begin, int64_t end, float* y) {
  int64_t c = begin;
  for (; c + 32 <= end; c += 32) {
    Floats low = load(y + c), high = load(y + c + 16);
    for (int r = 0; r < ROWS; ++r) {
      ask<32>(next[r] + c);
      low += factor[r] * load(row[r] + c);
      high += factor[r] * load(row[r] + c + 16);
    }
    std::memcpy(y + c, &low, sizeof low);
    std::memcpy(y + c + 16, &high, sizeof high);
  }
  if (c + 16 <= end) {
    Floats total = load(y + c);
    for (int r = 0; r < ROWS; ++r) total += factor[r] * load(row[r] + c);
    std::memcpy(y + c, &total, sizeof total);
    c += 16;
  }
  for (; c < end; ++c)
    for (int r = 0; r < ROWS; ++r) y[c] += factor[r] * float(row[r][c]);
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
      const T *w[4], *next[4];
      float factors[4];
      for (; slot + 4 <= slots; slot += 4) {
        for (int64_t r = 0; r < 4; ++r) {
          w[r] = row(slot + r);
          next[r] = row(slot + 4 + r < slots ? slot + 4 + r : slots - 1);
          factors[r] = factor(slot + r);
        }
        add_rows<4>(w, next, factors, begin, end, y);
      }
      for (; slot < slots; ++slot) {
        w[0] = row(slot);
        factors[0] = factor(slot);
        add_rows<1>(w, w, factors, begin, end, y);
      }
    }
  }
}

// See sketch.py. `numbers` [5, n]: of the gate, of the other factor, and the mean square that this misses.
inline float sketched(float gate, float up, const float* numbers, int64_t n, int64_t unit, int activation) {
  const float *a = numbers + unit, *b = a + n, *c = b + n, *d = c + n, *f = d + n;
  float other = up * *c + *d;
  return std::fabs(activate(gate * *a + *b, activation)) * std::sqrt(other * other + *f);
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// A vector in balanced base 256: step * (d0 + 256 d1 + 65536 d2). An instruction multiplies 64 pairs of bytes.
struct Digits {
  std::vector<int8_t> digit[3];
  double step, sum;

  template <class T>
  Digits(const T* x, int64_t width) : step(0), sum(0) {
    float largest = 1e-30f;
    bool finite = true;
    for (int64_t i = 0; i < width; ++i) {
      float size = std::fabs(float(x[i]));
      finite &= std::isfinite(size);
      largest = size > largest ? size : largest;
    }
    for (auto& bytes : digit) bytes.resize(width);
    step = finite ? largest * 0x1p-20 : NAN;
    for (int64_t i = 0; finite && i < width; ++i) {
      int32_t whole = int32_t(std::lrint(float(x[i]) / step));
      sum += whole;
      for (auto& bytes : digit) {
        bytes[i] = int8_t(whole);
        whole = (whole - bytes[i]) >> 8;
      }
    }
  }
};

// The codes of a row times the vector, in steps: BITS of 4, plus 8, or of 2, from the low bits of `bytes` bytes up.
template <int BITS>
double whole_dot(const uint8_t* row, const Digits& x, int64_t bytes) {
  __m512i sums[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1), flip = _mm512_set1_epi8(BITS == 4 ? 8 : 0);
  for (int64_t i = 0; i < bytes; i += 64) {
    __mmask64 inside = bytes - i >= 64 ? ~__mmask64(0) : (__mmask64(1) << (bytes - i)) - 1;
    __m512i packed = _mm512_maskz_loadu_epi8(inside, row + i);
    for (int part = 0; part < 8 / BITS; ++part) {
      __m512i codes = _mm512_xor_si512(_mm512_and_si512(packed, mask), flip);
      for (int k = 0; k < 3; ++k)
        sums[k] = _mm512_dpbusd_epi32(
            sums[k], codes, _mm512_maskz_loadu_epi8(inside, x.digit[k].data() + part * bytes + i));
      packed = _mm512_srli_epi16(packed, BITS);
    }
  }
  return _mm512_reduce_add_epi32(sums[0]) + 256.0 * _mm512_reduce_add_epi32(sums[1]) +
         65536.0 * _mm512_reduce_add_epi32(sums[2]);
}

template <class T>
void sketch(const T* x, const Nibbles* gate, const uint8_t* up, const float* numbers, float* score, int64_t tokens,
            int64_t width, int64_t n, int activation, int threads) {
  std::vector<Digits> digits;
  for (int64_t t = 0; t < tokens; ++t) digits.emplace_back(x + t * width, width);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t unit = 0; unit < n; ++unit)
    for (int64_t t = 0; t < tokens; ++t) {
      const Digits& of = digits[t];
      double g = whole_dot<4>((const uint8_t*)gate + unit * (width / 2), of, width / 2) - 8 * of.sum;
      double u = whole_dot<2>(up + unit * (width / 4), of, width / 4) - 1.5 * of.sum;
      score[t * n + unit] = sketched(float(g * of.step), float(u * of.step), numbers, n, unit, activation);
    }
}

#else

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

template <class T>
void sketch(const T* x, const Nibbles* gate, const uint8_t* up, const float* numbers, float* score, int64_t tokens,
            int64_t width, int64_t n, int activation, int threads) {
  auto wide = widened(x, tokens * width);
  std::vector<float> placed(tokens * width), middle(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += wide[t * width + i];
    spread<Nibbles>(x + t * width, width, placed.data() + t * width);
    middle[t] = float(1.5 * sum);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < n; first += 4) {
    // The last four rows are whole too: where four doesn't divide n, some are computed again, and not stored.
    int64_t begin = first + 4 <= n ? first : n - 4;
    const Nibbles *row[4], *next[4];
    for (int64_t r = 0; r < 4; ++r) {
      row[r] = gate + (begin + r) * stored<Nibbles>(width);
      next[r] = row[r] + 4 * stored<Nibbles>(width);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      float g[4], u[4];
      dots<4>(row, next, placed.data() + t * width, width, g);
      pair_dots(up + begin * (width / 4), wide.data() + t * width, width / 4, u);
      for (int64_t r = first - begin; r < 4; ++r)
        score[t * n + begin + r] = sketched(g[r], u[r] - middle[t], numbers, n, begin + r, activation);
    }
  }
}

#endif

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
  for (int64_t t = 0; t < tokens; ++t) spread<W>(source + t * width, width, wide.data() + t * width);
  std::vector<uint8_t> keep(n);
  auto rows_at = [](const W* matrix, int64_t first, int64_t columns, const W** row) {
    for (int64_t r = 0; r < 4; ++r) row[r] = matrix + (first + r) * stored<W>(columns);
  };
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rank; first += 4) {
      const W *row[4], *next[4];
      rows_at(down, first, width, row);
      rows_at(down, first + 4, width, next);
      for (int64_t t = 0; t < tokens; ++t)
        some_dots(row, next, rank - first < 4 ? rank - first : 4, wide.data() + t * width, width,
                  inner.data() + t * rank + first);
    }
    std::vector<float> middle(tokens * rank);
    for (int64_t t = 0; t < tokens; ++t) spread<W>(inner.data() + t * rank, rank, middle.data() + t * rank);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < n; first += 4) {
      int64_t some = n - first < 4 ? n - first : 4;
      const W *row[4], *next[4];
      rows_at(up, first, rank, row);
      rows_at(up, first + 4, rank, next);
      for (int64_t t = 0; t < tokens; ++t) {
        float score[4];
        some_dots(row, next, some, middle.data() + t * rank, rank, score);
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

// e^x for x <= 0: 2^n times a polynomial, as accurate as floats are. Below -86 it is e^-86, nothing beside 1.
Floats exponential(Floats x) {
  x = x < -86.0f ? Floats{} - 86.0f : x;
  // The last bits of `shifted` are n, the integer nearest to x / ln 2.
  Floats shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  Floats rest = x - n * 0.693145752f - n * 1.42860677e-6f;
  Floats y = rest * 1.98412698e-4f + 1.38888889e-3f;
  y = y * rest + 8.33333333e-3f;
  y = y * rest + 4.16666667e-2f;
  y = y * rest + 0.166666667f;
  y = y * rest + 0.5f;
  y = y * rest + 1.0f;
  y = y * rest + 1.0f;
  Sixteen<int32_t> bits, exponent;
  std::memcpy(&bits, &y, sizeof bits);
  std::memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 23;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// One query per head. A slot that the mask rules out is not read; a head without any slot gives 0, and so
// does one that isn't `chosen`, of which nothing is read.
template <class T>
void attention(const T* q, const T* k, const T* v, const float* added, const bool* kept,
               const bool* chosen, T* out, int64_t batch, int64_t heads, int64_t kv_heads, int64_t slots,
               int64_t d, int64_t d_out, const int64_t* strides, float scale, float softcap, int threads) {
  constexpr int64_t AHEAD = 32;  // slots whose keys are asked for, a few KB
  const int64_t *q_at = strides, *k_at = strides + 2, *v_at = strides + 5, *mask_at = strides + 8;
  // Chosen heads lie anywhere: threads share them, not all heads.
  std::vector<int64_t> running;
  for (int64_t at = 0; at < batch * heads; ++at) {
    if (!chosen || chosen[at])
      running.push_back(at);
    else
      for (int64_t c = 0; c < d_out; ++c) out[at * d_out + c] = T(0.0f);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (size_t i = 0; i < running.size(); ++i) {
    int64_t b = running[i] / heads, head = running[i] % heads, group = head * kv_heads / heads;
    const T *keys = k + b * k_at[0] + group * k_at[1], *values = v + b * v_at[0] + group * v_at[1];
    const int64_t mask = b * mask_at[0] + head * mask_at[1];
    auto query = widened(q + b * q_at[0] + head * q_at[1], d);
    for (auto& element : query) element *= scale;
    std::vector<int64_t> live;
    live.reserve(slots);
    for (int64_t slot = 0; slot < slots; ++slot) {
      int64_t at = mask + slot * mask_at[2];
      if (kept ? kept[at] : !added || added[at] != -INFINITY) live.push_back(slot);
    }
    int64_t held = int64_t(live.size());
    // Scores, then weights; those past the last slot, up to a whole vector, weigh nothing.
    std::vector<float> weight((held + 15) / 16 * 16), sum(d_out);
    float largest = -INFINITY, total = 0;
    for (int64_t first = 0; first < held; first += 4) {
      int64_t some = held - first < 4 ? held - first : 4;
      const T *row[4], *next[4];
      float y[4];
      for (int64_t r = 0; r < some; ++r) {
        row[r] = keys + live[first + r] * k_at[2];
        next[r] = keys + live[first + AHEAD + r < held ? first + AHEAD + r : held - 1] * k_at[2];
      }
      some_dots(row, next, some, query.data(), d, y);
      for (int64_t r = 0; r < some; ++r) {
        float score = softcap ? softcap * std::tanh(y[r]) : y[r];
        if (added) score += added[mask + live[first + r] * mask_at[2]];
        weight[first + r] = score;
        // "not below", so that NaN is kept
        if (!(score <= largest)) largest = score;
      }
    }
    for (int64_t first = 0; first < held; first += 16) {
      Floats some = exponential(load(weight.data() + first) - largest);
      std::memcpy(weight.data() + first, &some, sizeof some);
    }
    for (int64_t at = 0; at < held; ++at) total += weight[at];
    int64_t at = 0;
    for (; at + 4 <= held; at += 4) {
      const T *row[4], *next[4];
      for (int64_t r = 0; r < 4; ++r) {
        row[r] = values + live[at + r] * v_at[2];
        next[r] = values + live[at + AHEAD + r < held ? at + AHEAD + r : held - 1] * v_at[2];
      }
      add_rows<4>(row, next, weight.data() + at, 0, d_out, sum.data());
    }
    for (; at < held; ++at) {
      const T* row = values + live[at] * v_at[2];
      add_rows<1>(&row, &row, weight.data() + at, 0, d_out, sum.data());
    }
    for (int64_t c = 0; c < d_out; ++c) out[running[i] * d_out + c] = T(total == 0 ? 0 : sum[c] / total);
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
