// Where workspace comes from: large blocks are kept from call to call.
#include "cpu/memory.h"

#include <stdlib.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fusedrnn {
namespace {

constexpr size_t line = 64;
constexpr size_t huge_page = size_t(2) << 20;
constexpr size_t cached_bytes = size_t(512) << 20;  // at most so much is kept
constexpr size_t cached_blocks = 16;

size_t rounded(size_t bytes) {
  size_t unit = bytes >= huge_page ? huge_page : line;
  if (bytes > SIZE_MAX - unit) throw std::bad_alloc();
  return (std::max(bytes, line) + unit - 1) / unit * unit;
}

struct Block {
  void* data;
  size_t size;
};

// Freed blocks, the last freed first. Never destroyed: buffers may be freed during static destruction.
struct Cache {
  Cache() { blocks.reserve(cached_blocks + 1); }  // giving back, in destructors, allocates nothing
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t bytes = 0;
};
Cache& cache() {
  static Cache* const the_cache = [] {
#if defined(__unix__) || defined(__APPLE__)
    // A fork while another thread holds the mutex would leave it locked in the child for good.
    pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); }, [] { cache().mutex.unlock(); });
#endif
    return new Cache;
  }();
  return *the_cache;
}

void* take(size_t size) {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  for (size_t i = c.blocks.size(); i-- > 0;)
    if (c.blocks[i].size == size) {
      void* data = c.blocks[i].data;
      c.blocks.erase(c.blocks.begin() + i);
      c.bytes -= size;
      return data;
    }
  return nullptr;
}

void give(void* data, size_t size) {
  Block out[cached_blocks + 1];
  size_t count = 0;
  Cache& c = cache();
  {
    std::lock_guard<std::mutex> lock(c.mutex);
    c.blocks.push_back({data, size});
    c.bytes += size;
    while (c.bytes > cached_bytes || c.blocks.size() > cached_blocks) {
      out[count++] = c.blocks.front();
      c.bytes -= c.blocks.front().size;
      c.blocks.erase(c.blocks.begin());
    }
  }
  for (size_t i = 0; i < count; ++i) free(out[i].data);
}

// Gives all that is kept back to the system.
void drop_cache() {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  for (const Block& b : c.blocks) free(b.data);
  c.blocks.clear();
  c.bytes = 0;
}

}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  size_t size = rounded(bytes);
  data_ = take(size);
  if (data_) return;
  const size_t alignment = size >= huge_page ? huge_page : line;
  data_ = aligned_alloc(alignment, size);
  if (!data_) {
    drop_cache();
    data_ = aligned_alloc(alignment, size);
  }
  if (!data_) throw std::bad_alloc();
#if defined(__linux__)
  if (size >= huge_page) madvise(data_, size, MADV_HUGEPAGE);
#endif
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Buffer::~Buffer() {
  if (data_) give(data_, rounded(bytes_));
}

size_t checked_product(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (int64_t n : sizes)
    if (n < 0 || __builtin_mul_overflow(product, n, &product)) throw std::length_error("array size overflows");
  return size_t(product);
}

void Arena::place(void** pointer, size_t count, size_t element) {
  size_t bytes, end;
  if (__builtin_mul_overflow(count, element, &bytes) || __builtin_add_overflow(total_, bytes, &end) || end > SIZE_MAX / 2)
    throw std::length_error("array size overflows");
  places_.push_back({pointer, total_});
  total_ = (end + line - 1) / line * line;
}

void Arena::allocate() {
  buffer_ = Buffer(total_);
  for (const Place& p : places_) set_pointer(p.pointer, static_cast<char*>(buffer_.data()) + p.offset);
  places_.clear();
}

}  // namespace fusedrnn
