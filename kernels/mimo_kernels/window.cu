// Attention over a sliding window for at most 8 tokens, from the fused projection: rotation, cache writes, softmax with
// sink. `window` defines it, `window_cuda` launches it.
//
// A block has 16 query rows of one key-value head (some tokens of all its query heads) and all keys they may see: the
// ring, which holds what came before, and the tokens of this call, which it computes itself. So no block waits for
// another, and there is one softmax, not one a step. What a block finds in the slots that this call fills it does not
// use. Both sums over keys go by slots, in order: a row's bits do not depend on which call its keys came with.
//
// The ring is most of what a block reads, and what it holds and `start` are older than this pass: they are read before
// the wait (`launch` says who sees to that).
//
// Keys and queries go from memory to the registers in which an MMA wants them: a thread's 16 bytes are 8 neighbours, and
// a rotation's pairs i and i + HALF meet in one thread when HALF is a multiple of 32. Values go through shared memory,
// because their product wants them transposed.
//
// Macros: K, V (sizes of a head), HALF (rotated pairs), GROUP (query heads of a key-value head), SLOTS, SINK (0 or 1).
// Names: g, t = lane / 4, lane % 4; s = slot.

constexpr int WARPS = 8, ROWS = 16, TOKENS = 8, CHUNKS = K / 32, PAIRS = HALF / 32;
constexpr int TILES = (SLOTS + 7) / 8, ROUNDS = TILES / WARPS + 1;  // tiles of 8 keys; the last warp's last is the new tokens
constexpr int KEYS = (SLOTS + 15) / 16 * 16;          // of the second product
constexpr int V_STRIDE = V + 8, P_STRIDE = KEYS + 8;  // so that neighbouring rows are in other banks
constexpr int DIMS = V / WARPS;                       // of a warp in the second product
static_assert(K % 32 == 0 && HALF % 32 == 0 && 2 * HALF <= K && DIMS == 16 && ROWS % GROUP == 0, "heads");

typedef unsigned short bf16;

#include "ptx.cuh"

// Pairs (first, second) of two BF16 each by the angles' cosines and sines; rounds once.
DEVICE void rotate(unsigned& first, unsigned& second, unsigned cos, unsigned sin) {
    const float a = low(first), b = high(first), c = low(second), d = high(second);
    first = bf16_pair(a * low(cos) - c * low(sin), b * high(cos) - d * high(sin));
    second = bf16_pair(c * low(cos) + a * low(sin), d * high(cos) + b * high(sin));
}

// The cosines and sines of a row for a thread's pairs.
struct Angles {
    uint4 cos[PAIRS], sin[PAIRS];

    DEVICE void load(const bf16* c, const bf16* s, int t) {
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            cos[j] = *reinterpret_cast<const uint4*>(c + j * 32 + t * 8);
            sin[j] = *reinterpret_cast<const uint4*>(s + j * 32 + t * 8);
        }
    }
};

// A thread's share of a head: 8 neighbours of every 32, rotated by the angles of its row.
struct Head {
    uint4 part[CHUNKS];

    DEVICE void load(const bf16* at, int t) {
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) part[j] = *reinterpret_cast<const uint4*>(at + j * 32 + t * 8);
    }
    DEVICE void load_early(const bf16* at, int t) {
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) part[j] = early(reinterpret_cast<const uint4*>(at + j * 32 + t * 8));
    }
    DEVICE void clear() {
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) part[j] = make_uint4(0, 0, 0, 0);
    }
    DEVICE void turn(const Angles& by) {
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            const uint4 c = by.cos[j], s = by.sin[j];
            rotate(part[j].x, part[j + PAIRS].x, c.x, s.x);
            rotate(part[j].y, part[j + PAIRS].y, c.y, s.y);
            rotate(part[j].z, part[j + PAIRS].z, c.z, s.z);
            rotate(part[j].w, part[j + PAIRS].w, c.w, s.w);
        }
    }
};

