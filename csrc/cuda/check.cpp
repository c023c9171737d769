// What a failed CUDA call becomes, and which passes an asynchronous failure may come from.
#include "cuda/check.h"

#include <atomic>
#include <mutex>

namespace fusedrnn::cuda {
namespace {

std::atomic<const char*> last_kernel{nullptr};
std::mutex passes_mutex;
Pass passes[2] = {};  // the last one, and the one before it; without a name: there was none

std::string describe(const Pass& p) {
  return std::string(p.name) + " of " + p.cell + " (" + p.dtype + ", T=" + std::to_string(p.T_) + ", B=" + std::to_string(p.B) +
         ", H=" + std::to_string(p.H) + ", num_layers=" + std::to_string(p.layers) + ") on cuda:" + std::to_string(p.device);
}

}  // namespace

void note_pass(const Pass& pass) {
  const std::lock_guard<std::mutex> lock(passes_mutex);
  passes[1] = passes[0], passes[0] = pass;
}

void note_launch(const char* kernel) { last_kernel.store(kernel, std::memory_order_relaxed); }

std::string origin() {
  const char* kernel = last_kernel.load(std::memory_order_relaxed);
  if (!kernel) return "";
  std::string text = std::string("; a kernel may fail long after its launch: the last one launched was ") + kernel;
  const std::lock_guard<std::mutex> lock(passes_mutex);
  if (passes[0].name) text += ", the last pass begun was " + describe(passes[0]);
  if (passes[1].name) text += ", and before it " + describe(passes[1]);
  return text;
}

void expect_no_capture(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  FUSEDRNN_CUDA(cudaStreamIsCapturing(stream, &status));
  if (status != cudaStreamCaptureStatusNone)
    throw Error(
        "CUDA: the stream is being captured, but layers allocate memory that outlives a graph and launch graphs of their own: "
        "call them outside of the capture");
}

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
  const std::string text = std::string("CUDA: ") + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) + ") from " + call;
  if (code == cudaErrorMemoryAllocation) throw OutOfMemory(text);
  throw Error(text + origin());
}

}  // namespace fusedrnn::cuda
