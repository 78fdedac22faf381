// What the kernels say in PTX, and nothing else: a machine without a GPU runs them with other definitions of these
// functions (tests/kernels/emulator.h).

#define DEVICE __device__ __forceinline__

DEVICE void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_successor_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

// Weights: read once. `early` ones may stand before the wait, where ptxas would not leave an .nc load.
DEVICE uint4 stream(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

DEVICE unsigned stream(const unsigned char* at) {
    unsigned v;
    asm volatile("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}

DEVICE uint4 early(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}

DEVICE uint2 early(const uint2* at) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
    return v;
}

DEVICE float early(const float* at) {
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(at) : "memory");
    return v;
}

DEVICE int early(const int* at) {
    int v;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// 16 bytes from the second-level cache to shared memory; zeros if not `there`.
DEVICE void copy_async(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// A barrier of THREADS threads of the block; 0 is that of all.
template <int THREADS>
DEVICE void meet(int barrier) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory"); }

// Counts between blocks: whoever reads a count of `publish` finds what its threads wrote before.
DEVICE void publish(int* count) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory"); }
DEVICE int look(const int* count) {
    int v;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(count) : "memory");
    return v;
}

// Packets between GPUs: four BF16 in x and z, and their flag, in y and w. A pair and its flag are one element of 64 bits,
// which is read whole or not at all; the two elements come in any order.
DEVICE void send(uint4* to, uint2 v, unsigned flag, bool really) {
    const unsigned long long upper = (unsigned long long)flag << 32;
    asm volatile("{\n.reg .pred really;\nsetp.ne.s32 really, %3, 0;\n@really st.relaxed.sys.global.v2.b64 [%0], {%1, %2};\n}"
                 ::"l"(to), "l"(upper | v.x), "l"(upper | v.y), "r"(int(really)) : "memory");
}
DEVICE uint4 receive(const uint4* from) {
    unsigned long long a, b;
    asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(from) : "memory");
    return make_uint4(unsigned(a), unsigned(a >> 32), unsigned(b), unsigned(b >> 32));
}

// The barrier of a cluster. Arriving orders nothing but `expect_pushes`; who has waited knows that all blocks have begun.
DEVICE void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Pushes between blocks of a cluster, once a launch: one thread says how many bytes its block will get in all, before
// it arrives at the cluster; whoever has waited for them finds them.
DEVICE void expect_pushes(unsigned long long* arrived, int bytes) {
    const unsigned at = unsigned(__cvta_generic_to_shared(arrived));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// v to where `at` is in block `block` of the cluster, counted by `arrived` there.
DEVICE void push(float* at, float v, unsigned long long* arrived, int block) {
    unsigned to, count;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(unsigned(__cvta_generic_to_shared(at))), "r"(block));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(count) : "r"(unsigned(__cvta_generic_to_shared(arrived))), "r"(block));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(v), "r"(count) : "memory");
}
DEVICE void wait_for_pushes(unsigned long long* arrived) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n@!done bra AGAIN;\n}"
                 ::"r"(unsigned(__cvta_generic_to_shared(arrived))) : "memory");
}

DEVICE unsigned bf16_pair(float low, float high) {
    unsigned v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

DEVICE float power_of_two(float x) {  // to 2**-22 of it; below 2**-126 it is 0
    float v;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(x));
    return v;
}

DEVICE float reciprocal(float x) {  // to one unit in the last place
    float v;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(x));
    return v;
}

DEVICE unsigned multiply_pairs(unsigned a, unsigned b) {  // of BF16, subnormals kept
    unsigned v;
    asm("mul.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

// acc [16, 8] += a [16, 16] b [16, 8] over a warp.
DEVICE void mma(float4& acc, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(acc.x), "+f"(acc.y), "+f"(acc.z), "+f"(acc.w)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of BF16, transposed; lane 8 i + r has the address of row r of matrix i.
DEVICE uint4 load_transposed(const void* row) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(unsigned(__cvta_generic_to_shared(row))) : "memory");
    return v;
}

DEVICE float low(unsigned pair) { return __uint_as_float(pair << 16); }
DEVICE float high(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000u); }
