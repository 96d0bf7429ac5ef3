// The bindings of the operations but LoRA's: check arguments, and call the kernels.
#include <string>

#include "cpu/plan.h"
#include "cuda/kernels.h"
#include "dispatch.h"

namespace loraplex {
namespace {

using tvm::ffi::Optional;

// ---- small operations ----

// Shape [tokens, size] or [tokens, heads, size] as strides of tokens and heads.
void row_strides(const Argument& argument, int64_t* strides) {
  strides[0] = argument.tensor.stride(0);
  strides[1] = argument.tensor.ndim() == 3 ? argument.tensor.stride(1) : 0;
}

RmsNormParams rms_norm_params(const char* function, const Argument& x, const Argument& weight,
                              double eps, double offset) {
  const int32_t ndim = x.tensor.ndim();
  LORAPLEX_REQUIRE(ndim == 2 || ndim == 3)
      << function << ": " << x.name << " must have 2 or 3 dimensions, got " << ndim;
  RmsNormParams p{};
  p.dtype = x.has_dense_rows().float_type();
  p.size = x.tensor.size(-1);
  weight.has_type(x.tensor.dtype()).has_shape({p.size}).is_contiguous();
  p.x = x.tensor.data_ptr();
  p.weight = weight.tensor.data_ptr();
  p.eps = static_cast<float>(eps);
  p.offset = static_cast<float>(offset);
  p.num_tokens = x.tensor.size(0);
  p.num_heads = ndim == 3 ? x.tensor.size(1) : 1;
  row_strides(x, p.x_strides);
  return p;
}

void rms_norm(TensorView out, TensorView x, TensorView weight, double eps, double offset) {
  const char* function = "rms_norm";
  const Argument input{function, "x", x}, output{function, "out", out};
  const Argument scale{function, "weight", weight};
  const DLDevice device = common_device({input, output, scale});
  RmsNormParams p = rms_norm_params(function, input, scale, eps, offset);
  p.out = output.is_like(input).tensor.data_ptr();
  row_strides(output, p.out_strides);
  run(function, device, active->rms_norm, LORAPLEX_CUDA_KERNEL(rms_norm), p);
}

void fused_add_rms_norm(TensorView x, TensorView residual, TensorView weight, double eps,
                        double offset) {
  const char* function = "fused_add_rms_norm";
  const Argument input{function, "x", x}, stream{function, "residual", residual};
  const Argument scale{function, "weight", weight};
  const DLDevice device = common_device({input, stream, scale});
  RmsNormParams p = rms_norm_params(function, input, scale, eps, offset);
  p.out = p.x;
  row_strides(input, p.out_strides);
  p.residual = stream.is_like(input).tensor.data_ptr();
  row_strides(stream, p.residual_strides);
  run(function, device, active->rms_norm, LORAPLEX_CUDA_KERNEL(rms_norm), p);
}

void apply_rope(TensorView positions, TensorView q, TensorView k, TensorView cos_sin_cache) {
  const char* function = "apply_rope";
  const Argument cache{function, "cos_sin_cache", cos_sin_cache};
  cache.has_type(kFloat32).has_shape({kAny, kAny}).is_contiguous();
  const Argument position{function, "positions", positions};
  position.has_type(kInt64).has_shape({kAny}).is_contiguous();
  RopeParams p{};
  p.num_tokens = positions.size(0);
  p.half = cos_sin_cache.size(1) / 2;
  const Argument tensors[] = {{function, "q", q}, {function, "k", k}};
  const DLDevice device = common_device({position, cache, tensors[0], tensors[1]});
  p.dtype = tensors[0].float_type();
  for (int i = 0; i < 2; ++i) {
    tensors[i].has_type(q.dtype()).has_shape({p.num_tokens, kAny, kAny}).has_dense_rows();
    LORAPLEX_REQUIRE(2 * p.half <= tensors[i].tensor.size(2) && cos_sin_cache.size(1) % 2 == 0)
        << "apply_rope: cos_sin_cache must have an even number of columns, at most the head_dim of "
        << tensors[i].name << ", " << tensors[i].tensor.size(2) << ", got "
        << cos_sin_cache.size(1);
    p.tensors[i] = tensors[i].tensor.data_ptr();
    p.num_heads[i] = tensors[i].tensor.size(1);
    tensors[i].copy_strides(p.strides[i]);
  }
  p.positions = position.data<int64_t>();
  p.cos_sin_cache = cache.data<float>();
  if (device.device_type == kDLCPU) {
    check_range(function, "positions", p.positions, p.num_tokens, cos_sin_cache.size(0));
  }
  run(function, device, active->rope, LORAPLEX_CUDA_KERNEL(rope), p);
}

void act_and_mul(const char* function, Activation activation, TensorView out, TensorView gate_up) {
  const Argument output{function, "out", out}, input{function, "gate_up", gate_up};
  const DLDevice device = common_device({output, input});
  ActAndMulParams p{};
  p.activation = activation;
  p.dtype = output.has_shape({kAny, kAny}).has_dense_rows().float_type();
  p.num_tokens = out.size(0);
  p.size = out.size(1);
  input.has_type(out.dtype()).has_shape({p.num_tokens, 2 * p.size}).has_dense_rows();
  p.out = out.data_ptr();
  p.gate_up = gate_up.data_ptr();
  p.out_stride = out.stride(0);
  p.gate_up_stride = gate_up.stride(0);
  run(function, device, active->act_and_mul, LORAPLEX_CUDA_KERNEL(act_and_mul), p);
}

void silu_and_mul(TensorView out, TensorView gate_up) {
  act_and_mul("silu_and_mul", Activation::kSilu, out, gate_up);
}

void gelu_tanh_and_mul(TensorView out, TensorView gate_up) {
  act_and_mul("gelu_tanh_and_mul", Activation::kGeluTanh, out, gate_up);
}

// ---- attention ----

// Whether caches are of float8 e4m3fn; else they must be of the type of the rows, k or q.
bool has_float8_caches(const Argument& k_cache, const Argument& rows) {
  const DLDataType type = k_cache.tensor.dtype(), plain = rows.tensor.dtype();
  LORAPLEX_REQUIRE(same(type, plain) || same(type, kFloat8))
      << k_cache.function << ": " << k_cache.name << " must be of type "
      << tvm::ffi::DLDataTypeToString(plain) << " or float8_e4m3fn, got "
      << tvm::ffi::DLDataTypeToString(type);
  return same(type, kFloat8);
}

CacheParams cache_params(const Argument& cache, DLDataType type,
                         std::initializer_list<int64_t> shape) {
  cache.has_type(type).has_shape(shape).has_dense_rows();
  CacheParams p{};
  p.data = cache.tensor.data_ptr();
  p.page_stride = cache.tensor.stride(0);
  p.token_stride = cache.tensor.stride(1);
  p.head_stride = cache.tensor.stride(2);
  return p;
}

void write_kv(TensorView k, TensorView v, TensorView k_cache, TensorView v_cache,
              TensorView slot_mapping) {
  const char* function = "write_kv";
  const Argument slots{function, "slot_mapping", slot_mapping};
  const Argument rows[] = {{function, "k", k}, {function, "v", v}};
  const Argument caches[] = {{function, "k_cache", k_cache}, {function, "v_cache", v_cache}};
  const DLDevice device = common_device({rows[0], rows[1], caches[0], caches[1], slots});
  WriteKvParams p{};
  slots.has_type(kInt64).has_shape({kAny}).is_contiguous();
  rows[0].has_shape({kAny, kAny, kAny});
  caches[0].has_shape({kAny, kAny, kAny, kAny});
  p.dtype = rows[0].float_type();
  p.has_float8_caches = has_float8_caches(caches[0], rows[0]);
  p.num_tokens = slot_mapping.size(0);
  p.num_kv_heads = k.size(1);
  p.head_dim = k.size(2);
  p.block_size = k_cache.size(1);
  const int64_t num_pages = k_cache.size(0);
  for (int i = 0; i < 2; ++i) {
    rows[i].has_type(k.dtype()).has_shape({p.num_tokens, p.num_kv_heads, p.head_dim});
    rows[i].has_dense_rows().copy_strides(p.strides[i]);
    p.new_rows[i] = rows[i].tensor.data_ptr();
    p.caches[i] = cache_params(caches[i], k_cache.dtype(),
                               {num_pages, p.block_size, p.num_kv_heads, p.head_dim});
  }
  p.slot_mapping = slots.data<int64_t>();
  if (device.device_type == kDLCPU) {
    check_range(function, "slot_mapping", p.slot_mapping, p.num_tokens, num_pages * p.block_size);
  }
  run(function, device, active->write_kv, LORAPLEX_CUDA_KERNEL(write_kv), p);
}

void paged_attention(TensorView out, TensorView q, TensorView k_cache, TensorView v_cache,
                     TensorView block_table, TensorView cu_seqlens_q, TensorView seq_lens,
                     double scale, Optional<int64_t> window, double soft_cap) {
  const char* function = "paged_attention";
  const Argument query{function, "q", q}, output{function, "out", out};
  const Argument k{function, "k_cache", k_cache}, v{function, "v_cache", v_cache};
  const Argument table{function, "block_table", block_table};
  const Argument indptr{function, "cu_seqlens_q", cu_seqlens_q};
  const Argument lengths{function, "seq_lens", seq_lens};
  require_host({query, output, k, v, table, indptr, lengths});
  AttentionParams p{};
  p.dtype = query.has_shape({kAny, kAny, kAny}).has_dense_rows().float_type();
  p.head_dim = q.size(2);
  LORAPLEX_REQUIRE(p.head_dim <= kMaxHeadDim)
      << function << ": head_dim " << p.head_dim << " is more than the " << kMaxHeadDim
      << " supported";
  k.has_shape({kAny, kAny, kAny, p.head_dim});
  p.block_size = k_cache.size(1);
  p.num_kv_heads = k_cache.size(2);
  LORAPLEX_REQUIRE(p.num_kv_heads > 0 && q.size(1) % p.num_kv_heads == 0)
      << function << ": the number of heads, " << q.size(1)
      << ", must be a multiple of the number of KV heads, " << p.num_kv_heads;
  p.group = q.size(1) / p.num_kv_heads;
  const int64_t num_pages = k_cache.size(0),
                num_requests = lengths.has_shape({kAny}).tensor.size(0);
  p.has_float8_caches = has_float8_caches(k, query);
  const auto cache_shape = {num_pages, p.block_size, p.num_kv_heads, p.head_dim};
  p.k_cache = cache_params(k, k_cache.dtype(), cache_shape);
  p.v_cache = cache_params(v, k_cache.dtype(), cache_shape);
  table.has_type(kInt32).has_shape({num_requests, kAny}).has_dense_rows();
  indptr.has_type(kInt32).has_shape({num_requests + 1}).is_contiguous();
  lengths.has_type(kInt32).is_contiguous();
  output.is_like(query);
  p.out = out.data_ptr();
  p.q = q.data_ptr();
  output.copy_strides(p.out_strides);
  query.copy_strides(p.q_strides);
  p.block_table = table.data<int32_t>();
  p.block_table_stride = block_table.stride(0);
  p.cu_seqlens_q = indptr.data<int32_t>();
  p.seq_lens = lengths.data<int32_t>();
  p.window = window.value_or(INT32_MAX);
  LORAPLEX_REQUIRE(p.window >= 1) << function << ": window must be None or at least 1, got "
                                  << p.window;
  LORAPLEX_REQUIRE(soft_cap >= 0) << function << ": soft_cap must be 0 (none) or more, got "
                                  << soft_cap;
  p.scale = static_cast<float>(scale);
  p.soft_cap = static_cast<float>(soft_cap);
  // Kept between calls, because fresh memory of this size costs page faults.
  static thread_local AttentionPlan plan;
  const std::string error =
      plan_attention(plan, p, num_requests, q.size(0), block_table.size(1), num_pages);
  LORAPLEX_REQUIRE(error.empty()) << function << ": " << error;
  active->attention(p);
}

// ---- sampling ----

void sample(TensorView token_ids, TensorView logits, TensorView temperature, TensorView top_k,
            TensorView top_p, TensorView min_p, TensorView uniform) {
  const char* function = "sample";
  const Argument out{function, "token_ids", token_ids}, values{function, "logits", logits};
  const DLDevice device = common_device({out, values});
  SampleParams p{};
  p.num_rows = out.has_type(kInt64).has_shape({kAny}).is_contiguous().tensor.size(0);
  p.token_ids = static_cast<int64_t*>(token_ids.data_ptr());
  p.dtype = values.has_shape({p.num_rows, kAny}).has_dense_rows().float_type();
  p.logits = logits.data_ptr();
  p.logits_stride = logits.stride(0);
  LORAPLEX_REQUIRE(logits.size(1) >= 1 && logits.size(1) <= kMaxVocabSize)
      << function << ": logits must have 1 to " << kMaxVocabSize << " columns, got "
      << logits.size(1);
  p.vocab_size = static_cast<int32_t>(logits.size(1));
  const auto find = [&]<class T>(const T*& data, const char* name, TensorView tensor,
                                 DLDataType type) {
    const Argument of_rows{function, name, tensor};
    common_device({out, of_rows});
    data = of_rows.has_type(type).has_shape({p.num_rows}).is_contiguous().data<T>();
  };
  find(p.temperature, "temperature", temperature, kFloat32);
  find(p.top_k, "top_k", top_k, kInt32);
  find(p.top_p, "top_p", top_p, kFloat64);
  find(p.min_p, "min_p", min_p, kFloat64);
  find(p.uniform, "uniform", uniform, kFloat64);
  run(function, device, active->sample, LORAPLEX_CUDA_KERNEL(sample), p);
}

}  // namespace
}  // namespace loraplex

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, loraplex::rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fused_add_rms_norm, loraplex::fused_add_rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(apply_rope, loraplex::apply_rope);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_and_mul, loraplex::silu_and_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gelu_tanh_and_mul, loraplex::gelu_tanh_and_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(write_kv, loraplex::write_kv);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_attention, loraplex::paged_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample, loraplex::sample);
