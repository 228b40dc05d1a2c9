#include "checks.h"

#include <torch/headeronly/util/Exception.h>

#include <sstream>

#include "tensor_utils.h"

namespace lora_ext {
namespace {

std::string device_text(int32_t type, int32_t index) {
  const char* name = type == aoti_torch_device_type_cpu()    ? "cpu"
                     : type == aoti_torch_device_type_cuda() ? "cuda"
                     : type == aoti_torch_device_type_meta() ? "meta"
                                                             : "another device";
  return index < 0 ? name : std::string(name) + ":" + std::to_string(index);
}

int64_t element_bytes(const Operand& operand) {
  switch (operand.dtype) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float:
      return 4;
    case ScalarType::Double:
      return 8;
    default:
      return static_cast<int64_t>(operand.tensor->element_size());
  }
}

}  // namespace

Checks::Checks(const char* name, const Operand& first) : dtype_(first.dtype) {
  LORA_EXT_CHECK(aoti_torch_get_device_type(first.tensor->get(), &type_));
  LORA_EXT_CHECK(aoti_torch_get_device_index(first.tensor->get(), &index_));
  check_memory(name, first);
}

bool Checks::on_cpu() const { return type_ == aoti_torch_device_type_cpu(); }

void Checks::dtype(const char* name, const Operand& operand) const {
  STD_TORCH_CHECK(operand.dtype == dtype_, name, " must have x's dtype ",
                  torch::headeronly::toString(dtype_), ", got ",
                  torch::headeronly::toString(operand.dtype));
}

void Checks::adapter_dtype(const char* name, const Operand& operand) const {
  const bool half = dtype_ == ScalarType::BFloat16 || dtype_ == ScalarType::Half;
  if (!half || operand.dtype != ScalarType::Float) dtype(name, operand);
}

void Checks::place(const char* name, const Operand& operand, bool is_read) const {
  int32_t type, index;
  LORA_EXT_CHECK(aoti_torch_get_device_type(operand.tensor->get(), &type));
  LORA_EXT_CHECK(aoti_torch_get_device_index(operand.tensor->get(), &index));
  STD_TORCH_CHECK(type == type_ && index == index_, name, " must be on device ",
                  device_text(type_, index_), ", got ", device_text(type, index));
  if (is_read) check_memory(name, operand);
}

void check_dim(const char* name, const Operand& operand, int64_t dim, const char* meaning) {
  STD_TORCH_CHECK(operand.dim == dim, name, " must have shape ", meaning, ", got ",
                  text_of(operand.sizes, operand.dim));
}

void check_shape(const char* name, const Operand& operand, std::initializer_list<int64_t> sizes) {
  bool fits = operand.dim == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; fits && i < operand.dim; ++i) fits = operand.size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(fits, name, " must have shape ", text_of(sizes.begin(), sizes.size()), ", got ",
                  text_of(operand.sizes, operand.dim));
}

void check_is(const char* name, const Operand& operand, ScalarType dtype) {
  STD_TORCH_CHECK(operand.dtype == dtype, name, " must have dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(operand.dtype));
}

void check_given(const char* name, const std::optional<Tensor>& tensor, const char* reader) {
  STD_TORCH_CHECK(tensor.has_value(), name, " must be a tensor where ", reader,
                  " is asked for, got None");
}

void check_count(const char* name, size_t got, size_t count) {
  STD_TORCH_CHECK(got == count, name, " must have ", count, " elements, one a layer, got ", got);
}

void check_memory(const char* name, const Operand& operand) {
  int64_t first, held, reach = 1;
  for (int64_t i = 0; i < operand.dim; ++i) {
    if (operand.size(i) == 0) return;
    reach += (operand.size(i) - 1) * operand.stride(i);
  }
  LORA_EXT_CHECK(aoti_torch_get_storage_offset(operand.tensor->get(), &first));
  LORA_EXT_CHECK(aoti_torch_get_storage_size(operand.tensor->get(), &held));
  const int64_t bytes = (first + reach) * element_bytes(operand);
  STD_TORCH_CHECK(held >= bytes, name, "'s memory must hold the ", bytes,
                  " bytes that its sizes and strides reach, got ", held,
                  " bytes: its storage was freed or shrunk");
}

std::string text_of(const int64_t* sizes, int64_t dim) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < dim; ++i) text << (i ? ", " : "") << sizes[i];
  text << (dim == 1 ? ",)" : ")");
  return text.str();
}

}  // namespace lora_ext
