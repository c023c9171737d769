#include "cpu/stack.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "cpu/threads.h"

namespace fusedrnn {
namespace {

// This rank's part of n.
struct Part {
  int64_t begin, end;
  Part(int64_t n, int rank, int threads) : begin(n * rank / threads), end(n * (rank + 1) / threads) {}
};

// The row tables of one call, which Rows point into.
class RowTables {
 public:
  // Rows of a sequence in the order of processing; `column` is where the direction's part of a row starts.
  template <class T>
  Rows<T> rows(const Sequence<T>& a, const Order& order, bool backward_in_time, int64_t column) {
    if (!a.data) return {nullptr, 0, nullptr};
    std::vector<ptrdiff_t> table(order.from.size());
    for (size_t j = 0; j < table.size(); ++j)
      table[j] = order.from[j] * a.row + (backward_in_time ? (order.length[j] - 1) * a.step : 0) + column;
    return {a.data, backward_in_time ? -a.step : a.step, keep(std::move(table))};
  }
  const ptrdiff_t* states(const Order& order, int64_t H) {
    std::vector<ptrdiff_t> table(order.from.size());
    for (size_t j = 0; j < table.size(); ++j) table[j] = order.from[j] * H;
    return keep(std::move(table));
  }

 private:
  const ptrdiff_t* keep(std::vector<ptrdiff_t>&& table) {
    tables_.push_back(std::move(table));
    return tables_.back().data();
  }
  std::vector<std::vector<ptrdiff_t>> tables_;
};

template <class T>
Sequence<T> time_major(T* data, int64_t B, int64_t width) {
  return {data, ptrdiff_t(B * width), ptrdiff_t(width)};
}

// The threads of a call in teams: one team for all, one for each direction, or one for some neighbouring layers each.
class Crew {
 public:
  // `make_plan` makes the plan of a layer, and `make_wave` that of the stack, for a number of threads.
  template <class MakePlan, class MakeWave>
  Crew(const Spec& spec, MakePlan make_plan, MakeWave make_wave)
      : L_(int(spec.L)), D_(spec.D), lease_(most_threads(spec, make_plan, make_wave)), threads_(lease_.size()) {
    if (D_ == 1 && L_ > 1 && threads_ > 1) wave_ = make_wave(threads_);
    teams_ = D_ == 2 && threads_ >= 2 ? 2 : wave_.teams;
    for (int l = 0; l < L_; ++l) plans_.push_back(make_plan(l, threads_ / teams_));
    all_.reset(threads_, lease_.crowded());
    for (int i = 0; i < L_ * D_; ++i) {
      const Plan& plan = plans_[i / D_];
      barriers_.push_back(std::make_unique<Barrier[]>(1 + plan.row_threads));
      barriers_.back()[0].reset(plan.threads(), lease_.crowded());
      for (int r = 0; r < plan.row_threads; ++r) barriers_.back()[1 + r].reset(plan.unit_threads, lease_.crowded());
    }
    progress_ = std::make_unique<Progress[]>(L_);
    for (int l = 0; l < L_; ++l) progress_[l].reset(lease_.crowded());
  }
  int threads() const { return threads_; }
  bool split() const { return D_ == 2 && teams_ == 2; }  // the two directions run at the same time
  const Wave& wave() const { return wave_; }
  bool flows() const { return wave_.teams > 1; }
  // How many layers and directions run at the same time, and the number of one's among them: what each needs of its own.
  int lanes() const { return flows() ? L_ : teams_; }
  int lane(int64_t layer, int d) const { return flows() ? int(layer) : split() ? d : 0; }
  int first_rank(int64_t layer, int d) const { return team_of(layer, d) * (threads_ / teams_); }
  const Plan& plan(int64_t layer) const { return plans_[layer]; }
  void wait(int rank) { all_.wait(rank); }
  void run(const std::function<void(int)>& work) { lease_.run(threads_, work); }

  // Calls work(d, team) for the directions of the layer that this rank takes part in.
  template <class Work>
  void directions(int64_t layer, int rank, Work work) {
    for (int d = 0; d < D_; ++d) {
      const int r = rank - first_rank(layer, d);
      Barrier* barriers = barriers_[layer * D_ + d].get();
      if (r >= 0 && r < plans_[layer].threads()) work(d, Team{plans_[layer], barriers, barriers + 1, r});
    }
  }

