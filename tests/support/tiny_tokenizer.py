"""A tokenizer on disk for models without one: a token for each printable ASCII character."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "</s>"


def write_tokenizer(directory: Path, eos_token_id: int) -> Path:
    """Character c is token ord(c). Other ids, up to the end of sequence, are never read."""
    vocab = {chr(i) if 32 <= i < 127 else f"<unused{i}>": i for i in range(eos_token_id)}
    vocab[EOS_TOKEN] = eos_token_id
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN).save_pretrained(
        directory
    )
    return directory
