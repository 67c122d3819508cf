/* Products in bfloat16 that add up in the order in which torch does: y = x W^T + bias, the same bits, in less time. README.md says how this
   file is built.

   A processor without instructions for bfloat16 makes float32 of it first, which is exact, and so is the product of two such numbers. So only
   the order of the sums tells results apart. torch has three:

   DOTS    eight sums of 8 numbers each go through the 64 next products in turns, a ninth through what is left; then all are added up in
           pairs. So its own loops do it: those for one row, and for any where it does not ask oneDNN.
   BLOCKS  a sum for each number of y, through pairs of products, the second of a pair first; after up to 768 products it is put aside and
           another begins. So oneDNN's gemm does it where AVX-512 is there and has no instructions for bfloat16.
   FOURS   four sums for each number of y take the products in turns, and are added up one after another. So torch's own loops do it for a W
           that is stored [in, out].

   What is widened is laid out for the loops once: rows of x for all of W, and some rows of W for all of x. */
#include <cpuid.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define DOTS_TARGET __attribute__((target("avx2,fma")))
#define BLOCKS_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma")))
#define INLINE static inline __attribute__((always_inline))
#define ALL _Pragma("clang loop unroll(full)") /* loops over registers are none */

typedef float lanes __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef uint16_t shorts __attribute__((vector_size(16)));
typedef void work(void *);
typedef void parallel(work *, void *, unsigned, unsigned); /* GOMP_parallel */

enum order { DOTS, BLOCKS, FOURS };
struct job {
  const uint16_t *w, *bias;
  uint16_t *y;
  const float *x; /* float32; `side` rows lie side by side, the last of them being zero where there are less */
  int64_t out, in, rows, side, next;
  int failed;
};

