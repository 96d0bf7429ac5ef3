// The bindings of products with quantised weights: check arguments, and call the kernels.
#include "dispatch.h"

namespace loraplex {
namespace {

using tvm::ffi::Optional;

// values: [out_features, in_features / 2] with a table of 16, else [out_features, in_features].
GroupedParams grouped_params(const char* function, TensorView out, TensorView values,
                             TensorView scales, Optional<TensorView> middles,
                             Optional<TensorView> table, bool is_float) {
  const Argument output{function, "out", out}, bytes{function, "values", values};
  const Argument scale{function, "scales", scales};
  GroupedParams p{};
  p.dtype = output.is_contiguous().float_type();
  bytes.has_type(kUint8).has_shape({kAny, kAny}).is_contiguous();
  p.out = out.data_ptr();
  p.values = bytes.data<uint8_t>();
  p.out_features = values.size(0);
  p.in_features = values.size(1) * (table.has_value() ? 2 : 1);
  scale.has_type(out.dtype()).has_shape({p.out_features, kAny}).is_contiguous();
  p.scales = scales.data_ptr();
  const int64_t groups = scales.size(1);
  const int block = table.has_value() ? kGroupedBlock4 : kGroupedBlock8;
  LORAPLEX_REQUIRE(groups > 0 && p.in_features % (groups * block) == 0)
      << function << ": scales must be of groups whose size is a multiple of " << block << ", got "
      << groups << " groups of " << p.in_features << " inputs";
  p.group_size = p.in_features / groups;
  if (middles.has_value()) {
    const Argument middle{function, "middles", middles.value()};
    middle.has_type(out.dtype()).has_shape({p.out_features, groups}).is_contiguous();
    p.middles = middle.data<void>();
  }
  p.code = is_float ? GroupedCode::kFloat8 : GroupedCode::kInt8;
  if (table.has_value()) {
    const Argument entries{function, "table", table.value()};
    entries.has_type(kFloat32).has_shape({16}).is_contiguous();
    p.table = entries.data<float>();
    p.code = GroupedCode::kTable4;
  }
  LORAPLEX_REQUIRE(out.device().device_type == kDLCPU)
      << function << ": tensors must be in host memory";
  return p;
}

void grouped_linear(TensorView out, TensorView x, TensorView values, TensorView scales,
                    Optional<TensorView> middles, Optional<TensorView> table, bool is_float) {
  const char* function = "grouped_linear";
  GroupedParams p = grouped_params(function, out, values, scales, middles, table, is_float);
  const Argument input{function, "x", x}, output{function, "out", out};
  input.has_type(kFloat32).has_shape({kAny, p.in_features}).is_contiguous();
  p.x = input.data<float>();
  p.num_rows = x.size(0);
  output.has_shape({p.num_rows, p.out_features});
  active->grouped(p);
}

void grouped_expand(TensorView out, TensorView values, TensorView scales,
                    Optional<TensorView> middles, Optional<TensorView> table, bool is_float) {
  const char* function = "grouped_expand";
  const GroupedParams p = grouped_params(function, out, values, scales, middles, table, is_float);
  const Argument output{function, "out", out};
  output.has_shape({p.out_features, p.in_features});
  active->grouped(p);
}

}  // namespace
}  // namespace loraplex

TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_linear, loraplex::grouped_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_expand, loraplex::grouped_expand);
