#include "problem.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace fastconv {
namespace {

// torch's RuntimeError, ValueError and IndexError are std::runtime_error, std::invalid_argument and std::out_of_range.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

int64_t multiply(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) fail("fastconv: the sizes overflow a 64-bit integer");
  return product;
}

int64_t add(int64_t a, int64_t b) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) fail("fastconv: the sizes overflow a 64-bit integer");
  return sum;
}

int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (int64_t factor : factors) result = multiply(result, factor);
  return result;
}

struct Pair {
  int64_t h, w;
};

Pair conv_pair(const char* what, const Sizes& values) {
  if (values.size() == 1) return {values[0], values[0]};
  if (values.size() != 2)
    fail("expected ", what, " to be a single integer value or a list of 2 values to match the convolution dimensions, ",
         "but got ", what, "=", format_sizes(values));
  return {values[0], values[1]};
}

Pair pool_pair(const char* op, const char* text, const Sizes& values) {
  if (values.size() == 1) return {values[0], values[0]};
  if (values.size() != 2) fail(op, ": ", text);
  return {values[0], values[1]};
}

// What both kinds of pooling take: window, stride and padding as pairs, with torch's texts.
struct PoolArguments {
  Pair window, step, pad;
};
PoolArguments pool_arguments(const char* op, const Sizes& kernel_size, const Sizes& stride, const Sizes& padding) {
  PoolArguments a{};
  a.window = pool_pair(op, "kernel_size must either be a single int, or a tuple of two ints", kernel_size);
  a.step = stride.empty()
               ? a.window
               : pool_pair(op, "stride must either be omitted, a single int, or a tuple of two ints", stride);
  a.pad = pool_pair(op, "padding must either be a single int, or a tuple of two ints", padding);
  return a;
}

int64_t effective_kernel(int64_t kernel, int64_t dilation) { return add(multiply(dilation, kernel - 1), 1); }

// Elements past the last one that any window reads. The last window may reach into the padding, so that it is another
// window, or another element of the kernel, that reads the furthest.
int64_t unread(int64_t size, int64_t kernel, int64_t out, int64_t stride, int64_t pad, int64_t dilation) {
  int64_t last = -1;
  for (int64_t r = 0; r < kernel; ++r) {
    const int64_t room = size - 1 + pad - r * dilation;
    if (room >= 0) last = std::max(last, std::min(room / stride, out - 1) * stride + r * dilation - pad);
  }
  return size - 1 - last;
}

// torch's pooling_output_shape: with ceil_mode the last window must still start inside the input or its left padding.
int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, bool ceil_mode) {
  const int64_t room = add(add(size, multiply(2, pad)), -effective_kernel(kernel, dilation));
  const int64_t rounded = add(room, ceil_mode ? stride - 1 : 0);
  const int64_t floored = rounded >= 0 ? rounded / stride : -((-rounded + stride - 1) / stride);
  int64_t out = floored + 1;
  if (ceil_mode && multiply(out - 1, stride) >= size + pad) --out;
  return out;
}

// torch's pool2d_shape_check, but for the output's size.
void check_pool(const Sizes& x_size, Pair window, Pair step, Pair pad, Pair spread) {
  if (x_size.size() != 4) fail("non-empty 3D or 4D (batch mode) tensor expected for input");
  if (step.h == 0 || step.w == 0) fail("stride should not be zero");
  for (int64_t size : {pad.h, pad.w})
    if (size < 0) fail("pad must be non-negative, but got pad: ", size);
  if (window.h <= 0 || window.w <= 0)
    fail("kernel size should be greater than zero, but got kH: ", window.h, " kW: ", window.w);
  if (step.h < 0 || step.w < 0) fail("stride should be greater than zero, but got dH: ", step.h, " dW: ", step.w);
  if (spread.h <= 0 || spread.w <= 0)
    fail("dilation should be greater than zero, but got dilationH: ", spread.h, " dilationW: ", spread.w);
  if (x_size[1] == 0 || x_size[2] == 0 || x_size[3] == 0)
    fail("Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got:",
         format_sizes(x_size));
  const Pair kernel{effective_kernel(window.h, spread.h), effective_kernel(window.w, spread.w)};
  const auto check_pad = [](int64_t pad_size, int64_t effective, int64_t size, int64_t dilation_size) {
    if (pad_size > effective / 2)
      fail("pad should be at most half of effective kernel size, but got pad=", pad_size, ", kernel_size=", size,
           " and dilation=", dilation_size);
  };
  check_pad(pad.h, kernel.h, window.h, spread.h);
  check_pad(pad.w, kernel.w, window.w, spread.w);
  if (pad.h > window.h / 2 || pad.w > window.w / 2)
    fail("pad should be smaller than or equal to half of kernel size, but got padW = ", pad.w, ", padH = ", pad.h,
         ", kW = ", window.w, ", kH = ", window.h);
}

