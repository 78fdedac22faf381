// W4A16 mixture of experts for at most 8 tokens. `moe` defines it and the packed layout; `moe_cuda` launches it.
//
//   experts   the choice of a token's experts from the router's logits, if it is not given. Gate, up and SwiGLU: 64 rows of
//             a listed expert at a time a block. Then down: 256 output rows at a time, a part for every token that is
//             routed there
//   combine   adds the parts of a token in ascending id of its experts
//
// Weights go from memory to the registers in which an MMA wants them, AHEAD pages before they are multiplied; nothing
// else is as large. A thread's 16 bytes of a page's row are 32 codes, one block: it needs one scale. Which columns of K
// meet in an MMA is free as long as weights and activations agree, so activations are kept in the order of the words:
// 16 bytes of a "slot" are 8 neighbours x[8p .. 8p + 7] of a token as {0, 4}, {1, 5}, {2, 6}, {3, 7}, and the slot of
// pair p = 16 page + 4 t + i of token n is number (4 page + i) * 32 + 4 n + t, so that a warp reads 32 in a row.
//
// A token's bits depend on its own routing and on the shapes alone: the first product sums K in four quarters, in order;
// the second keeps each (token, expert) apart.
//
// Macros: HIDDEN and INTER (padded), EXPERTS, TOP_K, AHEAD (pages), STAGES (of the ring), CHOOSE (1: from logits, 0: ids and
// weights are given). Names: g, t = lane / 4, lane % 4; n = token; u = place in the list.

constexpr int TOKENS = 8, WARPS = 16, PAGE = 64;        // PAGE in uint4, scales the same number of bytes
constexpr int QUARTERS = 4, STRIPS = WARPS / QUARTERS;       // strips of 16 rows
constexpr int SLOTS = TOKENS * TOP_K;

#include "ptx.cuh"

// Two words -> their codes c of both, times 2**-126, as pairs of BF16.
DEVICE void unpack(unsigned w, unsigned (&out)[4]) {
    out[0] = w & 0x81C081C0u;
    out[1] = (w << 3) & 0x81C081C0u;
    out[2] = (w << 6) & 0x81C081C0u;
    out[3] = ((w << 1) & 0x80008000u) | ((w >> 3) & 0x01800180u) | ((w >> 7) & 0x00400040u);
}

// A thread's part of a page: its words and scales of rows g and g + 8.
struct Page {
    uint4 words[2];
    unsigned scales[2];

    DEVICE void load(const uint4* w, const unsigned char* s, int lane) {
        words[0] = stream(w + lane);
        words[1] = stream(w + 32 + lane);
        scales[0] = stream(s + lane);
        scales[1] = stream(s + 32 + lane);
    }

    // acc += this page times the activations in the slots from `x` on.
    DEVICE void multiply(float4& acc, const uint4* x) const {
        const unsigned of_g = scales[0] * 0x00800080u, of_8 = scales[1] * 0x00800080u;  // pairs of 2**(b - 1)
        const unsigned a[4] = {words[0].x, words[0].y, words[0].z, words[0].w};
        const unsigned b[4] = {words[1].x, words[1].y, words[1].z, words[1].w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned p[4], q[4];
            unpack(a[i], p);
            unpack(b[i], q);
#pragma unroll
            for (int c = 0; c < 4; c++) p[c] = multiply_pairs(p[c], of_g), q[c] = multiply_pairs(q[c], of_8);
            const uint4 v = x[i * 32];
            mma(acc, p[0], q[0], p[1], q[1], v.x, v.y);
            mma(acc, p[2], q[2], p[3], q[3], v.z, v.w);
        }
    }
};

// What the two products share: the distinct ids ascending, and for each of them and each token the weight and where its part
// goes. All of it comes before the first weights are asked for: behind these, shared memory is slow.
struct Routing {
    static constexpr int WORDS = (EXPERTS + 127) / 128 * 4;
    alignas(16) unsigned present[TOKENS + 1][WORDS];  // a bit for an id: of a token's, and last of anybody's
    int ids[SLOTS];                                   // of token n from n TOP_K on
    float weights[SLOTS];
    int distinct[TOKENS + 1];  // ids of a token, and of all
    short experts[SLOTS];      // the list
    float combine[SLOTS][TOKENS];
    signed char place[SLOTS][TOKENS];  // of the expert among those of the token, ascending, or -1