INLINE float wide(uint16_t number) {
  const uint32_t bits = (uint32_t)number << 16;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

/* The bits of the nearest bfloat16, in the middle of the even one; of what is no number, those that torch has for it. */
#define NEAREST(WORDS, SHORTS, v) \
  __builtin_convertvector( \
      (((WORDS)(v) + 0x7fff + ((WORDS)(v) >> 16 & 1)) >> 16 & (WORDS)((v) == (v))) | (0x7fc0 & (WORDS)((v) != (v))), SHORTS)

INLINE int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

/* The next `step` rows of W that nobody has taken; `out` if there are none. */
INLINE int64_t taken(struct job *job, int64_t step) { return __atomic_fetch_add(&job->next, step, __ATOMIC_RELAXED); }

INLINE float *room(struct job *job, int64_t numbers) {
  float *at = aligned_alloc(64, (numbers * 4 + 63) / 64 * 64);
  if (!at) job->failed = 1;
  return at;
}

/* DOTS. Eight slots have `in / 64` lanes of 8 numbers each, the ninth those that are left. */
#define SLOTS 9
INLINE int64_t length(int64_t in, int slot) { return slot < 8 ? in / 64 : in % 64 / 8; }
INLINE int64_t place(int64_t in, int slot, int64_t i) { return slot < 8 ? 64 * i + 8 * slot : in / 64 * 64 + 8 * i; }

INLINE DOTS_TARGET lanes widened(const uint16_t *from) {
  shorts v;
  memcpy(&v, from, sizeof v);
  return (lanes)(__builtin_convertvector(v, words) << 16);
}

/* Two steps of a sum in pairs, halves onto halves; each makes half as many registers of twice as many sums. */
#define HALVES(a, b, S) (__builtin_shufflevector(a, b, S(0)) + __builtin_shufflevector(a, b, S(1)))
#define QUARTERS(i) 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, 4 * i + 8, 4 * i + 9, 4 * i + 10, 4 * i + 11
#define EIGHTHS(i) 2 * i, 2 * i + 1, 2 * i + 8, 2 * i + 9, 2 * i + 4, 2 * i + 5, 2 * i + 12, 2 * i + 13
#define ONES(i) i, i + 2, i + 8, i + 10, i + 4, i + 6, i + 12, i + 14

/* Finish one number of y for four rows of x from the sums of its slots. */
INLINE DOTS_TARGET void finish(const struct job *job, int64_t r, int64_t o, const lanes *sums, int64_t stride) { /* sums[slot * stride + row] */
  lanes s[4], rest[4];
  ALL for (int i = 0; i < 4; i++) {
    lanes v[8];
    ALL for (int slot = 0; slot < 8; slot++) v[slot] = sums[slot * stride + i];
    s[i] = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
    rest[i] = sums[8 * stride + i];
  }
  const lanes one = HALVES(HALVES(s[0], rest[0], QUARTERS), HALVES(s[1], rest[1], QUARTERS), EIGHTHS);
  const lanes two = HALVES(HALVES(s[2], rest[2], QUARTERS), HALVES(s[3], rest[3], QUARTERS), EIGHTHS);
  lanes v = HALVES(one, two, ONES);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  if (job->bias) v = wide(job->bias[o]) + v;
  const shorts bits = NEAREST(words, shorts, v);
  for (int64_t i = 0; i < least(4, job->rows - r); i++) job->y[(r + i) * job->out + o] = bits[i];
}

/* Weights are asked for before they are needed, for rows of W follow each other in memory: so many ahead, or the next rows of a block. */
#define AHEAD 2048

/* Up to four rows of x: each weight is used where it is widened. As many slots at once as there are registers for. */
#define FEW(R, AT_ONCE)                                                                                      \
  DOTS_TARGET static void few_##R(struct job *job, int64_t o) {                                              \
    const int64_t in = job->in, end = in / 64 * 64;                                                          \
    const uint16_t *w = job->w + o * in;                                                                     \
    lanes sums[SLOTS][4] = {{{0}}};                                                                          \
    for (int slot = 0; slot < 8; slot += AT_ONCE) {                                                          \
      lanes s[R][AT_ONCE] = {{{0}}};                                                                         \
      for (int64_t k = 8 * slot; k < end; k += 64) {                                                         \
        if (slot == 0) __builtin_prefetch(w + k + AHEAD), __builtin_prefetch(w + k + AHEAD + 32);            \
        ALL for (int i = 0; i < AT_ONCE; i++) {                                                              \
          const lanes v = widened(w + k + 8 * i);                                                            \
          ALL for (int r = 0; r < R; r++) s[r][i] += v * *(const lanes *)(job->x + r * in + k + 8 * i);      \
        }                                                                                                    \
      }                                                                                                      \
      ALL for (int r = 0; r < R; r++)                                                                        \
        ALL for (int i = 0; i < AT_ONCE; i++) sums[slot + i][r] = s[r][i];                                   \
    }                                                                                                        \
    for (int r = 0; r < R; r++)                                                                              \
      for (int64_t k = end; k < in; k += 8) sums[8][r] += widened(w + k) * *(const lanes *)(job->x + r * in + k); \
    finish(job, 0, o, &sums[0][0], 4);                                                                       \
  }
FEW(1, 8) FEW(2, 4) FEW(3, 4) FEW(4, 2)
static void (*const FEWS[])(struct job *, int64_t) = {few_1, few_2, few_3, few_4};

static void dots_of_few(void *at) {
  struct job *job = at;
  for (int64_t o; (o = taken(job, 16)) < job->out;)
    for (int64_t i = o; i < least(o + 16, job->out); i++) FEWS[job->rows - 1](job, i);
}

/* More rows: DOWN rows of W are widened, slot by slot, and used for all of x, which lies slot by slot too, four rows side by side. */
#define DOWN 6
#define ACROSS 4
#define CHUNK 64 /* rows of x whose sums are kept */

DOTS_TARGET static void tile(const lanes *w, const lanes *x, int64_t n, lanes *sums) {
  lanes s[3][ACROSS] = {{{0}}};
  for (int64_t i = 0; i < n; i++)
    ALL for (int r = 0; r < ACROSS; r++) {
      const lanes v = x[i * ACROSS + r];
      ALL for (int o = 0; o < 3; o++) s[o][r] += w[i * DOWN + o] * v;
    }
  memcpy(sums, s, sizeof s);
}

