// Implicit GEMM on tensor cores: the products of conv2d_im2col.cu without its matrix of windows, whose elements are
// looked up in x while a tile of them is copied to shared memory. In NHWC, for one group:
//
//   fprop  y[m][n]  = Σ_k windows(m, k) · w[n][k] + bias[n]    m = (n, p, q),  n a filter,   k = (r, s, c)
//   dgrad  dx[m][n] = Σ_k windows'(m, k) · w(k, n)             m = (n, h, w),  n a channel,  k = (r, s, filter)
//   wgrad  dw[m][n] = Σ_k dy[k][m] · windows(k, n)             m a filter,     n = (r, s, c), k = (n, p, q)
//
// windows' are of dy: dgrad is a convolution of dy itself, one for each phase of the strides (plan/conv2d_mma.h), with
// the taps that meet the phase. A problem in NCHW is copied to NHWC first, and its result back. Where channels are too
// few or too odd for wide loads, copies have more of them, all zero (MmaOperands).
//
// A block computes a tile of results in steps of 64 bytes of the contraction; the copies of the next three steps are
// under way while one is multiplied. What is split goes to partial sums, which are added in order. wgrad's bias
// gradient is one more product, of dy with ones. The kernel is in conv2d_mma.cuh, what is multiplied how in
// mma_tile.cuh.
#include "../plan/conv2d_mma.h"
#include "conv2d_mma_arguments.cuh"
#include "ordered_sum.cuh"
#include "pad_channels.cuh"
#include "transpose.cuh"

namespace fastconv::cuda {
namespace {

WindowAxis fprop_axis(int64_t size, int64_t stride, int64_t pad, int64_t dilation) {
  return {int(size), int(stride), int(-pad), int(dilation)};
}

// The largest number of bytes that divides the address of elements and the distances between those that are loaded.
template <typename T>
int piece_of(const void* data, int64_t extent, int64_t pitch) {
  for (int piece : {16, 8, 4})
    if (piece >= int(sizeof(T)) && is_aligned(data, piece) && extent * sizeof(T) % piece == 0 &&
        pitch * sizeof(T) % piece == 0)
      return piece;
  return sizeof(T);
}

// A call: the normalized problem, and where in the workspace things lie.
struct Call {
  Conv2dProblem p;
  const Conv2dPlan& plan;
  Stream stream;
  MmaOperands operands;
  MmaWorkspace at;
  char* workspace;

  Call(const Conv2dProblem& problem, const Conv2dPlan& plan, void* workspace, Stream stream)
      : p(normalized(problem)),
        plan(plan),
        stream(stream),
        operands(mma_operands(p, plan.direction)),
        at(mma_workspace(p, plan.direction, plan.split)),
        workspace(static_cast<char*>(workspace)) {}

  // x or y, of `images` with so many pixels: into its copy, or back from it.
  template <typename T, bool back>
  Status copy_images(T* tensor, T* copy, int64_t pixels, int64_t channels, int64_t padded) const {
    const int64_t all = p.groups * channels, wide = p.groups * padded;
    if (tensor == copy) return {};
    if (channels == padded)
      return back ? transpose(copy, tensor, p.N, pixels, all, stream)
                  : transpose(tensor, copy, p.N, all, pixels, stream);
    const bool nchw = p.layout == Layout::NCHW;
    PadChannels s = {};
    s.outer = p.N, s.inner = s.inner_end = p.groups, s.pixels = pixels;
    s.channels = int(channels), s.padded = int(padded);
    s.outer_stride = all * pixels, s.inner_stride = nchw ? channels * pixels : channels;
    s.pixel_stride = nchw ? 1 : all, s.channel_stride = nchw ? pixels : 1;
    s.padded_outer = wide * pixels, s.padded_inner = padded, s.padded_pixel = wide;
    return pad_channels<T, back>(s, back ? copy : tensor, back ? tensor : copy, stream);
  }
  template <typename T, bool back>
  Status copy_filters(T* tensor, T* copy) const {
    const int64_t channels = p.channels_per_group(), filters = p.filters_per_group(), taps = p.R * p.S;
    const int64_t padded = operands.w_channels;
    if (tensor == copy) return {};
    if (channels == padded && filters == operands.w_filters)
      return back ? transpose(copy, tensor, p.K, taps, channels, stream)
                  : transpose(tensor, copy, p.K, channels, taps, stream);
    const bool nchw = p.layout == Layout::NCHW;
    PadChannels s = {};
    s.outer = p.groups, s.inner = operands.w_filters, s.inner_end = filters, s.pixels = taps;
    s.channels = int(channels), s.padded = int(padded);
    s.outer_stride = filters * channels * taps, s.inner_stride = channels * taps;
    s.pixel_stride = nchw ? 1 : channels, s.channel_stride = nchw ? taps : 1;
    s.padded_outer = operands.w_filters * taps * padded, s.padded_inner = taps * padded, s.padded_pixel = padded;
    return pad_channels<T, back>(s, back ? copy : tensor, back ? tensor : copy, stream);
  }

