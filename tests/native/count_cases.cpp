// The work that count_instructions.py counts, at sizes that valgrind gets through in seconds: runs the named case on one
// thread, or without a name prints the compiler and then the names.
#include "cpu/dispatch.h"
#include "problem.h"

namespace fusedrnn::tests {
namespace {

// With the weights packed before, as a frozen layer has them.
void infer_case(const Shape& shape) {
  const Problem<float> p(shape);
  const Panels<float> panels(shape.spec(), weights_of(p));
  forward<float>(p, nullptr, &panels);
}

void train_case(const Shape& shape) {
  Problem<float> p(shape);
  train(p);
}

void stream_case(const Shape& shape) {
  const Problem<float> p(shape);
  const auto panels = std::make_shared<const Panels<float>>(shape.spec(), weights_of(p));
  Stream<float> stream(shape.spec(), panels, shape.B);
  std::vector<float> h(shape.B * shape.H);
  fusedrnn_counted([&] {
    for (int64_t t = 0; t < shape.T; ++t) stream.step(&p.x[t * shape.B * shape.I], h.data());
  });
}

struct Case {
  const char* name;
  void (*run)(const Shape&);
  Shape shape;
};

std::vector<Case> all_cases() {
  Shape tails{cell_named("gru_reset_before"), 60, 13, 21, 45, 1, 2};  // I and H fill no vector, B no tile
  tails.lengths = true;
  return {{"lstm_inference", infer_case, {cell_named("lstm"), 60, 16, 40, 128}},
          {"gru_reset_before_training", train_case, tails},
          {"gru_training_one_row", train_case, {cell_named("gru"), 400, 1, 32, 96}},
          {"lstm_stream", stream_case, {cell_named("lstm"), 2000, 1, 32, 64, 2}}};
}

int run(const char* name) {
#if defined(__clang__)
  if (!name) printf("Clang %d.%d.%d\n", __clang_major__, __clang_minor__, __clang_patchlevel__);
#else
  if (!name) printf("GCC %d.%d.%d\n", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#endif
  set_local_threads(1);
  for (const Case& c : all_cases()) {
    if (!name) {
      printf("%s\n", c.name);
    } else if (strcmp(name, c.name) == 0) {
      c.run(c.shape);
      return failed != 0;
    }
  }
  return name ? 2 : 0;
}

}  // namespace
}  // namespace fusedrnn::tests

int main(int argc, char** argv) { return fusedrnn::tests::run(argc > 1 ? argv[1] : nullptr); }
