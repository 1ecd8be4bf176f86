/* What a processor computes between the matrix products of decoding and of an update: each of these in one
   pass, where torch would call ten operations. fused_kernels.py compiles it, and tells of every argument.

   Rows are independent, and each is computed by one thread in one order: the numbers depend neither on the
   threads nor on the rows beside, but for the products of `decode`, which are torch's. Tensors are
   contiguous. */

#if defined(__x86_64__) && !defined(__FMA__)
#error "a processor without fused multiply-add is faster with torch's own operations"
#endif

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

/* As many threads as torch's own operations take, and one where waking the others would take longer. */
static inline int share(int64_t numbers, int threads)
{
    return numbers > 4096 ? threads : 1;
}

/* Positions whose keys or values stay in the first cache while every query head reads them. */
enum { BLOCK = 32 };

/* e^x for x <= 0 by Cephes' polynomial, to 2 units in the last place: a call of expf for each number would
   take longer than all the rest. A NaN stays one. */
static inline float exponential(float x)
{
    float n = rintf(x * 1.44269504f);
    float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x)); /* ln 2 in two parts */
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* 2^n; below -126 it would be no normal number, and the result is 0. */
    union { int32_t bits; float power; } two = { .bits = ((int32_t)(n > -126.0f ? n : -126.0f) + 127) << 23 };
    return x < -87.0f ? 0.0f : p * two.power;
}

/* states += added, if there is any; out = weight * states / root mean square. */
void add_norm(float *states, const float *added, const float *weight, double eps, float *out,
              int64_t rows, int64_t width, int threads)
{
    #pragma omp parallel for num_threads(share(rows * width, threads))
    for (int64_t row = 0; row < rows; row++) {
        float *restrict state = states + row * width;
        float *restrict to = out + row * width;
        float sum = 0;
        if (added)
            for (int64_t i = 0; i < width; i++)
                state[i] += added[row * width + i];
        for (int64_t i = 0; i < width; i++)
            sum += state[i] * state[i];
        const float inverse = 1 / sqrtf(sum / width + (float)eps);
        for (int64_t i = 0; i < width; i++)
            to[i] = weight[i] * (state[i] * inverse);
    }
}

/* The gradient of `add_norm` with nothing added. Of the weight's there is one part for every CHUNK rows, so
   that their sum does not depend on the threads. */
void norm_backward(const float *grad, const float *states, const float *weight, double eps,
                   float *grad_states, float *grad_weights, int64_t rows, int64_t width, int threads)
{
    enum { CHUNK = 64 };
    #pragma omp parallel for num_threads(share(rows * width, threads))
    for (int64_t chunk = 0; chunk < (rows + CHUNK - 1) / CHUNK; chunk++) {
        float *restrict of_weight = grad_weights + chunk * width;
        memset(of_weight, 0, width * sizeof(float));
        for (int64_t row = chunk * CHUNK; row < rows && row < (chunk + 1) * CHUNK; row++) {
            const float *state = states + row * width, *g = grad + row * width;
            float *restrict to = grad_states + row * width;
            float sum = 0, along = 0;
            for (int64_t i = 0; i < width; i++) {
                sum += state[i] * state[i];
                along += g[i] * weight[i] * state[i];
            }
            const float inverse = 1 / sqrtf(sum / width + (float)eps);
            along *= inverse * inverse / width;
            for (int64_t i = 0; i < width; i++) {
                of_weight[i] += g[i] * state[i] * inverse;
                to[i] = (g[i] * weight[i] - state[i] * along) * inverse;
            }
        }
    }
}

static inline float sigmoid(float x)
{
    const float small = exponential(x < 0 ? x : -x); /* never a large power */
    return (x < 0 ? small : 1) / (1 + small);
}

