// The CUDA kernel of src/native on a device that lacks its instruction (compute capability 8.0 to 11.0): all of its code as it
// is, asynchronous copies, barriers and shared memory included, and the one instruction made of shuffles, after the PTX ISA's
// sections on mma.m16n8k64 and on block scaling. Every output must have the bits of the sum in ascending order of blocks.
//
//     nvcc -arch=native -o device tests/emulator/device.cu && ./device
//     compute-sanitizer --tool memcheck ./device && compute-sanitizer --tool racecheck ./device
//
// Operands and sums are allocated to the byte, so that memcheck sees what goes beyond; unwritten outputs are NaN.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

// Twice the value of an E2M1 code.
static __host__ __device__ int doubled(unsigned code)
{
    int exponent = code >> 1 & 3, mantissa = code & 1;
    int value = exponent == 0 ? mantissa : (2 + mantissa) << (exponent - 1);
    return code & 8 ? -value : value;
}

#define MX_EMULATED_MMA
static __device__ __forceinline__ void mma(float *d, const unsigned *a, const unsigned *b, unsigned sa, unsigned sb, int byte)
{
    const unsigned all = 0xffffffff;
    unsigned lane = threadIdx.x % 32, group = lane >> 2, thread = lane % 4;
    for (int half = 0; half < 2; half++)
        for (int e = 0; e < 4; e++) {
            // c0, c1: row `group`; c2, c3: row `group + 8`. Columns 2 · thread and the next.
            unsigned below = e / 2, column = 2 * thread + e % 2;
            int sum = 0;
            for (unsigned other = 0; other < 4; other++) {
                // Row and half of k of a0 … a3: (0, 0), (8, 0), (0, 32), (8, 32).
                unsigned from = below + 2 * half;
                unsigned x = __shfl_sync(all, from == 0 ? a[0] : from == 1 ? a[1] : from == 2 ? a[2] : a[3], 4 * group + other);
                unsigned y = __shfl_sync(all, b[half], 4 * column + other);
                for (int i = 0; i < 8; i++)
                    sum += doubled(x >> 4 * i & 15) * doubled(y >> 4 * i & 15);
            }
            // A's scales: threads 0 and 1 of a quad for its two rows; B's: thread 0 for its column.
            int shift = 8 * (byte + half);
            int scale_a = __shfl_sync(all, sa, 4 * group + below) >> shift & 255;
            int scale_b = __shfl_sync(all, sb, 4 * column) >> shift & 255;
            d[e] = __fadd_rn(d[e], ldexpf(sum * 0.25f, scale_a + scale_b - 254));
        }
}

#include "../../src/native/cuda/mxf4.cu"

#define CHECK(call)                                                                                  \
    do {                                                                                             \
        cudaError_t status = call;                                                                   \
        if (status != cudaSuccess) {                                                                 \
            fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status));                          \
            exit(1);                                                                                 \
        }                                                                                            \
    } while (0)

static unsigned state = 1;

static unsigned next_random()
{
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static u8 *on_device(const std::vector<u8> &bytes)
{
    u8 *address;
    CHECK(cudaMalloc(&address, bytes.size()));
    CHECK(cudaMemcpy(address, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
    return address;
}

int main()
{
    const int shapes[][3] = {{128, 128, 128}, {1, 1, 32},      {17, 9, 96},     {130, 5, 160},   {3, 140, 256},
                             {64, 33, 416},   {150, 131, 288}, {300, 260, 640}, {512, 384, 1024}};
    for (auto [m, n, k] : shapes) {
        int lines[2] = {m, n}, blocks = k / 32;
        std::vector<u8> codes[2], scales[2];
        u8 *device_codes[2], *device_scales[2];
        for (int side = 0; side < 2; side++) {
            codes[side].resize((size_t)lines[side] * k / 2);
            scales[side].resize((size_t)lines[side] * blocks);
            for (u8 &code : codes[side])
                code = next_random();
            // Up to 40 binades below the anchor, which is 127.
            for (u8 &scale : scales[side])
                scale = 127 - next_random() % 41;
            device_codes[side] = on_device(codes[side]);
            device_scales[side] = on_device(scales[side]);
        }
        float *device_sums;
        std::vector<float> sums((size_t)m * n);
        CHECK(cudaMalloc(&device_sums, sums.size() * 4));
        CHECK(cudaMemset(device_sums, 0xff, sums.size() * 4));
        dim3 grid((n + TILE - 1) / TILE, (m + TILE - 1) / TILE);
        mx_matmul_mxf4<<<grid, THREADS>>>(device_codes[0], device_scales[0], device_codes[1], device_scales[1], device_sums, m, n, k);
        CHECK(cudaGetLastError());
        CHECK(cudaMemcpy(sums.data(), device_sums, sums.size() * 4, cudaMemcpyDeviceToHost));
        size_t wrong = 0;
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                float want = 0;
                for (int block = 0; block < blocks; block++) {
                    int sum = 0;
                    for (int at = 32 * block; at < 32 * block + 32; at++) {
                        u8 x = codes[0][((size_t)i * k + at) / 2], y = codes[1][((size_t)j * k + at) / 2];
                        sum += doubled(x >> 4 * (at % 2) & 15) * doubled(y >> 4 * (at % 2) & 15);
                    }
                    int exponent = scales[0][(size_t)i * blocks + block] + scales[1][(size_t)j * blocks + block] - 254;
                    volatile float term = ldexpf(sum * 0.25f, exponent);
                    want = want + term;
                }
                wrong += memcmp(&sums[(size_t)i * n + j], &want, 4) != 0;
            }
        printf("%dx%dx%d: %zu of %zu outputs differ\n", m, n, k, wrong, sums.size());
        if (wrong)
            return 1;
        for (int side = 0; side < 2; side++) {
            CHECK(cudaFree(device_codes[side]));
            CHECK(cudaFree(device_scales[side]));
        }
        CHECK(cudaFree(device_sums));
    }
    puts("every output has the bits of the sum in ascending order");
    return 0;
}
