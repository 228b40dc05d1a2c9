// The block operations of a gated MLP, gated and gated_gradients (see blocks.h), in one pass each.
// Part of blocks_impl.h.
#pragma once

#include <cfloat>
#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/vectors.h"

namespace lora_ext::cpu {
namespace {

typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));

// ---- functions of a vector: float by polynomials, double by the C library ----

template <typename Mask>
inline FloatVector select(Mask mask, FloatVector yes, FloatVector no) {
  const UintVector m = (UintVector)mask;
  return (FloatVector)(((UintVector)yes & m) | ((UintVector)no & ~m));
}
template <typename Mask>
inline DoubleVector select(Mask mask, DoubleVector yes, DoubleVector no) {
  const UlongVector m = (UlongVector)mask;
  return (DoubleVector)(((UlongVector)yes & m) | ((UlongVector)no & ~m));
}

inline FloatVector power_of_two(IntVector n) { return (FloatVector)((n + 127) << 23); }

// e^x, to about a unit in the last place: 2^n e^r with |r| <= ln(2) / 2. NaN stays NaN.
inline FloatVector exp_of(FloatVector x) {
  const FloatVector most = FloatVector{} + 89, least = FloatVector{} - 104;  // infinite, and 0
  x = select(x > most, most, x);
  x = select(x < least, least, x);
  const FloatVector magic = FloatVector{} + 0x1.8p23f;  // added, it rounds to a whole number
  const FloatVector shifted = x * 1.44269504f + magic, whole = shifted - magic;
  const FloatVector r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  FloatVector p = r * 1.3926926614e-3f + 8.3637738744e-3f;
  p = p * r + 4.1666550110e-2f;
  p = p * r + 1.6666573382e-1f;
  p = p * r + 0.5f;
  const IntVector n = (IntVector)shifted - (IntVector)magic, half = n >> 1;
  return (p * (r * r) + r + 1) * power_of_two(half) * power_of_two(n - half);
}
inline DoubleVector exp_of(DoubleVector x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

inline FloatVector at_most_finite(FloatVector v) {
  return select(v > FLT_MAX, FloatVector{} + FLT_MAX, v);
}
inline DoubleVector at_most_finite(DoubleVector v) {
  return select(v > DBL_MAX, DoubleVector{} + DBL_MAX, v);
}

// The normal distribution's share below x; `density` is e^(-x^2 / 2).
inline FloatVector normal_of(FloatVector x, FloatVector density) {
  // erfc(z) = e^(-z^2) t q(t), t = 1 / (1 + 0.35 z): a fit of degree 9 to 5e-9, of z up to 10.
  const FloatVector z = (FloatVector)((UintVector)x & 0x7fffffff) * 0.707106781f;
  const FloatVector t = 1 / (1 + 0.35f * z);
  constexpr float q[] = {3.665472790e-2f,  -1.4954353518e-1f, 1.5964121486e-1f, 1.0456134904e-3f,
                         6.340511023e-2f,  1.5855468981e-1f,  1.4691578087e-1f, 1.8880636840e-1f,
                         1.9703073778e-1f, 1.9748926640e-1f};
  FloatVector sum = FloatVector{} + q[0];
#pragma GCC unroll 9
  for (int i = 1; i < 10; ++i) sum = sum * t + q[i];
  const FloatVector tail = 0.5f * density * t * sum;
  return select(x < FloatVector{}, tail, 1 - tail);
}
inline DoubleVector normal_of(DoubleVector x, DoubleVector) {
  for (int64_t i = 0; i < kLanes<double>; ++i) {
    x[i] = 0.5 * __builtin_erfc(x[i] * -0.70710678118654752440);
  }
  return x;
}

// ---- activations: the value, and the derivative with it ----

// x / (1 + e^-u), and its derivative for a given u'. 1 - s is e * s: near 0 without cancelling.
template <typename V>
inline V times_sigmoid(V x, V u, V slope, V* derivative) {
  const V e = exp_of(-u), s = 1 / (1 + e);
  *derivative = s + x * slope * (s * (at_most_finite(e) * s));
  return x * s;
}

struct Silu {
  template <typename V>
  static V both(V x, V* derivative) {
    return times_sigmoid(x, x, V{} + 1, derivative);
  }
};

struct GeluTanh {  // 0.5 x (1 + tanh(u / 2)) = x / (1 + e^-u), u = sqrt(8 / pi) (x + 0.044715 x^3)
  template <typename V>
  static V both(V x, V* derivative) {
    using A = std::remove_cvref_t<decltype(x[0])>;
    constexpr A c = A(1.5957691216057307), cubic = A(0.044715);
    const V square = x * x;
    return times_sigmoid(x, c * (x + cubic * (square * x)), c * (1 + 3 * cubic * square),
                         derivative);
  }
};

struct Gelu {
  template <typename V>
  static V both(V x, V* derivative) {
    using A = std::remove_cvref_t<decltype(x[0])>;
    const V density = exp_of(x * x * A(-0.5)), below = normal_of(x, density);
    *derivative = below + x * density * A(0.39894228040143267794);
    return x * below;
  }
};

struct Relu2 {
  template <typename V>
  static V both(V x, V* derivative) {
    const V positive = select(x < V{}, V{}, x);  // NaN stays
    *derivative = positive + positive;
    return positive * positive;
  }
};

template <typename F>
inline void with_act(Act act, const F& f) {
  switch (act) {
    case Act::kSilu:
      return f(Silu{});
    case Act::kGelu:
      return f(Gelu{});
    case Act::kGeluTanh:
      return f(GeluTanh{});
    default:
      return f(Relu2{});
  }
}

// ---- rows ----

// Up to a vector of elements, `step` apart.
template <typename T>
inline Vector<Acc<T>> read_some(const T* from, int64_t step, int64_t count) {
  T some[kLanes<Acc<T>>] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = from[i * step];
  return widen(some);
}
template <typename T>
inline void write_some(Vector<Acc<T>> v, T* to, int64_t step, int64_t count) {
  T some[kLanes<Acc<T>>];
  narrow(v, some);
  for (int64_t i = 0; i < count; ++i) to[i * step] = some[i];
}

template <typename T>
void gated(Act act, View<const T> gate, View<const T> up, View<T> hidden) {
  constexpr int64_t lanes = kLanes<Acc<T>>;
  const bool dense = gate.col_stride == 1 && up.col_stride == 1 && hidden.col_stride == 1;
  with_act(act, [&](auto of) {
    for (int64_t row = 0; row < gate.rows; ++row) {
      const T* g = gate.data + row * gate.row_stride;
      const T* u = up.data + row * up.row_stride;
      T* to = hidden.data + row * hidden.row_stride;
      Vector<Acc<T>> unused;
      int64_t j = 0;
      for (; dense && j + lanes <= gate.cols; j += lanes) {
        narrow(of.both(widen(g + j), &unused) * widen(u + j), to + j);
      }
      for (; j < gate.cols; j += lanes) {
        const int64_t left = gate.cols - j < lanes ? gate.cols - j : lanes;
        const auto value =
            of.both(read_some(g + j * gate.col_stride, gate.col_stride, left), &unused);
        write_some(value * read_some(u + j * up.col_stride, up.col_stride, left),
                   to + j * hidden.col_stride, hidden.col_stride, left);
      }
    }
  });
}

template <typename T>
void gated_gradients(Act act, View<const T> d_hidden, View<const T> gate, View<const T> up,
                     View<T> d_gate, View<T> d_up) {
  using V = Vector<Acc<T>>;
  constexpr int64_t lanes = kLanes<Acc<T>>;
  const bool dense = d_hidden.col_stride == 1 && gate.col_stride == 1 && up.col_stride == 1 &&
                     d_gate.col_stride == 1 && d_up.col_stride == 1;
  with_act(act, [&](auto of) {
    for (int64_t row = 0; row < gate.rows; ++row) {
      const T* d = d_hidden.data + row * d_hidden.row_stride;
      const T* g = gate.data + row * gate.row_stride;
      const T* u = up.data + row * up.row_stride;
      T* dg = d_gate.data + row * d_gate.row_stride;
      T* du = d_up.data + row * d_up.row_stride;
      int64_t j = 0;
      for (; dense && j + lanes <= gate.cols; j += lanes) {
        V derivative;
        const V value = of.both(widen(g + j), &derivative), dy = widen(d + j);
        const V to_gate = dy * widen(u + j) * derivative;
        narrow(value * dy, du + j);
        narrow(to_gate, dg + j);  // last: it may be d
      }
      for (; j < gate.cols; j += lanes) {
        const int64_t left = gate.cols - j < lanes ? gate.cols - j : lanes;
        V derivative;
        const V value =
            of.both(read_some(g + j * gate.col_stride, gate.col_stride, left), &derivative);
        const V dy = read_some(d + j * d_hidden.col_stride, d_hidden.col_stride, left);
        const V by = read_some(u + j * up.col_stride, up.col_stride, left);
        write_some(value * dy, du + j * d_up.col_stride, d_up.col_stride, left);
        write_some(dy * by * derivative, dg + j * d_gate.col_stride, d_gate.col_stride, left);
      }
    }
  });
}

}  // namespace
}  // namespace lora_ext::cpu