  // The wavefront: calls work(layer, team, begin, end) for this rank's layers, range by range; a layer waits for the one
  // before it, which is the one above it in backward.
  template <class Work>
  void flow(int rank, int64_t steps, bool forward, Work work) {
    for (int64_t i = 0; i < wave_.ranges; ++i) {
      const int64_t range = forward ? i : wave_.ranges - 1 - i;
      const Part part(steps, int(range), int(wave_.ranges));
      for (int k = 0; k < L_; ++k) {
        const int l = forward ? k : L_ - 1 - k, before = forward ? l - 1 : l + 1;
        if (rank / (threads_ / teams_) != team_of(l, 0)) continue;
        if (k > 0) progress_[before].wait_for((i + 1) * plans_[before].threads());
        directions(l, rank, [&](int, const Team& team) {
          work(l, team, part.begin, part.end);
          progress_[l].advance();
        });
      }
    }
  }

 private:
  int team_of(int64_t layer, int d) const { return D_ == 2 ? (teams_ == 2 ? d : 0) : int(layer * teams_ / L_); }

  template <class MakePlan, class MakeWave>
  static int most_threads(const Spec& spec, MakePlan make_plan, MakeWave make_wave) {
    int wanted = wanted_threads(), most = 1;
    if (wanted == 1) return 1;
    if (spec.D == 1 && spec.L > 1 && make_wave(wanted).teams > 1) return wanted;
    for (int64_t l = 0; l < spec.L; ++l) most = std::max(most, make_plan(l, wanted).threads());
    return most > 1 && spec.D == 2 ? wanted : most;
  }

  int L_, D_;
  Lease lease_;
  int threads_, teams_;
  Wave wave_;
  std::vector<Plan> plans_;
  Barrier all_;
  std::vector<std::unique_ptr<Barrier[]>> barriers_;
  std::unique_ptr<Progress[]> progress_;  // per layer, in threads times ranges
};

template <class T>
std::vector<LayerSize> layer_sizes(const Spec& spec, int64_t T_, int64_t B) {
  std::vector<LayerSize> sizes;
  for (int64_t l = 0; l < spec.L; ++l) sizes.push_back(layer_size<T>(spec, l, T_, B));
  return sizes;
}

// Distance between the blocks of a panel: lines more than they need, so that neighbours, and the parts of one, do not share
// cache sets.
template <class T>
int64_t block_stride(int64_t K, int64_t count) {
  return (K * count + 2) * kernels<T>().lanes;
}

// With FUSEDRNN_TRACE=1, rank 0 prints each layer's plan, what the cost model expected, and what it took.
class Trace {
 public:
  Trace(const char* pass, int rank) : pass_(pass), on_(rank == 0 && enabled()) {
    if (on_) start_ = Clock::now();
  }
  template <class T>
  void layer(const Spec& spec, int64_t l, int64_t T_, int64_t B, const Crew& crew) {
    if (!on_) return;
    const Plan& plan = crew.plan(l);
    fprintf(stderr,
            "fusedrnn: %s %s layer %lld: T=%lld B=%lld I=%lld H=%lld %s, %s: %d row x %d unit threads%s, "
            "%lld steps or %lld rows a chunk%s",
            pass_, spec.info().name, (long long)l, (long long)T_, (long long)B, (long long)spec.input_size(l),
            (long long)spec.H, sizeof(T) == 4 ? "float32" : "float64", isa().c_str(), plan.row_threads, plan.unit_threads,
            crew.split()   ? " for each direction"
            : crew.flows() ? " in a wavefront"
                           : "",
            (long long)plan.chunk_steps, (long long)plan.chunk_rows,
            plan.fused && plan.chunk_steps == 1 ? ", both products in one tile" : "");
    if (crew.flows())
      fputs("\n", stderr);
    else
      took(plan.estimated_us * (spec.D == 2 && !crew.split() ? 2 : 1));
  }
  template <class T>
  void stack(const Spec& spec, int64_t T_, int64_t B, const Crew& crew) {
    if (!on_) return;
    for (int64_t l = 0; l < spec.L; ++l) layer<T>(spec, l, T_, B, crew);
    fprintf(stderr, "fusedrnn: %s %s: %lld layers as a wavefront of %d teams over %lld ranges of steps", pass_,
            spec.info().name, (long long)spec.L, crew.wave().teams, (long long)crew.wave().ranges);
    took(crew.wave().estimated_us);
  }

