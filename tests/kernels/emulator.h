// CUDA C++ on a processor: enough of it for this package's kernels, and `ptx.cuh` in plain words.
//
// Every block is a thread of the host, and the threads of a block are fibers of it: one runs until it has to wait for
// others (a barrier, a warp's exchange, a look at a count), then another one that is drawn at random. Copies from memory
// to shared memory land late, when they are waited for; what goes to other blocks of a cluster or to other GPUs lands
// at any time and in any order. So an order that a kernel does not enforce is not kept.
//
// Blocks of a cluster always run together. Ranks are threads of whoever calls `run`.

#include <ucontext.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define DEVICE inline

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned v) { float f; std::memcpy(&f, &v, 4); return f; }
inline float __int_as_float(unsigned v) { return __uint_as_float(v); }
inline unsigned __float_as_uint(float f) { unsigned v; std::memcpy(&v, &f, 4); return v; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(v); }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline long long clock64() {  // of 2 GHz
    return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1) * 2;
}
using std::exp2f, std::fmaf, std::fmaxf;
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned pick) {
    const uint64_t both = uint64_t(b) << 32 | a;
    unsigned v = 0;
    for (int i = 0; i < 4; i++) v |= unsigned(both >> (pick >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return v;
}
[[noreturn]] inline void __trap() { std::abort(); }
template <class T> T atomicAdd(T* at, T v) { return __atomic_fetch_add(at, v, __ATOMIC_SEQ_CST); }
template <class T, class U> T atomicOr(T* at, U v) { return __atomic_fetch_or(at, T(v), __ATOMIC_SEQ_CST); }
template <class T> T atomicMax(T* at, T v) {  // of a block's own memory: no other thread of the host is at it
    const T before = *at;
    *at = max(before, v);
    return before;
}

struct Index { int x; };
struct Copy { void* to; const void* from; bool there; };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::function<bool()> ready;  // what it waits for
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> committed;
    long cluster_turn = 0;  // arrivals at the barrier of the cluster
    bool ended = false;
};
struct Cluster {
    struct Place { char* shared = nullptr; bool there = false; };  // where a block's shared memory is, while it runs
    std::mutex lock;
    std::vector<Place> blocks;
    std::atomic<long> arrived{0};
    std::atomic<bool> broken{false};  // somebody wrote to a block that was not there, or could not go on
    Cluster(int size) : blocks(size) {}
};
struct Meeting { int arrived = 0, turn = 0; };
struct Block {
    std::vector<Fiber> fibers;
    ucontext_t scheduler;
    int now = 0;
    std::map<int, Meeting> meetings;  // barriers 0.. of the block, and of warp w under -1 - w
    std::vector<unsigned> words;      // what lanes give to each other: 8 a thread
    std::vector<std::function<void()>> flying;  // writes that have not landed
    Cluster* cluster;
    std::mt19937 random;
    std::function<void()> body;
};
inline thread_local Block* block;
inline thread_local Index blockIdx, blockDim;
inline Index gridDim;
inline struct { operator Index() const { return {block->now}; } } thread_index;
#define threadIdx (Index(thread_index))
alignas(128) inline thread_local uint4 shared[16384];

inline void wait_until(std::function<bool()> ready) {
    Fiber& mine = block->fibers[block->now];
    mine.ready = std::move(ready);
    swapcontext(&mine.context, &block->scheduler);
}
inline void gather(int barrier, int threads) {
    Block* const b = block;
    Meeting& m = b->meetings[barrier];
    const int turn = m.turn;
    if (++m.arrived == threads) m.arrived = 0, m.turn++;
    wait_until([b, barrier, turn] { return b->meetings[barrier].turn != turn; });
}
inline void meet_warp() { gather(-1 - block->now / 32, 32); }
template <int THREADS> void meet(int barrier) { gather(barrier, THREADS); }
inline void __syncthreads() { gather(0, blockDim.x); }
inline void __syncwarp() { meet_warp(); }
inline unsigned* words_of(int lane) { return &block->words[(block->now / 32 * 32 + lane) * 8]; }
inline void give(std::initializer_list<unsigned> values) {
    meet_warp();  // nobody reads the last ones any more
    int i = 0;
    for (unsigned v : values) words_of(block->now % 32)[i++] = v;
    meet_warp();
}
inline float __shfl_xor_sync(unsigned, float v, int mask) {
    give({__float_as_uint(v)});
    return __uint_as_float(words_of(block->now % 32 ^ mask)[0]);
}
template <class T> T __shfl_sync(unsigned, T v, int lane) {
    unsigned word;
    std::memcpy(&word, &v, 4);
    give({word});
    std::memcpy(&v, words_of(lane), 4);
    return v;
}
inline unsigned __ballot_sync(unsigned, bool v) {
    give({unsigned(v)});
    unsigned all = 0;
    for (int lane = 0; lane < 32; lane++) all |= words_of(lane)[0] << lane;
    return all;
}
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
    give({v});
    for (int lane = 0; lane < 32; lane++) v = max(v, words_of(lane)[0]);
    return v;
}

