# The kernels for GPUs: library fusedrnn_cuda, where FUSEDRNN_CUDA and the machine say so. FUSEDRNN_HAS_CUDA tells.
set(FUSEDRNN_HAS_CUDA OFF)
set(cuda "${FUSEDRNN_CUDA}")
if(NOT cuda MATCHES "^(AUTO|ON|OFF|EMULATED)$")
  message(FATAL_ERROR "FUSEDRNN_CUDA must be AUTO, ON, OFF or EMULATED, got ${cuda}")
endif()
if(cuda MATCHES "^(AUTO|ON)$")
  set(least 12.4)  # 16 bytes that are loaded whole need PTX 8.3, of 12.3; one version more for what was not looked into
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90)  # 90: also PTX, for later ones
  endif()
  set(nvcc "${CMAKE_CUDA_COMPILER}")
  if(NOT nvcc)
    set(nvcc "$ENV{CUDACXX}")
  endif()
  if(NOT nvcc)
    find_program(FUSEDRNN_NVCC nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME PATH_SUFFIXES bin)
    mark_as_advanced(FUSEDRNN_NVCC)
    set(nvcc "${FUSEDRNN_NVCC}")
  endif()
  if(CMAKE_CUDA_ARCHITECTURES STREQUAL "native" AND CMAKE_VERSION VERSION_LESS 3.24)
    message(FATAL_ERROR "fusedrnn: CMAKE_CUDA_ARCHITECTURES=native needs CMake 3.24 or later, got ${CMAKE_VERSION}")
  endif()
  # Its version is asked for before CMake tries it on architectures that an old one does not know.
  set(why "")
  if(nvcc)
    execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_QUIET)
    if(text MATCHES "release ([0-9.]+)" AND CMAKE_MATCH_1 VERSION_LESS least)
      set(why "CUDA ${CMAKE_MATCH_1} was found, but ${least} or later is needed")
    endif()
  endif()
  if(cuda STREQUAL "ON" AND why)
    message(FATAL_ERROR "fusedrnn: ${why}")
  elseif(cuda STREQUAL "AUTO")
    set(cuda OFF)
    if(why)
      message(STATUS "fusedrnn: ${why}")
    elseif(nvcc AND NOT CMAKE_CROSSCOMPILING)
      include(CheckLanguage)
      check_language(CUDA)
      if(CMAKE_CUDA_COMPILER)
        set(cuda ON)
      endif()
    endif()
  endif()
endif()

if(cuda STREQUAL "OFF")
  message(STATUS "fusedrnn: no kernels for GPUs (FUSEDRNN_CUDA=${FUSEDRNN_CUDA})")
  return()
endif()

set(cuda_sources
  csrc/cuda/check.cpp
  csrc/cuda/clusters.cu
  csrc/cuda/elementwise.cu
  csrc/cuda/machine.cpp
  csrc/cuda/memory.cpp
  csrc/cuda/panels.cu
  csrc/cuda/persistent_bf16.cu
  csrc/cuda/persistent_f16.cu
  csrc/cuda/persistent_f32.cu
  csrc/cuda/persistent_plan.cpp
  csrc/cuda/plan.cpp
  csrc/cuda/stack_backward.cu
  csrc/cuda/stack_forward.cu
  csrc/cuda/step.cu
  csrc/cuda/step_bf16.cu
  csrc/cuda/step_f16.cu
  csrc/cuda/step_f32.cu
  csrc/cuda/step_f64.cu
  csrc/cuda/step_tf32.cu
  csrc/cuda/strided.cu)

add_library(fusedrnn_cuda STATIC ${cuda_sources})
target_include_directories(fusedrnn_cuda PUBLIC csrc)
# INTERFACE: who links it needs the core; compiling it does not.
target_link_libraries(fusedrnn_cuda INTERFACE fusedrnn_core ${CMAKE_DL_LIBS})

