// How the programs of this folder time what they launch on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "cuda/check.h"

namespace fusedrnn::cuda {

// Microseconds from before to behind what `run` puts into the legacy stream: the median of `times`, after `unseen` that do
// not count. `ready` is called before each.
template <class Ready, class Run>
double median_us(int unseen, int times, Ready ready, Run run) {
  std::vector<float> found;
  cudaEvent_t begin, end;
  FUSEDRNN_CUDA(cudaEventCreate(&begin));
  FUSEDRNN_CUDA(cudaEventCreate(&end));
  for (int i = 0; i < unseen + times; ++i) {
    ready();
    FUSEDRNN_CUDA(cudaEventRecord(begin, nullptr));
    run();
    FUSEDRNN_CUDA(cudaEventRecord(end, nullptr));
    FUSEDRNN_CUDA(cudaEventSynchronize(end));
    float ms = 0;
    FUSEDRNN_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= unseen) found.push_back(ms);
  }
  FUSEDRNN_CUDA(cudaEventDestroy(begin));
  FUSEDRNN_CUDA(cudaEventDestroy(end));
  std::sort(found.begin(), found.end());
  return found[found.size() / 2] * 1e3;
}

}  // namespace fusedrnn::cuda