/* out = silu(gate) * up; out may be gate. */
void silu_multiply(const float *gate, const float *up, float *out, int64_t numbers, int threads)
{
    #pragma omp parallel for simd num_threads(share(numbers, threads))
    for (int64_t i = 0; i < numbers; i++)
        out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

void silu_multiply_backward(const float *restrict grad, const float *restrict gate, const float *restrict up,
                            float *restrict grad_gate, float *restrict grad_up, int64_t numbers, int threads)
{
    #pragma omp parallel for simd num_threads(share(numbers, threads))
    for (int64_t i = 0; i < numbers; i++) {
        const float x = gate[i], share = sigmoid(x);
        grad_up[i] = grad[i] * x * share;
        grad_gate[i] = grad[i] * up[i] * share * (1 + x * (1 - share));
    }
}

/* A head of `size` numbers turned to its position, and scaled. */
static inline void turn(const float *head, const float *cos, const float *sin, float scale,
                        float *restrict to, int64_t size)
{
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        to[i] = (head[i] * cos[i] + head[i + half] * sin[i]) * scale;
        to[i + half] = (head[i + half] * cos[i + half] + head[i] * sin[i + half]) * scale;
    }
}

/* The queries of one row that share a key head. Inlined with a constant `size`, the loops over it unroll. */
static inline __attribute__((always_inline)) void attend_head(
    const float *query, const float *key, const float *value, const float *cos, const float *sin, float *keys,
    float *values, float *out, float *weights, int64_t place, int64_t queries, int64_t size, float scaling)
{
    const int64_t count = place + 1;
    float turned[queries * size];
    turn(key, cos, sin, 1, keys + place * size, size);
    memcpy(values + place * size, value, size * sizeof(float));
    for (int64_t q = 0; q < queries; q++)
        turn(query + q * size, cos, sin, scaling, turned + q * size, size);
    for (int64_t from = 0; from < count; from += BLOCK)
        for (int64_t q = 0; q < queries; q++)
            for (int64_t at = from; at < count && at < from + BLOCK; at++) {
                float sum = 0;
                for (int64_t i = 0; i < size; i++)
                    sum += turned[q * size + i] * keys[at * size + i];
                weights[q * count + at] = sum;
            }
    for (int64_t q = 0; q < queries; q++) {
        float *weight = weights + q * count, highest = weight[0], sum = 0;
        for (int64_t at = 0; at < count; at++)
            highest = weight[at] > highest ? weight[at] : highest;
        for (int64_t at = 0; at < count; at++)
            sum += weight[at] = exponential(weight[at] - highest);
        const float inverse = 1 / sum;
        for (int64_t at = 0; at < count; at++)
            weight[at] *= inverse;
    }
    memset(out, 0, queries * size * sizeof(float));
    for (int64_t from = 0; from < count; from += BLOCK)
        for (int64_t q = 0; q < queries; q++) {
            float mixed[size];
            memcpy(mixed, out + q * size, sizeof mixed);
            for (int64_t at = from; at < count && at < from + BLOCK; at++)
                for (int64_t i = 0; i < size; i++)
                    mixed[i] += weights[q * count + at] * values[at * size + i];
            memcpy(out + q * size, mixed, sizeof mixed);
        }
}

/* Every row's newest position joins the cache and looks at all before it. `scratch` is
   [threads, queries of a key head, positions]. */
void attend(const float *query, const float *key, const float *value, const float *cos, const float *sin,
            const int64_t *lengths, float *keys, float *values, float *out, float *scratch, int64_t rows,
            int64_t query_heads, int64_t heads, int64_t size, int64_t positions, double scaling, int threads)
{
    const int64_t queries = query_heads / heads;
    #pragma omp parallel for schedule(dynamic, 4) num_threads(share(rows * query_heads * size * positions, threads))
    for (int64_t head = 0; head < rows * heads; head++) {
        const int64_t place = lengths[head / heads], slot = head * positions * size;
        float *weights = scratch + omp_get_thread_num() * queries * positions;
        #define ATTEND(SIZE)                                                                           \
            attend_head(query + head * queries * size, key + head * size, value + head * size,         \
                        cos + place * size, sin + place * size, keys + slot, values + slot,            \
                        out + head * queries * size, weights, place, queries, SIZE, scaling)
        switch (size) {
        case 32: ATTEND(32); break;
        case 64: ATTEND(64); break;
        case 128: ATTEND(128); break;
        default: ATTEND(size);
        }
    }
}

