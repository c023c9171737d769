// Times a layer's recurrence on the card in every way that there is: step by step, and by every persistent plan that fits,
// a line each. What persistent_plan.cpp believes of a step is printed beside it: its constants are fitted to this table.
// cuda_steps lstm bfloat16 forward H=512 B=16 prints that alone; any of these words may be left out. Nothing here is part of
// the library.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "cuda/check.h"
#include "cuda/elementwise.h"
#include "cuda/memory.h"
#include "cuda/persistent.h"
#include "cuda/step.h"
#include "cuda_time.h"

namespace fusedrnn::cuda {
namespace {

constexpr int T = 512;

struct Shape {
  int cell, H, batch;
  bool tf32, backward;
};

// One layer in one direction, all of whose sequences have T steps: arrays of small normal numbers, which keep the cells
// where their functions are curved.
template <class Type>
class Layer {
 public:
  explicit Layer(const Shape& shape) : shape_(shape), cell_(cells[shape.cell]) {
    const int64_t B = shape.batch, H = shape.H, N = T * B;
    Schedule& s = f_.schedule;
    int *active, *length, *from;
    int64_t* offset;
    arena_.want(&active, {T + 1}), arena_.want(&offset, {T + 1}), arena_.want(&length, {B}), arena_.want(&from, {B});
    Type *w_hh, *dy;
    float *input, *bias;
    arena_.want(&w_hh, {cell_.gates * H, H}), arena_.want(&dy, {N, H});
    arena_.want(&input, {N, H, cell_.input.count}), arena_.want(&bias, {cell_.slots, H});
    arena_.want(&f_.y, {N, H}), arena_.want(&f_.saved, {N, H, cell_.saved}), arena_.want(&f_.operand, {N, H});
    arena_.want(&f_.carry, {B, H}), arena_.want(&f_.slots, {B, cell_.slots, H});
    arena_.want(&b_.gates, {N, cell_.slots, H});
    for (int i = 0; i < cell_.states; ++i) arena_.want(&f_.final_state[i], {B, H}), arena_.want(&b_.carry[i], {B, H});
    Type* transposed[max_phases];
    for (int p = 0; p < cell_.phases; ++p) arena_.want(&transposed[p], {H, cell_.recurrent[p].count * H});
    arena_.want_bytes(&workspace_, workspace_bytes);
    arena_.allocate(0, nullptr);
    uniform_schedule(active, length, offset, from, T, B, nullptr, 0, nullptr);
    s = {T, int(B), false, active, length, offset, from, true};
    f_.begin = 0, f_.end = T, f_.H = int(H), f_.y_row = H;
    fill(w_hh, cell_.gates * H * H, 0.5f / sqrtf(float(H))), fill(dy, N * H, 1.0f);
    fill(input, N * cell_.input.count * H, 1.0f), fill(bias, cell_.slots * H, 0.1f);
    f_.w_hh = w_hh, f_.input = input, f_.bias = bias;
    b_.forward = f_, b_.dy = dy, b_.dy_row = H;
    for (int p = 0; p < cell_.phases; ++p) {
      transpose_weights<Type>(transposed[p], w_hh, cell_, cell_.recurrent[p], H, nullptr);
      b_.w_hh_t[p] = transposed[p];
    }
    run_steps<Type>(shape.cell, f_, shape.tf32, 0, nullptr);  // what backward reads
  }

  void rows() {
    line("per step", "", 0, [&] {
      if (shape_.backward)
        run_steps<Type>(shape_.cell, b_, shape_.tf32, 0, nullptr);
      else
        run_steps<Type>(shape_.cell, f_, shape_.tf32, 0, nullptr);
    });
    const Machine machine = machine_of(0);
    const PersistentPlan best =
        persistent_plan(cell_, sizeof(Type), shape_.backward, shape_.H, shape_.batch, shape_.tf32, machine);
    std::string before;
    const auto plan = [&](Exchange exchange, int blocks, int columns) {
      const PersistentPlan p = persistent_plan(cell_, sizeof(Type), shape_.backward, shape_.H, shape_.batch, shape_.tf32,
                                               machine, 1, exchange, blocks, columns);
      if (p.reason || p.workspace_bytes(T) > workspace_bytes) return;
      char what[96];
      snprintf(what, sizeof what, "%s %d x %d blocks, %d units of %d", exchange == Exchange::cluster ? "cluster" : "grid",
               p.slices, p.blocks, p.units, p.columns);
      if (what == before) return;
      before = what;
      const bool chosen = p.exchange == best.exchange && p.blocks == best.blocks && p.columns == best.columns && !best.reason;
      line(what, chosen ? " *" : "", p.estimated_us, [&] {
        FUSEDRNN_CUDA(cudaMemsetAsync(workspace_, workspace_fill, size_t(p.workspace_bytes(T)), nullptr));
        const bool ran = shape_.backward ? persistent_backward<Type>(shape_.cell, p, b_, workspace_, nullptr)
                                         : persistent_forward<Type>(shape_.cell, p, f_, workspace_, nullptr);
        if (!ran) throw Error("the driver refused it");
      });
    };
    for (int blocks = 2; blocks <= machine.max_cluster; blocks *= 2)
      for (int columns : {4, 8, 16}) plan(Exchange::cluster, blocks, std::min(columns, shape_.batch));
    for (int columns = 4; columns < shape_.batch + 8; columns *= 2)
      for (int units = 8; units < shape_.H + 8; units += 8)
        plan(Exchange::grid, int((shape_.H + units - 1) / units), std::min(columns, shape_.batch));
  }