if(cuda STREQUAL "EMULATED")
  set(cuda_kernels ${cuda_sources})
  list(FILTER cuda_kernels INCLUDE REGEX "\\.cu$")
  set_source_files_properties(${cuda_kernels} PROPERTIES LANGUAGE CXX)
  target_sources(fusedrnn_cuda PRIVATE
    tests/native/cuda_emulation/blas_emulated.cpp
    tests/native/cuda_emulation/cuda_runtime.cpp
    tests/native/cuda_emulation/emulator.cpp)
  target_include_directories(fusedrnn_cuda SYSTEM PUBLIC tests/native/cuda_emulation)
  target_compile_definitions(fusedrnn_cuda PUBLIC FUSEDRNN_EMULATED)
  # -O1: half the compiler's time of -O3, and the kernels run as fast, since most of a run is threads' turns.
  target_compile_options(fusedrnn_cuda PRIVATE -Wall -Wextra -Wno-unknown-pragmas ${exact}
    $<$<CONFIG:Release>:-O1>)
  set(once "")
  if(CMAKE_CXX_FLAGS MATCHES "-fsanitize=thread")  # races between CUDA threads: the emulator is no part of what is watched
    set(once once)
    target_compile_definitions(fusedrnn_cuda PUBLIC EMULATED_RACES)
    set_source_files_properties(tests/native/cuda_emulation/emulator.cpp PROPERTIES COMPILE_OPTIONS -fno-sanitize=thread)
  endif()
  if(FUSEDRNN_TESTS)
    enable_testing()
    foreach(name emulator persistent persistent_plans)
      add_executable(test_${name} tests/native/test_${name}.cpp)
      target_link_libraries(test_${name} PRIVATE fusedrnn_cuda)
      target_compile_options(test_${name} PRIVATE -Wall -Wextra)
      add_test(NAME ${name} COMMAND test_${name} ${once})
      set_tests_properties(${name} PROPERTIES TIMEOUT 300)
    endforeach()
    # The loader of cuBLASLt, which the emulation has no use for, beside fakes of what it looks for.
    add_executable(test_blas tests/native/test_blas.cpp csrc/cuda/blas.cpp)
    target_link_libraries(test_blas PRIVATE fusedrnn_cuda)
    target_compile_options(test_blas PRIVATE -Wall -Wextra)
    set(fakes ${CMAKE_CURRENT_BINARY_DIR}/cublaslt_fakes)
    foreach(version 13 12 lacks)
      string(REPLACE lacks 13 number ${version})
      add_library(cublaslt_fake_${version} MODULE tests/native/cublaslt_fake.cpp)
      set_target_properties(cublaslt_fake_${version} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${fakes}
        CXX_VISIBILITY_PRESET default PREFIX "" OUTPUT_NAME libcublasLt SUFFIX .so.${version})
      target_compile_definitions(cublaslt_fake_${version} PRIVATE FAKE_VERSION=${number})
      add_dependencies(test_blas cublaslt_fake_${version})
    endforeach()
    set_target_properties(cublaslt_fake_lacks PROPERTIES OUTPUT_NAME libcublasLt_lacks SUFFIX .so)
    target_compile_definitions(cublaslt_fake_lacks PRIVATE FAKE_LACKS)
    add_test(NAME blas COMMAND test_blas)
    set_tests_properties(blas PROPERTIES ENVIRONMENT LD_LIBRARY_PATH=${fakes})
  endif()
else()
  target_sources(fusedrnn_cuda PRIVATE csrc/cuda/blas.cpp)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set_target_properties(fusedrnn_cuda PROPERTIES POSITION_INDEPENDENT_CODE ON CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
  # The compiler fuses nothing on the CPU, and here only what the cells' fma says. Kernels are compressed, to a sixth: the driver
  # unpacks a file's where the first of them is launched. What packs best is read by the drivers of CUDA 13, not by all before.
  set(compress -Xfatbin=-compress-all)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
    list(APPEND compress -compress-mode=size)
  endif()
  target_compile_options(fusedrnn_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false --expt-relaxed-constexpr -Xcompiler=-Wall ${compress}>
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
  target_link_libraries(fusedrnn_cuda PUBLIC CUDA::cudart_static)
endif()
if(FUSEDRNN_TESTS)
  enable_testing()
  add_executable(test_cuda tests/native/test_cuda.cpp)
  target_link_libraries(test_cuda PRIVATE fusedrnn_cuda)
  add_test(NAME cuda COMMAND test_cuda ${once})
  set_tests_properties(cuda PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 900)
  if(cuda STREQUAL "EMULATED")
    target_compile_options(test_cuda PRIVATE -Wall -Wextra)
    add_test(NAME cuda_shuffled COMMAND test_cuda once)  # a few layers: what depends on the order is the kernel's
    set_tests_properties(cuda_shuffled PROPERTIES ENVIRONMENT EMULATED_SEED=1 TIMEOUT 900)
  else()
    set_source_files_properties(tests/native/test_cuda.cpp PROPERTIES LANGUAGE CUDA)
  endif()
endif()
if(FUSEDRNN_BENCH)
  foreach(program cuda_plans cuda_steps)
    add_executable(${program} bench/native/${program}.cpp)
    target_link_libraries(${program} PRIVATE fusedrnn_cuda)
    target_compile_options(${program} PRIVATE -Wall -Wextra)
  endforeach()
  add_executable(cuda_latency bench/native/cuda_latency.cu)
  target_link_libraries(cuda_latency PRIVATE fusedrnn_cuda)
  if(cuda STREQUAL "EMULATED")
    set_source_files_properties(bench/native/cuda_latency.cu PROPERTIES LANGUAGE CXX)
    target_compile_options(cuda_latency PRIVATE -Wall -Wextra -Wno-unknown-pragmas)
    if(FUSEDRNN_TESTS)
      add_test(NAME bench_cuda_latency COMMAND cuda_latency 1 1)
      add_test(NAME bench_cuda_plans COMMAND cuda_plans)
      set_tests_properties(bench_cuda_latency bench_cuda_plans PROPERTIES TIMEOUT 300)
    endif()
  else()
    target_compile_options(cuda_latency PRIVATE --expt-relaxed-constexpr)
  endif()
endif()
set(FUSEDRNN_HAS_CUDA ON)
string(REGEX REPLACE "([0-9]+a?)(-real|-virtual)?" "sm_\\1" FUSEDRNN_CUDA_BUILT_FOR "${CMAKE_CUDA_ARCHITECTURES}")
string(REPLACE ";" ", " FUSEDRNN_CUDA_BUILT_FOR "${FUSEDRNN_CUDA_BUILT_FOR}")
if(cuda STREQUAL "EMULATED")
  set(FUSEDRNN_CUDA_BUILT_FOR "emulation")
endif()
message(STATUS "fusedrnn: kernels for GPUs, ${cuda}")
