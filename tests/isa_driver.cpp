// Runs every CPU kernel of one instruction set over small inputs and prints a hash of each result's bits.
// It links the kernels and plans only, no torch, so that it starts quickly under a processor emulator too.
//   isa_driver baseline
#include <cstdio>
#include <cstring>
#include <vector>

#include "../csrc/cpu/kernels.h"

namespace {

using namespace fastconv;
using Bytes = std::vector<unsigned char>;

constexpr DType dtypes[] = {DType::float32, DType::float64, DType::float16, DType::bfloat16};
constexpr Layout layouts[] = {Layout::NCHW, Layout::NHWC};

// Values in [−2, 2) with an even spread of bits, the same everywhere.
Bytes values(int64_t count, DType dtype, uint32_t seed, bool positive = false) {
  Bytes bytes(size_t(count * element_bytes(dtype)) + 64);
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1103515245u + 12345u;
    const float value = float((seed >> 16) % 256) / 64 - (positive ? -1 : 2);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t bfloat16 = uint16_t(bits >> 16);  // exact: the value has 8 bits
    const double wide = value;
    uint16_t float16 = uint16_t((bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112 << 10)) * ((bits << 1) != 0));
    const void* source = dtype == DType::float32   ? static_cast<const void*>(&value)
                         : dtype == DType::float64 ? static_cast<const void*>(&wide)
                         : dtype == DType::float16 ? static_cast<const void*>(&float16)
                                                   : static_cast<const void*>(&bfloat16);
    memcpy(bytes.data() + i * element_bytes(dtype), source, size_t(element_bytes(dtype)));
  }
  return bytes;
}

Bytes room(int64_t bytes) { return Bytes(size_t(bytes) + 64, 0x7f); }

void report(const char* what, const char* algo, DType dtype, Layout layout, const Bytes& result, int64_t bytes) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (int64_t i = 0; i < bytes; ++i) hash = (hash ^ result[size_t(i)]) * 1099511628211u;
  printf("%s %s %s %s %016llx\n", what, algo, name(dtype), name(layout), static_cast<unsigned long long>(hash));
}

void convolutions(DType dtype, Layout layout, const cpu::Parallel& parallel) {
  struct Case {
    Sizes x, w, stride, padding, dilation;
    int64_t groups;
  };
  const Case cases[] = {
      {{2, 20, 9, 8}, {19, 20, 3, 2}, {2, 1}, {1, 2}, {1, 2}, 1},
      {{1, 12, 7, 9}, {8, 3, 2, 3}, {1, 2}, {1, 0}, {1, 1}, 4},
      {{2, 19, 8, 9}, {19, 1, 3, 3}, {1, 1}, {1, 1}, {1, 1}, 19},
      {{2, 20, 9, 8}, {19, 20, 3, 3}, {1, 1}, {1, 2}, {1, 1}, 1},
      {{2, 3, 9, 18}, {19, 3, 3, 4}, {1, 2}, {1, 2}, {1, 1}, 1},
  };
  const int64_t size = element_bytes(dtype);
  for (const Case& c : cases)
    for (Algo algo : algorithms(false)) {
      if (algo == Algo::depthwise && c.groups != c.x[1]) continue;
      if (algo == Algo::grouped && c.groups == 1) continue;
      if (algo == Algo::winograd && c.w[2] * c.w[3] != 9) continue;
      const auto p =
          make_conv2d_problem(c.x, c.w, std::nullopt, c.stride, c.padding, c.dilation, c.groups, dtype, layout, false);
      const Bytes x = values(p.x_elements(), dtype, 1), w = values(p.w_elements(), dtype, 2);
      const Bytes bias = values(p.K, dtype, 3), dy = values(p.y_elements(), dtype, 4);
      Bytes y = room(p.y_elements() * size), dx = room(p.x_elements() * size), dw = room(p.w_elements() * size);
      Bytes db = room(p.K * size);
      for (Direction direction : {Direction::fprop, Direction::dgrad, Direction::wgrad}) {
        const Conv2dPlan plan = plan_conv2d(p, direction, {}, algo);
        Bytes workspace = room(plan.workspace_bytes), scratch = room(plan.scratch_bytes);
        const cpu::Conv2dKernels& kernels = cpu::conv2d_kernels(plan.algo);
        if (direction == Direction::fprop)
          kernels.fprop(p, plan, x.data(), w.data(), bias.data(), y.data(), workspace.data(), scratch.data(), parallel);
        else if (direction == Direction::dgrad)
          kernels.dgrad(p, plan, dy.data(), w.data(), dx.data(), workspace.data(), scratch.data(), parallel);
        else
          kernels.wgrad(p, plan, dy.data(), x.data(), dw.data(), db.data(), workspace.data(), scratch.data(), parallel);
      }
      report("y", name(algo), dtype, layout, y, p.y_elements() * size);
      report("dx", name(algo), dtype, layout, dx, p.x_elements() * size);
      report("dw", name(algo), dtype, layout, dw, p.w_elements() * size);
      report("db", name(algo), dtype, layout, db, p.K * size);
    }
}

