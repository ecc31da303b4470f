// A thread block on the host: compiles a kernel of src/native, given as KERNEL_FILE, and runs all of its code.
//
// Every thread is a coroutine. At a barrier it waits for its block; at a tensor instruction for its warp (WARP lanes), whose
// registers are then handed to `tensor`, the emulator written in Rust from the instructions' documentation. Warps run one
// after the other from barrier to barrier, as far ahead of each other as barriers allow, in an order that `seed` decides.
// Asynchronous copies happen either at once or as late as the wait that they are due at, so that code which relies on either
// reads or destroys the wrong bytes. Shared memory starts as garbage. Operands end where a page without access begins.

#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>
#include <stdlib.h>
#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>

#define MX_EMULATED
#define KERNEL static void
#define FUNCTION static inline
#define SHARED __attribute__((section("mx_shared"), aligned(16)))
#define THREAD thread_index
#define BLOCK_X block_x
#define BLOCK_Y block_y

// The registers of a lane at a tensor instruction; the emulator knows which of them count. Shared with tests/emulator.rs.
typedef struct {
    uint32_t a[4], b[4], sa, sb, selector;
    float d[16];
} Lane;

typedef struct {
    void *to;
    const void *from;
    int valid;
} Copy;

enum { READY, AT_BARRIER, AT_TENSOR, DONE };

#define BLOCK_THREADS 256
#define STACK (256 << 10)

typedef struct {
    ucontext_t context;
    int state;
    Lane lane;
    Copy copies[64];
    int copy_count;
} Fiber;

static Fiber fibers[BLOCK_THREADS];
static ucontext_t scheduler;
static uint32_t thread_index, block_x, block_y;
static int late_copies, failure;

static void pause_as(int state)
{
    uint32_t self = thread_index;
    fibers[self].state = state;
    swapcontext(&fibers[self].context, &scheduler);
}

static void barrier(void)
{
    pause_as(AT_BARRIER);
}

static void do_copy(Copy copy)
{
    if (copy.valid)
        memcpy(copy.to, copy.from, 16);
    else
        memset(copy.to, 0, 16);
}

static void copy_16(void *to, const void *from, int valid)
{
    Fiber *self = &fibers[thread_index];
    Copy copy = {to, from, valid};
    if (((uintptr_t)to | (uintptr_t)from) % 16 != 0)
        failure = 1;
    else if (!late_copies)
        do_copy(copy);
    else if (self->copy_count == 64)
        failure = 2;
    else
        self->copies[self->copy_count++] = copy;
}

static void copies_commit(void)
{
}

static void copies_wait(void)
{
    Fiber *self = &fibers[thread_index];
    for (int i = 0; i < self->copy_count; i++)
        do_copy(self->copies[i]);
    self->copy_count = 0;
}

#if WARP == 32
static void mma(float *d, const uint32_t *a, const uint32_t *b, uint32_t sa, uint32_t sb, int byte)
{
    Lane *lane = &fibers[thread_index].lane;
    memcpy(lane->a, a, 16);
    memcpy(lane->b, b, 8);
    memcpy(lane->d, d, 16);
    lane->sa = sa, lane->sb = sb, lane->selector = byte;
    pause_as(AT_TENSOR);
    memcpy(d, lane->d, 16);
}
#include KERNEL_FILE
#else
#define mfma(a, b, sum, sa, sb) mfma_lanes(&(a), &(b), sum, sa, sb)
#define MFMA                                                                                                              \
    static fragment mfma_lanes(const i32x8 *a, const i32x8 *b, fragment sum, uint32_t sa, uint32_t sb)                    \
    {                                                                                                                     \
        Lane *lane = &fibers[thread_index].lane;                                                                          \
        /* Format 4 takes the first four registers. */                                                                    \
        memcpy(lane->a, a, 16);                                                                                           \
        memcpy(lane->b, b, 16);                                                                                           \
        memcpy(lane->d, &sum, sizeof sum);                                                                                \
        lane->sa = sa, lane->sb = sb, lane->selector = 0;                                                                 \
        pause_as(AT_TENSOR);                                                                                              \
        memcpy(&sum, lane->d, sizeof sum);                                                                                \
        return sum;                                                                                                       \
    }
#include KERNEL_FILE
#endif

typedef struct {
    const uint8_t *a, *a_scales, *b, *b_scales;
    float *sums;
    uint32_t m, n, k;
} Arguments;

static Arguments arguments;

static void thread_main(void)
{
    mx_matmul_mxf4(arguments.a, arguments.a_scales, arguments.b, arguments.b_scales, arguments.sums, arguments.m, arguments.n,
                   arguments.k);
    pause_as(DONE);
}

