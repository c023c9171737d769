#include "cuda/check.h"

#include <atomic>

namespace fusedrnn::cuda {
namespace {
std::atomic<const char*> last_kernel{nullptr};
}

void note_launch(const char* kernel) { last_kernel.store(kernel, std::memory_order_relaxed); }

bool is_refusal(cudaError_t code) {
  switch (code) {
    case cudaErrorInvalidConfiguration:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorCooperativeLaunchTooLarge:
    case cudaErrorNotPermitted:
    case cudaErrorNotSupported:
    case cudaErrorInvalidClusterSize:
      return true;
    default:
      return false;
  }
}

void fail(cudaError_t code, const char* call) {
  cudaGetLastError();  // what is not sticky must not fail the next call too
  std::string text = std::string("CUDA: ") + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) + ") from " + call;
  if (code == cudaErrorMemoryAllocation) throw OutOfMemory(code, text);
  const char* kernel = last_kernel.load(std::memory_order_relaxed);
  if (kernel) text += std::string("; the last kernel launched was ") + kernel + ", which may be where it happened";
  throw Error(code, text);
}

}  // namespace fusedrnn::cuda
