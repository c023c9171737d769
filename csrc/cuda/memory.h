// Device memory of one call: allocated and freed in the order of a stream, from a pool of our own that keeps what is
// freed, up to a limit, for the next call.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

struct CUevent_st;
struct CUstream_st;

namespace fusedrnn::cuda {

// Several arrays in one allocation: want() each, then allocate() sets all the pointers. Throws OutOfMemory.
class Arena {
 public:
  Arena() = default;
  Arena(Arena&& other) noexcept { *this = static_cast<Arena&&>(other); }
  Arena& operator=(Arena&& other) noexcept;
  ~Arena();  // frees in the stream, which must be alive; what was launched into it before may still use the memory

  template <class T>
  void want(T** pointer, std::initializer_list<int64_t> sizes) {
    place(const_cast<void**>(reinterpret_cast<const void* const*>(pointer)), sizes, sizeof(T));
  }
  void want_bytes(void** pointer, int64_t bytes) { place(pointer, {bytes}, 1); }
  void allocate(int device, CUstream_st* stream);
  size_t bytes() const { return total_; }

 private:
  void place(void** pointer, std::initializer_list<int64_t> sizes, size_t element);
  struct Place {
    void** pointer;
    size_t offset;
  };
  std::vector<Place> places_;
  size_t total_ = 0;
  void* data_ = nullptr;
  int device_ = 0;
  CUstream_st* stream_ = nullptr;
};

// Two numbers of a device on their way to the host, which does not wait until it must. The memory that they come to is
// locked, and kept for later calls.
class Arriving {
 public:
  using Numbers = unsigned long long[2];
  Arriving(const unsigned long long* from, CUstream_st* stream);
  ~Arriving();
  Arriving(const Arriving&) = delete;
  Arriving& operator=(const Arriving&) = delete;
  const Numbers& wait();

 private:
  Numbers* to_;
  CUevent_st* there_ = nullptr;
};

// Makes `device` the current one of this thread while it lives. And lets it allocate, load and ask for events while another
// thread captures a stream, which CUDA otherwise forbids all threads (cudaStreamCaptureModeGlobal, PyTorch's usual one) and
// which would spoil that capture: nothing of ours is a part of it.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0, mode_;  // mode_: a cudaStreamCaptureMode
};

// A forked process must not call CUDA: from set_forked() on nothing is freed.
void set_forked();
bool is_forked();

// What the pool of a device keeps: from FUSEDRNN_CUDA_POOL_BYTES, or a sixteenth of the device's memory, 256 MiB at least.
// A training step must find in it what the last one freed, or waits for the driver.
uint64_t kept_bytes(int device);

}  // namespace fusedrnn::cuda
