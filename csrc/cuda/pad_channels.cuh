// Copies between a tensor and one in NHWC whose groups have more channels, the added ones zero, so that its loads are
// wider.
#pragma once

#include "index.cuh"

namespace fastconv::cuda {

// Rows of channels, for each (outer, inner) and pixel: `channels` in the tensor, `padded` in the other.
// x and y: outer is the image, inner the group. w: outer is the group, inner the filter, of which the padded tensor may
// have more than inner_end, all zero.
struct PadChannels {
  int64_t outer, inner, inner_end, pixels;
  int channels, padded;
  int64_t outer_stride, inner_stride, pixel_stride, channel_stride;  // of the tensor
  int64_t padded_outer, padded_inner, padded_pixel;                  // strides of the other
  int pixels_per_block;
};

constexpr int pad_threads = 256;

// back: from the padded tensor to the other.
template <typename W, bool back>
__global__ void __launch_bounds__(pad_threads)
    pad_channels_kernel(const __grid_constant__ PadChannels s, const W* from, W* to) {
  const int64_t parts = ceil_div(s.pixels, s.pixels_per_block), block = blockIdx.x;
  const int64_t pixel0 = block % parts * s.pixels_per_block;
  const int64_t inner = block / parts % s.inner, outer = block / parts / s.inner;
  const int64_t plain = outer * s.outer_stride + inner * s.inner_stride;
  const int64_t padded = outer * s.padded_outer + inner * s.padded_inner;
  const int end = int(min(int64_t(s.pixels_per_block), s.pixels - pixel0)) * s.padded;
  for (int i = threadIdx.x; i < end; i += pad_threads) {
    const int64_t pixel = pixel0 + i / s.padded;
    const int c = i % s.padded;
    const bool inside = c < s.channels && inner < s.inner_end;
    const int64_t at = plain + pixel * s.pixel_stride + c * s.channel_stride;
    const int64_t at_padded = padded + pixel * s.padded_pixel + c;
    if constexpr (!back)
      to[at_padded] = inside ? from[at] : W{};
    else if (inside)
      to[at] = from[at_padded];
  }
}

template <typename T, bool back>
Status pad_channels(PadChannels s, const T* from, T* to, Stream stream) {
  using W = typename Word<sizeof(T)>::type;
  s.pixels_per_block = std::max(16, 2048 / s.padded);  // 16 elements of a plane are 32 bytes or more
  const int64_t blocks = s.outer * s.inner * ceil_div(s.pixels, s.pixels_per_block);
  if (blocks == 0) return {};
  return launch("pad_channels_kernel", pad_channels_kernel<W, back>, dim3(unsigned(blocks)), dim3(pad_threads), 0,
                stream, s, reinterpret_cast<const W*>(from), reinterpret_cast<W*>(to));
}

}  // namespace fastconv::cuda
