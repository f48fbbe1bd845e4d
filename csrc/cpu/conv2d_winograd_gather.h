// Winograd's fprop and dgrad:
//
//   M[f][tile][m] = Σ_ch X[f][tile][ch] · U[f][ch][m]       f = 0 … 35
//
// X and U being the transformed tiles of the source and filters. Chunk by chunk of tiles: X for all channels, and then,
// for each block of tiles × produced channels, the 36 products, which go through the inverse transform and out while
// they are in the cache. The filters are transformed before, or by each block for itself (GatherForm). dgrad is fprop
// of dy with flipped taps and padding R − 1 − pad.
#pragma once

#include "conv2d_wgrad_out.h"
#include "conv2d_winograd_products.h"
#include "conv2d_winograd_tiles.h"

namespace fastconv::cpu {
namespace {

template <typename T>
struct WinogradGather {
  int64_t contracted, produced;  // channels of a group
  TiledImages<T> source;
  Filters<T> filters;
  bool flipped;
  const T* bias;
  Images<T> out;
  int64_t out_rows, out_cols;
};

// out[ch][tap][m] of a panel of produced channels: one of ch, tap and m is contiguous in memory, by which it is copied.
template <int R, typename T>
void pack_taps(const Filters<T>& f, const T* from, int64_t m_count, int64_t ch_count, acc_t<T>* out) {
  constexpr int width = panel_cols<acc_t<T>>, taps = R * R;
  if (f.m == 1) {
    for (int64_t ch = 0; ch < ch_count; ++ch)
      for (int64_t tap = 0; tap < taps; ++tap, out += width)
        copy_strided(from + ch * f.channel + tap / R * f.r + tap % R * f.s, 1, out, m_count);
  } else if (f.channel == 1) {
    for (int64_t tap = 0; tap < taps; ++tap)
      transpose(from + tap / R * f.r + tap % R * f.s, f.m, m_count, ch_count, out + tap * width, taps * width);
  } else if (f.channel == taps) {
    transpose(from, f.m, m_count, ch_count * taps, out, width);
  } else {
    for (int64_t ch = 0; ch < ch_count; ++ch)
      transpose(from + ch * f.channel, f.m, m_count, taps, out + ch * taps * width, width);
  }
}

// Channels whose taps are packed at once.
template <int R>
constexpr int64_t packed_channels = R == 3 ? 16 : 8;

// out[f][ch][panel_cols] of ch_count ≤ packed_channels contracted channels, and of a panel of produced ones from m0 on.
template <int R, typename T>
void transform_filters(const WinogradGather<T>& g, int64_t group, int64_t m0, int64_t ch0, int64_t ch_count,
                       acc_t<T>* out, int64_t matrix) {
  using E = acc_t<T>;
  constexpr int width = panel_cols<E>, taps = R * R;
  const Filters<T>& f = g.filters;
  const int64_t m_count = min_of<int64_t>(width, g.produced - m0);
  E packed[packed_channels<R> * taps * width];
  if (m_count < width) fill_zero<T>(packed, packed_channels<R> * taps * width);
  pack_taps<R>(f, f.data + group * f.group + m0 * f.m + ch0 * f.channel, m_count, ch_count, packed);
  const E* first = g.flipped ? packed + (taps - 1) * width : packed;
  const int64_t step = g.flipped ? -width : width;
  for (int64_t ch = 0; ch < ch_count; ++ch, first += taps * width, out += width)
    for (int half = 0; half < width; half += lanes<E>)
      transform<E, FilterMatrix<R>>([&](int r, int s) { return load(first + (r * R + s) * step + half); },
                                    [&](int i, int j, vec_t<E> v) { store(out + (i * 6 + j) * matrix + half, v); });
}

// U[f][panel][ch][panel_cols]
template <int R, typename T>
void transform_all_filters(const WinogradGather<T>& g, int64_t group, acc_t<T>* out, int64_t matrix,
                           const Parallel& parallel) {
  constexpr int width = panel_cols<acc_t<T>>;
  const int64_t blocks = ceil_div(g.contracted, packed_channels<R>);
  for_each_task(parallel, ceil_div(g.produced, width) * blocks, [&](int, int64_t task) {
    const int64_t m0 = task / blocks * width, ch0 = task % blocks * packed_channels<R>;
    transform_filters<R>(g, group, m0, ch0, min_of(packed_channels<R>, g.contracted - ch0),
                         out + m0 * g.contracted + ch0 * width, matrix);
  });
}

// Asks for row `index` of a chain × chain block of filters: the taps of filters that are neighbours in memory.
template <int R, typename T>
FASTCONV_INLINE void prefetch_filters(const Filters<T>& f, const T* block, int64_t index) {
  const T* from = block + index * max_of(f.m, f.channel);
  if (f.s == 1) return prefetch_lines<false>(from, chain * R * R);
  for (int64_t tap = 0; tap < R * R; ++tap) prefetch_lines<false>(from + tap / R * f.r + tap % R * f.s, chain);
}

// products[f][tile][m] of `count` tiles of X[chain][f][tile][chain], after `skipped` ones, and of m_count produced
// channels from m0 on, whose filters are transformed a chain of channels at a time. The next ones are on their way
// meanwhile.
template <int R, typename T>
void multiply_passing(const WinogradGather<T>& g, int64_t group, int64_t m0, int64_t m_count, const Tiles& tiles,
                      const acc_t<T>* x, int64_t x_matrix, const TileCounts& skipped, const TileCounts& count,
                      const WinogradScratch& layout, acc_t<T>* own) {
  using E = acc_t<T>;
  constexpr int width = panel_cols<E>;
  E *const products = own + layout.products, *const filters = own + layout.filters;
  for (int64_t ch = 0; ch == 0 || ch < g.contracted; ch += chain, x += tile_products * x_matrix) {
    const int64_t depth = min_of(chain, g.contracted - ch);
    for (int64_t m = 0; m < m_count; m += width)
      for (int64_t at = 0; at < depth; at += packed_channels<R>)
        transform_filters<R>(g, group, m0 + m, ch + at, min_of(packed_channels<R>, depth - at),
                             filters + m * depth + at * width, layout.filters_matrix);
    const bool whole = m_count >= chain && ch + 2 * chain <= g.contracted;
    const T* next = g.filters.data + group * g.filters.group + m0 * g.filters.m + (ch + chain) * g.filters.channel;
    for (int64_t f = 0; f < tile_products; ++f) {
      if (whole && f < chain) prefetch_filters<R>(g.filters, next, f);
      for (int64_t m = 0; m < m_count; m += width)
        multiply_chain<chain, 1>(count.of[tiles.kind(f)], depth, x + f * x_matrix + skipped.of[tiles.kind(f)] * chain,
                                 filters + f * layout.filters_matrix + m * depth,
                                 products + f * layout.products_matrix + m, layout.products_row, ch > 0,
                                 x + (f + 1) * x_matrix);
    }
  }
}

// Step × Step tiles of one row, from out position (row, col) on: outputs[Step][Step·tiles][panel_cols] to where they
// belong.
template <int Step, typename T>
void write_tiles(const WinogradGather<T>& g, const acc_t<T>* outputs, int64_t tiles, int64_t n, int64_t channel,
                 int64_t channels, int64_t row, int64_t col) {
  constexpr int width = panel_cols<acc_t<T>>;
  const int64_t cols = min_of(tiles * Step, g.out_cols - col);
  for (int64_t i = 0; i < min_of<int64_t>(Step, g.out_rows - row); ++i, outputs += tiles * Step * width) {
    T* to = g.out.at(n, channel, row + i, col);
    if (g.out.col == 1)
      transpose(outputs, width, cols, channels, to, g.out.channel);
    else
      for (int64_t j = 0; j < cols; ++j) convert_row(outputs + j * width, channels, to + j * g.out.col);
  }
}

// Asks for the outputs of a tile.
template <int Step, typename T>
FASTCONV_INLINE void prefetch_tile(const WinogradGather<T>& g, const Tiles& tiles, int64_t tile, int64_t channel,
                                   int64_t channels) {
  constexpr int64_t apart = 64 / int64_t(Step * sizeof(T));  // tiles whose rows share cache lines in NCHW
  const int64_t j = tile % tiles.cols, i = tile / tiles.cols % tiles.rows, n = tile / tiles.cols / tiles.rows;
  if (g.out.col == 1 && j % apart != 0) return;
  for (int64_t row = i * Step; row < min_of((i + 1) * Step, g.out_rows); ++row)
    if (g.out.col == 1)
      for (int64_t ch = 0; ch < channels; ++ch) prefetch_lines<true>(g.out.at(n, channel + ch, row, j * Step), 1);
    else
      for (int64_t col = j * Step; col < min_of((j + 1) * Step, g.out_cols); ++col)
        prefetch_lines<true>(g.out.at(n, channel, row, col), channels);
}

// Whether all results are finite. An infinity or NaN spoils all of the tile that reads it, so then they are to be
// computed in another way.
template <int R, typename T>
bool winograd_gather(const Conv2dProblem& pr, const Conv2dPlan& plan, const WinogradGather<T>& g, void* workspace,
                     char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  constexpr int width = panel_cols<E>, step = tile_in + 1 - R;
  const Tiles tiles = make_tiles(pr, plan.direction, plan.tile_k);
  const GatherForm form = gather_form(pr, tiles, plan.direction);
  const WinogradMemory memory = winograd_memory(pr, plan);
  const WinogradScratch layout = winograd_scratch(pr, plan);
  E* const filters = (E*)workspace + memory.filters;
  const int64_t m_blocks = ceil_div(g.produced, plan.tile_n), panels = ceil_div(g.contracted, width);
  const auto partial_in = partial_matrices<E, InputMatrix>(tiles.last_row, tiles.last_col);
  const auto partial_out = partial_matrices<E, OutputMatrix<step>>(tiles.last_row, tiles.last_col);
  bool spoilt = false;
  for (int64_t group = 0; group < pr.groups; ++group) {
    if (form != GatherForm::passing) transform_all_filters<R>(g, group, filters, memory.filters_matrix, parallel);
    const auto chunk = [&](int64_t box0, E* x, char* scratch, const Parallel& parallel) {
      const int64_t boxes = min_of(tiles.chunk_boxes, tiles.boxes - box0);
      const int64_t chunk0 = tiles.first(box0), count = tiles.first(box0 + boxes) - chunk0;
      const int64_t matrix = tiles_matrix(count, chain);
      const TileCounts before_chunk = tiles_before(tiles, chunk0);
      for_each_task(parallel, boxes * panels, [&](int worker, int64_t task) {
        const int64_t ch = task % panels * width, ch_count = min_of<int64_t>(width, g.contracted - ch);
        transform_box<InputMatrix, step>(g.source, tiles, partial_in, box0 + task / panels, before_chunk,
                                         group * g.contracted + ch, ch_count,
                                         {x + ch / chain * tile_products * matrix + ch % chain, matrix, chain},
                                         (E*)nullptr, (E*)(scratch + worker * plan.scratch_bytes) + layout.stage);
      });
      const int64_t tile_blocks = ceil_div(count, plan.tile_m);
      for_each_task(parallel, tile_blocks * m_blocks, [&](int worker, int64_t task) {
        const int64_t t0 = task / m_blocks * count / tile_blocks, t1 = (task / m_blocks + 1) * count / tile_blocks;
        const int64_t m0 = task % m_blocks * plan.tile_n, m_count = min_of<int64_t>(plan.tile_n, g.produced - m0);
        const TileCounts before = tiles_before(tiles, chunk0 + t0), skipped = before - before_chunk;
        const TileCounts own_count = tiles_before(tiles, chunk0 + t1) - before;
        E* const own = (E*)(scratch + worker * plan.scratch_bytes);
        E *const products = own + layout.products, *const outputs = own + layout.outputs;
        if (form == GatherForm::passing) {
          multiply_passing<R>(g, group, m0, m_count, tiles, x, matrix, skipped, own_count, layout, own);
        } else {
          for (int64_t f = 0; f < tile_products; ++f) {
            for (int64_t t = t0 + f; t < t1; t += tile_products)
              prefetch_tile<step>(g, tiles, chunk0 + t, group * g.produced + m0, m_count);
            const int64_t panel = tile_products * matrix;  // of a chain of channels
            const E* own_x = x + f * matrix + skipped.of[tiles.kind(f)] * chain;
            for (int64_t ch = 0; ch == 0 || ch < g.contracted; ch += chain, own_x += panel)
              for (int64_t m = 0; m < m_count; m += width)
                multiply_chain<chain, 1>(own_count.of[tiles.kind(f)], min_of(chain, g.contracted - ch), own_x,
                                         filters + f * memory.filters_matrix + (m0 + m) * g.contracted + ch * width,
                                         products + f * layout.products_matrix + m, layout.products_row, ch > 0,
                                         own_x + panel);
          }
        }
        vec_t<E> zero{};  // NaN where a result was not finite
        for (int64_t m = 0; m < m_count; m += width) {
          const int64_t channel = group * g.produced + m0 + m, channels = min_of<int64_t>(width, m_count - m);
          E bias[width] = {};
          if (g.bias) copy_strided(g.bias + channel, 1, bias, channels);
          for (int64_t t = t0; t < t1;) {
            const int64_t j = (chunk0 + t) % tiles.cols, i = (chunk0 + t) / tiles.cols % tiles.rows;
            const int64_t n = (chunk0 + t) / tiles.cols / tiles.rows;
            const int64_t run = min_of(run_tiles, min_of(t1 - t, tiles.cols - j)), pitch = run * step * width;
            const TileRow row = tile_row(tiles, n, i, before, layout.products_matrix, layout.products_row);
            const int64_t row_points = tiles.row_points(i);
            for (int64_t tile = 0; tile < run; ++tile) {
              const int64_t col_points = tiles.col_points(j + tile);
              for (int half = 0; half < width; half += lanes<E>) {
                const E* from = products + (j + tile) * layout.products_row + m + half;
                E* to = outputs + tile * step * width + half;
                const vec_t<E> added = load(bias + half);
                const auto put = [&](int k, int l, vec_t<E> v) {
                  zero += v * E(0);
                  store(to + k * pitch + l * width, pr.relu ? relu(v + added) : v + added);
                };
                if (row_points == tile_in && col_points == tile_in)
                  transform<E, OutputMatrix<step>>([&](int k, int l) { return load(from + row.at[k * 6 + l]); }, put);
                else
                  transform_partial<E>(
                      row_points < tile_in ? partial_out.row : partial_out.whole,
                      col_points < tile_in ? partial_out.col : partial_out.whole,
                      [&](int k, int l) {
                        return load(from + row.at[point_number(k, row_points) * 6 + point_number(l, col_points)]);
                      },
                      put);
              }
            }
            write_tiles<step>(g, outputs, run, n, channel, channels, i * step, j * step);
            t += run;
          }
        }
        for (int lane = 0; lane < lanes<E>; ++lane)
          if (zero[lane] != 0) __atomic_store_n(&spoilt, true, __ATOMIC_RELAXED);
      });
    };
    if (form == GatherForm::apart) {
      for_each_task(parallel, tiles.chunks(), [&](int worker, int64_t task) {
        char* const own = scratch + worker * plan.scratch_bytes;
        chunk(task * tiles.chunk_boxes, (E*)own + layout.x, own, Parallel{});
      });
    } else {
      for (int64_t box0 = 0; box0 < tiles.boxes; box0 += tiles.chunk_boxes)
        chunk(box0, (E*)workspace + memory.x, scratch, parallel);
    }
  }
  return !spoilt;
}

template <int R, typename T>
bool winograd_fprop(const Conv2dProblem& p, const Conv2dPlan& plan, const T* x, const T* w, const T* bias, T* y,
                    void* workspace, char* scratch, const Parallel& parallel) {
  const WinogradGather<T> g{p.channels_per_group(),
                            p.filters_per_group(),
                            {images(x, p.layout, p.C, p.H, p.W), p.H, p.W, -p.pad_h, -p.pad_w},
                            filters(w, p, Direction::fprop),
                            false,
                            bias,
                            images(y, p.layout, p.K, p.P, p.Q),
                            p.P,
                            p.Q};
  return winograd_gather<R>(p, plan, g, workspace, scratch, parallel);
}

template <int R, typename T>
bool winograd_dgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const T* dy, const T* w, T* dx, void* workspace,
                    char* scratch, const Parallel& parallel) {
  const WinogradGather<T> g{p.filters_per_group(),
                            p.channels_per_group(),
                            {images(dy, p.layout, p.K, p.P, p.Q), p.P, p.Q, p.pad_h - (R - 1), p.pad_w - (R - 1)},
                            filters(w, p, Direction::dgrad),
                            true,
                            nullptr,
                            images(dx, p.layout, p.C, p.H, p.W),
                            p.H,
                            p.W};
  return winograd_gather<R>(p, plan, g, workspace, scratch, parallel);
}

}  // namespace
}  // namespace fastconv::cpu
