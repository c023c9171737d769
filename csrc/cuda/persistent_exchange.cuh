// How the blocks of the persistent kernel hand each other their parts of an operand: in a cluster by its shared memory, in a
// grid by global memory, in practice the second cache level.
//
// An operand is [16 bytes of k][sequence][16 bytes], the sequences turned (persistent_product.cuh). k goes by block, by 16
// bytes of units, by slot, so that what a block gives is one piece: the part of its rank.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/persistent_product.cuh"

namespace fusedrnn::cuda {

// Both have: operand(q, k), where number k of stage q's operand lies in shared memory once it was awaited; part(q, k), where
// this block puts its part of it, by offsets within the operand; give(), which hands that to the others; wait().
struct ClusterExchange {
  static constexpr Exchange kind = Exchange::cluster;
  const PersistentPlan& plan;
  const int rank;
  const SharedAddress shared;
#if FUSEDRNN_CLUSTERS

  __device__ __forceinline__ SharedAddress barrier(int q, int k) const {
    return shared + unsigned(plan.barriers + (2 * q + (k & 1)) * 8);
  }
  __device__ __forceinline__ SharedAddress operand(int q, int k) const {
    const Stage& s = plan.stage[q];
    return shared + unsigned(k & 1 ? s.operand + s.bytes : s.operand);
  }
  __device__ __forceinline__ SharedAddress part(int q, int k) const { return operand(q, k); }
  template <class T>
  static __device__ __forceinline__ T clean(T value) {
    return value;
  }
  __device__ __forceinline__ void start(int q) const {
    if (threadIdx.x != 0) return;
    for (int k = 0; k < 2; ++k) {
      barrier_init(barrier(q, k));
      barrier_expect(barrier(q, k), unsigned(plan.stage[q].arriving));
    }
    barrier_init_done();
  }
  __device__ __forceinline__ void sync_group() const { sync_cluster(); }
  template <int batch>
  __device__ __forceinline__ void wait(int q, int k) const {
    if (plan.stage[q].arriving == 0) return;  // one block: give() was a barrier
    barrier_wait(barrier(q, k), unsigned(k) >> 1 & 1);
    if (threadIdx.x == 0)
      barrier_expect(barrier(q, k), unsigned(plan.stage[q].arriving));  // of k + 2, which nobody gives before we give k + 1
  }
  // Neighbouring lanes store neighbouring 16 bytes to the same block: what goes to several at once takes longer.
  __device__ __forceinline__ void give(int q, int k, int vector, int to) const {
    sync_block();
    const Stage& s = plan.stage[q];
    SharedAddress at = operand(q, k) + unsigned(rank * s.part + vector * 16);
    const SharedAddress done = barrier(q, k);
    const Words words = load_shared<Words>(at);
    const auto offer = [&](const Words& w) {
      if (to < plan.blocks && to != rank) send(at, w, unsigned(to), done);
    };
    offer(words);
    if (s.vector_step == 0) {  // as a rule: the same 16 bytes go to further blocks
#pragma unroll 2
      for (int i = 1; i < s.passes; ++i) {
        to += s.block_step;
        offer(words);
      }
      return;
    }
#pragma unroll 1
    for (int i = 1; i < s.passes; ++i) {
      to += s.block_step, vector += s.vector_step, at += unsigned(s.vector_step * 16);
      if (vector * 16 >= s.part) vector -= s.part / 16, at -= unsigned(s.part), ++to;
      offer(load_shared<Words>(at));
    }
  }
#endif
};

// Every step has memory of its own, filled with `not_given` before the launch. What is given is never that, so that a block
// sees by the values whether they are there: one way through the cache less than by a flag.
struct GridExchange {
  static constexpr Exchange kind = Exchange::grid;
  const PersistentPlan& plan;
  const int rank;
  const SharedAddress shared;
  const int slice;
  unsigned char* const workspace;  // [step][slice]

  __device__ __forceinline__ SharedAddress operand(int q, int) const { return shared + unsigned(plan.stage[q].operand); }
  __device__ __forceinline__ SharedAddress part(int q, int) const {
    return shared + unsigned(plan.staging + q * plan.staging_stage - rank * plan.stage[q].part);
  }
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
    const int bytes = plan.blocks * plan.stage[q].part;
    const unsigned char* from = handed(q, k) + threadIdx.x * 16;
    SharedAddress to = operand(q, k) + threadIdx.x * 16;
    for (int left = bytes - int(threadIdx.x) * 16; left > 0;
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
  __device__ __forceinline__ void give(int q, int k, int, int) const {
    sync_block();
    const int bytes = plan.stage[q].part;
    unsigned char* to = handed(q, k) + rank * bytes;
    for (int at = int(threadIdx.x) * 16; at < bytes; at += persistent_threads * 16)
      store_given(to + at, load_shared<Words>(shared + unsigned(plan.staging + q * plan.staging_stage + at)));
  }
};

}  // namespace fusedrnn::cuda