DOTS_TARGET static void dots_of_many(void *at) {
  struct job *job = at;
  const int64_t in = job->in;
  float *memory = room(job, DOWN * in + CHUNK * DOWN * SLOTS * 8);
  if (!memory) return;
  lanes *block = (lanes *)memory, (*sums)[DOWN][ACROSS] = (void *)(memory + DOWN * in); /* sums[panel * SLOTS + slot] */
  for (int64_t o; (o = taken(job, DOWN)) < job->out;) {
    const int64_t down = least(DOWN, job->out - o);
    lanes *to = block;
    for (int slot = 0; slot < SLOTS; slot++)
      for (int64_t i = 0; i < length(in, slot); i++, to += DOWN)
        for (int64_t j = 0; j < DOWN; j++) {
          const uint16_t *from = job->w + least(o + j, job->out - 1) * in + place(in, slot, i);
          if (slot % 4 == 0) __builtin_prefetch(from + DOWN * in);
          to[j] = widened(from);
        }
    for (int64_t first = 0; first < job->rows; first += CHUNK) {
      const int64_t rows = least(CHUNK, job->rows - first), panels = (rows + ACROSS - 1) / ACROSS;
      const lanes *w = block;
      for (int slot = 0; slot < SLOTS; w += DOWN * length(in, slot), slot++)
        for (int64_t p = 0; p < panels; p++) {
          const lanes *x = (const lanes *)(job->x + (first + p * ACROSS) * in) + (w - block) / DOWN * ACROSS;
          for (int half = 0; half < DOWN; half += 3) tile(w + half, x, length(in, slot), sums[p * SLOTS + slot][half]);
        }
      for (int64_t p = 0; p < panels; p++)
        for (int64_t j = 0; j < down; j++) finish(job, first + p * ACROSS, o + j, &sums[p * SLOTS][j][0], DOWN * ACROSS);
    }
  }
  free(memory);
}

/* Lay out x: as it is for few rows, else slot by slot. */
DOTS_TARGET static void dots_of(const struct job *job, const uint16_t *x, float *wide_x) {
  const int64_t side = job->side;
  for (int64_t r = 0; r < job->rows; r++)
    for (int slot = 0; slot < SLOTS; slot++)
      for (int64_t i = 0; i < length(job->in, slot); i++) {
        const int64_t k = place(job->in, slot, i), before = slot < 8 ? slot * (job->in / 64) + i : k / 8;
        lanes *to = (lanes *)(wide_x + r / side * side * job->in) + (side == 1 ? k / 8 : before * side + r % side);
        *to = widened(x + r * job->in + k);
      }
}

/* BLOCKS. A register has a number of y for 16 rows of x, which lie side by side, and 32 where there are more. */
typedef float many __attribute__((vector_size(64)));
typedef uint32_t many_words __attribute__((vector_size(64)));
typedef uint16_t many_shorts __attribute__((vector_size(32)));
#define SIDE 16
#define HIGH 12

INLINE int64_t block_of(int64_t in) { return in <= 384 ? in : in < 1536 ? (in + 1) / 2 : 768; }

#define BLOCK(V)                                                                                             \
  BLOCKS_TARGET static void block_##V(const float *w, int64_t stride, const many *x, int64_t in, many sums[HIGH][2]) { \
    for (int64_t k = 0; k < in; k += block_of(in)) {                                                         \
      many s[HIGH][V] = {{{0}}};                                                                             \
      for (int64_t i = k; i < least(k + block_of(in), in); i += 2)                                           \
        ALL for (int second = 1; second >= 0; second--) {                                                    \
          many v[V];                                                                                         \
          ALL for (int j = 0; j < V; j++) v[j] = x[(i + second) * V + j];                                    \
          ALL for (int o = 0; o < HIGH; o++)                                                                 \
            ALL for (int j = 0; j < V; j++) s[o][j] += v[j] * w[o * stride + i + second];                    \
        }                                                                                                    \
      ALL for (int o = 0; o < HIGH; o++)                                                                     \
        ALL for (int j = 0; j < V; j++) sums[o][j] = k ? sums[o][j] + s[o][j] : s[o][j];                     \
    }                                                                                                        \
  }
