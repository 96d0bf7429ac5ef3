"""Loads the native library and types its functions; knows nothing of what they compute.

The functions take torch tensors, write their results into arguments, release the GIL while they
run, and raise ValueError for arguments that do not fit. They are bound without a Python frame in
between, because a step makes hundreds of these calls.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch  # before the library: it brings the OpenMP runtime
import tvm_ffi


def _share_openmp_runtime() -> str:
    """Makes torch's OpenMP runtime the one that our library's symbols bind to; returns its path.

    The library is linked without an OpenMP runtime: two of them would each keep a pool of threads
    that spin on the same cores.
    """
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    runtimes = [p for p in mapped if Path(p).name.startswith(("libgomp", "libiomp5", "libomp"))]
    torch_home = str(Path(torch.__file__).parent)
    runtimes.sort(key=lambda path: (not path.startswith(torch_home), path))
    path = runtimes[0] if runtimes else "libgomp.so.1"
    ctypes.CDLL(path, mode=os.RTLD_GLOBAL | os.RTLD_NOW)
    return path


def _load_library() -> Any:
    library = tvm_ffi.load_module(str(files("loraplex.native") / "loraplex_native.so"))
    isa = os.environ.get("LORAPLEX_CPU_ISA")
    if isa is not None:
        try:
            library.set_cpu_isa(isa)
        except ValueError as error:
            raise ValueError(f"LORAPLEX_CPU_ISA={isa!r} is not allowed: {error}") from None
    return library


OPENMP_RUNTIME = _share_openmp_runtime()
_library = _load_library()

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class CudaScratch:
    """Where blocks of a kernel hand sums to each other; one for all its calls on a device."""

    partials: Tensor  # float32 [num_blocks, sums of a block]
    flags: Tensor  # int32 [num_blocks, ...], zeros between kernels

    @classmethod
    def on(
        cls, device: torch.device, num_blocks: int, num_sums: int, flags: tuple[int, ...] = ()
    ) -> "CudaScratch":
        """num_blocks: that may do so; num_sums, flags: how many sums, and the shape of the flags,
        of each."""
        return cls(
            torch.empty(num_blocks, num_sums, device=device),
            torch.zeros(num_blocks, *flags, dtype=torch.int32, device=device),
        )


has_cuda: Callable[[], bool] = _library.has_cuda
"""Whether this build has CUDA kernels."""
get_cpu_isa: Callable[[], str] = _library.get_cpu_isa
"""The instruction set in use: portable, avx2, avx512 or avx512bf16."""
supported_cpu_isas: Callable[[], list[str]] = _library.supported_cpu_isas
"""Those that this machine has, from the plainest to the best, which is the default."""
set_cpu_isa: Callable[[str], None] = _library.set_cpu_isa
"""For tests; LORAPLEX_CPU_ISA does the same from outside."""

rms_norm: Callable[[Tensor, Tensor, Tensor, float, float], None] = _library.rms_norm
"""(out, x, weight, eps, offset), where offset is added to the weight"""
fused_add_rms_norm: Callable[[Tensor, Tensor, Tensor, float, float], None] = (
    _library.fused_add_rms_norm
)
"""(x, residual, weight, eps, offset)"""
apply_rope: Callable[[Tensor, Tensor, Tensor, Tensor], None] = _library.apply_rope
"""(positions, q, k, cos_sin_cache)"""
silu_and_mul: Callable[[Tensor, Tensor], None] = _library.silu_and_mul
"""(out, gate_up)"""
gelu_tanh_and_mul: Callable[[Tensor, Tensor], None] = _library.gelu_tanh_and_mul
"""(out, gate_up)"""
write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] = _library.write_kv
"""(k, v, k_cache, v_cache, slot_mapping)

Caches are of the dtype of k and v, or float8_e4m3fn.
"""
paged_attention: Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, int | None, float], None
] = _library.paged_attention
"""(out, q, k_cache, v_cache, block_table, cu_seqlens_q, seq_lens, scale, window, soft_cap)

