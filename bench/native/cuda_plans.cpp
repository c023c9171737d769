// Prints the persistent plans of a card by its data sheet, and what their cost model expects. It runs nothing and needs no
// GPU.
#include <stdio.h>

#include "cuda/persistent.h"

using namespace fusedrnn;
using namespace fusedrnn::cuda;

namespace {

void row(const Machine& machine, int cell, int size, bool backward, int H, bool tf32) {
  printf("| %s%s | %d |", size == 2 ? "16 bits" : tf32 ? "float32, TF32" : "float32", backward ? ", backward" : "", H);
  for (const int batch : {1, 16, 64}) {
    const PersistentPlan p = persistent_plan(cells[cell], size, backward, H, batch, tf32, machine);
    if (p.reason)
      printf(" %s |", p.reason);
    else
      printf(" %s, %d x %d blocks, %d units, %d KB; %.2f |", p.exchange == cuda::Exchange::cluster ? "cluster" : "grid",
             p.slices, p.blocks, p.units, p.shared_bytes / 1024, p.estimated_us);
  }
  printf("\n");
}

}  // namespace

int main() {
  Machine machine;
  machine.name = "H200 (by its data sheet)", machine.major = 9, machine.processors = 132;
  machine.shared_per_block = 227 << 10, machine.max_cluster = 16, machine.cooperative = 132;
  for (int i = 0; i < 5; ++i) machine.clusters[i] = 132 >> i;
  for (int cell = 0; cell < 3; ++cell) {
    printf("\n| %s | H | B = 1 | B = 16 | B = 64 |\n|---|---|---|---|---|\n", cells[cell].name);
    for (const int size : {2, 4})
      for (const bool tf32 : {false, true})
        if (size == 4 || !tf32)
          for (const bool backward : {false, true})
            for (const int H : {128, 256, 512, 768, 1024}) row(machine, cell, size, backward, H, tf32);
  }
}
