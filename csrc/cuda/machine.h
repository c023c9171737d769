// What a plan must know of a device: a pure value, so that plans for any card can be made on any machine. What the
// driver has said of launches is part of it, and what it refuses later is taken away: the next plan does without.
#pragma once

#include <stdint.h>

#include <string>

namespace fusedrnn::cuda {

struct Machine {
  std::string name;
  int major = 0, minor = 0;      // compute capability; of one that is not capable only its processors are known
  bool is_capable() const { return major >= 8; }
  int processors = 0;            // streaming multiprocessors
  int64_t shared_per_block = 0;  // bytes, the most that a block may ask for
  int max_cluster = 1;   // blocks
  int clusters[5] = {};  // [i > 0]: of 2^i blocks, a processor each, how many are resident at once
  int cooperative = 0;   // blocks of a cooperative launch, a processor each; 0: there is no such launch
  bool projects[2] = {true, true};  // by Exchange: launches with more blocks, which project the input
};

// Asked of the current device's driver: clusters.cu.
int resident_clusters(int blocks, int processors, int shared_bytes);
int resident_blocks(int processors, int shared_bytes);

Machine machine_of(int device);  // asked once; throws Error where it is missing
Machine named_machine(int device);  // its name, capability and processors alone, for which no context is made there

// From now on the device has no clusters of so many blocks, or for 0 no cooperative launches.
void set_refused(int device, int cluster);
void set_projecting_refused(int device, int exchange);  // Machine::projects

}  // namespace fusedrnn::cuda