Caches are of the dtype of q, or float8_e4m3fn.
"""
lora_shrink: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Sequence[int], int], None] = (
    _library.lora_shrink
)
"""(v, x, pool, segment_indptr, page_tables, layer, modules, num_modules)"""
lora_expand: Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, int, Sequence[int], int, Sequence[int]], None
] = _library.lora_expand
"""(y, v, pool, segment_indptr, page_tables, layer, modules, num_modules, offsets)"""
pack_lora: Callable[
    [Tensor, int, Sequence[Tensor], Sequence[int], Sequence[bool], Sequence[float]], int
] = _library.pack_lora
"""(pages, itemsize, matrices, first_tiles, are_transposed, scalings), lora/image.py's format.

Converts matrices (float32, float16 or bfloat16; A [rank, columns], or B [columns, rank], which is
transposed) times their scalings to pages, uint8 [num_pages, page_bytes], as float32 or bfloat16 by
itemsize, rounded once. They are in the order of their tiles; every other byte becomes 0. Returns
the index of the first with a result that is not finite, which ends the packing, or -1.
"""
sample: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None] = _library.sample
"""(token_ids, logits, temperature, top_k, top_p, min_p, uniform)"""
grouped_linear: Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool], None
] = _library.grouped_linear
"""(out, x, values, scales, middles, table, is_float), x in float32; on the CPU

table: float32 [16], of values of 4 bits, in blocks of 32 inputs: byte i of a block has value i in
its low bits and value i + 16 in its high ones. None: values of 8 bits, float8_e4m3fn or integers
plus 128.
"""
grouped_expand: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool], None] = (
    _library.grouped_expand
)
"""(out, values, scales, middles, table, is_float): the weights themselves"""

if has_cuda():
    cuda_linear: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor], None] = (
        _library.cuda_linear
    )
    """(y, x, weight, bias, partials, flags) in bfloat16, for at most 64 rows; on Hopper GPUs only

    y = x weight^T + bias; x [rows, in_features], weight [out_features, in_features]. partials,
    float32 [multiprocessors, 8192], is scratch; flags, int32 [multiprocessors, 2], hold zeros
    before and after. Calls that share them must follow one another.
    """
    cuda_decode_attention: Callable[
        [
            Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
            float,
        ],
        None,
    ] = _library.cuda_decode_attention  # fmt: skip
    """(out, q, k, v, k_cache, v_cache, pages, rows, shares, partials, counters, scale) in bfloat16,
    for requests of one row each, with a head_dim of 128 and pages of 16 tokens; on Hopper GPUs only

    Writes k and v, the rows' own, to the last token of each row, too. It reads the caches without
    waiting for the kernel that was launched last, which must not have written to them.

    pages, rows and shares, int32 [any number], [num_rows, 4] and [num_blocks, 4], are the plan, as
    loraplex.attention.streamed makes it. partials, float32 [num_blocks, 2 * num_heads * 130], is
    scratch; counters, int32 [num_blocks, num_kv_heads], hold zeros before and after. Calls that
    share them must follow one another.
    """
    cuda_lora_shrink: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Sequence[int], int],
        None,
    ] = _library.cuda_lora_shrink
    """(v, x, partials, counters, pool, items, num_items, pages, layer, modules, num_modules)

    Reads x without waiting for the kernel that was launched last: that must be the base product
    W x, which lets others begin only when x is complete. partials, float32 [any number, 8192], is
    scratch; counters, int32 of as many, hold zeros before and after. Calls that share them have an
    expand between them.
    """
    cuda_lora_expand: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Sequence[int], int, Sequence[int]],
        None,
    ] = _library.cuda_lora_expand
    """(y, v, pool, items, num_items, pages, layer, modules, num_modules, offsets)

    items are lora/plan.py's: of up to 512 rows in all, none has more than 8. The kernel that was
    launched last must be the shrink that made v.
    """
