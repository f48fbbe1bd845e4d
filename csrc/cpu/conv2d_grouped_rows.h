// Rows of an image, staged with the channels of a block of groups at every column. NCHW is transposed on the way in and
// out; in NHWC that is a copy. The kernels then are the same in both: their lanes are channels, none idles at the end
// of a row, and a stride is no more than a longer step from one column to the next.
#pragma once

#include "conv2d_grouped_blocks.h"
#include "conv2d_images.h"
#include "conv2d_stage.h"

namespace fastconv::cpu {
namespace {

#if defined(__AVX2__) || defined(__AVX512F__) || defined(__aarch64__)
constexpr bool permutes = true;
#else
constexpr bool permutes = false;  // lanes can be exchanged by constants only
#endif

// Channels of one block: in_count contracted ones from `in` on, and out_count produced ones from `out` on.
struct ChannelBlock {
  int64_t in, in_count, out, out_count;
};
FASTCONV_INLINE ChannelBlock channel_block(const ChannelBlocks& blocks, int64_t groups, int64_t contracted,
                                           int64_t produced, int64_t width, int64_t index) {
  const int64_t group = index / blocks.parts * blocks.groups, part = index % blocks.parts * width;
  const int64_t count = min_of(blocks.groups, groups - group);
  return {group * contracted, count * contracted, group * produced + part, min_of(width, count * produced - part)};
}

// out[position][pitch]: `count` columns of a row, from column `first` on, `step` apart; zeros outside of the image.
template <typename T>
void stage_strip(const Images<const T>& source, const T* row, int64_t cols, int64_t channels, int64_t first,
                 int64_t step, int64_t count, acc_t<T>* out, int64_t pitch) {
  const int64_t begin = min_of(count, first < 0 ? ceil_div(-first, step) : 0);
  const int64_t end = max_of(begin, min_of(count, first < cols ? (cols - 1 - first) / step + 1 : 0));
  fill_zero<T>(out, begin * pitch);
  fill_zero<T>(out + end * pitch, (count - end) * pitch);
  if (begin == end) return;
  const T* from = row + (first + begin * step) * source.col;
  acc_t<T>* to = out + begin * pitch;
  if (source.channel == 1) {
    for (int64_t i = begin; i < end; ++i, from += step * source.col, to += pitch) {
      int64_t c = 0;
      for (; c + lanes<T> <= channels; c += lanes<T>) store(to + c, load(from + c));
      if (c < channels) store(to + c, load_first(from + c, channels - c));
    }
  } else if (step == 1) {
    transpose(from, source.channel, channels, end - begin, to, pitch);
  } else {
    for (int64_t i = begin; i < end; ++i, from += step * source.col, to += pitch)
      for (int64_t c = 0; c < channels; ++c) to[c] = to_acc(from[c * source.channel]);
  }
}

// A block's weights, [element of a filter][lane]: steps from one tap of a filter and from one of its channels to the
// next.
template <typename E>
struct BlockWeights {
  E* data;
  int64_t tap_step, channel_step;
};

// A staged element is a channel's value.
template <typename T>
struct SingleChannels {
  static constexpr int64_t channels = 1;  // of an element
  static FASTCONV_INLINE vec_t<T> broadcast_element(const acc_t<T>* in) { return broadcast<T>(*in); }
  static FASTCONV_INLINE vec_t<T> add_product(vec_t<T> sum, vec_t<T> weight, vec_t<T> value) {
    return sum + weight * value;
  }
  static void stage(const Images<const T>& source, const T* row, int64_t cols, int64_t in_channels, int64_t first,
                    int64_t step, int64_t count, acc_t<T>* out, int64_t pitch) {
    stage_strip(source, row, cols, in_channels, first, step, count, out, pitch);
  }
  static void pack(const BlockWeights<acc_t<T>>&, int64_t, int64_t) {}  // they are as they have to be
};

// What the lanes of a vector are multiplied by, from the contracted channels at a staged position: `element` counts
// those of a group.
template <typename T, typename Elements = SingleChannels<T>>
struct GroupsOfVector : Elements {  // several groups a vector: each lane takes the element from its own group
  static constexpr bool several_groups = true;
  mask_t<T> lane_of[lanes<T>];
  GroupsOfVector(int64_t contracted, int64_t produced) {
    const int64_t elements = contracted / Elements::channels;
    for (int64_t element = 0; element < min_of<int64_t>(elements, lanes<T>); ++element)
      for (int lane = 0; lane < lanes<T>; ++lane)
        lane_of[element][lane] = (lane / produced * elements + element) % lanes<T>;
  }
  FASTCONV_INLINE vec_t<T> operator()(const acc_t<T>* in, int64_t element) const {
    const vec_t<T> v = load(in);
#if defined(__clang__)
    vec_t<T> out;
    for (int lane = 0; lane < lanes<T>; ++lane) out[lane] = v[lane_of[element][lane]];
    return out;
#else
    return __builtin_shuffle(v, lane_of[element]);
#endif
  }
};
template <typename T, typename Elements = SingleChannels<T>>
struct OneGroup : Elements {
  static constexpr bool several_groups = false;
  OneGroup(int64_t, int64_t) {}
  FASTCONV_INLINE vec_t<T> operator()(const acc_t<T>* in, int64_t element) const {
    return Elements::broadcast_element(in + element);
  }
};

// Fetches columns first … first + count − 1 of a row: the lines of one column (NHWC) or channel (NCHW) lie too far from
// those of the next for the machine to foresee them.
template <typename T>
FASTCONV_INLINE void prefetch_strip(const Images<T>& images, const void* row, int64_t cols, int64_t channels,
                                    int64_t first, int64_t count) {
  const int64_t begin = max_of<int64_t>(first, 0), end = min_of(cols, first + count);
  const bool nhwc = images.channel == 1;
  const int64_t pieces = nhwc ? end - begin : channels,
                pitch = (nhwc ? images.col : images.channel) * int64_t(sizeof(T));
  const int64_t bytes = (nhwc ? channels : end - begin) * int64_t(sizeof(T));
  const char* from = static_cast<const char*>(row) + begin * images.col * int64_t(sizeof(T));
  for (int64_t piece = 0; piece < pieces; ++piece, from += pitch) prefetch_lines<false, 1>(from, bytes);
}

// The staged rows of a block of channels and columns.
template <typename T, typename Elements>
struct RowStage {
  const Conv2dProblem& problem;
  Direction direction;
  Images<const T> source;
  int64_t source_rows, source_cols;
  StagedCols cols;
  StagedRows rows;
  int64_t pitch;  // elements of a position
  int64_t* held;  // which row is in a slot, or −1
  acc_t<T>* data;
  int64_t n = 0, channel = 0, channels = 0, col = 0;  // what is staged, for the outputs that read from `col` on

