#include "cuda/machine.h"

#include <map>
#include <mutex>

#include "cuda/check.h"
#include "cuda/memory.h"

namespace fusedrnn::cuda {
namespace {

Machine ask(int device) {
  const auto get = [&](cudaDeviceAttr what) {
    int value = 0;
    FUSEDRNN_CUDA(cudaDeviceGetAttribute(&value, what, device));
    return value;
  };
  Machine m;
  cudaDeviceProp properties;
  FUSEDRNN_CUDA(cudaGetDeviceProperties(&properties, device));
  m.name = properties.name;
  m.major = get(cudaDevAttrComputeCapabilityMajor), m.minor = get(cudaDevAttrComputeCapabilityMinor);
  if (!m.is_capable()) return m;
  m.processors = get(cudaDevAttrMultiProcessorCount);
  m.shared_per_block = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  m.shared_per_processor = get(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  m.registers = get(cudaDevAttrMaxRegistersPerMultiprocessor);
  m.l2_bytes = get(cudaDevAttrL2CacheSize);
  const int most = m.major >= 9 && get(cudaDevAttrClusterLaunch) ? 16 : 0;
  const OnDevice here(device);  // of which what follows is asked
  for (int i = 1; 1 << i <= most; ++i) {
    m.clusters[i] = resident_clusters(1 << i, m.processors, int(m.shared_per_block));
    if (m.clusters[i] > 0) m.max_cluster = 1 << i;
  }
  if (get(cudaDevAttrCooperativeLaunch)) m.cooperative = resident_blocks(m.processors, int(m.shared_per_block));
  return m;
}

std::mutex mutex;

Machine& known(int device) {  // under the mutex
  static std::map<int, Machine> machines;
  const auto found = machines.find(device);
  return found != machines.end() ? found->second : machines.emplace(device, ask(device)).first->second;
}

}  // namespace

Machine machine_of(int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  return known(device);
}

void set_refused(int device, int cluster) {
  const std::lock_guard<std::mutex> lock(mutex);
  Machine& machine = known(device);
  if (cluster == 0) machine.cooperative = 0;
  for (int i = 0; i < 5; ++i)
    if (1 << i == cluster) machine.clusters[i] = 0;
}

void set_projecting_refused(int device, int exchange) {
  const std::lock_guard<std::mutex> lock(mutex);
  known(device).projects[exchange] = false;
}

}  // namespace fusedrnn::cuda
