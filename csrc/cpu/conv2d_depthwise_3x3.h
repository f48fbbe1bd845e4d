// Depthwise convolution with 3×3 filters of stride 1 or 2 in NCHW, vectors along the columns. All nine weights, or in
// wgrad all nine sums, stay in registers.
#pragma once

#include "conv2d_depthwise_nchw.h"
#if defined(__AVX512F__)
#include "conv2d_depthwise_3x3_in_place.h"
#else
#include "conv2d_depthwise_3x3_staged.h"
#endif

namespace fastconv::cpu {
namespace {

// Calls block(plane, worker's memory, i0, i1) for all blocks of rows. A task is tile_k planes, or a part of one.
template <typename T, typename Block>
void for_plane_blocks(const Conv2dPlan& plan, const PlaneReader<T>& reader, int64_t planes, int64_t rows, char* scratch,
                      const Parallel& parallel, const Block& block) {
  const int64_t task_rows = plan.tile_k > 0 ? rows : plan.tile_m, parts = ceil_div(rows, task_rows);
  const int64_t task_planes = max_of<int64_t>(plan.tile_k, 1);
  for_each_task(parallel, ceil_div(planes, task_planes) * parts, [&](int worker, int64_t task) {
    auto* memory = reinterpret_cast<acc_t<T>*>(scratch + worker * plan.scratch_bytes);
    const int64_t plane0 = task / parts * task_planes, begin = task % parts * task_rows;
    const int64_t end = min_of(rows, begin + task_rows);
    for (int64_t plane = plane0; plane < min_of(planes, plane0 + task_planes); ++plane)
      for (int64_t i = begin; i < end; i += reader.block_rows)
        block(plane, memory, i, min_of(end, i + reader.block_rows));
  });
}

template <typename T>
void fprop_3x3(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* x, const T* w, const T* bias, T* y,
               char* scratch, const Parallel& parallel) {
  const PlaneReader<T> reader(pr, plan);
  const auto run = pr.stride_h == 1 ? gather_plane<T, 1> : gather_plane<T, 2>;
  for_plane_blocks<T>(
      plan, reader, pr.N * pr.C, pr.P, scratch, parallel, [&](int64_t plane, acc_t<T>* memory, int64_t i0, int64_t i1) {
        const int64_t c = plane % pr.C;
        run({x + plane * pr.H * pr.W, pr.H, pr.W, pr.pad_h, pr.pad_w}, reader, memory,
            {w + 9 * c, false, bias ? to_acc(bias[c]) : 0, pr.relu}, y + plane * pr.P * pr.Q, i0, i1, pr.Q);
      });
}

template <typename T>
void dgrad_3x3(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* w, T* dx, char* scratch,
               const Parallel& parallel) {
  const PlaneReader<T> reader(pr, plan);
  for_plane_blocks<T>(plan, reader, pr.N * pr.C, plane_outputs(pr, Direction::dgrad), scratch, parallel,
                      [&](int64_t plane, acc_t<T>* memory, int64_t i0, int64_t i1) {
                        const bool unit = pr.stride_h == 1;  // fprop with the filter turned around
                        const Plane<T> source{dy + plane * pr.P * pr.Q, pr.P, pr.Q, 2 - pr.pad_h, 2 - pr.pad_w};
                        const PlaneFilter<T> filter{w + 9 * (plane % pr.C), unit, 0, false};
                        T* out = dx + plane * pr.H * pr.W;
                        if (unit)
                          gather_plane<T, 1>(source, reader, memory, filter, out, i0, i1, pr.W);
                        else
                          double_plane<T>(source, reader, memory, filter, out, i0, i1, pr.H, pr.W);
                      });
}

// partial[piece][c][tap], the last of which is the bias: a piece is a share of the images.
template <typename T>
void wgrad_3x3(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* x, acc_t<T>* partial,
               char* scratch, const Parallel& parallel) {
  const PlaneReader<T> reader(pr, plan);
  const auto run = pr.stride_h == 1 ? add_plane<T, 1> : add_plane<T, 2>;
  for_each_task(parallel, plan.split * pr.C, [&](int worker, int64_t task) {
    const int64_t piece = task / pr.C, c = task % pr.C;
    auto* memory = reinterpret_cast<acc_t<T>*>(scratch + worker * plan.scratch_bytes);
    acc_t<T> sums[10 * lanes<T>] = {};
    for (int64_t n = piece * pr.N / plan.split; n < (piece + 1) * pr.N / plan.split; ++n) {
      const int64_t plane = n * pr.C + c;
      run({x + plane * pr.H * pr.W, pr.H, pr.W, pr.pad_h, pr.pad_w}, reader, memory, dy + plane * pr.P * pr.Q, pr.P,
          pr.Q, sums);
    }
    for (int tap = 0; tap < 10; ++tap) partial[task * 10 + tap] = sum_lanes<T>(load(sums + tap * lanes<T>));
  });
}

}  // namespace
}  // namespace fastconv::cpu
