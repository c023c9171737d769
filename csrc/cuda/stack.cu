#include "cuda/stack.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>

#include "cuda/blas.h"
#include "cuda/check.h"
#include "cuda/elementwise.h"
#include "cuda/memory.h"
#include "cuda/plan.h"
#include "cuda/step.h"

namespace fusedrnn::cuda {

class Tape {
 public:
  Tape(const StackForward& call)
      : spec(call.spec), dtype(call.dtype), device(call.device), stream(call.stream), T_(call.T_), B(call.B),
        order(call.T_, call.B, call.lengths), saved(spec.count()), operand(spec.count()), y(spec.L), dropout(call.dropout),
        seed(call.seed) {}
  Spec spec;
  DType dtype;
  int device;
  Stream stream;
  int64_t T_, B;
  Order order;
  int *active, *length, *from;  // on the device, like all below
  int64_t* offset;
  std::vector<void*> saved, operand;  // per layer and direction: (N, saved, H), (N, H)
  std::vector<void*> y;               // per layer (N, D*H)
  void* h0 = nullptr;                 // (L*D, B, H), or null for zeros
  double dropout;
  uint64_t seed;
  unsigned long long* sums = nullptr;  // checksums of x and of the weights
  Arena arena;
  cudaEvent_t ready = nullptr;  // recorded when forward was done
  ~Tape() {
    if (ready && !is_forked()) cudaEventDestroy(ready);
  }
};

int64_t tape_bytes(const Tape& tape) { return int64_t(tape.arena.bytes()); }

namespace {

// With FUSEDRNN_TRACE=1, every layer's plan is printed.
bool traces() {
  static const bool on = [] {
    const char* text = getenv("FUSEDRNN_TRACE");
    return text && *text && *text != '0';
  }();
  return on;
}

// The second direction runs in a stream of its own, which starts and ends with the caller's.
class Fork {
 public:
  Fork(int device, cudaStream_t stream, int directions)
      : main_(stream), second_(directions == 2 ? side_stream(device) : nullptr) {
    if (!second_) return;
    FUSEDRNN_CUDA(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
    begin();
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
  void fill(const Order& order, bool uniform, int64_t T_, cudaStream_t stream) const {
    const int64_t B = int64_t(order.from.size());
    if (uniform) return uniform_schedule(active, length, offset, from, B == 0 ? 0 : T_, B, stream);
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
std::vector<Run> runs_of(const CellInfo& cell, Span span) {
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
  const int64_t T_, B, N, H, width;  // N rows, width D*H
  const DeviceOrder& order;          // its arrays may be allocated later
  const bool packed;                 // a contiguous (T, B, width) array is in packed order

  Work(const Spec& spec, Options options, int device, cudaStream_t stream, int64_t T_, const Order& order,
       const DeviceOrder& device_order, bool uniform)
      : spec(spec), cell(spec.info()), options(options), device(device), stream(stream), T_(T_), B(int64_t(order.from.size())),
        N(order.rows()), H(spec.H), width(spec.D * spec.H), order(device_order), packed(uniform) {}

  Packing packing() const { return order.packing(T_, B); }

  Schedule schedule(int64_t steps, bool backward_in_time) const {
    return {int(steps), int(B), backward_in_time, order.active, order.length, order.offset, order.from};
  }
  bool is_packed(const Sequence& a, int64_t columns) const {
    return packed && a.column == 1 && a.row == columns && a.step == B * columns;
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
  // input (rows, input.count, H) = x (rows, I) W_ih^T
  void project_input(S* input, const T* x, int64_t rows, const T* w_ih, int64_t I, cudaStream_t on) const {
    for (const Run& r : runs_of(cell, cell.input))
      product(dtype_of<S>, rows, r.count * H, I, x, I, false, w_ih + r.gate * H * I, I, true,
              input + (r.slot - cell.input.first) * H, cell.input.count * H, false, on);
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
  template <class Args>
  void run_layer(const Args& args, bool backward, cudaStream_t on) const {
    for (;;) {
      const LayerPlan plan = layer_plan(cell, dtype_of<T>, backward, H, B, N, options.tf32, spec.D, machine_of(device));
      if (traces())
        fprintf(stderr, "fusedrnn: %s %s on cuda:%d: T=%lld B=%lld H=%lld %s: %s\n", backward ? "backward" : "forward",
                cell.name, device, (long long)T_, (long long)B, (long long)H, name_of(dtype_of<T>), describe(plan).c_str());
      if (plan.path == Path::per_step) return run_steps<T>(spec.cell, args, options.tf32, device, on);
      if (run_persistent(plan.persistent, args, on)) return;
      set_refused(device, plan.persistent.exchange == Exchange::grid ? 0 : plan.persistent.blocks);
    }
  }
  template <class Args>
  bool run_persistent(const PersistentPlan& plan, const Args& args, cudaStream_t on) const {
    if constexpr (std::is_same_v<T, double>) {
      return false;
    } else {
      Arena arena;
      void* workspace = nullptr;
      if (plan.workspace_bytes() > 0) {
        arena.want_bytes(&workspace, plan.workspace_bytes());
        arena.allocate(device, on);
      }
      if constexpr (std::is_same_v<Args, ForwardArgs<T>>)
        return persistent_forward<T>(spec.cell, plan, args, workspace, on);
      else
        return persistent_backward<T>(spec.cell, plan, args, workspace, on);
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
};

template <class T>
void forward(const StackForward& call, Tape* tape) {
  using S = Accumulate<T>;
  const Spec& spec = call.spec;
  const CellInfo& cell = spec.info();
  const int64_t B = call.B, H = spec.H, L = spec.L, D = spec.D, width = D * H;
  std::unique_ptr<Order> own_order;
  if (!tape) own_order = std::make_unique<Order>(call.T_, B, call.lengths);
  const Order& order = tape ? tape->order : *own_order;
  const int64_t N = order.rows(), steps = int64_t(order.active.size()) - 1;
  const bool uniform = N == call.T_ * B;
  const bool drops = tape && call.dropout > 0 && L > 1;

  Arena arena;
  DeviceOrder device_order;
  Arena& kept = tape ? tape->arena : arena;
  device_order.want(kept, order);
  Work<T> w(spec, call.options, call.device, call.stream, call.T_, order, device_order, uniform);
  const bool direct = w.is_packed(call.y, width);  // inference writes the last layer's y where it is wanted
  std::vector<T*> y(L), saved(spec.count()), operand(spec.count());
  T *between[2] = {}, *masked = nullptr, *x_room = nullptr, *h0 = nullptr;
  if (tape) {
    for (int64_t i = 0; i < spec.count(); ++i) {
      kept.want(&saved[i], {N, cell.saved, H});
      if (cell.phases > 1) kept.want(&operand[i], {N, H});
    }
    for (T*& l : y) kept.want(&l, {N, width});
    if (call.state[0]) kept.want(&h0, {spec.count(), B, H});
    kept.want(&tape->sums, {2});
  } else {
    for (int n = 0; n < 2; ++n)  // layers in turns, the last one's where it cannot go to its place
      if (L - direct > n) arena.want(&between[n], {N, width});
  }
  struct PerDirection {
    S *input, *bias, *carry, *slots;
    T* operand;
    int64_t chunk;  // steps
  } own[2] = {};
  for (int d = 0; d < D; ++d) {
    // In packed order the rows of a range of steps lie side by side, unless they end at different times and go
    // backward.
    own[d].chunk = spec.backward_in_time(d) && !uniform ? steps : chunk_steps(steps, B * cell.input.count * H * sizeof(S));
    arena.want(&own[d].input, {std::min(N, own[d].chunk * B), cell.input.count, H});
    arena.want(&own[d].bias, {cell.slots, H});
    if (cell.states > 1) arena.want(&own[d].carry, {B, H});
    if (cell.phases > 1) arena.want(&own[d].slots, {B, cell.slots, H});
    if (cell.phases > 1 && !tape) arena.want(&own[d].operand, {B, H});
  }
  if (!w.is_packed(call.x, spec.I)) arena.want(&x_room, {N, spec.I});
  if (drops) arena.want(&masked, {N, width});
  if (tape) kept.allocate(call.device, call.stream);
  arena.allocate(call.device, call.stream);

  device_order.fill(order, uniform, call.T_, call.stream);
  if (tape) {
    tape->active = device_order.active, tape->length = device_order.length, tape->from = device_order.from;
    tape->offset = device_order.offset, tape->h0 = h0;
    std::copy(y.begin(), y.end(), tape->y.begin());
    std::copy(saved.begin(), saved.end(), tape->saved.begin());
    std::copy(operand.begin(), operand.end(), tape->operand.begin());
    if (h0)
      FUSEDRNN_CUDA(
          cudaMemcpyAsync(h0, call.state[0], spec.count() * B * H * sizeof(T), cudaMemcpyDeviceToDevice, call.stream));
    w.checksums(tape->sums, call.x, call.weights);
  }
  if (B == 0) return;
  for (int64_t i = 0; i < spec.count(); ++i)  // those of sequences that never run
    for (int s = 0; s < cell.states; ++s)
      pass_states<T>(at<T>(call.final_state[s], i * B * H), at<T>(call.state[s], i * B * H), H, order.active[0], w.packing(),
                     call.stream);

  if (steps > 0) {
    Fork fork(call.device, call.stream, spec.D);
    const T* x = w.rows_of(call.x, spec.I, x_room);
    for (int64_t l = 0; l < L; ++l) {
      const int64_t I = spec.input_size(l);
      const bool top = l == L - 1;
      if (!tape) y[l] = top && direct ? static_cast<T*>(call.y.data) : between[l % 2];
      fork.begin();
      for (int d = 0; d < D; ++d) {
        const int64_t i = l * D + d;
        const Weights& weights = call.weights[i];
        const cudaStream_t on = fork.of(d);
        ForwardArgs<T> a{};
        a.schedule = w.schedule(steps, spec.backward_in_time(d));
        a.H = int(H);
        a.bias = own[d].bias, a.carry = own[d].carry, a.slots = own[d].slots;
        a.w_hh = static_cast<const T*>(weights.w_hh);
        for (int s = 0; s < cell.states; ++s) {
          a.state[s] = at<T>(call.state[s], i * B * H);
          a.final_state[s] = at<T>(call.final_state[s], i * B * H);
        }
        a.y = y[l] + d * H, a.y_row = width;
        a.saved = tape ? saved[i] : nullptr;
        a.operand = tape ? operand[i] : own[d].operand;
        slot_biases<T>(own[d].bias, static_cast<const T*>(weights.b_ih), static_cast<const T*>(weights.b_hh), cell, H, on);
        for (a.begin = 0; a.begin < steps; a.begin = a.end) {
          a.end = int(std::min(a.begin + own[d].chunk, steps));
          const bool back = a.schedule.backward_in_time;
          const int64_t first = a.end - a.begin == steps ? 0 : order.offset[back ? steps - a.end : a.begin];
          const int64_t rows = a.end - a.begin == steps ? N : order.offset[back ? steps - a.begin : a.end] - first;
          w.project_input(own[d].input, x + first * I, rows, static_cast<const T*>(weights.w_ih), I, on);
          a.input = own[d].input - first * cell.input.count * H;  // it is indexed by the row
          w.run_layer(a, false, on);
        }
      }
      fork.join();
      x = y[l];
      if (!top && drops) {
        dropout<T>(y[l], masked, width, l + 1, call.dropout, call.seed, w.packing(), call.stream);
        x = masked;
      }
    }
  }
  if (tape || !direct)
    scatter<T>(Work<T>::template strided<T>(call.y), y[L - 1], width, width, false, w.packing(), call.stream);
}

template <class T>
void backward(const StackBackward& call) {
  using S = Accumulate<T>;
  const Spec& spec = call.spec;
  const CellInfo& cell = spec.info();
  const Tape& tape = *call.tape;
  const Order& order = tape.order;
  const int64_t B = tape.B, H = spec.H, L = spec.L, D = spec.D, width = D * H, T_ = tape.T_;
  const int64_t N = order.rows(), steps = int64_t(order.active.size()) - 1;
  const bool uniform = N == T_ * B;
  const bool drops = tape.dropout > 0 && L > 1, wants_weights = !call.dweights.empty();
  const DeviceOrder device_order{tape.active, tape.length, tape.from, tape.offset};
  Work<T> w(spec, call.options, call.device, call.stream, T_, order, device_order, uniform);

  {
    Arena room;
    unsigned long long *now, found[2], expected[2];
    room.want(&now, {2});
    room.allocate(call.device, call.stream);
    w.checksums(now, call.x, call.weights);
    FUSEDRNN_CUDA(cudaMemcpyAsync(found, now, sizeof found, cudaMemcpyDeviceToHost, call.stream));
    FUSEDRNN_CUDA(cudaMemcpyAsync(expected, tape.sums, sizeof expected, cudaMemcpyDeviceToHost, call.stream));
    FUSEDRNN_CUDA(cudaStreamSynchronize(call.stream));
    if (found[0] != expected[0])
      throw std::runtime_error("x was changed after the forward pass, so its gradients would be wrong");
    if (found[1] != expected[1])
      throw std::runtime_error("the parameters were changed after the forward pass, so their gradients would be wrong");
  }

  if (wants_weights && !call.adds && N == 0)
    for (int64_t i = 0; i < spec.count(); ++i) {
      const Weights& g = call.dweights[i];
      const auto clear = [&](void* p, int64_t n) {
        if (p) FUSEDRNN_CUDA(cudaMemsetAsync(p, 0, size_t(n) * sizeof(T), call.stream));
      };
      const int64_t rows = cell.gates * H;
      clear(g.w_ih, rows * spec.input_size(i / D)), clear(g.w_hh, rows * H), clear(g.b_ih, rows), clear(g.b_hh, rows);
    }
  if (B == 0) return;

  Arena arena;
  T *dy_room = nullptr, *x_room = nullptr, *dx_room = nullptr, *between[2] = {}, *masked = nullptr, *dstate[max_states] = {};
  struct PerDirection {
    T *gates, *previous, *w_hh_t[max_phases];
    S *carry[max_states], *sums;
  } own[2] = {};
  const bool dy_packed = w.is_packed(call.dy, width), dx_packed = w.is_packed(call.dx, spec.I);
  for (int d = 0; d < D; ++d) {
    arena.want(&own[d].gates, {N, cell.slots, H});
    for (int p = 0; p < cell.phases; ++p) arena.want(&own[d].w_hh_t[p], {H, cell.recurrent[p].count, H});
    for (int s = 0; s < cell.states; ++s) arena.want(&own[d].carry[s], {B, H});
    if (wants_weights) arena.want(&own[d].previous, {N, H});
    if (wants_weights && spec.bias) arena.want(&own[d].sums, {bias_gradients_rows(N), cell.slots, H});
  }
  if (call.dy.data && !dy_packed) arena.want(&dy_room, {N, width});
  if (wants_weights && !w.is_packed(call.x, spec.I)) arena.want(&x_room, {N, spec.I});
  if (call.dx.data && !dx_packed) arena.want(&dx_room, {N, spec.I});
  for (int n = 0; n < 2; ++n)
    if (L > n + 1) arena.want(&between[n], {N, width});
  if (drops && wants_weights) arena.want(&masked, {N, width});
  for (int s = 0; s < cell.states; ++s)
    if (call.dstate[s] && call.adds) arena.want(&dstate[s], {spec.count(), B, H});
  arena.allocate(call.device, call.stream);

  for (int s = 0; s < cell.states; ++s) {
    if (!call.dstate[s]) continue;
    if (!dstate[s]) dstate[s] = static_cast<T*>(call.dstate[s]);
    for (int64_t i = 0; i < spec.count(); ++i)
      pass_states<T>(dstate[s] + i * B * H, at<T>(call.dfinal_state[s], i * B * H), H, order.active[0], w.packing(),
                     call.stream);
  }
  if (steps > 0) {
    Fork fork(call.device, call.stream, spec.D);
    const T* dy = w.rows_of(call.dy, width, dy_room);
    const T* bottom = wants_weights ? w.rows_of(call.x, spec.I, x_room) : nullptr;
    for (int64_t l = L - 1; l >= 0; --l) {
      const int64_t I = spec.input_size(l);
      const T* x = l == 0 ? bottom : static_cast<const T*>(tape.y[l - 1]);
      if (l > 0 && drops && wants_weights) {
        dropout<T>(x, masked, width, l, tape.dropout, tape.seed, w.packing(), call.stream);
        x = masked;
      }
      fork.begin();
      for (int d = 0; d < D; ++d) {
        const int64_t i = l * D + d;
        const cudaStream_t on = fork.of(d);
        const Weights& weights = call.weights[i];
        BackwardArgs<T> a{};
        ForwardArgs<T>& f = a.forward;
        f.schedule = w.schedule(steps, spec.backward_in_time(d));
        f.begin = 0, f.end = int(steps);
        f.H = int(H);
        f.w_hh = static_cast<const T*>(weights.w_hh);
        f.state[0] = at<T>(tape.h0, i * B * H);
        f.y = static_cast<T*>(tape.y[l]) + d * H, f.y_row = width;
        f.saved = static_cast<T*>(tape.saved[i]), f.operand = static_cast<T*>(tape.operand[i]);
        a.dy = dy ? dy + d * H : nullptr, a.dy_row = width;
        for (int s = 0; s < cell.states; ++s) {
          a.dfinal_state[s] = at<T>(call.dfinal_state[s], i * B * H);
          a.dstate[s] = dstate[s] ? dstate[s] + i * B * H : nullptr;
          a.carry[s] = own[d].carry[s];
        }
        for (int p = 0; p < cell.phases; ++p) {
          transpose_weights<T>(own[d].w_hh_t[p], f.w_hh, cell, cell.recurrent[p], H, on);
          a.w_hh_t[p] = own[d].w_hh_t[p];
        }
        a.gates = own[d].gates;
        w.run_layer(a, true, on);
        if (!wants_weights) continue;
        const Weights& g = call.dweights[i];
        previous_states<T>(own[d].previous, f, T_, on);
        for (int p = 0; p < cell.phases; ++p)
          w.weight_gradient(static_cast<T*>(g.w_hh), cell.recurrent[p], a.gates, p == 0 ? own[d].previous : f.operand, H,
                            call.adds, on);
        w.weight_gradient(static_cast<T*>(g.w_ih), cell.input, a.gates, x, I, call.adds, on);
        if (spec.bias)
          bias_gradients<T>(static_cast<T*>(g.b_ih), static_cast<T*>(g.b_hh), a.gates, own[d].sums, N, cell, H, call.adds, on);
      }
      fork.join();
      if (l == 0 && !call.dx.data) break;
      T* dx = l > 0 ? between[(l - 1) % 2] : dx_packed ? static_cast<T*>(call.dx.data) : dx_room;
      for (int d = 0; d < D; ++d)
        w.input_gradient(dx, own[d].gates, static_cast<const T*>(call.weights[l * D + d].w_ih), I,
                         d > 0 || (l == 0 && dx_packed && call.adds));
      if (l > 0 && drops) dropout<T>(dx, dx, width, l, tape.dropout, tape.seed, w.packing(), call.stream);
      dy = dx;
    }
  }
  if (call.dx.data && (!dx_packed || steps == 0))
    scatter<T>(Work<T>::template strided<T>(call.dx), dx_room, spec.I, spec.I, call.adds, w.packing(), call.stream);
  for (int s = 0; s < cell.states; ++s)
    if (call.dstate[s] && call.adds) add_to<T>(static_cast<T*>(call.dstate[s]), dstate[s], spec.count() * B * H, call.stream);
}

void require_no_capture(Stream stream) {
  cudaStreamCaptureStatus status;
  FUSEDRNN_CUDA(cudaStreamIsCapturing(stream, &status));
  if (status != cudaStreamCaptureStatusNone)
    throw Error(cudaErrorStreamCaptureUnsupported,
                "CUDA: the stream is being captured, but layers allocate memory that outlives a graph and launch "
                "graphs of their own: call them outside of the capture");
}

// The tape is freed in its own stream, and not before what reads it in another is done.
struct TapeUse {
  const Tape& tape;
  const Stream stream;
  TapeUse(const Tape& tape, Stream stream) : tape(tape), stream(stream) {
    if (stream != tape.stream) FUSEDRNN_CUDA(cudaStreamWaitEvent(stream, tape.ready, 0));
  }
  ~TapeUse() {
    cudaEvent_t done;
    if (stream == tape.stream || cudaEventCreateWithFlags(&done, cudaEventDisableTiming) != cudaSuccess) return;
    cudaEventRecord(done, stream);
    cudaStreamWaitEvent(tape.stream, done, 0);
    cudaEventDestroy(done);
  }
};

}  // namespace

std::shared_ptr<Tape> run_forward(const StackForward& call, bool training) {
  const OnDevice here(call.device);
  require_no_capture(call.stream);
  std::shared_ptr<Tape> tape;
  if (training) tape = std::make_shared<Tape>(call);
  with_type(call.dtype, [&](auto t) { forward<decltype(t)>(call, tape.get()); });
  if (tape) {
    FUSEDRNN_CUDA(cudaEventCreateWithFlags(&tape->ready, cudaEventDisableTiming));
    FUSEDRNN_CUDA(cudaEventRecord(tape->ready, call.stream));
  }
  return tape;
}

void run_backward(const StackBackward& call) {
  const OnDevice here(call.device);
  require_no_capture(call.stream);
  const TapeUse use(*call.tape, call.stream);
  with_type(call.dtype, [&](auto t) { backward<decltype(t)>(call); });
}

}  // namespace fusedrnn::cuda
