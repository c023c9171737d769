// How a failed CUDA call becomes an exception, and how kernels are launched so that none goes unchecked.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <new>
#include <stdexcept>
#include <string>

namespace fusedrnn::cuda {

// A call that CUDA refused. An asynchronous failure of a kernel surfaces at some later call: so the text also names the kernel
// that was launched last, and the last two passes that were begun.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class OutOfMemory : public Error {
 public:
  using Error::Error;
};

// What failed had begun to add to gradients: to do it again would add twice.
class AddedInPart : public std::runtime_error {
 public:
  explicit AddedInPart(const std::exception& why)
      : std::runtime_error(why.what()),
        out_of_memory(dynamic_cast<const OutOfMemory*>(&why) || dynamic_cast<const std::bad_alloc*>(&why)) {}
  const bool out_of_memory;
};

[[noreturn]] void fail(cudaError_t code, const char* call);

// For the texts of later errors.
struct Pass {
  const char *name, *cell, *dtype;
  int device;
  int64_t T_, B, H, layers;
};
void note_pass(const Pass& pass);
void note_launch(const char* kernel);
std::string origin();  // what of these to add to a text, "; .."; empty before the first launch

// Nothing of ours may become a part of a capture.
void expect_no_capture(cudaStream_t stream);

// Whether it says that the driver turns down a launch as such. Then nothing was done, and another way may be tried.
bool is_refusal(cudaError_t code);

inline void check(cudaError_t code, const char* call) {
  if (code != cudaSuccess) fail(code, call);
}
#define FUSEDRNN_CUDA(call) ::fusedrnn::cuda::check(call, #call)

struct Launch {
  dim3 grid, block;
  size_t shared = 0;  // bytes
  cudaStream_t stream = nullptr;
  int cluster = 0;           // blocks, along x; 0: there are no clusters
  bool cooperative = false;  // all blocks are resident
};

template <class... Params, class... Args>
[[nodiscard]] cudaError_t try_launch(const char* name, const Launch& how, void (*kernel)(Params...), const Args&... args) {
  if (how.shared > 48 << 10) {  // all that there is: another thread may launch the same kernel with less
    int device = 0, most = 0;
    check(cudaGetDevice(&device), name);
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
  }
  if (how.cluster > 8) {
    const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (code != cudaSuccess) return code;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid, config.blockDim = how.block, config.dynamicSmemBytes = how.shared;
  config.stream = how.stream, config.attrs = attributes;
  if (how.cluster > 0) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim = {unsigned(how.cluster), 1, 1};
    ++config.numAttrs;
  }
  if (how.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs].val.cooperative = 1;
    ++config.numAttrs;
  }
  note_launch(name);
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

template <class... Params, class... Args>
void launch(const char* name, const Launch& how, void (*kernel)(Params...), const Args&... args) {
  check(try_launch(name, how, kernel, args...), name);
}

}  // namespace fusedrnn::cuda
