// Where each weight goes in a stack's panels. How a panel is packed is in gemm.h.
#include "cpu/panels.h"

#include "cpu/dispatch.h"

namespace fusedrnn {

namespace {

// Distance between the blocks of a panel: lines more than they need, so that neighbours, and the parts of one, do not share
// cache sets.
template <class T>
int64_t block_stride(int64_t K, int64_t count) {
  return (K * count + 2) * kernels<T>().lanes;
}

}  // namespace

template <class T>
Panels<T>::Panels(const Spec& spec) : spec_(spec), layers_(spec.count()) {
  const CellInfo& cell = spec.info();
  const int64_t lanes = kernels<T>().lanes, blocks = ceil_div(spec.H, lanes);
  for (int64_t i = 0; i < spec.count(); ++i) {
    Layer& l = layers_[i];
    l.ih_block = block_stride<T>(spec.input_size(i / spec.D), cell.input.count);
    arena_.want(&l.w_ih, {blocks, l.ih_block});
    for (int p = 0; p < cell.phases; ++p) {
      l.hh_block[p] = block_stride<T>(spec.H, cell.recurrent[p].count);
      arena_.want(&l.w_hh[p], {blocks, l.hh_block[p]});
    }
    arena_.want(&l.bias, {blocks, cell.slots, lanes});
  }
  arena_.allocate();
}

template <class T>
Panels<T>::Panels(const Spec& spec, const StackWeights<const T>& weights) : Panels(spec) {
  each_block(spec, kernels<T>().lanes, 0, 1, [&](int64_t i, int64_t b) {
    pack_input(weights[i], i, b);
    pack_recurrent(weights[i], i, b);
  });
}

template <class T>
void Panels<T>::pack_input(const Weights<const T>& w, int64_t i, int64_t b) {
  const CellInfo& cell = spec_.info();
  const Kernels<T>& k = kernels<T>();
  const int64_t H = spec_.H, lanes = k.lanes;
  const Layer& to = layers_[i];
  k.pack_gates(w.w_ih, H, spec_.input_size(i / spec_.D), cell.slot_gate + cell.input.first, cell.input.count, b, b + 1, to.w_ih,
               to.ih_block);
  for (int s = 0; s < cell.slots; ++s)
    for (int64_t u = b * lanes; u < (b + 1) * lanes; ++u) {
      T value = 0;
      if (spec_.bias && u < H) {
        if (contains(cell.input, s)) value += w.b_ih[cell.slot_gate[s] * H + u];
        for (int p = 0; p < cell.phases; ++p)
          if (contains(cell.recurrent[p], s)) value += w.b_hh[cell.slot_gate[s] * H + u];
      }
      to.bias[(b * cell.slots + s) * lanes + u - b * lanes] = value;
    }
}

template <class T>
void Panels<T>::pack_recurrent(const Weights<const T>& w, int64_t i, int64_t b) {
  const CellInfo& cell = spec_.info();
  const Layer& to = layers_[i];
  for (int p = 0; p < cell.phases; ++p)
    kernels<T>().pack_gates(w.w_hh, spec_.H, spec_.H, cell.slot_gate + cell.recurrent[p].first, cell.recurrent[p].count, b,
                            b + 1, to.w_hh[p], to.hh_block[p]);
}

template <class T>
TransposedPanels<T>::TransposedPanels(const Spec& spec, bool with_dx) : spec_(spec), layers_(spec.count()) {
  const CellInfo& cell = spec.info();
  const int64_t lanes = kernels<T>().lanes, blocks = ceil_div(spec.H, lanes), padded = blocks * lanes;
  for (int64_t i = 0; i < spec.count(); ++i) {
    Layer& l = layers_[i];
    if (i >= spec.D || with_dx) {
      l.ih_block = block_stride<T>(padded * cell.input.count, 1);
      arena_.want(&l.w_ih, {ceil_div(spec.input_size(i / spec.D), lanes), l.ih_block});
    }
    for (int p = 0; p < cell.phases; ++p) {
      l.hh_block[p] = block_stride<T>(padded * cell.recurrent[p].count, 1);
      arena_.want(&l.w_hh[p], {blocks, l.hh_block[p]});
    }
  }
  arena_.allocate();
}

template <class T>
void TransposedPanels<T>::pack_input(const Weights<const T>& w, int64_t i, int64_t b, int64_t in0, int64_t in1) {
  const CellInfo& cell = spec_.info();
  const Layer& to = layers_[i];
  if (to.w_ih)
    kernels<T>().pack_transposed(w.w_ih, spec_.H, spec_.input_size(i / spec_.D), cell.slot_gate + cell.input.first,
                                 cell.input.count, b, in0, in1, to.w_ih, to.ih_block);
}

template <class T>
void TransposedPanels<T>::pack_recurrent(const Weights<const T>& w, int64_t i, int64_t b, int64_t h0, int64_t h1) {
  const CellInfo& cell = spec_.info();
  const Layer& to = layers_[i];
  for (int p = 0; p < cell.phases; ++p)
    kernels<T>().pack_transposed(w.w_hh, spec_.H, spec_.H, cell.slot_gate + cell.recurrent[p].first, cell.recurrent[p].count, b,
                                 h0, h1, to.w_hh[p], to.hh_block[p]);
}

template class Panels<float>;
template class Panels<double>;
template class TransposedPanels<float>;
template class TransposedPanels<double>;

}  // namespace fusedrnn