// A warp goes on until all its lanes wait for the block or are done.
static void run_warp(uint32_t first, void (*tensor)(Lane *))
{
    Lane lanes[WARP];
    for (;;) {
        int waiting = 0, finished = 0;
        for (uint32_t i = first; i < first + WARP; i++) {
            if (fibers[i].state == READY) {
                thread_index = i;
                swapcontext(&scheduler, &fibers[i].context);
            }
            waiting += fibers[i].state == AT_TENSOR;
            finished += fibers[i].state == DONE;
        }
        if (waiting == 0)
            return;
        if (waiting != WARP) {
            failure = 3; // Diverged.
            return;
        }
        for (uint32_t i = 0; i < WARP; i++)
            lanes[i] = fibers[first + i].lane;
        tensor(lanes);
        for (uint32_t i = 0; i < WARP; i++) {
            fibers[first + i].lane = lanes[i];
            fibers[first + i].state = READY;
        }
    }
}

extern char __start_mx_shared[] __attribute__((weak)), __stop_mx_shared[] __attribute__((weak));

static int run_block(uint32_t seed, char *stacks, void (*tensor)(Lane *))
{
    if (__start_mx_shared)
        memset(__start_mx_shared, 0xee, __stop_mx_shared - __start_mx_shared);
    for (uint32_t i = 0; i < BLOCK_THREADS; i++) {
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = stacks + (size_t)i * STACK;
        fibers[i].context.uc_stack.ss_size = STACK;
        fibers[i].context.uc_link = NULL;
        makecontext(&fibers[i].context, thread_main, 0);
        fibers[i].state = READY;
        fibers[i].copy_count = 0;
    }
    for (;;) {
        uint32_t order[BLOCK_THREADS / WARP];
        uint32_t warps = BLOCK_THREADS / WARP;
        for (uint32_t i = 0; i < warps; i++)
            order[i] = i;
        for (uint32_t i = warps - 1; i > 0; i--) {
            seed = seed * 1664525u + 1013904223u;
            uint32_t j = (seed >> 8) % (i + 1), swap = order[i];
            order[i] = order[j], order[j] = swap;
        }
        for (uint32_t i = 0; i < warps && !failure; i++)
            run_warp(order[i] * WARP, tensor);
        if (failure)
            return failure;
        uint32_t barriers = 0, done = 0;
        for (uint32_t i = 0; i < BLOCK_THREADS; i++) {
            barriers += fibers[i].state == AT_BARRIER;
            done += fibers[i].state == DONE;
        }
        if (done == BLOCK_THREADS)
            return 0;
        if (barriers != BLOCK_THREADS)
            return 4; // Some wait for others that have left.
        for (uint32_t i = 0; i < BLOCK_THREADS; i++)
            fibers[i].state = READY;
    }
}

// A copy that ends at a page without access.
static void *guarded(const void *from, size_t bytes)
{
    size_t page = 4096, whole = (bytes + page - 1) / page * page;
    char *at = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        abort();
    mprotect(at + whole, page, PROT_NONE);
    if (from)
        memcpy(at + whole - bytes, from, bytes);
    return at + whole - bytes;
}

static void unguarded(void *at, size_t bytes)
{
    size_t page = 4096, whole = (bytes + page - 1) / page * page;
    munmap((char *)at + bytes - whole, whole + page);
}

// The whole grid. `sums` is in and out. Returns 0, or what went wrong: 1 a misaligned copy, 2 too many copies, 3 a tensor
// instruction that not all lanes reach, 4 a barrier that not all threads reach.
int emulate(const uint8_t *a, const uint8_t *a_scales, const uint8_t *b, const uint8_t *b_scales, float *sums, uint32_t m,
            uint32_t n, uint32_t k, uint32_t seed, int late, void (*tensor)(Lane *))
{
    // One grid at a time: what follows is in static variables.
    static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&turn);
    size_t bytes[5] = {(size_t)m * k / 2, (size_t)m * k / 32, (size_t)n * k / 2, (size_t)n * k / 32, (size_t)m * n * 4};
    arguments = (Arguments){guarded(a, bytes[0]), guarded(a_scales, bytes[1]), guarded(b, bytes[2]), guarded(b_scales, bytes[3]),
                            guarded(sums, bytes[4]), m, n, k};
    char *stacks = malloc((size_t)BLOCK_THREADS * STACK);
    late_copies = late;
    failure = 0;
    int result = 0;
    for (block_y = 0; block_y < (m + TILE - 1) / TILE && !result; block_y++)
        for (block_x = 0; block_x < (n + TILE - 1) / TILE && !result; block_x++)
            result = run_block(seed++, stacks, tensor);
    free(stacks);
    memcpy(sums, arguments.sums, bytes[4]);
    const void *all[5] = {arguments.a, arguments.a_scales, arguments.b, arguments.b_scales, arguments.sums};
    for (int i = 0; i < 5; i++)
        unguarded((void *)all[i], bytes[i]);
    pthread_mutex_unlock(&turn);
    return result;
}
