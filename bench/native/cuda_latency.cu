// What decides between the ways of csrc/cuda/persistent.h, each alone and as the kernels do it: how long blocks take to
// reach one another, and how fast a multiprocessor multiplies. Prints a table in nanoseconds and in cycles of the clock
// that the card had. Nothing here is part of the library.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>

#include "cuda/check.h"
#include "cuda/device_sm90.cuh"
#include "cuda/machine.h"
#include "cuda_time.h"

namespace fusedrnn::cuda {
namespace {

constexpr int threads = 256;

// What the kernels do without: flags in global memory, and copies to another block of a cluster.
#if defined(FUSEDRNN_EMULATED)
int load_acquire(const int* p) { return *p; }
void store_release(int* p, int v) { *p = v; }
void add_release(int* p, int v) { *p += v; }
void show_to_copies() {}
void copy_to_peer(SharedAddress at, int bytes, unsigned rank, SharedAddress barrier) {
  for (unsigned i = 0; i < unsigned(bytes); i += 16) send(at + i, load_shared<Words>(at + i), rank, barrier);
}
#else
__device__ int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ void store_release(int* p, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ void add_release(int* p, int v) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
#if FUSEDRNN_CLUSTERS
__device__ void show_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ void copy_to_peer(SharedAddress at, int bytes, unsigned rank, SharedAddress barrier) {
  asm volatile(
      "{ .reg .b32 to, bar;\n"
      "mapa.shared::cluster.u32 to, %0, %3;\n"
      "mapa.shared::cluster.u32 bar, %1, %3;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [%0], %2, [bar]; }" ::"r"(at),
      "r"(barrier), "r"(bytes), "r"(rank)
      : "memory");
}
#endif
#endif

// ---- within a cluster

__global__ void cluster_barrier(int rounds, float*) {
#if FUSEDRNN_CLUSTERS
  for (int i = 0; i < rounds; ++i) sync_cluster();
#endif
}

// A step's exchange without a step: all blocks of a cluster of `blocks` give one another `bytes` each, and go on when they
// have all. Two buffers, as in persistent.cuh. By stores, a warp's to one block (what the kernels do) or to several, or by
// copies, which the warps ask for.
enum class By { stores, scattered_stores, copies };

template <By by>
__global__ void cluster_exchange(int rounds, int blocks, int bytes, float*) {
#if FUSEDRNN_CLUSTERS
  const SharedAddress shared = shared_address(shared_memory<unsigned char>());
  const int rank = int(blockIdx.x) % blocks, warp = warp_of_thread(), lane = lane_of_thread();
  const unsigned arriving = unsigned((blocks - 1) * bytes);
  if (threadIdx.x == 0) {
    for (unsigned k = 0; k < 2; ++k) {
      barrier_init(shared + 8 * k);
      barrier_expect(shared + 8 * k, arriving);
    }
    barrier_init_done();
  }
  sync_cluster();
  for (int i = 0; i < rounds; ++i) {
    const SharedAddress own = shared + 128 + unsigned((i % 2 * blocks + rank) * bytes), barrier = shared + 8 * (i & 1);
    for (int at = int(threadIdx.x) * 16; at < bytes; at += threads * 16) store_shared(own + unsigned(at), no_words());
    if constexpr (by == By::copies) show_to_copies();
    sync_block();
    if constexpr (by == By::stores) {
      for (int at = lane * 16; at < bytes; at += 32 * 16) {
        const Words words = load_shared<Words>(own + unsigned(at));
        for (int to = warp; to < blocks; to += threads / 32)
          if (to != rank) send(own + unsigned(at), words, unsigned(to), barrier);
      }
    } else if constexpr (by == By::scattered_stores) {
      for (int v = int(threadIdx.x); v < bytes / 16 * blocks; v += threads)
        if (v % blocks != rank) send(own + unsigned(v / blocks * 16), no_words(), unsigned(v % blocks), barrier);
    } else {
      for (int to = warp; to < blocks; to += threads / 32)
        if (lane == 0 && to != rank) copy_to_peer(own, bytes, unsigned(to), barrier);
    }
    barrier_wait(barrier, unsigned(i / 2 % 2));
    if (threadIdx.x == 0) barrier_expect(barrier, arriving);
    sync_block();
  }
  sync_cluster();
#endif
}

// ---- through global memory

// Each of `blocks` blocks stores `bytes`, and all fetch what all have stored. They see by the values that these are there,
// from memory that each round has of its own (what the kernels do).
__global__ void grid_exchange(int rounds, int blocks, int bytes, unsigned char* memory) {
  const int rank = int(blockIdx.x) % blocks, all = blocks * bytes;
  const SharedAddress operand = shared_address(shared_memory<unsigned char>());
  for (int i = 0; i < rounds; ++i, memory += all) {
    for (int at = int(threadIdx.x) * 16; at < bytes; at += threads * 16) store_given(memory + rank * bytes + at, no_words());
    constexpr int batch = 4;
    for (int at = int(threadIdx.x) * 16; at < all; at += batch * threads * 16) {
      Words w[batch];
#pragma unroll
      for (int n = 0; n < batch; ++n)
        if (at + n * threads * 16 < all) w[n] = load_given(memory + at + n * threads * 16);
#pragma unroll
      for (int n = 0; n < batch; ++n) {
        const int next = at + n * threads * 16;
        if (next >= all) continue;
        while (w[n].w[0] == not_given) {
          poll_pause();
          w[n] = load_given(memory + next);
        }
        store_shared(operand + unsigned(next), w[n]);
      }
    }
    sync_block();
  }
}

// The same by a count of the blocks that have stored, and two buffers.
__global__ void grid_exchange_counted(int rounds, int blocks, int bytes, unsigned char* memory) {
  const int rank = int(blockIdx.x) % blocks, all = blocks * bytes;
  int* count = reinterpret_cast<int*>(memory);
  const SharedAddress operand = shared_address(shared_memory<unsigned char>());
  for (int i = 0; i < rounds; ++i) {
    unsigned char* buffer = memory + 128 + i % 2 * all;
    for (int at = int(threadIdx.x) * 16; at < bytes; at += threads * 16) store_given(buffer + rank * bytes + at, no_words());
    sync_block();
    if (threadIdx.x == 0) {
      add_release(count, 1);
      while (load_acquire(count) < (i + 1) * blocks) poll_pause();
    }
    sync_block();
    for (int at = int(threadIdx.x) * 16; at < all; at += threads * 16)
      store_shared(operand + unsigned(at), load_given(buffer + at));
    sync_block();
  }
}

// Two blocks hand one flag to and fro: a store, its sight by another block, and back.
__global__ void flag_hop(int rounds, int* flags) {
  if (threadIdx.x != 0) return;
  for (int i = 0; i < rounds; ++i) {
    if (blockIdx.x == 0) store_release(flags, i + 1);
    while (load_acquire(flags + (blockIdx.x == 0 ? 32 : 0)) <= i) poll_pause();
    if (blockIdx.x == 1) store_release(flags + 32, i + 1);
  }
}

// ---- within a block

__global__ void block_barrier(int rounds, float*) {
  for (int i = 0; i < rounds; ++i) sync_block();
}

// 16 x 8 x 16 products of 16-bit numbers from registers, `chains` sums at once, by all warps.
template <int chains>
__global__ void multiply(int rounds, float* out) {
  float d[chains][4] = {};
  const uint32_t a = threadIdx.x, b = blockIdx.x;
  for (int i = 0; i < rounds; ++i)
#pragma unroll
    for (int c = 0; c < chains; ++c) mma(__nv_bfloat16(), d[c], a, a, a, a, b, b);
  float sum = 0;
#pragma unroll
  for (int c = 0; c < chains; ++c) sum += d[c][0] + d[c][1] + d[c][2] + d[c][3];
  if (sum == 1) *out = sum;
}

// Fused multiply-adds of float32 from registers.
__global__ void multiply_float(int rounds, float* out) {
  constexpr int chains = 16;
  float d[chains] = {};
  const float a = float(threadIdx.x), b = float(blockIdx.x);
  for (int i = 0; i < rounds; ++i)
#pragma unroll
    for (int c = 0; c < chains; ++c) d[c] = fmaf(d[c], a, b);
  float sum = 0;
#pragma unroll
  for (int c = 0; c < chains; ++c) sum += d[c];
  if (sum == 1) *out = sum;
}

// 16 bytes a thread and round from shared memory, as weights that are in no register are read.
__global__ void read_shared(int rounds, float* out) {
  const Words* p = shared_memory<Words>();
  uint32_t sum = 0;
  for (int i = 0; i < rounds; ++i) {
    const Words v = p[(i * threads + int(threadIdx.x)) % (4 * threads)];
    sum += v.w[0] ^ v.w[1] ^ v.w[2] ^ v.w[3];
  }
  if (sum == 1) *out = 1;
}

// ---- host

struct Table {
  int rounds, repeats;
  double mhz;
  unsigned char* memory;
  size_t memory_bytes;
  int fill = 0;  // its bytes before a launch

  // Microseconds of a launch.
  template <class Run>
  double median(Run run) const {
    return median_us(2, repeats, [&] { FUSEDRNN_CUDA(cudaMemset(memory, fill, memory_bytes)); }, run);
  }

  // Time of a round: of 2 * rounds less that of rounds, so that launch and start fall out. amount: of `unit` in a
  // round.
  template <class Kernel, class... Args>
  void row(const std::string& what, const Launch& how, Kernel kernel, double amount, const char* unit, Args... args) const {
    const auto run = [&](int n) { return [&, n] { launch("latency", how, kernel, n, args...); }; };
    try {
      const double ns = (median(run(2 * rounds)) - median(run(rounds))) * 1e3 / rounds;
      printf("%-58s %9.1f ns %9.0f cycles", what.c_str(), ns, ns * mhz / 1e3);
      if (amount > 0 && ns > 0) printf(" %10.1f %s/cycle", amount / (ns * mhz / 1e3), unit);
      printf("\n");
    } catch (const Error& error) {
      printf("%-58s not run: %s\n", what.c_str(), error.what());
      cudaGetLastError();
    }
  }
};

int run(int rounds, int repeats) {
  const Machine& machine = machine_of(0);
  int khz = 0;
  if (cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, 0) != cudaSuccess || khz == 0) khz = 1000000;
  Table table{rounds, repeats, khz / 1e3, nullptr, size_t(1) << 28};
  FUSEDRNN_CUDA(cudaMalloc(&table.memory, table.memory_bytes));
  float* out = reinterpret_cast<float*>(table.memory);
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  printf("%s, %d multiprocessors, driver %d, runtime %d; cycles of %.0f MHz, the highest clock\n", machine.name.c_str(),
         machine.processors, driver, runtime, table.mhz);

  table.row("barrier of a block of 256", {1, threads}, block_barrier, 0, "", out);
  for (const int blocks : {2, 4, 8, 16}) {
    if (blocks > machine.max_cluster) continue;
    Launch how{unsigned(blocks), threads, 160 << 10};
    how.cluster = blocks;
    const std::string of = " of " + std::to_string(blocks);
    table.row("cluster" + of + ": barrier", how, cluster_barrier, 0, "", out);
    for (const int bytes : {128, 512, 2048}) {
      const std::string each = "cluster" + of + ": each gives all " + std::to_string(bytes) + " bytes, by ";
      const double all = double(bytes) * blocks;
      table.row(each + "stores", how, cluster_exchange<By::stores>, all, "bytes", blocks, bytes, out);
      table.row(each + "scattered stores", how, cluster_exchange<By::scattered_stores>, all, "bytes", blocks, bytes, out);
      table.row(each + "copies", how, cluster_exchange<By::copies>, all, "bytes", blocks, bytes, out);
    }
    Launch full = how;
    full.grid = dim3(unsigned(machine.clusters[blocks == 2 ? 1 : blocks == 4 ? 2 : blocks == 8 ? 3 : 4] * blocks));
    if (full.grid.x == 0) continue;
    table.row("the same by stores, 2048 bytes, all clusters at once", full, cluster_exchange<By::stores>, 2048.0 * blocks,
              "bytes", blocks, 2048, out);
    printf("cluster%s: %d of them are resident at once\n", of.c_str(), int(full.grid.x) / blocks);
  }
  {
    Launch two{2, 32};
    two.cooperative = true;
    table.row("flag between two blocks, there and back", two, flag_hop, 0, "", reinterpret_cast<int*>(table.memory));
  }
  for (const int blocks : {16, 32, 64, 128}) {
    if (blocks > machine.processors) continue;
    for (const int bytes : {128, 256, 1024}) {
      Launch how{unsigned(blocks), threads, size_t(160) << 10};
      how.cooperative = true;
      if (size_t(blocks) * bytes > how.shared || size_t(2 * rounds) * blocks * bytes > table.memory_bytes) continue;
      const std::string each =
          "grid of " + std::to_string(blocks) + ": each gives all " + std::to_string(bytes) + " bytes, seen by ";
      const double all = double(bytes) * blocks;
      table.fill = 0xff;
      table.row(each + "their values", how, grid_exchange, all, "bytes", blocks, bytes, table.memory);
      table.fill = 0;
      table.row(each + "a count", how, grid_exchange_counted, all, "bytes", blocks, bytes, table.memory);
    }
  }
  const double products = 16 * 8 * 16 * (threads / 32);
  table.row("mma of 8 warps, one sum each", {1, threads}, multiply<1>, products, "products", out);
  table.row("mma of 8 warps, two sums each", {1, threads}, multiply<2>, 2 * products, "products", out);
  table.row("mma of 8 warps, four sums each", {1, threads}, multiply<4>, 4 * products, "products", out);
  table.row("mma of 8 warps, eight sums each", {1, threads}, multiply<8>, 8 * products, "products", out);
  table.row("float32 multiply-adds of 8 warps, 16 sums each", {1, threads}, multiply_float, 16.0 * threads, "products", out);
  table.row("shared memory read by 8 warps", {1, threads, 64 << 10}, read_shared, 16.0 * threads, "bytes", out);
  FUSEDRNN_CUDA(cudaFree(table.memory));
  return 0;
}

}  // namespace
}  // namespace fusedrnn::cuda

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 1000, repeats = argc > 2 ? atoi(argv[2]) : 15;
  if (rounds < 1 || repeats < 1) {
    fprintf(stderr, "usage: %s [rounds, 1000] [repeats, 15]\n", argv[0]);
    return 2;
  }
  try {
    return fusedrnn::cuda::run(rounds, repeats);
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
