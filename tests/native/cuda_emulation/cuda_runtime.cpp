#include <cuda_runtime.h>

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

// A stream that is captured has the graph that its work goes to; an event brings it to the streams that wait for it.
struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> work;
};
struct CUstream_st {
  CUgraph_st* graph = nullptr;
  bool origin = false, global = false, spoilt = false;
};
struct CUevent_st {
  CUgraph_st* graph = nullptr;
  std::chrono::steady_clock::time_point time;
};
struct CUmemPoolHandle_st {};

namespace {

std::mutex mutex;
std::unordered_map<void*, size_t> allocations;  // of device memory
std::set<CUstream_st*> captured;
std::atomic<bool> captured_globally{false};
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

size_t number(const char* variable, size_t otherwise) {
  const char* text = getenv(variable);
  return text ? strtoull(text, nullptr, 10) : otherwise;
}
// What machine this is.
const int gpus = int(number("FUSEDRNN_EMULATED_GPUS", 1)),  // below 0: CUDA does not start
    driver = int(number("FUSEDRNN_EMULATED_DRIVER", 13000)), capability = int(number("FUSEDRNN_EMULATED_CAPABILITY", 90));

size_t limit = 0;
size_t total_memory() {
  if (limit > 0) return limit;
  static const size_t bytes = number("FUSEDRNN_EMULATED_MEMORY", size_t(8) << 30);
  return bytes;
}
size_t used = 0;

// After so many launches one is at fault: it is launched, and from then on launches, copies, allocations and waits fail. Below
// 0: none is.
std::atomic<int> launches_until_fault{-1};
std::atomic<bool> at_fault{false};
cudaError_t status() { return at_fault ? result(cudaErrorIllegalAddress) : cudaSuccess; }
// Of a call that a capture forbids, and that spoils it.
cudaError_t forbidden() {
  for (CUstream_st* s : captured) s->spoilt = true;
  return result(cudaErrorStreamCaptureUnsupported);
}
// Of calls that no thread may make while another captures in the global mode, unless it has said that it knows.
cudaError_t status_beside_captures() {
  return captured_globally && capture_mode == cudaStreamCaptureModeGlobal ? forbidden() : status();
}

cudaError_t on_stream(cudaStream_t stream, std::function<void()> work) {
  if (const cudaError_t failed = status()) return failed;
  if (stream && stream->graph)
    stream->graph->work.push_back(std::move(work));
  else
    work();
  return cudaSuccess;
}

}  // namespace

namespace emulated {

void limit_memory(size_t bytes) { limit = bytes; }
void fault_after(int launches) { launches_until_fault = launches, at_fault = false, last = cudaSuccess; }

static bool no_clusters = false, no_cooperative = false;
void refuse(bool clusters, bool cooperative) { no_clusters = clusters, no_cooperative = cooperative; }
bool refuses_clusters() { return no_clusters; }
bool refuses_cooperative() { return no_cooperative; }

cudaError_t run_on_stream(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
  Configuration c;
  c.grid = config.gridDim, c.block = config.blockDim, c.shared = config.dynamicSmemBytes;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& a = config.attrs[i];
    if (a.id == cudaLaunchAttributeCooperative && a.val.cooperative) c.resident = true;
    if (a.id == cudaLaunchAttributeClusterDimension)
      c.clusters = true, c.cluster = Index(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
  }
  const size_t threads = size_t(c.block.x) * c.block.y * c.block.z;
  const size_t blocks = size_t(c.grid.x) * c.grid.y * c.grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || c.shared > (227 << 10) || c.grid.y > 65535 || c.grid.z > 65535 ||
      c.cluster.x > 16 || c.cluster.x == 0 || c.grid.x % c.cluster.x != 0 || c.cluster.y != 1 || c.cluster.z != 1)
    return result(cudaErrorInvalidValue);
  if (c.clusters && no_clusters) return result(cudaErrorInvalidClusterSize);
  if (c.resident && no_cooperative) return result(cudaErrorCooperativeLaunchTooLarge);
  const cudaError_t launched = on_stream(config.stream, [c, kernel] { launch("a kernel", c, kernel); });
  if (launches_until_fault >= 0 && launches_until_fault-- == 0) at_fault = true;
  return launched;
}

}  // namespace emulated

