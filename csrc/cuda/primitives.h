// What the kernels ask of the hardware: number formats, shared memory, the barrier, asynchronous
// copies, matrix instructions, and the launch. The kernels have no other way to it, so that the
// tests can give each of these its documented meaning on a CPU (tests/gpu/emulator).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace lora_ext::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// A stored value as a value of its sum, and the sum rounded to what is stored.
__device__ inline float widen(Half value) { return __half2float(value); }
__device__ inline float widen(BFloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }

__device__ inline void assign(Half& to, float value) { to = __float2half_rn(value); }
__device__ inline void assign(BFloat16& to, float value) { to = __float2bfloat16_rn(value); }
__device__ inline void assign(float& to, float value) { to = value; }
__device__ inline void assign(double& to, double value) { to = value; }

// The dynamic shared memory of the block, aligned to 16 bytes.
__device__ inline void* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

__device__ inline void barrier() { __syncthreads(); }
// The same among the lanes of a warp.
__device__ inline void warp_barrier() { __syncwarp(); }

// Copy 2, 4, 8 or 16 bytes by one load and one store; both addresses are multiples of as many.
template <int kBytes>
__device__ inline void copy_piece(void* to, const void* from) {
  std::memcpy(__builtin_assume_aligned(to, kBytes), __builtin_assume_aligned(from, kBytes), kBytes);
}

__device__ inline uint32_t shared_address(const void* memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

// Copy the first `bytes` of 16 from global to shared memory and fill the rest with zeros; both
// addresses are multiples of 16. It is done once wait_for_copies has covered its group.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait for all groups of this thread's copies but the last `kPending`.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Load four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row
// l % 8 of matrix l / 8, and gets of each matrix row l / 4, columns 2 (l % 4) and the next;
// with kTransposed, those of its transpose.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// sum (16, 8) += left (16, 16) @ right (16, 8), in float. With g = lane / 4, c = 2 (lane % 4):
// left holds rows g, g + 8, g, g + 8 at columns c, c, c + 8, c + 8 and the next; right column g at
// rows c and c + 8 and the next; sum rows g, g, g + 8, g + 8 at columns c, c + 1, c, c + 1.
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0,
                                    uint32_t right1, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0,
                                    uint32_t right1, BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// PyTorch's guard sets the device of its own CUDA runtime; this library's, linked into it, keeps
// one for itself.
inline void use_device(int device) { check_cuda(cudaSetDevice(device), "setting the device"); }

inline int device_attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "asking the device");
  return value;
}
inline int multiprocessors_of(int device) {
  return device_attribute(cudaDevAttrMultiProcessorCount, device);
}

// Launch kernel(argument) on a stream of PyTorch's; throws what the launch reports.
template <typename Argument>
void launch(void (*kernel)(Argument), int64_t blocks_x, int64_t blocks_y, int threads,
            int shared_bytes, void* stream, Argument argument) {
  if (blocks_x >= int64_t(1) << 31) throw std::runtime_error("a launch of 2^31 blocks or more");
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) {  // more has to be asked for
    check_cuda(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "setting a kernel's shared memory");
  }
  void* arguments[] = {&argument};
  check_cuda(cudaLaunchKernel(
                 function, dim3(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y)),
                 dim3(threads), arguments, shared_bytes, static_cast<cudaStream_t>(stream)),
             "launching a kernel");
}

}  // namespace lora_ext::cuda
