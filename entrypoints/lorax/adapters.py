"""Which adapter a LoRAX request means: a served name, one from its source, or several merged."""

from __future__ import annotations

from loraplex.engine.lora_request import LoRARequest, MergedAdapters
from loraplex.entrypoints.http.model_registry import ModelRegistry
from loraplex.entrypoints.lorax.requests import AdapterParameters


def find_adapter(
    models: ModelRegistry,
    parameters: AdapterParameters,
    bearer_token: str | None,
) -> LoRARequest | None:
    """None for the base model. bearer_token: reads the hub where the request brings no api_token.

    Raises as ModelRegistry.find_adapter does.
    """
    token = parameters.api_token or bearer_token
    source = parameters.adapter_source
    merged = parameters.merged_adapters
    if merged is None:
        adapter_id = parameters.base_or_adapter_id
        if adapter_id is None:
            return None
        return models.find_adapter(adapter_id, source, token, param="adapter_id")
    adapters = [models.find_adapter(name, source, token, "adapter_id") for name in merged.ids]
    if len(adapters) == 1 and merged.weights == [1.0]:
        return adapters[0]
    return LoRARequest(
        ",".join(adapter.lora_name for adapter in adapters),
        merged_adapters=MergedAdapters(
            adapters=tuple(adapters),
            weights=tuple(merged.weights),
            strategy=merged.merge_strategy,
            density=merged.effective_density,
            majority_sign_method=merged.majority_sign_method,
        ),
    )