const char* cudaGetErrorName(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    default:
      return "cudaErrorUnknown";
  }
}
const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    default:
      return "unknown error";
  }
}
cudaError_t cudaGetLastError() {
  const cudaError_t e = last;
  last = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError() { return last; }

cudaError_t cudaGetDeviceCount(int* n) {
  *n = 0;
  if (driver < 13000) return result(cudaErrorInsufficientDriver);
  if (gpus < 0) return result(cudaErrorInitializationError);
  if (gpus == 0) return result(cudaErrorNoDevice);
  return *n = gpus, cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) { return *d = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int d) { return result(d == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  switch (what) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 << 10;
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = 65536;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      break;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrClusterLaunch:
      *value = 1;
      break;
    default:
      return result(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device != 0) return result(cudaErrorInvalidDevice);
  *p = {};
  strcpy(p->name, "emulated on the CPU");
  p->major = 9, p->multiProcessorCount = 132, p->l2CacheSize = 50 << 20, p->totalGlobalMem = total_memory();
  p->sharedMemPerBlockOptin = 227 << 10, p->sharedMemPerMultiprocessor = 228 << 10, p->regsPerMultiprocessor = 65536;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return captured.empty() ? status() : forbidden(); }
cudaError_t cudaDriverGetVersion(int* v) { return *v = driver, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard<std::mutex> lock(mutex);
  return *total = total_memory(), *free = *total - std::min(used, *total), cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return *s = new CUstream_st, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return delete s, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return s && s->graph ? result(cudaErrorInvalidValue) : status(); }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  if (e->graph) {
    if (!s || (s->graph && s->graph != e->graph)) return result(cudaErrorInvalidValue);
    s->graph = e->graph;
    captured.insert(s);
  }
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return *e = new CUevent_st, cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  e->graph = s ? s->graph : nullptr;
  e->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) { return status_beside_captures(); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return status(); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  return *ms = std::chrono::duration<float, std::milli>(b->time - a->time).count(), cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete e, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  return *status = s && s->graph ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, capture_mode), cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
  if (!s || s->graph) return result(cudaErrorInvalidValue);  // the legacy stream cannot be captured
  s->graph = new CUgraph_st;
  s->origin = true;
  s->global = mode == cudaStreamCaptureModeGlobal;
  if (s->global) captured_globally = true;
  captured.insert(s);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  if (!s || !s->origin) return result(cudaErrorInvalidValue);
  *graph = s->graph;
  s->origin = false;
  if (s->global) captured_globally = false;
  const bool spoilt = s->spoilt;
  s->spoilt = false;
  for (auto other = captured.begin(); other != captured.end();)
    if ((*other)->graph == *graph)
      (*other)->graph = nullptr, other = captured.erase(other);
    else
      ++other;
  if (!spoilt) return cudaSuccess;
  delete *graph;
  *graph = nullptr;
  return result(cudaErrorStreamCaptureInvalidated);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  return *exec = new CUgraphExec_st{graph->work}, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
  for (const auto& work : exec->work) on_stream(s, work);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) { return delete g, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) { return delete g, cudaSuccess; }

cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (const cudaError_t failed = status()) return failed;
  if (n == 0) return *p = nullptr, cudaSuccess;
  if (used + n > total_memory() || !(*p = aligned_alloc(256, (n + 255) / 256 * 256))) return result(cudaErrorMemoryAllocation);
  memset(*p, 0xff, n);
#if defined(__SANITIZE_ADDRESS__)
  free(*p);
  posix_memalign(p, 256, n);  // ends where it ends
  memset(*p, 0xff, n);
#endif
  allocations[*p] = n, used += n;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, size_t n) {
  const cudaError_t failed = status_beside_captures();
  return failed ? failed : cudaMallocAsync(p, n, nullptr);
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t) {
  if (!p) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allocations.find(p);
  if (found == allocations.end()) return result(cudaErrorInvalidValue);
  memset(p, 0xff, found->second);
  used -= found->second;
  allocations.erase(found);
  free(p);
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) { return cudaFreeAsync(p, nullptr); }
cudaError_t cudaMallocHost(void** p, size_t n) {
  if (const cudaError_t failed = status_beside_captures()) return failed;
  return (*p = malloc(n)) ? cudaSuccess : result(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* p) { return free(p), cudaSuccess; }
cudaError_t cudaMallocFromPoolAsync(void** p, size_t n, cudaMemPool_t, cudaStream_t s) { return cudaMallocAsync(p, n, s); }
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  return *pool = new CUmemPoolHandle_st, cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  if (n) memcpy(to, from, n);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t s) {
  return on_stream(s, [=] {
    if (n) memcpy(to, from, n);
  });
}
cudaError_t cudaMemset(void* p, int v, size_t n) {
  if (n) memset(p, v, n);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t s) {
  return on_stream(s, [=] {
    if (n) memset(p, v, n);
  });
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  const std::lock_guard<std::mutex> lock(mutex);
  *a = {};
  for (const auto& [start, bytes] : allocations)
    if (p >= start && p < static_cast<char*>(start) + bytes)
      a->type = cudaMemoryTypeDevice, a->devicePointer = const_cast<void*>(p);
  return cudaSuccess;
}
