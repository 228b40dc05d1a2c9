// What is asked of one argument: its shape, dtype, device and memory. Each throws a message that
// names the argument, what was expected and what came.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>

#include "call.h"

namespace lora_ext {

// Checks arguments against the first, x or dy: its device and its dtype.
class Checks {
 public:
  Checks(const char* name, const Operand& first);

  ScalarType dtype() const { return dtype_; }
  bool on_cpu() const;

  void dtype(const char* name, const Operand& operand) const;
  // A and B may be float over a base of 16 bits.
  void adapter_dtype(const char* name, const Operand& operand) const;
  // On the same device, and, unless its layout alone is read, with its memory there.
  void place(const char* name, const Operand& operand, bool is_read = true) const;

 private:
  const ScalarType dtype_;
  int32_t type_, index_;
};

void check_dim(const char* name, const Operand& operand, int64_t dim, const char* meaning);
void check_shape(const char* name, const Operand& operand, std::initializer_list<int64_t> sizes);
void check_is(const char* name, const Operand& operand, ScalarType dtype);
void check_given(const char* name, const std::optional<Tensor>& tensor, const char* reader);
// A list has an element for each of `count` layers.
void check_count(const char* name, size_t got, size_t count);
// The tensor's memory holds what its sizes and strides reach.
void check_memory(const char* name, const Operand& operand);

// (2, 3), for messages.
std::string text_of(const int64_t* sizes, int64_t dim);

}  // namespace lora_ext
