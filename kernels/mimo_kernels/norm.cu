// The residual stream between two sublayers: residual add and RMSNorm, alone or together with the sum over the ranks.
// `residual` and `allreduce` define them, `norm_cuda` launches this.
//
// A row is one cluster of blocks, each of which has a share of its columns: the parts of a row that experts leave are
// 128 KB, more than one multiprocessor takes in at a time. A thread has 4 columns, which is one packet of the sum over
// ranks. It asks for all that it needs before it uses the first of it, the weight (which nobody writes between two
// launches) even before it waits for the kernel before.
//
// Each warp pushes its sum of squares into the shared memory of all blocks of its cluster and waits for those of all
// others in its own (`wait_for_pushes`): one trip, and no fence. A barrier of the cluster that releases what was written
// would be one, and would wait for all writes, those to other GPUs too. A block's memory has to be there when somebody
// pushes: all blocks arrive at the barrier first of all, releasing nothing, and wait there before they push. And it has
// to be there as long as somebody pushes: a block that has all of its sums will get nothing more, so it may end.
//
// The sum over ranks is that of allreduce_triton, where its protocol is argued: same buffers, packets and epochs, so
// launches of both may take turns. A cell may belong to two blocks here. Its epoch is advanced after the wait for the
// sums of squares: each of these comes after the packets of its warp, which have been compared with that epoch.
//
// Macros: COLUMNS, CLUSTER (blocks of a row), PARTS (of an update, 0 for none), WIDE (1: float32 parts, 0: BF16); for
// the sum also RANKS, CELL (packets) and CAPACITY (packets of a source in a buffer).

constexpr int PER_ROW = COLUMNS / 4, THREADS = PER_ROW / CLUSTER, WARPS = THREADS / 32, SUMS = CLUSTER * WARPS;
static_assert(WARPS * 32 * CLUSTER * 4 == COLUMNS && CLUSTER <= 32, "COLUMNS");

#include "ptx.cuh"

#if WIDE
typedef float4 Part;
#else
typedef uint2 Part;
#endif

DEVICE float4 widen(float4 v) { return v; }
DEVICE float4 widen(uint2 v) { return make_float4(low(v.x), high(v.x), low(v.y), high(v.y)); }
DEVICE uint2 narrow(float4 v) { return make_uint2(bf16_pair(v.x, v.y), bf16_pair(v.z, v.w)); }
DEVICE float4 sum(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
DEVICE float4 product(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }

// An update of a thread's columns: its parts, asked for together, and then added in order.
struct Update {
    Part part[PARTS + 1];

    DEVICE void load(const Part* at, int stride) {
#pragma unroll
        for (int p = 0; p < PARTS; p++) part[p] = at[size_t(p) * stride];
    }
    DEVICE uint2 total() const {
#if PARTS == 1 && !WIDE
        return part[0];
#endif
        float4 v = widen(part[0]);
#pragma unroll
        for (int p = 1; p < PARTS; p++) v = sum(v, widen(part[p]));
        return narrow(v);
    }
};

// What the blocks of a cluster give to each other.
struct Exchange {
    alignas(16) float sums[SUMS];  // of squares, of every warp of the row
    unsigned long long arrived;

    // By all threads, before anything else.
    DEVICE void begin() {
        if (threadIdx.x == 0) expect_pushes(&arrived, sizeof sums);
        arrive_at_cluster();
    }
    // By all threads: v of this thread, for all blocks.
    DEVICE void give(float v) {
        const int lane = threadIdx.x % 32, warp = blockIdx.x % CLUSTER * WARPS + threadIdx.x / 32;
#pragma unroll
        for (int apart = 16; apart >= 1; apart /= 2) v += __shfl_xor_sync(~0u, v, apart);
        wait_for_cluster();
        if (lane < CLUSTER) push(&sums[warp], v, &arrived, lane);
    }
    // The sum over the row, in one order.
    DEVICE float take() {
        wait_for_pushes(&arrived);
        float acc[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < SUMS; i++) acc[i % 4] += sums[i];
        return (acc[0] + acc[1]) + (acc[2] + acc[3]);
    }
};

DEVICE float square(float4 v) { return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); }

// v / sqrt(squares / COLUMNS + eps), rounded, times the weight, rounded.
DEVICE uint2 scaled(uint2 v, uint2 weight, float squares, float eps) {
    const float scale = rsqrtf(squares * (1.0f / COLUMNS) + eps);
    return narrow(product(widen(narrow(product(widen(v), make_float4(scale, scale, scale, scale)))), widen(weight)));
}

