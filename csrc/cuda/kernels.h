// The products that the two operators are made of, on views of GPU memory; nothing of torch.
//   h = (keep * x) @ A    y = x @ weight.T + bias + alpha * h @ B
//   t = dy @ B.T          dx = dy @ weight + alpha * keep * (t @ A.T)
//   dA = alpha * (keep * x).T @ t      dB = alpha * h.T @ dy
// They are of 16-bit dtypes; of float and double, PyTorch makes every product (linear.cpp).
// Everything is put on the stream and nothing waits. Each result element is summed in an order that
// depends on the sizes and the card alone: the same inputs give the same bits.
#pragma once

#include <cstdint>
#include <functional>

namespace lora_ext::cuda {

enum class DType { kHalf, kBFloat16, kFloat, kDouble };

// A matrix in memory; strides in elements. `is_float` marks a result of float elements over a
// 16-bit base: the gradients of A and B in float.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 0;
  bool is_float = false;

  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride, is_float}; }
};

struct Bias {
  const void* data = nullptr;  // null for none
  int64_t stride = 0;
};

// Dropout's mask for x, a bit an element: those of a row begin at data + row * row_stride, the
// least significant bit of a byte first.
struct Bits {
  const uint8_t* data = nullptr;  // null keeps all
  int64_t row_stride = 0;
};

// Make a device the current one for the launches of this thread, and return its multiprocessors.
int use_card(int device);

// What a call runs on. `allocate` returns GPU memory that outlives the call's kernels.
struct Context {
  DType dtype;
  void* stream;
  int multiprocessors;
  std::function<void*(int64_t bytes)> allocate;
};

// With `onto` the result's memory holds the product with the weight (and the bias) already, and
// only the low-rank part is added: the way that linear.cpp takes. Without a weight (a Matrix
// without data) the low-rank part is all of the result.
void forward_h(const Context&, const Matrix& x, const Bits& keep, const Matrix& A, const Matrix& h);
void forward_y(const Context&, const Matrix& x, const Matrix& weight, const Bias& bias,
               const Matrix& h, const Matrix& B, double alpha, const Matrix& y, bool onto);
void backward_t(const Context&, const Matrix& dy, const Matrix& B, const Matrix& t);
void backward_dx(const Context&, const Matrix& dy, const Matrix& weight, const Matrix& t,
                 const Matrix& A, const Bits& keep, double alpha, const Matrix& dx, bool onto);
// out (cols of left, cols of right) = alpha * (keep * left).T @ right: dA of x and t, dB.T of dy
// and h.
void backward_adapter(const Context&, const Matrix& left, const Bits& keep, const Matrix& right,
                      double alpha, const Matrix& out);
// out = scale * keep * from, or out += scale * keep * from: no product, of float or double.
void apply_mask(const Context&, const Matrix& from, const Bits& keep, double scale,
                const Matrix& out, bool add);

}  // namespace lora_ext::cuda
