/* Products of matrices in MXFP4, straight from the bytes of a checkpoint. README.md says how this file is built.

   32 weights stand in 16 bytes, two codes of 4 bits each, the lower half of a byte first, and share one byte of scale. A weight is the
   number of its code times the number of its scale, which is exact in float32. */
#include <stdint.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma")))
#else
#include <arm_neon.h>
#define TARGET
#endif
#define INLINE static inline __attribute__((always_inline)) TARGET

/* A vector of 16 numbers is two or four registers: the compiler divides it. */
typedef float floats __attribute__((vector_size(64)));
typedef float lanes __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));
typedef int8_t wholes __attribute__((vector_size(16)));

/* W [out, in]: codes [out, in / 2], scales [out, in / 32]; `half` has half the number of each of the 256 scales. Nothing is aligned. */
struct matrix {
  const uint8_t *codes, *scales;
  const float *half;
  int64_t out, in;
};

/* What holds for 32 weights: those with even numbers come first, then those with odd ones. Rows of x have this order too. */
struct group {
  floats even, odd;
};

INLINE floats load(const float *from) {
  floats v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

INLINE wholes doubled(bytes nibbles) { /* twice the number of each code, which is whole */
  static const int8_t numbers[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
#if defined(__x86_64__)
  return (wholes)_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)numbers), (__m128i)nibbles);
#else
  return (wholes)vqtbl1q_s8(vld1q_s8(numbers), (uint8x16_t)nibbles);
#endif
}

INLINE struct group group_at(const uint8_t *codes) {
  bytes c;
  __builtin_memcpy(&c, codes, sizeof c);
  return (struct group){__builtin_convertvector(doubled(c & 15), floats), __builtin_convertvector(doubled(c >> 4), floats)};
}

INLINE float sum(floats v) {
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) v[i] += v[i + step];
  return v[0];
}

/* A few rows of x: each weight is used where it is made. Scales are applied to sums of 32 products if that is less work. */
#define FEW(R)                                                                                              \
  TARGET static void few_##R(const struct matrix *w, const float *x, float *y, int64_t stride) {            \
    const int64_t groups = w->in / 32;                                                                      \
    for (int64_t o = 0; o < w->out; o++) {                                                                  \
      floats sums[R] = {{0}};                                                                               \
      for (int64_t g = 0; g < groups; g++) {                                                                \
        struct group v = group_at(w->codes + 16 * (o * groups + g));                                        \
        const float scale = w->half[w->scales[o * groups + g]];                                             \
        if (R > 2) v.even *= scale, v.odd *= scale;                                                         \
        for (int r = 0; r < R; r++) {                                                                       \
          const float *at = x + r * w->in + 32 * g;                                                         \
          floats products = v.even * load(at) + v.odd * load(at + 16);                                      \
          sums[r] += R > 2 ? products : products * scale;                                                   \
        }                                                                                                   \
      }                                                                                                     \
      for (int r = 0; r < R; r++) y[r * stride + o] = sum(sums[r]);                                         \
    }                                                                                                       \
  }
FEW(1) FEW(2) FEW(3) FEW(4)
typedef void few(const struct matrix *, const float *, float *, int64_t);
static few *const FEW_ROWS[4] = {few_1, few_2, few_3, few_4};

/* Many rows of x: a block of W that fits the cache is made once and used for all of them. */
#define DOWN 12
#define ACROSS 768

TARGET static void make_block(const struct matrix *w, int64_t o, int64_t down, int64_t k, int64_t across, float *block) {
  const int64_t groups = w->in / 32;
  for (int64_t i = 0; i < down; i++)
    for (int64_t j = 0; j < across; j += 32) {
      const int64_t at = (o + i) * groups + (k + j) / 32;
      struct group v = group_at(w->codes + 16 * at);
      v.even *= w->half[w->scales[at]], v.odd *= w->half[w->scales[at]];
      __builtin_memcpy(block + i * ACROSS + j, &v, sizeof v);
    }
}