BLOCK(1) BLOCK(2)

BLOCKS_TARGET static void blocks(void *at) {
  struct job *job = at;
  const int64_t in = job->in, stride = in + SIDE; /* so that rows do not fall on each other in the cache */
  const int sides = job->side / SIDE;
  float *w = room(job, HIGH * stride);
  if (!w) return;
  for (int64_t o; (o = taken(job, HIGH)) < job->out;) {
    const int64_t high = least(HIGH, job->out - o);
    for (int64_t j = 0; j < HIGH; j++) {
      const uint16_t *from = job->w + least(o + j, job->out - 1) * in;
      for (int64_t k = 0; k < in; k += 16) {
        many_shorts v;
        memcpy(&v, from + k, sizeof v);
        __builtin_prefetch(from + HIGH * in + k);
        *(many *)(w + j * stride + k) = (many)(__builtin_convertvector(v, many_words) << 16);
      }
    }
    for (int64_t r = 0; r < job->rows; r += job->side) {
      many sums[HIGH][2];
      uint16_t bits[HIGH][2 * SIDE];
      (sides == 2 ? block_2 : block_1)(w, stride, (const many *)(job->x + r * in), in, sums);
      for (int64_t j = 0; j < high; j++)
        for (int side = 0; side < sides; side++) {
          const many v = job->bias ? wide(job->bias[o + j]) + sums[j][side] : sums[j][side];
          const many_shorts nearest = NEAREST(many_words, many_shorts, v);
          memcpy(bits[j] + side * SIDE, &nearest, sizeof nearest);
        }
      for (int64_t i = 0; i < least(job->side, job->rows - r); i++)
        for (int64_t j = 0; j < high; j++) job->y[(r + i) * job->out + o + j] = bits[j][i];
    }
  }
  free(w);
}

BLOCKS_TARGET static void blocks_of(const struct job *job, const uint16_t *x, float *wide_x) {
  const int64_t side = job->side;
  for (int64_t r = 0; r < job->rows; r++)
    for (int64_t k = 0; k < job->in; k++) wide_x[(r / side * job->in + k) * side + r % side] = wide(x[r * job->in + k]);
}

/* FOURS. W is stored [in, out]. Some numbers of y are gone through with DEEP rows of W at a time, each for two rows of x; their sums stay in
   the cache meanwhile. */
#define DEEP 16
#define WIDE 512

DOTS_TARGET static void deep(const uint16_t *w, int64_t out, int64_t n, const float *x[2], lanes *sums[2]) {
  for (int64_t i = 0; i < n; i += 8) {
    lanes s[2][4];
    ALL for (int r = 0; r < 2; r++)
      ALL for (int turn = 0; turn < 4; turn++) s[r][turn] = sums[r][i / 2 + turn];
    ALL for (int l = 0; l < DEEP; l++) {
      const lanes v = widened(w + l * out + i);
      ALL for (int r = 0; r < 2; r++) s[r][l % 4] += v * x[r][l];
    }
    ALL for (int r = 0; r < 2; r++)
      ALL for (int turn = 0; turn < 4; turn++) sums[r][i / 2 + turn] = s[r][turn];
  }
}