/* The product of a linear layer, by the BLAS that torch calls; a size is read as 32 bits or as 64. */
typedef void gemm(const char *, const char *, const int64_t *, const int64_t *, const int64_t *, const float *,
                  const float *, const int64_t *, const float *, const int64_t *, const float *, float *,
                  const int64_t *);
typedef struct { const float *weight, *bias; } linear;

static void project(gemm *sgemm, const linear *layer, const float *from, float *to, int64_t rows,
                    int64_t inputs, int64_t outputs)
{
    const float one = 1, onto = layer->bias ? 1 : 0;
    for (int64_t row = 0; layer->bias && row < rows; row++)
        memcpy(to + row * outputs, layer->bias, outputs * sizeof(float));
    sgemm("T", "N", &outputs, &rows, &inputs, &one, layer->weight, &inputs, from, &inputs, &onto, to, &outputs);
}

/* Blocks of plain linear layers, all of them in one call: a small model's step is over sooner than Python has
   asked for its parts. What has no bias, and no norm of queries and keys, has NULL. */
typedef struct {
    const float *attention_norm, *query_norm, *key_norm, *mlp_norm;
    linear query, key, value, out, gate, up, down;
} block;

/* One newest position a row through all blocks: `states` is what the last one adds to, `added` what it adds.
   The cache is [layers, 2, slots, heads, positions, size]; `scratch` is what the rows need between the parts,
   and behind it that of `attend`. */
void decode(gemm *sgemm, const block *blocks, float *states, float *added, const float *cos, const float *sin,
            const int64_t *lengths, float *cache, float *scratch, int64_t layers, int64_t rows, int64_t width,
            int64_t inner, int64_t query_heads, int64_t heads, int64_t size, int64_t slots, int64_t positions,
            double eps, double scaling, int threads)
{
    const int64_t asked = query_heads * size, held = heads * size, half = slots * positions * held;
    float *read = scratch, *query = read + rows * width, *key = query + rows * asked;
    float *value = key + rows * held, *mixed = value + rows * held, *gate = mixed + rows * asked;
    float *up = gate + rows * inner, *weights = up + rows * inner;
    for (int64_t number = 0; number < layers; number++) {
        const block *b = blocks + number;
        float *keys = cache + 2 * number * half;
        add_norm(states, number ? added : NULL, b->attention_norm, eps, read, rows, width, threads);
        project(sgemm, &b->query, read, b->query_norm ? mixed : query, rows, width, asked);
        if (b->query_norm)
            add_norm(mixed, NULL, b->query_norm, eps, query, rows * query_heads, size, threads);
        project(sgemm, &b->key, read, b->key_norm ? mixed : key, rows, width, held);
        if (b->key_norm)
            add_norm(mixed, NULL, b->key_norm, eps, key, rows * heads, size, threads);
        project(sgemm, &b->value, read, value, rows, width, held);
        attend(query, key, value, cos, sin, lengths, keys, keys + half, mixed, weights, rows, query_heads, heads,
               size, positions, scaling, threads);
        project(sgemm, &b->out, mixed, added, rows, asked, width);
        add_norm(states, added, b->mlp_norm, eps, read, rows, width, threads);
        project(sgemm, &b->gate, read, gate, rows, width, inner);
        project(sgemm, &b->up, read, up, rows, width, inner);
        silu_multiply(gate, up, gate, rows * inner, threads);
        project(sgemm, &b->down, gate, added, rows, inner, width);
    }
}

/* ---------------------------------------------------------------------------------------------------------
   Packed texts, with gradients. A segment is a prompt or a completion: its first token, the token behind its
   last, and those of the prompt before it; a prompt has none. Its tokens look at that prompt and at
   themselves. */

typedef struct { int64_t start, end, prompt_start, prompt_end; } segment;

/* Queries that are taken at once, so that what is loaded is used several times; and numbers in a vector. */
enum { TILE = 4, LANES = 16 };
typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

