"""Reads and judges PEFT's adapter_config.json. Knows neither tensors nor the base model."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.lora.recipe import is_finite_number
from loraplex.lora.spec import AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_RANK = 256

# Initialisations that leave the base model's weights alone. The others (pissa, olora, corda,
# loftq, lora_ga) move a part of each base weight into the adapter, so that the adapter is wrong on
# the weights that everybody else shares.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

# Keys that say nothing of how the trained tensors are applied.
HARMLESS_KEYS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        # How the base stores its weight, which only merging has to know.
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "unsloth_fixed",
    )
)
UNDERSTOOD_KEYS = frozenset(
    (
        "alora_invocation_tokens",
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "target_parameters",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    )
)


@dataclass(frozen=True)
class PeftConfig:
    """The part of an adapter's configuration that decides how its tensors are applied.

    Module names are PEFT's: the path inside the base model, as in
    "model.layers.0.self_attn.q_proj".
    """

    base_model: str | None
    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    """Whether B has biases."""
    bias: str
    """Which of the base model's biases were trained: "none", "lora_only" or "all"."""
    trained_token_ids: Mapping[str, tuple[int, ...]]
    """Tokens whose rows were trained, by the end of the module's name, as in "embed_tokens"; "":
    of the embedding, whatever its name."""
    invocation_token_ids: tuple[int, ...]
    """Of an activated LoRA: it acts from the last place on where the prompt has these tokens. ():
    it is none, and acts everywhere."""
    target_modules: str | frozenset[str] | None
    target_weights: frozenset[str]
    """Modules whose weight is targeted as a parameter: what PEFT does to routers of experts."""
    target_parameters: frozenset[str]
    """Other parameters, as in "mlp.experts.down_proj": the weights of all experts in one."""
    exclude_modules: str | frozenset[str] | None
    layers_to_transform: frozenset[int] | None
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...]
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...]
    """Exceptions from rank and alpha: the first pattern that matches a module's name decides."""

    def rank_of(self, module_name: str) -> int:
        return _look_up(self.rank_pattern, module_name, self.rank)

    def alpha_of(self, module_name: str) -> float:
        return _look_up(self.alpha_pattern, module_name, self.alpha)

    def scaling_of(self, module_name: str) -> float:
        """What B A is multiplied by."""
        rank = self.rank_of(module_name)
        return self.alpha_of(module_name) / (math.sqrt(rank) if self.use_rslora else rank)

    def trained_tokens_of(self, module_name: str) -> tuple[int, ...]:
        for module, token_ids in self.trained_token_ids.items():
            if module == "" or f".{module_name}".endswith(f".{module}"):
                return token_ids
        return ()

    def parameters_of(self, module_name: str) -> list[str]:
        """The names of a module's own parameters that are targeted, in the order in which modules
        have them."""
        names = {
            parameter.rpartition(".")[2]
            for parameter in self.target_parameters
            if f".{module_name}.{parameter.rpartition('.')[2]}".endswith(f".{parameter}")
        }
        return sorted(names, key=lambda name: (name.startswith("down"), name))

    def targets(self, module_name: str) -> bool:
        """Whether the configuration has an adapter on this module."""
        if self.exclude_modules and _matches(self.exclude_modules, module_name):
            return False
        if self.target_modules is None or _matches(
            self.target_weights | self.target_parameters, module_name
        ):
            return True
        if not _matches(self.target_modules, module_name):
            return False
        is_named_in_full = not isinstance(self.target_modules, str) and (
            module_name in self.target_modules
        )
        if self.layers_to_transform is None or is_named_in_full:
            return True
        layer = re.search(r"\.(\d{1,6})\.", module_name)
        return layer is not None and int(layer[1]) in self.layers_to_transform


def _look_up(
    exceptions: tuple[tuple[re.Pattern[str], Any], ...], module_name: str, default: Any
) -> Any:
    for pattern, value in exceptions:
        if pattern.match(module_name):
            return value
    return default


def _matches(modules: str | frozenset[str], module_name: str) -> bool:
    """A string is a regular expression for all of the name; else names match at its end."""
    if isinstance(modules, str):
        return re.fullmatch(modules, module_name) is not None
    parts = module_name.split(".")
    return any(".".join(parts[i:]) in modules for i in range(len(parts)))


def read_peft_config(directory: Path) -> PeftConfig:
    """Read adapter_config.json. Raises AdapterError for what is broken, or not served."""
    # Not Path.is_dir(), which raises for names that no file can have.
    if not os.path.isdir(directory):
        raise AdapterError(
            f"adapter path {str(directory)!r} does not exist or is not a directory: give the "
            f"directory that holds {CONFIG_FILE}",
            status=404,
        )
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise AdapterError(f"{CONFIG_FILE} is missing in adapter path {str(directory)!r}") from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{path} is not valid: it must be a JSON object")
    return parse_peft_config(values)


