// cuBLASLt, opened at run time, and the large products through it. Nothing of it is linked.
#include "cuda/blas.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "cuda/check.h"
#include "cuda/memory.h"

namespace fusedrnn::cuda {
namespace {

// What we use of cuBLASLt's C interface, which is the same in versions 12 and 13: the first that works is used.
using Handle = struct LtHandle*;
using Operation = struct LtMatmulDesc*;
using Layout = struct LtMatrixLayout*;
using Preference = struct LtPreference*;
using Status = int;
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Status status;
  float waves;
  int reserved[4];
};
constexpr int compute_32f = 68, compute_32f_fast_tf32 = 77, compute_64f = 70;
constexpr int type_32f = 0, type_64f = 1, type_16f = 2, type_16bf = 14;
constexpr int operation_transpose_a = 3, operation_transpose_b = 4;
constexpr int preference_workspace = 1, preference_reduction = 3, preference_alignment_a = 5;  // b, c and d follow
constexpr uint32_t reduce_in_compute_type = 2;  // where k is split, parts of a sum are not rounded to the result's type
constexpr size_t most_workspace = size_t(32) << 20;

struct Library {
  Status (*create)(Handle*);
  Status (*destroy)(Handle);
  size_t (*version)();
  Status (*operation_create)(Operation*, int compute, int scale);
  Status (*operation_set)(Operation, int what, const void*, size_t);
  Status (*operation_destroy)(Operation);
  Status (*layout_create)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t ld);
  Status (*layout_destroy)(Layout);
  Status (*preference_create)(Preference*);
  Status (*preference_set)(Preference, int what, const void*, size_t);
  Status (*preference_destroy)(Preference);
  Status (*heuristic)(Handle, Operation, Layout, Layout, Layout, Layout, Preference, int wanted, Heuristic*, int* found);
  Status (*matmul)(Handle, Operation, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta,
                   const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace, size_t, cudaStream_t);
};

std::string& preferred_path() {
  static std::string path;
  return path;
}