    DEVICE void clear() {
        const int tid = threadIdx.x;
        for (int w = tid; w < (TOKENS + 1) * WORDS; w += blockDim.x) (&present[0][0])[w] = 0;
        for (int i = tid; i < SLOTS * TOKENS; i += blockDim.x) (&place[0][0])[i] = -1;
        __syncthreads();
    }

    DEVICE void put(int slot, int id, float weight) {  // after `clear`
        ids[slot] = id, weights[slot] = weight;
        atomicOr(&present[slot / TOP_K][id / 32], 1u << (id % 32));
        atomicOr(&present[TOKENS][id / 32], 1u << (id % 32));
    }

    DEVICE int before(int whose, int e) const {  // how many of these ids are below e
        int n = 0;
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            const unsigned word = present[whose][w];
            n += __popc(e / 32 > w ? word : e / 32 == w ? word & ((1u << (e % 32)) - 1) : 0);
        }
        return n;
    }

    // What follows from all that was put. By all threads; what they wrote before is there for all as well.
    DEVICE void list(int tokens) {
        const int tid = threadIdx.x, n = tid / TOP_K;
        __syncthreads();
        if (tid / 32 == WARPS - 1 && tid % 32 <= TOKENS) distinct[tid % 32] = before(tid % 32, WORDS * 32);
        if (tid < tokens * TOP_K) {  // of an id that repeats, each writes the same
            const int id = ids[tid], u = before(TOKENS, id);
            experts[u] = id;
            place[u][n] = before(n, id);
            float sum = weights[tid];
            if (!CHOOSE) {
                sum = 0;
#pragma unroll
                for (int j = 0; j < TOP_K; j++) sum += ids[n * TOP_K + j] == id ? weights[n * TOP_K + j] : 0;
            }
            combine[u][n] = sum;
        }
        __syncthreads();
    }
};

// The choice of `router`, the same in all blocks. Warp n chooses for token n. A lane has KEYS neighbours, so of equal keys the
// first one of the lowest lane has the lowest id.
struct Choice {
    static constexpr int KEYS = (EXPERTS + 31) / 32;
    float bias[KEYS];

    DEVICE static unsigned ordered(float v) {  // an integer of the same order, above 0; NaN is the largest
        const unsigned bits = __float_as_uint(v);
        return v != v ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
    }

    DEVICE void ask(const float* from) {
#pragma unroll
        for (int i = 0; i < KEYS; i++) bias[i] = early(from + min(int(threadIdx.x) % 32 * KEYS + i, EXPERTS - 1));
    }

    // Puts the experts of token n, of which `logits` are. A choice has no branch: all lanes do what one of them keeps.
    DEVICE void choose(Routing& routing, int n, const float* logits, float scaling, bool normalise) {
        const int lane = threadIdx.x % 32;
        float score[KEYS];
        unsigned key[KEYS];
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            const int e = lane * KEYS + i;
            score[i] = reciprocal(1 + __expf(-logits[min(e, EXPERTS - 1)]));
            key[i] = e < EXPERTS ? ordered(score[i] + bias[i]) : 0;
        }
        float total = 0, own = 0;
        int id = 0;
#pragma unroll 1
        for (int j = 0; j < TOP_K; j++) {
            unsigned mine = key[0];
#pragma unroll
            for (int i = 1; i < KEYS; i++) mine = max(mine, key[i]);
            const unsigned best = __reduce_max_sync(~0u, mine);
            const int owner = __ffs(__ballot_sync(~0u, mine == best)) - 1;
            int at = KEYS - 1;
            float found = score[KEYS - 1];
#pragma unroll
            for (int i = KEYS - 2; i >= 0; i--) {
                const bool here = key[i] == best;
                at = here ? i : at, found = here ? score[i] : found;
            }
#pragma unroll
            for (int i = 0; i < KEYS; i++) key[i] = lane == owner && i == at ? 0 : key[i];
            found = __shfl_sync(~0u, found, owner), at = __shfl_sync(~0u, at, owner);
            total += found;
            if (lane == j) own = found, id = owner * KEYS + at;
        }
        if (lane < TOP_K) routing.put(n * TOP_K + lane, id, (normalise ? own / (total + 1e-20f) : own) * scaling);
    }
};

// Where a warp's next AHEAD pages are; `words` is null where nothing comes.
struct Source {
    const uint4* words;
    const unsigned char* scales;

    DEVICE Source(const uint4* w, const unsigned char* s, int page) : words(w + size_t(page) * PAGE), scales(s + size_t(page) * PAGE) {}
    DEVICE Source() : words(nullptr), scales(nullptr) {}
    DEVICE void load(Page& page, int d, int lane) const {
        if (words) page.load(words + d * PAGE, scales + d * PAGE, lane);
    }
};

