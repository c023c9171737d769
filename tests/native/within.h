// How far what a kernel computes may be from what it should.
#pragma once

#include <math.h>

#include <string>
#include <vector>

#include "check.h"

namespace fusedrnn::tests {

inline double norm(const std::vector<double>& v) {
  double sum = 0;
  for (double e : v) sum += e * e;
  return sqrt(sum);
}

// How far results of many terms may be off, relative to what is typical. Roundings add up like a random walk: what is wrong in
// a sixth of a product's terms is beyond this, in 16 bits too.
inline double log_of(double terms) { return fmax(4, ceil(log2(fmax(1, terms)))); }
inline double rounding(double epsilon, double terms, bool backward) {
  return (backward ? 1.0 / 2 : 1.0 / 8) * epsilon * log_of(terms);
}

// ||got - want|| within `bound` of what is typical; NaN never is.
inline void close(const std::vector<double>& got, const std::vector<double>& want, double bound, const std::string& what) {
  std::vector<double> error(want.size());
  size_t worst = 0;
  for (size_t i = 0; i < want.size() && i < got.size(); ++i) {
    error[i] = fabs(got[i] - want[i]);
    if (!(error[i] <= error[worst])) worst = i;
  }
  const double most = bound * fmax(norm(want), sqrt(double(want.size())));
  char detail[160] = "";
  if (!(norm(error) <= most) && worst < got.size())
    snprintf(detail, sizeof detail, ": off by %.3g, bound %.3g; worst at %d of %d: got %.9g, want %.9g", norm(error), most,
             int(worst), int(want.size()), got[worst], want[worst]);
  check(got.size() == want.size() && norm(error) <= most, what + detail);
}

}  // namespace fusedrnn::tests
