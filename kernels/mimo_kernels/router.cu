// Logits of a router for at most 16 tokens; `router` defines them, `router_cuda` launches this.
//
// A block has two experts and 8 warps for each. A thread asks for all of its weights before it waits for the kernel
// before (nobody writes weights between two launches), so that after the wait only the activations have to come.
// Products are float32 on the plain units; sums leave a thread, a warp and the 8 warps in a fixed order.
//
// Macro: HIDDEN.

constexpr int TOKENS = 8 /* a pass */, WARPS = 8, EXPERTS_A_BLOCK = 2, STEPS = HIDDEN / (WARPS * 32 * 4);
static_assert(STEPS * WARPS * 32 * 4 == HIDDEN, "HIDDEN");

#include "ptx.cuh"

// out float32 [tokens, experts] <- x bf16 [tokens, HIDDEN] times w float32 [experts, HIDDEN] transposed.
extern "C" __global__ void __launch_bounds__(EXPERTS_A_BLOCK * WARPS * 32)
logits(float* out, const uint4* w, const uint2* x, int experts, int tokens) {
    __shared__ float sums[EXPERTS_A_BLOCK][WARPS][TOKENS];
    const int tid = threadIdx.x % (WARPS * 32), mine = threadIdx.x / (WARPS * 32), lane = tid % 32;
    const int e = blockIdx.x * EXPERTS_A_BLOCK + mine;
    uint4 weights[STEPS];  // of float32
#pragma unroll
    for (int i = 0; i < STEPS; i++) weights[i] = early(w + size_t(min(e, experts - 1)) * (HIDDEN / 4) + i * WARPS * 32 + tid);
    wait_for_predecessor();
    let_successor_begin();  // not before: experts, which come next, read x before they wait
    for (int first = 0; first < tokens; first += TOKENS, x += TOKENS * (HIDDEN / 4), out += TOKENS * experts) {
        const int here = min(tokens - first, TOKENS);
        float acc[TOKENS];
#pragma unroll
        for (int n = 0; n < TOKENS; n++) {
            acc[n] = 0;
            uint2 v[STEPS];
#pragma unroll
            for (int i = 0; i < STEPS; i++) v[i] = n < here ? x[n * (HIDDEN / 4) + i * WARPS * 32 + tid] : make_uint2(0, 0);
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                acc[n] = fmaf(__uint_as_float(weights[i].x), low(v[i].x), acc[n]);
                acc[n] = fmaf(__uint_as_float(weights[i].y), high(v[i].x), acc[n]);
                acc[n] = fmaf(__uint_as_float(weights[i].z), low(v[i].y), acc[n]);
                acc[n] = fmaf(__uint_as_float(weights[i].w), high(v[i].y), acc[n]);
            }
        }
        // Each step halves how many tokens a lane stands for; at the end a lane has token lane / 4, a quarter of it.
#pragma unroll
        for (int size = TOKENS / 2, apart = 16; size >= 1; size /= 2, apart /= 2)
#pragma unroll
            for (int n = 0; n < size; n++) {
                const bool upper = lane & apart;
                const float other = __shfl_xor_sync(~0u, upper ? acc[n] : acc[n + size], apart);
                acc[n] = (upper ? acc[n + size] : acc[n]) + other;
            }
        acc[0] += __shfl_xor_sync(~0u, acc[0], 2);
        acc[0] += __shfl_xor_sync(~0u, acc[0], 1);
        if (lane % 4 == 0) sums[mine][tid / 32][lane / 4] = acc[0];
        __syncthreads();
        if (tid < here && e < experts) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < WARPS; i++) sum += sums[mine][i][tid];
            out[tid * experts + e] = sum;
        }
        __syncthreads();
    }
}
