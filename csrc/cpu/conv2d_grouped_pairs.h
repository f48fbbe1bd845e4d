// Grouped convolution of bfloat16 by VDPBF16PS: a staged element, and one of the weights, is a pair of neighbouring
// channels (of a group: there have to be an even number), whose products are added to a lane's sum at once.
#pragma once

#include "bfloat16.h"
#include "conv2d_grouped_rows.h"

namespace fastconv::cpu {
namespace {

// The 32 bits of a pair have no meaning as a float, and no arithmetic is done on them.
struct ChannelPairs {
  static constexpr int64_t channels = 2;  // of an element
  static FASTCONV_INLINE vec_t<float> broadcast_element(const float* in) {
    int32_t pair;
    memcpy(&pair, in, sizeof pair);
    return (vec_t<float>)_mm512_set1_epi32(pair);
  }
  static FASTCONV_INLINE vec_t<float> add_product(vec_t<float> sum, vec_t<float> weight, vec_t<float> value) {
    return (vec_t<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)value);
  }

  // out[position][pitch]: `count` columns of a row, from column `first` on, `step` apart; zeros outside of the image.
  static void stage(const Images<const bfloat16_t>& source, const bfloat16_t* row, int64_t cols, int64_t in_channels,
                    int64_t first, int64_t step, int64_t count, float* out, int64_t pitch) {
    const int64_t begin = min_of(count, first < 0 ? ceil_div(-first, step) : 0);
    const int64_t end = max_of(begin, min_of(count, first < cols ? (cols - 1 - first) / step + 1 : 0));
    fill_zero<float>(out, begin * pitch);
    fill_zero<float>(out + end * pitch, (count - end) * pitch);
    const bfloat16_t* from = row + (first + begin * step) * source.col;
    auto* to = reinterpret_cast<bfloat16_t*>(out + begin * pitch);
    if (source.channel != 1 && step == 1) {
      transpose_bfloat16(from, source.channel, in_channels, end - begin, to, 2 * pitch);
      return;
    }
    for (int64_t i = begin; i < end; ++i, from += step * source.col, to += 2 * pitch)
      if (source.channel == 1)
        for (int64_t c = 0; c < in_channels; c += 32)
          store_pairs(to + c, load_pairs(from + c, first_lanes(in_channels - c)));
      else
        for (int64_t c = 0; c < in_channels; ++c) to[c] = from[c * source.channel];
  }

  // Puts the weights of channels 2i and 2i + 1, which are floats that lost nothing, in the place of those of channel i.
  static void pack(const BlockWeights<float>& weights, int64_t taps, int64_t contracted) {
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t i = 0; i < contracted / 2; ++i) {
        float* const of_tap = weights.data + tap * weights.tap_step;
        const auto bits = [&](int64_t channel) { return (vuint32)load(of_tap + channel * weights.channel_step); };
        store(of_tap + i * weights.channel_step, (vec_t<float>)(bits(2 * i) >> 16 | bits(2 * i + 1)));
      }
  }
};

}  // namespace
}  // namespace fastconv::cpu