void check_pooled_size(int64_t C, int64_t H, int64_t W, int64_t P, int64_t Q) {
  if (P < 1 || Q < 1)
    fail("Given input size: (", C, "x", H, "x", W, "). Calculated output size: (", C, "x", P, "x", Q,
         "). Output size is too small");
}

}  // namespace

Conv2dProblem make_conv2d_problem(const Sizes& x_size, const Sizes& w_size, const std::optional<Sizes>& bias_size,
                                  const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                                  DType dtype, Layout layout, bool allow_tf32) {
  if (x_size.size() != 4)
    fail("Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ", format_sizes(x_size));
  if (w_size.size() != 4) {
    if (w_size.size() < 3) fail("weight should have at least three dimensions");
    for (const auto& [what, values] : {std::pair{"stride", &stride}, {"padding", &padding}, {"dilation", &dilation}})
      if (values->size() != 1 && values->size() != w_size.size() - 2)
        fail("expected ", what, " to be a single integer value or a list of ", w_size.size() - 2,
             " values to match the convolution dimensions, but got ", what, "=", format_sizes(*values));
    fail("Expected ", w_size.size(), "-dimensional input for ", w_size.size(), "-dimensional weight ",
         format_sizes(w_size), ", but got 4-dimensional input of size ", format_sizes(x_size), " instead");
  }
  const Pair step = conv_pair("stride", stride);
  const Pair pad = conv_pair("padding", padding);
  const Pair spread = conv_pair("dilation", dilation);
  if (pad.h < 0 || pad.w < 0) fail("negative padding is not supported");
  if (step.h <= 0 || step.w <= 0) fail("non-positive stride is not supported");
  if (spread.h < 0 || spread.w < 0) fail("dilation should be greater than zero");
  if (groups <= 0) fail("non-positive groups is not supported");

  Conv2dProblem p{};
  p.N = x_size[0], p.C = x_size[1], p.H = x_size[2], p.W = x_size[3];
  p.K = w_size[0], p.R = w_size[2], p.S = w_size[3];
  if (p.K < groups)
    fail("Given groups=", groups, ", expected weight to be at least ", groups,
         " at dimension 0, but got weight of size ", format_sizes(w_size), " instead");
  if (p.K % groups != 0)
    fail("Given groups=", groups, ", expected weight to be divisible by ", groups,
         " at dimension 0, but got weight of size [", format_sizes(w_size), "] instead");
  const int64_t expected_channels = multiply(w_size[1], groups);
  if (p.C != expected_channels)
    fail("Given groups=", groups, ", weight of size ", format_sizes(w_size), ", expected input", format_sizes(x_size),
         " to have ", expected_channels, " channels, but got ", p.C, " channels instead");
  if (bias_size && (bias_size->size() != 1 || (*bias_size)[0] != p.K))
    fail("Given weight of size ", format_sizes(w_size), ", expected bias to be 1-dimensional with ", p.K,
         " elements, but got bias of size ", format_sizes(*bias_size), " instead");
  if (spread.h == 0 || spread.w == 0) fail("non-positive dilation is not supported");
  if (p.R == 0 || p.S == 0) fail("fastconv: the kernel has no elements, weight is of size ", format_sizes(w_size));

  const int64_t kernel_h = effective_kernel(p.R, spread.h), kernel_w = effective_kernel(p.S, spread.w);
  const int64_t padded_h = add(p.H, multiply(2, pad.h)), padded_w = add(p.W, multiply(2, pad.w));
  if (padded_h < kernel_h || padded_w < kernel_w)
    fail("Calculated padded input size per channel: (", padded_h, " x ", padded_w, "). Kernel size: (", kernel_h, " x ",
         kernel_w, "). Kernel size can't be greater than actual input size");
  if ((p.H == 0 || p.W == 0) && p.N != 0 && p.C != 0)
    fail("Only zero batch or zero channel inputs are supported, but got input shape: ", format_sizes(x_size));

  // A stride beyond the padded image leaves one window, as its size does, and sums with the latter cannot overflow.
  p.stride_h = std::min(step.h, std::max<int64_t>(padded_h, 1)),
  p.stride_w = std::min(step.w, std::max<int64_t>(padded_w, 1));
  p.pad_h = pad.h, p.pad_w = pad.w;
  p.dilation_h = spread.h, p.dilation_w = spread.w;
  p.groups = groups, p.dtype = dtype, p.layout = layout;
  p.allow_tf32 = allow_tf32 && dtype == DType::float32;
  p.P = (padded_h - kernel_h) / step.h + 1;
  p.Q = (padded_w - kernel_w) / step.w + 1;
  product({p.N, p.K, p.P, p.Q, element_bytes(dtype)});  // throws where the output cannot be addressed
  return p;
}