// The library of this name, if it works here: found, whole, and willing to serve the current device.
Library open(const std::string& name) {
  void* const found = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed: CUDA may be using it
  if (!found) {
    const char* why = dlerror();
    throw std::runtime_error(why ? why : name);
  }
  Library l;
  const auto find = [&](auto& function, const char* symbol) {
    void* p = dlsym(found, symbol);
    if (!p) throw std::runtime_error(name + ": lacks " + symbol + "; version 12 or 13 is needed");
    function = reinterpret_cast<std::decay_t<decltype(function)>>(p);
  };
  find(l.create, "cublasLtCreate");
  find(l.destroy, "cublasLtDestroy");
  find(l.version, "cublasLtGetVersion");
  find(l.operation_create, "cublasLtMatmulDescCreate");
  find(l.operation_set, "cublasLtMatmulDescSetAttribute");
  find(l.operation_destroy, "cublasLtMatmulDescDestroy");
  find(l.layout_create, "cublasLtMatrixLayoutCreate");
  find(l.layout_destroy, "cublasLtMatrixLayoutDestroy");
  find(l.preference_create, "cublasLtMatmulPreferenceCreate");
  find(l.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  find(l.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  find(l.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(l.matmul, "cublasLtMatmul");
  Handle handle;  // a driver that is too old shows here
  if (const Status status = l.create(&handle))
    throw std::runtime_error(name + ": status " + std::to_string(status) + " from cublasLtCreate");
  l.destroy(handle);
  return l;
}

Library load() {
  std::vector<std::string> names{"libcublasLt.so.13", "libcublasLt.so.12"};
  if (!preferred_path().empty()) names.insert(names.begin(), preferred_path());
  std::string reasons;
  for (const std::string& name : names) {
    try {
      return open(name);
    } catch (const std::runtime_error& error) {
      reasons += std::string("\n  ") + error.what();
    }
  }
  throw std::runtime_error(
      "fusedrnn needs cuBLASLt for layers on a GPU and found none that works: pip install 'fusedrnn[cuda13]', "
      "or install the CUDA toolkit's cuBLAS. Tried:" +
      reasons);
}

const Library& library() {
  static const Library l = load();  // tried again at the next call if it throws
  return l;
}

void check_status(Status status, const char* call) {
  if (status == 0) return;
  throw std::runtime_error(std::string("cuBLASLt: status ") + std::to_string(status) + " from " + call + origin());
}

Handle handle_of(int device) {
  static std::mutex mutex;
  static std::map<int, Handle> handles;  // kept for ever: the driver may be gone when statics are destroyed
  const std::lock_guard<std::mutex> lock(mutex);
  Handle& handle = handles[device];
  if (!handle) check_status(library().create(&handle), "cublasLtCreate");
  return handle;
}

int type_number(DType t) {
  return t == DType::float64 ? type_64f : t == DType::float16 ? type_16f : t == DType::bfloat16 ? type_16bf : type_32f;
}

uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return address % 256 == 0 ? 256 : uint32_t(address & (~address + 1));
}

// A shape's operation and the algorithm that cuBLASLt advises, asked for once.
struct Prepared {
  Operation operation = nullptr;
  Layout a = nullptr, b = nullptr, c = nullptr;
  Heuristic best{};
};

// cuBLASLt is column-major: it is told to compute c^T = b^T a^T, whose factors swap places.
Prepared prepare(const Product& p, Handle handle, const uint32_t (&alignment)[3]) {
  const Library& l = library();
  Prepared made;
  const bool wide = p.factors == DType::float64;
  const int compute = wide ? compute_64f : p.factors == DType::float32 && p.tf32 ? compute_32f_fast_tf32 : compute_32f;
  check_status(l.operation_create(&made.operation, compute, wide ? type_64f : type_32f), "cublasLtMatmulDescCreate");
  const int32_t transpose_b = p.b_transposed, transpose_a = p.a_transposed;
  check_status(l.operation_set(made.operation, operation_transpose_a, &transpose_b, sizeof transpose_b),
               "MatmulDescSetAttribute");
  check_status(l.operation_set(made.operation, operation_transpose_b, &transpose_a, sizeof transpose_a),
               "MatmulDescSetAttribute");
  const auto layout = [&](Layout* to, DType type, int64_t rows, int64_t columns, int64_t ld) {
    check_status(l.layout_create(to, type_number(type), uint64_t(columns), uint64_t(rows), ld), "cublasLtMatrixLayoutCreate");
  };
  layout(&made.a, p.factors, p.b_transposed ? p.n : p.k, p.b_transposed ? p.k : p.n, p.ldb);
  layout(&made.b, p.factors, p.a_transposed ? p.k : p.m, p.a_transposed ? p.m : p.k, p.lda);
  layout(&made.c, p.result, p.m, p.n, p.ldc);
  Preference preference;
  check_status(l.preference_create(&preference), "cublasLtMatmulPreferenceCreate");
  check_status(l.preference_set(preference, preference_workspace, &most_workspace, sizeof most_workspace),
               "PreferenceSetAttribute");
  check_status(l.preference_set(preference, preference_reduction, &reduce_in_compute_type, sizeof reduce_in_compute_type),
               "PreferenceSetAttribute");
  const uint32_t order[] = {alignment[1], alignment[0], alignment[2], alignment[2]};
  for (int i = 0; i < 4; ++i)
    check_status(l.preference_set(preference, preference_alignment_a + i, &order[i], sizeof order[i]),
                 "PreferenceSetAttribute");
  int found = 0;
  const Status status = l.heuristic(handle, made.operation, made.a, made.b, made.c, made.c, preference, 1, &made.best, &found);
  l.preference_destroy(preference);
  if (status != 0 || found == 0)
    throw std::runtime_error("cuBLASLt has no algorithm for a product of " + std::string(name_of(p.factors)) + " of " +
                             std::to_string(p.m) + " x " + std::to_string(p.n) + " x " + std::to_string(p.k));
  return made;
}

}  // namespace

void set_blas_path(const std::string& path) { preferred_path() = path; }

std::string blas_version() {
  const size_t v = library().version();  // major * 10000 + minor * 100 + patch
  return std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." + std::to_string(v % 100);
}

void multiply(const Product& p, int device, CUstream_st* stream) {
  if (p.m == 0 || p.n == 0) return;
  const Library& l = library();
  Handle handle = handle_of(device);
  const uint32_t alignment[] = {alignment_of(p.a), alignment_of(p.b), alignment_of(p.c)};
  using Key =
      std::tuple<int, int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, uint32_t, uint32_t, uint32_t>;
  const Key key{device,       int(p.factors), int(p.result), p.m,   p.n,
                p.k,          p.lda,          p.ldb,         p.ldc, p.a_transposed + 2 * p.b_transposed + 4 * p.tf32,
                alignment[0], alignment[1],   alignment[2]};
  static std::mutex mutex;
  static std::map<Key, Prepared> all;
  Prepared prepared;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    auto found = all.find(key);
    if (found == all.end()) {
      if (all.size() >= 4096) {  // lengths that never come back
        for (auto& [_, old] : all)
          l.operation_destroy(old.operation), l.layout_destroy(old.a), l.layout_destroy(old.b), l.layout_destroy(old.c);
        all.clear();
      }
      found = all.emplace(key, prepare(p, handle, alignment)).first;
    }
    prepared = found->second;
    Arena arena;
    void* workspace = nullptr;
    if (prepared.best.workspace > 0) {
      arena.want_bytes(&workspace, int64_t(prepared.best.workspace));
      arena.allocate(device, stream);
    }
    const float one32 = 1, beta32 = p.adds;
    const double one64 = 1, beta64 = p.adds;
    const bool wide = p.factors == DType::float64;
    note_launch("a product of cuBLASLt");
    check_status(l.matmul(handle, prepared.operation, wide ? static_cast<const void*>(&one64) : &one32, p.b, prepared.a, p.a,
                          prepared.b, wide ? static_cast<const void*>(&beta64) : &beta32, p.c, prepared.c, p.c, prepared.c,
                          &prepared.best.algorithm, workspace, prepared.best.workspace, stream),
                 "cublasLtMatmul");
  }
}

}  // namespace fusedrnn::cuda
