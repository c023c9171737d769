// The GPU's stack without Python, against reference.h: every cell, type, direction and length through run_forward and
// run_backward. In the emulated build it runs on the CPU, in small sizes, with the order of threads shuffled.
#include <math.h>
#include <stdlib.h>

#include <stdexcept>
#include <string>

#include "cuda/plan.h"
#include "reference.h"
#include "session.h"
#include "within.h"

namespace fusedrnn::tests {
namespace {

double eps_of(cuda::DType t) {
  return t == cuda::DType::float64   ? 0x1p-52
         : t == cuda::DType::float32 ? 0x1p-23
         : t == cuda::DType::float16 ? 0x1p-10
                                     : 0x1p-7;
}

// As tests/bound.py has it: 16 bits are held closer, but relu's gradients, which are all wrong where a value is rounded to the
// other side of 0.
double bound_of(const Shape& s, double eps, bool backward) {
  const double terms = s.terms();
  if (eps < 0x1p-20) return (backward ? 8 : 4) * eps * log_of(terms);
  return backward && cells[s.cell].name == std::string("rnn_relu") ? sqrt(eps) / 4 * log_of(terms)
                                                                   : rounding(eps, terms, backward);
}

std::string title(const Shape& s, cuda::DType t, bool apart) {
  return s.name() + " " + cuda::name_of(t) + (apart ? " strided" : "") + (cuda::path_override() == 0 ? " per step" : "");
}

// Gradients in double from the CPU's core, which test_core holds against finite differences.
Arrays<double> expected_gradients(Problem<double>& p) {
  const auto tape = make_tape(p);
  forward(p, tape.get());
  return backward(p, *tape);
}

template <class T>
void check_shape(const Shape& shape, bool apart, bool tf32 = false) {
  Problem<double> p = rounded<T>(shape);
  const std::string name = title(shape, cuda::dtype_of<T>, apart) + (tf32 ? " tf32" : "");
  const double eps = tf32 ? 0x1p-10 : eps_of(cuda::dtype_of<T>);
  Session<T> session(p, apart, tf32);
  const Arrays<double> want = reference_forward(p, false), got = session.forward(false);
  for (size_t i = 0; i < want.size(); ++i)
    close(got[i], want[i], bound_of(shape, eps, false), name + ": forward output " + std::to_string(i));
  const Arrays<double> trained = session.forward(true), dropped = reference_forward(p, true);
  if (shape.dropout == 0) check(same_bits(got, trained), name + ": training changes no bit");
  for (size_t i = 0; i < want.size(); ++i)
    close(trained[i], dropped[i], bound_of(shape, eps, false), name + ": trained output " + std::to_string(i));
  const Arrays<double> gradients = session.backward(), expected = expected_gradients(p);
  const auto inputs = p.inputs();
  for (size_t n = 0; n < expected.size(); ++n)
    close(gradients[n], expected[n], bound_of(shape, eps, true), name + ": gradient of " + inputs[n].first);
  check(same_bits(gradients, session.backward()), name + ": a tape used again gives the same bits");
  Random random(7);
  Arrays<double> into = expected, sum = expected;
  for (size_t n = 0; n < into.size(); ++n)
    for (size_t e = 0; e < into[n].size(); ++e) {
      into[n][e] = double(cuda::widen(cuda::narrow<T>(cuda::Accumulate<T>(random.normal()))));
      sum[n][e] += into[n][e];
    }
  const Arrays<double> added = session.backward(&into);
  for (size_t n = 0; n < sum.size(); ++n)
    close(added[n], sum[n], bound_of(shape, eps, true), name + ": adding to the gradient of " + inputs[n].first);
  check(session.intact, name + ": stays within its outputs");
}

void check_type(cuda::DType t, const Shape& shape, bool apart = false) {
  cuda::with_type(t, [&](auto v) { check_shape<decltype(v)>(shape, apart); });
}

constexpr cuda::DType types[] = {cuda::DType::float32, cuda::DType::float64, cuda::DType::float16, cuda::DType::bfloat16};

void check_cell(int cell) {
  for (cuda::DType t : types)
    for (int kind = 0; kind < 3; ++kind)  // forward, reverse, both
      for (bool lengths : {false, true}) {
        Shape s{cell, 4, 3, 5, lengths ? 9 : 17, kind == 2 ? 2 : 1, kind == 2 ? 2 : 1, !lengths, kind == 1, lengths, !lengths};
        if (kind == 2 && lengths) s.dropout = 0.3, s.bias = s.state = true;
        check_type(t, s, kind == 1);
      }
  check_type(cuda::DType::float32, {cell, 3, 2, 4, 5, 3, 2});  // three layers: buffers in turns
  check_type(cuda::DType::float32, {cell, 3, 2, 4, 5, 3, 1, true, false, true}, true);
  check_type(cuda::DType::bfloat16, {cell, 2, 70, 3, 40});  // several blocks, and rows of blocks
  check_type(cuda::DType::float32, {cell, 2, 37, 3, 64});
  for (const Shape& s : {Shape{cell, 1, 1, 1, 1}, Shape{cell, 0, 3, 2, 5, 2, 2}, Shape{cell, 4, 0, 2, 5, 2, 2},
                         Shape{cell, 0, 0, 2, 5}, Shape{cell, 1, 2, 7, 16}})
    for (bool apart : {false, true}) check_type(cuda::DType::float32, s, apart);
  // lengths of 0
  Shape ended{cell, 3, 2, 2, 5, 2, 2, true, false, true};
  Problem<double> p = rounded<float>(ended);
  p.lengths = {0, 0};
  Session<float> session(p, false);
  check(same_bits(session.forward(true), reference_forward(p, false)), ended.name() + ": lengths of 0 pass states through");
  const Arrays<double> grads = session.backward();
  bool zero = true;
  for (size_t n = 0; n < grads.size(); ++n)
    if (p.inputs()[n].first != "h0" && p.inputs()[n].first != "c0")
      for (double e : grads[n]) zero = zero && e == 0;
  check(zero && same_bits<double>({grads[1]}, {p.dstate[0]}), ended.name() + ": lengths of 0 pass gradients through");
}

// Long enough for graphs, and more rows than one block of a sum over rows.
void check_long() {
  check_type(cuda::DType::float32, {0, 150, 8, 3, 4});
  check_type(cuda::DType::float32, {2, 35, 2, 3, 4, 1, 2});
  check_type(cuda::DType::float32, {4, 150, 8, 3, 2, 1, 1, true, true, true});
}

// TF32 in the recurrent products: H in one chunk of k, in several with a tail, and more than the warps take at a time;
// rows of 16-byte loads and others; two row tiles of a block, and two blocks.
void check_tf32() {
  for (int cell = 0; cell < cell_count; ++cell)
    for (const Shape& s : {Shape{cell, 3, 3, 2, 5}, Shape{cell, 3, 18, 2, 40, 1, 2, true, false, true},
                           Shape{cell, 2, 67, 2, 7}, Shape{cell, 2, 2, 2, 140}}) {
      check_shape<float>(s, false, true);
      Problem<double> p = rounded<float>(s);
      const Arrays<double> plain = Session<float>(p, false).forward(false);
      check(!same_bits(Session<float>(p, false, true).forward(false), plain), s.name() + " tf32: factors are rounded");
    }
}

// More tiles of sequences than the y axis of a grid has blocks.
void check_huge_batch() {
  cuda::set_path_override(int(cuda::Path::per_step));
  Problem<double> p = rounded<float>({3, 1, 65535 * 32 + 1, 1, 1});
  Session<float> session(p, false);
  const Arrays<double> want = reference_forward(p, false), got = session.forward(false);
  for (size_t i = 0; i < want.size(); ++i)
    close(got[i], want[i], 4 * 0x1p-23 * log_of(4), p.shape.name() + ": forward output " + std::to_string(i));
}

// The input projected in pieces.
void check_chunks() {
  for (int64_t steps : {1, 3}) {
    cuda::set_chunk_override(steps);
    for (int cell = 0; cell < cell_count; ++cell) {
      check_type(cuda::DType::float32, {cell, 7, 3, 4, 5, 2, 2});
      check_type(cuda::DType::bfloat16, {cell, 7, 3, 4, 9, 1, 2, true, false, true});
    }
  }
  cuda::set_chunk_override(0);
  cuda::set_projected_override(int(cuda::Projected::beside));
  for (int cell = 0; cell < cell_count; ++cell)
    for (bool reverse : {false, true}) {
      check_type(cuda::DType::float32, {cell, 9, 3, 4, 5, 2, 1, true, reverse});
      check_type(cuda::DType::bfloat16, {cell, 7, 3, 4, 9, 1, 1, true, reverse});
    }
  cuda::set_projected_override(-1);
}

// When the first layer's input is projected, and by what plan.
cuda::InputPlan input_plan_of(const Shape& s, cuda::DType t, bool uniform = true, bool aligned = true) {
  const cuda::Machine machine = cuda::machine_of(0);
  const cuda::LayerPlan layer = cuda::layer_plan(cells[s.cell], t, false, s.H, s.B, s.T * s.B, false, s.D, machine);
  return cuda::input_plan(layer, cells[s.cell], t, false, s.T, s.B, s.H, s.I, uniform, aligned, s.D, machine);
}

// The input projected within the recurrence's launch: I in a chunk of k and more, with tails; units in one part and two; rows in
// several tiles, of which a step spans two, and in more than a block looks ahead for.
void check_projected_within() {
  for (int cell = 0; cell < cell_count; ++cell)
    for (cuda::DType t : {cuda::DType::bfloat16, cuda::DType::float16})
      for (const Shape& s :
           {Shape{cell, 16, 5, 40, 24, 1, 2}, Shape{cell, 24, 3, 8, 40, 1, 1, true, true}, Shape{cell, 33, 67, 72, 8}}) {
        if ((cell != 0) + (s.B > 60) + (t == cuda::DType::float16) > 1) continue;  // for the sake of time
        check(input_plan_of(s, t).when == cuda::Projected::within, s.name() + ": projected within");
        check(input_plan_of(s, t, false, true).when != cuda::Projected::within &&
                  input_plan_of(s, t, true, false).when != cuda::Projected::within,
              s.name() + ": projected elsewhere where lengths differ, or rows are not aligned");
        check_type(t, s);
      }
}

void check_tape() {
  Problem<double> p = rounded<float>({0, 3, 2, 4, 5});
  Session<float> session(p, false);
  session.forward(true);
  std::string text;
  float before, changed = 2;
  float* at = session.x.memory.data() + 7;
  FUSEDRNN_CUDA(cudaMemcpy(&before, at, sizeof before, cudaMemcpyDeviceToHost));
  FUSEDRNN_CUDA(cudaMemcpy(at, &changed, sizeof changed, cudaMemcpyHostToDevice));
  try {
    session.backward();
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  check(text.find("x was changed") == 0, "a changed x is noticed: " + text);
  FUSEDRNN_CUDA(cudaMemcpy(at, &before, sizeof before, cudaMemcpyHostToDevice));
  session.backward();
  text.clear();
  at = session.arrays.back().second.data() + 3;
  FUSEDRNN_CUDA(cudaMemcpy(at, &changed, sizeof changed, cudaMemcpyHostToDevice));
  try {
    session.backward();
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  check(text.find("the parameters were changed") == 0, "changed parameters are noticed: " + text);
}

void check_capture() {
  Problem<double> p = rounded<float>({0, 3, 2, 4, 5});
  Session<float> session(p, false);
  const Arrays<double> want = session.forward(true);
  std::string text;
  cudaStream_t stream;
  cudaGraph_t graph = nullptr;
  FUSEDRNN_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  FUSEDRNN_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));  // the session allocates meanwhile
  session.stream = stream;
  try {
    session.forward(false);
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  session.stream = nullptr;
  FUSEDRNN_CUDA(cudaStreamEndCapture(stream, &graph));
  FUSEDRNN_CUDA(cudaStreamDestroy(stream));
  if (graph) FUSEDRNN_CUDA(cudaGraphDestroy(graph));
  check(text.find("is being captured") != text.npos, "a capture is refused: " + text);
  check(same_bits(want, session.forward(true)) && session.backward().size() > 0, "a call after a refused capture");
}

// What another library captures, CUDA lets spoil by an allocation or a question in any thread: not by ours.
void check_beside_capture() {
  Problem<double> p = rounded<float>({0, 5, 3, 4, 7});
  Session<float> session(p, false);
  cudaStream_t stream, beside;
  cudaGraph_t graph = nullptr;
  FUSEDRNN_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  FUSEDRNN_CUDA(cudaStreamCreateWithFlags(&beside, cudaStreamNonBlocking));
  FUSEDRNN_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  session.stream = beside;
  Arrays<double> out[2];
  for (int path : {0, 1}) {
    cuda::set_path_override(path);
    out[path] = session.forward(true);
    for (auto& gradient : session.backward()) out[path].push_back(gradient);
  }
  const cudaError_t code = cudaStreamEndCapture(stream, &graph);
  check(code == cudaSuccess, std::string("a capture beside a layer ends: ") + cudaGetErrorString(code));
  session.stream = nullptr;
  for (int path : {0, 1}) {
    cuda::set_path_override(path);
    Arrays<double> want = session.forward(true);
    for (auto& gradient : session.backward()) want.push_back(gradient);
    check(same_bits(want, out[path]), "a layer beside a capture: " + std::to_string(path));
  }
  cuda::set_path_override(-1);
  if (graph) FUSEDRNN_CUDA(cudaGraphDestroy(graph));
  FUSEDRNN_CUDA(cudaStreamDestroy(stream));
  FUSEDRNN_CUDA(cudaStreamDestroy(beside));
}

#if defined(FUSEDRNN_EMULATED)
void check_memory() {
  Problem<double> p = rounded<float>({0, 9, 2, 4, 5});
  Session<float> session(p, false);
  const Arrays<double> want = session.forward(true);
  std::string text;
  size_t free = 0, total = 0;
  FUSEDRNN_CUDA(cudaMemGetInfo(&free, &total));
  emulated::limit_memory(total - free + 2500);  // the outputs fit, the tape does not
  try {
    session.forward(true);
  } catch (const cuda::OutOfMemory& error) {
    text = error.what();
  }
  emulated::limit_memory(0);
  check(text.find("out of memory on device 0") != text.npos, "no memory: " + text);
  check(same_bits(want, session.forward(true)) && session.backward().size() > 0, "a call after one that had no memory");
}

// A driver that refuses a launch when it comes, though it had room when it was asked: another plan takes its place.
void check_refusals() {
  const Shape shape{0, 2, 1, 3, 200};
  const auto plan = [&](bool backward) {
    return cuda::layer_plan(cells[0], cuda::DType::float32, backward, shape.H, shape.B, shape.T * shape.B, false, 1,
                            cuda::machine_of(0));
  };
  const auto runs = [&](cuda::Exchange exchange) {
    return plan(false).path == cuda::Path::persistent && plan(true).path == cuda::Path::persistent &&
           plan(false).persistent.exchange == exchange && plan(true).persistent.exchange == exchange;
  };
  cuda::set_path_override(-1);
  check(runs(cuda::Exchange::cluster), "refusals: in clusters first");
  emulated::refuse(true, false);
  // The input is projected within the launch: that is refused, and then done in a grid's.
  const Shape within{0, 20, 3, 24, 40};
  check_type(cuda::DType::bfloat16, within);
  const cuda::InputPlan input = input_plan_of(within, cuda::DType::bfloat16);
  check(input.layer.persistent.exchange == cuda::Exchange::grid && input.when == cuda::Projected::within,
        "refusals: a grid projects where clusters are refused");
  check_type(cuda::DType::bfloat16, within);
  check_type(cuda::DType::float32, shape);
  check(runs(cuda::Exchange::grid), "refusals: as a grid where clusters are refused");
  // A grid's memory is filled before something starts beside it.
  cuda::set_projected_override(int(cuda::Projected::beside));
  check_type(cuda::DType::float32, {0, 9, 1, 3, 200});
  cuda::set_projected_override(-1);
  emulated::refuse(true, true);
  check_type(cuda::DType::float32, shape);
  for (bool backward : {false, true})
    check(plan(backward).path == cuda::Path::per_step,
          "refusals: step by step where grids are refused, too: " + cuda::describe(plan(backward)));
  check(cuda::resident_clusters(2, 132, 227 << 10) == 0 && cuda::resident_blocks(132, 227 << 10) == 0,
        "refusals: no room where the driver says so when it is asked");
  emulated::refuse(false, false);
}
#else
void check_memory() {}
void check_refusals() {}
#endif

// Step by step, every cell in one type and every type in one cell, where races are looked for: these show in whatever order
// threads run, and a case takes long.
void check_once() {
  cuda::set_path_override(int(cuda::Path::per_step));
  for (int cell = 0; cell < cell_count; ++cell) check_type(cuda::DType::bfloat16, {cell, 2, 3, 3, 24}, cell % 2 == 1);
  for (int cell : {0, 2}) check_type(cuda::DType::float32, {cell, 2, 5, 3, 24, 1, 1, true, true, true});
  check_type(cuda::DType::float16, {0, 2, 3, 3, 24, 2, 2, true, false, true, false, 0.3});
  check_type(cuda::DType::float64, {1, 2, 3, 3, 12});
  check_shape<float>({1, 2, 5, 2, 24}, false, true);
}

void check_all() {
  for (int path : {int(cuda::Path::per_step), -1}) {
    cuda::set_path_override(path);
    for (int cell = 0; cell < cell_count; ++cell) check_cell(cell);
    check_long();
    check_chunks();
    check_tf32();
  }
  if (!getenv("EMULATED_SEED")) check_huge_batch();  // takes long, and is about numbers of blocks, not the order of threads
  cuda::set_path_override(-1);
  check_projected_within();
  check_tape();
  check_capture();
  check_beside_capture();
  check_memory();
  check_refusals();  // last: what was refused once is not tried again
}

}  // namespace
}  // namespace fusedrnn::tests

int main(int argc, char**) {
  using namespace fusedrnn::tests;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    printf("no device\n");
    return 77;
  }
  argc > 1 ? check_once() : check_all();
  printf("%d passed, %d failed\n", int(passed), int(failed));
  return failed != 0;
}
