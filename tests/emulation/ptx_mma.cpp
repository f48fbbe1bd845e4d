// mma and cvt: the fragments by the formulas of the PTX ISA, groupID = laneid >> 2 and threadID_in_group = laneid % 4.
#include <cmath>
#include <cstring>

#include "ptx.h"

namespace fastconv::cuda::ptx {
namespace {

using emulation::Lanes;

// What a lane hands in: its words of A and B, and its elements of D, which are C before.
struct Fragments {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

struct Position {
  int row, column;
};

// Elements of 16 bits, two a register: "Matrix Fragments for mma.m16n8k8" and "… for mma.m16n8k16 with floating point
// type". The former's are the first half of the latter's.
Position a_16_bit(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {(0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8, thread * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
Position b_16_bit(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {thread * 2 + (i & 1) + (i < 2 ? 0 : 8), group};
}
// tf32, one a register: "Matrix Fragments for mma.m16n8k8".
Position a_tf32(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {i == 0 || i == 2 ? group : group + 8, i < 2 ? thread : thread + 4};
}
Position b_tf32(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {i == 0 ? thread : thread + 4, group};
}
// The accumulators of all three shapes with m16n8.
Position d_float32(int lane, int i) {
  const int group = lane >> 2, thread = lane % 4;
  return {i < 2 ? group : group + 8, thread * 2 + (i & 1)};
}

float bits_to_float(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
struct Float16 {
  static float element(const uint32_t* words, int i) {
    const uint16_t bits = uint16_t(words[i / 2] >> 16 * (i % 2));
    _Float16 v;
    memcpy(&v, &bits, sizeof v);
    return float(v);
  }
};
struct Bfloat16 {
  static float element(const uint32_t* words, int i) {
    return bits_to_float((words[i / 2] >> 16 * (i % 2) & 0xffff) << 16);
  }
};

template <int K>
struct Matrices {
  float a[16][K], b[K][8], d[16][8];

  void multiply() {
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n)
        for (int k = 0; k < K; ++k) d[m][n] = float(d[m][n] + double(a[m][k]) * b[k][n]);
  }
};

template <int K>
void load_d(Matrices<K>& matrices, const Lanes& lanes) {
  lanes.each([&](int lane) {
    for (int i = 0; i < 4; ++i) {
      const Position d = d_float32(lane, i);
      matrices.d[d.row][d.column] = lanes.operand<Fragments>(lane).d[i];
    }
  });
}
template <int K>
void store_d(const Matrices<K>& matrices, const Lanes& lanes) {
  lanes.each([&](int lane) {
    for (int i = 0; i < 4; ++i) {
      const Position d = d_float32(lane, i);
      lanes.operand<Fragments>(lane).d[i] = matrices.d[d.row][d.column];
    }
  });
}

template <typename Element, int K>
void mma_16_bit(const Lanes& lanes) {
  Matrices<K> matrices;
  load_d(matrices, lanes);
  lanes.each([&](int lane) {
    const auto& fragments = lanes.operand<Fragments>(lane);
    for (int i = 0; i < K / 2; ++i) {
      const Position a = a_16_bit(lane, i);
      matrices.a[a.row][a.column] = Element::element(fragments.a, i);
    }
    for (int i = 0; i < K / 4; ++i) {
      const Position b = b_16_bit(lane, i);
      matrices.b[b.row][b.column] = Element::element(fragments.b, i);
    }
  });
  matrices.multiply();
  store_d(matrices, lanes);
}

float tf32(const Lanes& lanes, int lane, const char* name, int i, uint32_t word) {
  if (word & 0x1fff)
    emulation::fail(lanes.where, "%s: %s[%d] of lane %d, 0x%08x, is not rounded to tf32", lanes.what, name, i, lane,
                    word);
  return bits_to_float(word);
}

void mma_tf32(const Lanes& lanes) {
  Matrices<8> matrices;
  load_d(matrices, lanes);
  lanes.each([&](int lane) {
    const auto& fragments = lanes.operand<Fragments>(lane);
    for (int i = 0; i < 4; ++i) {
      const Position a = a_tf32(lane, i);
      matrices.a[a.row][a.column] = tf32(lanes, lane, "a", i, fragments.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      const Position b = b_tf32(lane, i);
      matrices.b[b.row][b.column] = tf32(lanes, lane, "b", i, fragments.b[i]);
    }
  });
  matrices.multiply();
  store_d(matrices, lanes);
}

// "Matrix Fragments for mma.m8n8k4 with .f64 floating point type"; its operations are IEEE's fused multiply-adds.
struct DoubleFragments {
  double* d;
  double a, b;
};
void mma_float64(const Lanes& lanes) {
  double a[8][4], b[4][8];
  lanes.each([&](int lane) {
    const int group = lane >> 2, thread = lane % 4;
    a[group][thread] = lanes.operand<DoubleFragments>(lane).a;
    b[thread][group] = lanes.operand<DoubleFragments>(lane).b;
  });
  lanes.each([&](int lane) {
    const int group = lane >> 2, thread = lane % 4;
    for (int i = 0; i < 2; ++i) {
      double& d = lanes.operand<DoubleFragments>(lane).d[i];
      for (int k = 0; k < 4; ++k) d = std::fma(a[group][k], b[k][thread * 2 + i], d);
    }
  });
}

}  // namespace

void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Where& where) {
  Fragments fragments{d, a, b};
  emulation::whole_warp("mma_m16n8k16_f16", where, &fragments, mma_16_bit<Float16, 16>);
}
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Where& where) {
  Fragments fragments{d, a, b};
  emulation::whole_warp("mma_m16n8k16_bf16", where, &fragments, mma_16_bit<Bfloat16, 16>);
}
void mma_m16n8k8_f16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], const Where& where) {
  Fragments fragments{d, a, b};
  emulation::whole_warp("mma_m16n8k8_f16", where, &fragments, mma_16_bit<Float16, 8>);
}
void mma_m16n8k8_bf16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], const Where& where) {
  Fragments fragments{d, a, b};
  emulation::whole_warp("mma_m16n8k8_bf16", where, &fragments, mma_16_bit<Bfloat16, 8>);
}
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Where& where) {
  Fragments fragments{d, a, b};
  emulation::whole_warp("mma_m16n8k8_tf32", where, &fragments, mma_tf32);
}
void mma_m8n8k4_f64(double (&d)[2], double a, double b, const Where& where) {
  DoubleFragments fragments{d, a, b};
  emulation::whole_warp("mma_m8n8k4_f64", where, &fragments, mma_float64);
}

// Half of the last place that stays is added to the magnitude: ties go away from zero, and what exceeds the largest
// value becomes infinity.
uint32_t cvt_rna_tf32(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  if (v != v) return 0x7fffe000;
  return (bits + 0x1000) & ~0x1fffu;
}

}  // namespace fastconv::cuda::ptx