  void begin(int64_t new_n, int64_t new_channel, int64_t new_channels, int64_t new_col) {
    n = new_n, channel = new_channel, channels = new_channels, col = new_col;
    for (int64_t slot = 0; slot < rows.slots; ++slot) held[slot] = -1;
  }

  // Row `row` of the source, which tap r of the block's output row `output` reads.
  const acc_t<T>* at(int64_t row, int64_t output, int64_t r) {
    const int64_t slot = rows.slot(row, output, r);
    acc_t<T>* to = data + slot * cols.positions * pitch;
    if (held[slot] == row) return to;
    held[slot] = row;
    if (cols.whole && row + 1 < source_rows)
      prefetch_strip(source, source.at(n, channel, row + 1, 0), source_cols, channels, col + cols.low, cols.positions);
    const T* from = source.at(n, channel, row, 0);
    if (cols.whole) {
      Elements::stage(source, from, source_cols, channels, col + cols.low, 1, cols.positions, to, pitch);
      return to;
    }
    const int64_t phases = phases_of(problem, direction).cols;
    for (int64_t phase = 0; phase < phases; ++phase) {
      const Axis axis = col_axis(problem, direction, phase);
      for (int64_t tap = 0; tap < axis.taps; ++tap)
        Elements::stage(source, from, source_cols, channels, col + axis.first + tap * axis.inc, axis.step, cols.outputs,
                        to + (cols.first(axis) + tap * cols.tap_step(axis)) * pitch, pitch);
    }
    return to;
  }
};

}  // namespace
}  // namespace fastconv::cpu
