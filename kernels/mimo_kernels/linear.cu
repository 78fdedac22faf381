// A matrix product of at most 8 tokens, weights BF16 or FP8 with block scales. `linear` defines it, `linear_cuda`
// launches it.
//
// A block has 32 rows, and its 16 warps a sixteenth of K each; their sums meet in shared memory, in order. A thread asks
// for its first weights before it waits for the kernel before: nobody writes weights between two launches. Of the
// products of a Flash layer at TP 4 and 8 that is all of the matrix, held in the registers of all multiprocessors at
// once, so that after the wait only the activations have to come, from the second-level cache. Of a longer K it is the
// first half or less, and the rest streams.
//
// Which columns meet in an MMA is free as long as weights and activations agree: a thread's 16 bytes of a row are
// neighbours, and so are its activations.
//
// Macros: K, FP8 (0 or 1), GROUP_ROWS (rows that share a scale). Names: g, t = lane / 4, lane % 4; n = token.

constexpr int WARPS = 16, ROWS = 32, STRIPS = ROWS / 16;
constexpr int UNIT = FP8 ? 64 : 32;  // columns of K that a warp's load of 16 bytes a thread covers, of 8 rows
constexpr int UNITS = K / WARPS / UNIT;
static_assert(UNITS * UNIT * WARPS == K, "K");
constexpr int AHEAD = UNITS % 4 == 0 ? 4 : UNITS % 3 == 0 ? 3 : UNITS % 2 == 0 ? 2 : 1;

#include "ptx.cuh"

// Two E4M3 codes in bytes 1 and 3 -> their values as a pair of BF16, exactly.
DEVICE unsigned from_e4m3(unsigned codes) {
    return multiply_pairs((codes & 0x80008000u) | ((codes >> 4) & 0x07F007F0u), 0x7B807B80u);  // by 2**120
}

// acc += rows g and g + 8, whose 16 bytes are a and b, times the activations v of the same columns.
DEVICE void multiply(float4& acc, const uint4& a, const uint4& b, const uint4 (&v)[FP8 + 1], float scale) {
    const unsigned p[4] = {a.x, a.y, a.z, a.w}, q[4] = {b.x, b.y, b.z, b.w};
#if FP8
    float4 part = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned b0 = i % 2 ? v[i / 2].z : v[i / 2].x, b1 = i % 2 ? v[i / 2].w : v[i / 2].y;
        mma(part, from_e4m3(__byte_perm(p[i], 0, 0x1404)), from_e4m3(__byte_perm(q[i], 0, 0x1404)),
            from_e4m3(__byte_perm(p[i], 0, 0x3424)), from_e4m3(__byte_perm(q[i], 0, 0x3424)), b0, b1);
    }
    acc.x += part.x * scale, acc.y += part.y * scale, acc.z += part.z * scale, acc.w += part.w * scale;
#else
    mma(acc, p[0], q[0], p[1], q[1], v[0].x, v[0].y);
    mma(acc, p[2], q[2], p[3], q[3], v[0].z, v[0].w);
#endif
}

// out bf16 [tokens, rows] <- x bf16 [tokens, K] times w [rows, K] transposed; w is bf16, or E4M3 codes with
// scales float32 [ceil(rows / GROUP_ROWS), K / 128].
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
linear(unsigned short* out, const char* w, const float* scales, const char* x, int rows, int tokens) {
    constexpr int SIZE = FP8 ? 1 : 2, CHUNKS = UNITS / AHEAD;
    __shared__ float sums[WARPS][STRIPS][32][4];
    let_successor_begin();
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, g = lane / 4, t = lane % 4;
    const int row = blockIdx.x * ROWS, first = warp * (K / WARPS);
    const char* at[STRIPS][2];
#pragma unroll
    for (int s = 0; s < STRIPS; s++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            at[s][half] = w + (size_t(min(row + s * 16 + half * 8 + g, rows - 1)) * K + first) * SIZE + t * 16;
    uint4 ahead[AHEAD][STRIPS][2];
    float scale[AHEAD];
    const float* const scale_at = scales + row / GROUP_ROWS * (K / 128);
    auto fetch = [&](int unit, int d) {
#pragma unroll
        for (int s = 0; s < STRIPS; s++)
#pragma unroll
            for (int half = 0; half < 2; half++) ahead[d][s][half] = early(reinterpret_cast<const uint4*>(at[s][half] + unit * UNIT * SIZE));
        if (FP8) scale[d] = early(scale_at + (first + unit * UNIT) / 128);
    };
#pragma unroll
    for (int d = 0; d < AHEAD; d++) fetch(d, d);
    wait_for_predecessor();

    float4 acc[STRIPS];
#pragma unroll
    for (int s = 0; s < STRIPS; s++) acc[s] = make_float4(0, 0, 0, 0);
    const char* const mine = x + (size_t(g) * K + first) * 2 + t * 16 * (FP8 + 1);
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        uint4 v[AHEAD][FP8 + 1];
#pragma unroll
        for (int d = 0; d < AHEAD; d++)
#pragma unroll
            for (int i = 0; i <= FP8; i++)
                v[d][i] = g < tokens ? reinterpret_cast<const uint4*>(mine + (chunk * AHEAD + d) * UNIT * 2)[i] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int d = 0; d < AHEAD; d++) {
#pragma unroll
            for (int s = 0; s < STRIPS; s++) multiply(acc[s], ahead[d][s][0], ahead[d][s][1], v[d], FP8 ? scale[d] : 0);
            if (chunk + 1 < CHUNKS) fetch((chunk + 1) * AHEAD + d, d);
        }
    }
#pragma unroll
    for (int s = 0; s < STRIPS; s++) *reinterpret_cast<float4*>(sums[warp][s][lane]) = acc[s];
    __syncthreads();
    if (tid < ROWS * 8) {  // one output each
        const float* const part = &sums[0][0][0][0] + tid;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) sum += part[i * ROWS * 8];
        const int l = tid % 128 / 4, n = l % 4 * 2 + tid % 2, r = row + tid / 128 * 16 + l / 4 + tid % 4 / 2 * 8;
        if (n < tokens && r < rows) out[size_t(n) * rows + r] = bf16_pair(sum, 0) & 0xFFFF;
    }
}