  ConvMma arguments(int depth) const {
    const MmaProduct product = mma_product(p, plan.direction);
    ConvMma g = {};
    g.m = int(product.m), g.n = int(product.n), g.k = int(product.k);
    g.groups = int(product.groups), g.phases = int(product.phases);
    g.splits = plan.split;
    g.k_per_split = int(round_up(pieces(product.k, plan.split), depth));
    g.tiles_m = int(pieces(product.m, plan.tile_m)), g.tiles_n = int(pieces(product.n, plan.tile_n));
    g.windows.h = fprop_axis(p.H, p.stride_h, p.pad_h, p.dilation_h);
    g.windows.w = fprop_axis(p.W, p.stride_w, p.pad_w, p.dilation_w);
    g.windows.pitch = p.groups * operands.x_channels;
    g.windows.image = Divisor(std::max<int64_t>(p.P * p.Q, 1)), g.windows.row = Divisor(std::max<int64_t>(p.Q, 1));
    g.windows.filter_row = Divisor(p.S);
    g.windows.channels = Divisor(std::max<int64_t>(operands.x_channels, 1));
    if (plan.split > 1) g.sums = workspace + at.sums;
    if (plan.direction == Direction::dgrad) set_phases(g);
    return g;
  }

  void set_phases(ConvMma& g) const {
    const int64_t common_h = std::gcd(p.stride_h, p.dilation_h), common_w = std::gcd(p.stride_w, p.dilation_w);
    const int64_t phases_h = std::clamp<int64_t>(p.H, 1, p.stride_h);
    g.phases_w = int(std::clamp<int64_t>(p.W, 1, p.stride_w));
    g.H = int(p.H), g.W = int(p.W), g.R = int(p.R), g.S = int(p.S);
    g.stride_h = int(p.stride_h), g.stride_w = int(p.stride_w), g.pad_h = int(p.pad_h), g.pad_w = int(p.pad_w);
    g.dilation_h = int(p.dilation_h), g.dilation_w = int(p.dilation_w);
    g.tap_step_h = int(p.stride_h / common_h), g.tap_step_w = int(p.stride_w / common_w);
    g.windows.h = {int(p.P), 1, 0, int(-p.dilation_h / common_h)};
    g.windows.w = {int(p.Q), 1, 0, int(-p.dilation_w / common_w)};
    g.windows.pitch = p.groups * operands.y_filters;
    g.windows.row = Divisor(pieces(p.W, g.phases_w));
    g.windows.image = Divisor(pieces(p.H, phases_h) * pieces(p.W, g.phases_w));
    g.windows.filter_row = Divisor(pieces(p.S, g.tap_step_w));
    g.windows.channels = Divisor(operands.y_filters);
  }

  // out = bias + the partial sums of its rows, in order.
  template <typename T>
  Status add_splits(const ConvMma& g) const {
    if (!g.sums) return {};
    OrderedSum s = {};
    s.partial = g.sums, s.splits = g.splits;
    s.batches = g.groups, s.m = g.m, s.n = g.n, s.pitch = round_up(g.n, 4);
    s.out = g.out, s.out_m.stride = g.out_pitch, s.out_n.stride = 1;
    s.out_batch_stride = plan.direction == Direction::wgrad ? int64_t(g.m) * g.n : g.n;
    s.bias = g.bias, s.bias_batch_stride = g.n, s.bias_n_stride = 1;
    s.relu = g.relu;
    return ordered_sum<T>(s, stream);
  }

