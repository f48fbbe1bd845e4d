// The ops that torch sees. FASTCONV_NAMESPACE is fastconv, or fastconv_emulated in the library that runs the CUDA
// kernels on a CPU. `channels_last` decides the layout of everything an op reads and writes; its inputs are copied only
// where their memory is in another order. max_pool2d's offsets and batch_norm's statistics are explained in
// cpu/kernels.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(FASTCONV_NAMESPACE, m) {
  // What has a default need not be passed, which saves torch the parsing.
  m.def(
      "conv2d_fprop(Tensor x, Tensor w, Tensor? bias, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
      "int groups=1, bool channels_last=False, bool allow_tf32=False, str? algo=None, bool relu=False) -> Tensor");
  m.def(
      "conv2d_dgrad(Tensor dy, Tensor w, SymInt[] x_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
      "int groups=1, bool channels_last=False, bool allow_tf32=False, str? algo=None) -> Tensor");
  m.def(
      "conv2d_wgrad(Tensor dy, Tensor x, SymInt[] w_size, bool bias_grad, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1, bool channels_last=False, bool allow_tf32=False, str? algo=None) "
      "-> (Tensor, Tensor)");

  m.def(
      "max_pool2d_forward(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
      "bool ceil_mode, bool channels_last, bool return_offsets) -> (Tensor, Tensor)");
  m.def(
      "max_pool2d_backward(Tensor dy, Tensor offsets, SymInt[] x_size, int[2] kernel_size, int[2] stride, "
      "int[2] padding, int[2] dilation, bool ceil_mode, bool channels_last) -> Tensor");
  m.def(
      "max_pool2d_indices(Tensor offsets, SymInt[] x_size, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, bool ceil_mode, bool channels_last) -> Tensor");
  m.def(
      "max_pool2d_gather(Tensor x, Tensor offsets, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, bool ceil_mode, bool channels_last) -> Tensor");

  // With an output_size the pooling is adaptive, and the arguments before it are not looked at.
  m.def(
      "avg_pool2d_forward(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
      "bool count_include_pad, int? divisor_override, SymInt[] output_size, bool channels_last) -> Tensor");
  m.def(
      "avg_pool2d_backward(Tensor dy, SymInt[] x_size, int[2] kernel_size, int[2] stride, int[2] padding, "
      "bool ceil_mode, bool count_include_pad, int? divisor_override, SymInt[] output_size, bool channels_last) "
      "-> Tensor");

  m.def(
      "batch_norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "float momentum, float eps, bool channels_last) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_eval(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps, "
      "bool channels_last) -> Tensor");
  m.def(
      "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, bool training, "
      "bool channels_last) -> (Tensor, Tensor, Tensor)");
  // BatchNorm, plus a residual if there is one, then ReLU. affine: the scale and shift of each channel (2 × C), by
  // which backward knows where y was positive; of a residual, or in evaluation, it looks at y, and affine is empty. The
  // last result of backward is dy where y was positive, the residual's gradient; without y it is empty.
  m.def(
      "batch_norm_act_train(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor? residual, float momentum, float eps, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_act_eval(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "Tensor? residual, float eps, bool channels_last) -> Tensor");
  m.def(
      "batch_norm_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, Tensor? affine, "
      "Tensor? y, bool training, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)");
  // The same in steps, between which several machines exchange what they found (fastconv/sync_batch_norm.py).
  m.def("batch_norm_moments(Tensor x, bool channels_last) -> Tensor");
  m.def("batch_norm_backward_sums(Tensor dy, Tensor x, Tensor mean, Tensor invstd, bool channels_last) -> Tensor");
  m.def(
      "batch_norm_backward_apply(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, Tensor means, "
      "bool channels_last) -> Tensor");
}