def parse_peft_config(values: Mapping[str, Any]) -> PeftConfig:
    """The configuration in these values; a missing one has PEFT's default.

    Raises AdapterError naming the key, its value and what is allowed.
    """
    _refuse_what_is_not_served(values)
    rank, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    _check_rank("r", rank)
    _check_number("lora_alpha", alpha)
    target_modules = _read_modules(values, "target_modules")
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        target_modules = None
    parameters = _read_target_parameters(values)
    base_model = values.get("base_model_name_or_path")
    return PeftConfig(
        base_model=base_model if isinstance(base_model, str) else None,
        rank=rank,
        alpha=alpha,
        use_rslora=_read_switch(values, "use_rslora"),
        use_dora=_read_switch(values, "use_dora"),
        lora_bias=_read_switch(values, "lora_bias"),
        bias=values.get("bias") or "none",
        trained_token_ids=_read_trained_tokens(values),
        invocation_token_ids=_read_token_ids(values, "alora_invocation_tokens"),
        target_modules=target_modules,
        target_weights=frozenset(
            parameter.removesuffix(".weight")
            for parameter in parameters
            if parameter.endswith(".weight")
        ),
        target_parameters=frozenset(p for p in parameters if not p.endswith(".weight")),
        exclude_modules=_read_modules(values, "exclude_modules"),
        layers_to_transform=_read_layers(values),
        rank_pattern=_read_pattern(values, "rank_pattern", _check_rank),
        alpha_pattern=_read_pattern(values, "alpha_pattern", _check_number),
    )


def adapter_fingerprint(path: str) -> str:
    """Changes when the adapter's files do. Never raises: a missing file is a state, too."""
    marks = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            stat = os.stat(os.path.join(path, name))
            marks.append(f"{stat.st_mtime_ns}:{stat.st_size}")
        except (OSError, ValueError):
            marks.append("absent")
    return "/".join(marks)


def _refuse_what_is_not_served(values: Mapping[str, Any]) -> None:
    peft_type = values.get("peft_type")
    _check("peft_type", peft_type, peft_type == "LORA", "'LORA'")
    bias = values.get("bias", "none")
    allowed = "none", "lora_only", "all", None
    _check("bias", bias, bias in allowed, "'none', 'lora_only' or 'all'")
    init = values.get("init_lora_weights", True)
    _check(
        "init_lora_weights",
        init,
        init in PLAIN_INITIALISATIONS,
        f"one of {', '.join(map(repr, PLAIN_INITIALISATIONS))}; others change the base model's "
        "weights: convert the adapter to a plain one (save_pretrained with "
        "path_initial_model_for_weight_conversion)",
    )
    # Whatever else is switched on, known to us or not, changes what the tensors mean:
    # modules_to_save, ... and whatever PEFT invents next.
    for key, value in values.items():
        if key not in HARMLESS_KEYS and key not in UNDERSTOOD_KEYS:
            _check(key, value, not value, "left out or off; this engine does not serve it")


def _read_token_ids(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    token_ids = values.get(name) or []
    is_list = isinstance(token_ids, list) and all(type(t) is int and t >= 0 for t in token_ids)
    _check(name, token_ids, is_list, "a list of token ids")
    return tuple(token_ids)


def _read_trained_tokens(values: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    name = "trainable_token_indices"
    by_module = values.get(name) or {}
    if not isinstance(by_module, dict):
        # PEFT's rule: a list is for the embedding.
        return {"": _read_token_ids(values, name)}
    return {
        module: _read_token_ids({f"{name}[{module!r}]": token_ids}, f"{name}[{module!r}]")
        for module, token_ids in by_module.items()
    }


def _read_switch(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name) or False
    _check(name, value, isinstance(value, bool), "true or false")
    return value


def _read_pattern(
    values: Mapping[str, Any], name: str, check: Callable[[str, Any], None]
) -> tuple[tuple[re.Pattern[str], Any], ...]:
    pattern = values.get(name) or {}
    _check(name, pattern, isinstance(pattern, dict), "an object: module name or pattern -> value")
    for key, value in pattern.items():
        check(f"{name}[{key!r}]", value)
    # PEFT's rule: a key matches the end of a module's name, from a dot on.
    return tuple((_compile(name, rf"(.*\.)?({key})$"), value) for key, value in pattern.items())


def _read_modules(values: Mapping[str, Any], name: str) -> str | frozenset[str] | None:
    modules = values.get(name)
    if modules is None:
        return None
    if isinstance(modules, str):
        _compile(name, modules)
        return modules
    is_list = isinstance(modules, list) and all(isinstance(module, str) for module in modules)
    _check(name, modules, is_list, "a list of module names or a regular expression")
    return frozenset(modules)


def _read_target_parameters(values: Mapping[str, Any]) -> list[str]:
    name = "target_parameters"
    parameters = values.get(name) or []
    is_list = isinstance(parameters, list) and all(isinstance(p, str) for p in parameters)
    _check(name, parameters, is_list, "a list of names of parameters")
    return list(parameters)


def _read_layers(values: Mapping[str, Any]) -> frozenset[int] | None:
    name = "layers_to_transform"
    layers = values.get(name)
    if layers is None or layers == []:
        return None
    if not isinstance(layers, list):
        layers = [layers]
    _check(name, layers, all(type(layer) is int for layer in layers), "layer indices")
    return frozenset(layers)


def _compile(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(
            f"{CONFIG_FILE}: {name}={_show(pattern)} is not a regular expression: {error}"
        ) from None


def _check_rank(name: str, value: Any) -> None:
    is_allowed = type(value) is int and 1 <= value <= MAX_RANK
    _check(name, value, is_allowed, f"an integer from 1 to {MAX_RANK}")


def _check_number(name: str, value: Any) -> None:
    _check(name, value, is_finite_number(value), "a finite number")


def _check(name: str, value: Any, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise AdapterError(
            f"{CONFIG_FILE}: {name}={_show(value)} is not allowed: it must be {allowed}"
        )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
