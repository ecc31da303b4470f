// sums = A · Bᵀ of two MXFP4 operands on the block-scaled tensor cores of compute capability 12.0 and 12.1.
//
// Compiled at run time by NVRTC for sm_120a or sm_121a (also nvcc -cubin). C as far as it goes, so that tests/emulator.rs
// can compile this file for the host, with the section "The machine" replaced, and run all of it on emulated warps; and
// tests/emulator/device.cu for a device, with the instruction alone replaced.
//
// Layout: codes [lines, k/2], two elements a byte, the first in the low half; scales [lines, k/32], E8M0; both tight,
// row-major, as this crate keeps them. k is a multiple of 32, m and n are anything. sums [m, n], f32. Codes are 16-byte
// aligned.
// Numerics: one mma adds the products of 64 positions to f32 sums; in which order and with how many bits is the hardware's.
// Work: a block of 256 threads makes 128 × 128 outputs, its warps (2 × 4) 64 × 32 each. k goes by in stages of 128, the next
// one on its way while one is multiplied.
// Launch: grid (⌈n/128⌉, ⌈m/128⌉), block 256, no dynamic shared memory.

#define THREADS 256
#define TILE 128                      // lines of A, and of B, a block
#define BLOCKS 4                      // scales of a line a stage
#define LINE 64                       // bytes of codes of a line a stage
#define WARP_M 64
#define WARP_N 32
#define FRAGMENTS_M (WARP_M / 16)
#define FRAGMENTS_N (WARP_N / 8)

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---- The machine -----------------------------------------------------------------------------------------------------

#ifndef MX_EMULATED
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define FUNCTION static __device__ __forceinline__
#define SHARED __shared__ __align__(16)
#define THREAD threadIdx.x
#define BLOCK_X blockIdx.x
#define BLOCK_Y blockIdx.y
#define barrier() __syncthreads()

