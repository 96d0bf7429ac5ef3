// The bindings of LoRA's operations on the CPU: check arguments, plan, and call the kernels.
#include <algorithm>
#include <string>
#include <vector>

#include "cpu/pack.h"
#include "cpu/plan.h"
#include "dispatch.h"

namespace loraplex {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Tensor;

// What shrink and expand have in common: v, the pool, and which adapter serves which rows.
struct LoraCall {
  const char* function;
  LoraParams params{};
  LoraBatch batch{};
  std::vector<int64_t> modules, widths;

  LoraCall(const char* function, TensorView v, TensorView activations, const char* name,
           TensorView pool, TensorView segment_indptr, TensorView page_tables, int64_t layer,
           const Array<int64_t>& modules, int64_t num_modules)
      : function(function), modules(modules.begin(), modules.end()) {
    const Argument rows{function, name, activations}, sums{function, "v", v};
    const Argument memory{function, "pool", pool};
    const Argument indptr{function, "segment_indptr", segment_indptr};
    const Argument tables{function, "page_tables", page_tables};
    require_host({rows, sums, memory, indptr, tables});
    params.dtype = rows.has_shape({kAny, kAny}).has_dense_rows().float_type();
    params.activations = activations.data_ptr();
    params.activation_stride = activations.stride(0);
    batch.group_size = this->modules.size();
    sums.has_type(kFloat32).has_shape({kAny, batch.group_size, kAny}).has_dense_rows();
    params.v = static_cast<float*>(v.data_ptr());
    sums.copy_strides(params.v_strides);
    memory.has_type(kUint8).has_shape({kAny, kAny}).is_contiguous();
    params.pool = memory.data<uint8_t>();
    params.page_bytes = pool.size(1);
    const bool has_experts = segment_indptr.ndim() == 2;
    indptr.has_type(kInt32).is_contiguous();
    if (!has_experts) indptr.has_shape({kAny});
    batch.num_experts = has_experts ? segment_indptr.size(0) : 1;
    batch.num_segments = segment_indptr.size(has_experts ? 1 : 0) - 1;
    LORAPLEX_REQUIRE(batch.num_experts > 0 && batch.num_segments >= 0)
        << function << ": segment_indptr is empty";
    tables.has_type(kInt32).has_shape({batch.num_segments, kAny}).has_dense_rows();
    batch.segment_indptr = indptr.data<int32_t>();
    batch.page_tables = tables.data<int32_t>();
    batch.page_table_stride = page_tables.stride(0);
    batch.max_pages = page_tables.size(1);
    batch.num_pages = pool.size(0);
    batch.num_tokens = std::min(activations.size(0), v.size(0));
    batch.max_rank = v.size(2);
    batch.layer = layer;
    batch.num_modules = num_modules;
    check_range(function, "layer", &layer, 1, INT32_MAX);
    check_range(function, "modules", this->modules.data(), batch.group_size, num_modules);
  }

