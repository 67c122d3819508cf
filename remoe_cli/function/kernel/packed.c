/* Products of quantised matrices, straight from the bytes of a checkpoint. README.md says how this file is built.

   A row of a matrix is groups of 32 weights. A weight is the number of its code times a scale, which one or more groups share. FORMS below
   says what codes and scales there are. Where a weight may need more digits than bfloat16 has, it is rounded to bfloat16 first, as a
   dequantised one is. */
#include <stdint.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma,f16c")))
#else
#include <arm_neon.h>
#define TARGET
#endif
#define INLINE static inline __attribute__((always_inline)) TARGET

/* A vector of 16 numbers is two or four registers: the compiler divides it. */
typedef float floats __attribute__((vector_size(64)));
typedef float lanes __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint8_t bytes __attribute__((vector_size(16)));
typedef int8_t wholes __attribute__((vector_size(16)));
typedef uint16_t shorts __attribute__((vector_size(32)));
typedef _Float16 halves __attribute__((vector_size(32)));

/* Codes of 4 bits stand two in a byte, the lower half first. INT4 is larger by 8 than its number, WORD8 by 128. */
enum codes { FP4, INT4, INT8, WORD8, E4M3, E5M2 };
/* Scales are bytes, whose numbers are in a table; or bfloat16; or float32. A group of 32 has one of them, or PAIRS two bytes. */
enum scales { BYTES, PAIRS, BF16, FP32 };

/* W [out, in]; `numbers` are those of the 256 scales of a byte. `per_row` scales make a row of scales, which holds for 2^down rows of W; a
   scale holds for 2^across groups. Nothing is aligned. */
struct matrix {
  const uint8_t *codes, *scales;
  const float *numbers;
  int64_t out, in, per_row;
  int down, across;
};

/* What holds for 32 weights. Codes of 4 bits: those with even numbers come first, then those with odd ones. Rows of x have this order. */
struct group {
  floats first, second;
};

INLINE floats load(const float *from) {
  floats v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

INLINE bytes bytes_at(const uint8_t *from) {
  bytes v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

INLINE wholes doubled(bytes nibbles) { /* twice the number of each FP4 code, which is whole */
  static const int8_t numbers[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
#if defined(__x86_64__)
  return (wholes)_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)numbers), (__m128i)nibbles);
#else
  return (wholes)vqtbl1q_s8(vld1q_s8(numbers), (uint8x16_t)nibbles);
#endif
}

INLINE floats numbers_of(enum codes kind, bytes codes) { /* FP4: twice the number; E4M3: its 256th part */
  if (kind == FP4) return __builtin_convertvector(doubled(codes), floats);
  if (kind == INT4) return __builtin_convertvector((wholes)codes - 8, floats);
  if (kind == INT8) return __builtin_convertvector((wholes)codes, floats);
  if (kind == WORD8) return __builtin_convertvector((wholes)(codes ^ 128), floats);
  const shorts wide = __builtin_convertvector(codes, shorts);
  const shorts bits = kind == E5M2 ? wide << 8 : (wide & 127) << 7 | (wide & 128) << 8;
  return __builtin_convertvector((halves)bits, floats);
}

INLINE struct group group_at(enum codes kind, const uint8_t *codes, int64_t at) {
  if (kind == FP4 || kind == INT4) {
    const bytes c = bytes_at(codes + 16 * at);
    return (struct group){numbers_of(kind, c & 15), numbers_of(kind, c >> 4)};
  }
  return (struct group){numbers_of(kind, bytes_at(codes + 32 * at)), numbers_of(kind, bytes_at(codes + 32 * at + 16))};
}

INLINE floats spread(float one, float other) { /* the first 8 numbers and the last 8 */
  floats v;
  for (int i = 0; i < 8; i++) v[i] = one, v[i + 8] = other;
  return v;
}