/* y [R, M] += x [R, across] block [M, across]^T. Twelve sums and what is multiplied fill the registers. */
#define TILE(M, R)                                                                                          \
  TARGET static void tile_##M##_##R(const float *block, const float *x, int64_t in, int64_t across, float *y, int64_t stride) { \
    lanes sums[M][R] = {{{0}}};                                                                             \
    for (int64_t k = 0; k < across; k += 8) {                                                               \
      lanes u[M], v;                                                                                        \
      for (int o = 0; o < M; o++) __builtin_memcpy(&u[o], block + o * ACROSS + k, sizeof v);                \
      for (int r = 0; r < R; r++) {                                                                         \
        __builtin_memcpy(&v, x + r * in + k, sizeof v);                                                     \
        for (int o = 0; o < M; o++) sums[o][r] += u[o] * v;                                                 \
      }                                                                                                     \
    }                                                                                                       \
    for (int o = 0; o < M; o++)                                                                             \
      for (int r = 0; r < R; r++) {                                                                         \
        floats v = {0};                                                                                     \
        __builtin_memcpy(&v, &sums[o][r], sizeof sums[o][r]);                                               \
        y[r * stride + o] += sum(v);                                                                        \
      }                                                                                                     \
  }
TILE(1, 1) TILE(1, 2) TILE(1, 3) TILE(1, 4) TILE(3, 1) TILE(3, 2) TILE(3, 3) TILE(3, 4)
typedef void tile(const float *, const float *, int64_t, int64_t, float *, int64_t);
static tile *const TILES[2][4] = {{tile_1_1, tile_1_2, tile_1_3, tile_1_4}, {tile_3_1, tile_3_2, tile_3_3, tile_3_4}};

TARGET static void many(const struct matrix *w, const float *x, int64_t rows, float *y, int64_t stride) {
  float block[DOWN * ACROSS] __attribute__((aligned(64)));
  for (int64_t r = 0; r < rows; r++) __builtin_memset(y + r * stride, 0, w->out * sizeof *y);
  for (int64_t o = 0; o < w->out; o += DOWN) {
    const int64_t down = w->out - o < DOWN ? w->out - o : DOWN;
    for (int64_t k = 0; k < w->in; k += ACROSS) {
      const int64_t across = w->in - k < ACROSS ? w->in - k : ACROSS;
      make_block(w, o, down, k, across, block);
      for (int64_t r = 0; r < rows; r += 4) {
        const int64_t last = (rows - r < 4 ? rows - r : 4) - 1;
        for (int64_t i = 0; i < down;) {
          const int three = i + 3 <= down;
          TILES[three][last](block + i * ACROSS, x + r * w->in + k, w->in, across, y + r * stride + o + i, stride);
          i += three ? 3 : 1;
        }
      }
    }
  }
}

/* Return 1 if this processor and its system have what the products need, else 0. */
__attribute__((visibility("default"))) int remoe_mxfp4_runs_here(void) {
#if defined(__x86_64__)
  const uint32_t needed = 1u << 12 | 1u << 27 | 1u << 28, avx2 = 1u << 5; /* FMA, OSXSAVE, AVX */
  uint32_t a, b, c, d, saved, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & avx2)) return 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0)); /* whether the system keeps the registers */
  return (saved & 6) == 6;
#else
  return 1;
#endif
}

/* Compute y [rows, out] = x [rows, in] W^T; rows of y are `stride` numbers apart. Return 0; or 1, and read and write nothing, for a matrix
   that its `codes_bytes` and `scales_bytes` do not hold. */
__attribute__((visibility("default"))) int remoe_mxfp4_product(
    const uint8_t *codes, int64_t codes_bytes, const uint8_t *scales, int64_t scales_bytes, const float *half, int64_t out, int64_t in,
    const float *x, int64_t rows, float *y, int64_t stride) {
  const int64_t most = 1 << 24;
  if (out < 1 || out > most || in < 32 || in > most || in % 32 || rows < 0 || stride < out) return 1;
  if (codes_bytes != out * (in / 2) || scales_bytes != out * (in / 32)) return 1;
  const struct matrix w = {codes, scales, half, out, in};
  if (rows > 4) many(&w, x, rows, y, stride);
  else if (rows > 0) FEW_ROWS[rows - 1](&w, x, y, stride);
  return 0;
}