// out bf16 [rows, heads, V], rows behind `count` repeat the last one, of qkv bf16 [rows, (heads + groups) * K + groups *
// V], cos and sin bf16 [rows, HALF]. keys bf16 [groups, SLOTS, K] and values [groups, SLOTS, V] get the first `count` rows
// at (start + row) % SLOTS. `scale` has the factor log2(e), sink float32 [heads] has not.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
attend(bf16* out, const bf16* qkv, const bf16* cos, const bf16* sin, bf16* keys, bf16* values, const long long* start_at,
       const float* sink, int groups, int rows, int count, int window, float scale, float value_scale) {
    extern __shared__ uint4 shared[];
    bf16* const v_rows = reinterpret_cast<bf16*>(shared);  // [KEYS][V_STRIDE]
    __shared__ bf16 weights[ROWS * P_STRIDE];
    __shared__ float4 tops[ROWS][WARPS / 4];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    const int group = blockIdx.x % groups, first = blockIdx.x / groups * (ROWS / GROUP), heads = groups * GROUP;
    const int width = (heads + groups) * K + groups * V;
    bf16* const ring_k = keys + size_t(group) * SLOTS * K;
    bf16* const ring_v = values + size_t(group) * SLOTS * V;
    const int start = early(reinterpret_cast<const int*>(start_at));  // its low half
    Head q[2], key[ROUNDS];
    const bool has_new = warp == WARPS - 1;
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const int tile = i * WARPS + warp;
        if (tile < TILES && !(i == ROUNDS - 1 && has_new)) key[i].load_early(ring_k + size_t(min(tile * 8 + g, SLOTS - 1)) * K, t);
    }
    float own_sink[2] = {0, 0};  // in units of ln 2
    if (SINK)