// parts float32 [tokens, TOP_K, columns] <- for place j of a token's distinct experts, ascending, weight * down(silu(gate) *
// up), and zeros behind the last of them.
// up [EXPERTS, 2 INTER / 16, HIDDEN / 128, PAGE], of 16 rows the first 8 are gates; down [EXPERTS, HIDDEN / 16, INTER / 128,
// PAGE]; scales the same in bytes. between bf16 [SLOTS][INTER / 128 pages of slots]. `ready` int [SLOTS + 1] is zero before and
// after: how many strips of an expert are in `between`, and how many blocks have ended.
//
// With CHOOSE, ids and weights are written, by one block: what was chosen from logits float32 [tokens, EXPERTS] and the bias
// float32 [biases, EXPERTS], of which token n has row positions[n] % biases.
//
// x, the bias and positions are read before the wait: they are older than what the kernel before this one makes (`launch`
// says who sees to that).
//
// One block a multiprocessor, all of them resident, since the second product waits for strips of the first that other
// blocks make: those come before in every block's order, so that somebody can always go on.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
experts(float* parts, uint4* between, int* ready, const uint4* up, const unsigned char* up_scales, const uint4* down,
        const unsigned char* down_scales, const uint4* x, int* ids, float* weights, int tokens, int columns
#if CHOOSE
        , const float* logits, const float* bias, const long long* positions, int biases, int normalise, float scaling
#endif
) {
    constexpr int PAGES = HIDDEN / 128, MINE = PAGES / QUARTERS, CHUNKS = MINE / AHEAD, BLOCKS = INTER / 8 / STRIPS;
    constexpr int GROUPS = HIDDEN / 8 * TOKENS, EACH = GROUPS / (WARPS * 32);
    static_assert(MINE * QUARTERS == PAGES && CHUNKS * AHEAD == MINE && EACH * WARPS * 32 == GROUPS, "HIDDEN");
    static_assert(BLOCKS * STRIPS * 8 == INTER, "INTER");
    extern __shared__ uint4 shared[];
    __shared__ Routing routing;
    uint4* const slots = shared;                                              // [PAGES][4][32]
    float4* const sums = reinterpret_cast<float4*>(shared + PAGES * 4 * 32);  // [2][STRIPS][QUARTERS][32]
    uint4* const ring = shared + PAGES * 4 * 32 + 2 * WARPS * 32;             // [STAGES][SPAN * INTER / 128 pages of slots]
    const int tid = threadIdx.x, lane = tid % 32;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // so that ptxas knows it to be the same in all lanes
    const int strip = warp / QUARTERS, quarter = warp % QUARTERS, step = gridDim.x;

    uint4 row[EACH];  // 8 neighbours of a token each; a warp reads 32 groups in a row
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = i * WARPS * 32 + tid, n = at / (HIDDEN / 8), group = at % (HIDDEN / 8);
        row[i] = n < tokens && group * 8 < columns ? early(x + n * (columns / 8) + group) : make_uint4(0, 0, 0, 0);
    }
    routing.clear();
#if CHOOSE
    Choice choice;
    const int from = biases > 1 && warp < tokens ? early(reinterpret_cast<const int*>(positions + warp)) % biases : 0;  // its low half
    choice.ask(bias + from * EXPERTS);
#endif
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = i * WARPS * 32 + tid, n = at / (HIDDEN / 8), group = at % (HIDDEN / 8);
        const uint4 v = row[i];
        slots[(group / 16 * 4 + group % 4) * 32 + n * 4 + group % 16 / 4] = make_uint4(
            __byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632));
    }
    wait_for_predecessor();
#if CHOOSE
    if (warp < tokens) choice.choose(routing, warp, logits + warp * EXPERTS, scaling, normalise);
#else
    if (tid < tokens * TOP_K) routing.put(tid, ids[tid], weights[tid]);
#endif
    routing.list(tokens);
#if CHOOSE
    if (blockIdx.x == 0 && tid < tokens * TOP_K) ids[tid] = routing.ids[tid], weights[tid] = routing.weights[tid];
#endif
    const int count = routing.distinct[TOKENS], items = count * BLOCKS;
    auto up_pages = [&](int item) {
        if (item >= items) return Source();
        const int expert = routing.experts[item / BLOCKS];
        return Source(up, up_scales, (expert * (INTER / 8) + item % BLOCKS * STRIPS + strip) * PAGES + quarter * MINE);
    };
    Page ahead[AHEAD];
    Source source = up_pages(blockIdx.x);