/* Token of the n-th key that a segment reads. */
static inline int64_t token_of(const segment *s, int64_t n)
{
    const int64_t before = s->prompt_end - s->prompt_start;
    return n < before ? s->prompt_start + n : s->start + n - before;
}

/* A head of all `count` tokens that a segment reads: as rows `[count, width]`, 0 behind the `size` numbers,
   and as columns `[size, stride]`. */
static void gather(const float *tokens, const segment *s, int64_t heads, int64_t head, int64_t count,
                   int64_t size, int64_t width, int64_t stride, float *rows, float *columns)
{
    for (int64_t n = 0; n < count; n++) {
        memcpy(rows + n * width, tokens + (token_of(s, n) * heads + head) * size, size * sizeof(float));
        memset(rows + n * width + size, 0, (width - size) * sizeof(float));
    }
    for (int64_t i = 0; columns && i < size; i++)
        for (int64_t n = 0; n < stride; n++)
            columns[i * stride + n] = n < count ? rows[n * width + i] : 0;
}

/* Sums of `count` rows, each times its weights: of every row the first `width` numbers, up to a multiple of
   LANES. Rows and sums `[TILE, stride]` are `stride` apart. */
static void combine(const float *const weights[TILE], const float *rows, int64_t count, int64_t width,
                    int64_t stride, float *to)
{
    const float *a = weights[0], *b = weights[1], *c = weights[2], *d = weights[3];
    for (int64_t from = 0; from < width; from += LANES) {
        lanes of_a = {0}, of_b = {0}, of_c = {0}, of_d = {0};
        for (int64_t n = 0; n < count; n++) {
            const lanes row = *(const lanes *)(rows + n * stride + from);
            of_a += a[n] * row;
            of_b += b[n] * row;
            of_c += c[n] * row;
            of_d += d[n] * row;
        }
        *(lanes *)(to + from) = of_a;
        *(lanes *)(to + stride + from) = of_b;
        *(lanes *)(to + 2 * stride + from) = of_c;
        *(lanes *)(to + 3 * stride + from) = of_d;
    }
}

/* Products of vectors with the first `count` columns, `[TILE, stride]`. */
static void products(const float *const vectors[TILE], const float *columns, int64_t count, int64_t size,
                     int64_t stride, float *to)
{
    combine(vectors, columns, size, count, stride, to);
}

/* Sums `[TILE, width]` of rows, each times its weight of `[TILE, stride]`. */
static void mix(const float *weights, const float *rows, int64_t count, int64_t width, int64_t stride,
                float *to)
{
    const float *of_each[TILE];
    for (int64_t t = 0; t < TILE; t++)
        of_each[t] = weights + t * stride;
    combine(of_each, rows, count, width, width, to);
}

/* Add vectors `[TILE, width]` to every row, each times the row's weight of it. */
static void spread(const float *weights, const float *vectors, int64_t count, int64_t width, int64_t stride,
                   float *rows)
{
    const float *a = weights, *b = a + stride, *c = b + stride, *d = c + stride;
    for (int64_t from = 0; from < width; from += LANES) {
        const lanes of_a = *(const lanes *)(vectors + from), of_b = *(const lanes *)(vectors + width + from),
                    of_c = *(const lanes *)(vectors + 2 * width + from),
                    of_d = *(const lanes *)(vectors + 3 * width + from);
        for (int64_t n = 0; n < count; n++)
            *(lanes *)(rows + n * width + from) += a[n] * of_a + b[n] * of_b + c[n] * of_c + d[n] * of_d;
    }
}

/* Some queries of a segment that share a key head, and how many keys each reads. Where fewer are left than a
   tile has, the last one stands there again, and is computed again. */
typedef struct { int64_t places[TILE], counts[TILE], most; } tile;

static tile take_tile(const segment *s, int64_t from, int64_t queries, int64_t query_heads, int64_t head)
{
    const int64_t before = s->prompt_end - s->prompt_start, last = (s->end - s->start) * queries - 1;
    tile taken = {.most = 0};
    for (int64_t t = 0; t < TILE; t++) {
        const int64_t at = from + t < last ? from + t : last, token = at / queries;
        taken.places[t] = (s->start + token) * query_heads + head * queries + at % queries;
        taken.counts[t] = before + token + 1;
        taken.most = taken.counts[t];
    }
    return taken;
}

