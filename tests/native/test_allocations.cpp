// What the core allocates: in a pass no more often for more steps, in a stream's step never; and how many bytes are held.
#include "allocations.h"
#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "problem.h"

namespace fusedrnn::tests {
namespace {

// Buffers that were freed are kept, until one of another size is refused memory.
void forget_buffers() {
  static size_t size = 1 << 20;
  refuses = true;
  Buffer another(size += 64);
}

template <class Work>
Allocations count(Work work) {
  forget_buffers();
  const Allocations before = in_calls();
  work();
  return {in_calls().count - before.count, in_calls().aligned_bytes - before.aligned_bytes};
}

void check_passes(int cell, int64_t L, int D) {
  const auto shape = [&](int64_t T) { return Shape{cell, T, 2, 5, 16, L, D}; };
  const auto inference = [&](int64_t T) {
    const Problem<float> p(shape(T));
    const Panels<float> panels(p.shape.spec(), weights_of(p));
    return count([&] { forward<float>(p, nullptr, &panels); });
  };
  const auto training = [&](int64_t T) {
    Problem<float> p(shape(T));
    return count([&] { train(p); });
  };
  const std::string name = shape(0).name();
  const int64_t few = 200, many = 400;  // fewer rows than a block of a reduction
  const Allocations a = inference(few), b = inference(many);
  check(a.count == b.count, name + ": inference allocates as often for more steps");
  const int64_t between = L > 1 ? (many - few) * 2 * D * 16 * int64_t(sizeof(float)) : 0;
  check(b.aligned_bytes - a.aligned_bytes == between,
        name + ": its workspace grows by what lies between layers, and by nothing else");
  check(training(few).count == training(many).count, name + ": training allocates as often for more steps");
  for (bool state : {false, true}) {
    Shape s = shape(few);
    s.state = state;
    const int64_t layers = s.spec().count(), unit = layers * s.B * s.H * int64_t(sizeof(float));
    const int64_t bound = (cells[cell].gates + 3) * s.T * unit + state * unit + 64 * (3 * layers + L);
    check(int64_t(make_tape(Problem<float>(s))->bytes()) <= bound, name + ": the tape keeps G + 3 values of a unit and step");
  }
}

void check_stream(int cell, int threads) {
  const Shape shape{cell, 1, 1, 128, 128, 2};
  const Problem<float> p(shape);
  const auto panels = std::make_shared<const Panels<float>>(shape.spec(), weights_of(p));
  set_local_threads(threads);
  Stream<float> stream(shape.spec(), panels, shape.B);
  std::vector<float> h(shape.H);
  const auto steps = [&](int n) {
    for (int i = 0; i < n; ++i) stream.step(p.x.data(), h.data());
  };
  steps(100);  // in which threads start
  const int64_t before = allocations().count;
  steps(300);
  const bool none = allocations().count == before;
  check(none, shape.name() + ": steps of a stream on " + std::to_string(threads) + " threads allocate nothing");
  set_local_threads(0);
}

}  // namespace

void test_allocations() {
  set_local_threads(1);
  PlanOverride chunks;
  chunks.chunk_steps = 16;  // fewer than there are on any machine
  set_plan_override(chunks);
  for (int cell = 0; cell < cell_count; ++cell)
    for (int D : {1, 2})
      for (int64_t L : {1, 3}) check_passes(cell, L, D);
  set_plan_override({});
  for (int cell = 0; cell < cell_count; ++cell)
    for (int threads : {1, 2}) check_stream(cell, threads);
}

}  // namespace fusedrnn::tests
