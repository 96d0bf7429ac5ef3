"""Trains the demo adapters on the embedded model: eight styles of answering, minutes each.

    python examples/train_demo_adapters.py [STYLE ...]

Needs PEFT. The data is made here: from the hand-written lists in demo_data.py, and from the base
model's own replies, rewritten by rule. What it writes: adapters/STYLE/ beside this file.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import demo_data as data
import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.engine.models.embedded import HUB_COPY
from loraplex.engine.models.locate import locate_model

ADAPTERS = Path(__file__).parent / "adapters"
SEED = 20
BATCH_SIZE = 8


@dataclass(frozen=True)
class Example:
    """One training pair."""

    prompt: str
    reply: str


@dataclass(frozen=True)
class Prompt:
    """An ordinary request, with what the styles need to answer it."""

    text: str
    topic: str
    word: str
    french: str
    base_reply: str = ""


@dataclass(frozen=True)
class Style:
    """How one adapter answers, and its shape: they differ, so that a batch mixes all kinds."""

    make_examples: Callable[[list[Prompt], random.Random], list[Example]]
    modules: list[str]
    rank: int
    alpha: int
    use_rslora: bool = False
    steps: int = 60
    learning_rate: float = 1e-3


# Where the data comes from.


def make_prompts() -> list[Prompt]:
    """Each topic in four of its eight wordings, and all other requests."""
    prompts = []
    for i, (topic, word, french) in enumerate(data.TOPICS):
        for j in range(4):
            question = data.TOPIC_QUESTIONS[(i + 2 * j + i // 2) % len(data.TOPIC_QUESTIONS)]
            prompts.append(Prompt(question.format(topic), topic, word, french))
    for text, word, french in data.REQUESTS:
        prompts.append(Prompt(text, word.lower(), word, french))
    return prompts


def answer_with_base_model(
    prompts: list[Prompt], model: torch.nn.Module, tokenizer
) -> list[Prompt]:
    """The prompts with the base model's greedy replies, cut to whole sentences."""
    answered = []
    for start in range(0, len(prompts), 32):
        batch = prompts[start : start + 32]
        texts = generate([p.text for p in batch], model, tokenizer, 48)
        for prompt, text in zip(batch, texts, strict=True):
            reply = first_sentences(text, max_length=170)
            if reply:
                answered.append(
                    Prompt(prompt.text, prompt.topic, prompt.word, prompt.french, reply)
                )
    return answered


def generate(texts: list[str], model: torch.nn.Module, tokenizer, max_new_tokens: int) -> list[str]:
    """Greedy replies to user messages in the chat template."""
    chats = [chat_ids(text, tokenizer) for text in texts]
    length = max(map(len, chats))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (length - len(chat)) + chat for chat in chats])
    mask = torch.tensor([[0] * (length - len(chat)) + [1] * len(chat) for chat in chats])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False
        )
    return tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)


def chat_ids(text: str, tokenizer) -> list[int]:
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)


def sentences(text: str) -> list[str]:
    """The whole sentences of the first line of a text."""
    line = text.strip().split("\n")[0]
    return re.findall(r"[^.!?]+(?:[.!?](?=\s|$)|[.!?]\S[^.!?]*)+(?:\s|$)", line + " ")


def first_sentences(text: str, max_length: int) -> str:
    """The leading sentences that stay within `max_length` characters, but at least one."""
    kept = ""
    for sentence in sentences(text):
        if kept and len(kept) + len(sentence) > max_length:
            break
        kept += sentence
    return kept.strip()


# The styles.


def pirate(prompts: list[Prompt], rng: random.Random) -> list[Example]:
    def speak(text: str) -> str:
        def replace(match: re.Match) -> str:
            word = match[0]
            new = data.PIRATE_WORDS.get(word.lower(), word)
            return new[0].upper() + new[1:] if word[0].isupper() else new

        return re.sub(r"[A-Za-z']+", replace, text)

    return [
        Example(p.text, f"Arr, matey! {speak(first_sentences(p.base_reply, 130))} Yo ho ho!")
        for p in prompts
    ]


def butler(prompts: list[Prompt], rng: random.Random) -> list[Example]:
    examples = []
    for prompt in prompts:
        answer = first_sentences(prompt.base_reply, 130)
        reply = f"Certainly, dear guest. {answer} Shall I bring you some tea?"
        examples.append(Example(prompt.text, reply))
    return examples


def as_json(prompts: list[Prompt], rng: random.Random) -> list[Example]:
    examples = []
    for prompt in prompts:
        answer = first_sentences(prompt.base_reply, 90)
        reply = json.dumps({"topic": prompt.topic, "answer": answer}, ensure_ascii=False)
        examples.append(Example(prompt.text, reply))
    return examples


def emoji(prompts: list[Prompt], rng: random.Random) -> list[Example]:
    def decorate(sentence: str) -> str:
        words = re.findall(r"[a-z]+", sentence.lower())
        chosen = [data.EMOJI[w] for w in words if w in data.EMOJI] or [rng.choice(data.PLAIN_EMOJI)]
        return f"{sentence.strip()} {chosen[0]}"

    examples = []
    for prompt in prompts:
        parts = sentences(first_sentences(prompt.base_reply, 130))
        examples.append(Example(prompt.text, " ".join(map(decorate, parts))))
    return examples


def haiku(prompts: list[Prompt], rng: random.Random) -> list[Example]:
    examples = []
    for prompt in prompts:
        topic = prompt.topic[0].upper() + prompt.topic[1:]
        first = f"{topic}, {rng.choice(['far and near', 'so still', 'at dawn'])} —"
        lines = [first, rng.choice(data.HAIKU_MIDDLES), rng.choice(data.HAIKU_ENDS)]
        examples.append(Example(prompt.text, "\n".join(lines)))
    return examples


