// How many clusters, each block of which fills a multiprocessor, can be resident at once on a device, or on the part of it
// that is ours; 0 where a cluster of that size can never be launched. And how many such blocks without clusters.
#include "cuda/check.h"
#include "cuda/machine.h"
#include "cuda/persistent.h"

namespace fusedrnn::cuda {

static __global__ void fills_a_processor() {}

int resident_clusters(int blocks, int processors, int shared_bytes) {
  cudaFuncAttributes built;
  FUSEDRNN_CUDA(cudaFuncGetAttributes(&built, fills_a_processor));
  if (built.ptxVersion < 90) return 0;  // a build for older GPUs alone, whose kernels of clusters are empty
  FUSEDRNN_CUDA(cudaFuncSetAttribute(fills_a_processor, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  FUSEDRNN_CUDA(cudaFuncSetAttribute(fills_a_processor, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(processors / blocks * blocks)), config.blockDim = dim3(persistent_threads);
  config.dynamicSmemBytes = size_t(shared_bytes), config.attrs = &attribute, config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, fills_a_processor, &config) != cudaSuccess) {
    cudaGetLastError();  // this size is none of the device's
    return 0;
  }
  return clusters;
}

int resident_blocks(int processors, int shared_bytes) {
  FUSEDRNN_CUDA(cudaFuncSetAttribute(fills_a_processor, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  int each = 0;  // of a processor
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, fills_a_processor, persistent_threads, size_t(shared_bytes)) !=
      cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return each > 0 ? processors : 0;
}

}  // namespace fusedrnn::cuda
