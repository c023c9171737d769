// The pool of each GPU and what is placed in it.
#include "cuda/memory.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cpu/memory.h"
#include "cuda/check.h"

namespace fusedrnn::cuda {
namespace {

constexpr size_t alignment = 256;
std::atomic<bool> forked{false};

cudaMemPool_t pool_of(int device) {
  static std::mutex mutex;
  static std::map<int, cudaMemPool_t> pools;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaMemPool_t& pool = pools[device];
  if (pool) return pool;
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t made;
  FUSEDRNN_CUDA(cudaMemPoolCreate(&made, &properties));
  uint64_t keep = kept_bytes(device);
  FUSEDRNN_CUDA(cudaMemPoolSetAttribute(made, cudaMemPoolAttrReleaseThreshold, &keep));
  return pool = made;
}

}  // namespace

void set_forked() { forked.store(true, std::memory_order_relaxed); }
bool is_forked() { return forked.load(std::memory_order_relaxed); }

uint64_t kept_bytes(int device) {
  const char* text = getenv("FUSEDRNN_CUDA_POOL_BYTES");
  if (text && *text) {
    uint64_t bytes = 0;
    const char* const end = text + strlen(text);
    const auto [past, error] = std::from_chars(text, end, bytes);
    if (error != std::errc() || past != end)
      throw std::invalid_argument(std::string("FUSEDRNN_CUDA_POOL_BYTES must be a number of bytes, got '") + text + "'");
    return bytes;
  }
  const OnDevice on(device);
  size_t free = 0, all = 0;
  FUSEDRNN_CUDA(cudaMemGetInfo(&free, &all));
  return std::max<uint64_t>(uint64_t(256) << 20, all / 16);
}

OnDevice::OnDevice(int device) {
  FUSEDRNN_CUDA(cudaGetDevice(&before_));
  FUSEDRNN_CUDA(cudaSetDevice(device));
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  const cudaError_t code = cudaThreadExchangeStreamCaptureMode(&mode);
  if (code != cudaSuccess) {
    cudaSetDevice(before_);
    fail(code, "cudaThreadExchangeStreamCaptureMode");
  }
  mode_ = mode;
}
OnDevice::~OnDevice() {
  auto mode = cudaStreamCaptureMode(mode_);
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaSetDevice(before_);
}

void Arena::place(void** pointer, std::initializer_list<int64_t> sizes, size_t element) {
  size_t bytes, end;
  if (__builtin_mul_overflow(checked_product(sizes), element, &bytes) ||
      __builtin_add_overflow(total_, std::max<size_t>(bytes, 1), &end) || end > SIZE_MAX / 2)  // an empty array has an address
    throw std::length_error("array size overflows");
  places_.push_back({pointer, total_});
  total_ = (end + alignment - 1) / alignment * alignment;
}

void Arena::allocate(int device, CUstream_st* stream) {
  if (places_.empty()) return;
  device_ = device, stream_ = stream;
  void* data;
  const cudaError_t code = cudaMallocFromPoolAsync(&data, total_, pool_of(device), stream);
  if (code == cudaErrorMemoryAllocation) {
    size_t free = 0, all = 0;
    cudaGetLastError();
    cudaMemGetInfo(&free, &all);
    throw OutOfMemory("CUDA: out of memory on device " + std::to_string(device) + ": " + std::to_string(total_) +
                      " bytes were asked for, " + std::to_string(free) + " of " + std::to_string(all) + " are free");
  }
  check(code, "cudaMallocFromPoolAsync");
  data_ = data;
  for (const Place& p : places_) set_pointer(p.pointer, static_cast<char*>(data_) + p.offset);
  places_.clear();
}

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(places_, other.places_);
  std::swap(total_, other.total_);
  std::swap(data_, other.data_);
  std::swap(device_, other.device_);
  std::swap(stream_, other.stream_);
  return *this;
}

Arena::~Arena() {
  if (!data_ || is_forked()) return;
  int before = device_;  // the legacy stream is the current device's
  cudaGetDevice(&before);
  if (before != device_) cudaSetDevice(device_);
  cudaFreeAsync(data_, stream_);  // an error here is one of the context's, which the next call reports
  if (before != device_) cudaSetDevice(before);
}

namespace {
std::mutex locked_mutex;
std::vector<Arriving::Numbers*> locked;  // free
}  // namespace

Arriving::Arriving(const unsigned long long* from, CUstream_st* stream) {
  {
    const std::lock_guard<std::mutex> lock(locked_mutex);
    if (locked.empty()) {
      void* made;
      FUSEDRNN_CUDA(cudaMallocHost(&made, sizeof(Numbers)));
      locked.push_back(static_cast<Numbers*>(made));
    }
    to_ = locked.back();
    locked.pop_back();
  }
  cudaError_t code = cudaEventCreateWithFlags(&there_, cudaEventDisableTiming);
  if (code == cudaSuccess) code = cudaMemcpyAsync(to_, from, sizeof(Numbers), cudaMemcpyDeviceToHost, stream);
  if (code == cudaSuccess) code = cudaEventRecord(there_, stream);
  if (code == cudaSuccess) return;
  if (there_) cudaEventDestroy(there_);
  fail(code, "reading two numbers");  // what may be on its way keeps its memory
}

const Arriving::Numbers& Arriving::wait() {
  FUSEDRNN_CUDA(cudaEventSynchronize(there_));
  return *to_;
}

Arriving::~Arriving() {
  if (is_forked()) return;
  cudaEventSynchronize(there_);
  cudaEventDestroy(there_);
  const std::lock_guard<std::mutex> lock(locked_mutex);
  locked.push_back(to_);
}

}  // namespace fusedrnn::cuda
