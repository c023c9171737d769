// How a tape's arrays lie in its one block of memory.
#include "cpu/tape.h"

namespace fusedrnn {

template <class T>
Tape<T>::Tape(const Spec& spec, int64_t T_, int64_t B, const int64_t* lengths, bool has_state, double dropout, uint64_t seed)
    : T_(T_), B(B), order(T_, B, lengths), saved(spec.count()), operand(spec.count()), y(spec.L), dropout(dropout), seed(seed) {
  for (int64_t i = 0; i < spec.count(); ++i) {
    arena.want(&saved[i], {order.rows(), spec.info().saved, spec.H});
    if (spec.info().phases > 1) arena.want(&operand[i], {order.rows(), spec.H});
  }
  for (int64_t l = 0; l < spec.L; ++l) arena.want(&y[l], {T_, B, spec.D, spec.H});
  if (has_state) arena.want(&h0, {spec.count(), B, spec.H});
  arena.allocate();
}

template struct Tape<float>;
template struct Tape<double>;

}  // namespace fusedrnn
