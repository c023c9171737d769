// What persistent.cuh needs of the device and C++ cannot say: matrix products of a warp, clusters, barriers that count
// bytes, and loads and stores with an order. Its emulated twin is tests/native/cuda_emulation/device_sm90_emulated.h;
// together with device.cuh it is the only place of inline PTX. What speaks of clusters or barriers needs sm_90, the
// rest sm_80.
#pragma once

#include "cuda/device.cuh"

namespace fusedrnn::cuda {

struct alignas(16) Words {  // what one thread loads at once
  uint32_t w[4];
};

__device__ __forceinline__ Words no_words() { return {{0, 0, 0, 0}}; }

}  // namespace fusedrnn::cuda

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FUSEDRNN_CLUSTERS 1
#else
#define FUSEDRNN_CLUSTERS 0
#endif

#ifdef FUSEDRNN_EMULATED
#include "device_sm90_emulated.h"
#else

namespace fusedrnn::cuda {

// d += A B over a warp, with g = lane / 4 and q = lane % 4: d is rows g and g + 8 of A's 16, columns 2q and 2q + 1 of
// B's 8. a0 and a2 are of A's row g, a1 and a3 of row g + 8, b0 and b1 of B's column g. In the sum over k, a0 and a1
// meet b0 of the same q; a2 and a3 meet b1. A word is two 16-bit numbers or one TF32 number.
__device__ __forceinline__ void mma(__half, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(__nv_bfloat16, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(Tf32, float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float as_float(uint32_t x) { return __uint_as_float(x); }
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
  return y;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes of global memory, that other blocks may have written while this kernel runs, to shared memory. There when
// this thread has waited, and for others after a barrier.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void store_shared_by_blocks(void* p, Words v) {
  asm volatile("st.global.cg.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}

// A flag in global memory: what its writer, and whoever met it at a barrier before, wrote is seen by who reads it, and
// by whoever meets that one at a barrier after.
__device__ __forceinline__ int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_release(int* p, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void poll_pause() {}

#if FUSEDRNN_CLUSTERS

__device__ __forceinline__ void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// A barrier in shared memory whose phase ends with one arrival and with all the bytes that the arrival expects. Phases
// have parity 0, 1, 0, ... Bytes of the next phase may come before its arrival.
__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, unsigned parity) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!done);
}

// Stores v where block `rank` of the cluster has what this block has at p; the store tells that block's twin of
// `barrier` of 16 bytes.
__device__ __forceinline__ void send(void* p, Words v, unsigned rank, uint64_t* barrier) {
  asm volatile(
      "{ .reg .b32 to, bar;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 bar, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3,%4,%5,%6}, [bar]; }" ::"r"(
          shared_address(p)),
      "r"(shared_address(barrier)), "r"(rank), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
      : "memory");
}

#endif

}  // namespace fusedrnn::cuda

#endif
