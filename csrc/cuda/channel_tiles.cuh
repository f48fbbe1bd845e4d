// How kernels that treat each channel apart walk over x, in both layouts alike.
//
// An item is a vector of `width` elements, one load. NCHW, x[n][c][l]: an item has values of one channel, a block has
// one channel (or several small ones), and a channel's items lie in N planes. NHWC, x[row][c]: an item has one value of
// each of `width` channels, a block's threads cover neighbouring items of a row and several rows, and a plane is one
// item.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "index.cuh"

namespace fastconv::cuda {

constexpr int block_threads = 256;
constexpr int unroll = 4;       // items of a thread whose loads are in flight together
constexpr int items_alone = 8;  // of a thread whose results need no other's

struct ChannelTiles {
  int64_t C, items, piece_items;  // items a channel (or vector of channels), and in one piece of it
  unsigned pieces;
  int slot_bits, step_bits;  // a block has 2^slot_bits vectors of channels, in 2^step_bits items each
  int64_t channel_stride, plane_stride;
  Divide<int64_t> plane_items;
  // A thread's next item is 2^step_bits further on: so many items of the plane, and elements; and what is to be added
  // to that where it passes the end of the plane.
  int64_t step_items, step_offset, wrap_offset;
};

// channels: how many a thread has, `width` or 1.
template <int width, int channels>
struct ChannelTile {
  const ChannelTiles& tiles;
  unsigned piece;
  int64_t c, left;       // first channel, and how many items are left to visit, none below 1
  int64_t in_plane, at;  // the item at hand: in its plane, and its first element in x

  __device__ __forceinline__ explicit ChannelTile(const ChannelTiles& t) : tiles(t) {
    const unsigned group = blockIdx.x / t.pieces, slot = threadIdx.x & ((1u << t.slot_bits) - 1);
    piece = blockIdx.x - group * t.pieces;
    c = ((int64_t(group) << t.slot_bits) + slot) * channels;
    in_plane = piece * t.piece_items + (threadIdx.x >> t.slot_bits);
    const int64_t all = min(t.items - in_plane, t.piece_items - (threadIdx.x >> t.slot_bits));
    left = c < t.C ? (all + (int64_t{1} << t.step_bits) - 1) >> t.step_bits : 0;
    const int64_t plane = t.plane_items.split(in_plane);
    at = c * t.channel_stride + plane * t.plane_stride + in_plane * width;
  }
  __device__ __forceinline__ void advance() {
    in_plane += tiles.step_items;
    at += tiles.step_offset;
    if (in_plane >= tiles.plane_items.d) {
      in_plane -= tiles.plane_items.d;
      at += tiles.wrap_offset;
    }
    --left;
  }
  // One thread of the block for each vector of channels gives out what the block found.
  __device__ __forceinline__ bool is_first_of_channel() const {
    return threadIdx.x < 1u << tiles.slot_bits && c < tiles.C;
  }
};

// Visits all items of the tile: f(batch) with n of them, n = unroll and in the end 1.
template <int n, typename T, int width>
struct Batch {
  static constexpr int items = n;
  Vec<T, width> v[n];
  int64_t at[n];
};
template <int n, typename T, int width, int channels, typename F>
__device__ __forceinline__ void visit_batch(ChannelTile<width, channels>& tile, const T* x, const F& f) {
  Batch<n, T, width> batch;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    batch.at[i] = tile.at;
    batch.v[i] = load_vec<width>(x + tile.at);
    tile.advance();
  }
  f(batch);
}
template <typename T, int width, int channels, typename F>
__device__ __forceinline__ void visit(ChannelTile<width, channels> tile, const T* x, const F& f) {
  // redundant: the last four would be visited one by one
  while (tile.left >= unroll) visit_batch<unroll>(tile, x, f);
  while (tile.left > 0) visit_batch<1>(tile, x, f);
}

// The values in a batch of the thread's channel k.
template <int channels, typename A, int n, typename T, int width>
__device__ __forceinline__ void values_of(const Batch<n, T, width>& batch, int k, A (&values)[n * width / channels]) {
  constexpr int each = width / channels;
#pragma unroll
  for (int i = 0; i < n; ++i)
#pragma unroll
    for (int j = 0; j < each; ++j) values[i * each + j] = to_acc(batch.v[i].at[channels == 1 ? j : k]);
}

// N×C×1 is the same memory in both layouts, and so is N×1×L.
inline bool is_nhwc(const BatchNormProblem& p) { return p.L == 1 || (p.layout == Layout::NHWC && p.C > 1); }

// pieces: how many each channel is split into; 0: as many as there is work for.
template <int width, int channels>
ChannelTiles tiles_of(const BatchNormProblem& p, int64_t pieces) {
  const bool nhwc = is_nhwc(p), one_plane = p.C == 1;
  ChannelTiles t = {};
  t.C = p.C;
  t.items = p.count() * channels / width;
  int block_bits = 0;
  while (1 << block_bits < block_threads) ++block_bits;
  if (nhwc) {
    const int most_bits = width > 1 ? 5 : 7;  // 512 bytes of a row, or at least 128
    while (t.slot_bits < most_bits && int64_t{channels} << t.slot_bits < p.C) ++t.slot_bits;
  } else {  // several channels a block where one has too little for it
    while (t.slot_bits < 7 && t.items << t.slot_bits < block_threads && int64_t{1} << t.slot_bits < p.C) ++t.slot_bits;
  }
  t.step_bits = block_bits - t.slot_bits;
  const int64_t groups = ceil_div(p.C, int64_t{channels} << t.slot_bits), step = int64_t{1} << t.step_bits;
  const int64_t most_blocks = (int64_t{1} << 31) - 1;
  if (pieces == 0) pieces = std::clamp<int64_t>(t.items / (step * items_alone), 1, most_blocks / groups);
  t.piece_items = ceil_div(t.items, pieces);
  t.pieces = unsigned(pieces);
  t.channel_stride = nhwc ? 1 : p.L;
  t.plane_stride = nhwc ? p.C : p.C * p.L;
  const int64_t plane_items = nhwc ? 1 : one_plane ? t.items : p.L / width;
  t.plane_items = Divide<int64_t>(plane_items);
  t.step_items = step % plane_items;
  t.step_offset = step / plane_items * t.plane_stride + t.step_items * width;
  t.wrap_offset = t.plane_stride - plane_items * width;
  return t;
}

template <int width, int channels>
dim3 grid_of(const ChannelTiles& t) {
  return dim3(unsigned(ceil_div(t.C, int64_t{channels} << t.slot_bits) * t.pieces));
}

// Calls run(width, channels) with integral constants: vectors of 16 bytes, or single elements where those would not be
// aligned.
template <typename T, typename Run>
Status choose_width(const BatchNormProblem& p, std::initializer_list<const void*> pointers, const Run& run) {
  constexpr int wide = 16 / sizeof(T);
  const auto aligned = [](const void* pointer) { return is_aligned(pointer, 16); };
  const bool nhwc = is_nhwc(p);
  const int64_t row = nhwc ? p.C : p.C == 1 ? p.count() : p.L;
  using Single = std::integral_constant<int, 1>;
  using Wide = std::integral_constant<int, wide>;
  if (row % wide != 0 || !std::all_of(pointers.begin(), pointers.end(), aligned)) return run(Single{}, Single{});
  return nhwc ? run(Wide{}, Wide{}) : run(Wide{}, Single{});
}

}  // namespace fastconv::cuda