MaxPool2dProblem make_max_pool2d_problem(const Sizes& x_size, const Sizes& kernel_size, const Sizes& stride,
                                         const Sizes& padding, const Sizes& dilation, bool ceil_mode, DType dtype,
                                         Layout layout) {
  const auto [window, step, pad] = pool_arguments("max_pool2d", kernel_size, stride, padding);
  if (dilation.size() != 1 && dilation.size() != 2)
    fail("max_pool2d: dilation must be either a single int, or a tuple of two ints");
  const Pair spread = pool_pair("max_pool2d", "", dilation);
  check_pool(x_size, window, step, pad, spread);

  MaxPool2dProblem p{};
  p.N = x_size[0], p.C = x_size[1], p.H = x_size[2], p.W = x_size[3];
  p.R = window.h, p.S = window.w;
  p.stride_h = step.h, p.stride_w = step.w;
  p.pad_h = pad.h, p.pad_w = pad.w;
  p.dilation_h = spread.h, p.dilation_w = spread.w;
  p.dtype = dtype, p.layout = layout;
  p.P = pooled_size(p.H, p.R, p.stride_h, p.pad_h, p.dilation_h, ceil_mode);
  p.Q = pooled_size(p.W, p.S, p.stride_w, p.pad_w, p.dilation_w, ceil_mode);
  check_pooled_size(p.C, p.H, p.W, p.P, p.Q);
  const int64_t window_elements = multiply(p.R, p.S), most = int64_t{1} << 32;
  p.offset_bytes = window_elements <= 256 ? 1 : window_elements <= 65536 ? 2 : 4;
  if (window_elements > most) {  // without the rows and columns that are outside of the image wherever the window is
    p.R = std::min(p.R, (p.H + p.pad_h) / p.dilation_h + 1);
    p.S = std::min(p.S, (p.W + p.pad_w) / p.dilation_w + 1);
    if (multiply(p.R, p.S) > most) fail("max_pool2d: the window has more than 2^32 elements");
  }
  product({p.N, p.C, p.P, p.Q, 8});
  return p;
}

AvgPool2dProblem make_avg_pool2d_problem(const Sizes& x_size, const Sizes& kernel_size, const Sizes& stride,
                                         const Sizes& padding, bool ceil_mode, bool count_include_pad,
                                         std::optional<int64_t> divisor, DType dtype, Layout layout) {
  const auto [window, step, pad] = pool_arguments("avg_pool2d", kernel_size, stride, padding);
  if (divisor && *divisor == 0) fail("divisor must be not zero");
  check_pool(x_size, window, step, pad, {1, 1});

  AvgPool2dProblem p{};
  p.N = x_size[0], p.C = x_size[1], p.H = x_size[2], p.W = x_size[3];
  p.R = window.h, p.S = window.w;
  p.stride_h = step.h, p.stride_w = step.w;
  p.pad_h = pad.h, p.pad_w = pad.w;
  p.count_include_pad = count_include_pad, p.divisor = divisor.value_or(0);
  p.dtype = dtype, p.layout = layout;
  p.P = pooled_size(p.H, p.R, p.stride_h, p.pad_h, 1, ceil_mode);
  p.Q = pooled_size(p.W, p.S, p.stride_w, p.pad_w, 1, ceil_mode);
  check_pooled_size(p.C, p.H, p.W, p.P, p.Q);
  multiply(p.R, p.S);
  product({p.N, p.C, p.P, p.Q, element_bytes(dtype)});
  return p;
}

