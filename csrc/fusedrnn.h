// What a program in C++ includes: passes over sequences (cpu/stack.h), single steps (cpu/stream.h), how many threads
// (cpu/threads.h), which instruction set (cpu/dispatch.h). examples/embed shows them at work.
//
// Arguments  Shapes, strides and pointers are not checked. Sizes that overflow throw std::length_error, memory that cannot be
//            had std::bad_alloc, before anything is written.
// Arrays     are the caller's, and must live until a call returns; what a tape was made from (x, weights), until its last
//            backward pass. What is written may overlap nothing that is read.
// Backward   takes x with the strides that the forward pass had, and throws std::runtime_error, with nothing written, if x or
//            the weights are not what they were. A tape may be used again; that a caller did so by mistake is not noticed.
// Threads    Calls from several threads at once are fine, also with the same panels or tape. A Stream belongs to one.
//            A call that finds the threads of the pool busy runs on its own.
// Bits       depend on the instruction set alone: not on threads, batch, or how a sequence is cut.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/stack.h"
#include "cpu/stream.h"
#include "cpu/threads.h"
