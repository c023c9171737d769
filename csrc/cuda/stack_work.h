// What the two passes of a stack have in common: rows in packed order, products, the path a layer takes, the stream of what
// runs beside.
#pragma once

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>

#include "cuda/blas.h"
#include "cuda/check.h"
#include "cuda/elementwise.h"
#include "cuda/memory.h"
#include "cuda/plan.h"
#include "cuda/stack.h"
#include "cuda/step.h"

namespace fusedrnn::cuda {

// With FUSEDRNN_TRACE=1, every layer's plan is printed.
inline bool traces() {
  static const bool on = [] {
    const char* text = getenv("FUSEDRNN_TRACE");
    return text && *text && *text != '0';
  }();
  return on;
}

// What runs beside the caller's stream, the second direction or a product, has a stream of its own, which starts and ends
// with the caller's.
class Fork {
 public:
  Fork(int device, cudaStream_t stream, int streams) : main_(stream), second_(streams == 2 ? side_stream(device) : nullptr) {
    if (!second_) return;
    FUSEDRNN_CUDA(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
    try {
      begin();
    } catch (...) {
      cudaEventDestroy(event_);
      throw;
    }
  }
  // Work that comes now waits for what is in the caller's stream.
  void begin() {
    if (!second_) return;
    FUSEDRNN_CUDA(cudaEventRecord(event_, main_));
    FUSEDRNN_CUDA(cudaStreamWaitEvent(second_, event_, 0));
  }
  void join() {
    if (!second_) return;
    FUSEDRNN_CUDA(cudaEventRecord(event_, second_));
    FUSEDRNN_CUDA(cudaStreamWaitEvent(main_, event_, 0));
  }
  ~Fork() {
    if (!event_) return;
    cudaEventRecord(event_, second_);  // whatever happened: memory is freed in the caller's stream
    cudaStreamWaitEvent(main_, event_, 0);
    cudaEventDestroy(event_);
  }
  cudaStream_t of(int d) const { return d == 1 ? second_ : main_; }

 private:
  static cudaStream_t side_stream(int device) {
    static std::mutex mutex;
    static std::map<int, cudaStream_t> streams;  // kept for ever
    const std::lock_guard<std::mutex> lock(mutex);
    cudaStream_t& stream = streams[device];
    if (!stream) FUSEDRNN_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
  }
  cudaStream_t main_, second_;
  cudaEvent_t event_ = nullptr;
};

// The order of sequences on the device.
struct DeviceOrder {
  int *active, *length, *from;
  int64_t* offset;
  void want(Arena& arena, const Order& order) {
    const int64_t steps = int64_t(order.active.size()), B = int64_t(order.from.size());
    arena.want(&active, {steps}), arena.want(&offset, {steps}), arena.want(&length, {B}), arena.want(&from, {B});
  }
  // And zeros for n counts, of which there are only where it is uniform.
  void fill(const Order& order, bool uniform, int64_t T_, unsigned* counts, int64_t n, cudaStream_t stream) const {
    const int64_t B = int64_t(order.from.size());
    if (uniform) return uniform_schedule(active, length, offset, from, B == 0 ? 0 : T_, B, counts, n, stream);
    upload(active, order.active, stream), upload(length, order.length, stream), upload(from, order.from, stream);
    upload(offset, order.offset, stream);
  }
  Packing packing(int64_t T_, int64_t B) const { return {T_, B, length, from, offset}; }
};

template <class T>
T* at(void* p, int64_t offset) {
  return p ? static_cast<T*>(p) + offset : nullptr;
}
template <class T>
const T* at(const void* p, int64_t offset) {
  return p ? static_cast<const T*>(p) + offset : nullptr;
}

// Slots whose gates' weights lie side by side, in the same order: each run is one product.
struct Run {
  int slot, gate, count;
};
inline std::vector<Run> runs_of(const CellInfo& cell, Span span) {
  std::vector<Run> runs;
  for (int i = span.first; i < span.first + span.count; ++i)
    if (!runs.empty() && cell.slot_gate[i] == runs.back().gate + runs.back().count)
      ++runs.back().count;
    else
      runs.push_back({i, cell.slot_gate[i], 1});
  return runs;
}

// What forward and backward have in common.
template <class T>
struct Work {
  using S = Accumulate<T>;
  const Spec& spec;
  const CellInfo& cell;
  const Options options;
  const int device;
  const cudaStream_t stream;
  const int64_t T_, B, N, steps, H, width;  // N rows in as many steps as the longest sequence has, width D*H
  const DeviceOrder& order;  // its arrays may be allocated later
  const bool packed;  // a contiguous (T, B, width) array is in packed order

