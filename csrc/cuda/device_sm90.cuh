// What persistent.cuh needs of the device and C++ cannot say: matrix products of a warp, clusters, barriers that count
// bytes, and loads and stores with an order. Its emulated twin is tests/native/cuda_emulation/device_sm90_emulated.h.
// What speaks of clusters or barriers needs sm_90, the rest sm_80.
#pragma once

#include "cuda/device.cuh"

namespace fusedrnn::cuda {

struct alignas(16) Words {  // what one thread loads at once
  uint32_t w[4];
};

__device__ __forceinline__ Words no_words() { return {{0, 0, 0, 0}}; }

// The first word of 16 bytes that nobody has given yet. A value with these bits, which is a NaN, is given as another NaN.
constexpr uint32_t not_given = 0xffffffffu;
template <class T>
__device__ __forceinline__ T not_a_sign_of_absence(T value) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  Bits bits;
  memcpy(&bits, &value, sizeof bits);
  if (bits == Bits(not_given)) bits = Bits(not_given) >> 1;
  memcpy(&value, &bits, sizeof bits);
  return value;
}

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

// Shared memory by its address, of 32 bits: what a thread keeps of it is then one register, and computed once.
using SharedAddress = uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
template <class V>
__device__ __forceinline__ V load_shared(SharedAddress at) {
  V v;
  if constexpr (sizeof(V) == 16) {
    uint32_t w[4];
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(at)
                 : "memory");
    memcpy(&v, w, 16);
  } else if constexpr (sizeof(V) == 8) {
    uint32_t w[2];
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(at) : "memory");
    memcpy(&v, w, 8);
  } else {
    static_assert(sizeof(V) == 4, "16, 8 or 4 bytes");
    uint32_t w;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w) : "r"(at) : "memory");
    memcpy(&v, &w, 4);
  }
  return v;
}
// Where not `wanted`, w stays as it is.
__device__ __forceinline__ void load_shared_if(bool wanted, SharedAddress at, Words& w) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(w.w[0]), "+r"(w.w[1]), "+r"(w.w[2]), "+r"(w.w[3])
               : "r"(at), "r"(uint32_t(wanted))
               : "memory");
}
template <class V>
__device__ __forceinline__ void store_shared(SharedAddress at, V v) {
  if constexpr (sizeof(V) == 16) {
    uint32_t w[4];
    memcpy(w, &v, 16);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    uint32_t w[2];
    memcpy(w, &v, 8);
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(w[0]), "r"(w[1]) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    uint32_t w;
    memcpy(&w, &v, 4);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(w) : "memory");
  } else {
    static_assert(sizeof(V) == 2, "16, 8, 4 or 2 bytes");
    uint16_t w;
    memcpy(&w, &v, 2);
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(w) : "memory");
  }
}
// `bytes` (4 or 16) of global memory to shared memory, without a register that waits for them. There for this thread when it
// has waited: until no more than `pending` commits have copies on their way.
template <int bytes>
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(bytes) : "memory");
}
// 16 bytes likewise, past the first cache level; zeros where they are not `there`, and then nothing is read.
__device__ __forceinline__ void copy_async_or_zeros(SharedAddress to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
// x, which the front of the compiler then does not compute again.
__device__ __forceinline__ int kept(int x) {
  asm("" : "+r"(x));
  return x;
}
// x, which stays in a register: the assembler sees through `kept`, and through shuffles, but not through 4 bytes of shared
// memory of the thread's own.
__device__ __forceinline__ int pinned(int x, SharedAddress own) {
  int y;
  asm volatile("st.volatile.shared.u32 [%1], %2;\nld.volatile.shared.u32 %0, [%1];" : "=r"(y) : "r"(own), "r"(x) : "memory");
  return y;
}

// a where first, else b: a branch around a shuffle would keep lanes apart.
__device__ __forceinline__ float pick(bool first, float a, float b) {
  float y;
  asm("{ .reg .pred p; setp.ne.u32 p, %3, 0; selp.f32 %0, %1, %2, p; }" : "=f"(y) : "f"(a), "f"(b), "r"(uint32_t(first)));
  return y;
}

// 16 bytes that blocks of a running kernel hand one another through global memory: seen whole, or not at all.
__device__ __forceinline__ Words load_given(const void* p) {
  uint64_t low, high;
  asm volatile("{ .reg .b128 v; ld.relaxed.gpu.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }"
               : "=l"(low), "=l"(high)
               : "l"(p)
               : "memory");
  return {{uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)}};
}
__device__ __forceinline__ void store_given(void* p, Words v) {
  const uint64_t low = uint64_t(v.w[1]) << 32 | v.w[0], high = uint64_t(v.w[3]) << 32 | v.w[2];
  asm volatile("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.gpu.global.b128 [%0], v; }" ::"l"(p), "l"(low), "l"(high)
               : "memory");
}
__device__ __forceinline__ void poll_pause() {}  // for the emulator, whose threads take turns

// Counts of what other blocks of a running kernel have done: who sees a count sees what was written before it was raised. (A fence
// after the load would also wait for this thread's own stores.)
__device__ __forceinline__ unsigned load_count(const unsigned* p) {
  unsigned n;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(n) : "l"(p) : "memory");
  return n;
}
__device__ __forceinline__ void raise_count(unsigned* p) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory");
}
// Of the warp's lanes 0, 1, .., how many have it before the first that has not.
__device__ __forceinline__ int leading_lanes(bool has) {
  const unsigned lacks = ~__ballot_sync(0xffffffffu, has);
  __syncwarp();  // what one lane has seen, all have
  return lacks == 0 ? 32 : __ffs(int(lacks)) - 1;
}

#if FUSEDRNN_CLUSTERS

__device__ __forceinline__ void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// A barrier in shared memory whose phase ends with one arrival and with all the bytes that the arrival expects. Phases
// have parity 0, 1, 0, ... Bytes of the next phase may come before its arrival.
__device__ __forceinline__ void barrier_init(SharedAddress barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(SharedAddress barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(SharedAddress barrier, unsigned parity) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!done);
}

// Stores v where block `rank` of the cluster has what this block has at `at`; the store tells that block's twin of
// `barrier` of 16 bytes.
__device__ __forceinline__ void send(SharedAddress at, Words v, unsigned rank, SharedAddress barrier) {
  asm volatile(
      "{ .reg .b32 to, bar;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 bar, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3,%4,%5,%6}, [bar]; }" ::"r"(at),
      "r"(barrier), "r"(rank), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
      : "memory");
}

#endif

}  // namespace fusedrnn::cuda

#endif
