// What the cost model plans for machines with more cores than the one it runs on: a table in Markdown, for docs/many-cores.md.
//
//     cmake --preset release -B build -DFUSEDRNN_BENCH=ON && cmake --build build --target plans && build/plans
//
// Arguments: numbers of cores (default: 2 8 16 32 64). float32, 16 lanes, 1 MiB of L2 a core, 32 MiB of L3.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/plan.h"

using namespace fusedrnn;

namespace {

const Machine machine{1 << 20, 32 << 20};

LayerSize layer(const CellInfo& cell, int64_t B, int64_t T, int64_t I, int64_t H) { return {T, B, I, H, &cell, 16, 4, true}; }

// "rows x units, how many times faster than one core"
void print_plan(const LayerSize& size, int cores, bool forward) {
  const auto plan_for = [&](int n) { return forward ? forward_plan(size, machine, n) : backward_plan(size, machine, n); };
  const Plan plan = plan_for(cores);
  std::printf(" %d x %d, %.1f |", plan.row_threads, plan.unit_threads, plan_for(1).estimated_us / plan.estimated_us);
}

void print_stack(const std::vector<LayerSize>& layers, int cores) {
  double one = 0, all = 0;
  for (const LayerSize& size : layers) {
    one += forward_plan(size, machine, 1).estimated_us;
    all += forward_plan(size, machine, cores).estimated_us;
  }
  const Wave wave = forward_wave(layers, machine, cores);
  const Plan plan = forward_plan(layers[0], machine, cores / wave.teams);
  std::printf(" %d of %d x %d, %.1f |", wave.teams, plan.row_threads, plan.unit_threads,
              one / (wave.teams > 1 ? wave.estimated_us : all));
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> cores;
  for (int i = 1; i < argc; ++i) cores.push_back(std::atoi(argv[i]));
  if (cores.empty()) cores = {2, 8, 16, 32, 64};
  const CellInfo& lstm = cells[0];
  const int64_t shapes[][4] = {{1, 100, 64, 64},      {1, 100, 256, 256},  {1, 100, 512, 512},  {1, 50, 1024, 1024},
                               {16, 100, 128, 128},   {32, 100, 256, 256}, {64, 100, 256, 256}, {64, 50, 512, 512},
                               {128, 30, 1024, 1024}, {256, 50, 32, 64}};
  std::printf("| %s: rows x units, times one core | B,T,I,H |", lstm.name);
  for (int n : cores) std::printf(" %d cores |", n);
  std::printf("\n|---|---|");
  for (size_t i = 0; i < cores.size(); ++i) std::printf("---|");
  for (const bool forward : {true, false})
    for (const auto& [B, T, I, H] : shapes) {
      std::printf("\n| %s | %d,%d,%d,%d |", forward ? "forward" : "backward", int(B), int(T), int(I), int(H));
      for (int n : cores) print_plan(layer(lstm, B, T, I, H), n, forward);
    }
  for (const int64_t H : {64, 256, 1024}) {
    std::printf("\n| forward, 8 layers: teams of rows x units | 1,100,%d,%d |", int(H), int(H));
    for (int n : cores) print_stack(std::vector<LayerSize>(8, layer(lstm, 1, 100, H, H)), n);
  }
  std::printf("\n");
}
