// How the blocks of the persistent kernel hand each other their parts of an operand: in a cluster by its shared memory, in a
// grid by global memory, in practice the second cache level.
//
// An operand is [16 bytes of k][sequence][16 bytes], the sequences swizzled (persistent_product.cuh). k goes by block, by 16
// bytes of units, by slot, so that what a block gives is one piece: the part of its rank.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/persistent_product.cuh"

namespace fusedrnn::cuda {

// What a thread keeps of a plan from step to step. Where there are registers for it (`pins`) they are pinned, or else the
// assembler reads constant memory again each time, which costs some 40 cycles. Only before shared memory is in use.
template <bool pins>
__device__ __forceinline__ int constant(int x) {
  if constexpr (pins)
    return pinned(x, shared_address(shared_memory<unsigned char>()) + threadIdx.x * 4);
  else
    return x;
}

// Both have: operand(q, k), where number k of stage q's operand lies in shared memory once it was awaited; part(q, k), where
// this block puts its part of it, by offsets within the operand; give(), which hands that to the others; wait().
template <bool pins>
struct ClusterExchange {
  static constexpr Exchange kind = Exchange::cluster;
  const PersistentPlan& plan;
  const int rank;
  const SharedAddress shared;
  struct {
    SharedAddress operand;
    int bytes;        // of it
    int from, to;     // of the operand's bytes, which 16 this thread gives first, and to which block
    int sends, step;  // to how many blocks; from one to the next
  } stage[max_phases];
#if FUSEDRNN_CLUSTERS

  __device__ __forceinline__ ClusterExchange(const PersistentPlan& plan, int rank, SharedAddress shared, int phases)
      : plan(plan), rank(rank), shared(shared) {
#pragma unroll
    for (int q = 0; q < max_phases; ++q) {
      if (q >= phases) continue;
      const Stage& s = plan.stage[q];
      const int vectors = s.part / 16, thread = int(threadIdx.x);
      const int to = thread / vectors, step = s.block_step;
      const int sends = s.vector_step != 0 ? 0 : to < plan.blocks ? (plan.blocks - to + step - 1) / step : 0;
      stage[q] = {shared + unsigned(constant<pins>(s.operand)),
                  constant<pins>(s.bytes),
                  constant<pins>(rank * s.part + thread % vectors * 16),
                  constant<pins>(to),
                  constant<pins>(sends),
                  constant<pins>(step)};
    }
  }
  __device__ __forceinline__ SharedAddress barrier(int q, int k) const {
    return shared + unsigned((2 * q + (k & 1)) * 8);  // they lie first
  }
  __device__ __forceinline__ SharedAddress operand(int q, int k) const {
    return stage[q].operand + unsigned(stage[q].bytes & -(k & 1));
  }
  __device__ __forceinline__ SharedAddress part(int q, int k) const { return operand(q, k); }
  template <class T>
  static __device__ __forceinline__ T clean(T value) {
    return value;
  }
  __device__ __forceinline__ void start(int q) const {
    if (warp_of_thread() != 0) return;
    const bool first = lane_of_thread() == 0;
    for (int k = 0; k < 2; ++k)
      if (first) barrier_init(barrier(q, k));
    if (first) barrier_init_done();
    sync_warp();
    for (int k = 0; k < 2; ++k)
      if (first) barrier_expect(barrier(q, k), unsigned(plan.stage[q].arriving));
  }
  __device__ __forceinline__ void sync_group() const { sync_cluster(); }
  template <int batch>
  __device__ __forceinline__ void wait(int q, int k) const {
    barrier_wait(barrier(q, k), unsigned(k) >> 1 & 1);
    if (threadIdx.x == 0)
      barrier_expect(barrier(q, k), unsigned(plan.stage[q].arriving));  // of k + 2, which nobody gives before we give k + 1
  }
  // Neighbouring lanes store neighbouring 16 bytes to the same block: what goes to several at once takes longer. A block
  // stores to itself too, what is there already (another thread may still read these bytes, which do not change): to leave it
  // out would be a branch for each store.
  __device__ __forceinline__ void give(int q, int k) const {
    sync_block();
    const Stage& s = plan.stage[q];
    SharedAddress at = operand(q, k) + unsigned(stage[q].from);
    const SharedAddress done = barrier(q, k);
    const Words words = load_shared<Words>(at);
    int to = stage[q].to, sends = stage[q].sends;
    if (sends > 0) {  // as a rule: the same 16 bytes go to all of these
      send(at, words, unsigned(to), done);
      while (--sends > 0) {
        to += stage[q].step;
        send(at, words, unsigned(to), done);
      }
    } else if (s.vector_step != 0) {
      int left = s.part - (stage[q].from - rank * s.part);
#pragma unroll 1
      for (int i = 0; i < s.passes; ++i) {
        if (to < plan.blocks) send(at, load_shared<Words>(at), unsigned(to), done);
        to += stage[q].step, left -= s.vector_step * 16, at += unsigned(s.vector_step * 16);
        if (left <= 0) left += s.part, at -= unsigned(s.part), ++to;
      }
    }
  }
#endif
};

// Every step has memory of its own, filled with `not_given` before the launch. What is given is never that, so that a block
// sees by the values whether they are there: one way through the cache less than by a flag.
static_assert(not_given == 0x01010101u * workspace_fill, "what a workspace is filled with");
template <bool pins>
struct GridExchange {
  static constexpr Exchange kind = Exchange::grid;
  const PersistentPlan& plan;
  const int rank, slice;
  const SharedAddress shared;
  unsigned char* const workspace;  // [step][slice]
  struct {
    SharedAddress operand, staging;
    int part, all;  // bytes: what a block gives; what it gets
  } stage[max_phases];

