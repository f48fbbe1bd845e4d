// What an operation is asked to compute: sizes, layout and dtype, validated and free of overflow.
// Every layer (ops, plans, kernels, introspection) speaks of a call through one of these structs.
//
// Names are the field's: x is N×C×H×W, w is K×(C/groups)×R×S, y is N×K×P×Q.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fastconv {

enum class DType : uint8_t { float32, float64, float16, bfloat16 };

// Memory order of x, y and w. NCHW: x[n][c][h][w], w[k][c][r][s]; NHWC: x[n][h][w][c], w[k][r][s][c].
enum class Layout : uint8_t { NCHW, NHWC };

using Sizes = std::vector<int64_t>;

struct Conv2dProblem {
  int64_t N, C, H, W;  // x
  int64_t K, R, S;     // w
  int64_t P, Q;        // y: P = floor((H − ((R−1)·dilation_h + 1) + 2·pad_h) / stride_h) + 1
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;
  int64_t groups;
  DType dtype;
  Layout layout;
  bool allow_tf32;    // CUDA float32 only
  bool relu = false;  // fprop: y = max(x ∗ w + bias, 0), where NaN stays NaN

  int64_t channels_per_group() const { return C / groups; }
  int64_t filters_per_group() const { return K / groups; }
  int64_t x_elements() const { return N * C * H * W; }
  int64_t w_elements() const { return K * (C / groups) * R * S; }
  int64_t y_elements() const { return N * K * P * Q; }
  int64_t multiply_adds() const { return y_elements() * (C / groups) * R * S; }
  // Rows and columns at the far edge of x that no window reads (floor in the output size).
  int64_t unread_rows() const;
  int64_t unread_cols() const;
};

struct MaxPool2dProblem {
  int64_t N, C, H, W;  // x
  int64_t R, S;        // window
  int64_t P, Q;        // y
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;
  int offset_bytes;  // of the argmax, which is kept as the offset r·S + s inside its window: 1, 2 or 4
  DType dtype;
  Layout layout;

  int64_t x_elements() const { return N * C * H * W; }
  int64_t y_elements() const { return N * C * P * Q; }
};

// The same window for all outputs or, along an adaptive axis, one that grows and shrinks: output p of P is the mean of
// rows floor(p·H/P) up to, but not including, ceil((p+1)·H/P); stride and padding then mean nothing.
struct AvgPool2dProblem {
  int64_t N, C, H, W;  // x
  int64_t R, S;        // window; the largest of an adaptive axis
  int64_t P, Q;        // y
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  bool adaptive_h, adaptive_w;
  bool count_include_pad;  // of the elements that a window's sum is divided by
  int64_t divisor;         // instead of their number; 0: there is none
  DType dtype;
  Layout layout;

  int64_t x_elements() const { return N * C * H * W; }
  int64_t y_elements() const { return N * C * P * Q; }
  bool is_global() const { return P == 1 && Q == 1 && R == H && S == W && pad_h == 0 && pad_w == 0; }
  // The same computation, for kernels: without values that have no effect, such as huge strides or the layout of one
  // channel; and in NCHW a window over all of a plane is one long row.
  AvgPool2dProblem normalized() const;
};

// x is N×C×L: L = H·W for images, 1 after a fully connected layer.
// Statistics and parameters are float64 where x is, float32 otherwise.
struct BatchNormProblem {
  int64_t N, C, L;
  DType dtype;
  Layout layout;      // NCHW: x[n][c][l]; NHWC: x[n][l][c]
  bool relu = false;  // y = max(x̂·weight + bias + residual, 0), where NaN stays NaN

  int64_t x_elements() const { return N * C * L; }
  int64_t count() const { return N * L; }  // values a channel
};

// The makers below check everything and throw what torch throws, with torch's text.
// stride, padding and dilation hold one or two values; bias_size is absent where there is no bias.
Conv2dProblem make_conv2d_problem(const Sizes& x_size, const Sizes& w_size, const std::optional<Sizes>& bias_size,
                                  const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                                  DType dtype, Layout layout, bool allow_tf32);

MaxPool2dProblem make_max_pool2d_problem(const Sizes& x_size, const Sizes& kernel_size, const Sizes& stride,
                                         const Sizes& padding, const Sizes& dilation, bool ceil_mode, DType dtype,
                                         Layout layout);

AvgPool2dProblem make_avg_pool2d_problem(const Sizes& x_size, const Sizes& kernel_size, const Sizes& stride,
                                         const Sizes& padding, bool ceil_mode, bool count_include_pad,
                                         std::optional<int64_t> divisor, DType dtype, Layout layout);

// Windows of the sizes that divide x into so many outputs.
AvgPool2dProblem make_adaptive_avg_pool2d_problem(const Sizes& x_size, const Sizes& output_size, DType dtype,
                                                  Layout layout);

BatchNormProblem make_batch_norm_problem(const Sizes& x_size, DType dtype, Layout layout);

const char* name(DType dtype);
const char* name(Layout layout);
int64_t element_bytes(DType dtype);
std::string format_sizes(const Sizes& sizes);  // "[2, 3, 8, 8]"
std::string describe(const Conv2dProblem& problem);

}  // namespace fastconv
