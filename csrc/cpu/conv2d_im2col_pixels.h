// im2col with vectors along the pixels, fprop and dgrad: NCHW, and NHWC where a group has few channels.
//
//   C[channel][pixel] = Σ_t weights[channel][t] · patch[t][pixel]     t = (contracted channel, tap)
//
// A task computes a block of pixels × channels. For each block of depth it stages the planes that the pixels read, with
// their padding, unless the filter is one tap that reads them as they are, and multiplies: a row of patches is a piece
// of a plane.
#pragma once

#include "conv2d_blocks.h"
#include "conv2d_im2col_window.h"
#include "conv2d_images.h"
#include "conv2d_rows_out.h"
#include "conv2d_stage.h"
#include "transpose.h"

namespace fastconv::cpu {
namespace {

// A block of a task: images, rows and columns of a phase's outputs, and channels of a group.
struct GatherBlock {
  int64_t n0, n_count, i0, i_count, j0, j_count;
  int64_t group, m0, m_count;
};

// fprop, or one phase of dgrad: out[n][m] = bias[m] + Σ over the channels and taps of m's group.
template <typename T>
struct Gather {
  Axis rows, cols;
  int64_t N, groups;
  int64_t channels, produced;  // a group's: contracted, and written
  Images<const T> source;
  int64_t filters;  // where they begin, if packed: [group][produced][channels][taps]
  const T* bias;
  Images<T> out;