  __device__ __forceinline__ GridExchange(const PersistentPlan& plan, int rank, SharedAddress shared, int phases, int slice,
                                          unsigned char* workspace)
      : plan(plan), rank(rank), slice(slice), shared(shared), workspace(workspace) {
#pragma unroll
    for (int q = 0; q < max_phases; ++q) {
      if (q >= phases) continue;
      const Stage& s = plan.stage[q];
      stage[q] = {shared + unsigned(constant<pins>(s.operand)),
                  shared + unsigned(constant<pins>(plan.staging + q * plan.staging_stage)), constant<pins>(s.part),
                  constant<pins>(plan.blocks * s.part)};
    }
  }
  __device__ __forceinline__ SharedAddress operand(int q, int) const { return stage[q].operand; }
  __device__ __forceinline__ SharedAddress part(int q, int) const { return stage[q].staging - unsigned(rank * stage[q].part); }
  template <class T>
  static __device__ __forceinline__ T clean(T value) {  // NaN for NaN
    return not_a_sign_of_absence(value);
  }
  __device__ __forceinline__ void start(int) const {}
  __device__ __forceinline__ void sync_group() const { sync_block(); }
  __device__ __forceinline__ unsigned char* handed(int q, int k) const {
    return workspace + int64_t(k * plan.slices + slice) * plan.step_bytes + plan.stage[q].handed;
  }
  template <int batch>  // loads of a thread in flight
  __device__ __forceinline__ void wait(int q, int k) const {
    constexpr int stride = persistent_threads * 16;
    const unsigned char* from = handed(q, k) + threadIdx.x * 16;
    SharedAddress to = operand(q, k) + threadIdx.x * 16;
    for (int left = stage[q].all - int(threadIdx.x) * 16; left > 0;
         left -= batch * stride, from += batch * stride, to += batch * stride) {
      Words w[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i)
        if (left > i * stride) w[i] = load_given(from + i * stride);
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        if (left <= i * stride) continue;
        while (w[i].w[0] == not_given) {
          poll_pause();
          w[i] = load_given(from + i * stride);
        }
        store_shared(to + unsigned(i * stride), w[i]);
      }
    }
    sync_block();
  }
  __device__ __forceinline__ void give(int q, int k) const {
    sync_block();
    const int bytes = stage[q].part;
    unsigned char* to = handed(q, k) + rank * bytes;
    for (int at = int(threadIdx.x) * 16; at < bytes; at += persistent_threads * 16)
      store_given(to + at, load_shared<Words>(stage[q].staging + unsigned(at)));
  }
};

}  // namespace fusedrnn::cuda