/* Tokens' heads turned to their positions and scaled. */
void turn_heads(const float *tokens, const float *cos, const float *sin, double scale, float *out,
                int64_t count, int64_t heads, int64_t size, int threads)
{
    #pragma omp parallel for num_threads(share(count * heads * size, threads))
    for (int64_t token = 0; token < count; token++)
        for (int64_t at = token * heads * size; at < (token + 1) * heads * size; at += size)
            turn(tokens + at, cos + token * size, sin + token * size, scale, out + at, size);
}

/* The size of a head, up to a multiple of LANES. */
static inline int64_t width_of(int64_t size)
{
    return (size + LANES - 1) / LANES * LANES;
}

/* Attention of packed texts; queries are scaled. `scratch` is [threads, room]; `stride` is a multiple of
   LANES that the longest text fits in. */
void attend_packed(const float *query, const float *key, const float *value, const segment *segments,
                   float *out, float *logsumexp, float *scratch, int64_t room, int64_t count_segments,
                   int64_t query_heads, int64_t heads, int64_t size, int64_t stride, int threads)
{
    const int64_t queries = query_heads / heads, width = width_of(size);
    #pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < count_segments * heads; task++) {
        const segment *s = segments + task / heads;
        const int64_t head = task % heads, all = s->prompt_end - s->prompt_start + s->end - s->start;
        float *rows = scratch + omp_get_thread_num() * room, *columns = rows + width * stride;
        float *weights = columns + size * stride, *mixed = weights + TILE * stride;
        gather(key, s, heads, head, all, size, width, stride, rows, columns);
        gather(value, s, heads, head, all, size, width, stride, rows, NULL);
        for (int64_t from = 0; from < (s->end - s->start) * queries; from += TILE) {
            const tile now = take_tile(s, from, queries, query_heads, head);
            const float *asked[TILE];
            for (int64_t t = 0; t < TILE; t++)
                asked[t] = query + now.places[t] * size;
            products(asked, columns, now.most, size, stride, weights);
            for (int64_t t = 0; t < TILE; t++) {
                const int64_t count = now.counts[t];
                float *weight = weights + t * stride, highest = weight[0], sum = 0;
                for (int64_t n = 0; n < count; n++)
                    highest = weight[n] > highest ? weight[n] : highest;
                for (int64_t n = 0; n < count; n++)
                    sum += weight[n] = exponential(weight[n] - highest);
                const float inverse = 1 / sum;
                for (int64_t n = 0; n < count; n++)
                    weight[n] *= inverse;
                for (int64_t n = count; n < now.most; n++)
                    weight[n] = 0;
                logsumexp[now.places[t]] = highest + logf(sum);
            }
            mix(weights, rows, now.most, width, stride, mixed);
            for (int64_t t = 0; t < TILE; t++)
                memcpy(out + now.places[t] * size, mixed + t * width, size * sizeof(float));
        }
    }
}

/* Its gradients. What completions give to their prompts' keys and values goes to `of_prompts`,
   [2, segments, heads, longest prompt, size], and is added up in their order: no two threads add to one
   number. */
