// The core without Python, on the ISA that FUSEDRNN_ISA names: values against reference.h, gradients against its finite
// differences, and the promise that threads, plans, packing and stepping change no bit. Exits with 1 on failure, and
// with 77 where this CPU lacks the ISA. --no-fork leaves out what qemu-user cannot do: threads after a fork.
#include <unistd.h>

#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "reference.h"
#include "within.h"

namespace fusedrnn::tests {
namespace {

// ||got - want|| is within the rounding of sums of `terms` products.
template <class T>
void close(const std::vector<T>& got, const std::vector<double>& want, double terms, bool backward, const std::string& what) {
  const double factor = (backward ? 8 : 4) * fmax(4, ceil(log2(fmax(1, terms))));
  tests::close(std::vector<double>(got.begin(), got.end()), want, factor * double(std::numeric_limits<T>::epsilon()), what);
}

const char* type_name(float) { return " float"; }
const char* type_name(double) { return " double"; }

// Inference, with y's rows apart and with packed weights, and the training pass, against the reference.
template <class T>
void check_forward(const Shape& shape) {
  const Problem<T> p(shape);
  const Problem<double> exact(p);
  const std::string name = shape.name() + type_name(T{});
  const Arrays<double> want = reference_forward(exact, false);
  const Arrays<T> got = forward(p);
  for (size_t i = 0; i < want.size(); ++i)
    close(got[i], want[i], shape.terms(), false, name + ": forward output " + std::to_string(i));
  check(same_bits(got, forward<T>(p, nullptr, nullptr, 5)), name + ": strides of y change no bit");
  const Panels<T> panels(shape.spec(), weights_of(p));
  check(same_bits(got, forward<T>(p, nullptr, &panels)), name + ": packing ahead changes no bit");
  auto tape = make_tape(p);
  const Arrays<T> trained = forward(p, tape.get());
  if (shape.dropout == 0) {
    check(same_bits(got, trained), name + ": training changes no bit");
  } else {
    const Arrays<double> dropped = reference_forward(exact, true);
    for (size_t i = 0; i < dropped.size(); ++i)
      close(trained[i], dropped[i], shape.terms(), false, name + ": forward output with dropout");
  }
}

// double: along a random direction of each input. float: against double, on the same numbers.
void check_backward(const Shape& shape) {
  Problem<float> narrow(shape);
  Problem<double> p(narrow);
  const auto tape = make_tape(p);
  forward(p, tape.get());
  const Arrays<double> grads = backward(p, *tape);
  Random random(99);
  size_t n = 0;
  for (auto& [input, array] : p.inputs()) {
    std::vector<double> direction(array->size());
    double dot = 0;
    for (size_t e = 0; e < direction.size(); ++e) direction[e] = random.normal(), dot += direction[e] * grads[n][e];
    const double slope = reference_slope(p, *array, direction), size = norm(grads[n]) * norm(direction);
    check(fabs(slope - dot) <= 1e-7 * fmax(1, size), shape.name() + ": gradient of " + input + " gives " + std::to_string(dot) +
                                                         " along a direction, finite differences " + std::to_string(slope));
    ++n;
  }
  const auto narrow_tape = make_tape(narrow);
  forward(narrow, narrow_tape.get());
  const Arrays<float> narrow_grads = backward(narrow, *narrow_tape);
  for (n = 0; n < grads.size(); ++n)
    close(narrow_grads[n], grads[n], shape.terms(), true, shape.name() + ": float gradient of " + p.inputs()[n].first);

  Arrays<double> into = grads, sum = grads;
  for (auto& a : into)
    for (double& e : a) e = random.normal();
  const Arrays<double> added = backward(p, *tape, &into);
  for (n = 0; n < sum.size(); ++n) {
    for (size_t e = 0; e < sum[n].size(); ++e) sum[n][e] += into[n][e];
    close(added[n], sum[n], shape.terms(), true, shape.name() + ": adding to the gradient of " + p.inputs()[n].first);
  }
  check(same_bits(grads, backward(p, *tape)), shape.name() + ": a tape used again gives the same bits");
}

// Each element of each gradient.
void check_elements(int cell) {
  const Shape shape{cell, 4, 4, 2, 3, 2, 2, true, false, true, true, 0.4};
  Problem<double> p(shape);
  const auto tape = make_tape(p);
  forward(p, tape.get());
  const Arrays<double> grads = backward(p, *tape);
  size_t n = 0;
  for (auto& [input, array] : p.inputs()) {
    int wrong = 0;
    std::vector<double> direction(array->size(), 0.0);
    for (size_t e = 0; e < direction.size(); ++e) {
      direction[e] = 1;
      wrong += !(fabs(reference_slope(p, *array, direction) - grads[n][e]) <= 1e-7);
      direction[e] = 0;
    }
    check(wrong == 0, shape.name() + ": " + std::to_string(wrong) + " elements of the gradient of " + input);
    ++n;
  }
}

void check_variants(int cell) {
  for (int64_t layers : {1, 2})
    for (int kind = 0; kind < 3; ++kind)  // forward, reverse, both
      for (bool lengths : {false, true})
        for (bool plain : {false, true}) {
          Shape s{cell, 5, 4, 3, lengths ? 9 : 17, layers, kind == 2 ? 2 : 1, !plain, kind == 1, lengths, !plain};
          if (plain) s.I = 18, s.B = 3;
          if (layers == 2 && !plain) s.dropout = 0.3;
          check_forward<float>(s);
          check_forward<double>(s);
          check_backward(s);
        }
  check_forward<float>({cell, 3, 2, 4, 5, 3, 2});  // three layers: two buffers in turns
  check_backward({cell, 3, 2, 4, 5, 3, 2});
  for (Shape s : {Shape{cell, 1, 1, 1, 1}, Shape{cell, 0, 3, 2, 5, 2, 2}, Shape{cell, 4, 0, 2, 5, 2, 2},
                  Shape{cell, 0, 0, 2, 5}, Shape{cell, 1, 2, 7, 16}}) {
    check_forward<float>(s);
    check_forward<double>(s);
    check_backward(s);
  }
  Shape ended{cell, 3, 2, 2, 5, 2, 2, true, false, true};
  Problem<double> p(ended);
  p.lengths = {0, 0};
  const auto tape = make_tape(p);
  check(same_bits(forward(p, tape.get()), reference_forward(p, false)), ended.name() + ": lengths of 0 pass states through");
  const Arrays<double> grads = backward(p, *tape);
  bool zero = true;
  for (size_t n = 0; n < grads.size(); ++n)
    if (p.inputs()[n].first != "h0" && p.inputs()[n].first != "c0")
      for (double e : grads[n]) zero = zero && e == 0;
  check(zero && same_bits<double>({grads[1]}, {p.dstate[0]}), ended.name() + ": lengths of 0 pass gradients through");
}

// The same bits for every number of threads and every plan, forward and backward.
template <class T>
void check_plans(const Shape& shape) {
  Problem<T> p(shape);
  const std::string name = shape.name() + type_name(T{});
  set_local_threads(1);
  set_plan_override({});
  const Arrays<T> inferred = forward(p), trained = train(p);
  for (int threads : {1, 2, 3})
    for (const PlanOverride& plan :
         {PlanOverride{}, PlanOverride{1, 3, 1, 1}, PlanOverride{3, 1, 2, 20}, PlanOverride{2, 1, 3, 1 << 20},
          PlanOverride{1, 2, 1 << 20, 40}, PlanOverride{1, 1, 1, 0, 0, 0, 1}, PlanOverride{1, 2, 1, 0, 0, 0, 2},
          PlanOverride{1, 1, 1, 0, 0, 0, 1, 1}, PlanOverride{2, 1, 3, 20, 0, 0, 2, 1}}) {
      set_local_threads(threads);
      set_plan_override(plan);
      char text[120];
      snprintf(text, sizeof text, ": %d threads, rows %d, units %d, steps %d, chunk rows %d, prefetch %d", threads,
               plan.row_threads, plan.unit_threads, int(plan.chunk_steps), int(plan.chunk_rows), plan.prefetch);
      check(same_bits(inferred, forward(p)), name + text + ": forward changes no bit");
      check(same_bits(trained, train(p)), name + text + ": training changes no bit");
    }
  set_plan_override({});
  set_local_threads(0);
}

// T steps of a stream are the sequence, bit for bit; so are two halves with the state carried over.
template <class T>
void check_stream(const Shape& shape) {
  const Problem<T> p(shape);
  const std::string name = shape.name() + type_name(T{});
  const int64_t step = shape.B * shape.H, states = shape.L * step;
  const Arrays<T> want = forward(p);
  const auto panels = std::make_shared<const Panels<T>>(shape.spec(), weights_of(p));
  for (int threads : {1, 2}) {
    set_local_threads(threads);
    Stream<T> first(shape.spec(), panels, shape.B), second(shape.spec(), panels, shape.B);
    for (int i = 0; i < p.states(); ++i) first.set_state(i, p.state[i].data());
    Guarded<T> h(1, step), carried(1, states);
    Arrays<T> got{{}};
    bool intact = true;
    for (int64_t t = 0; t < shape.T; ++t) {
      Stream<T>& stream = 2 * t < shape.T ? first : second;
      if (2 * t >= shape.T && 2 * (t - 1) < shape.T)
        for (int i = 0; i < p.states(); ++i) {
          first.get_state(i, carried.data());
          second.set_state(i, carried.data());
        }
      stream.step(p.x.data() + t * shape.B * shape.I, h.data());
      const std::vector<T> values = h.values();
      got[0].insert(got[0].end(), values.begin(), values.end());
      intact = intact && h.intact();
    }
    for (int i = 0; i < p.states(); ++i) second.get_state(i, carried.data()), got.push_back(carried.values());
    check(intact && carried.intact(), name + ": a stream stays within its outputs");
    check(same_bits(want, got), name + ": a stream's steps change no bit");
    second.reset();
    second.get_state(0, carried.data());
    check(carried.values() == std::vector<T>(states), name + ": reset gives zeros");
  }
  set_local_threads(0);
}

template <class T>
void check_promises(int cell) {
  check_plans<T>({cell, 7, 13, 11, 45, 2, 2, true, false, true, true, 0.25});
  check_plans<T>({cell, 4, 13, 40, 45});
  check_stream<T>({cell, 4, 1, 5, 9, 2});
  check_stream<T>({cell, 4, 14, 11, 45, 2});
  // A sequence alone and among others.
  const Problem<T> many({cell, 5, 9, 6, 19});
  Problem<T> one({cell, 5, 1, 6, 19});
  const int64_t b = 4, H = 19, I = 6;
  one.weights = many.weights;
  for (int64_t t = 0; t < 5; ++t) std::copy_n(&many.x[(t * 9 + b) * I], I, &one.x[t * I]);
  for (int i = 0; i < many.states(); ++i) std::copy_n(&many.state[i][b * H], H, one.state[i].begin());
  const std::vector<T> all = forward(many)[0], alone = forward(one)[0];
  std::vector<T> part;
  for (int64_t t = 0; t < 5; ++t) part.insert(part.end(), &all[(t * 9 + b) * H], &all[(t * 9 + b) * H] + H);
  check(part == alone, one.shape.name() + type_name(T{}) + ": the rest of the batch changes no bit");
}

// More rows than one block of the reductions over T*B.
void check_long_reductions() {
  const Shape shape{0, 47, 90, 3, 17};
  check_backward(shape);
  check_plans<float>(shape);
}

int run(bool forks) {
  alarm(900);  // a barrier that hangs must not hang the build
  try {
    printf("ISA %s\n", isa().c_str());
  } catch (const std::invalid_argument& error) {
    printf("%s\n", error.what());
    return 77;
  }
  test_machinery(forks);
  test_allocations();
  for (int cell = 0; cell < cell_count; ++cell) {
    check_variants(cell);
    check_elements(cell);
    check_promises<float>(cell);
    check_promises<double>(cell);
  }
  check_long_reductions();
  printf("%d passed, %d failed\n", int(passed), int(failed));
  return failed != 0;
}

}  // namespace
}  // namespace fusedrnn::tests

int main(int argc, char** argv) {
  const bool no_fork = argc == 2 && strcmp(argv[1], "--no-fork") == 0;
  if (argc > 1 && !no_fork) {
    fprintf(stderr, "usage: %s [--no-fork]\n", argv[0]);
    return 2;
  }
  return fusedrnn::tests::run(!no_fork);
}
