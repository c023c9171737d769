// How the blocks of the persistent kernel hand each other their parts of an operand: in a cluster by its shared memory, in a
// grid by global memory and flags.
#pragma once

#include "cuda/device_sm90.cuh"
#include "cuda/persistent.h"

namespace fusedrnn::cuda {

// A block's part of the exchange: where number k of stage q's operand lies in shared memory once it was awaited, and
// how a part of it is given. `buffer` is the size of an operand, `arriving` that of what blocks give of it in all; both
// in bytes.
struct ClusterExchange {
  static constexpr Exchange kind = Exchange::cluster;
  const PersistentPlan& plan;
#if FUSEDRNN_CLUSTERS

  __device__ __forceinline__ uint64_t* barrier(int q, int k) const {
    return reinterpret_cast<uint64_t*>(shared_memory<unsigned char>() + plan.barriers) + 2 * q + k % 2;
  }
  __device__ __forceinline__ unsigned char* operand(int q, int k, int buffer) const {
    return shared_memory<unsigned char>() + plan.stage[q].operand + (k % 2) * buffer;
  }
  __device__ __forceinline__ void start(int q, unsigned arriving) const {
    if (threadIdx.x != 0) return;
    for (int k = 0; k < 2; ++k) {
      barrier_init(barrier(q, k));
      barrier_expect(barrier(q, k), arriving);
    }
    barrier_init_done();
  }
  __device__ __forceinline__ void sync_group() const { sync_cluster(); }
  __device__ __forceinline__ void wait(int q, int k, int, unsigned arriving, int) const {
    barrier_wait(barrier(q, k), k / 2 % 2);
    if (threadIdx.x == 0) barrier_expect(barrier(q, k), arriving);  // of k + 2, which nobody gives before we give k + 1
  }
  // Several lanes may hold the same words: this one is number `first` of `stride`.
  __device__ __forceinline__ void give(int q, int k, int buffer, int at, Words words, int first, int stride) const {
    for (int rank = first; rank < plan.blocks; rank += stride) send(operand(q, k, buffer) + at, words, rank, barrier(q, k));
  }
  __device__ __forceinline__ void given(int, int) const {}
#endif
};

struct GridExchange {
  static constexpr Exchange kind = Exchange::grid;
  const PersistentPlan& plan;
  unsigned char* workspace = nullptr;  // of the slice

  __device__ __forceinline__ int* flags(int q) const {
    return reinterpret_cast<int*>(workspace + plan.flags) + q * plan.blocks;
  }
  __device__ __forceinline__ unsigned char* operand(int q, int, int) const {
    return shared_memory<unsigned char>() + plan.stage[q].operand;
  }
  __device__ __forceinline__ void start(int, unsigned) const {}
  __device__ __forceinline__ void sync_group() const { sync_block(); }
  // Each warp awaits some of the blocks and fetches what they gave, as soon as they gave it.
  __device__ __forceinline__ void wait(int q, int k, int buffer, unsigned arriving, int width) const {
    const int warp = warp_of_thread(), lane = lane_of_thread();
    const int first = plan.blocks * warp / persistent_warps, n = plan.blocks * (warp + 1) / persistent_warps - first;
    for (int i = lane; i < n; i += 32)
      while (load_acquire(flags(q) + first + i) <= k) poll_pause();
    sync_warp();
    const int row = buffer / plan.columns;                           // bytes: of a sequence
    const int slot = int(arriving) / (width * plan.stage[q].slots);  // of one of its slots
    const int vectors = slot / plan.blocks * n / 16, offset = slot / plan.blocks * first;
    const unsigned char* from = workspace + plan.stage[q].handed + (k % 2) * buffer;
    for (int c = 0; c < width; ++c)
      for (int i = 0; i < plan.stage[q].slots; ++i)
        for (int v = lane; v < vectors; v += 32) {
          const int at = c * row + i * slot + offset + 16 * v;
          copy_async(operand(q, k, buffer) + at, from + at);
        }
    copy_async_wait();
    sync_block();
  }
  __device__ __forceinline__ void give(int q, int k, int buffer, int at, Words words, int first, int) const {
    if (first == 0) store_shared_by_blocks(workspace + plan.stage[q].handed + (k % 2) * buffer + at, words);
  }
  __device__ __forceinline__ void given(int q, int k) const {
    sync_block();
    if (threadIdx.x == 0) store_release(flags(q) + blockIdx.x % plan.blocks, k + 1);
  }
};

}  // namespace fusedrnn::cuda
