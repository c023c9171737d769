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