AvgPool2dProblem make_adaptive_avg_pool2d_problem(const Sizes& x_size, const Sizes& output_size, DType dtype,
                                                  Layout layout) {
  if (output_size.size() != 2) fail("adaptive_avg_pool2d: output_size must be 2");
  if (output_size[0] < 0 || output_size[1] < 0)
    fail("adaptive_avg_pool2d: elements of output_size must be greater than or equal to 0 but received {",
         output_size[0], ", ", output_size[1], "}");
  if (x_size.size() != 4) fail("adaptive_avg_pool2d(): Expected 3D or 4D tensor, but got ", format_sizes(x_size));
  AvgPool2dProblem p{};
  p.N = x_size[0], p.C = x_size[1], p.H = x_size[2], p.W = x_size[3];
  p.P = output_size[0], p.Q = output_size[1];
  for (size_t dim : {2, 3})  // a single output of nothing is the mean of nothing, a NaN
    if (x_size[dim] == 0 && (p.P != 1 || p.Q != 1))
      fail("adaptive_avg_pool2d(): Expected input to have non-zero size for non-batch dimensions, but input has sizes ",
           format_sizes(x_size), " with dimension ", dim, " being empty");
  p.adaptive_h = p.P > 0 && p.H % p.P != 0;
  p.adaptive_w = p.Q > 0 && p.W % p.Q != 0;
  p.R = p.P > 0 ? p.H / p.P : 1, p.S = p.Q > 0 ? p.W / p.Q : 1;
  p.stride_h = std::max<int64_t>(p.R, 1), p.stride_w = std::max<int64_t>(p.S, 1);
  if (p.adaptive_h) p.R += 2;  // a window can take parts of a row at both ends, and then takes both rows
  if (p.adaptive_w) p.S += 2;
  p.dtype = dtype, p.layout = layout;
  for (int64_t out : {p.P, p.Q}) add(out, 1);
  multiply(p.P + 1, p.H), multiply(p.Q + 1, p.W);  // where the last window ends
  product({p.N, p.C, p.P, p.Q, element_bytes(dtype)});
  return p;
}

AvgPool2dProblem AvgPool2dProblem::normalized() const {
  AvgPool2dProblem p = *this;
  if (C == 1) p.layout = Layout::NCHW;
  if (p.layout == Layout::NCHW && is_global()) {
    p.W = p.S = H * W;
    p.H = p.R = 1;
  }
  if (P == 1) p.stride_h = p.R;
  if (Q == 1) p.stride_w = p.S;
  p.stride_h = std::clamp<int64_t>(p.stride_h, 1, p.H + 2 * pad_h + 1);
  p.stride_w = std::clamp<int64_t>(p.stride_w, 1, p.W + 2 * pad_w + 1);
  return p;
}

BatchNormProblem make_batch_norm_problem(const Sizes& x_size, DType dtype, Layout layout) {
  if (x_size.size() < 2)
    fail("fastconv: batch_norm takes (N, C) or (N, C, *), but got input of size: ", format_sizes(x_size));
  BatchNormProblem p{};
  p.N = x_size[0], p.C = x_size[1], p.L = 1;
  for (size_t i = 2; i < x_size.size(); ++i) p.L = multiply(p.L, x_size[i]);
  p.dtype = dtype, p.layout = layout;
  return p;
}

int64_t Conv2dProblem::unread_rows() const { return unread(H, R, P, stride_h, pad_h, dilation_h); }
int64_t Conv2dProblem::unread_cols() const { return unread(W, S, Q, stride_w, pad_w, dilation_w); }

const char* name(DType dtype) {
  switch (dtype) {
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::float16: return "float16";
    case DType::bfloat16: return "bfloat16";
  }
  return "";
}

const char* name(Layout layout) { return layout == Layout::NCHW ? "NCHW" : "NHWC"; }

int64_t element_bytes(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

std::string format_sizes(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

std::string describe(const Conv2dProblem& p) {
  std::ostringstream text;
  text << p.N << "x" << p.C << "x" << p.H << "x" << p.W << " * " << p.K << "x" << p.channels_per_group() << "x" << p.R
       << "x" << p.S << " -> " << p.N << "x" << p.K << "x" << p.P << "x" << p.Q << ", stride (" << p.stride_h << ", "
       << p.stride_w << "), padding (" << p.pad_h << ", " << p.pad_w << "), dilation (" << p.dilation_h << ", "
       << p.dilation_w << "), groups " << p.groups << ", " << name(p.dtype) << ", " << name(p.layout);
  return text.str();
}

}  // namespace fastconv
