// Which cuBLASLt is used: the first that is there, whole and willing. What is found here are fakes (cublaslt_fake.cpp),
// so this needs no GPU.
#include <stdlib.h>

#include <stdexcept>

#include "check.h"
#include "cuda/blas.h"

namespace fusedrnn::tests {
namespace {

std::string error_of_first_use() {
  try {
    return "none: it is version " + cuda::blas_version();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

void run() {
  setenv("FAKE_CUBLASLT_13", "3", 1), setenv("FAKE_CUBLASLT_12", "1", 1);
  cuda::set_blas_path("/nowhere/libcublasLt.so");
  const std::string text = error_of_first_use();
  for (const char* part : {"pip install 'fusedrnn[cuda13]'",
                           "\n  /nowhere/libcublasLt.so: ", "\n  libcublasLt.so.13: status 3 from cublasLtCreate",
                           "\n  libcublasLt.so.12: status 1 from cublasLtCreate"})
    check(text.find(part) != text.npos, "the error names all that was tried, " + std::string(part) + ": " + text);
  cuda::set_blas_path("libcublasLt_lacks.so");
  const std::string lacks = error_of_first_use();
  check(lacks.find("libcublasLt_lacks.so: lacks cublasLtMatmulDescCreate; version 12 or 13") != lacks.npos,
        "a library that is not whole: " + lacks);
  unsetenv("FAKE_CUBLASLT_12");
  check(cuda::blas_version() == "12.2.1", "after what failed, 12 is used");
  unsetenv("FAKE_CUBLASLT_13");
  check(cuda::blas_version() == "12.2.1", "and stays in use");
}

}  // namespace
}  // namespace fusedrnn::tests

int main() {
  using namespace fusedrnn::tests;
  run();
  printf("%d passed, %d failed\n", int(passed), int(failed));
  return failed != 0;
}
