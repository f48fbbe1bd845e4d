// ldmatrix and stmatrix: 8 × 8 matrices of 16-bit elements between shared memory and the registers of a warp.
#include "ptx.h"

namespace fastconv::cuda::ptx {
namespace {

using emulation::Lanes;

struct Operand {
  const void* row;
  uint32_t* r;
  int matrices;
  bool transposed;
};

// The rows of matrix m are where the lanes 8m … 8m + 7 say.
uint16_t* element(const Lanes& lanes, int m, int row, int column) {
  return static_cast<uint16_t*>(const_cast<void*>(lanes.operand<Operand>(8 * m + row).row)) + column;
}

// Calls f(r, low, high) with each lane's registers and the elements of its two halves.
template <typename F>
void each_register(const Lanes& lanes, F&& f) {
  const Operand& first = lanes.operand<Operand>(0);
  for (int lane = 0; lane < 8 * first.matrices; ++lane) {
    const void* row = lanes.operand<Operand>(lane).row;
    if (reinterpret_cast<uintptr_t>(row) % 16)
      emulation::fail(lanes.where, "%s: the row of lane %d, %p, is not a multiple of 16", lanes.what, lane, row);
    if (!emulation::in_shared_memory(row, 16))
      emulation::fail(lanes.where, "%s: the row of lane %d is outside of the shared memory", lanes.what, lane);
  }
  lanes.each([&](int lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int m = 0; m < first.matrices; ++m) {
      uint32_t& r = lanes.operand<Operand>(lane).r[m];
      if (first.transposed)
        f(r, element(lanes, m, column, row), element(lanes, m, column + 1, row));
      else
        f(r, element(lanes, m, row, column), element(lanes, m, row, column + 1));
    }
  });
}

void load(const Lanes& lanes) {
  each_register(lanes,
                [](uint32_t& r, const uint16_t* low, const uint16_t* high) { r = *low | uint32_t(*high) << 16; });
}
void store(const Lanes& lanes) {
  each_register(lanes, [](uint32_t r, uint16_t* low, uint16_t* high) {
    *low = uint16_t(r);
    *high = uint16_t(r >> 16);
  });
}

}  // namespace

void ldmatrix_x1(uint32_t (&r)[1], const void* row, const Where& where) {
  Operand operand{row, r, 1, false};
  emulation::whole_warp("ldmatrix_x1", where, &operand, load);
}
void ldmatrix_x2(uint32_t (&r)[2], const void* row, const Where& where) {
  Operand operand{row, r, 2, false};
  emulation::whole_warp("ldmatrix_x2", where, &operand, load);
}
void ldmatrix_x4(uint32_t (&r)[4], const void* row, const Where& where) {
  Operand operand{row, r, 4, false};
  emulation::whole_warp("ldmatrix_x4", where, &operand, load);
}
void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row, const Where& where) {
  Operand operand{row, r, 1, true};
  emulation::whole_warp("ldmatrix_x1_trans", where, &operand, load);
}
void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, const Where& where) {
  Operand operand{row, r, 2, true};
  emulation::whole_warp("ldmatrix_x2_trans", where, &operand, load);
}
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, const Where& where) {
  Operand operand{row, r, 4, true};
  emulation::whole_warp("ldmatrix_x4_trans", where, &operand, load);
}
void stmatrix_x4(void* row, const uint32_t (&r)[4], const Where& where) {
  Operand operand{row, const_cast<uint32_t*>(r), 4, false};
  emulation::whole_warp("stmatrix_x4", where, &operand, store);
}
void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], const Where& where) {
  Operand operand{row, const_cast<uint32_t*>(r), 4, true};
  emulation::whole_warp("stmatrix_x4_trans", where, &operand, store);
}

}  // namespace fastconv::cuda::ptx
