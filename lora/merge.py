"""Several adapters merged into one, as PEFT's add_weighted_adapter merges them.

Works on matrices by place, in float32 whatever they are in. Knows no files and no pages, nor where
an adapter came from.

With f = weight * scaling, an adapter's factor at a place, and T its A or its B:
 - "cat": A is all f A, one below the other, and B all B, side by side. The ranks add up, and the
   merged delta weight is just the sum of the adapters' own, each times its weight.
 - The others merge A and B apart, each as the sum of all root(|f|) T, the sign of f going to A, and
   the ranks must be equal. "linear" takes T as it is. "magnitude_prune" keeps the largest entries
   of each T, a density of all. "dare_linear" keeps each entry with the probability density, divided
   by it. "ties" and "dare_ties" prune like these two; then the T, not yet weighted, elect a sign
   for each entry, by their sum ("total") or that of their signs ("frequency"), and the entry is the
   mean, not the sum, over those with that sign.
A place that only some adapters have is merged from theirs. Nothing is made to add up to 1. A single
adapter is only multiplied, whatever the strategy.

PEFT's merged adapter inherits two settings from the first adapter that ours does not: use_rslora,
which multiplies the delta weight by the root of the rank, and layers_to_transform, which drops what
the others have in more layers. Here the scaling is 1 and no place is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from loraplex.lora.image import AdapterWeights
from loraplex.lora.plan import MAX_RANK
from loraplex.lora.recipe import Merge
from loraplex.lora.spec import AdapterError, BaseModelSpec

Matrix = npt.NDArray[np.float32]


def merge_adapters(
    adapters: Sequence[AdapterWeights], merge: Merge, spec: BaseModelSpec, dtype: torch.dtype
) -> AdapterWeights:
    """Merge adapters of one base model into one, in float32, to be packed as dtype.

    What the dare strategies draw is one sequence of numpy's default generator, uniform float32 in
    [0, 1): by place (layer, module id), there A before B, there by adapter, each matrix row-major;
    an entry is kept where the number is below the density. At density 1 nothing is drawn.

    All is done in the calling thread. Values that are not finite stay so, and packing refuses them.
    Raises AdapterError if there are not as many weights as adapters, or for ranks that the strategy
    can't merge.
    """
    if len(merge.weights) != len(adapters):
        raise AdapterError(
            f"weights={merge.weights!r} is not allowed: it must have one weight for each of the "
            f"{len(adapters)} adapters, not {len(merge.weights)}"
        )
    if len(adapters) == 1:
        return _multiply(adapters[0], merge.weights[0], dtype)
    if any(adapter.invocation_token_ids for adapter in adapters):
        raise AdapterError(
            "merged_adapters of adapters with alora_invocation_tokens is not allowed: they act "
            "from different places on"
        )
    if any(adapter.embedding or adapter.head for adapter in adapters):
        raise AdapterError(
            "merged_adapters of adapters with a part in the embedding or the head is not allowed: "
            "only A and B of layers can be merged"
        )
    if any(adapter.gains for adapter in adapters):
        raise AdapterError(
            "merged_adapters of adapters with DoRA, lora_bias or trained biases is not allowed: "
            "only A and B can be merged"
        )
    strategy = merge.strategy
    _check_ranks(adapters, strategy, spec)
    merged = AdapterWeights({}, {}, dtype)
    generator = np.random.default_rng(merge.seed)
    with np.errstate(all="ignore"):
        for place in sorted({place for adapter in adapters for place in adapter.a}):
            here = [i for i, adapter in enumerate(adapters) if place in adapter.a]
            factors = [merge.weights[i] * adapters[i].scalings.get(place, 1.0) for i in here]
            a_matrices = [_to_float32(adapters[i].a[place]) for i in here]
            b_matrices = [_to_float32(adapters[i].b[place]) for i in here]
            if strategy == "cat":
                scaled = [np.float32(f) * a for f, a in zip(factors, a_matrices, strict=True)]
                a = np.concatenate(scaled, axis=-2)
                b = np.concatenate(b_matrices, axis=-1)
            else:
                roots = [math.sqrt(abs(factor)) for factor in factors]
                signed_roots = list(map(math.copysign, roots, factors))
                a = _combine(a_matrices, signed_roots, strategy, merge, generator)
                b = _combine(b_matrices, roots, strategy, merge, generator)
            merged.a[place], merged.b[place] = torch.from_numpy(a), torch.from_numpy(b)
    return merged


def _multiply(adapter: AdapterWeights, weight: float, dtype: torch.dtype) -> AdapterWeights:
    scalings = {place: weight * adapter.scalings.get(place, 1.0) for place in adapter.a}
    if any(end is not None and end.b is None for end in (adapter.embedding, adapter.head)):
        raise AdapterError(
            f"scale={weight:g} is not allowed for an adapter that replaces the embedding or the "
            "head: it must be 1"
        )
    embedding, head = (
        end and replace(end, scaling=weight * end.scaling)
        for end in (adapter.embedding, adapter.head)
    )
    gains, offsets = (
        {place: weight * vector for place, vector in vectors.items()}
        for vectors in (adapter.gains, adapter.offsets)
    )
    return replace(
        adapter,
        dtype=dtype,
        scalings=scalings,
        gains=gains,
        offsets=offsets,
        embedding=embedding,
        head=head,
    )


def _check_ranks(adapters: Sequence[AdapterWeights], strategy: str, spec: BaseModelSpec) -> None:
    all_ranks = [adapter.ranks for adapter in adapters]
    # PEFT asks for equal ranks also of adapters that don't meet: the largest of each counts.
    cases = [("", [max(ranks.values()) for ranks in all_ranks])] if strategy != "cat" else []
    for place in sorted({place for ranks in all_ranks for place in ranks}):
        ranks_here = [ranks[place] for ranks in all_ranks if place in ranks]
        cases.append((f" at {spec.module_path(*place)}", ranks_here))
    for where, ranks in cases:
        if strategy == "cat" and sum(ranks) > MAX_RANK:
            raise AdapterError(
                f"strategy='cat' is not allowed for adapters of ranks {ranks}{where}: the ranks "
                f"add up, and the sum must be at most {MAX_RANK}"
            )
        if strategy != "cat" and len(set(ranks)) > 1:
            raise AdapterError(
                f"strategy={strategy!r} is not allowed for adapters of different ranks, here "
                f"{ranks}{where}: use 'cat'"
            )


def _to_float32(tensor: torch.Tensor) -> Matrix:
    """The same values; of a float32 tensor the memory, too.

    numpy's, since torch would convert with OpenMP threads, which fight with the forward pass's.
    """
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy().astype(np.float32, copy=False)
    bits = tensor.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def _combine(
    matrices: Sequence[Matrix],
    factors: Sequence[float],
    strategy: str,
    merge: Merge,
    generator: np.random.Generator,
) -> Matrix:
    """The merged matrix of matrices, [rows, columns] or of all experts, one for each factor."""
    stack = np.stack(matrices)
    if merge.density < 1:
        for matrix in stack:
            if strategy in ("ties", "magnitude_prune"):
                # Multiplied, so that what is not finite does not get lost.
                matrix *= _largest(matrix, merge.density)
            elif strategy in ("dare_linear", "dare_ties"):
                matrix *= generator.random(matrix.shape, np.float32) < np.float32(merge.density)
                matrix /= np.float32(merge.density)
    weighted = stack * np.array(factors, np.float32).reshape(-1, *[1] * (stack.ndim - 1))
    if strategy not in ("ties", "dare_ties"):
        return weighted.sum(axis=0)
    signs = np.sign(stack)
    votes = (stack if merge.majority_sign_method == "total" else signs).sum(axis=0)
    agree = signs == np.where(votes >= 0, np.float32(1), np.float32(-1))
    weighted *= agree
    num_agreeing = agree.sum(axis=0, dtype=np.float32)
    return weighted.sum(axis=0) / np.maximum(num_agreeing, np.float32(1))


def _largest(matrix: Matrix, density: float) -> npt.NDArray[np.bool_]:
    """Where the largest magnitudes are, a density of all, rounded down; of equal ones the first."""
    num_kept = int(density * matrix.size)
    magnitudes = np.abs(matrix)
    if num_kept == 0:
        return np.zeros(matrix.shape, np.bool_)
    smallest = np.partition(magnitudes, -num_kept, axis=None)[-num_kept]
    is_kept = magnitudes > smallest
    num_missing = num_kept - np.count_nonzero(is_kept)
    is_kept.flat[np.flatnonzero(magnitudes == smallest)[:num_missing]] = True
    return is_kept
