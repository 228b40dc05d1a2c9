// One call as data: the operands of the two operators (schemas in lora_ext/ops.py; lora_ext/call.py
// has the same structs), and the one check of them.
//   y = x @ weight.T + bias + scale * h @ B,      h = (keep * x) @ A
// M rows of x, K in, N out, R rank; h and t = dy @ B.T are (M, R).
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace lora_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An argument, its tensor read once: torch is asked through C functions, 2 ns a question. It
// borrows the tensor. Without one, for None, it is false.
struct Operand {
  Operand() = default;
  explicit Operand(const Tensor& tensor);
  explicit Operand(const std::optional<Tensor>& tensor);

  explicit operator bool() const { return tensor != nullptr; }
  int64_t size(int64_t i) const { return sizes[i]; }
  int64_t stride(int64_t i) const { return strides[i]; }
  const void* data() const { return tensor->const_data_ptr(); }

  const Tensor* tensor = nullptr;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  ScalarType dtype = ScalarType::Undefined;
};

// How a weight is stored.
enum class Format {
  kPlain,   // (N, K)
  kPanels,  // what pack_weight made of it: of weight.T for the forward, of weight for dx. CPU alone
  kNf4,  // frozen, of 4 bits: (ceil(N * K / 2), 1) bytes as bitsandbytes lays them out. CPU alone
  kFp4,
  kInt8,  // frozen, (N, K) int8. CPU alone
};

constexpr bool is_of_codes(Format format) { return format >= Format::kNf4; }

struct Weight {
  Operand data;
  Format format = Format::kPlain;
  // Of codes, float: of 4 bits one a block, which is a power of two of elements from 32 on, from
  // end to end; of int8 one a row, (N,).
  Operand scale;
};

struct LowRank {
  Operand A, B;  // (K, R), (R, N)
  double scale = 1;
  Operand keep;  // dropout's mask as bits, (M, ceil(K / 8)) uint8; none keeps all
};

struct Call {
  int64_t M = 0, K = 0, N = 0, R = 0;
  Operand x;
  Weight weight;  // no data: the low-rank part alone
  Operand bias;
  LowRank low;
};

// What a backward computes, in the order of its results.
struct Needs {
  bool dx, dweight, dbias, dA, dB;
};

// A backward's call; of its operands only what `needs` reads is looked at, the others are false.
struct BackwardCall : Call {
  Operand dy, h;
  Needs needs;
};

// Return the call, or throw, naming the argument, what was expected and what came, unless shapes,
// dtypes, devices and format fit and each tensor's memory holds what its sizes and strides reach.
Call check_forward(const Tensor& x, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, const Tensor& A, const Tensor& B,
                   double scale, const std::string& format, const std::optional<Tensor>& keep,
                   const std::optional<Tensor>& weight_scale);
BackwardCall check_backward(const Tensor& dy, const std::optional<Tensor>& x,
                            const std::optional<Tensor>& weight, const std::optional<Tensor>& A,
                            const std::optional<Tensor>& B, const std::optional<Tensor>& h,
                            double scale, const std::vector<bool>& needs, const std::string& format,
                            const std::optional<Tensor>& keep,
                            const std::optional<Tensor>& weight_scale);

// The elements in a block of a weight of 4-bit codes, as a power of two.
int64_t block_bits_of(const Weight& weight, int64_t elements);

// The results of a backward; one that is not asked for is undefined, in Python None. Those of A and
// B lie in memory as these do, so that autograd hands them on without a copy.
struct Gradients {
  explicit Gradients(const BackwardCall& call);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tuple() const {
    return {dx, dweight, dbias, dA, dB};
  }

  const Tensor dx, dweight, dbias, dA, dB;
};

}  // namespace lora_ext
