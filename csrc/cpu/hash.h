// The hash behind the checksums of a tape: see checksums.h. Compiled once per ISA; its value is the same on all.
#pragma once

#include "args.h"
#include "cpu/simd.h"

namespace fusedrnn::FUSEDRNN_TARGET {

typedef uint64_t Words __attribute__((vector_size(sizeof(Native<double>::Reg))));

// Of each word its lower half times its upper half, a product that compilers do not find.
FUSEDRNN_INLINE Words multiply_halves(Words w) {
#if FUSEDRNN_ISA_ID == FUSEDRNN_ISA_avx512
  return (Words)_mm512_mul_epu32((__m512i)w, (__m512i)(w >> 32));
#elif FUSEDRNN_ISA_ID == FUSEDRNN_ISA_avx2
  return (Words)_mm256_mul_epu32((__m256i)w, (__m256i)(w >> 32));
#elif FUSEDRNN_ISA_ID == FUSEDRNN_ISA_v2
  return (Words)_mm_mul_epu32((__m128i)w, (__m128i)(w >> 32));
#elif FUSEDRNN_ISA_ID == FUSEDRNN_ISA_neon
  return (Words)vmull_u32(vmovn_u64((uint64x2_t)w), vshrn_n_u64((uint64x2_t)w, 32));
#endif
}

// A multilinear hash: the sum, over 64-bit words, of the product of a word's halves, each xor its half of a key of the word's
// place. The word is also added plainly: if one half equals its key, the product is 0 and would hide the other half. It finds
// changes, not adversaries. Being a sum over words, it may be taken in any pieces. Eight sums side by side keep a vector unit
// busy, and last over all rows, which may be short.
template <class T>
uint64_t hash(const T* p, int64_t rows, ptrdiff_t stride, int64_t columns, uint64_t place) {
  constexpr int n = 8 * sizeof(uint64_t) / sizeof(Words), lanes = sizeof(Words) / sizeof(uint64_t);
  constexpr uint64_t step = 0x9e3779b97f4a7c15u;
  const int64_t bytes = columns * int64_t(sizeof(T)), row_words = ceil_div(stride * int64_t(sizeof(T)), 8);
  uint64_t total = 0;
  Words sum[n] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const char* const data = reinterpret_cast<const char*>(p + r * stride);
    const auto key_of = [&](int64_t word) { return (place + uint64_t(r * row_words + word) + 1) * step; };
    Words key[n], words[n];
    for (int i = 0; i < n; ++i)
      for (int l = 0; l < lanes; ++l) key[i][l] = key_of(i * lanes + l);
    int64_t done = 0;
    for (; done + int64_t(sizeof words) <= bytes; done += sizeof words) {
      __builtin_memcpy(words, data + done, sizeof words);
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) {
        sum[i] += multiply_halves(words[i] ^ key[i]) + words[i];
        key[i] += 8 * step;
      }
    }
    for (; done < bytes; done += sizeof(uint64_t)) {
      uint64_t word = 0;
      __builtin_memcpy(&word, data + done, bytes - done < 8 ? bytes - done : 8);
      const uint64_t w = word ^ key_of(done / 8);
      total += (w & 0xffffffffu) * (w >> 32) + word;
    }
  }
  for (int i = 0; i < n; ++i)
    for (int l = 0; l < lanes; ++l) total += sum[i][l];
  return total;
}

}  // namespace fusedrnn::FUSEDRNN_TARGET