 private:
  using Clock = std::chrono::steady_clock;
  void took(double expected_us) {
    const double us = std::chrono::duration<double, std::micro>(Clock::now() - start_).count();
    fprintf(stderr, "; expected %.0f us, took %.0f\n", expected_us, us);
    start_ = Clock::now();
  }
  static bool enabled() {
    static const bool on = [] {
      const char* text = getenv("FUSEDRNN_TRACE");
      return text && *text && *text != '0';
    }();
    return on;
  }
  const char* pass_;
  bool on_;
  Clock::time_point start_;
};

struct Dropout {
  double p;
  uint64_t seed;
  // Applies the mask of the boundary below `layer` to this rank's part of n elements.
  template <class T>
  void apply(const T* x, T* out, int64_t n, int64_t layer, int rank, int threads) const {
    Part part(n, rank, threads);
    auto threshold = uint32_t(std::min(p * 4294967296.0, 4294967295.0));
    kernels<T>().dropout(x + part.begin, out + part.begin, part.end - part.begin, seed,
                         uint64_t(layer) * uint64_t(n) + uint64_t(part.begin), threshold, T(1.0 / (1.0 - p)));
  }
};

// Zeros where a sequence has ended.
template <class T>
void clear_padding(const Sequence<T>& a, int64_t width, const Order& order, int64_t T_) {
  for (size_t j = 0; j < order.from.size(); ++j)
    for (int64_t t = order.length[j]; t < T_; ++t) std::fill_n(a.data + t * a.step + order.from[j] * a.row, width, T(0));
}

// Calls then(i, b) for this rank's blocks of hidden units of every layer and direction.
template <class Then>
void each_block(const Spec& spec, int64_t lanes, int rank, int threads, Then then) {
  const Part part(ceil_div(spec.H, lanes), rank, threads);
  for (int64_t i = 0; i < spec.count(); ++i)
    for (int64_t b = part.begin; b < part.end; ++b) then(i, b);
}

// What a tape remembers of x and of the parameters: sums over their words, which any threads may take in any order.
// Weights are hashed piece by piece just before a piece is packed, so that they come from memory once.
template <class T>
class Checksums {
 public:
  explicit Checksums(const Spec& spec) : spec_(spec) {}

  // This rank's part; the padding of x is left out.
  void add_x(const Sequence<const T>& a, const Order& order, int rank, int threads) {
    const int64_t B = order.from.size(), steps = order.active.size() - 1, row = words(spec_.I);
    const bool whole_steps = a.row == spec_.I && (steps == 0 || order.active[steps - 1] == B);
    uint64_t sum = 0;
    const Part part(steps, rank, threads);
    for (int64_t s = part.begin; s < part.end; ++s) {
      if (whole_steps) {
        sum += hash_(a.data + s * a.step, B * spec_.I * sizeof(T), s * B * row);
      } else {
        for (int64_t j = 0; j < order.active[s]; ++j)
          sum += hash_(a.data + s * a.step + order.from[j] * a.row, spec_.I * sizeof(T), (s * B + order.from[j]) * row);
      }
    }
    x_.fetch_add(sum, std::memory_order_relaxed);
  }
  // Of columns [begin, end) of a matrix's rows of block b, in all gates: layer and direction i, w_ih or w_hh. A thread
  // adds up what it has, and then adds that.
  uint64_t rows(const T* w, int64_t i, bool recurrent, int64_t b, int64_t begin, int64_t end) const {
    const int64_t lanes = kernels<T>().lanes, H = spec_.H, columns = recurrent ? H : spec_.input_size(i / spec_.D);
    end = std::min(end, columns);
    uint64_t sum = 0;
    if (begin >= end) return sum;
    for (int gate = 0; gate < spec_.info().gates; ++gate)
      for (int64_t r = gate * H + b * lanes; r < gate * H + std::min(H, (b + 1) * lanes); ++r)
        sum += hash_(w + r * columns + begin, (end - begin) * sizeof(T),
                     place(i, recurrent ? 1 : 0) + r * words(columns) + begin * sizeof(T) / 8);
    return sum;
  }
  void add_weights(uint64_t sum) { weights_.fetch_add(sum, std::memory_order_relaxed); }
  void add_biases(const StackWeights<const T>& weights) {
    if (!spec_.bias) return;
    const int64_t bytes = spec_.info().gates * spec_.H * sizeof(T);
    uint64_t sum = 0;
    for (int64_t i = 0; i < spec_.count(); ++i)
      sum += hash_(weights[i].b_ih, bytes, place(i, 2)) + hash_(weights[i].b_hh, bytes, place(i, 3));
    add_weights(sum);
  }
  uint64_t x() const { return x_; }
  uint64_t weights() const { return weights_; }

