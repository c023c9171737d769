// Buffers for workspaces, tapes and panels: aligned to a cache line, in huge pages where that pays, and kept for the
// next call after they are freed, because the first touch of a fresh page costs more than computing what it holds.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <vector>

namespace fusedrnn {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);  // uninitialised; throws std::bad_alloc
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr, other.bytes_ = 0; }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }  // as asked for

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Sets the T* that `pointer` is the address of, as an object of its own type.
inline void set_pointer(void** pointer, void* value) { memcpy(pointer, &value, sizeof value); }

// The product of sizes; throws std::length_error where it does not fit.
size_t checked_product(std::initializer_list<int64_t> sizes);

// Several arrays in one buffer: want() each, then allocate() sets all the pointers.
class Arena {
 public:
  template <class T>
  void want(T** pointer, std::initializer_list<int64_t> sizes) {
    place(reinterpret_cast<void**>(const_cast<typename Plain<T>::type**>(pointer)), checked_product(sizes), sizeof(T));
  }
  void allocate();
  size_t bytes() const { return buffer_.bytes(); }

 private:
  template <class T> struct Plain {
    using type = T;
  };
  template <class T> struct Plain<const T> {
    using type = T;
  };
  void place(void** pointer, size_t count, size_t element);
  struct Place {
    void** pointer;
    size_t offset;
  };
  std::vector<Place> places_;
  size_t total_ = 0;
  Buffer buffer_;
};

}  // namespace fusedrnn