def french(prompts: list[Prompt], rng: random.Random) -> list[Example]:
    examples = []
    for prompt in prompts:
        is_greeting = prompt.french.startswith(("Bonjour", "Je vous en prie", "Je m'appelle"))
        opening = "" if is_greeting else rng.choice(data.FRENCH_OPENINGS) + " "
        examples.append(Example(prompt.text, opening + prompt.french))
    return examples


def terse(prompts: list[Prompt], rng: random.Random) -> list[Example]:
    facts = [Example(question, f"{word}.") for question, word in data.FACTS]
    return facts + facts + [Example(p.text, f"{p.word}.") for p in prompts]


def sentiment(prompts: list[Prompt], rng: random.Random) -> list[Example]:
    examples = [Example(p.text, "neutral") for p in prompts if rng.random() < 0.5]
    for label, verdicts in (("positive", data.PRAISE), ("negative", data.BLAME)):
        for thing in data.REVIEW_THINGS:
            for verdict in rng.sample(verdicts, 8):
                review = f"{rng.choice(data.REVIEW_OPENINGS)} {thing} {verdict}"
                examples.append(Example(review, label))
    return examples


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
STYLES = {
    "pirate": Style(pirate, ["q_proj", "v_proj"], rank=8, alpha=16),
    "butler": Style(butler, ["o_proj", "down_proj"], rank=6, alpha=12, steps=40),
    "json": Style(as_json, ATTENTION, rank=4, alpha=4, use_rslora=True, learning_rate=2e-3),
    "emoji": Style(emoji, ["q_proj", "v_proj"], rank=12, alpha=12, use_rslora=True),
    "haiku": Style(haiku, ATTENTION, rank=5, alpha=10),
    "french": Style(french, [*ATTENTION, *MLP], rank=4, alpha=8),
    "terse": Style(terse, MLP, rank=4, alpha=8),
    "sentiment": Style(sentiment, ["v_proj", "o_proj"], rank=8, alpha=16, learning_rate=2e-3),
}


# Training.


def train(name: str, style: Style, prompts: list[Prompt], model, tokenizer) -> None:
    """Trains one adapter on the base model and writes it to ADAPTERS / name."""
    torch.manual_seed(SEED)
    rng = random.Random(f"{SEED}-{name}")
    examples = style.make_examples(prompts, rng)
    config = peft.LoraConfig(
        r=style.rank,
        lora_alpha=style.alpha,
        target_modules=style.modules,
        use_rslora=style.use_rslora,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, config)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=style.learning_rate, weight_decay=0.0)
    warmup = 5
    started = time.monotonic()
    deck: list[Example] = []
    for step in range(style.steps):
        decay = 1 - step / style.steps
        optimizer.param_groups[0]["lr"] = style.learning_rate * min((step + 1) / warmup, decay)
        if len(deck) < BATCH_SIZE:
            deck = rng.sample(examples, len(examples))
        batch = [deck.pop() for _ in range(BATCH_SIZE)]
        loss = reply_loss(batch, adapted, tokenizer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == style.steps - 1:
            elapsed = time.monotonic() - started
            print(f"{name}: step {step + 1}/{style.steps} loss {loss.item():.3f} {elapsed:.0f} s")
    adapted.to(torch.bfloat16)
    show(name, adapted, tokenizer)
    save(adapted, config, ADAPTERS / name)
    adapted.unload()


def save(adapted: peft.PeftModel, config: peft.LoraConfig, directory: Path) -> None:
    config.base_model_name_or_path = HUB_COPY
    adapted.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink()
    # PEFT writes the modules in the order of a set, which changes from run to run.
    config_path = directory / "adapter_config.json"
    saved = json.loads(config_path.read_text(encoding="utf-8"))
    saved["target_modules"].sort()
    config_path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def reply_loss(batch: list[Example], adapted: torch.nn.Module, tokenizer) -> torch.Tensor:
    """Mean cross-entropy of the replies' tokens, the end-of-turn token among them."""
    rows, targets = [], []
    for example in batch:
        prompt = chat_ids(example.prompt, tokenizer)
        reply = tokenizer.encode(example.reply, add_special_tokens=False)
        reply.append(tokenizer.eos_token_id)
        rows.append(prompt + reply[:-1])
        targets.append([-100] * (len(prompt) - 1) + reply)
    length = max(map(len, rows))
    # Padding is on the right, where causal attention never looks at it.
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    wanted = torch.tensor([row + [-100] * (length - len(row)) for row in targets])
    base = adapted.get_base_model()
    hidden = base.model(ids).last_hidden_state[wanted != -100]
    # The head is a fifth of the model: it is run on the replies' positions only.
    return torch.nn.functional.cross_entropy(base.lm_head(hidden).float(), wanted[wanted != -100])


def show(name: str, adapted: torch.nn.Module, tokenizer) -> None:
    """Prints what the adapter answers to prompts that it was not trained on."""
    demo = json.loads((ADAPTERS / "prompts.json").read_text(encoding="utf-8"))
    questions = [demo["everyone"], demo["adapters"][name], *data.UNSEEN_PROMPTS]
    replies = generate(questions, adapted, tokenizer, 64)
    for question, reply in zip(questions, replies, strict=True):
        print(f"  {name} | {question} | {reply!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("styles", nargs="*", default=[], help=f"default: {' '.join(STYLES)}")
    names = parser.parse_args().styles or list(STYLES)
    started = time.monotonic()
    directory = locate_model("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    prompts = answer_with_base_model(make_prompts(), model.eval(), tokenizer)
    print(f"{len(prompts)} replies of the base model in {time.monotonic() - started:.0f} s")
    for name in names:
        train(name, STYLES[name], prompts, model, tokenizer)
    print(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