INLINE floats scale_at(enum scales kind, const struct matrix *w, int64_t row, int64_t g) {
  if (kind == PAIRS) {
    const uint8_t *two = w->scales + 2 * (row * (w->in / 32) + g);
    return spread(w->numbers[two[0]], w->numbers[two[1]]);
  }
  const int64_t at = (row >> w->down) * w->per_row + (g >> w->across);
  if (kind == BYTES) return w->numbers[w->scales[at]] - (floats){0};
  uint32_t bits;
  if (kind == BF16) {
    uint16_t high;
    __builtin_memcpy(&high, w->scales + 2 * at, sizeof high);
    bits = (uint32_t)high << 16;
  } else
    __builtin_memcpy(&bits, w->scales + 4 * at, sizeof bits);
  float number;
  __builtin_memcpy(&number, &bits, sizeof number);
  return number - (floats){0};
}

INLINE floats scaled(floats v, floats scale, int rounds) {
  v *= scale;
  if (!rounds) return v;
  const words bits = (words)v; /* to the nearest bfloat16, in the middle to the even one */
  return (floats)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

INLINE float sum(floats v) {
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) v[i] += v[i + step];
  return v[0];
}

/* A few rows of x: each weight is used where it is made. Scales are applied to sums of 32 products if that is less work. */
#define FEW(NAME, CODES, SCALES, ROUNDS, R)                                                                 \
  TARGET static void few_##NAME##_##R(const struct matrix *w, const float *x, float *y, int64_t stride) {   \
    const int64_t groups = w->in / 32;                                                                      \
    for (int64_t o = 0; o < w->out; o++) {                                                                  \
      floats sums[R] = {{0}};                                                                               \
      for (int64_t g = 0; g < groups; g++) {                                                                \
        struct group v = group_at(CODES, w->codes, o * groups + g);                                         \
        const floats scale = scale_at(SCALES, w, o, g);                                                     \
        const int early = ROUNDS || R > 2;                                                                  \
        if (early) v.first = scaled(v.first, scale, ROUNDS), v.second = scaled(v.second, scale, ROUNDS);    \
        for (int r = 0; r < R; r++) {                                                                       \
          const float *at = x + r * w->in + 32 * g;                                                         \
          floats products = v.first * load(at) + v.second * load(at + 16);                                  \
          sums[r] += early ? products : products * scale;                                                   \
        }                                                                                                   \
      }                                                                                                     \
      for (int r = 0; r < R; r++) y[r * stride + o] = sum(sums[r]);                                         \
    }                                                                                                       \
  }

/* Many rows of x: a block of W that fits the cache is made once and used for all of them. */
#define DOWN 12
#define ACROSS 768
#define BLOCK(NAME, CODES, SCALES, ROUNDS)                                                                  \
  TARGET static void block_##NAME(const struct matrix *w, int64_t o, int64_t down, int64_t k, int64_t across, float *block) { \
    const int64_t groups = w->in / 32;                                                                      \
    for (int64_t i = 0; i < down; i++)                                                                      \
      for (int64_t j = 0; j < across; j += 32) {                                                            \
        const int64_t g = (k + j) / 32;                                                                     \
        struct group v = group_at(CODES, w->codes, (o + i) * groups + g);                                   \
        const floats scale = scale_at(SCALES, w, o + i, g);                                                 \
        v.first = scaled(v.first, scale, ROUNDS), v.second = scaled(v.second, scale, ROUNDS);               \
        __builtin_memcpy(block + i * ACROSS + j, &v, sizeof v);                                             \
      }                                                                                                     \
  }

/* Each form, its codes and scales, and whether its weights are rounded to bfloat16. packed.py has them by number. */
#define FORMS(FORM)                                                                                         \
  FORM(0, FP4, BYTES, 0) FORM(1, INT4, BF16, 0) FORM(2, INT8, BF16, 0) FORM(3, INT4, BF16, 1) FORM(4, INT8, BF16, 1) \
  FORM(5, E4M3, FP32, 1) FORM(6, E5M2, FP32, 1) FORM(7, FP4, PAIRS, 1) FORM(8, WORD8, BF16, 0) FORM(9, WORD8, BF16, 1) \
  FORM(10, INT8, FP32, 1)
