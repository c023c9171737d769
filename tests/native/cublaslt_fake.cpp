// A cuBLASLt that multiplies nothing: what test_blas.cpp finds in place of a real one. Compiled once for each version.
// cublasLtCreate answers with the status that the environment names for it, FAKE_CUBLASLT_13 or _12, or with success.
#include <stdlib.h>

#define TEXT(x) #x
#define NAME(version) "FAKE_CUBLASLT_" TEXT(version)

extern "C" {
int cublasLtCreate(void** handle) {
  static int made;
  *handle = &made;
  const char* status = getenv(NAME(FAKE_VERSION));
  return status ? atoi(status) : 0;
}
int cublasLtDestroy(void*) { return 0; }
size_t cublasLtGetVersion() { return FAKE_VERSION * 10000 + 2 * 100 + 1; }
#if !defined(FAKE_LACKS)
int cublasLtMatmulDescCreate() { return 0; }
int cublasLtMatmulDescSetAttribute() { return 0; }
int cublasLtMatmulDescDestroy() { return 0; }
int cublasLtMatrixLayoutCreate() { return 0; }
int cublasLtMatrixLayoutDestroy() { return 0; }
int cublasLtMatmulPreferenceCreate() { return 0; }
int cublasLtMatmulPreferenceSetAttribute() { return 0; }
int cublasLtMatmulPreferenceDestroy() { return 0; }
int cublasLtMatmulAlgoGetHeuristic() { return 0; }
int cublasLtMatmul() { return 0; }
#endif
}