inline void wait_for_predecessor() {}
inline void let_successor_begin() {}
inline uint4 stream(const uint4* at) { return *at; }
inline unsigned stream(const unsigned char* at) { return *at; }
inline uint4 early(const uint4* at) { return *at; }
inline uint2 early(const uint2* at) { return *at; }
inline float early(const float* at) { return *at; }
inline int early(const int* at) { return *at; }
inline void prefetch(const void*) {}
inline void copy_async(void* to, const void* from, bool there) { block->fibers[block->now].open.push_back({to, from, there}); }
inline void commit_copies() {
    Fiber& mine = block->fibers[block->now];
    mine.committed.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int PENDING> void wait_for_copies() {
    auto& groups = block->fibers[block->now].committed;
    while (groups.size() > PENDING) {
        for (const Copy& c : groups.front()) c.there ? std::memcpy(c.to, c.from, 16) : std::memset(c.to, 0, 16);
        groups.erase(groups.begin());
    }
}
inline void publish(int* count) { __atomic_fetch_add(count, 1, __ATOMIC_RELEASE); }
inline int look(const int* count) {
    wait_until([] { return true; });
    return __atomic_load_n(count, __ATOMIC_ACQUIRE);
}

inline void land(size_t i) {
    std::function<void()> write = std::move(block->flying[i]);
    block->flying[i] = std::move(block->flying.back());
    block->flying.pop_back();
    write();
}
inline void send(uint4* to, uint2 v, unsigned flag, bool really) {
    if (!really) return;
    uint64_t* const words = reinterpret_cast<uint64_t*>(to);
    const uint64_t upper = uint64_t(flag) << 32;
    block->flying.push_back([=] { __atomic_store_n(words, upper | v.x, __ATOMIC_RELAXED); });
    block->flying.push_back([=] { __atomic_store_n(words + 1, upper | v.y, __ATOMIC_RELAXED); });
}
inline uint4 receive(const uint4* from) {
    const uint64_t* const words = reinterpret_cast<const uint64_t*>(from);
    wait_until([] { return true; });
    const uint64_t b = __atomic_load_n(words + 1, __ATOMIC_RELAXED), a = __atomic_load_n(words, __ATOMIC_RELAXED);
    return {unsigned(a), unsigned(a >> 32), unsigned(b), unsigned(b >> 32)};
}

inline void arrive_at_cluster() {
    block->fibers[block->now].cluster_turn++;
    block->cluster->arrived++;
}
inline void wait_for_cluster() {
    Cluster* const c = block->cluster;
    const long all = block->fibers[block->now].cluster_turn * long(c->blocks.size()) * blockDim.x;
    wait_until([=] { return c->arrived >= all; });
}
inline void expect_pushes(unsigned long long* arrived, int bytes) { __atomic_store_n(arrived, bytes, __ATOMIC_RELEASE); }
inline void push(float* at, float v, unsigned long long* arrived, int to) {
    Cluster* const c = block->cluster;
    const ptrdiff_t value = reinterpret_cast<char*>(at) - reinterpret_cast<char*>(shared);
    const ptrdiff_t count = reinterpret_cast<char*>(arrived) - reinterpret_cast<char*>(shared);
    {
        const std::lock_guard<std::mutex> hold(c->lock);
        if (!c->blocks[to].there) c->broken = true;  // it has not begun, or has ended
    }
    block->flying.push_back([=] {
        const std::lock_guard<std::mutex> hold(c->lock);
        if (!c->blocks[to].there) return void(c->broken = true);
        std::memcpy(c->blocks[to].shared + value, &v, sizeof v);
        __atomic_fetch_sub(reinterpret_cast<unsigned long long*>(c->blocks[to].shared + count), sizeof v, __ATOMIC_RELEASE);
    });
}
inline void wait_for_pushes(unsigned long long* arrived) {
    wait_until([=] { return __atomic_load_n(arrived, __ATOMIC_ACQUIRE) == 0; });
}

inline float low(unsigned pair) { return __uint_as_float(pair << 16); }
inline float high(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000u); }
inline unsigned rounded(float f) {  // the bits of the nearest BF16, ties to even
    const unsigned v = __float_as_uint(f);
    return f != f ? 0x7FFF : (v + 0x7FFF + (v >> 16 & 1)) >> 16;
}
inline unsigned bf16_pair(float a, float b) { return rounded(b) << 16 | rounded(a); }
inline float power_of_two(float x) { return std::exp2f(x); }
inline float reciprocal(float x) { return 1 / x; }
inline unsigned multiply_pairs(unsigned a, unsigned b) { return bf16_pair(low(a) * low(b), high(a) * high(b)); }
inline float element(unsigned pair, int i) { return i ? high(pair) : low(pair); }
inline void mma(float4& acc, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    give({a0, a1, a2, a3, b0, b1});
    const int g = block->now % 32 / 4, t = block->now % 4;
    float* const out[4] = {&acc.x, &acc.y, &acc.z, &acc.w};
    for (int i = 0; i < 4; i++) {
        double sum = *out[i];
        for (int k = 0; k < 16; k++) {
            const unsigned a = words_of(g * 4 + k % 8 / 2)[k / 8 * 2 + i / 2], b = words_of((2 * t + i % 2) * 4 + k % 8 / 2)[4 + k / 8];
            sum += double(element(a, k % 2)) * element(b, k % 2);
        }
        *out[i] = float(sum);
    }
}
inline uint4 load_transposed(const void* row) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(row);
    give({unsigned(at), unsigned(at >> 32)});
    const int g = block->now % 32 / 4, t = block->now % 4;
    unsigned out[4];
    for (int i = 0; i < 4; i++) {
        unsigned short v[2];
        for (int k = 0; k < 2; k++) {
            const unsigned* const w = words_of(8 * i + 2 * t + k);
            v[k] = reinterpret_cast<const unsigned short*>(uintptr_t(w[1]) << 32 | w[0])[g];
        }
        out[i] = unsigned(v[1]) << 16 | v[0];
    }
    return {out[0], out[1], out[2], out[3]};
}

