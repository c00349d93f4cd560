// As much of CUDA's runtime as ExLlamaV2's loader of EXL2 matrices uses, on the CPU.
//
// A kernel runs block after block. The threads of a block are fibers that take turns: one runs until it ends or
// meets __syncthreads(), then the next; when all have, all go on. So __shared__ memory can be static memory.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __inline__ inline
#define __shared__ static

struct dim3
{
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct int4
{
    int x, y, z, w;
};
struct uint2
{
    unsigned x, y;
};
struct uint4
{
    unsigned x, y, z, w;
};

inline dim3 blockIdx, threadIdx, blockDim;

using std::max;
using std::min;

// Fibers

inline ucontext_t block_scheduler;
inline ucontext_t* running_thread;
inline std::function<void()>* running_body;

inline void __syncthreads() { swapcontext(running_thread, &block_scheduler); }

struct Fiber
{
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    dim3 index;
    bool ended = false;
};

inline Fiber* running_fiber;

inline void fiber_main()
{
    (*running_body)();
    running_fiber->ended = true;
    swapcontext(&running_fiber->context, &block_scheduler);
}

inline void run_block(std::vector<Fiber>& fibers, std::function<void()>& body)
{
    running_body = &body;
    for (Fiber& fiber : fibers)
    {
        fiber.ended = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
    }
    for (bool any = true; any;)
    {
        any = false;
        for (Fiber& fiber : fibers)
        {
            if (fiber.ended) continue;
            any = true;
            running_fiber = &fiber;
            running_thread = &fiber.context;
            threadIdx = fiber.index;
            swapcontext(&block_scheduler, &fiber.context);
        }
    }
}

// What `kernel<<<grid, block, ...>>>(arguments)` is rewritten to: launch(grid, block, kernel)(arguments).
template <class... Arguments>
auto launch(dim3 grid, dim3 block, void (*kernel)(Arguments...))
{
    return [=](Arguments... arguments)
    {
        std::vector<Fiber> fibers(block.x * block.y);
        for (unsigned i = 0; i < fibers.size(); i++) fibers[i].index = dim3(i % block.x, i / block.x, 0);
        blockDim = block;
        std::function<void()> body = [&] { kernel(arguments...); };
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++)
            {
                blockIdx = dim3(x, y, 0);
                run_block(fibers, body);
            }
    };
}

// Memory: the device's is the host's

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaFree(void* memory)
{
    free(memory);
    return cudaSuccess;
}
template <class T>
cudaError_t cudaMalloc(T** memory, size_t size)
{
    *memory = static_cast<T*>(malloc(size));
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind)
{
    memcpy(to, from, size);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t = nullptr)
{
    return cudaMemcpy(to, from, size, kind);
}