#pragma unroll
        for (int half = 0; half < 2; half++) own_sink[half] = early(sink + group * GROUP + (g + half * 8) % GROUP) * 1.4426950408889634f;
    const int first_slot = start % SLOTS;
    auto fresh = [&](int s) { return (s < first_slot ? s + SLOTS : s) - first_slot < count; };  // whether this call fills slot s
    auto slot_of = [&](int n) { return first_slot + n < SLOTS ? first_slot + n : first_slot + n - SLOTS; };
    for (int i = tid; i < KEYS * (V / 8); i += blockDim.x) {
        const int s = i / (V / 8), d = i % (V / 8) * 8;
        if (s >= SLOTS || !fresh(s)) copy_async(v_rows + s * V_STRIDE + d, ring_v + min(s, SLOTS - 1) * V + d, s < SLOTS);
    }
    commit_copies();
    for (int i = tid; i < ROWS * (KEYS - TILES * 8); i += blockDim.x)  // a last half of 16 columns
        weights[i % ROWS * P_STRIDE + TILES * 8 + i / ROWS] = 0;

    // What positions alone decide: whether row g or g + 8 sees key 2t or 2t + 1 of a tile (bit 4 i + c of `seen`), and
    // which slots' weights this thread stores (bit 2 i + c of `stored`).
    const int newest = start > 0 ? (start - 1) % SLOTS : -1;
    int token[2];
    unsigned seen = 0, stored = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) token[half] = min(first + (g + half * 8) / GROUP, count - 1);
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        const bool mine = i == ROUNDS - 1 && has_new;  // the new tokens
        const int tile = i * WARPS + warp;
        if (!mine && tile >= TILES) continue;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int n = 2 * t + c % 2, s = tile * 8 + n, query = start + token[c / 2];
            const int position = mine ? start + n : start - 1 - newest + s - (s > newest ? SLOTS : 0);
            const bool there = mine ? n < count : s < SLOTS && position >= 0;  // what fresh slots held is outside
            if (there && position <= query && query - position < window) seen |= 1u << (4 * i + c);
            if (c < 2 && (mine ? n < count : s >= SLOTS || !fresh(s))) stored |= 1u << (2 * i + c);
        }
    }
    wait_for_predecessor();
    let_successor_begin();  // not before: its weights would be in the way of the product that this one waits for

    // All loads before the first use: they wait for memory together.
    Angles angles[2], new_angles;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        q[half].load(qkv + size_t(token[half]) * width + (group * GROUP + (g + half * 8) % GROUP) * K, t);
        angles[half].load(cos + token[half] * HALF, sin + token[half] * HALF, t);
    }
    if (has_new) {
        new_angles.load(cos + min(g, count - 1) * HALF, sin + min(g, count - 1) * HALF, t);
        if (g < count) key[ROUNDS - 1].load(qkv + size_t(g) * width + (heads + group) * K, t);
        else key[ROUNDS - 1].clear();
    }
    static_assert(TOKENS * (V / 8) <= WARPS * 32, "a thread has 8 values of a token at most");
    if (tid < count * (V / 8)) {
        const int n = tid / (V / 8), d = tid % (V / 8) * 8;
        uint4 v = *reinterpret_cast<const uint4*>(qkv + size_t(n) * width + (heads + groups) * K + group * V + d);
        v.x = bf16_pair(low(v.x) * value_scale, high(v.x) * value_scale), v.y = bf16_pair(low(v.y) * value_scale, high(v.y) * value_scale);
        v.z = bf16_pair(low(v.z) * value_scale, high(v.z) * value_scale), v.w = bf16_pair(low(v.w) * value_scale, high(v.w) * value_scale);
        *reinterpret_cast<uint4*>(v_rows + slot_of(n) * V_STRIDE + d) = v;
        if (first == 0) *reinterpret_cast<uint4*>(ring_v + slot_of(n) * V + d) = v;
    }
    q[0].turn(angles[0]), q[1].turn(angles[1]);
    if (has_new && g < count) {
        Head& mine = key[ROUNDS - 1];
        mine.turn(new_angles);
        if (first == 0)
#pragma unroll
            for (int j = 0; j < CHUNKS; j++) *reinterpret_cast<uint4*>(ring_k + slot_of(g) * K + j * 32 + t * 8) = mine.part[j];
    }

    // Logits in units of ln 2.
    const float nothing = __int_as_float(0xFF800000);  // -inf
    float logits[ROUNDS][4], top[2] = {nothing, nothing};
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) {
        float4 acc = make_float4(0, 0, 0, 0), other = acc;
        if (i * WARPS + warp < TILES || i == ROUNDS - 1 && has_new)
#pragma unroll
            for (int j = 0; j < CHUNKS; j++) {
                mma(acc, q[0].part[j].x, q[1].part[j].x, q[0].part[j].y, q[1].part[j].y, key[i].part[j].x, key[i].part[j].y);
                mma(other, q[0].part[j].z, q[1].part[j].z, q[0].part[j].w, q[1].part[j].w, key[i].part[j].z, key[i].part[j].w);
            }
        const float products[4] = {acc.x + other.x, acc.y + other.y, acc.z + other.z, acc.w + other.w};
#pragma unroll
        for (int c = 0; c < 4; c++) {
            logits[i][c] = seen >> (4 * i + c) & 1 ? products[c] * scale : nothing;
            top[c / 2] = fmaxf(top[c / 2], logits[i][c]);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
        top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
        if (t == 0) reinterpret_cast<float*>(tops[g + half * 8])[warp] = top[half];
    }
    __syncthreads();
    float extra[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; half++) {  // every row sees its own key at least
        float above = nothing;
#pragma unroll
        for (int w = 0; w < WARPS / 4; w++) {
            const float4 v = tops[g + half * 8][w];
            above = fmaxf(above, fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)));
        }
        if (SINK) {
            above = fmaxf(above, own_sink[half]);
            extra[half] = power_of_two(own_sink[half] - above);
        }
        bf16* const row = weights + (g + half * 8) * P_STRIDE;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int n = 2 * t + c, s = i == ROUNDS - 1 && has_new ? slot_of(n) : (i * WARPS + warp) * 8 + n;
                if (stored >> (2 * i + c) & 1) row[s] = bf16_pair(power_of_two(logits[i][2 * half + c] - above), 0) & 0xFFFF;
            }
    }
    wait_for_copies<0>();
    __syncthreads();

    constexpr unsigned ONES = 0x3F803F80;
    float4 acc[2] = {make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)}, sums = make_float4(0, 0, 0, 0);
    const bf16* const v_at = v_rows + lane % 16 * V_STRIDE + warp * DIMS + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < KEYS; k += 16) {
        const uint4 b = load_transposed(v_at + k * V_STRIDE);
        const unsigned* const p = reinterpret_cast<const unsigned*>(weights + g * P_STRIDE + k + 2 * t);
        const unsigned a[4] = {p[0], p[8 * P_STRIDE / 2], p[4], p[8 * P_STRIDE / 2 + 4]};
        mma(acc[0], a[0], a[1], a[2], a[3], b.x, b.y);
        mma(acc[1], a[0], a[1], a[2], a[3], b.z, b.w);
        mma(sums, a[0], a[1], a[2], a[3], ONES, ONES);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = g + half * 8, to_row = first + row / GROUP;
        if (to_row >= rows) continue;
        const float share = reciprocal(extra[half] + (half ? sums.z : sums.x));
        unsigned* const to = reinterpret_cast<unsigned*>(out + (size_t(to_row) * heads + group * GROUP + row % GROUP) * V + warp * DIMS + 2 * t);
#pragma unroll
        for (int i = 0; i < 2; i++)
            to[i * 4] = half ? bf16_pair(acc[i].z * share, acc[i].w * share) : bf16_pair(acc[i].x * share, acc[i].y * share);
    }
}
