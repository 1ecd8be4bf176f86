/* What a processor computes between the matrix products of a step of decoding: each of these in one pass,
   where torch would call ten operations. fused_kernels.py compiles it, and tells of every argument.

   Rows are independent, and each is computed by one thread in one order: the numbers depend neither on the
   threads nor on the rows beside. Tensors are contiguous. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

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
    #pragma omp parallel for num_threads(threads)
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

/* gate = silu(gate) * up */
void silu_multiply(float *restrict gate, const float *restrict up, int64_t numbers, int threads)
{
    #pragma omp parallel for simd num_threads(threads)
    for (int64_t i = 0; i < numbers; i++) {
        const float x = gate[i], small = exponential(x < 0 ? x : -x); /* sigmoid(x) without a large power */
        gate[i] = x * (x < 0 ? small : 1) / (1 + small) * up[i];
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
    #pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
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

/* One token a row, where the cumulative probability passes the row's random number. */
void sample(const float *logits, double temperature, const double *uniforms, int64_t *tokens, float *logprobs,
            int64_t rows, int64_t vocabulary, int threads)
{
    enum { PART = 256 };
    #pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *logit = logits + row * vocabulary, scale = 1 / temperature;
        const int64_t parts = (vocabulary + PART - 1) / PART;
        double sums[parts], total = 0, before = 0;
        float highest = logit[0];
        for (int64_t i = 0; i < vocabulary; i++)
            highest = logit[i] > highest ? logit[i] : highest;
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