// 16 bytes from global to shared memory, zeros unless `valid`; complete after copies_wait of their group.
FUNCTION void copy_16(void *to, const void *from, int valid)
{
    u32 address = (u32)__cvta_generic_to_shared(to);
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

FUNCTION void copies_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

FUNCTION void copies_wait(void)
{
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

#ifndef MX_EMULATED_MMA
// d += A · B of 16 × 8 outputs and 64 positions. The scales are bytes `byte` and `byte` + 1 of sa and sb, 0 or 2; those of A
// come from lanes 4q and 4q + 1 of each quad q (thread-id-a 0), those of B from lane 4q (thread-id-b 0).
#define MMA(BYTE)                                                                                                         \
    asm volatile("mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0 "        \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {" #BYTE ", 0}, "                \
                 "{%11}, {" #BYTE ", 0};"                                                                                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(sa), "r"(sb))

FUNCTION void mma(float *d, const u32 *a, const u32 *b, u32 sa, u32 sb, int byte)
{
    if (byte == 0)
        MMA(0);
    else
        MMA(2);
}
#endif
#endif

// ---- Where things lie ------------------------------------------------------------------------------------------------

// An operand's part of a stage, in shared memory: codes in chunks of 16 bytes (32 elements, one scale), and scales.
typedef struct {
    u8 codes[TILE * LINE];
    u32 scales[TILE];
} Stage;

// Chunks of a line are exchanged so that eight lines' equal chunks lie in different banks.
FUNCTION u32 chunk_offset(u32 line, u32 chunk)
{
    return line * LINE + ((chunk ^ (line >> 1 & 3)) << 4);
}

// Eight elements of `line`: those of lane `t` of its quad, from chunk `chunk`.
FUNCTION u32 codes_of(const Stage *stage, u32 line, u32 chunk, u32 t)
{
    return *(const u32 *)(stage->codes + chunk_offset(line, chunk) + 4 * t);
}

// Starts the copies of the codes of lines `first` .. and chunks `block` .. + 4.
FUNCTION void load_codes(Stage *stage, const u8 *codes, u32 first, u32 lines, u32 block, u32 blocks)
{
    for (u32 i = THREAD; i < TILE * BLOCKS; i += THREADS) {
        u32 line = i / BLOCKS, chunk = i % BLOCKS;
        int valid = first + line < lines && block + chunk < blocks;
        // An address outside is not formed.
        u64 at = valid ? ((u64)(first + line) * blocks + block + chunk) * 16 : 0;
        copy_16(stage->codes + chunk_offset(line, chunk), codes + at, valid);
    }
}

// Up to four scales of a line, the first in the low byte; zeros outside, where the codes are zeros too.
FUNCTION u32 load_scales(const u8 *scales, u32 line, u32 lines, u32 block, u32 blocks)
{
    u32 word = 0;
    if (line < lines) {
        const u8 *from = scales + (u64)line * blocks + block;
        if (blocks % BLOCKS == 0) {
            word = *(const u32 *)from;
        } else {
            for (u32 i = 0; i < BLOCKS && block + i < blocks; i++)
                word |= (u32)from[i] << (8 * i);
        }
    }
    return word;
}

// ---- The kernel ------------------------------------------------------------------------------------------------------

KERNEL mx_matmul_mxf4(const u8 *a, const u8 *a_scales, const u8 *b, const u8 *b_scales, float *sums, u32 m, u32 n, u32 k)
{
    SHARED static Stage stages[2][2];
    u32 blocks = k / 32;
    u32 first_m = BLOCK_Y * TILE, first_n = BLOCK_X * TILE;
    u32 lane = THREAD % 32, warp = THREAD / 32;
    u32 q = lane / 4, t = lane % 4;
    u32 warp_m = warp / 4 * WARP_M, warp_n = warp % 4 * WARP_N;
    // The first half of the threads brings A's scales, the second B's.
    u32 side = THREAD / TILE, own = THREAD % TILE;
    const u8 *own_scales = side ? b_scales : a_scales;
    u32 own_line = (side ? first_n : first_m) + own, own_lines = side ? n : m;

    float sum[FRAGMENTS_M][FRAGMENTS_N][4];
#pragma unroll
    for (int i = 0; i < FRAGMENTS_M; i++)
#pragma unroll
        for (int j = 0; j < FRAGMENTS_N; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                sum[i][j][e] = 0;

    load_codes(&stages[0][0], a, first_m, m, 0, blocks);
    load_codes(&stages[0][1], b, first_n, n, 0, blocks);
    copies_commit();
    stages[0][side].scales[own] = load_scales(own_scales, own_line, own_lines, 0, blocks);

    for (u32 block = 0, turn = 0; block < blocks; block += BLOCKS, turn ^= 1) {
        copies_wait();
        // This stage is there, and nobody reads the other any more.
        barrier();
        u32 next = block + BLOCKS, word = 0;
        if (next < blocks) {
            load_codes(&stages[turn ^ 1][0], a, first_m, m, next, blocks);
            load_codes(&stages[turn ^ 1][1], b, first_n, n, next, blocks);
            copies_commit();
            word = load_scales(own_scales, own_line, own_lines, next, blocks);
        }
        const Stage *sa = &stages[turn][0], *sb = &stages[turn][1];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 fb[FRAGMENTS_N][2], scale_b[FRAGMENTS_N];
#pragma unroll
            for (int j = 0; j < FRAGMENTS_N; j++) {
                u32 line = warp_n + 8 * j + q;
                fb[j][0] = codes_of(sb, line, 2 * half, t);
                fb[j][1] = codes_of(sb, line, 2 * half + 1, t);
                scale_b[j] = sb->scales[line];
            }
#pragma unroll
            for (int i = 0; i < FRAGMENTS_M; i++) {
                u32 line = warp_m + 16 * i + q;
                u32 fa[4];
                fa[0] = codes_of(sa, line, 2 * half, t);
                fa[1] = codes_of(sa, line + 8, 2 * half, t);
                fa[2] = codes_of(sa, line, 2 * half + 1, t);
                fa[3] = codes_of(sa, line + 8, 2 * half + 1, t);
                // Lane 4q speaks for line q, lane 4q + 1 for line q + 8.
                u32 scale_a = sa->scales[line + (t & 1) * 8];
#pragma unroll
                for (int j = 0; j < FRAGMENTS_N; j++)
                    mma(sum[i][j], fa, fb[j], scale_a, scale_b[j], 2 * half);
            }
        }
        if (next < blocks)
            stages[turn ^ 1][side].scales[own] = word;
    }

#pragma unroll
    for (int i = 0; i < FRAGMENTS_M; i++)
#pragma unroll
        for (int j = 0; j < FRAGMENTS_N; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                u32 row = first_m + warp_m + 16 * i + q + e / 2 * 8;
                u32 col = first_n + warp_n + 8 * j + 2 * t + e % 2;
                if (row < m && col < n)
                    sums[(u64)row * n + col] = sum[i][j][e];
            }
}
