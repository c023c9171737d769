// What the plans need to know of a GPU, asked for once.
#include "cuda/machine.h"

#include <map>
#include <mutex>

#include "cuda/check.h"
#include "cuda/memory.h"

namespace fusedrnn::cuda {
namespace {

int get(cudaDeviceAttr what, int device) {
  int value = 0;
  FUSEDRNN_CUDA(cudaDeviceGetAttribute(&value, what, device));
  return value;
}

Machine ask(int device) {
  Machine m = named_machine(device);
  if (!m.is_capable()) return m;
  m.shared_per_block = get(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int most = m.major >= 9 && get(cudaDevAttrClusterLaunch, device) ? 16 : 0;
  const OnDevice here(device);  // of which what follows is asked
  for (int i = 1; 1 << i <= most; ++i) {
    m.clusters[i] = resident_clusters(1 << i, m.processors, int(m.shared_per_block));
    if (m.clusters[i] > 0) m.max_cluster = 1 << i;
  }
  if (get(cudaDevAttrCooperativeLaunch, device)) m.cooperative = resident_blocks(m.processors, int(m.shared_per_block));
  return m;
}

std::mutex mutex;

Machine& known(int device) {  // under the mutex
  static std::map<int, Machine> machines;
  const auto found = machines.find(device);
  return found != machines.end() ? found->second : machines.emplace(device, ask(device)).first->second;
}

}  // namespace

Machine named_machine(int device) {
  Machine m;
  cudaDeviceProp properties;
  FUSEDRNN_CUDA(cudaGetDeviceProperties(&properties, device));
  m.name = properties.name;
  m.major = get(cudaDevAttrComputeCapabilityMajor, device), m.minor = get(cudaDevAttrComputeCapabilityMinor, device);
  m.processors = get(cudaDevAttrMultiProcessorCount, device);
  return m;
}

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
