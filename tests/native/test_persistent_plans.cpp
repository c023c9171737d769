// Which plans the persistent path takes: that they have room, cover the layer and are of what kernels can do.
#include <math.h>

#include <string>

#include "check.h"
#include "cuda/persistent.h"
#include "cuda/projection.h"
#include "hopper.h"

namespace fusedrnn::tests {
namespace {

using cuda::Exchange;
using cuda::PersistentPlan;

// Every plan that the model may choose is one that a device has room for, and two at once leave room for each other.
void check_plans() {
  int found = 0, projected = 0;
  for (int cell = 0; cell < cell_count; ++cell)
    for (const int size : {2, 4})
      for (const bool backward : {false, true})
        for (const int H : {1, 24, 128, 200, 512, 768, 1024, 2048})
          for (const int batch : {1, 7, 8, 16, 64, 100, 1000})
            for (const int at_once : {1, 2}) {
              const PersistentPlan p = persistent_plan(cells[cell], size, backward, H, batch, false, hopper, at_once);
              if (p.reason) continue;
              ++found;
              const bool grid = p.exchange == Exchange::grid;
              const std::string what =
                  std::string(cells[cell].name) + " plan of H=" + std::to_string(H) + " B=" + std::to_string(batch);
              check(p.shared_bytes <= hopper.shared_per_block, what + ": shared memory");
              check(p.blocks * p.units >= H && p.units % 8 == 0 && p.slices * p.columns >= batch, what + ": covers all");
              check(p.blocks <= (grid ? hopper.processors / at_once / p.slices : 16), what + ": blocks");
              check(p.units * p.columns <= cuda::persistent_pairs * cuda::persistent_threads, what + ": pairs of a thread");
              const int projecting = projecting_blocks(p, cells[cell], size, 512, batch, H, H, hopper, at_once);
              const int most = grid ? hopper.cooperative : hopper.clusters[int(log2(p.blocks))] * p.blocks;
              projected += projecting > 0;
              check(at_once * (projecting + p.slices * p.blocks) <= most || projecting == 0,
                    what + ": projecting blocks have room");
              check(projecting % (grid ? 1 : p.blocks) == 0, what + ": projecting blocks are whole clusters");
              check(projecting == 0 || (size == 2 && p.cells <= cuda::persistent_warps && H % 8 == 0),
                    what + ": only what the kernel can project");
              for (int q = 0; q < cells[cell].phases; ++q)
                check(p.stage[q].row_warps * p.stage[q].depth_warps <= cuda::persistent_warps &&
                          p.stage[q].row_warps * cuda::groups_of(p.stage[q].results, p.stage[q].wide) * cuda::lane_units >=
                              p.units &&
                          p.stage[q].depth_warps * p.stage[q].warp_chunks >= p.stage[q].chunks,
                      what + ": warps");
            }
  check(found > 500 && projected > 100, "plans are found, and some project");
  const PersistentPlan usual = persistent_plan(cells[0], 2, false, 512, 16, false, hopper);
  const auto projects = [&](int64_t steps, int64_t batch, int64_t I) {
    return projecting_blocks(usual, cells[0], 2, steps, batch, 512, I, hopper, 1);
  };
  check(projects(512, 16, 512) > 0, "the input is projected within the launch");
  check(projects(512, 16, 513) == 0, "not where its rows are not aligned");
  check(projects(1, 16, 512) == 0 && projects(512, 16, 8192) == 0, "not where the recurrence would wait for it");
  check(projects(512, 257, 512) == 0, "not where too few steps are seen at a time");
  const PersistentPlan full = persistent_plan(cells[0], 2, false, 1024, 1, false, hopper);
  check(full.blocks == 128 && projecting_blocks(full, cells[0], 2, 512, 1, 1024, 64, hopper, 1) == 0,
        "not where the first step would wait for long");
  check(persistent_plan(cells[0], 8, false, 64, 1, false, hopper).reason != nullptr, "float64 has no plan");
  cuda::Machine lacks = hopper;
  lacks.cooperative = 0;
  const auto plan = [&] { return persistent_plan(cells[0], 2, false, 512, 16, false, lacks); };
  check(!plan().reason && plan().exchange == Exchange::cluster && plan().blocks == 16, "clusters do without grids");
  check(projecting_blocks(plan(), cells[0], 2, 512, 16, 512, 512, lacks, 1) == 0, "but do not wait for blocks of others");
  lacks.clusters[4] = 0;
  check(!plan().reason && plan().blocks == 8, "a cluster of 8 where 16 are refused");
  for (int& clusters : lacks.clusters) clusters = 0;
  check(plan().reason && std::string(plan().reason).find("neither clusters nor") != std::string::npos,
        "no plan where neither is launched");
  lacks.cooperative = 132;
  check(!plan().reason && plan().exchange == Exchange::grid, "grids do without clusters");
}

}  // namespace
}  // namespace fusedrnn::tests

int main() {
  using namespace fusedrnn::tests;
  check_plans();
  printf("%d passed, %d failed\n", passed.load(), failed.load());
  return failed != 0;
}