void attend_packed_backward(const float *grad, const float *query, const float *key, const float *value,
                            const float *out, const float *logsumexp, const segment *segments,
                            float *grad_query, float *grad_key, float *grad_value, float *of_prompts,
                            float *scratch, int64_t room, int64_t count_segments, int64_t longest,
                            int64_t query_heads, int64_t heads, int64_t size, int64_t stride, int threads)
{
    const int64_t queries = query_heads / heads, half = count_segments * heads * longest * size;
    const int64_t width = width_of(size);
    #pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < count_segments * heads; task++) {
        const segment *s = segments + task / heads;
        const int64_t head = task % heads, before = s->prompt_end - s->prompt_start;
        const int64_t all = before + s->end - s->start, total = (s->end - s->start) * queries;
        float *rows = scratch + omp_get_thread_num() * room;
        float *of_keys = rows + width * stride, *of_values = of_keys + width * stride;
        float *keys = of_values + width * stride, *values = keys + size * stride;
        float *weights = values + size * stride, *of_scores = weights + TILE * stride;
        float *asked_rows = of_scores + TILE * stride, *given_rows = asked_rows + TILE * width;
        float *mixed = given_rows + TILE * width;
        gather(value, s, heads, head, all, size, width, stride, rows, values);
        gather(key, s, heads, head, all, size, width, stride, rows, keys);
        memset(of_keys, 0, 2 * width * stride * sizeof(float));
        memset(asked_rows, 0, 2 * TILE * width * sizeof(float));
        for (int64_t from = 0; from < total; from += TILE) {
            const tile now = take_tile(s, from, queries, query_heads, head);
            const float *asked[TILE], *given[TILE];
            for (int64_t t = 0; t < TILE; t++) {
                asked[t] = memcpy(asked_rows + t * width, query + now.places[t] * size, size * sizeof(float));
                given[t] = memcpy(given_rows + t * width, grad + now.places[t] * size, size * sizeof(float));
            }
            products(asked, keys, now.most, size, stride, weights);
            products(given, values, now.most, size, stride, of_scores);
            for (int64_t t = 0; t < TILE; t++) {
                const int64_t count = from + t < total ? now.counts[t] : 0; /* one that stands there again */
                float *weight = weights + t * stride, *of_score = of_scores + t * stride, along = 0;
                for (int64_t i = 0; i < size; i++)
                    along += given[t][i] * out[now.places[t] * size + i];
                for (int64_t n = 0; n < count; n++) {
                    weight[n] = exponential(weight[n] - logsumexp[now.places[t]]);
                    of_score[n] = weight[n] * (of_score[n] - along);
                }
                for (int64_t n = count; n < now.most; n++)
                    weight[n] = of_score[n] = 0;
            }
            mix(of_scores, rows, now.most, width, stride, mixed);
            for (int64_t t = 0; t < TILE && from + t < total; t++)
                memcpy(grad_query + now.places[t] * size, mixed + t * width, size * sizeof(float));
            spread(of_scores, asked_rows, now.most, width, stride, of_keys);
            spread(weights, given_rows, now.most, width, stride, of_values);
        }
        float *to_prompt = of_prompts + task * longest * size;
        for (int64_t n = 0; n < all; n++) {
            const int64_t place = (token_of(s, n) * heads + head) * size;
            float *to_key = n < before ? to_prompt + n * size : grad_key + place;
            float *to_value = n < before ? to_prompt + half + n * size : grad_value + place;
            memcpy(to_key, of_keys + n * width, size * sizeof(float));
            memcpy(to_value, of_values + n * width, size * sizeof(float));
        }
    }
    #pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < count_segments * heads; task++) {
        const segment *prompt = segments + task / heads;
        const int64_t head = task % heads;
        for (int64_t other = 0; other < count_segments; other++) {
            const segment *s = segments + other;
            if (s->prompt_start != prompt->start || s->prompt_end != prompt->end)
                continue;
            for (int64_t n = 0; n < s->prompt_end - s->prompt_start; n++) {
                const int64_t place = ((prompt->start + n) * heads + head) * size;
                const float *from = of_prompts + ((other * heads + head) * longest + n) * size;
                for (int64_t i = 0; i < size; i++) {
                    grad_key[place + i] += from[i];
                    grad_value[place + i] += from[half + i];
                }
            }
        }
    }
}

/* ---------------------------------------------------------------------------------------------------------
   Rows of logits. Sums are taken of PART of them in float32, and of these sums in float64. */

enum { PART = 256 };

static inline float highest_of(const float *logit, int64_t vocabulary)
{
    float highest = logit[0];
    for (int64_t i = 0; i < vocabulary; i++)
        highest = logit[i] > highest ? logit[i] : highest;
    return highest;
}

