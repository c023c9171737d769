// A stack of layers on a GPU: the sibling of cpu/stack.h. All arrays are device memory of one device, everything starts
// and ends with one stream of the caller's and returns at once; nothing of a call is freed before the stream has passed it.
#pragma once

#include <memory>
#include <vector>

#include "cuda/dtype.h"
#include "order.h"
#include "spec.h"

struct CUstream_st;

namespace fusedrnn::cuda {

using Stream = CUstream_st*;  // cudaStream_t

struct Weights {  // one layer's parameters in one direction, or their gradients, C-contiguous, of the call's type
  void *w_ih, *w_hh, *b_ih, *b_hh;  // (gates*H, in), (gates*H, H), (gates*H) twice; the biases may be null
};

struct Sequence {  // a (T, B, width) array with strides in elements
  void* data = nullptr;
  int64_t step = 0, row = 0, column = 1;
};

struct Options {
  bool tf32 = false;          // products of float32 may round their factors to TF32
};

// What a forward pass reads in another order than Weights have it (panels.h), for weights that many passes use: pack() makes
// it in `panels`, device memory of panel_bytes(), aligned to 256.
int64_t panel_bytes(const Spec& spec, DType dtype);
void pack(const Spec& spec, DType dtype, int device, Stream stream, const std::vector<Weights>& weights, void* panels);

// What a training forward keeps for its backward passes. Freed on the stream it was made on, which must outlive it.
class Tape;

struct StackForward {
  Spec spec;
  DType dtype;
  Options options;
  int device;
  Stream stream;
  int64_t T_, B;
  std::vector<Weights> weights;  // L*D: layer by layer, forward direction first
  void* panels;                  // of these weights, or null: the pass makes its own
  Sequence x, y;
  const void* state[max_states];  // (L*D, B, H), or null for zeros
  void* final_state[max_states];
  const int64_t* lengths;  // (B) in host memory, or null
  double dropout;          // used where training
  uint64_t seed;
};

struct StackBackward {
  Spec spec;
  DType dtype;
  Options options;
  int device;
  Stream stream;
  std::vector<Weights> weights;
  const Tape* tape;
  Sequence x, dy;  // dy.data null: zeros
  const void* dfinal_state[max_states];
  Sequence dx;                    // null: not wanted
  void* dstate[max_states];       // null: not wanted
  std::vector<Weights> dweights;  // empty: not wanted
  bool adds;                      // to dx, dstate and dweights
};

// Both throw Error (check.h) for a failed CUDA call; then only outputs are undefined.
std::shared_ptr<Tape> run_forward(const StackForward& call, bool training);  // null for inference

// Throws std::runtime_error, with nothing of the caller's written, if x or the weights are not what the tape was made from.
// This waits for two checksums to come from the device, behind what computes them and all that was launched before. Where
// it adds, an error that comes after the first addition is an AddedInPart.
void run_backward(const StackBackward& call);

int64_t tape_bytes(const Tape& tape);

}  // namespace fusedrnn::cuda