  int64_t taps() const { return rows.taps * cols.taps; }
  // Row i of image n of channel m of a block.
  T* out_at(const GatherBlock& at, int64_t n, int64_t i, int64_t m) const {
    return out.at(at.n0 + n, at.group * produced + at.m0 + m, rows.out_first + (at.i0 + i) * rows.out_step,
                  cols.out_first + at.j0 * cols.out_step);
  }
};

// out[m][ch][tap] of the taps of `rows` and `cols`, of filters m0 … m0 + m_count − 1
template <typename T>
void pack_filters(const Filters<T>& f, const Axis& rows, const Axis& cols, int64_t group, int64_t m0, int64_t m_count,
                  int64_t channels, acc_t<T>* out) {
  const int64_t taps = rows.taps * cols.taps;
  if (taps == 0) return;
  const bool whole = f.s == 1 && f.r == cols.taps && rows.filter_step == 1 && cols.filter_step == 1;
  const T* first = f.data + group * f.group + rows.filter_first * f.r + cols.filter_first * f.s;
  if (taps == 1 && f.m == 1) return transpose(first + m0, f.channel, channels, m_count, out, channels);
  constexpr int64_t block = 8;  // channels, whose cache lines stay in L1 while the filters pass
  for (int64_t ch0 = 0; ch0 < channels; ch0 += block)
    for (int64_t m = 0; m < m_count; ++m)
      for (int64_t ch = ch0; ch < min_of(channels, ch0 + block); ++ch) {
        const T* from = first + (m0 + m) * f.m + ch * f.channel;
        acc_t<T>* to = out + (m * channels + ch) * taps;
        if (whole) {
          copy_strided(from, 1, to, taps);
          continue;
        }
        for (int64_t r = 0; r < rows.taps; ++r)
          for (int64_t s = 0; s < cols.taps; ++s)
            *to++ = to_acc(from[r * rows.filter_step * f.r + s * cols.filter_step * f.s]);
      }
}

// Asks for the rows of a plane that a block of neighbouring rows reads.
template <typename T>
FASTCONV_INLINE void prefetch_rows(const T* plane, const Axis& rows, const Strips& strips, int64_t i0, int64_t width) {
  const int64_t first = strips.origin(rows, 0, i0);
  const Inside inside = inside_strip(rows, first, strips.length);
  prefetch_lines<false, 1>(plane + (first + inside.begin) * width, (inside.end - inside.begin) * width);
}

// Rows of `width` columns that read the same columns of the source but `shift` further: copied as one, then the borders
// are cleared. Vectors spill past the end.
template <typename T>
void stage_shifted(const T* plane, const Axis& rows, int64_t row0, int64_t count, int64_t width, int64_t shift,
                   acc_t<T>* out) {
  const auto zero = [](acc_t<T>* to, int64_t length) {
    for (int64_t i = 0; i < length; i += lanes<T>) store(to + i, vec_t<T>{});
  };
  const Inside inside = inside_strip(rows, row0, count);
  const int64_t missing = min_of(width, shift < 0 ? -shift : shift), length = (inside.end - inside.begin) * width;
  const T* from = plane + (row0 + inside.begin) * width;
  acc_t<T>* to = out + inside.begin * width;
  zero(out, inside.begin * width);
  if (missing < width && length > 0)
    copy_strided<true>(from + (shift > 0 ? missing : 0), 1, to + (shift < 0 ? missing : 0), length - missing);
  for (int64_t row = inside.begin; row < inside.end; ++row)
    for (int64_t i = 0; i < missing; ++i) out[row * width + (shift > 0 ? width - missing : 0) + i] = 0;
  zero(out + inside.end * width, (count - inside.end) * width);
}

// Stages channels ch0 … ch0 + ch_count − 1 of n_count images: [channel][image][plane]. A plane holds its strips of rows
// and columns, or, for each column of the filter, [column][row strips][j_count].
template <typename T>
void stage_block(const Images<const T>& source, int64_t n0, int64_t n_count, int64_t ch0, int64_t ch_count,
                 const Axis& rows, const Strips& row_strips, int64_t i0, const Axis& cols, const Strips& col_strips,
                 int64_t j0, int64_t pieces, acc_t<T>* stage) {
  const int64_t piece = row_strips.elements() * col_strips.elements(), plane = pieces * piece;
  const int64_t channels = source.col == 1 ? 1 : ch_count;  // at once
  const bool whole_rows = row_strips.count == 1 && rows.step == 1 && col_strips.count == 1 && cols.step == 1 &&
                          col_strips.length == cols.source;
  for (int64_t ch = 0; ch < ch_count; ch += channels)
    for (int64_t n = 0; n < n_count; ++n)
      for (int64_t s = 0; s < pieces; ++s) {
        Axis shifted = cols;
        shifted.first += s * cols.inc;
        const T* from = source.at(n0 + n, ch0 + ch, 0, 0);
        acc_t<T>* to = stage + (ch * n_count + n) * plane + s * piece;
        if (source.col == 1) {
          const int64_t ahead = s == 0 && ch + 2 < ch_count && j0 == 0 ? 2 * source.channel : 0;
          if (whole_rows) {
            if (ahead) prefetch_rows(from + ahead, rows, row_strips, i0, cols.source);
            stage_shifted(from, rows, row_strips.origin(rows, 0, i0), row_strips.length, cols.source,
                          col_strips.origin(shifted, 0, j0), to);
          } else {
            stage_plane(from, rows, row_strips, i0, shifted, col_strips, j0, to, ahead);
          }
        } else {
          stage_pixels(from, source.col, channels, rows, row_strips, i0, shifted, col_strips, j0, to, n_count * plane);
        }
      }
}

// The sums of a phase: row i of image n, of channel m.
template <typename E>
struct PhaseSums {
  E* data;
  int64_t n, i, m;
  E* at(int64_t image, int64_t row, int64_t channel) const { return data + image * n + row * i + channel * m; }
};

// The sums of a block in c, or where `direct` is set, the result itself. memory: as gather_scratch lays it out.
template <typename T>
PhaseSums<acc_t<T>> gather_phase(const Conv2dProblem& pr, const Conv2dPlan& plan, const Gather<T>& g,
                                 const GatherBlock& at, Lines lines, const DepthBlock& depth_most,
                                 const acc_t<T>* filters, acc_t<T>* memory, acc_t<T>* c, bool* direct) {
  using E = acc_t<T>;
  const Axis &rows = g.rows, &cols = g.cols;
  const Scratch layout = gather_scratch(pr, plan);
  auto* offsets = reinterpret_cast<int64_t*>(memory);
  E *stage = memory + layout.stage, *panel = memory + layout.b;
  const int64_t taps = g.taps(), depth_taps = min_of<int64_t>(max_of<int64_t>(taps, 1), depth_most.taps);
  const bool by_rows = lines == Lines::rows, joined = lines == Lines::block;
  const bool in_place = windows_in_place(pr, plan.direction);
  const Strips row_strips = make_strips(rows, at.i_count);
  const Strips col_strips = by_rows ? make_strips(cols, at.j_count) : Strips{1, at.j_count, 0, 0};
  const int64_t pieces = by_rows ? 1 : cols.taps, piece = row_strips.elements() * col_strips.elements();
  const int64_t plane = pieces * piece, channel_pitch = in_place ? g.source.channel : at.n_count * plane;
  const auto tap_offset = [&](int64_t tap) {
    const int64_t s = tap % cols.taps;
    return row_strips.offset(tap / cols.taps) * col_strips.elements() + (by_rows ? col_strips.offset(s) : s * piece);
  };

  const int64_t line_rows = by_rows ? 1 : at.i_count, image_lines = at.i_count / line_rows;
  const int64_t image = line_rows * at.j_count, line_count = joined ? 1 : at.n_count * image_lines;
  const int64_t line = joined ? at.n_count * image : image;
  const int64_t line_pitch = ceil_div(line, lanes<E>) * lanes<E>, c_row = line_count * line_pitch;
  // The last product writes to the result: a line's pixels are neighbours there.
  *direct = pr.layout == Layout::NCHW && taps * g.channels > 0 && cols.out_step == 1 &&
            (line_rows == 1 || (rows.out_step == 1 && at.j_count == cols.outputs)) && (!joined || at.n_count == 1);
  if (taps * g.channels == 0) fill_zero<T>(c, at.m_count * c_row);

  for (int64_t ch0 = 0; ch0 < g.channels && taps > 0; ch0 += depth_most.channels) {
    const int64_t ch_count = min_of(depth_most.channels, g.channels - ch0);
    if (!in_place)
      stage_block<T>(g.source, at.n0, at.n_count, at.group * g.channels + ch0, ch_count, rows, row_strips, at.i0, cols,
                     col_strips, at.j0, pieces, stage);
    for (int64_t tap0 = 0; tap0 < taps; tap0 += depth_taps) {
      const int64_t tap_count = min_of(depth_taps, taps - tap0);
      for (int64_t tap = 0; tap < tap_count; ++tap)
        for (int64_t ch = 0, from = in_place ? 0 : tap_offset(tap0 + tap); ch < ch_count; ++ch, from += channel_pitch)
          offsets[ch * tap_count + tap] = from;
      const bool last = ch0 + ch_count == g.channels && tap0 + tap_count == taps;
      WindowFilters<E> a{filters + g.filters, g.channels * taps, taps};
      const int64_t filter_group = g.produced * a.rows;                                  // in either order
      if (plan.direction == Direction::dgrad && filters_in_place(pr, plan.direction)) {  // w[contracted][produced][tap]
        a.rows = taps;
        a.channels = g.produced * taps;
      }
      a.data += at.group * filter_group + at.m0 * a.rows + ch0 * a.channels + tap0;
      for (int64_t index = 0; index < line_count; ++index) {
        const int64_t n = index / image_lines, i = index % image_lines;
        WindowLine<E> windows{stage + n * plane + i * col_strips.elements(), image, plane, line};
        if constexpr (std::is_same_v<T, E>) {
          if (in_place)
            windows = {g.source.at(at.n0 + n, at.group * g.channels + ch0, at.i0 + i, at.j0), image, g.source.n, line};
        }
        const WindowOut<T> to{c + index * line_pitch,
                              c_row,
                              ch0 + tap0 > 0,
                              *direct && last ? g.out_at(at, n, i, 0) : nullptr,
                              g.out.channel,
                              line,
                              g.bias ? g.bias + at.group * g.produced + at.m0 : nullptr,
                              pr.relu};
        multiply_windows<T>(at.m_count, windows, ch_count, tap_count, a, offsets, panel, to);
      }
    }
  }
  return {c, by_rows ? at.i_count * line_pitch : joined ? image : line_pitch, by_rows ? line_pitch : at.j_count, c_row};
}

// Writes a block with its bias and ReLU.
template <typename T>
void write_sums(const Conv2dProblem& pr, const Gather<T>& g, const GatherBlock& at, const PhaseSums<acc_t<T>>& sums) {
  using E = acc_t<T>;
  const T* bias = g.bias ? g.bias + at.group * g.produced + at.m0 : nullptr;
  if (g.out.channel == 1) {
    if (bias || pr.relu)
      for (int64_t m = 0; m < at.m_count; ++m)
        for (int64_t i = 0; i < sums.m; i += lanes<E>) {
          E* values = sums.data + m * sums.m + i;
          const vec_t<E> v = load(values) + broadcast<E>(bias ? to_acc(bias[m]) : 0);
          store(values, pr.relu ? relu(v) : v);
        }
    for (int64_t n = 0; n < at.n_count; ++n)
      for (int64_t i = 0; i < at.i_count; ++i)
        transpose(sums.at(n, i, 0), sums.m, at.m_count, at.j_count, g.out_at(at, n, i, 0), g.cols.out_step * g.out.col);
    return;
  }
  // Rows that are neighbours in C and in the result.
  const bool neighbours =
      sums.i == at.j_count && g.rows.out_step == 1 && g.cols.out_step == 1 && at.j_count == g.cols.outputs;
  const int64_t rows_at_once = neighbours ? at.i_count : 1;
  for (int64_t m = 0; m < at.m_count; ++m)
    for (int64_t n = 0; n < at.n_count; ++n)
      for (int64_t i = 0; i < at.i_count; i += rows_at_once)
        write_row(sums.at(n, i, m), rows_at_once * at.j_count, bias ? to_acc(bias[m]) : 0, pr.relu,
                  g.out_at(at, n, i, m), g.cols.out_step);
}

// Writes a block of two phases whose columns alternate.
template <typename T>
void write_phases(const Gather<T>& g, const GatherBlock& at, int64_t cols, const PhaseSums<acc_t<T>>* sums) {
  for (int64_t m = 0; m < at.m_count; ++m)
    for (int64_t n = 0; n < at.n_count; ++n)
      for (int64_t i = 0; i < at.i_count; ++i) {
        T* out = g.out_at(at, n, i, m);
        for (int64_t col = 0; col < cols; col += 64 / int64_t(sizeof(T)))  // so that the stores find their lines
          __builtin_prefetch(out + g.out.channel + col, 1);
        write_interleaved(sums[0].at(n, i, m), sums[1].at(n, i, m), cols, out);
      }
}

// fprop, or all phases of dgrad: gather_of(a, b) describes one. They are tasks of one parallel region.
template <typename T, typename GatherOf>
void gather_pixels(const Conv2dProblem& pr, const Conv2dPlan& plan, const GatherOf& gather_of, const acc_t<T>* filters,
                   char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  const Phases phases = phases_of(pr, plan.direction);
  const Axis &most_rows = phases.largest_rows, &most_cols = phases.largest_cols;
  const int64_t channels = contracted_channels(pr, plan.direction), produced = produced_channels(pr, plan.direction);
  const PixelBlock block = gather_block(pr.N, most_rows.outputs, most_cols.outputs, plan.tile_n);
  const DepthBlock depth_most = depth_block(channels, most_rows.taps * most_cols.taps, plan.tile_k);
  const Lines lines = choose_lines(most_rows, most_cols, block, produced);
  const Scratch layout = gather_scratch(pr, plan);
  const int64_t at_once = phases_at_once(pr, plan.direction);
  const int64_t n_blocks = ceil_div(pr.N, block.n), m_blocks = ceil_div(produced, plan.tile_m);
  const int64_t i_blocks = ceil_div(most_rows.outputs, block.i), j_blocks = ceil_div(most_cols.outputs, block.j);
  const int64_t phase_tasks = n_blocks * i_blocks * j_blocks * pr.groups * m_blocks;
  for_each_task(parallel, phases.rows * phases.cols / at_once * phase_tasks, [&](int worker, int64_t task) {
    const int64_t phase = task / phase_tasks * at_once, pixel_task = task % phase_tasks / m_blocks / pr.groups;
    const int64_t m0 = task % m_blocks * plan.tile_m, i0 = pixel_task / j_blocks % i_blocks * block.i;
    const int64_t j0 = pixel_task % j_blocks * block.j, n0 = pixel_task / j_blocks / i_blocks * block.n;
    GatherBlock at{n0,
                   min_of(block.n, pr.N - n0),
                   i0,
                   0,
                   j0,
                   0,
                   task / m_blocks % pr.groups,
                   m0,
                   min_of<int64_t>(plan.tile_m, produced - m0)};
    E* memory = reinterpret_cast<E*>(scratch + worker * plan.scratch_bytes);
    E* c = memory + layout.c;
    PhaseSums<E> sums[2] = {};
    int64_t written = 0;  // columns
    for (int64_t b = 0; b < at_once; ++b) {
      const Gather<T> g = gather_of(phase / phases.cols, phase % phases.cols + b);
      at.i_count = min_of(block.i, g.rows.outputs - i0);
      at.j_count = min_of(block.j, g.cols.outputs - j0);
      if (at.i_count <= 0) return;  // a phase smaller than the largest
      if (at.j_count <= 0) {        // the last column is of the first phase
        sums[b] = sums[0];
        break;
      }
      bool direct;
      sums[b] = gather_phase(pr, plan, g, at, lines, depth_most, filters, memory, c, &direct);
      if (at_once == 1 && !direct) write_sums(pr, g, at, sums[0]);
      written += at.j_count;
      c += at.m_count * sums[b].m;
    }
    if (at_once > 1) write_phases(gather_of(phase / phases.cols, phase % phases.cols), at, written, sums);
  });
}

// Packs the filters of every phase.
template <typename T, typename GatherOf>
void pack_all_filters(const Conv2dProblem& pr, Direction direction, const GatherOf& gather_of, const Filters<T>& from,
                      acc_t<T>* out, const Parallel& parallel) {
  constexpr int64_t block = 16;
  const Phases phases = phases_of(pr, direction);
  const int64_t produced = produced_channels(pr, direction), blocks = ceil_div(produced, block);
  for_each_task(parallel, phases.rows * phases.cols * pr.groups * blocks, [&](int, int64_t task) {
    const int64_t phase = task / blocks / pr.groups, group = task / blocks % pr.groups, m0 = task % blocks * block;
    const Gather<T> g = gather_of(phase / phases.cols, phase % phases.cols);
    pack_filters(from, g.rows, g.cols, group, m0, min_of(block, produced - m0), g.channels,
                 out + g.filters + (group * produced + m0) * g.channels * g.taps());
  });
}

template <typename T>
void fprop_pixels(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* x, const T* w, const T* bias, T* y,
                  void* workspace, char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  const auto gather_of = [&](int64_t, int64_t) {
    return Gather<T>{fprop_rows(pr),
                     fprop_cols(pr),
                     pr.N,
                     pr.groups,
                     pr.channels_per_group(),
                     pr.filters_per_group(),
                     images(x, pr.layout, pr.C, pr.H, pr.W),
                     0,
                     bias,
                     images(y, pr.layout, pr.K, pr.P, pr.Q)};
  };
  const bool in_place = filters_in_place(pr, Direction::fprop);
  if (!in_place)
    pack_all_filters(pr, Direction::fprop, gather_of, filters(w, pr, Direction::fprop), (E*)workspace, parallel);
  gather_pixels<T>(pr, plan, gather_of, in_place ? (const E*)w : (const E*)workspace, scratch, parallel);
}

template <typename T>
void dgrad_pixels(const Conv2dProblem& pr, const Conv2dPlan& plan, const T* dy, const T* w, T* dx, void* workspace,
                  char* scratch, const Parallel& parallel) {
  using E = acc_t<T>;
  const auto gather_of = [&](int64_t a, int64_t b) {
    return Gather<T>{dgrad_rows(pr, a),
                     dgrad_cols(pr, b),
                     pr.N,
                     pr.groups,
                     pr.filters_per_group(),
                     pr.channels_per_group(),
                     images(dy, pr.layout, pr.K, pr.P, pr.Q),
                     taps_before(pr, a, b) * pr.C * pr.filters_per_group(),
                     nullptr,
                     images(dx, pr.layout, pr.C, pr.H, pr.W)};
  };
  const bool in_place = filters_in_place(pr, Direction::dgrad);
  if (!in_place)
    pack_all_filters(pr, Direction::dgrad, gather_of, filters(w, pr, Direction::dgrad), (E*)workspace, parallel);
  gather_pixels<T>(pr, plan, gather_of, in_place ? (const E*)w : (const E*)workspace, scratch, parallel);
}

}  // namespace
}  // namespace fastconv::cpu
