// im2col with vectors along the channels, for NHWC: patches are rows of (r, s, c). fprop and dgrad read them where they
// lie, a pixel's channels at a time, unless these are few or have to be converted; so does wgrad, by vectors.
//
//   fprop, dgrad   C[pixel][channel] = Σ_t patch[pixel][t] · weights[t][channel]     t = (tap, contracted channel)
//   wgrad          C[filter][t]      = Σ_pixel dy[pixel][filter] · patch[pixel][t]
#pragma once

#include "conv2d_blocks.h"
#include "conv2d_im2col_pieces.h"
#include "conv2d_stage.h"
#include "conv2d_wgrad_out.h"
#include "gemm.h"
#include "transpose.h"

namespace fastconv::cpu {
namespace {

// Patches of one group: source is [n][row][col][groups·channels].
template <typename T>
struct Patches {
  Axis rows, cols;
  int64_t N, groups, channels;
  const T* source;

  int64_t pixels() const { return N * rows.outputs * cols.outputs; }
  int64_t taps() const { return rows.taps * cols.taps; }
  const T* end() const { return source + N * rows.source * cols.source * groups * channels; }
};

// Copies `count` elements, in whole vectors that spill past the end where `limit` allows to read so far.
template <typename T>
FASTCONV_INLINE void copy_spilling(const T* from, int64_t count, const T* limit, acc_t<T>* out) {
  if (limit - from >= count + lanes<T>) {
    for (int64_t i = 0; i < count; i += lanes<T>) store(out + i, load(from + i));
  } else {
    copy_strided(from, 1, out, count);
  }
}
template <typename T>
FASTCONV_INLINE void zero_spilling(int64_t count, acc_t<T>* out) {
  for (int64_t i = 0; i < count; i += lanes<T>) store(out + i, vec_t<T>{});
}

// Visits elements t0 … t1−1 of the patch of output (n, i, j) as contiguous pieces, in order:
// visit(first t − t0, source or null for zeros, count).
template <typename T, typename Visit>
FASTCONV_INLINE void for_patch_pieces(const Patches<T>& p, int64_t group, int64_t n, int64_t i, int64_t j, int64_t t0,
                                      int64_t t1, const Visit& visit) {
  // Without groups and dilation the columns of a filter row are one contiguous piece.
  const bool joined = p.groups == 1 && p.cols.inc == 1;
  const int64_t pitch = p.groups * p.channels, unit = joined ? p.cols.taps * p.channels : p.channels;
  for (int64_t t = t0; t < t1;) {
    const int64_t index = t / unit, begin = t % unit, end = min_of(unit, begin + t1 - t);
    const int64_t row = i * p.rows.step + p.rows.first + (joined ? index : index / p.cols.taps) * p.rows.inc;
    const int64_t col = j * p.cols.step + p.cols.first + (joined ? 0 : index % p.cols.taps) * p.cols.inc;
    const int64_t width = joined ? p.cols.taps : 1;
    // [inside, outside) is the part of the piece that lies in the source.
    int64_t inside = end, outside = end;
    if (row >= 0 && row < p.rows.source && col < p.cols.source && col + width > 0) {
      inside = min_of(end, max_of(begin, col < 0 ? -col * p.channels : 0));
      outside = max_of(inside, min_of(end, (p.cols.source - col) * p.channels));
    }
    if (inside > begin) visit(t - t0, (const T*)nullptr, inside - begin);
    if (outside > inside)
      visit(t - t0 + inside - begin,
            p.source + ((n * p.rows.source + row) * p.cols.source + col) * pitch + group * p.channels + inside,
            outside - inside);
    if (end > outside) visit(t - t0 + outside - begin, (const T*)nullptr, end - outside);
    t += end - begin;
  }
}

// rows[pixel − pixel0][t − t0], `pitch` apart
template <typename T>
void pack_patch_rows(const Patches<T>& p, int64_t group, int64_t pixel0, int64_t count, int64_t t0, int64_t t1,
                     acc_t<T>* out, int64_t pitch) {
  for (int64_t pixel = pixel0; pixel < pixel0 + count; ++pixel, out += pitch) {
    const int64_t j = pixel % p.cols.outputs, i = pixel / p.cols.outputs % p.rows.outputs;
    for_patch_pieces(p, group, pixel / p.cols.outputs / p.rows.outputs, i, j, t0, t1,
                     [&](int64_t t, const T* from, int64_t length) {
                       if (from)
                         copy_spilling(from, length, p.end(), out + t);
                       else
                         zero_spilling<T>(length, out + t);
                     });
  }
}

// panels[(t − t0) / panel_cols][pixel − pixel0][lane]
template <typename T>
void pack_patch_panels(const Patches<T>& p, int64_t group, int64_t pixel0, int64_t count, int64_t t0, int64_t t1,
                       acc_t<T>* out, int64_t panel_pitch) {
  constexpr int cols = panel_cols<acc_t<T>>;
  for (int64_t pixel = pixel0; pixel < pixel0 + count; ++pixel, out += cols) {
    const int64_t j = pixel % p.cols.outputs, i = pixel / p.cols.outputs % p.rows.outputs;
    for_patch_pieces(p, group, pixel / p.cols.outputs / p.rows.outputs, i, j, t0, t1,
                     [&](int64_t t, const T* from, int64_t length) {
                       while (length > 0) {
                         const int64_t piece = min_of(length, cols - t % cols);
                         acc_t<T>* to = out + t / cols * panel_pitch + t % cols;
                         if (from) {
                           copy_spilling(from, piece, p.end(), to);
                           from += piece;
                         } else {
                           zero_spilling<T>(piece, to);
                         }
                         t += piece;
                         length -= piece;
                       }
                     });
  }
}

// fprop, or one phase of dgrad. weights: [group][panel][t][panel_cols].
template <typename T>
struct ChannelGather {
  Patches<T> patches;
  acc_t<T>* weights;
};

// out[tap − tap0][pixel − pixel0]: where the channels from `channel` on of the pixel lie that a tap reads, or zeros.
template <typename T>
void find_pieces(const Patches<T>& p, int64_t group, int64_t pixel0, int64_t count, int64_t tap0, int64_t tap1,
                 int64_t channel, const T* zeros, const T** out) {
  const int64_t pitch = p.groups * p.channels;
  for (int64_t tap = tap0; tap < tap1; ++tap) {
    const int64_t first_row = p.rows.first + tap / p.cols.taps * p.rows.inc;
    const int64_t first_col = p.cols.first + tap % p.cols.taps * p.cols.inc;
    int64_t j = pixel0 % p.cols.outputs, i = pixel0 / p.cols.outputs % p.rows.outputs;
    int64_t n = pixel0 / p.cols.outputs / p.rows.outputs;
    for (int64_t pixel = 0; pixel < count; ++pixel) {
      const int64_t row = i * p.rows.step + first_row, col = j * p.cols.step + first_col;
      const bool inside = row >= 0 && row < p.rows.source && col >= 0 && col < p.cols.source;
      *out++ = inside
                   ? p.source + ((n * p.rows.source + row) * p.cols.source + col) * pitch + group * p.channels + channel
                   : zeros;
      if (++j < p.cols.outputs) continue;
      j = 0;
      if (++i < p.rows.outputs) continue;
      i = 0;
      ++n;
    }
  }
}

// fprop, or all phases of dgrad: gather_of(a, b) describes one. They are tasks of one parallel region.
template <typename T, typename GatherOf>
void gather_channels(const Conv2dProblem& pr, const Conv2dPlan& plan, const GatherOf& gather_of, int64_t out_height,
                     int64_t out_width, const T* bias, T* out, char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  const Phases phases = phases_of(pr, plan.direction);
  const int64_t produced = produced_channels(pr, plan.direction), all_panels = ceil_div(produced, panel_cols<E>);
  const int64_t largest = pr.N * phases.largest_rows.outputs * phases.largest_cols.outputs;
  const int64_t m_blocks = ceil_div(produced, plan.tile_n), pixel_blocks = ceil_div(largest, plan.tile_m);
  const int64_t phase_tasks = pixel_blocks * pr.groups * m_blocks;
  const bool in_place = patches_in_place(pr, plan.direction);
  const Scratch layout = gather_scratch(pr, plan);
  for_each_task(parallel, phases.rows * phases.cols * phase_tasks, [&](int worker, int64_t task) {
    const int64_t phase = task / phase_tasks, m0 = task % m_blocks * plan.tile_n, group = task / m_blocks % pr.groups;
    const int64_t pixel0 = task % phase_tasks / m_blocks / pr.groups * plan.tile_m;
    const ChannelGather<T> gather = gather_of(phase / phases.cols, phase % phases.cols);
    const Patches<T>& p = gather.patches;
    const int64_t depth = p.taps() * p.channels, pixels = p.pixels();
    if (pixel0 >= pixels) return;  // a phase smaller than the largest
    const int64_t count = min_of<int64_t>(plan.tile_m, pixels - pixel0);
    const int64_t m_count = min_of<int64_t>(plan.tile_n, produced - m0), panels = ceil_div(m_count, panel_cols<E>);
    E* memory = reinterpret_cast<E*>(scratch + worker * plan.scratch_bytes);
    const auto** a = reinterpret_cast<const E**>(memory);
    auto* out_rows = reinterpret_cast<int64_t*>(memory + layout.rows);
    E *zeros = memory + layout.stage, *packed = memory + layout.a;
    fill_zero<T>(zeros, p.channels);
    for (int64_t pixel = pixel0; pixel < pixel0 + count; ++pixel) {
      const int64_t j = pixel % p.cols.outputs, i = pixel / p.cols.outputs % p.rows.outputs;
      const int64_t n = pixel / p.cols.outputs / p.rows.outputs;
      const int64_t h = p.rows.out_first + i * p.rows.out_step, w = p.cols.out_first + j * p.cols.out_step;
      out_rows[pixel - pixel0] = ((n * out_height + h) * out_width + w) * p.groups * produced + group * produced + m0;
    }
    PiecesOut<T> to{memory + layout.c, panels * panel_cols<E>, false, nullptr, out_rows, m_count, nullptr, pr.relu};
    if (bias) to.bias = bias + group * produced + m0;
    const E* b = gather.weights + (group * all_panels + m0 / panel_cols<E>)*depth * panel_cols<E>;
    // A tap's channels are a piece; what is packed is one piece.
    const int64_t pieces = in_place ? p.taps() : 1, length = in_place ? p.channels : depth;
    const int64_t length_step = balanced(length, plan.tile_k);
    const int64_t piece_step =
        length_step < length ? 1 : balanced(pieces, max_of<int64_t>(1, plan.tile_k / length_step));
    if (depth == 0) {
      to.out = out;
      multiply_pieces<T>(count, panels, 0, 0, a, 0, b, 0, to);
    }
    for (int64_t t0 = 0; t0 < depth;) {
      const int64_t piece = t0 / length, from = t0 % length, piece_count = min_of(piece_step, pieces - piece);
      const int64_t step = min_of(length_step, length - from), t1 = t0 + piece_count * step;
      if constexpr (std::is_same_v<T, E>) {
        if (in_place) find_pieces(p, group, pixel0, count, piece, piece + piece_count, from, zeros, a);
      }
      if (!in_place) {
        const int64_t a_row = step + lanes<E>;
        pack_patch_rows(p, group, pixel0, count, t0, t1, packed, a_row);
        for (int64_t pixel = 0; pixel < count; ++pixel) a[pixel] = packed + pixel * a_row;
      }
      if (t1 == depth) to.out = out;
      multiply_pieces<T>(count, panels, piece_count, step, a, count, b + t0 * panel_cols<E>, depth * panel_cols<E>, to);
      to.add = true;
      t0 = t1;
    }
  });
}

template <typename T>
void fprop_channels(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* x, const T* w, const T* bias, T* y,
                    void* workspace, char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  const int64_t kg = pr.filters_per_group(), depth = pr.channels_per_group() * pr.R * pr.S;
  E* weights = (E*)workspace;
  const int64_t panels = ceil_div(kg, panel_cols<E>);
  for_each_task(parallel, pr.groups * panels, [&](int, int64_t task) {
    const int64_t k0 = task % panels * panel_cols<E>;
    transpose(w + (task / panels * kg + k0) * depth, depth, min_of<int64_t>(panel_cols<E>, kg - k0), depth,
              weights + task * depth * panel_cols<E>, panel_cols<E>);
  });
  const ChannelGather<T> gather{{fprop_rows(pr), fprop_cols(pr), pr.N, pr.groups, pr.channels_per_group(), x}, weights};
  gather_channels<T>(pr, plan, [&](int64_t, int64_t) { return gather; }, pr.P, pr.Q, bias, y, scratch, parallel);
}

template <typename T>
void dgrad_channels(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* w, T* dx, void* workspace,
                    char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  const int64_t cg = pr.channels_per_group(), kg = pr.filters_per_group();
  const int64_t panels = ceil_div(cg, panel_cols<E>);
  const Phases phases = phases_of(pr, Direction::dgrad);
  // Each phase has its weights behind those of the phases before it.
  const auto gather_of = [&](int64_t a, int64_t b) {
    const Axis rows = dgrad_rows(pr, a), cols = dgrad_cols(pr, b);
    return ChannelGather<T>{{rows, cols, pr.N, pr.groups, kg, dy},
                            (E*)workspace + taps_before(pr, a, b) * pr.groups * panels * kg * panel_cols<E>};
  };
  // weights[group][panel][tap][k][lane] of every phase
  for_each_task(parallel, phases.rows * phases.cols * pr.groups * panels, [&](int, int64_t task) {
    const int64_t phase = task / panels / pr.groups, panel = task % (pr.groups * panels);
    const int64_t group = panel / panels, c0 = panel % panels * panel_cols<E>;
    const ChannelGather<T> gather = gather_of(phase / phases.cols, phase % phases.cols);
    const Axis &rows = gather.patches.rows, &cols = gather.patches.cols;
    E* to = gather.weights + panel * rows.taps * cols.taps * kg * panel_cols<E>;
    for (int64_t r = 0; r < rows.taps; ++r)
      for (int64_t s = 0; s < cols.taps; ++s)
        for (int64_t k = 0; k < kg; ++k, to += panel_cols<E>)
          copy_strided(w +
                           (((group * kg + k) * pr.R + rows.filter_first + r * rows.filter_step) * pr.S +
                            cols.filter_first + s * cols.filter_step) *
                               cg +
                           c0,
                       1, to, min_of<int64_t>(panel_cols<E>, cg - c0));
  });
  gather_channels<T>(pr, plan, gather_of, pr.H, pr.W, nullptr, dx, scratch, parallel);
}

// sums[col] += Σ_row a[row·pitch + col]
template <typename E>
void add_rows(const E* a, int64_t pitch, int64_t rows, int64_t cols, E* sums) {
  int64_t col = 0;
  for (; col + lanes<E> <= cols; col += lanes<E>) {
    vec_t<E> sum{};
    for (int64_t row = 0; row < rows; ++row) sum += load(a + row * pitch + col);
    store(sums + col, load(sums + col) + sum);
  }
  for (; col < cols; ++col) {
    E sum = 0;
    for (int64_t row = 0; row < rows; ++row) sum += a[row * pitch + col];
    sums[col] += sum;
  }
}

// out[pixel][panel_cols] = `count` channels of each pixel from rows[pixel] + channel on, in whole vectors
template <typename E>
void pack_pixels(const E* const* rows, int64_t pixels, int64_t channel, int64_t count, E* out) {
  constexpr int64_t line = 64 / sizeof(E);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, out += panel_cols<E>) {
    const E* from = rows[pixel] + channel;
    for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + count + i, 0, 2);  // the next panel, to L2
    for (int64_t i = 0; i < count; i += lanes<E>) store(out + i, load(from + i));
  }
}

