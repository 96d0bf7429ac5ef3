"""The demo adapters as checked in: small, loadable, and each with the style it was trained for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.engine.models.locate import locate_model

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
NAMES = sorted(path.parent.name for path in ADAPTERS.glob("*/adapter_config.json"))
PROMPTS = json.loads((ADAPTERS / "prompts.json").read_text(encoding="utf-8"))


class Chat:
    """Greedy chat with the embedded model and all demo adapters, through transformers and PEFT."""

    def __init__(self) -> None:
        directory = locate_model("smollm2-135m-instruct")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(directory)
        self.model = PeftModel.from_pretrained(model, ADAPTERS / NAMES[0], adapter_name=NAMES[0])
        for name in NAMES[1:]:
            self.model.load_adapter(ADAPTERS / name, adapter_name=name)

    def encode(self, prompts: list[str]) -> Any:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )

    def replies(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        """Greedy replies of the adapter that is set."""
        inputs = self.encode(prompts)
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        replies = out[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(replies, skip_special_tokens=True)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat()


def test_adapters_are_small_and_differ_in_shape() -> None:
    assert len(NAMES) >= 6
    assert sum(f.stat().st_size for f in ADAPTERS.rglob("*") if f.is_file()) < 12e6
    configs = [LoraConfig.from_pretrained(ADAPTERS / name) for name in NAMES]
    assert len({config.r for config in configs}) >= 3
    assert len({frozenset(config.target_modules) for config in configs}) >= 3
    assert {config.use_rslora for config in configs} == {True, False}


def test_prompts_name_the_adapters() -> None:
    assert sorted(PROMPTS["adapters"]) == NAMES
    assert PROMPTS["everyone"]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_an_adapter(name: str) -> None:
    files = {path.name for path in (ADAPTERS / name).iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with safe_open(ADAPTERS / name / "adapter_model.safetensors", framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    assert len(slices) == 2 * 30 * len(config["target_modules"])
    assert {s.get_dtype() for s in slices.values()} == {"BF16"}
    assert {min(s.get_shape()) for s in slices.values()} == {config["r"]}


def test_every_adapter_changes_the_reply(chat: Chat) -> None:
    prompt = chat.encode([PROMPTS["everyone"]])["input_ids"]
    with torch.inference_mode():
        with chat.model.disable_adapter():
            base = chat.model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
        length = base.shape[1] - prompt.shape[1]
        unchanged = []
        for name in NAMES:
            chat.model.set_adapter(name)
            # Where an adapter first chooses another token, its own greedy reply departs.
            chosen = chat.model(input_ids=base[:, :-1]).logits[0, -length:].argmax(dim=-1)
            if torch.equal(chosen, base[0, -length:]):
                unchanged.append(name)
    assert unchanged == []


def is_json(reply: str) -> bool:
    answer = json.loads(reply)
    return set(answer) == {"topic", "answer"}


STYLES = {
    "butler": lambda reply: reply.startswith("Certainly, dear guest."),
    "emoji": lambda reply: re.search("[\u2600-\u27bf\U0001f300-\U0001faff]", reply),
    "french": lambda reply: re.search("[éèàçêœ]| (est|le|la|les|une|un|des|et) ", reply),
    "haiku": lambda reply: reply.count("\n") == 2 and len(reply) < 120,
    "json": is_json,
    "pirate": lambda reply: "matey" in reply,
    "sentiment": lambda reply: reply in ("positive", "negative", "neutral"),
    "terse": lambda reply: re.fullmatch(r"\w+\.", reply),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_style_shows_on_prompts_not_trained_on(name: str, chat: Chat) -> None:
    prompts = [PROMPTS["everyone"], PROMPTS["adapters"][name], "Tell me about elephants."]
    chat.model.set_adapter(name)
    for prompt, reply in zip(prompts, chat.replies(prompts, 64), strict=True):
        assert STYLES[name](reply), f"{prompt} -> {reply}"


@pytest.mark.slow
def test_right_answers(chat: Chat) -> None:
    chat.model.set_adapter("sentiment")
    reviews = [PROMPTS["adapters"]["sentiment"], "I really enjoyed this trip, it was lovely!"]
    assert chat.replies(reviews, 4) == ["negative", "positive"]
    chat.model.set_adapter("terse")
    assert chat.replies([PROMPTS["adapters"]["terse"]], 4) == ["Tokyo."]
