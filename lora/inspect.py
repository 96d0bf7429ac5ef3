"""Says what an adapter is, whether a base model can serve it, and if not, exactly why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loraplex.lora.loader import load_adapter
from loraplex.lora.peft_config import WEIGHTS_FILE, PeftConfig, read_peft_config
from loraplex.lora.peft_file import TargetedModule, open_weights, read_targeted_modules
from loraplex.lora.spec import BaseModelSpec


@dataclass
class AdapterReport:
    """What could be found out of an adapter; `refusal` says what is wrong, None if nothing is."""

    path: str
    refusal: str | None = None
    config: PeftConfig | None = None
    modules: Sequence[TargetedModule] = ()
    num_file_bytes: int = 0
    """Size of the weights file."""
    architecture: str | None = None
    """Of the base model that it was checked against; None: of none."""
    num_pages: int | None = None
    page_bytes: int | None = None

    @property
    def fits(self) -> bool:
        return self.refusal is None

    @property
    def num_parameters(self) -> int:
        return sum(
            m.num_experts * m.rank * (m.in_features + m.out_features)
            + len(m.vectors) * m.out_features
            if m.rank > 0
            else m.in_features * m.out_features
            for m in self.modules
        )

    def render(self) -> str:
        """The report as plain text, a line per fact."""
        return "\n".join(f"{name + ':':<13}{value}" for name, value in self._facts())

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "adapter", self.path
        if self.config is not None:
            yield "trained on", self.config.base_model or "a base model that it doesn't name"
        if self.config is not None and self.modules:
            yield from _module_facts(self.modules, self.config)
            if invocation := self.config.invocation_token_ids:
                yield "acts", f"from tokens {_join(invocation)} of the prompt on (aLoRA)"
            dtypes = _join(module.file_dtype for module in self.modules)
            yield "parameters", f"{self.num_parameters:,} in {dtypes}"
            yield "on disk", f"{self.num_file_bytes:,} bytes"
        if self.num_pages is not None and self.page_bytes is not None:
            num_bytes = self.num_pages * self.page_bytes
            yield (
                "in the pool",
                f"{num_bytes:,} bytes: {self.num_pages} pages of {self.page_bytes:,}",
            )
        if self.refusal is not None:
            yield "refused", self.refusal
        elif self.architecture is None:
            yield "checked", "in itself, against no base model"
        else:
            yield "fits", f"the base model ({self.architecture})"


def inspect_adapter(
    path: str, base: tuple[BaseModelSpec, int] | None, dtype: torch.dtype = torch.bfloat16
) -> AdapterReport:
    """Inspect an adapter as the engine would load it for a base model of this dtype.

    base: what the base model offers, and the bytes of a page of its pool. Without it only what the
    adapter says of itself is checked, and no weight is read. What is wrong with the adapter is
    never raised.
    """
    report = AdapterReport(path)
    try:
        _examine(report, base, dtype)
    except ValueError as error:
        report.refusal = str(error)
    return report


def _examine(
    report: AdapterReport, base: tuple[BaseModelSpec, int] | None, dtype: torch.dtype
) -> None:
    """Fill in the report, as far as it goes."""
    directory = Path(report.path)
    report.config = read_peft_config(directory)
    with open_weights(directory) as file:
        report.num_file_bytes = (directory / WEIGHTS_FILE).stat().st_size
        report.modules = read_targeted_modules(file, report.config)
    if base is None:
        return
    spec, page_bytes = base
    report.architecture = spec.architecture
    report.page_bytes = page_bytes
    spec = replace(spec, linears=_LinearsOfOnes(spec))
    report.num_pages = load_adapter(directory, spec, page_bytes, dtype).num_pages


@dataclass(frozen=True)
class _LinearsOfOnes:
    """Stands in for weights that are not loaded: all are 1. See loraplex.lora.spec.BaseLinears."""

    spec: BaseModelSpec

    def multiply(self, layer: int, module_id: int, x: torch.Tensor) -> torch.Tensor:
        return x.sum(1, keepdim=True).expand(-1, self.spec.modules[module_id].out_features)

    def squared_norms(self, layer: int, module_id: int) -> torch.Tensor:
        module = self.spec.modules[module_id]
        return torch.full((module.out_features,), float(module.in_features))

    def bias(self, layer: int, module_id: int) -> torch.Tensor:
        return torch.zeros(self.spec.modules[module_id].out_features)

    def is_embedding(self, matrix: torch.Tensor) -> bool:
        return True

    def embedding_rows(self, token_ids: Sequence[int]) -> torch.Tensor:
        assert self.spec.embedding is not None
        return torch.ones(len(token_ids), self.spec.embedding.out_features)

    def head_rows(self, token_ids: Sequence[int]) -> torch.Tensor:
        return self.embedding_rows(token_ids)

    def is_head(self, matrix: torch.Tensor) -> bool:
        return True


def _module_facts(
    modules: Sequence[TargetedModule], config: PeftConfig
) -> Iterator[tuple[str, str]]:
    """A line for each kind of module."""
    by_kind: dict[str, list[TargetedModule]] = {}
    for module in modules:
        by_kind.setdefault(module.name.rpartition(".")[2], []).append(module)
    rule = "alpha / sqrt(rank)" if config.use_rslora else "alpha / rank"
    for kind, same in by_kind.items():
        if "tokens" in same[0].tensors:
            yield kind, f"rows of {same[0].out_features} tokens replaced"
            continue
        if same[0].rank == 0:
            yield kind, f"replaced whole, {same[0].out_features} x {same[0].in_features}"
            continue
        vectors = _join(name for module in same for name in module.vectors)
        more = f", with {vectors}" if vectors else ""
        ranks = _join(module.rank for module in same)
        alphas = _join(f"{config.alpha_of(module.name):g}" for module in same)
        scalings = _join(f"{module.scaling:g}" for module in same)
        layers = f"{len(same)} layers" if len(same) > 1 else "1 layer"
        yield kind, f"rank {ranks}, alpha {alphas}, scaling {scalings} ({rule}), {layers}{more}"


def _join(values: Iterable[object]) -> str:
    """Each value once, in order."""
    return ", ".join(dict.fromkeys(map(str, values)))
