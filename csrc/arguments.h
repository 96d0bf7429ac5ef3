// Checks of the binding's arguments: each failure is a ValueError that names the function, the
// argument, what it is and what it must be.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <initializer_list>
#include <string>

#include "cpu/kernels.h"

#define LORAPLEX_REQUIRE(condition) \
  if (!(condition)) TVM_FFI_THROW(ValueError)

namespace loraplex {
namespace {

using tvm::ffi::TensorView;

constexpr DLDataType kFloat32{kDLFloat, 32, 1};
constexpr DLDataType kFloat16{kDLFloat, 16, 1};
[[maybe_unused]] constexpr DLDataType kFloat64{kDLFloat, 64, 1};
constexpr DLDataType kBFloat16{kDLBfloat, 16, 1};
constexpr DLDataType kFloat8{kDLFloat8_e4m3fn, 8, 1};
constexpr DLDataType kInt32{kDLInt, 32, 1};
constexpr DLDataType kInt64{kDLInt, 64, 1};
constexpr DLDataType kUint8{kDLUInt, 8, 1};
constexpr int64_t kAny = -1;

bool same(DLDataType a, DLDataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

std::string shape_text(const int64_t* shape, int64_t ndim) {
  std::string text = "[";
  for (int64_t i = 0; i < ndim; ++i) {
    text += (i ? ", " : "") + (shape[i] == kAny ? std::string("*") : std::to_string(shape[i]));
  }
  return text + "]";
}

// One tensor argument, with what its error messages call it. Checks return the argument, so that
// they can be strung together.
struct Argument {
  const char* function;
  const char* name;
  TensorView tensor;

  const Argument& has_type(DLDataType type) const {
    LORAPLEX_REQUIRE(same(tensor.dtype(), type))
        << function << ": " << name << " must be of type " << tvm::ffi::DLDataTypeToString(type)
        << ", got " << tvm::ffi::DLDataTypeToString(tensor.dtype());
    return *this;
  }

  const Argument& has_shape(std::initializer_list<int64_t> shape) const {
    bool matches = tensor.ndim() == static_cast<int32_t>(shape.size());
    for (size_t i = 0; matches && i < shape.size(); ++i) {
      matches = shape.begin()[i] == kAny || shape.begin()[i] == tensor.size(i);
    }
    LORAPLEX_REQUIRE(matches) << function << ": " << name << " must have shape "
                              << shape_text(shape.begin(), shape.size()) << ", got "
                              << shape_text(tensor.shape().data(), tensor.ndim());
    return *this;
  }

  // The type and shape of x, and dense rows.
  const Argument& is_like(const Argument& x) const {
    has_type(x.tensor.dtype());
    const auto shape = tensor.shape(), wanted = x.tensor.shape();
    LORAPLEX_REQUIRE(std::equal(shape.begin(), shape.end(), wanted.begin(), wanted.end()))
        << function << ": " << name << " must have the shape of " << x.name << ", "
        << shape_text(wanted.data(), wanted.size()) << ", got "
        << shape_text(shape.data(), shape.size());
    return has_dense_rows();
  }

  const Argument& has_dense_rows() const {
    LORAPLEX_REQUIRE(tensor.size(-1) <= 1 || tensor.stride(-1) == 1)
        << function << ": " << name << " must have stride 1 in its last dimension, got stride "
        << tensor.stride(-1);
    return *this;
  }

  const Argument& is_contiguous() const {
    LORAPLEX_REQUIRE(tensor.IsContiguous())
        << function << ": " << name << " must be contiguous, got shape "
        << shape_text(tensor.shape().data(), tensor.ndim()) << " with strides "
        << shape_text(tensor.strides().data(), tensor.ndim());
    return *this;
  }

  DType float_type() const {
    const bool is_bfloat16 = same(tensor.dtype(), kBFloat16);
    LORAPLEX_REQUIRE(is_bfloat16 || same(tensor.dtype(), kFloat32))
        << function << ": " << name << " must be of type bfloat16 or float32, got "
        << tvm::ffi::DLDataTypeToString(tensor.dtype());
    has_type(tensor.dtype());
    return is_bfloat16 ? DType::kBFloat16 : DType::kFloat32;
  }

  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.data_ptr());
  }

  // The strides of all dimensions but the last.
  void copy_strides(int64_t* strides) const {
    for (int32_t i = 0; i + 1 < tensor.ndim(); ++i) strides[i] = tensor.stride(i);
  }
};

// The device that all these tensors are on.
[[maybe_unused]] DLDevice common_device(std::initializer_list<Argument> arguments) {
  const Argument& first = *arguments.begin();
  const DLDevice device = first.tensor.device();
  for (const Argument& argument : arguments) {
    const DLDevice other = argument.tensor.device();
    LORAPLEX_REQUIRE(other.device_type == device.device_type && other.device_id == device.device_id)
        << first.function << ": " << argument.name << " must be on the device of " << first.name;
  }
  return device;
}

[[maybe_unused]] void require_host(std::initializer_list<Argument> arguments) {
  LORAPLEX_REQUIRE(common_device(arguments).device_type == kDLCPU)
      << arguments.begin()->function << ": " << arguments.begin()->name
      << " must be in host memory";
}

[[maybe_unused]] void require_cuda(std::initializer_list<Argument> arguments) {
  LORAPLEX_REQUIRE(common_device(arguments).device_type == kDLCUDA)
      << arguments.begin()->function << ": " << arguments.begin()->name
      << " must be in the memory of a CUDA device";
}

[[maybe_unused]] void check_range(const char* function, const char* name, const int64_t* values,
                                  int64_t n, int64_t end) {
  for (int64_t i = 0; i < n; ++i) {
    LORAPLEX_REQUIRE(values[i] >= 0 && values[i] < end)
        << function << ": " << name << "[" << i << "] is " << values[i] << ", allowed is 0 to "
        << end - 1;
  }
}

}  // namespace
}  // namespace loraplex
