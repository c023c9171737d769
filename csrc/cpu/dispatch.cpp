// Which ISAs this CPU has, by what -march lets the compiler use, and which kernels are taken.
#include "cpu/dispatch.h"

#include <stdlib.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <stdexcept>

namespace fusedrnn {

#define FUSEDRNN_DECLARE(target)               \
  namespace target {                           \
  extern const Kernels<float> kernels_float;   \
  extern const Kernels<double> kernels_double; \
  }
#if defined(__x86_64__)
FUSEDRNN_DECLARE(avx512)
FUSEDRNN_DECLARE(avx2)
FUSEDRNN_DECLARE(v2)
#elif defined(__aarch64__)
FUSEDRNN_DECLARE(neon)
#endif
#undef FUSEDRNN_DECLARE

namespace {

struct Isa {
  std::string name;
  bool available;
  const Kernels<float>* kernels_float;
  const Kernels<double>* kernels_double;
};

#if defined(__x86_64__)
// F16C, MOVBE and LZCNT: __builtin_cpu_supports of Clang 14 knows none of them.
bool has_rest_of_v3() {
  unsigned a, b, c = 0, d, extended = 0;
  __get_cpuid(1, &a, &b, &c, &d);
  __get_cpuid(0x80000001, &a, &b, &extended, &d);
  return (c & bit_F16C) && (c & bit_MOVBE) && (extended & bit_LZCNT);
}
#endif

const std::vector<Isa>& isas() {
  static const std::vector<Isa>& list = *[] {  // never destroyed: threads may outlive static destruction
#if defined(__x86_64__)
    // What the compiler may use under -march=x86-64-v2, but for what any CPU with SSE4.2 has, and under -v3.
    const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && has_rest_of_v3();
#endif
#define FUSEDRNN_ISA(name, has, target) \
  { name, bool(has), &target::kernels_float, &target::kernels_double }
    return new std::vector<Isa>{
#if defined(__x86_64__)
        FUSEDRNN_ISA("avx512",
                     v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                         __builtin_cpu_supports("avx512cd"),
                     avx512),
        FUSEDRNN_ISA("avx2", v3, avx2),
        FUSEDRNN_ISA("x86-64-v2", v2, v2),
#elif defined(__aarch64__)
        FUSEDRNN_ISA("neon", true, neon),
#endif
    };
#undef FUSEDRNN_ISA
  }();
  return list;
}

const Isa& chosen() {
  static const Isa& isa = []() -> const Isa& {
    const char* wanted = getenv("FUSEDRNN_ISA");
    std::string known;
    for (const Isa& i : isas()) {
      if (i.available && (!wanted || !*wanted || i.name == wanted)) return i;
      if (i.available) known += (known.empty() ? "" : ", ") + i.name;
    }
    throw std::invalid_argument("FUSEDRNN_ISA must be one of " + known + " on this CPU, got '" + (wanted ? wanted : "") + "'");
  }();
  return isa;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& i : isas())
    if (i.available) names.push_back(i.name);
  return names;
}

const std::string& isa() { return chosen().name; }

template <>
const Kernels<float>& kernels<float>() {
  return *chosen().kernels_float;
}
template <>
const Kernels<double>& kernels<double>() {
  return *chosen().kernels_double;
}

}  // namespace fusedrnn
