// A gated MLP's activation on the CPU: hidden = act(gate) * up, and its gradients.
#include <torch/headeronly/util/Exception.h>

#include <iterator>

#include "checks.h"
#include "cpu/tensors.h"
#include "operators.h"

namespace lora_ext {
namespace cpu {
namespace {

constexpr const char* kNames[] = {"silu", "gelu", "gelu_tanh", "relu2"};  // in the order of Act

Act act_named(const std::string& name) {
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (name == kNames[i]) return static_cast<Act>(i);
  }
  STD_TORCH_CHECK(false, "act must be one of silu, gelu, gelu_tanh, relu2, got ", name);
}

// A matrix like gate.
void check_like(const char* name, const Operand& operand, const Operand& gate) {
  const bool fits =
      operand.dim == 2 && operand.size(0) == gate.size(0) && operand.size(1) == gate.size(1);
  STD_TORCH_CHECK(fits, name, " must have shape ", text_of(gate.sizes, gate.dim), ", got ",
                  text_of(operand.sizes, operand.dim));
  STD_TORCH_CHECK(operand.dtype == gate.dtype, name, " must have dtype ",
                  torch::headeronly::toString(gate.dtype), ", got ",
                  torch::headeronly::toString(operand.dtype));
  check_memory(name, operand);
}

void check_gate(const Operand& gate) {
  STD_TORCH_CHECK(gate.dim == 2, "gate must have shape (M, hidden), got ",
                  text_of(gate.sizes, gate.dim));
  check_memory("gate", gate);
}

// Rows of so many elements at a time, by all threads.
template <typename F>
void for_each_rows(const Operand& gate, const F& body) {
  constexpr int64_t kElements = 1 << 14;
  const int64_t rows = gate.size(0), cols = std::max<int64_t>(gate.size(1), 1);
  const int64_t most = std::max<int64_t>(kElements / cols, 1);
  for_each_part(rows, even_part(rows, most, 1, 1, num_threads()), body);
}

}  // namespace
}  // namespace cpu

Tensor gated_fwd(const Tensor& gate, const Tensor& up, const std::string& act) {
  const cpu::Act asked = cpu::act_named(act);
  const Operand g(gate), u(up);
  cpu::check_gate(g);
  cpu::check_like("up", u, g);
  const Tensor hidden = empty(gate, {g.size(0), g.size(1)});
  cpu::with_storage_type("gate", g.dtype, [&](auto storage) {
    using T = decltype(storage);
    const int64_t cols = g.size(1);
    cpu::for_each_rows(g, [&](int64_t row, int64_t rows) {
      cpu::blocks().storage<T>().gated(asked, cpu::matrix<T>(g).block(row, 0, rows, cols),
                                       cpu::matrix<T>(u).block(row, 0, rows, cols),
                                       cpu::result<T>(hidden).block(row, 0, rows, cols));
    });
  });
  return hidden;
}

void gated_bwd(const Tensor& d_hidden, const Tensor& gate, const Tensor& up, const std::string& act,
               Tensor d_gate, Tensor d_up) {
  const cpu::Act asked = cpu::act_named(act);
  const Operand d(d_hidden), g(gate), u(up), to_gate(d_gate), to_up(d_up);
  cpu::check_gate(g);
  cpu::check_like("d_hidden", d, g);
  cpu::check_like("up", u, g);
  cpu::check_like("d_gate", to_gate, g);
  cpu::check_like("d_up", to_up, g);
  cpu::with_storage_type("gate", g.dtype, [&](auto storage) {
    using T = decltype(storage);
    const int64_t cols = g.size(1);
    cpu::for_each_rows(g, [&](int64_t row, int64_t rows) {
      const auto of = [&](const Operand& operand) {
        return cpu::matrix<T>(operand).block(row, 0, rows, cols);
      };
      cpu::blocks().storage<T>().gated_gradients(asked, of(d), of(g), of(u),
                                                 cpu::result<T>(d_gate).block(row, 0, rows, cols),
                                                 cpu::result<T>(d_up).block(row, 0, rows, cols));
    });
  });
}

}  // namespace lora_ext