DOTS_TARGET static void fours(void *at) {
  struct job *job = at;
  const int64_t in = job->in, rows = (job->rows + 1) / 2 * 2, row = WIDE / 8 * 4;
  lanes *sums = (lanes *)room(job, rows * row * 8);
  if (!sums) return;
  for (int64_t o; (o = taken(job, WIDE)) < job->out;) {
    const int64_t n = least(WIDE, job->out - o);
    memset(sums, 0, rows * row * sizeof *sums);
    for (int64_t k = 0; k < in; k += DEEP)
      for (int64_t r = 0; r < rows; r += 2) {
        const float *x = job->x + r * in + k;
        deep(job->w + k * job->out + o, job->out, n, (const float *[2]){x, x + in}, (lanes *[2]){sums + r * row, sums + (r + 1) * row});
      }
    for (int64_t r = 0; r < job->rows; r++)
      for (int64_t i = 0; i < n; i += 8) {
        const lanes *s = sums + r * row + i / 2;
        lanes v = ((s[0] + s[1]) + s[2]) + s[3];
        for (int j = 0; job->bias && j < 8; j++) v[j] = wide(job->bias[o + i + j]) + v[j];
        const shorts bits = NEAREST(words, shorts, v);
        memcpy(job->y + r * job->out + o + i, &bits, sizeof bits);
      }
  }
  free(sums);
}

DOTS_TARGET static void rows_of(const struct job *job, const uint16_t *x, float *wide_x) {
  for (int64_t i = 0; i < job->rows * job->in; i += 8) *(lanes *)(wide_x + i) = widened(x + i);
}

static int orders(void) {
  const uint32_t needed = 1u << 12 | 1u << 27 | 1u << 28, avx2 = 1u << 5; /* FMA, OSXSAVE, AVX */
  const uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;      /* F, DQ, BW, VL */
  uint32_t a, b, c, d, saved, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & avx2)) return 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0)); /* whether the system keeps the registers */
  if ((saved & 6) != 6) return 0;
  return 1 << DOTS | 1 << FOURS | ((b & avx512) == avx512 && (saved & 0xe6) == 0xe6) << BLOCKS;
}

/* Return a bit for each order that this processor can do. It is asked once: a virtual machine takes microseconds for each answer. */
__attribute__((visibility("default"))) int remoe_product_orders(void) {
  static int found = -1;
  if (found < 0) found = orders();
  return found;
}

/* Return 1 if this processor has instructions for products in bfloat16, whose sums are of another order. */
__attribute__((visibility("default"))) int remoe_has_bfloat16(void) {
  uint32_t a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1) return 1; /* AMX_BF16 */
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;         /* AVX512_BF16 */
}

/* Compute y [rows, out] = x [rows, in] W [out, in]^T + bias [out] (NULL: none), all in bfloat16, by `threads` threads that `team` starts
   (NULL: by the one that calls). For FOURS W is stored [in, out]. Return 0; 1, and leave y, for what there is no order for; 2 without memory. */
__attribute__((visibility("default"))) int remoe_product(
    int order, const uint16_t *w, const uint16_t *bias, const uint16_t *x, uint16_t *y, int64_t out, int64_t in, int64_t rows,
    parallel *team, unsigned threads) {
  const int64_t most = 1 << 24;
  if (out < 1 || out > most || in < 16 || in > most || in % 16 || rows < 1 || rows > most) return 1;
  if (order < DOTS || order > FOURS || !(remoe_product_orders() >> order & 1)) return 1;
  if (order == FOURS && out % 8) return 1;
  work *part = order == FOURS ? fours : order == BLOCKS ? blocks : rows > 4 ? dots_of_many : dots_of_few;
  const int64_t side = order == FOURS ? 2 : order == BLOCKS ? (rows > SIDE ? 2 * SIDE : SIDE) : rows > 4 ? ACROSS : 1;
  struct job job = {.w = w, .bias = bias, .y = y, .out = out, .in = in, .rows = rows, .side = side};
  const int64_t whole = rows / side * side, padded = whole < rows ? whole + side : whole;
  float *wide_x = room(&job, padded * in);
  if (!wide_x) return 2;
  memset(wide_x + whole * in, 0, (padded - whole) * in * sizeof *wide_x);
  (order == FOURS ? rows_of : order == BLOCKS ? blocks_of : dots_of)(&job, x, wide_x);
  job.x = wide_x;
  if (team && threads > 1) team(part, &job, threads, 0);
  else part(&job);
  free(wide_x);
  return job.failed ? 2 : 0;
}