#define FEWS(NAME, CODES, SCALES, ROUNDS)                                                                   \
  FEW(NAME, CODES, SCALES, ROUNDS, 1) FEW(NAME, CODES, SCALES, ROUNDS, 2) FEW(NAME, CODES, SCALES, ROUNDS, 3) \
  FEW(NAME, CODES, SCALES, ROUNDS, 4) BLOCK(NAME, CODES, SCALES, ROUNDS)
FORMS(FEWS)
struct form {
  enum codes codes;
  enum scales scales;
  void (*few[4])(const struct matrix *, const float *, float *, int64_t);
  void (*block)(const struct matrix *, int64_t, int64_t, int64_t, int64_t, float *);
};
#define ENTRY(NAME, CODES, SCALES, ROUNDS) \
  {CODES, SCALES, {few_##NAME##_1, few_##NAME##_2, few_##NAME##_3, few_##NAME##_4}, block_##NAME},
static const struct form FORM_TABLE[] = {FORMS(ENTRY)};

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

TARGET static void many(const struct form *form, const struct matrix *w, const float *x, int64_t rows, float *y, int64_t stride) {
  float block[DOWN * ACROSS] __attribute__((aligned(64)));
  for (int64_t r = 0; r < rows; r++) __builtin_memset(y + r * stride, 0, w->out * sizeof *y);
  for (int64_t o = 0; o < w->out; o += DOWN) {
    const int64_t down = w->out - o < DOWN ? w->out - o : DOWN;
    for (int64_t k = 0; k < w->in; k += ACROSS) {
      const int64_t across = w->in - k < ACROSS ? w->in - k : ACROSS;
      form->block(w, o, down, k, across, block);
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
__attribute__((visibility("default"))) int remoe_packed_runs_here(void) {
#if defined(__x86_64__)
  const uint32_t needed = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29, avx2 = 1u << 5; /* FMA, OSXSAVE, AVX, F16C */
  uint32_t a, b, c, d, saved, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & avx2)) return 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0)); /* whether the system keeps the registers */
  return (saved & 6) == 6;
#else
  return 1;
#endif
}

/* Compute y [rows, out] = x [rows, in] W^T; rows of y are `stride` numbers apart. Return 0; or 1, and read and write nothing, for a form that
   there is not, and for a matrix that its `codes_bytes` and `scales_bytes` do not hold. */
__attribute__((visibility("default"))) int remoe_packed_product(
    int64_t number, const uint8_t *codes, int64_t codes_bytes, const uint8_t *scales, int64_t scales_bytes, const float *numbers,
    int64_t down, int64_t across, int64_t out, int64_t in, const float *x, int64_t rows, float *y, int64_t stride) {
  const int64_t most = 1 << 24;
  if (number < 0 || number >= (int64_t)(sizeof FORM_TABLE / sizeof *FORM_TABLE)) return 1;
  if (out < 1 || out > most || in < 32 || in > most || in % 32 || rows < 0 || stride < out) return 1;
  if (down < 0 || down > 24 || across < 0 || across > 24) return 1;
  const struct form *form = &FORM_TABLE[number];
  const int four = form->codes == FP4 || form->codes == INT4;
  const int64_t groups = in / 32, per_row = ((groups - 1) >> across) + 1;
  if (form->scales == PAIRS && (down || across)) return 1;
  const int64_t count = form->scales == PAIRS ? 2 * out * groups : (((out - 1) >> down) + 1) * per_row;
  const int64_t each = form->scales == FP32 ? 4 : form->scales == BF16 ? 2 : 1;
  if (codes_bytes != out * (four ? in / 2 : in) || scales_bytes != each * count) return 1;
  const struct matrix w = {codes, scales, numbers, out, in, per_row, (int)down, (int)across};
  if (rows > 4) many(form, &w, x, rows, y, stride);
  else if (rows > 0) form->few[rows - 1](&w, x, y, stride);
  return 0;
}
