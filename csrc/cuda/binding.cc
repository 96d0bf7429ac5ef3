// The bindings of what only CUDA has: linears of few rows, attention of rows that decode, and LoRA
// products planned on the host, whose plan is on the device.
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include "../arguments.h"
#include "kernels.h"

namespace loraplex {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Optional;

void cuda_linear(TensorView y, TensorView x, TensorView weight, Optional<TensorView> bias,
                 TensorView partials, TensorView flags) {
  const char* function = "cuda_linear";
  const Argument input{function, "x", x}, matrix{function, "weight", weight};
  const Argument output{function, "y", y}, sums{function, "partials", partials};
  const Argument handed{function, "flags", flags};
  require_cuda({output, input, matrix, sums, handed});
  cuda::LinearParams p{};
  p.num_tokens = input.has_type(kBFloat16).has_shape({kAny, kAny}).has_dense_rows().tensor.size(0);
  p.in_features = x.size(1);
  matrix.has_type(kBFloat16).has_shape({kAny, p.in_features}).is_contiguous();
  p.out_features = weight.size(0);
  output.has_type(kBFloat16).has_shape({p.num_tokens, p.out_features}).has_dense_rows();
  LORAPLEX_REQUIRE(p.num_tokens <= cuda::kMaxLinearTokens)
      << function << ": x must have at most " << cuda::kMaxLinearTokens << " rows, got "
      << p.num_tokens;
  LORAPLEX_REQUIRE(p.in_features % 8 == 0 && p.out_features % 8 == 0 && x.stride(0) % 8 == 0 &&
                   y.stride(0) % 2 == 0)
      << function << ": rows must have a multiple of 8 elements, got " << p.in_features << " of x, "
      << x.stride(0) << " apart, and " << p.out_features << " of y, " << y.stride(0) << " apart";
  if (bias.has_value()) {
    const Argument added{function, "bias", *bias};
    require_cuda({added});
    added.has_type(kBFloat16).has_shape({p.out_features}).is_contiguous();
    p.bias = (*bias).data_ptr();
  }
  p.y = y.data_ptr(), p.x = x.data_ptr(), p.weight = weight.data_ptr();
  p.y_stride = y.stride(0), p.x_stride = x.stride(0);
  p.num_blocks = handed.has_type(kInt32).has_shape({kAny, 2}).is_contiguous().tensor.size(0);
  sums.has_type(kFloat32).has_shape({p.num_blocks, cuda::kLinearSums}).is_contiguous();
  p.partials = static_cast<float*>(partials.data_ptr());
  p.flags = static_cast<int32_t*>(flags.data_ptr());
  if (p.num_tokens == 0) return;
  const DLDevice device = x.device();
  const char* error = cuda::linear(p, TVMFFIEnvGetStream(device.device_type, device.device_id));
  if (error != nullptr) TVM_FFI_THROW(RuntimeError) << function << ": " << error;
}

void cuda_decode_attention(TensorView out, TensorView q, TensorView k, TensorView v,
                           TensorView k_cache, TensorView v_cache, TensorView pages,
                           TensorView rows, TensorView shares, TensorView partials,
                           TensorView counters, double scale) {
  const char* function = "cuda_decode_attention";
  const Argument result{function, "out", out}, query{function, "q", q};
  const Argument keys{function, "k_cache", k_cache}, values{function, "v_cache", v_cache};
  const Argument table{function, "pages", pages}, row_list{function, "rows", rows};
  const Argument share_list{function, "shares", shares}, sums{function, "partials", partials};
  const Argument meeting{function, "counters", counters};
  const Argument new_keys{function, "k", k}, new_values{function, "v", v};
  require_cuda({result, query, new_keys, new_values, keys, values, table, row_list, share_list,
                sums, meeting});
  cuda::DecodeAttentionParams p{};
  query.has_type(kBFloat16).has_shape({kAny, kAny, cuda::kAttentionHeadDim});
  result.is_like(query).is_contiguous();
  keys.has_type(kBFloat16).has_shape({kAny, cuda::kAttentionPageTokens, kAny, q.size(2)});
  values.is_like(keys);
  p.num_kv_heads = k_cache.size(2);
  p.group = p.num_kv_heads == 0 ? 0 : q.size(1) / p.num_kv_heads;
  LORAPLEX_REQUIRE(0 < p.num_kv_heads && p.num_kv_heads <= cuda::kMaxAttentionKvHeads &&
                   0 < p.group && p.group <= cuda::kMaxAttentionGroup &&
                   p.group * p.num_kv_heads == q.size(1))
      << function << ": k_cache must have at most " << cuda::kMaxAttentionKvHeads
      << " heads and q as many, or up to " << cuda::kMaxAttentionGroup << " times as many, got "
      << p.num_kv_heads << " and " << q.size(1);
  const int64_t token_stride = p.num_kv_heads * q.size(2);
  for (const TensorView& cache : {k_cache, v_cache}) {
    LORAPLEX_REQUIRE(cache.stride(2) == q.size(2) && cache.stride(1) == token_stride &&
                     cache.stride(0) == k_cache.stride(0) && cache.stride(0) % 8 == 0)
        << function << ": caches must have dense pages, equally far apart";
  }
  new_keys.has_type(kBFloat16).has_shape({q.size(0), p.num_kv_heads, q.size(2)});
  new_values.is_like(new_keys);
  for (const TensorView& rows : {q, k, v}) {
    LORAPLEX_REQUIRE(rows.stride(1) == q.size(2) && rows.stride(0) % 8 == 0)
        << function << ": rows of q, k and v must be dense, and begin at multiples of 8 elements";
  }
  p.out = out.data_ptr(), p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr();
  p.k_cache = k_cache.data_ptr(), p.v_cache = v_cache.data_ptr();
  p.q_stride = q.stride(0), p.k_stride = k.stride(0), p.v_stride = v.stride(0);
  p.page_stride = k_cache.stride(0);
  p.scale = static_cast<float>(scale);
  p.pages = table.has_type(kInt32).has_shape({kAny}).is_contiguous().data<int32_t>();
  p.rows = row_list.has_type(kInt32).has_shape({kAny, 4}).is_contiguous().data<int32_t>();
  p.num_blocks = shares.size(0);
  p.shares = share_list.has_type(kInt32).has_shape({kAny, 4}).is_contiguous().data<int32_t>();
  sums.has_type(kFloat32).has_shape({p.num_blocks, 2 * q.size(1) * cuda::kAttentionPartSums});
  p.partials = static_cast<float*>(sums.is_contiguous().tensor.data_ptr());
  meeting.has_type(kInt32).has_shape({p.num_blocks, p.num_kv_heads}).is_contiguous();
  p.counters = static_cast<int32_t*>(counters.data_ptr());
  const DLDevice device = q.device();
  const char* error =
      cuda::decode_attention(p, TVMFFIEnvGetStream(device.device_type, device.device_id));
  if (error != nullptr) TVM_FFI_THROW(RuntimeError) << function << ": " << error;
}

struct CudaLoraCall {
  const char* function;
  DLDevice device;
  cuda::LoraParams params{};