void max_pooling(DType dtype, Layout layout, const cpu::Parallel& parallel) {
  const int64_t size = element_bytes(dtype);
  for (const MaxPool2dProblem& p :
       {make_max_pool2d_problem({3, 21, 9, 10}, {3, 2}, {2, 1}, {1, 1}, {1, 2}, false, dtype, layout),
        make_max_pool2d_problem({3, 21, 9, 40}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, false, dtype, layout),
        make_max_pool2d_problem({3, 21, 9, 40}, {2, 2}, {2, 2}, {0, 0}, {1, 1}, true, dtype, layout)}) {
    const MaxPool2dPlan plan = plan_max_pool2d(p, {});
    const Bytes x = values(p.x_elements(), dtype, 1), dy = values(p.y_elements(), dtype, 2);
    Bytes y = room(p.y_elements() * size), offsets = room(p.y_elements() * p.offset_bytes);
    Bytes dx = room(p.x_elements() * size), gathered = room(p.y_elements() * size);
    std::vector<int64_t> indices(size_t(p.y_elements()));
    const cpu::MaxPool2dKernels& kernels = *cpu::kernels().max_pool2d;
    kernels.forward(p, plan, x.data(), y.data(), offsets.data(), parallel);
    kernels.backward(p, plan, dy.data(), offsets.data(), dx.data(), parallel);
    kernels.gather(p, x.data(), offsets.data(), gathered.data(), parallel);
    kernels.indices(p, offsets.data(), indices.data(), parallel);
    const auto* index_bytes = reinterpret_cast<const unsigned char*>(indices.data());
    report("pool y", "", dtype, layout, y, p.y_elements() * size);
    report("pool dx", "", dtype, layout, dx, p.x_elements() * size);
    report("pool gathered", "", dtype, layout, gathered, p.y_elements() * size);
    report("pool indices", "", dtype, layout, {index_bytes, index_bytes + 8 * indices.size()}, 8 * p.y_elements());
  }
}

void averages(DType dtype, Layout layout, const cpu::Parallel& parallel) {
  const int64_t size = element_bytes(dtype);
  for (const AvgPool2dProblem& p :
       {make_avg_pool2d_problem({3, 21, 9, 10}, {3, 2}, {2, 1}, {1, 1}, true, false, std::nullopt, dtype, layout),
        make_avg_pool2d_problem({3, 21, 9, 40}, {3, 17}, {1, 2}, {1, 1}, false, true, 7, dtype, layout),
        make_adaptive_avg_pool2d_problem({3, 21, 9, 10}, {1, 1}, dtype, layout),
        make_adaptive_avg_pool2d_problem({3, 21, 9, 10}, {4, 13}, dtype, layout)}) {
    const AvgPool2dPlan plan = plan_avg_pool2d(p, {});
    const Bytes x = values(p.x_elements(), dtype, 1), dy = values(p.y_elements(), dtype, 2);
    Bytes y = room(p.y_elements() * size), dx = room(p.x_elements() * size);
    cpu::kernels().avg_pool2d->forward(p, plan, x.data(), y.data(), parallel);
    cpu::kernels().avg_pool2d->backward(p, plan, dy.data(), dx.data(), parallel);
    report("average y", "", dtype, layout, y, p.y_elements() * size);
    report("average dx", "", dtype, layout, dx, p.x_elements() * size);
  }
}

void batch_norm(DType dtype, Layout layout, const cpu::Parallel& parallel) {
  const auto p = make_batch_norm_problem({3, 21, 9, 10}, dtype, layout);
  const BatchNormPlan plan = plan_batch_norm(p, {});
  const DType statistics = dtype == DType::float64 ? DType::float64 : DType::float32;
  const int64_t size = element_bytes(dtype), statistics_bytes = p.C * element_bytes(statistics);
  const Bytes x = values(p.x_elements(), dtype, 1), dy = values(p.x_elements(), dtype, 2);
  const Bytes weight = values(p.C, statistics, 3), bias = values(p.C, statistics, 4);
  Bytes running_mean = values(p.C, statistics, 5), running_var = values(p.C, statistics, 6, true);
  Bytes y = room(p.x_elements() * size), dx = y, evaluated = y;
  Bytes mean = room(statistics_bytes), invstd = mean, dweight = mean, dbias = mean;
  Bytes workspace = room(plan.workspace_bytes);
  const cpu::BatchNormKernels& kernels = *cpu::kernels().batch_norm;
  kernels.eval(p, plan, x.data(), weight.data(), bias.data(), running_mean.data(), running_var.data(), 1e-5, nullptr,
               evaluated.data(), parallel);
  kernels.train(p, plan, x.data(), weight.data(), bias.data(), running_mean.data(), running_var.data(), 0.1, 1e-5,
                nullptr, y.data(), mean.data(), invstd.data(), nullptr, workspace.data(), parallel);
  const cpu::BatchNormGradientKernels& gradients = *cpu::kernels().batch_norm_gradients;
  gradients.backward(p, plan, dy.data(), x.data(), weight.data(), mean.data(), invstd.data(), nullptr, nullptr, true,
                     dx.data(), dweight.data(), dbias.data(), nullptr, workspace.data(), parallel);
  report("batch norm evaluated", "", dtype, layout, evaluated, p.x_elements() * size);
  report("batch norm y", "", dtype, layout, y, p.x_elements() * size);
  report("batch norm dx", "", dtype, layout, dx, p.x_elements() * size);
  report("batch norm dweight", "", dtype, layout, dweight, statistics_bytes);
  report("batch norm running_var", "", dtype, layout, running_var, statistics_bytes);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return fprintf(stderr, "usage: isa_driver <instruction set>\n"), 2;
  cpu::use_isa(argv[1]);
  const cpu::Parallel one_thread;
  for (DType dtype : dtypes)
    for (Layout layout : layouts) {
      convolutions(dtype, layout, one_thread);
      max_pooling(dtype, layout, one_thread);
      averages(dtype, layout, one_thread);
      batch_norm(dtype, layout, one_thread);
    }
}