  // Computes one of x, w and y (or their gradients) from the other two, of wgrad also db.
  template <typename Math, typename T>
  Status run(T* x, T* w, T* y, const T* bias, T* db) const {
    const bool fprop = plan.direction == Direction::fprop, dgrad = plan.direction == Direction::dgrad,
               wgrad = plan.direction == Direction::wgrad;
    const auto place = [&](T* tensor, bool copies, int64_t begin) {
      return copies ? reinterpret_cast<T*>(workspace + begin) : tensor;
    };
    T* const x_used = place(x, operands.copies_x, at.x);
    T* const w_used = place(w, operands.copies_w, at.w);
    T* const y_used = place(y, operands.copies_y, at.y);
    const int64_t channels = p.channels_per_group(), filters = p.filters_per_group();
    if (!dgrad)
      if (Status s = copy_images<T, false>(x, x_used, p.H * p.W, channels, operands.x_channels); !s.ok()) return s;
    if (!wgrad)
      if (Status s = copy_filters<T, false>(w, w_used); !s.ok()) return s;
    if (!fprop)
      if (Status s = copy_images<T, false>(y, y_used, p.P * p.Q, filters, operands.y_filters); !s.ok()) return s;

    ConvMma g = arguments(64 / int(sizeof(T)));
    g.windows.data = dgrad ? y_used : x_used;
    g.other = wgrad ? y_used : w_used;
    g.out = fprop ? y_used : dgrad ? x_used : w_used;
    g.bias = bias, g.relu = fprop && p.relu, g.db = db;
    if (db && g.sums) g.row_sums = workspace + at.row_sums;
    g.out_pitch = fprop ? p.K : dgrad ? p.C : g.n;
    // The rows of w are filters, or of dgrad their taps; those of dy are pixels.
    g.other_row = fprop ? g.k : dgrad ? operands.w_channels : p.groups * operands.y_filters;
    g.other_group = fprop   ? filters * g.k
                    : dgrad ? operands.w_filters * p.R * p.S * operands.w_channels
                            : operands.y_filters;
    const int windows = piece_of<T>(g.windows.data, g.windows.channels.d, g.windows.pitch);
    const int other = piece_of<T>(g.other, wgrad ? operands.y_filters : g.other_row, g.other_row);
    g.piece_a = wgrad ? other : windows, g.piece_b = wgrad ? windows : other;
    g.out_pairs = is_aligned(g.out, 2 * sizeof(T)) && g.n % 2 == 0 && g.out_pitch % 2 == 0;
    if (Status s = launch_conv2d_mma<Math>(g, plan, stream); !s.ok()) return s;
    if (Status s = add_splits<T>(g); !s.ok()) return s;
    if (g.row_sums)
      if (Status s = ordered_sum<T>(g.row_sums, g.splits, p.K, db, stream); !s.ok()) return s;

    if (dgrad) return copy_images<T, true>(x, x_used, p.H * p.W, channels, channels);
    if (wgrad) return copy_filters<T, true>(w, w_used);
    return copy_images<T, true>(y, y_used, p.P * p.Q, filters, filters);
  }
};

// The tensors as they come, of which the kernel writes the one that is asked for.
Status run(const Conv2dProblem& p, const Conv2dPlan& plan, const void* x, const void* w, const void* y,
           const void* bias, void* db, void* workspace, Stream stream) {
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto tensor = [](const void* data) { return static_cast<T*>(const_cast<void*>(data)); };
    const Call call(p, plan, workspace, stream);
    const auto as = [&](auto math) {
      return call.run<decltype(math)>(tensor(x), tensor(w), tensor(y), static_cast<const T*>(bias), tensor(db));
    };
    if constexpr (std::is_same_v<T, float>)
      if (p.allow_tf32) return as(Tf32{});
    return as(element);
  });
}

}  // namespace

Status conv2d_mma_fprop(const Conv2dProblem& p, const Conv2dPlan& plan, const void* x, const void* w, const void* bias,
                        void* y, void* workspace, Stream stream) {
  return p.y_elements() == 0 ? Status{} : run(p, plan, x, w, y, bias, nullptr, workspace, stream);
}

Status conv2d_mma_dgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* w, void* dx,
                        void* workspace, Stream stream) {
  return p.x_elements() == 0 ? Status{} : run(p, plan, dx, w, dy, nullptr, nullptr, workspace, stream);
}

Status conv2d_mma_wgrad(const Conv2dProblem& p, const Conv2dPlan& plan, const void* dy, const void* x, void* dw,
                        void* db, void* workspace, Stream stream) {
  return p.w_elements() == 0 ? Status{} : run(p, plan, x, dw, dy, nullptr, db, workspace, stream);
}

}  // namespace fastconv::cuda