  CudaLoraCall(const char* function, TensorView v, TensorView activations, const char* name,
               TensorView pool, TensorView items, TensorView num_items, TensorView pages,
               int64_t layer, const Array<int64_t>& modules, int64_t num_modules)
      : function(function), device(v.device()) {
    const Argument rows{function, name, activations}, sums{function, "v", v};
    const Argument memory{function, "pool", pool}, list{function, "items", items};
    const Argument count{function, "num_items", num_items}, table{function, "pages", pages};
    require_cuda({rows, sums, memory, list, count, table});
    params.dtype = rows.has_shape({kAny, kAny}).has_dense_rows().float_type();
    LORAPLEX_REQUIRE(reinterpret_cast<uintptr_t>(activations.data_ptr()) % 16 == 0 &&
                     activations.stride(0) % 8 == 0)
        << function << ": rows of " << name << " must begin at multiples of 8 elements";
    params.activations = activations.data_ptr();
    params.activation_stride = activations.stride(0);
    params.num_tokens = activations.size(0);
    params.num_columns = activations.size(1);
    params.group_size = modules.size();
    LORAPLEX_REQUIRE(params.group_size <= cuda::kMaxGroup)
        << function << ": modules are " << params.group_size << ", allowed are " << cuda::kMaxGroup;
    sums.has_type(kFloat32).has_shape({kAny, params.group_size, kAny}).is_contiguous();
    LORAPLEX_REQUIRE(v.size(2) % 4 == 0 && v.size(2) <= cuda::kMaxRank)
        << function << ": v must have a multiple of 4 ranks, at most " << cuda::kMaxRank << ", got "
        << v.size(2);
    params.v = static_cast<float*>(v.data_ptr());
    params.v_token_stride = v.stride(0);
    params.max_rank = v.size(2);
    memory.has_type(kUint8).has_shape({kAny, kAny}).is_contiguous();
    params.pool = memory.data<uint8_t>();
    params.page_bytes = pool.size(1);
    params.items = list.has_type(kInt32).has_shape({kAny, 4}).is_contiguous().data<int32_t>();
    params.num_items = count.has_type(kInt32).has_shape({1}).data<int32_t>();
    params.pages = table.has_type(kInt32).has_shape({kAny}).is_contiguous().data<int32_t>();
    params.layer = layer;
    params.num_modules = num_modules;
    for (int i = 0; i < params.group_size; ++i) params.modules[i] = modules[i];
  }