 private:
  static int64_t words(int64_t n) { return ceil_div(n * int64_t(sizeof(T)), 8); }
  // Where an array's words start: far apart, and in no step with the keys.
  static uint64_t place(int64_t i, int array) { return uint64_t(4 * i + array + 1) * 0xd1342543de82ef95u; }
  const Spec spec_;
  const decltype(Kernels<T>::hash) hash_ = kernels<T>().hash;
  std::atomic<uint64_t> x_{0}, weights_{0};
};

}  // namespace

template <class T>
LayerSize layer_size(const Spec& spec, int64_t layer, int64_t T_, int64_t B) {
  return {T_,
          B,
          spec.input_size(layer),
          spec.H,
          &spec.info(),
          kernels<T>().lanes,
          int(sizeof(T)),
          kernels<T>().cell[spec.cell].fuses};
}

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
  auto fed = [](Span span, int slot) { return slot >= span.first && slot < span.first + span.count; };
  for (int s = 0; s < cell.slots; ++s)
    for (int64_t u = b * lanes; u < (b + 1) * lanes; ++u) {
      T value = 0;
      if (spec_.bias && u < H) {
        if (fed(cell.input, s)) value += w.b_ih[cell.slot_gate[s] * H + u];
        for (int p = 0; p < cell.phases; ++p)
          if (fed(cell.recurrent[p], s)) value += w.b_hh[cell.slot_gate[s] * H + u];
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

template <class T>
void run_forward(const StackForward<T>& call, Tape<T>* tape) {
  const Spec& spec = call.spec;
  const int64_t T_ = call.T_, B = call.B, H = spec.H, width = spec.D * H, lanes = kernels<T>().lanes;
  const CellInfo& cell = spec.info();
  Checksums<T> sums(spec);
  std::unique_ptr<Panels<T>> own_panels;
  // This rank's part of the weights: hashed for a tape, and packed where there are no panels yet.
  const auto read_weights = [&](int rank, int threads) {
    uint64_t sum = 0;
    if (!tape && !own_panels) return;
    each_block(spec, lanes, rank, threads, [&](int64_t i, int64_t b) {
      const Weights<const T>& w = call.weights[i];
      if (tape) sum += sums.rows(w.w_ih, i, false, b, 0, spec.input_size(i / spec.D));
      if (own_panels) own_panels->pack_input(w, i, b);
      if (tape) sum += sums.rows(w.w_hh, i, true, b, 0, H);
      if (own_panels) own_panels->pack_recurrent(w, i, b);
    });
    sums.add_weights(sum);
    if (tape && rank == 0) sums.add_biases(call.weights);
  };
  if (B == 0) {
    read_weights(0, 1);
    if (tape) tape->x_sum = sums.x(), tape->weights_sum = sums.weights();
    return;
  }
  std::unique_ptr<Order> own_order;
  if (!tape) own_order = std::make_unique<Order>(T_, B, call.lengths);
  const Order& order = tape ? tape->order : *own_order;
  const int64_t steps = order.active.size() - 1;

  const bool drops = tape && tape->dropout > 0 && spec.L > 1;
  const std::vector<LayerSize> sizes = layer_sizes<T>(spec, steps, B);
  Crew crew(
      spec, [&](int64_t l, int threads) { return forward_plan(sizes[l], this_machine(), threads); },
      [&](int threads) { return drops ? Wave{} : forward_wave(sizes, this_machine(), threads); });
  if (!call.panels) own_panels = std::make_unique<Panels<T>>(spec);
  const Panels<T>& panels = call.panels ? *call.panels : *own_panels;

  // Workspace
  int64_t pre_thread = 0, place_thread = 0;
  for (int64_t l = 0; l < spec.L; ++l) {
    const Plan& plan = crew.plan(l);
    const int64_t rows = ceil_div(B, plan.row_threads);
    pre_thread =
        std::max(pre_thread, plan.chunk_steps * rows * ceil_div(ceil_div(H, lanes), plan.unit_threads) * cell.slots * lanes);
    place_thread = std::max(place_thread, rows);
  }
  Arena arena;
  Place<T>* place;
  T *pre, *zeros, *between = nullptr, *carry = nullptr;
  std::vector<T*> operand(crew.lanes());
  arena.want(&pre, {crew.threads(), pre_thread});
  arena.want(&place, {crew.threads(), place_thread});
  arena.want(&zeros, {H + lanes});
  if (crew.flows()) arena.want(&carry, {spec.L, B, H});
  if (spec.L > 1 && (!tape || drops)) arena.want(&between, {T_, B, width});
  if (!tape && cell.phases > 1)
    for (T*& o : operand) arena.want(&o, {B, H});
  arena.allocate();
  std::fill_n(zeros, H + lanes, T(0));
  if (tape && tape->h0) std::copy_n(call.state[0], spec.count() * B * H, tape->h0);

  RowTables tables;
  const ptrdiff_t* state_row = tables.states(order, H);
  std::vector<ForwardArgs<T>> args(spec.count());
  Sequence<const T> x = call.x;
  for (int64_t l = 0; l < spec.L; ++l) {
    // Inference writes inner layers in turns to one buffer and to the caller's y, which the last layer then overwrites.
    const bool top = l == spec.L - 1;
    Sequence<T> y = tape                        ? time_major(tape->y[l], B, width)
                    : (spec.L - 1 - l) % 2 == 0 ? call.y
                                                : time_major(between, B, width);
    for (int d = 0; d < spec.D; ++d) {
      const int64_t i = l * spec.D + d;
      const bool back = spec.backward_in_time(d);
      const auto& p = panels[i];
      ForwardArgs<T>& a = args[i];
      a.I = spec.input_size(l), a.H = H;
      a.schedule = order.schedule(B);
      a.x = tables.rows(x, order, back, 0);
      a.y = tables.rows(y, order, back, d * H);
      a.copy = tables.rows(tape && top ? call.y : Sequence<T>{}, order, back, d * H);
      for (int s = 0; s < cell.states; ++s) {
        a.state[s] = call.state[s] ? call.state[s] + i * B * H : nullptr;
        a.final_state[s] = call.final_state[s] + i * B * H;
      }
      a.state_row = state_row;
      a.w_ih = p.w_ih, a.ih_block = p.ih_block, a.bias = p.bias;
      for (int q = 0; q < cell.phases; ++q) a.w_hh[q] = p.w_hh[q], a.hh_block[q] = p.hh_block[q];
      a.training = tape != nullptr;
      a.turn = 0;
      a.saved = tape ? tape->saved[i] : nullptr;
      a.operand = tape ? tape->operand[i] : operand[crew.lane(l, d)];
      a.pre = pre + crew.first_rank(l, d) * pre_thread, a.pre_thread = pre_thread;
      a.place = place + crew.first_rank(l, d) * place_thread, a.place_thread = place_thread;
      a.carry = carry ? carry + i * B * H : nullptr;
      a.zeros = zeros;
    }
    if (!top) x = drops ? Sequence<const T>(time_major<const T>(between, B, width)) : Sequence<const T>{y.data, y.step, y.row};
  }

  crew.run([&](int rank) {
    read_weights(rank, crew.threads());
    if (tape) sums.add_x(call.x, order, rank, crew.threads());
    crew.wait(rank);
    Trace trace("forward", rank);
    if (crew.flows()) {
      crew.flow(rank, steps, true, [&](int l, const Team& team, int64_t begin, int64_t end) {
        kernels<T>().cell[spec.cell].forward(args[l], team, begin, end);
      });
      trace.stack<T>(spec, T_, B, crew);
      return;
    }
    for (int64_t l = 0; l < spec.L; ++l) {
      if (l > 0 && drops) {
        Dropout{tape->dropout, tape->seed}.apply<T>(tape->y[l - 1], between, T_ * B * width, l, rank, crew.threads());
        crew.wait(rank);
      }
      crew.directions(l, rank, [&](int d, const Team& team) {
        kernels<T>().cell[spec.cell].forward(args[l * spec.D + d], team, 0, steps);
      });
      crew.wait(rank);
      trace.layer<T>(spec, l, T_, B, crew);
    }
  });
  if (tape) tape->x_sum = sums.x(), tape->weights_sum = sums.weights();
  if (call.lengths) clear_padding(call.y, width, order, T_);
}

template <class T>
void run_backward(const StackBackward<T>& call) {
  const Spec& spec = call.spec;
  const Tape<T>& tape = *call.tape;
  const Order& order = tape.order;
  const int64_t T_ = tape.T_, B = tape.B, H = spec.H, width = spec.D * H;
  const Kernels<T>& k = kernels<T>();
  const int64_t lanes = k.lanes, blocks = ceil_div(H, lanes), padded = blocks * lanes;
  const CellInfo& cell = spec.info();
  const bool wants_weights = !call.dweights.empty();
  const int64_t steps = order.active.size() - 1;
  const bool drops = tape.dropout > 0 && spec.L > 1;
  const std::vector<LayerSize> sizes = layer_sizes<T>(spec, steps, B);
  Crew crew(
      spec, [&](int64_t l, int threads) { return backward_plan(sizes[l], this_machine(), threads); },
      [&](int threads) { return drops ? Wave{} : backward_wave(sizes, this_machine(), threads); });
  // Workspace: a set for each direction or layer of those that run at the same time.
  struct Work {
    T *gates, *carry[max_states], *x_panel, *h_panel[max_phases], *sum_w_ih, *sum_w_hh, *sum_b;
  };
  std::vector<Work> work(crew.lanes());
  struct Transposed {
    T *w_ih, *w_hh[max_phases];
    int64_t ih_block, hh_block[max_phases];
  };
  std::vector<Transposed> transposed(spec.count());
  int64_t chunk_rows = 0;
  for (int64_t l = 0; l < spec.L; ++l) chunk_rows = std::max(chunk_rows, crew.plan(l).chunk_rows);
  const int64_t widest = spec.L > 1 ? std::max(spec.I, width) : spec.I;
  const int64_t gates_block = (B + chunk_rows) * cell.slots * lanes + lanes;
  const bool sums = wants_weights && (call.adds || order.rows() > reduction_rows);
  Arena arena;
  T *zeros, *between[2] = {}, *second = nullptr, *masked = nullptr;
  arena.want(&zeros, {std::max(H, lanes) + lanes});
  for (Work& w : work) {
    arena.want(&w.gates, {blocks, gates_block});
    for (int s = 0; s < cell.states; ++s) arena.want(&w.carry[s], {B, padded});
    if (wants_weights) {
      const int64_t stride = operand_panel_stride(chunk_rows, lanes);
      arena.want(&w.x_panel, {ceil_div(widest, lanes), stride});
      for (int p = 0; p < cell.phases; ++p) arena.want(&w.h_panel[p], {blocks, stride});
      arena.want(&w.sum_b, {blocks, cell.slots, lanes});
    }
    if (sums) {
      arena.want(&w.sum_w_ih, {cell.gates, H, widest});
      arena.want(&w.sum_w_hh, {cell.gates, H, H});
    }
  }
  for (int64_t i = 0; i < spec.count(); ++i) {
    Transposed& t = transposed[i];
    if (i >= spec.D || call.dx.data) {
      t.ih_block = block_stride<T>(padded * cell.input.count, 1);
      arena.want(&t.w_ih, {ceil_div(spec.input_size(i / spec.D), lanes), t.ih_block});
    }
    for (int p = 0; p < cell.phases; ++p) {
      t.hh_block[p] = block_stride<T>(padded * cell.recurrent[p].count, 1);
      arena.want(&t.w_hh[p], {blocks, t.hh_block[p]});
    }
  }
  const Dropout dropout{tape.dropout, tape.seed};
  for (int n = 0; n < 2; ++n)
    if (spec.L > n + 1) arena.want(&between[n], {T_, B, width});
  if (drops) arena.want(&masked, {T_, B, width});
  if (crew.split()) arena.want(&second, {T_, B, widest});
  arena.allocate();

  Checksums<T> now(spec);
  crew.run([&](int rank) {
    const int threads = crew.threads();
    uint64_t sum = 0;
    for (int64_t i = 0; i < spec.count(); ++i) {
      const Weights<const T>& w = call.weights[i];
      const Transposed& t = transposed[i];
      const int64_t I = spec.input_size(i / spec.D);
      // Each thread packs some columns, which it is the one to read where units are split; or, where no cache would keep
      // its part, it reads whole rows.
      const bool by_rows = cell.gates * H * (I + H) * int64_t(sizeof(T)) > threads * this_machine().l2_bytes;
      const auto columns = [&](int64_t n) { return Part(ceil_div(n, lanes), by_rows ? 0 : rank, by_rows ? 1 : threads); };
      const Part rows(blocks, by_rows ? rank : 0, by_rows ? threads : 1), inputs = columns(I), units = columns(H);
      for (int64_t b = rows.begin; b < rows.end; ++b) {
        sum += now.rows(w.w_ih, i, false, b, inputs.begin * lanes, inputs.end * lanes);
        if (t.w_ih)
          k.pack_transposed(w.w_ih, H, I, cell.slot_gate + cell.input.first, cell.input.count, b, inputs.begin, inputs.end,
                            t.w_ih, t.ih_block);
        sum += now.rows(w.w_hh, i, true, b, units.begin * lanes, units.end * lanes);
        for (int p = 0; p < cell.phases; ++p)
          k.pack_transposed(w.w_hh, H, H, cell.slot_gate + cell.recurrent[p].first, cell.recurrent[p].count, b, units.begin,
                            units.end, t.w_hh[p], t.hh_block[p]);
      }
    }
    now.add_weights(sum);
    if (rank == 0) now.add_biases(call.weights);
    now.add_x(call.x, order, rank, threads);
  });
  if (now.x() != tape.x_sum) throw std::runtime_error("x was changed after the forward pass, so its gradients would be wrong");
  if (now.weights() != tape.weights_sum)
    throw std::runtime_error("the parameters were changed after the forward pass, so their gradients would be wrong");
  if (wants_weights && !call.adds && order.rows() == 0)
    for (int64_t i = 0; i < spec.count(); ++i) {
      const Weights<T>& g = call.dweights[i];
      std::fill_n(g.w_ih, cell.gates * H * spec.input_size(i / spec.D), T(0));
      std::fill_n(g.w_hh, cell.gates * H * H, T(0));
      if (spec.bias) std::fill_n(g.b_ih, cell.gates * H, T(0)), std::fill_n(g.b_hh, cell.gates * H, T(0));
    }
  if (B == 0) return;

  std::fill_n(zeros, std::max(H, lanes) + lanes, T(0));
  if (call.dx.data && !call.adds) clear_padding(call.dx, spec.I, order, T_);

  RowTables tables;
  const ptrdiff_t* state_row = tables.states(order, H);
  std::vector<BackwardArgs<T>> args(spec.count());
  std::vector<Sequence<T>> dx(spec.L);
  for (int64_t l = 0; l < spec.L; ++l) {
    dx[l] = l == 0 ? call.dx : time_major(between[(l - 1) % 2], B, width);
    const Sequence<const T> x = l == 0 ? call.x : time_major<const T>(drops ? masked : tape.y[l - 1], B, width);
    const Sequence<const T> dy = l == spec.L - 1 ? call.dy : time_major<const T>(between[l % 2], B, width);
    for (int d = 0; d < spec.D; ++d) {
      const int64_t i = l * spec.D + d;
      const bool back = spec.backward_in_time(d);
      const Work& w = work[crew.lane(l, d)];
      const Transposed& t = transposed[i];
      BackwardArgs<T>& a = args[i];
      ForwardArgs<T>& f = a.forward;
      f = {};
      f.I = spec.input_size(l), f.H = H;
      f.schedule = order.schedule(B);
      f.x = tables.rows(x, order, back, 0);
      f.y = tables.rows(time_major(tape.y[l], B, width), order, back, d * H);
      f.state[0] = tape.h0 ? tape.h0 + i * B * H : nullptr;
      f.state_row = state_row;
      f.saved = tape.saved[i], f.operand = tape.operand[i];
      f.training = true;
      f.zeros = zeros;
      a.dy = tables.rows(dy, order, back, d * H);
      const bool aside = crew.split() && d == 1;  // the second direction's dx, added when both are done
      a.dx = tables.rows(dx[l].data && aside ? time_major(second, B, f.I) : dx[l], order, back, 0);
      a.dx_adds = !aside && (d == 1 || (l == 0 && call.adds));
      for (int s = 0; s < cell.states; ++s) {
        a.dfinal_state[s] = call.dfinal_state[s] ? call.dfinal_state[s] + i * B * H : nullptr;
        a.dstate[s] = call.dstate[s] ? call.dstate[s] + i * B * H : nullptr;
        a.carry[s] = w.carry[s];
      }
      a.adds = call.adds;
      const Weights<T> g = wants_weights ? call.dweights[i] : Weights<T>{};
      a.dw_ih = g.w_ih, a.dw_hh = g.w_hh, a.db_ih = g.b_ih, a.db_hh = g.b_hh;
      a.w_ih_t = t.w_ih, a.ih_block = t.ih_block;
      a.x_panel = w.x_panel;
      for (int p = 0; p < cell.phases; ++p) a.w_hh_t[p] = t.w_hh[p], a.hh_block[p] = t.hh_block[p], a.h_panel[p] = w.h_panel[p];
      a.gates = w.gates, a.gates_block = gates_block;
      a.sum_w_ih = w.sum_w_ih, a.sum_w_hh = w.sum_w_hh, a.sum_b = w.sum_b;
    }
  }

  crew.run([&](int rank) {
    const int threads = crew.threads();
    Trace trace("backward", rank);
    if (crew.flows()) {
      crew.flow(rank, steps, false, [&](int l, const Team& team, int64_t begin, int64_t end) {
        k.cell[spec.cell].backward(args[l], team, begin, end);
      });
      trace.stack<T>(spec, T_, B, crew);
      return;
    }
    for (int64_t l = spec.L - 1; l >= 0; --l) {
      if (l > 0 && drops) dropout.apply<T>(tape.y[l - 1], masked, T_ * B * width, l, rank, threads);
      crew.wait(rank);
      crew.directions(l, rank,
                      [&](int d, const Team& team) { k.cell[spec.cell].backward(args[l * spec.D + d], team, 0, steps); });
      crew.wait(rank);
      trace.layer<T>(spec, l, T_, B, crew);
      if (crew.split() && dx[l].data) {
        const int64_t I = spec.input_size(l);
        Part part(order.from.size(), rank, threads);
        for (int64_t j = part.begin; j < part.end; ++j)
          for (int64_t t = 0; t < order.length[j]; ++t) {
            T* to = dx[l].data + t * dx[l].step + order.from[j] * dx[l].row;
            const T* from = second + (t * B + order.from[j]) * I;
            for (int64_t n = 0; n < I; ++n) to[n] += from[n];
          }
        crew.wait(rank);
      }
      if (l > 0 && drops) {
        dropout.apply<T>(dx[l].data, dx[l].data, T_ * B * width, l, rank, threads);
        crew.wait(rank);
      }
    }
  });
}

#define FUSEDRNN_INSTANTIATE(T)                                             \
  template LayerSize layer_size<T>(const Spec&, int64_t, int64_t, int64_t); \
  template class Panels<T>;                                                 \
  template struct Tape<T>;                                                  \
  template void run_forward(const StackForward<T>&, Tape<T>*);              \
  template void run_backward(const StackBackward<T>&);
FUSEDRNN_INSTANTIATE(float)
FUSEDRNN_INSTANTIATE(double)
#undef FUSEDRNN_INSTANTIATE

}  // namespace fusedrnn