inline void enter() {
    block->body();
    block->fibers[block->now].ended = true;
    swapcontext(&block->fibers[block->now].context, &block->scheduler);
}
inline bool run_block(int index, int threads, unsigned seed, Cluster& cluster, const std::function<void()>& body) {
    Block mine;
    block = &mine, mine.cluster = &cluster;
    blockIdx.x = index, blockDim.x = threads;
    mine.fibers.resize(threads), mine.words.resize(threads * 8), mine.body = body, mine.random.seed(seed + index);
    std::memset(shared, 0xFF, sizeof shared);  // NaN, whatever type it is
    Cluster::Place& place = cluster.blocks[index % cluster.blocks.size()];
    auto is_there = [&](bool there) {
        const std::lock_guard<std::mutex> hold(cluster.lock);
        place = {reinterpret_cast<char*>(shared), there};
    };
    is_there(true);
    std::vector<int> waiting;
    for (int i = 0; i < threads; i++) {
        Fiber& f = mine.fibers[i];
        constexpr size_t BYTES = 1 << 16;
        f.stack.reset(new char[BYTES]);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = BYTES, f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
        f.ready = [] { return true; };
        waiting.push_back(i);
    }
    for (long idle = 0; !waiting.empty();) {
        const size_t pick = mine.random() % waiting.size();
        Fiber& f = mine.fibers[waiting[pick]];
        if (!mine.flying.empty() && mine.random() % 4 == 0) land(mine.random() % mine.flying.size());
        if (!f.ready()) {
            if (++idle % 64 == 0) std::this_thread::yield();  // to those it waits for
            if (idle > 100'000'000) cluster.broken = true;  // nobody can go on
            if (cluster.broken) break;
            continue;
        }
        idle = 0;
        mine.now = waiting[pick];
        swapcontext(&mine.scheduler, &f.context);
        if (f.ended) waiting[pick] = waiting.back(), waiting.pop_back();
    }
    is_there(false);
    while (!mine.flying.empty()) land(0);
    return waiting.empty();
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) { kernel(*static_cast<A*>(args[I])...); }
template <class... A>
int emulate(void (*kernel)(A...), void** args, int blocks, int threads, unsigned seed, bool together, int cluster) {
    gridDim.x = blocks;
    std::atomic<int> done{0};
    bool broken = blocks % cluster != 0;
    std::vector<std::unique_ptr<Cluster>> clusters;
    auto one = [&](int b) {
        done += run_block(b, threads, seed, *clusters[b / cluster], [&] { call(kernel, args, std::index_sequence_for<A...>{}); });
    };
    std::vector<std::thread> all;
    for (int first = 0; first < blocks; first += cluster) {
        clusters.push_back(std::make_unique<Cluster>(cluster));
        for (int i = 0; i < cluster; i++) {  // in any order, and the last one late
            if (i > 0 && i == cluster - 1) std::this_thread::sleep_for(std::chrono::milliseconds(1));
            all.emplace_back(one, first + (i + seed) % cluster);
        }
        if (!together) {
            for (std::thread& t : all) t.join();
            all.clear();
        }
    }
    for (std::thread& t : all) t.join();
    for (auto& c : clusters) broken |= c->broken;
    return done == blocks && !broken ? 0 : 1;
}