  Work(const Spec& spec, Options options, int device, cudaStream_t stream, int64_t T_, const Order& order,
       const DeviceOrder& device_order)
      : spec(spec), cell(spec.info()), options(options), device(device), stream(stream), T_(T_), B(int64_t(order.from.size())),
        N(order.rows()), steps(int64_t(order.active.size()) - 1), H(spec.H), width(spec.D * spec.H), order(device_order),
        packed(N == T_ * B) {
    if (std::max({T_, B, H}) > INT_MAX) throw std::length_error("T, B and H must be less than 2^31 on a GPU");
  }

  Packing packing() const { return order.packing(T_, B); }

  Schedule schedule(bool backward_in_time) const {
    return {int(steps), int(B), backward_in_time, order.active, order.length, order.offset, order.from, packed};
  }
  bool is_packed(const Sequence& a, int64_t columns) const {
    return packed && a.column == 1 && (B == 1 || a.row == columns) && (T_ == 1 || a.step == B * columns);
  }
  template <class U>
  static Strided<U> strided(const Sequence& a) {
    return {static_cast<U*>(a.data), a.step, a.row, a.column};
  }
  // Packed rows of a: its own where it is so, or else copied to `room`, which is null where that is not needed.
  const T* rows_of(const Sequence& a, int64_t columns, T* room) const {
    if (!a.data || is_packed(a, columns)) return static_cast<const T*>(a.data);
    gather<T>(room, columns, strided<const T>(a), columns, packing(), stream);
    return room;
  }
  void product(DType result, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, bool a_transposed, const void* b,
               int64_t ldb, bool b_transposed, void* c, int64_t ldc, bool adds, cudaStream_t on) const {
    multiply({dtype_of<T>, result, m, n, k, a, lda, a_transposed, b, ldb, b_transposed, c, ldc, adds, options.tf32}, device,
             on);
  }
  // input (rows, H, input.count) = x (rows, I) times W_ih (H, input.count, I), transposed
  void project_input(S* input, const T* x, int64_t rows, const T* w_ih, int64_t I, cudaStream_t on) const {
    const int64_t n = H * cell.input.count;
    product(dtype_of<S>, rows, n, I, x, I, false, w_ih, I, true, input, n, false, on);
  }
  // dw (gates*H, K) of the slots of a span: their gradients (N, slots, H), transposed, times operands (N, K)
  void weight_gradient(T* dw, Span span, const T* gates, const T* operand, int64_t K, bool adds, cudaStream_t on) const {
    for (const Run& r : runs_of(cell, span))
      product(dtype_of<T>, r.count * H, K, N, gates + r.slot * H, cell.slots * H, true, operand, K, false, dw + r.gate * H * K,
              K, adds, on);
  }
  // dx (N, I), or dx + .., from the gradients of the slots that x feeds
  void input_gradient(T* dx, const T* gates, const T* w_ih, int64_t I, bool adds) const {
    for (const Run& r : runs_of(cell, cell.input)) {
      product(dtype_of<T>, N, I, r.count * H, gates + r.slot * H, cell.slots * H, false, w_ih + r.gate * H * I, I, false, dx, I,
              adds, stream);
      adds = true;
    }
  }
  // The same for all layers and directions; the search for it takes some microseconds, tens where B is large.
  const LayerPlan& plan_layer(bool backward) const {
    std::optional<LayerPlan>& plan = plan_[backward];
    if (!plan) plan = layer_plan(cell, dtype_of<T>, backward, H, B, N, options.tf32, spec.D, machine_of(device));
    return *plan;
  }
  // aligned: see input_plan.
  InputPlan plan_input(int64_t I, bool aligned) const {
    return input_plan(plan_layer(false), cell, dtype_of<T>, options.tf32, steps, B, H, I, packed, aligned, spec.D,
                      machine_of(device));
  }
  // What a grid's blocks hand one another in, if there is memory for it.
  struct Workspace {
    Arena arena;
    void* data = nullptr;
    int64_t bytes = 0;  // filled
  };
  bool prepare(Workspace& room, const PersistentPlan& plan, int64_t steps, cudaStream_t on) const {
    const int64_t bytes = plan.workspace_bytes(steps);
    if (bytes <= room.bytes) return true;
    room = {};
    room.arena.want_bytes(&room.data, bytes);
    try {
      room.arena.allocate(device, on);
    } catch (const OutOfMemory&) {
      return false;
    }
    FUSEDRNN_CUDA(cudaMemsetAsync(room.data, workspace_fill, size_t(bytes), on));
    room.bytes = bytes;
    return true;
  }
  // Before something starts beside a layer's forward pass of so many steps, which then can start too.
  void prepare(Workspace& room, int64_t steps, cudaStream_t on) const {
    const LayerPlan plan = plan_layer(false);
    if (plan.path == Path::persistent) prepare(room, plan.persistent, steps, on);
  }
  // A forward pass by this plan whose launch projects its input. False where there is no memory for it, or the driver refuses
  // it: no array of args was touched then.
  bool run_projecting(const LayerPlan& plan, const ForwardArgs<T>& args, cudaStream_t on) const {
    if constexpr (sizeof(T) == 2) {
      Workspace room;
      if (!prepare(room, plan.persistent, steps, on)) return false;
      trace(plan, false);
      if (persistent_forward<T>(spec.cell, plan.persistent, args, room.data, on)) return true;
      set_projecting_refused(device, int(plan.persistent.exchange));
    }
    return false;
  }
  template <class Args>
  void run_layer(const Args& args, bool backward, cudaStream_t on) const {
    Workspace room;
    run_layer(args, backward, on, room);
  }
  template <class Args>
  void run_layer(const Args& args, bool backward, cudaStream_t on, Workspace& room) const {
    for (;;) {
      const LayerPlan& plan = plan_layer(backward);
      trace(plan, backward);
      if (plan.path == Path::per_step) return run_steps<T>(spec.cell, args, options.tf32, device, on);
      if (run_persistent(plan.persistent, args, on, room)) {
        room.bytes = 0;  // what was filled is used
        return;
      }
      set_refused(device, plan.persistent.exchange == Exchange::grid ? 0 : plan.persistent.blocks);
      plan_[backward].reset();
    }
  }
  void trace(const LayerPlan& plan, bool backward) const {
    if (traces())
      fprintf(stderr, "fusedrnn: %s %s on cuda:%d: T=%lld B=%lld H=%lld %s: %s\n", backward ? "backward" : "forward", cell.name,
              device, (long long)T_, (long long)B, (long long)H, name_of(dtype_of<T>), describe(plan).c_str());
  }
  void trace(const InputPlan& plan, int64_t I) const {
    if (traces())
      fprintf(stderr, "fusedrnn: forward %s on cuda:%d: the input, I=%lld, is projected %s\n", cell.name, device, (long long)I,
              describe(plan).c_str());
  }
  template <class Args>
  bool run_persistent(const PersistentPlan& plan, const Args& args, cudaStream_t on, Workspace& room) const {
    if constexpr (std::is_same_v<T, double>) {
      return false;
    } else {
      if (!prepare(room, plan, args.steps(), on))
        return run_steps<T>(spec.cell, args, options.tf32, device, on), true;  // which needs none
      if constexpr (std::is_same_v<Args, ForwardArgs<T>>)
        return persistent_forward<T>(spec.cell, plan, args, room.data, on);
      else
        return persistent_backward<T>(spec.cell, plan, args, room.data, on);
    }
  }
  // Adds the checksums of x and of the weights to sums[0] and sums[1].
  void checksums(unsigned long long* sums, const Sequence& x, const std::vector<Weights>& weights) const {
    FUSEDRNN_CUDA(cudaMemsetAsync(sums, 0, 2 * sizeof *sums, stream));
    add_checksum<T>(sums, strided<const T>(x), spec.I, packing(), stream);
    int64_t index = 0;
    const auto add = [&](const void* data, int64_t n) {
      add_checksum<T>(sums + 1, static_cast<const T*>(data), n, index, stream);
      index += n;
    };
    const int64_t rows = cell.gates * H;
    for (int64_t i = 0; i < spec.count(); ++i) {
      add(weights[i].w_ih, rows * spec.input_size(i / spec.D)), add(weights[i].w_hh, rows * H);
      if (spec.bias) add(weights[i].b_ih, rows), add(weights[i].b_hh, rows);
    }
  }

 private:
  mutable std::optional<LayerPlan> plan_[2];  // forward, backward; by the thread that makes the call
};

}  // namespace fusedrnn::cuda