#pragma unroll
    for (int d = 0; d < AHEAD; d++) source.load(ahead[d], d, lane);

    // Of the second product: a turn is SPAN items of 256 rows of an expert, of which a warp has 16.
    constexpr int INNER = INTER / 128, ROWS = HIDDEN / 16 / WARPS;
    constexpr int SPAN = INNER < AHEAD ? AHEAD / INNER : 1, TURN_CHUNKS = INNER < AHEAD ? 1 : INNER / AHEAD;
    constexpr int OF_ITEM = INNER < AHEAD ? INNER : AHEAD;  // pages of an item in a chunk
    static_assert(SPAN * OF_ITEM == AHEAD && TURN_CHUNKS * OF_ITEM == INNER && ROWS * WARPS * 16 == HIDDEN, "INTER, HIDDEN");
    const int rows = count * ROWS;  // items
    auto down_pages = [&](int item) {
        if (item >= rows) return Source();
        const int expert = routing.experts[item / ROWS];
        return Source(down, down_scales, (expert * (HIDDEN / 16) + item % ROWS * WARPS + warp) * INNER);
    };
    // Page d of the chunk that begins at `first`; with SPAN > 1 it is of a later item.
    auto fetch = [&](int d, int first, const Source& chunk) {
        if (SPAN == 1) chunk.load(ahead[d], d, lane);
        else down_pages(first + d / OF_ITEM * step).load(ahead[d], d % OF_ITEM, lane);
    };

    int turn = 0;
    for (int item = blockIdx.x; item < items; item += step, turn++) {
        float4 acc = make_float4(0, 0, 0, 0);
        const bool leave = item + step >= items;
        const Source first = up_pages(item), after = leave && SPAN == 1 ? down_pages(blockIdx.x) : up_pages(item + step);
#pragma unroll 1
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const bool last = chunk == CHUNKS - 1;
            Source coming = last ? after : first;
            if (!last) coming.words += (chunk + 1) * AHEAD * PAGE, coming.scales += (chunk + 1) * AHEAD * PAGE;
            const uint4* v = slots + (quarter * MINE + chunk * AHEAD) * 128 + lane;
#pragma unroll
            for (int d = 0; d < AHEAD; d++) {
                ahead[d].multiply(acc, v + d * 128);
                coming.load(ahead[d], d, lane);
            }
        }
        if (leave && SPAN > 1) {
            const Source chunk = down_pages(blockIdx.x);
#pragma unroll
            for (int d = 0; d < AHEAD; d++) fetch(d, blockIdx.x, chunk);
        }
        float4* const part = sums + ((turn % 2) * STRIPS + strip) * QUARTERS * 32 + lane;
        part[quarter * 32] = acc;
        meet<QUARTERS * 32>(1 + strip);
        if (quarter == turn % QUARTERS) {  // two turns later nobody reads this buffer: this warp has to come to the next barrier
            float4 sum = part[0];
#pragma unroll
            for (int q = 1; q < QUARTERS; q++) {
                const float4 v = part[q * 32];
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            const float a = sum.x / (1 + __expf(-sum.x)) * sum.z, b = sum.y / (1 + __expf(-sum.y)) * sum.w;
            const unsigned both = bf16_pair(a, b);
            const int g = lane / 4, n = lane % 4 * 2, p = item % BLOCKS * STRIPS + strip, u = item / BLOCKS;  // 8 rows are pair p
            const int slot = (p / 16 * 4 + p % 4) * 32 + n * 4 + p % 16 / 4;
            unsigned short* const at = reinterpret_cast<unsigned short*>(between) + (u * INTER * TOKENS + slot * 8 + g % 4 * 2 + g / 4);
            at[0] = both & 0xFFFF;
            at[4 * 8] = both >> 16;
            __syncwarp();
            if (lane == 0) publish(ready + u);
        }
    }
    if (blockIdx.x >= items && blockIdx.x < rows) {
        const Source chunk = down_pages(blockIdx.x);
#pragma unroll
        for (int d = 0; d < AHEAD; d++) fetch(d, blockIdx.x, chunk);
    }

    constexpr int STAGE = SPAN * INNER * 128, COPIES = STAGE / (WARPS * 32);  // 16 bytes each
    static_assert(COPIES * WARPS * 32 == STAGE, "INTER");
    int flags[COPIES];
    auto item_of = [&](int stage, int i) { return int(blockIdx.x) + (stage * SPAN + (i * WARPS * 32 + tid) / (INNER * 128)) * step; };
    auto ask = [&](int stage) {  // whether what a stage copies is there; the answer is read at the copy
#pragma unroll
        for (int i = 0; i < COPIES; i++)
            if (item_of(stage, i) < rows) flags[i] = look(ready + item_of(stage, i) / ROWS);
    };
    auto copy = [&](int stage) {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            const int item = item_of(stage, i), at = i * WARPS * 32 + tid;
            if (item < rows) {
                for (int tries = 0; flags[i] < INTER / 8; tries++) {
                    flags[i] = look(ready + item / ROWS);
                    if (tries > 1 << 24) __trap();  // seconds: a block that should be there is not
                }
                // From the second-level cache, where the strips were before their count: nothing older can come.
                copy_async(ring + stage % STAGES * STAGE + at, between + item / ROWS * (INNER * 128) + at % (INNER * 128), true);
            }
        }
        commit_copies();
    };
    ask(0);
    for (int stage = 0; stage < STAGES - 1; stage++) copy(stage), ask(stage + 1);
    turn = 0;
    for (int item = blockIdx.x; item < rows; item += SPAN * step, turn++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();  // everybody's copies are there, and nobody reads the stage that is filled next
        copy(turn + STAGES - 1);
        ask(turn + STAGES);
        if (item + SPAN * step >= rows) let_successor_begin();  // not before: its weights would be in the way of these
        float4 acc = make_float4(0, 0, 0, 0);
        const Source first = down_pages(item), after = down_pages(item + SPAN * step);
        const uint4* const v = ring + turn % STAGES * STAGE + lane;
#pragma unroll 1
        for (int chunk = 0; chunk < TURN_CHUNKS; chunk++) {
            const bool last = chunk == TURN_CHUNKS - 1;
            Source coming = last ? after : first;
            if (!last) coming.words += (chunk + 1) * AHEAD * PAGE, coming.scales += (chunk + 1) * AHEAD * PAGE;
#pragma unroll
            for (int d = 0; d < AHEAD; d++) {
                const int mine = item + d / OF_ITEM * step;
                if (SPAN > 1 && mine >= rows) break;
                ahead[d].multiply(acc, v + (chunk * AHEAD + d) * 128);
                fetch(d, item + SPAN * step, coming);
                if (last && d % OF_ITEM == OF_ITEM - 1) {
                    const int n = lane % 4 * 2, r = (mine % ROWS * WARPS + warp) * 16 + lane / 4, u = mine / ROWS;
                    const float values[4] = {acc.x, acc.y, acc.z, acc.w};
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int token = n + i % 2, to = r + i / 2 * 8, j = routing.place[u][token];
                        if (j >= 0 && to < columns) parts[(token * TOP_K + j) * columns + to] = values[i] * routing.combine[u][token];
                    }
                    acc = make_float4(0, 0, 0, 0);
                }
            }
        }
    }

    for (int n = 0; n < tokens; n++)  // an id that repeats leaves a place without an expert
        for (int j = CHOOSE ? TOP_K : routing.distinct[n]; j < TOP_K; j++)
            for (int column = blockIdx.x * blockDim.x + tid; column < columns; column += step * blockDim.x)
                parts[(n * TOP_K + j) * columns + column] = 0;
    __syncthreads();
    if (tid == 0 && atomicAdd(ready + SLOTS, 1) == step - 1)  // nobody looks at `ready` any more
        for (int u = 0; u <= SLOTS; u++) ready[u] = 0;
}

// out bf16 [tokens, columns] <- the sums of parts float32 [tokens, TOP_K, columns], in order. 4 columns a thread.
extern "C" __global__ void combine(uint2* out, const float4* parts, int tokens, int columns) {
    let_successor_begin();
    wait_for_predecessor();
    const int at = blockIdx.x * blockDim.x + threadIdx.x, each = columns / 4, n = at / each;
    if (n >= tokens) return;
    float4 v[TOP_K];
#pragma unroll
    for (int j = 0; j < TOP_K; j++) v[j] = parts[(size_t(n) * TOP_K + j) * each + at % each];
    float4 sum = v[0];
#pragma unroll
    for (int j = 1; j < TOP_K; j++) sum.x += v[j].x, sum.y += v[j].y, sum.z += v[j].z, sum.w += v[j].w;
    out[at] = make_uint2(bf16_pair(sum.x, sum.y), bf16_pair(sum.z, sum.w));
}