  void run(const char* (*kernel)(const cuda::LoraParams&, void*)) {
    const char* error = kernel(params, TVMFFIEnvGetStream(device.device_type, device.device_id));
    if (error != nullptr) TVM_FFI_THROW(RuntimeError) << function << ": " << error;
  }
};

void cuda_lora_shrink(TensorView v, TensorView x, TensorView partials, TensorView counters,
                      TensorView pool, TensorView items, TensorView num_items, TensorView pages,
                      int64_t layer, Array<int64_t> modules, int64_t num_modules) {
  const char* function = "cuda_lora_shrink";
  CudaLoraCall call(function, v, x, "x", pool, items, num_items, pages, layer, modules,
                    num_modules);
  LORAPLEX_REQUIRE(x.size(1) % 8 == 0)
      << function << ": x must have a multiple of 8 columns, got " << x.size(1);
  const Argument sums{function, "partials", partials}, meeting{function, "counters", counters};
  require_cuda({sums, meeting});
  const int64_t count = meeting.has_type(kInt32).has_shape({kAny}).is_contiguous().tensor.size(0);
  sums.has_type(kFloat32).has_shape({count, cuda::kPartialSums}).is_contiguous();
  call.params.partials = static_cast<float*>(partials.data_ptr());
  call.params.counters = static_cast<int32_t*>(counters.data_ptr());
  call.params.num_partials = count;
  call.run(&cuda::lora_shrink);
}

void cuda_lora_expand(TensorView y, TensorView v, TensorView pool, TensorView items,
                      TensorView num_items, TensorView pages, int64_t layer, Array<int64_t> modules,
                      int64_t num_modules, Array<int64_t> offsets) {
  CudaLoraCall call("cuda_lora_expand", v, y, "y", pool, items, num_items, pages, layer, modules,
                    num_modules);
  LORAPLEX_REQUIRE(offsets.size() == modules.size() + 1)
      << "cuda_lora_expand: offsets must be " << modules.size() + 1 << ", got " << offsets.size();
  for (size_t i = 0; i < offsets.size(); ++i) {
    LORAPLEX_REQUIRE(offsets[i] % 8 == 0 && offsets[i] >= (i ? offsets[i - 1] : 0) &&
                     offsets[i] <= y.size(1))
        << "cuda_lora_expand: offsets must increase in multiples of 8 up to " << y.size(1)
        << ", got " << offsets[i] << " at " << i;
    call.params.offsets[i] = offsets[i];
  }
  call.run(&cuda::lora_expand);
}

}  // namespace
}  // namespace loraplex

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_linear, loraplex::cuda_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_decode_attention, loraplex::cuda_decode_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_lora_shrink, loraplex::cuda_lora_shrink);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_lora_expand, loraplex::cuda_lora_expand);
