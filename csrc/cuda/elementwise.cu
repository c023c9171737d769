// Kernels that touch each element once: packed rows, dropout, states, checksums; and the bias gradients' sums.
#include "cuda/elementwise.h"

#include <algorithm>

#include "cuda/check.h"
#include "cuda/device_sm90.cuh"

namespace fusedrnn::cuda {
namespace {

constexpr int row_threads = 32, block_rows = 8, flat_threads = 256;

Launch over_rows(int64_t rows, cudaStream_t stream) {
  return {unsigned(std::min<int64_t>(ceil_div(rows, block_rows), 1 << 20)), dim3(row_threads, block_rows), 0, stream};
}
Launch flat(int64_t n, cudaStream_t stream) {
  return {unsigned(std::clamp<int64_t>(ceil_div(n, flat_threads), 1, 4096)), flat_threads, 0, stream};
}

// Calls f(t, j) of each of T x B rows, for all threads of a row of the block.
template <class F>
__device__ __forceinline__ void for_rows(int64_t T_, int64_t B, F f) {
  for (int64_t r = int64_t(blockIdx.x) * block_rows + threadIdx.y; r < T_ * B; r += int64_t(gridDim.x) * block_rows)
    f(r / B, r % B);
}
template <class F>
__device__ __forceinline__ void for_columns(int64_t width, F f) {
  for (int64_t c = threadIdx.x; c < width; c += row_threads) f(c);
}
template <class F>
__device__ __forceinline__ void for_flat(int64_t n, F f) {
  for (int64_t i = int64_t(blockIdx.x) * flat_threads + threadIdx.x; i < n; i += int64_t(gridDim.x) * flat_threads) f(i);
}

__global__ void uniform_schedule_kernel(int* active, int* length, int64_t* offset, int* from, int64_t T_, int64_t B,
                                        unsigned* counts, int64_t n) {
  for_flat(T_ + 1, [&](int64_t t) {
    active[t] = t < T_ ? int(B) : 0;
    offset[t] = t * B;
  });
  for_flat(B, [&](int64_t j) {
    length[j] = int(T_);
    from[j] = int(j);
  });
  for_flat(n, [&](int64_t i) { counts[i] = 0; });
}

struct Values {  // they travel with the launch, whose arguments may have 4 KB
  int64_t of[448];
};
template <class To>
__global__ void upload_kernel(To* to, const __grid_constant__ Values values, int n) {
  for_flat(n, [&](int64_t i) { to[i] = To(values.of[i]); });
}

template <class T>
__global__ void gather_kernel(T* packed, int64_t packed_row, Strided<const T> a, int64_t width, Packing p) {
  for_rows(p.T_, p.B, [&](int64_t t, int64_t j) {
    if (t >= p.length[j]) return;
    T* to = packed + (p.offset[t] + j) * packed_row;
    const T* row = a.data + t * a.step + p.from[j] * a.row;
    for_columns(width, [&](int64_t c) { to[c] = row[c * a.column]; });
  });
}

template <class T>
__global__ void scatter_kernel(Strided<T> a, const T* packed, int64_t packed_row, int64_t width, bool adds, Packing p) {
  for_rows(p.T_, p.B, [&](int64_t t, int64_t j) {
    T* row = a.data + t * a.step + p.from[j] * a.row;
    if (t >= p.length[j]) {
      if (!adds) for_columns(width, [&](int64_t c) { row[c * a.column] = narrow<T>(0); });
      return;
    }
    const T* from = packed + (p.offset[t] + j) * packed_row;
    for_columns(width, [&](int64_t c) {
      T* to = row + c * a.column;
      *to = adds ? narrow<T>(widen(*to) + widen(from[c])) : from[c];
    });
  });
}

__device__ __forceinline__ uint64_t mix(uint64_t z) {  // SplitMix64's
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

template <class T>
__global__ void dropout_kernel(const T* x, T* out, int64_t width, uint64_t first, uint64_t seed, uint32_t threshold,
                               Accumulate<T> scale, Packing p) {
  for_rows(p.T_, p.B, [&](int64_t t, int64_t j) {
    if (t >= p.length[j]) return;
    const int64_t at = (p.offset[t] + j) * width;
    const uint64_t index = first + uint64_t((t * p.B + p.from[j]) * width);
    for_columns(width, [&](int64_t c) {
      const uint64_t z = mix(seed + (index + uint64_t(c)) * 0x9e3779b97f4a7c15u);
      out[at + c] = uint32_t(z >> 32) >= threshold ? narrow<T>(widen(x[at + c]) * scale) : narrow<T>(0);
    });
  });
}

template <class T>
__global__ void pass_states_kernel(T* to, const T* from, int64_t H, int64_t first, Packing p) {
  for_rows(1, p.B - first, [&](int64_t, int64_t j) {
    const int64_t at = p.from[first + j] * H;
    for_columns(H, [&](int64_t u) { to[at + u] = from ? from[at + u] : narrow<T>(0); });
  });
}

template <class T>
__global__ void add_kernel(T* to, const T* from, int64_t n) {
  for_flat(n, [&](int64_t i) { to[i] = narrow<T>(widen(to[i]) + widen(from[i])); });
}

template <class T>
__global__ void previous_states_kernel(T* to, ForwardArgs<T> a, int64_t T_) {
  const Schedule& s = a.schedule;
  for_rows(T_, s.batch, [&](int64_t t, int64_t j) {
    if (t >= s.length[j]) return;
    const int64_t before = s.backward_in_time ? t + 1 : t - 1;  // in time
    const bool first = before < 0 || before >= s.length[j];
    const T* from = !first       ? a.y + (s.offset[before] + j) * a.y_row
                    : a.state[0] ? a.state[0] + int64_t(s.from[j]) * a.H
                                 : nullptr;
    T* row = to + (s.offset[t] + j) * a.H;
    for_columns(a.H, [&](int64_t u) { row[u] = from ? from[u] : narrow<T>(0); });
  });
}

struct SlotGates {  // of each slot: its gate, and which bias feeds it
  int count;
  int gate[CellInfo::max_slots];
  bool input[CellInfo::max_slots], recurrent[CellInfo::max_slots];
};

SlotGates slot_gates(const CellInfo& cell) {
  SlotGates g{};
  g.count = cell.slots;
  for (int i = 0; i < cell.slots; ++i) {
    g.gate[i] = cell.slot_gate[i];
    g.input[i] = contains(cell.input, i);
    for (int p = 0; p < cell.phases; ++p) g.recurrent[i] = g.recurrent[i] || contains(cell.recurrent[p], i);
  }
  return g;
}

template <class T>
__global__ void slot_biases_kernel(Accumulate<T>* to, const T* b_ih, const T* b_hh, SlotGates g, int64_t H) {
  for_flat(g.count * H, [&](int64_t n) {
    const int i = int(n / H);
    const int64_t at = g.gate[i] * H + n % H;
    Accumulate<T> sum = 0;
    if (b_ih && g.input[i]) sum += widen(b_ih[at]);
    if (b_hh && g.recurrent[i]) sum += widen(b_hh[at]);
    to[n] = sum;
  });
}

constexpr int transpose_tile = 32;

template <class T>
__global__ void interleave_kernel(T* to, const T* w_ih, SlotGates g, Span span, int64_t H, int64_t I) {
  for_rows(H, span.count, [&](int64_t u, int64_t i) {
    const T* from = w_ih + (g.gate[span.first + i] * H + u) * I;
    for_columns(I, [&](int64_t c) { to[(u * span.count + i) * I + c] = from[c]; });
  });
}

// to[u][i * H + v] = w[gate of slot i * H + v][u], tile by tile; z is the slot of the span.
template <class T>
__global__ void transpose_kernel(T* to, const T* w, SlotGates g, int first, int count, int64_t H) {
  T* tile = shared_memory<T>();  // [32][33]: neighbours in a column lie in different banks
  const int i = int(blockIdx.z);
  const int64_t u0 = int64_t(blockIdx.x) * transpose_tile, v0 = int64_t(blockIdx.y) * transpose_tile;
  for (int r = threadIdx.y; r < transpose_tile; r += block_rows) {
    const int64_t v = v0 + r, u = u0 + threadIdx.x;
    if (v < H && u < H) tile[r * (transpose_tile + 1) + threadIdx.x] = w[(g.gate[first + i] * H + v) * H + u];
  }
  sync_block();
  for (int r = threadIdx.y; r < transpose_tile; r += block_rows) {
    const int64_t u = u0 + r, v = v0 + threadIdx.x;
    if (v < H && u < H) to[(u * count + i) * H + v] = tile[threadIdx.x * (transpose_tile + 1) + r];
  }
}

constexpr int64_t sum_rows = 1024;  // rows whose sum is one partial sum

// partial[chunk][column]: a block sums 32 columns of one chunk of rows.
template <class T>
__global__ void column_sums_kernel(Accumulate<T>* partial, const T* x, int64_t N, int64_t width) {
  using S = Accumulate<T>;
  S* shared = shared_memory<S>();  // [block_rows][32]
  const int64_t c = int64_t(blockIdx.x) * row_threads + threadIdx.x;
  for (int64_t chunk = blockIdx.y; chunk * sum_rows < N; chunk += gridDim.y) {
    const int64_t end = (chunk + 1) * sum_rows < N ? (chunk + 1) * sum_rows : N;
    S sum = 0;
    if (c < width)
      for (int64_t r = chunk * sum_rows + threadIdx.y; r < end; r += block_rows) sum += widen(x[r * width + c]);
    sync_block();
    shared[threadIdx.y * row_threads + threadIdx.x] = sum;
    sync_block();
    if (threadIdx.y == 0 && c < width) {
      for (int r = 1; r < block_rows; ++r) sum += shared[r * row_threads + threadIdx.x];
      partial[chunk * width + c] = sum;
    }
  }
}

template <class T>
__global__ void finish_biases_kernel(T* db_ih, T* db_hh, const Accumulate<T>* partial, int64_t chunks, SlotGates g, int64_t H,
                                     bool adds) {
  for_flat(g.count * H, [&](int64_t n) {
    const int i = int(n / H);
    const int64_t at = g.gate[i] * H + n % H;
    Accumulate<T> sum = 0;
    for (int64_t k = 0; k < chunks; ++k) sum += partial[k * g.count * H + n];
    if (g.input[i]) db_ih[at] = narrow<T>(adds ? widen(db_ih[at]) + sum : sum);
    if (g.recurrent[i]) db_hh[at] = narrow<T>(adds ? widen(db_hh[at]) + sum : sum);
  });
}

template <class T>
__device__ __forceinline__ uint64_t hash(T value, int64_t index) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return mix(bits + uint64_t(index + 1) * 0x9e3779b97f4a7c15u);
}

__device__ __forceinline__ void add_warp_sum(unsigned long long* to, uint64_t sum) {
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (threadIdx.x % 32 == 0) atomic_add(to, sum);
}

template <class T>
__global__ void checksum_kernel(unsigned long long* to, const T* data, int64_t n, int64_t index) {
  uint64_t sum = 0;
  for_flat(n, [&](int64_t i) { sum += hash(data[i], index + i); });
  add_warp_sum(to, sum);
}

template <class T>
__global__ void checksum_rows_kernel(unsigned long long* to, Strided<const T> a, int64_t width, Packing p) {
  uint64_t sum = 0;
  for_rows(p.T_, p.B, [&](int64_t t, int64_t j) {
    if (t >= p.length[j]) return;
    const T* row = a.data + t * a.step + p.from[j] * a.row;
    for_columns(width, [&](int64_t c) { sum += hash(row[c * a.column], (t * p.B + p.from[j]) * width + c); });
  });
  add_warp_sum(to, sum);
}

}  // namespace

void uniform_schedule(int* active, int* length, int64_t* offset, int* from, int64_t T_, int64_t B, unsigned* counts, int64_t n,
                      cudaStream_t stream) {
  launch("uniform_schedule", flat(std::max(T_ + 1, B), stream), uniform_schedule_kernel, active, length, offset, from, T_, B,
         counts, n);
}

template <class To>
void upload(To* to, const std::vector<int64_t>& values, cudaStream_t stream) {
  constexpr size_t most = sizeof(Values) / sizeof(int64_t);
  for (size_t first = 0; first < values.size(); first += most) {
    Values some{};
    const size_t n = std::min(most, values.size() - first);
    std::copy_n(values.begin() + ptrdiff_t(first), n, some.of);
    launch("upload", flat(int64_t(n), stream), upload_kernel<To>, to + first, some, int(n));
  }
}
template void upload(int*, const std::vector<int64_t>&, cudaStream_t);
template void upload(int64_t*, const std::vector<int64_t>&, cudaStream_t);

template <class T>
void gather(T* packed, int64_t packed_row, const Strided<const T>& a, int64_t width, const Packing& p, cudaStream_t stream) {
  if (p.T_ * p.B == 0) return;
  launch("gather", over_rows(p.T_ * p.B, stream), gather_kernel<T>, packed, packed_row, a, width, p);
}

template <class T>
void scatter(const Strided<T>& a, const T* packed, int64_t packed_row, int64_t width, bool adds, const Packing& p,
             cudaStream_t stream) {
  if (p.T_ * p.B == 0) return;
  launch("scatter", over_rows(p.T_ * p.B, stream), scatter_kernel<T>, a, packed, packed_row, width, adds, p);
}

template <class T>
void dropout(const T* x, T* out, int64_t width, int64_t layer, double probability, uint64_t seed, const Packing& p,
             cudaStream_t stream) {
  if (p.T_ * p.B == 0) return;
  const auto threshold = uint32_t(std::min(probability * 4294967296.0, 4294967295.0));
  launch("dropout", over_rows(p.T_ * p.B, stream), dropout_kernel<T>, x, out, width,
         uint64_t(layer) * uint64_t(p.T_ * p.B * width), seed, threshold, Accumulate<T>(1.0 / (1.0 - probability)), p);
}

template <class T>
void pass_states(T* to, const T* from, int64_t H, int64_t first, const Packing& p, cudaStream_t stream) {
  if (first >= p.B) return;
  launch("pass_states", over_rows(p.B - first, stream), pass_states_kernel<T>, to, from, H, first, p);
}

template <class T>
void add_to(T* to, const T* from, int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  launch("add_to", flat(n, stream), add_kernel<T>, to, from, n);
}

template <class T>
void previous_states(T* to, const ForwardArgs<T>& args, int64_t T_, cudaStream_t stream) {
  launch("previous_states", over_rows(T_ * args.schedule.batch, stream), previous_states_kernel<T>, to, args, T_);
}

template <class T>
void slot_biases(Accumulate<T>* to, const T* b_ih, const T* b_hh, const CellInfo& cell, int64_t H, cudaStream_t stream) {
  launch("slot_biases", flat(cell.slots * H, stream), slot_biases_kernel<T>, to, b_ih, b_hh, slot_gates(cell), H);
}

template <class T>
void interleave_weights(T* to, const T* w_ih, const CellInfo& cell, Span span, int64_t H, int64_t I, cudaStream_t stream) {
  constexpr int together = sizeof(Words) / sizeof(T);
  const auto copy = [&](auto* out, const auto* in, int64_t columns) {
    launch("interleave_weights", over_rows(H * span.count, stream), interleave_kernel<std::decay_t<decltype(*out)>>, out, in,
           slot_gates(cell), span, H, columns);
  };
  if (I % together == 0 && uintptr_t(w_ih) % sizeof(Words) == 0)
    copy(reinterpret_cast<Words*>(to), reinterpret_cast<const Words*>(w_ih), I / together);
  else
    copy(to, w_ih, I);
}

template <class T>
void transpose_weights(T* to, const T* w_hh, const CellInfo& cell, Span span, int64_t H, cudaStream_t stream) {
  const auto tiles = unsigned(ceil_div(H, transpose_tile));
  launch("transpose_weights",
         {dim3(tiles, tiles, unsigned(span.count)), dim3(row_threads, block_rows),
          transpose_tile * (transpose_tile + 1) * sizeof(T), stream},
         transpose_kernel<T>, to, w_hh, slot_gates(cell), span.first, span.count, H);
}

int64_t bias_gradients_rows(int64_t N) { return ceil_div(N, sum_rows); }

template <class T>
void bias_gradients(T* db_ih, T* db_hh, const T* gates, Accumulate<T>* workspace, int64_t N, const CellInfo& cell, int64_t H,
                    bool adds, cudaStream_t stream) {
  const int64_t width = cell.slots * H, chunks = bias_gradients_rows(N);
  launch("column_sums",
         {dim3(unsigned(ceil_div(width, row_threads)), unsigned(std::clamp<int64_t>(chunks, 1, 65535))),
          dim3(row_threads, block_rows), row_threads * block_rows * sizeof(Accumulate<T>), stream},
         column_sums_kernel<T>, workspace, gates, N, width);
  launch("finish_biases", flat(width, stream), finish_biases_kernel<T>, db_ih, db_hh, workspace, chunks, slot_gates(cell), H,
         adds);
}

constexpr unsigned most_summing_blocks = 512;  // each of their warps adds to the one sum, in turn

template <class T>
void add_checksum(unsigned long long* sum, const T* data, int64_t n, int64_t index, cudaStream_t stream) {
  if (n == 0) return;
  Launch how = flat(n, stream);
  how.grid.x = std::min(how.grid.x, most_summing_blocks);
  launch("checksum", how, checksum_kernel<T>, sum, data, n, index);
}

template <class T>
void add_checksum(unsigned long long* sum, const Strided<const T>& a, int64_t width, const Packing& p, cudaStream_t stream) {
  if (p.T_ * p.B * width == 0) return;
  Launch how = over_rows(p.T_ * p.B, stream);
  how.grid.x = std::min(how.grid.x, most_summing_blocks);
  launch("checksum_rows", how, checksum_rows_kernel<T>, sum, a, width, p);
}

#define FUSEDRNN_INSTANTIATE(T)                                                                                             \
  template void gather(T*, int64_t, const Strided<const T>&, int64_t, const Packing&, cudaStream_t);                        \
  template void scatter(const Strided<T>&, const T*, int64_t, int64_t, bool, const Packing&, cudaStream_t);                 \
  template void dropout(const T*, T*, int64_t, int64_t, double, uint64_t, const Packing&, cudaStream_t);                    \
  template void pass_states(T*, const T*, int64_t, int64_t, const Packing&, cudaStream_t);                                  \
  template void add_to(T*, const T*, int64_t, cudaStream_t);                                                                \
  template void previous_states(T*, const ForwardArgs<T>&, int64_t, cudaStream_t);                                          \
  template void slot_biases<T>(Accumulate<T>*, const T*, const T*, const CellInfo&, int64_t, cudaStream_t);                 \
  template void interleave_weights(T*, const T*, const CellInfo&, Span, int64_t, int64_t, cudaStream_t);                    \
  template void transpose_weights(T*, const T*, const CellInfo&, Span, int64_t, cudaStream_t);                              \
  template void bias_gradients<T>(T*, T*, const T*, Accumulate<T>*, int64_t, const CellInfo&, int64_t, bool, cudaStream_t); \
  template void add_checksum(unsigned long long*, const T*, int64_t, int64_t, cudaStream_t);                                \
  template void add_checksum(unsigned long long*, const Strided<const T>&, int64_t, const Packing&, cudaStream_t);
FUSEDRNN_INSTANTIATE(float)
FUSEDRNN_INSTANTIATE(double)
FUSEDRNN_INSTANTIATE(__half)
FUSEDRNN_INSTANTIATE(__nv_bfloat16)
#undef FUSEDRNN_INSTANTIATE

}  // namespace fusedrnn::cuda
