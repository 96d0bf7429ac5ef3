"""Which adapter a LoRAX request means: a served name, one from its source, or several merged."""

from __future__ import annotations

from loraplex.engine.lora_request import LoRARequest, MergedAdapters
from loraplex.entrypoints.http.adapter_places import AdapterPlaces
from loraplex.entrypoints.http.model_registry import ModelRegistry, adapter_request
from loraplex.entrypoints.lorax.requests import AdapterParameters


def find_adapter(
    models: ModelRegistry,
    places: AdapterPlaces,
    parameters: AdapterParameters,
    bearer_token: str | None,
) -> LoRARequest | None:
    """None for the base model. places: where adapters that have no served name may come from.
    bearer_token: reads the hub where the request brings no api_token.

    Raises ApiError 404, RequestError 403 and 404, and ValueError.
    """
    token = parameters.api_token or bearer_token
    source = parameters.adapter_source
    merged = parameters.merged_adapters
    if merged is None:
        adapter_id = parameters.base_or_adapter_id
        if adapter_id is None:
            return None
        return _find_one(models, places, adapter_id, source, token)
    adapters = [_find_one(models, places, name, source, token) for name in merged.ids]
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


def _find_one(
    models: ModelRegistry,
    places: AdapterPlaces,
    adapter_id: str,
    source: str | None,
    token: str | None,
) -> LoRARequest:
    if source is None and (adapter := models.find_adapter(adapter_id)) is not None:
        return adapter
    if not places:
        raise models.not_found(adapter_id)
    # Named by its reference: two ways to write it are one adapter, for keys and metrics, too.
    reference = places.parse(adapter_id, source, param="adapter_id")
    return adapter_request(str(reference), reference, token)