  void run(void (*kernel)(const LoraParams&)) {
    batch.modules = modules.data();
    batch.widths = widths.data();
    static thread_local std::vector<LoraItem> items;
    const std::string error = plan_lora(items, params, batch);
    LORAPLEX_REQUIRE(error.empty()) << function << ": " << error;
    kernel(params);
  }
};

void lora_shrink(TensorView v, TensorView x, TensorView pool, TensorView segment_indptr,
                 TensorView page_tables, int64_t layer, Array<int64_t> modules,
                 int64_t num_modules) {
  LoraCall call("shrink", v, x, "x", pool, segment_indptr, page_tables, layer, modules,
                num_modules);
  call.widths = {x.size(1)};
  call.run(active->lora_shrink);
}

void lora_expand(TensorView y, TensorView v, TensorView pool, TensorView segment_indptr,
                 TensorView page_tables, int64_t layer, Array<int64_t> modules, int64_t num_modules,
                 Array<int64_t> offsets) {
  LoraCall call("expand", v, y, "y", pool, segment_indptr, page_tables, layer, modules,
                num_modules);
  const std::vector<int64_t> bounds(offsets.begin(), offsets.end());
  bool is_sorted =
      bounds.size() == call.modules.size() + 1 && bounds[0] >= 0 && bounds.back() <= y.size(1);
  for (size_t i = 0; is_sorted && i + 1 < bounds.size(); ++i) {
    call.widths.push_back(bounds[i + 1] - bounds[i]);
    is_sorted = call.widths.back() >= 0;
  }
  LORAPLEX_REQUIRE(is_sorted) << "expand: offsets must be " << call.modules.size() + 1
                              << " increasing columns of y, of which there are " << y.size(1)
                              << ", got " << shape_text(bounds.data(), bounds.size());
  call.params.offsets = bounds.data();
  call.batch.is_expand = true;
  call.run(active->lora_expand);
}

SourceType source_type(const Argument& argument) {
  const DLDataType type = argument.tensor.dtype();
  if (same(type, kFloat32)) return SourceType::kFloat32;
  if (same(type, kFloat16)) return SourceType::kFloat16;
  LORAPLEX_REQUIRE(same(type, kBFloat16)) << argument.function << ": " << argument.name
                                          << " must be of type float32, float16 or bfloat16, got "
                                          << tvm::ffi::DLDataTypeToString(type);
  return SourceType::kBFloat16;
}

PackImage image_of(const Argument& pages, int64_t itemsize) {
  const char* function = pages.function;
  LORAPLEX_REQUIRE(itemsize == 2 || itemsize == 4)
      << function << ": itemsize is " << itemsize << ", allowed is 2 (bfloat16) or 4 (float32)";
  PackImage image{};
  image.dtype = itemsize == 2 ? DType::kBFloat16 : DType::kFloat32;
  pages.has_type(kUint8).has_shape({kAny, kAny}).is_contiguous();
  image.pages = static_cast<uint8_t*>(pages.tensor.data_ptr());
  image.num_pages = pages.tensor.size(0);
  image.page_bytes = pages.tensor.size(1);
  LORAPLEX_REQUIRE(image.page_bytes >= image.tile_bytes())
      << function << ": pages must each hold a tile of " << image.tile_bytes() << " bytes, got "
      << image.page_bytes;
  return image;
}

int64_t pack_lora(TensorView pages, int64_t itemsize, Array<Tensor> matrices,
                  Array<int64_t> first_tiles, Array<bool> are_transposed, Array<double> scalings) {
  const char* function = "pack_lora";
  const Argument memory{function, "pages", pages};
  require_host({memory});
  const PackImage image = image_of(memory, itemsize);
  const size_t n = matrices.size();
  LORAPLEX_REQUIRE(first_tiles.size() == n && are_transposed.size() == n && scalings.size() == n)
      << function << ": first_tiles, are_transposed and scalings must be as many as matrices, " << n
      << ", got " << first_tiles.size() << ", " << are_transposed.size() << " and "
      << scalings.size();
  const int64_t num_tiles = image.num_pages * image.tiles_per_page();
  int64_t next_tile = 0;
  std::vector<PackMatrix> sources;
  for (size_t i = 0; i < n; ++i) {
    const std::string name = "matrices[" + std::to_string(i) + "]";
    const Argument matrix{function, name.c_str(), TensorView(matrices[i])};
    require_host({matrix});
    PackMatrix source{};
    source.type = source_type(matrix.has_shape({kAny, kAny}).has_dense_rows());
    source.data = matrix.tensor.data_ptr();
    source.row_stride = matrix.tensor.stride(0);
    source.is_transposed = are_transposed[i];
    source.rank = matrix.tensor.size(source.is_transposed ? 1 : 0);
    source.columns = matrix.tensor.size(source.is_transposed ? 0 : 1);
    source.scaling = static_cast<float>(scalings[i]);
    source.first_tile = first_tiles[i];
    const int64_t last_allowed = num_tiles - source.num_tiles();
    LORAPLEX_REQUIRE(source.first_tile >= next_tile && source.first_tile <= last_allowed)
        << function << ": first_tiles[" << i << "] is " << source.first_tile << ", allowed is "
        << next_tile << " to " << last_allowed << ": behind the matrix before it and inside the "
        << num_tiles << " tiles of pages";
    next_tile = source.first_tile + source.num_tiles();
    sources.push_back(source);
  }
  return pack_matrices(image, sources);
}

}  // namespace
}  // namespace loraplex

TVM_FFI_DLL_EXPORT_TYPED_FUNC(lora_shrink, loraplex::lora_shrink);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(lora_expand, loraplex::lora_expand);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_lora, loraplex::pack_lora);