/* One token a row, where the cumulative probability passes the row's random number. */
void sample(const float *logits, double temperature, const double *uniforms, int64_t *tokens, float *logprobs,
            int64_t rows, int64_t vocabulary, int threads)
{
    #pragma omp parallel for num_threads(share(rows * vocabulary, threads))
    for (int64_t row = 0; row < rows; row++) {
        const float *logit = logits + row * vocabulary, scale = 1 / temperature;
        const int64_t parts = (vocabulary + PART - 1) / PART;
        const float highest = highest_of(logit, vocabulary);
        double sums[parts], total = 0, before = 0;
        for (int64_t part = 0; part < parts; part++) {
            const int64_t from = part * PART, end = from + PART < vocabulary ? from + PART : vocabulary;
            float sum = 0;
            for (int64_t i = from; i < end; i++)
                sum += exponential((logit[i] - highest) * scale);
            total += sums[part] = sum;
        }
        /* First the part in which the number falls, then the token in it: of those with any weight the last
           where rounding would lead past all. */
        const double target = uniforms[row] * total;
        double passed = 0;
        int64_t chosen = 0, token;
        for (int64_t part = 0; part < parts && !(passed > target); part++) {
            if (sums[part] > 0) {
                chosen = part;
                before = passed;
            }
            passed += sums[part];
        }
        token = chosen * PART;
        for (int64_t i = token; i < vocabulary && i < (chosen + 1) * PART && !(before > target); i++) {
            const float weight = exponential((logit[i] - highest) * scale);
            if (weight > 0)
                token = i;
            before += weight;
        }
        tokens[row] = token;
        logprobs[row] = (logit[token] - highest) * scale - (float)log(total);
    }
}

/* Of every row the log-probability of a target, the entropy, and the logarithm of the sum of all weights, that
   of the largest being 1. */
void score(const float *logits, double temperature, const int64_t *targets, float *logprobs, float *entropy,
           float *log_sums, int64_t rows, int64_t vocabulary, int threads)
{
    #pragma omp parallel for num_threads(share(rows * vocabulary, threads))
    for (int64_t row = 0; row < rows; row++) {
        const float *logit = logits + row * vocabulary, scale = 1 / temperature;
        const float highest = highest_of(logit, vocabulary);
        double total = 0, along = 0;
        for (int64_t from = 0; from < vocabulary; from += PART) {
            const int64_t end = from + PART < vocabulary ? from + PART : vocabulary;
            float sum = 0, product = 0;
            for (int64_t i = from; i < end; i++) {
                const float below = (logit[i] - highest) * scale, weight = exponential(below);
                sum += weight;
                product += weight * below;
            }
            total += sum;
            along += product;
        }
        const double log_sum = log(total);
        log_sums[row] = log_sum;
        entropy[row] = log_sum - along / total;
        logprobs[row] = (logit[targets[row]] - highest) * scale - log_sum;
    }
}

/* The gradient of the logits, in their place. `pull` and `spread`, which may be NULL, are the gradients of the
   log-probabilities and the entropies over the temperature.
   d logprob / d logit_v = [v = target] - p_v;  d entropy / d logit_v = -p_v (log p_v + entropy) */
void score_backward(float *logits, double temperature, const int64_t *targets, const float *entropy,
                    const float *log_sums, const float *pull, const float *spread, int64_t rows,
                    int64_t vocabulary, int threads)
{
    #pragma omp parallel for num_threads(share(rows * vocabulary, threads))
    for (int64_t row = 0; row < rows; row++) {
        float *logit = logits + row * vocabulary;
        const float scale = 1 / temperature, highest = highest_of(logit, vocabulary);
        const float log_sum = log_sums[row], all = entropy[row], of_entropy = spread ? spread[row] : 0;
        for (int64_t i = 0; i < vocabulary; i++) {
            const float logprob = (logit[i] - highest) * scale - log_sum;
            /* Where nobody asks for it, the entropy's part may be no number. */
            logit[i] = -exponential(logprob) * (pull[row] + (spread ? of_entropy * (logprob + all) : 0));
        }
        logit[targets[row]] += pull[row];
    }
}
