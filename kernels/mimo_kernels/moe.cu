// W4A16 mixture of experts for at most 8 tokens. `moe` defines it and the packed layout; `moe_cuda` launches it.
//
//   experts   gate, up and SwiGLU: 64 rows of a listed expert at a time a block. Then down: 256 output rows at a time, a
//             part for every token that is routed there
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
// Macros: HIDDEN and INTER (padded), EXPERTS, TOP_K, AHEAD (pages), STAGES (of the ring). Names: g, t = lane / 4, lane % 4; n = token; u = place in the list.

constexpr int TOKENS = 8, WARPS = 16, PAGE = 64;        // PAGE in uint4, scales the same number of bytes
constexpr int QUARTERS = 4, STRIPS = WARPS / QUARTERS;       // strips of 16 rows
constexpr int WORDS = (EXPERTS + 31) / 32, SLOTS = TOKENS * TOP_K;

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

// The distinct ids ascending, in shared memory. Every thread of the block takes part.
struct List {
    unsigned present[WORDS];
    short experts[SLOTS];
    int count;

    DEVICE int before(int e) const {  // how many listed ids are below e
        int n = 0;
#pragma unroll
        for (int w = 0; w < WORDS; w++) n += __popc(e / 32 > w ? present[w] : e / 32 == w ? present[w] & ((1u << (e % 32)) - 1) : 0);
        return n;
    }

    DEVICE void build(int id, bool given) {  // of every thread: an id, and whether it has one; `present` is clear
        const int tid = threadIdx.x;
        if (given) atomicOr(&present[id / 32], 1u << (id % 32));
        __syncthreads();
        for (int e = tid; e < EXPERTS; e += blockDim.x)
            if (present[e / 32] >> (e % 32) & 1) experts[before(e)] = e;
        if (tid == 0) count = before(WORDS * 32);
        __syncthreads();
    }
};

// What the two products share: the list, and for each listed expert and token the weight and where its part goes.
struct Routing {
    List list;
    float combine[SLOTS][TOKENS];
    signed char place[SLOTS][TOKENS];  // of the expert among those of the token, ascending, or -1
    int distinct[TOKENS];              // experts of the token

    DEVICE void clear() {  // needs no ids
        const int tid = threadIdx.x;
        for (int w = tid; w < WORDS; w += blockDim.x) list.present[w] = 0;
        for (int i = tid; i < SLOTS * TOKENS; i += blockDim.x) (&place[0][0])[i] = -1;
        if (tid < TOKENS) distinct[tid] = 0;
        __syncthreads();
    }

    DEVICE void build(const int* ids, const float* weights, int tokens) {  // after `clear`
        const int tid = threadIdx.x, n = tid / TOP_K;
        const bool given = tid < tokens * TOP_K;
        int own[TOP_K];  // all ids of this thread's token
        float share[TOP_K];
#pragma unroll
        for (int j = 0; j < TOP_K; j++) own[j] = given ? ids[n * TOP_K + j] : 0, share[j] = given ? weights[n * TOP_K + j] : 0;
        const int id = given ? ids[tid] : 0;
        list.build(id, given);
        float sum = 0;
        int smaller = 0;
#pragma unroll
        for (int j = 0; j < TOP_K; j++) {
            if (own[j] == id) sum += share[j];
            bool again = false;
#pragma unroll
            for (int k = 0; k < j; k++) again |= own[k] == own[j];
            smaller += own[j] < id && !again;
        }
        if (given) {
            const int u = list.before(id);
            combine[u][n] = sum;  // of an id that repeats, each of its threads writes the same
            place[u][n] = smaller;
            atomicMax(&distinct[n], smaller + 1);
        }
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
// x is read before the wait: it is older than what the kernel before this one makes (`launch` says who sees to that).
//
// One block a multiprocessor, all of them resident, since the second product waits for strips of the first that other
// blocks make: those come before in every block's order, so that somebody can always go on.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
experts(float* parts, uint4* between, int* ready, const uint4* up, const unsigned char* up_scales, const uint4* down,
        const unsigned char* down_scales, const uint4* x, const int* ids, const float* weights, int tokens, int columns) {
    constexpr int PAGES = HIDDEN / 128, MINE = PAGES / QUARTERS, CHUNKS = MINE / AHEAD, BLOCKS = INTER / 8 / STRIPS;
    constexpr int GROUPS = HIDDEN / 8 * TOKENS, EACH = GROUPS / (WARPS * 32);
    static_assert(MINE * QUARTERS == PAGES && CHUNKS * AHEAD == MINE && EACH * WARPS * 32 == GROUPS, "HIDDEN");
    static_assert(BLOCKS * STRIPS * 8 == INTER, "INTER");
    extern __shared__ uint4 shared[];
    __shared__ Routing routing;
    uint4* const slots = shared;                                              // [PAGES][4][32]
    float4* const sums = reinterpret_cast<float4*>(shared + PAGES * 4 * 32);  // [2][STRIPS][QUARTERS][32]
    uint4* const ring = shared + PAGES * 4 * 32 + 2 * WARPS * 32;             // [STAGES][SPAN * INTER / 128 pages of slots]
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int strip = warp / QUARTERS, quarter = warp % QUARTERS, step = gridDim.x;

    uint4 row[EACH];  // 8 neighbours of a token each; a warp reads 32 groups in a row
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = i * WARPS * 32 + tid, n = at / (HIDDEN / 8), group = at % (HIDDEN / 8);
        row[i] = n < tokens && group * 8 < columns ? early(x + n * (columns / 8) + group) : make_uint4(0, 0, 0, 0);
    }
    routing.clear();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = i * WARPS * 32 + tid, n = at / (HIDDEN / 8), group = at % (HIDDEN / 8);
        const uint4 v = row[i];
        slots[(group / 16 * 4 + group % 4) * 32 + n * 4 + group % 16 / 4] = make_uint4(
            __byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632));
    }
    wait_for_predecessor();
    routing.build(ids, weights, tokens);
    const List& list = routing.list;
    const int items = list.count * BLOCKS;
    auto up_pages = [&](int item) {
        if (item >= items) return Source();
        const int expert = list.experts[item / BLOCKS];
        return Source(up, up_scales, (expert * (INTER / 8) + item % BLOCKS * STRIPS + strip) * PAGES + quarter * MINE);
    };
    Page ahead[AHEAD];
    Source source = up_pages(blockIdx.x);
#pragma unroll
    for (int d = 0; d < AHEAD; d++) source.load(ahead[d], d, lane);
    __syncthreads();

    // Of the second product: a turn is SPAN items of 256 rows of an expert, of which a warp has 16.
    constexpr int INNER = INTER / 128, ROWS = HIDDEN / 16 / WARPS;
    constexpr int SPAN = INNER < AHEAD ? AHEAD / INNER : 1, TURN_CHUNKS = INNER < AHEAD ? 1 : INNER / AHEAD;
    constexpr int OF_ITEM = INNER < AHEAD ? INNER : AHEAD;  // pages of an item in a chunk
    static_assert(SPAN * OF_ITEM == AHEAD && TURN_CHUNKS * OF_ITEM == INNER && ROWS * WARPS * 16 == HIDDEN, "INTER, HIDDEN");
    const int rows = list.count * ROWS;  // items
    auto down_pages = [&](int item) {
        if (item >= rows) return Source();
        const int expert = list.experts[item / ROWS];
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
        for (int j = routing.distinct[n]; j < TOP_K; j++)
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
