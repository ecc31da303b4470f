// sums = A · Bᵀ of two MXFP4 operands on the block-scaled matrix cores of gfx950 (MI350X, MI355X).
//
// Compiled at run time by hiprtc. C as far as it goes, so that tests/emulator.rs can compile this file for the host, with the
// section "The machine" replaced, and run all of it on emulated waves.
//
// Layout: codes [lines, k/2], two elements a byte, the first in the low half; scales [lines, k/32], E8M0; both tight,
// row-major, as this crate keeps them. k is a multiple of 32, m and n are anything. sums [m, n], f32. Codes are 16-byte
// aligned.
// Numerics: one v_mfma_scale adds the products of 128 positions (64, if SIDE is 32) to f32 sums; in which order and with how
// many bits is the hardware's.
// Work: a block of 256 threads makes 128 × 128 outputs, its waves (2 × 2) 64 × 64 each, in fragments of SIDE × SIDE. A lane
// holds 32 elements of one line, 16 bytes under one scale, and reads them where they are: caches share them among the waves.
// Launch: grid (⌈n/128⌉, ⌈m/128⌉), block 256.

#define THREADS 256
#define TILE 128
#define WAVE_TILE 64
#ifndef SIDE
#define SIDE 16
#endif
#define CHUNKS (64 / SIDE)            // 32-element chunks of k a fragment
#define FRAGMENTS (WAVE_TILE / SIDE)
#define SUMS (SIDE * SIDE / 64)

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32x4 __attribute__((vector_size(16)));
typedef int i32x8 __attribute__((vector_size(32)));
typedef float fragment __attribute__((vector_size(4 * SUMS)));

// ---- The machine -----------------------------------------------------------------------------------------------------

#ifndef MX_EMULATED
#define KERNEL extern "C" __global__ __attribute__((amdgpu_flat_work_group_size(THREADS, THREADS))) void
#define FUNCTION static __device__ inline __attribute__((always_inline))
#define THREAD __builtin_amdgcn_workitem_id_x()
#define BLOCK_X __builtin_amdgcn_workgroup_id_x()
#define BLOCK_Y __builtin_amdgcn_workgroup_id_y()

// sum + A · B; both E2M1 (format 4, half of the eight registers), the scale in byte 0 of each lane's own word.
FUNCTION fragment mfma(i32x8 a, i32x8 b, fragment sum, u32 sa, u32 sb)
{
#if SIDE == 16
    return __builtin_amdgcn_mfma_scale_f32_16x16x128_f8f6f4(a, b, sum, 4, 4, 0, sa, 0, sb);
#else
    return __builtin_amdgcn_mfma_scale_f32_32x32x64_f8f6f4(a, b, sum, 4, 4, 0, sa, 0, sb);
#endif
}
#else
MFMA
#endif

// ---- The kernel ------------------------------------------------------------------------------------------------------

// The chunk of 32 elements and its scale; zeros outside.
FUNCTION i32x8 load(const u8 *codes, const u8 *scales, u32 line, u32 lines, u32 block, u32 blocks, u32 *scale)
{
    i32x8 values = {0, 0, 0, 0, 0, 0, 0, 0};
    *scale = 0;
    if (line < lines && block < blocks) {
        u64 at = (u64)line * blocks + block;
        i32x4 low = *(const i32x4 *)(codes + at * 16);
        for (int i = 0; i < 4; i++)
            values[i] = low[i];
        *scale = scales[at];
    }
    return values;
}

KERNEL mx_matmul_mxf4(const u8 *a, const u8 *a_scales, const u8 *b, const u8 *b_scales, float *sums, u32 m, u32 n, u32 k)
{
    u32 blocks = k / 32;
    u32 lane = THREAD % 64, wave = THREAD / 64;
    u32 first_m = BLOCK_Y * TILE + wave / 2 * WAVE_TILE, first_n = BLOCK_X * TILE + wave % 2 * WAVE_TILE;
    // A lane's line within a fragment, and its chunk.
    u32 own = lane % SIDE, chunk = lane / SIDE;

    fragment sum[FRAGMENTS][FRAGMENTS];
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++)
#pragma unroll
        for (int j = 0; j < FRAGMENTS; j++)
            sum[i][j] = (fragment){0};

    for (u32 block = 0; block < blocks; block += CHUNKS) {
        i32x8 fb[FRAGMENTS];
        u32 scale_b[FRAGMENTS];
#pragma unroll
        for (int j = 0; j < FRAGMENTS; j++)
            fb[j] = load(b, b_scales, first_n + SIDE * j + own, n, block + chunk, blocks, &scale_b[j]);
#pragma unroll
        for (int i = 0; i < FRAGMENTS; i++) {
            u32 scale_a;
            i32x8 fa = load(a, a_scales, first_m + SIDE * i + own, m, block + chunk, blocks, &scale_a);
#pragma unroll
            for (int j = 0; j < FRAGMENTS; j++)
                sum[i][j] = mfma(fa, fb[j], sum[i][j], scale_a, scale_b[j]);
        }
    }

#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++)
#pragma unroll
        for (int j = 0; j < FRAGMENTS; j++)
#pragma unroll
            for (int e = 0; e < SUMS; e++) {
                u32 row = first_m + SIDE * i + 8 * (e / 4) + 4 * chunk + e % 4;
                u32 col = first_n + SIDE * j + own;
                if (row < m && col < n)
                    sums[(u64)row * n + col] = sum[i][j][e];
            }
}