// out and normed bf16 [rows, COLUMNS] <- x bf16 [rows, COLUMNS] + the parts of `update`, whose strides are in 4 columns,
// and its norm. Without parts the sum is x, and `out` is left alone.
extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1)
add_norm(uint2* out, uint2* normed, const uint2* x, const Part* update, const uint2* weight, int part_stride, int row_stride, float eps) {
    __shared__ Exchange exchange;
    exchange.begin();
    const int row = blockIdx.x / CLUSTER, column = blockIdx.x % CLUSTER * THREADS + threadIdx.x, at = row * PER_ROW + column;
    const uint2 w = early(weight + column);
    let_successor_begin();
    wait_for_predecessor();
    uint2 v = x[at];
#if PARTS
    Update added;
    added.load(update + size_t(row) * row_stride + column, part_stride);
    v = narrow(sum(widen(v), widen(added.total())));
#endif
    exchange.give(square(widen(v)));
    if (PARTS) out[at] = v;
    normed[at] = scaled(v, w, exchange.take(), eps);
}

#ifdef RANKS

// The sums over ranks of the packets that arrive at `from` and CAPACITY packets further each, added in rank order and
// rounded; late is 1 + the lowest rank that did not come within so many cycles, or 0. With `skip` it looks once.
DEVICE uint2 receive_sum(const uint4* from, unsigned epoch, bool skip, float cycles, int& late) {
    uint4 got[RANKS];
    const long long end = clock64() + (long long)cycles;
    for (bool more = true; more;) {
        bool missing = false;
#pragma unroll
        for (int r = 0; r < RANKS; r++) got[r] = receive(from + size_t(r) * CAPACITY);
#pragma unroll
        for (int r = 0; r < RANKS; r++) missing |= got[r].y != epoch || got[r].w != epoch;
        more = missing && !skip && clock64() < end;
    }
    late = 0;
#pragma unroll
    for (int r = RANKS - 1; r >= 0; r--)
        if (!skip && (got[r].y != epoch || got[r].w != epoch)) late = r + 1;
    float4 v = widen(make_uint2(got[0].x, got[0].z));
#pragma unroll
    for (int r = 1; r < RANKS; r++) v = sum(v, widen(make_uint2(got[r].x, got[r].z)));
    return narrow(v);
}

// out and normed bf16 [rows, COLUMNS] <- residual bf16 [rows, COLUMNS] + the sum over the ranks of the rounded sums of
// `update`, as in `add_norm`, and its norm. peers, epochs, failed and failed_host are those of a channel, `cycles` of the
// clock is how long it waits.
extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 1)
sum_add_norm(uint2* out, uint2* normed, const Part* update, const uint2* residual, const uint2* weight, uint4* const* peers,
             int* epochs, int* failed, int* failed_host, int part_stride, int row_stride, int rank, float cycles, float eps) {
    __shared__ Exchange exchange;
    exchange.begin();
    const int row = blockIdx.x / CLUSTER, column = blockIdx.x % CLUSTER * THREADS + threadIdx.x, at = row * PER_ROW + column;
    const uint2 w = early(weight + column);
    let_successor_begin();
    wait_for_predecessor();  // nothing is sent before: the protocol's two halves rely on it
    uint4* peer[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; r++) peer[r] = peers[r];
    const uint4* const buffer = peers[rank];
    const unsigned epoch = epochs[at / CELL] + 1u;
    const bool skip = *failed != 0;
    const uint2 before = residual[at];
    Update own;
    own.load(update + size_t(row) * row_stride + column, part_stride);
    const uint2 mine = own.total();

    const size_t half = (epoch & 1) * size_t(RANKS * CAPACITY) + at;
#pragma unroll
    for (int r = 0; r < RANKS; r++) send(peer[r] + half + rank * CAPACITY, mine, epoch, !skip);
    int late;
    const uint2 total = receive_sum(buffer + half, epoch, skip, cycles, late);
    const uint2 v = narrow(sum(widen(before), widen(total)));
    exchange.give(square(widen(v)));
    out[at] = v;
    if (late) {
        *failed = late;
        *failed_host = late;
    }
    normed[at] = scaled(v, w, exchange.take(), eps);
    if (at % CELL == 0) epochs[at / CELL] = epoch;
}

#endif