 private:
  static constexpr int64_t workspace_bytes = int64_t(1) << 29;

  template <class To>
  static void fill(To* to, int64_t n, float scale) {
    static std::mt19937 random(1);
    std::normal_distribution<float> normal(0, scale);
    std::vector<To> values(size_t(std::min<int64_t>(n, 1 << 20)));  // again and again, where there are more
    for (To& v : values) {
      if constexpr (sizeof(To) == 4)
        v = normal(random);
      else
        v = __float2bfloat16_rn(normal(random));
    }
    for (int64_t at = 0; at < n; at += int64_t(values.size()))
      FUSEDRNN_CUDA(cudaMemcpy(to + at, values.data(), size_t(std::min<int64_t>(n - at, int64_t(values.size()))) * sizeof(To),
                               cudaMemcpyHostToDevice));
  }

  template <class Run>
  void line(const std::string& what, const char* mark, double estimated, Run run) {
    printf("%s %s %s H=%d B=%d: %s%s, ", cells[shape_.cell].name,
           sizeof(Type) == 2 ? "bfloat16"
           : shape_.tf32     ? "tf32"
                             : "float32",
           shape_.backward ? "backward" : "forward", shape_.H, shape_.batch, what.c_str(), mark);
    try {
      const double us = median_us(1, 3, [] {}, run);
      printf("%.3f us a step (believed: %.3f)\n", us / T, estimated);
    } catch (const Error& error) {
      printf("not run: %s\n", error.what());
      cudaGetLastError();
    }
    fflush(stdout);
  }

  const Shape shape_;
  const CellInfo& cell_;
  Arena arena_;
  ForwardArgs<Type> f_{};
  BackwardArgs<Type> b_{};
  void* workspace_ = nullptr;
};

using Words = std::vector<std::string>;

// Those of `all` that were asked for, or all where none was.
Words chosen(const Words& all, const Words& asked) {
  Words some;
  for (const std::string& word : all)
    if (std::find(asked.begin(), asked.end(), word) != asked.end()) some.push_back(word);
  return some.empty() ? all : some;
}

// A card at rest has a low clock, and takes a while to raise it.
void wake() {
  void* memory;
  FUSEDRNN_CUDA(cudaMalloc(&memory, size_t(1) << 30));
  for (int i = 0; i < 1000; ++i) FUSEDRNN_CUDA(cudaMemsetAsync(memory, i, size_t(1) << 30, nullptr));
  FUSEDRNN_CUDA(cudaDeviceSynchronize());
  FUSEDRNN_CUDA(cudaFree(memory));
}

void run(const Words& asked) {
  wake();
  Words names;
  for (const CellInfo& cell : cells) names.push_back(cell.name);
  for (const std::string& name : chosen(names, asked))
    for (const std::string& type : chosen({"bfloat16", "float32", "tf32"}, asked))
      for (const std::string& pass : chosen({"forward", "backward"}, asked))
        for (const std::string& H : chosen({"H=128", "H=256", "H=512", "H=768", "H=1024"}, asked))
          for (const std::string& B : chosen({"B=1", "B=16", "B=64"}, asked)) {
            const int cell = int(std::find(names.begin(), names.end(), name) - names.begin());
            const Shape shape{cell, atoi(&H[2]), atoi(&B[2]), type == "tf32", pass == "backward"};
            if (type == "bfloat16")
              Layer<__nv_bfloat16>(shape).rows();
            else
              Layer<float>(shape).rows();
          }
}

}  // namespace
}  // namespace fusedrnn::cuda

int main(int argc, char** argv) {
  try {
    fusedrnn::cuda::run({argv + 1, argv + argc});
    return 0;
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