// Patch elements t0 … t0 + t_count − 1 of all filters: C[k][t] (+)= Σ_pixel a[pixel·a_col + k] · patch[pixel][t];
// rows: [tap][pixel] from t0's tap on. Panels don't cross taps.
template <typename E>
void multiply_pixels(int64_t filters, int64_t t0, int64_t t_count, int64_t channels, int64_t pixels, const E* a,
                     int64_t a_col, const E* const* rows, E* panel, const TileOut<E>& to) {
  for (int64_t t = t0, count; t < t0 + t_count; t += count) {
    const int64_t channel = t % channels, left = min_of(channels - channel, t0 + t_count - t);
    count = left >= panel_cols<E> ? panel_cols<E> : lanes<E>;
    pack_pixels(rows + (t / channels - t0 / channels) * pixels, pixels, channel, count, panel);
    multiply_panel(filters, count, pixels, a, 1, a_col, panel, to, t - t0);
  }
}

template <typename T>
void wgrad_channels(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* x, const WgradOut<T>& out,
                    char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  const Patches<T> p{fprop_rows(pr), fprop_cols(pr), pr.N, pr.groups, pr.channels_per_group(), x};
  const int64_t kg = pr.filters_per_group(), depth = p.taps() * p.channels, pixels = p.pixels();
  const int64_t t_blocks = ceil_div(depth, plan.tile_n), k_blocks = ceil_div(kg, plan.tile_m);
  const int64_t pixel_blocks = ceil_div(pixels, plan.tile_k);
  const bool in_place = reads_pixels(pr);
  const Scratch layout = wgrad_scratch(pr, plan);
  for_each_task(parallel, plan.split * pr.groups * t_blocks * k_blocks, [&](int worker, int64_t task) {
    const int64_t k0 = task % k_blocks * plan.tile_m, t0 = task / k_blocks % t_blocks * plan.tile_n;
    const int64_t group = task / k_blocks / t_blocks % pr.groups, piece = task / k_blocks / t_blocks / pr.groups;
    const int64_t k_count = min_of<int64_t>(plan.tile_m, kg - k0), t_count = min_of<int64_t>(plan.tile_n, depth - t0);
    const int64_t panels = ceil_div(t_count, panel_cols<E>), c_row = panels * panel_cols<E>;
    E* memory = reinterpret_cast<E*>(scratch + worker * plan.scratch_bytes);
    E *packed = memory + layout.a, *b = memory + layout.b, *c = memory + layout.c;
    E* bias_sums = c + k_count * c_row;
    const auto** rows = reinterpret_cast<const E**>(memory);
    E* zeros = memory + layout.stage;
    fill_zero<T>(zeros, p.channels);
    fill_zero<T>(bias_sums, k_count);
    const int64_t filter = group * kg + k0;
    const int64_t first = piece * pixel_blocks / plan.split, end = (piece + 1) * pixel_blocks / plan.split;
    for (int64_t index = first; index < end; ++index) {
      const int64_t pixel0 = index * plan.tile_k, count = min_of<int64_t>(plan.tile_k, pixels - pixel0);
      const T* dy_rows = dy + pixel0 * pr.K + group * kg + k0;
      const E* a = packed;
      int64_t a_col = k_count;
      if constexpr (std::is_same_v<T, E>) {
        a = dy_rows;
        a_col = pr.K;
      } else {
        for (int64_t i = 0; i < count; ++i) copy_strided(dy_rows + i * pr.K, 1, packed + i * k_count, k_count);
      }
      const int64_t b_panel = (count + 1) * panel_cols<E>;  // one row more, for what spills from the last
      TileOut<E> to{c, c_row, index > first ? c : nullptr, c_row};
      if (in_place) {
        if constexpr (std::is_same_v<T, E>) {
          find_pieces(p, group, pixel0, count, t0 / p.channels, (t0 + t_count - 1) / p.channels + 1, 0, zeros, rows);
          if (index == end - 1)  // the last product writes to the result: its vectors are whole there
            out.with_piece(piece, [&](E* dw, E*) { to = {dw + filter * depth + t0, depth, to.add, to.add_row}; });
          multiply_pixels(k_count, t0, t_count, p.channels, count, a, a_col, rows, b, to);
        }
      } else {
        pack_patch_panels(p, group, pixel0, count, t0, t0 + t_count, b, b_panel);
        for (int64_t panel = 0; panel < panels; ++panel)
          multiply_panel<E>(k_count, panel_cols<E>, count, a, 1, a_col, b + panel * b_panel, to, panel * panel_cols<E>);
      }
      if (t0 == 0) add_rows(a, a_col, count, k_count, bias_sums);
    }
    out.with_piece(piece, [&](auto* dw, auto* db) {
      for (int64_t k = 0; k < k_count && !in_place; ++k)
        convert_row(c + k * c_row, t_count, dw + (filter + k) * depth + t0);
      if (db && t0 == 0) convert_row(bias_sums, k_count, db + filter);
    });
  });
}

}  // namespace
}  // namespace fastconv::cpu
