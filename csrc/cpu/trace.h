// What FUSEDRNN_TRACE=1 prints: each layer's plan, what the cost model expected, and what it took.
#pragma once

#include <stdio.h>
#include <stdlib.h>

#include <chrono>

#include "cpu/crew.h"
#include "cpu/dispatch.h"

namespace fusedrnn {

// Of one call; rank 0 prints.
class Trace {
 public:
  Trace(const char* pass, int rank) : pass_(pass), on_(rank == 0 && enabled()) {
    if (on_) start_ = Clock::now();
  }
  template <class T>
  void layer(const Spec& spec, int64_t l, int64_t T_, int64_t B, const Crew& crew) {
    if (!on_) return;
    const Plan& plan = crew.plan(l);
    print<T>(pass_, spec, l, T_, B, plan, crew.split() ? " for each direction" : crew.flows() ? " in a wavefront" : "");
    if (crew.tuned()) fputs(", threads as measured", stderr);
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
  // A stream, whose steps are too short for a line each, has one for each number of threads that it goes over to.
  template <class T>
  static void stream_layer(const Spec& spec, int64_t l, int64_t B, const Plan& plan, bool trying) {
    if (!enabled()) return;
    print<T>("stream", spec, l, 1, B, plan);
    fprintf(stderr, "; expected %.1f us a step%s\n", plan.estimated_us, trying ? ", being measured" : "");
  }

 private:
  using Clock = std::chrono::steady_clock;
  template <class T>
  static void print(const char* pass, const Spec& spec, int64_t l, int64_t T_, int64_t B, const Plan& plan,
                    const char* beside = "") {
    fprintf(stderr,
            "fusedrnn: %s %s layer %lld: T=%lld B=%lld I=%lld H=%lld %s, %s: %d row x %d unit threads%s, "
            "%lld steps or %lld rows a chunk%s%s",
            pass, spec.info().name, (long long)l, (long long)T_, (long long)B, (long long)spec.input_size(l), (long long)spec.H,
            sizeof(T) == 4 ? "float32" : "float64", isa().c_str(), plan.row_threads, plan.unit_threads, beside,
            (long long)plan.chunk_steps, (long long)plan.chunk_rows,
            plan.fused && plan.chunk_steps == 1 ? ", both products in one tile" : "",
            plan.prefetch ? ", prefetching panels" : "");
  }
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

}  // namespace fusedrnn
