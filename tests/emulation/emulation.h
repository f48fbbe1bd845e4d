// CUDA on the host: what the kernels of csrc/cuda use of the language and its headers, as plain C++20.
//
// A CUDA thread is a fiber. The fibers of a block run on one OS thread, one at a time, each until it waits at a barrier
// or returns; blocks run one after another. Barriers, shuffles and votes honour their masks and are told apart by their
// place in the source, so that threads which wait for each other at different places are found and named. What the
// hardware leaves undefined (a shuffle from a lane that does not take part, a misaligned vector, a write past the
// shared memory) is an error: it ends the launch, whose status then says which kernel, block and thread did what.
// What is modelled, and what is not, is listed in README.md beside this file.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "arithmetic.h"
#include "atomics.h"
#include "barriers.h"
#include "half.h"
#include "machine.h"
#include "runtime.h"
#include "types.h"
#include "warp.h"
