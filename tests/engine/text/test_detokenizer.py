"""Text comes out as it would of the whole, whatever the tokens, and stop strings end it."""

from __future__ import annotations

import pytest
from fakes import BOS, EOS, ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.text.detokenizer import (
    MAX_BROKEN_WINDOW,
    MAX_WINDOW,
    Detokenizer,
    IncrementalDecoder,
)

TEXT = st.text(alphabet="ab .é你😀\u200d🏽\ufffd\n", max_size=40)
TOKENS = st.lists(st.integers(0, 255) | st.sampled_from([BOS, EOS, *"é😀".encode()]), max_size=80)


class ChunkTokenizer:
    """Tokens are byte strings of any length, cut anywhere."""

    vocab_size = 1 << 30
    eos_token_ids: list[int] = []

    def __init__(self, chunks):
        self.chunks = chunks

    def decode(self, token_ids, skip_special_tokens=True):
        return b"".join(self.chunks[t] for t in token_ids).decode(errors="replace")


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({c for c in cuts if 0 < c < len(data)} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def pieces_of(tokenizer, token_ids, skip_special_tokens=True):
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens)
    return [*map(decoder.push, token_ids), decoder.finish()]


@given(TEXT, st.lists(st.integers(0, 100)))
def test_pieces_of_any_cut_of_a_text_add_up_without_half_characters(text, cuts):
    chunks = cut(text.encode(), cuts)
    pieces = pieces_of(ChunkTokenizer(chunks), range(len(chunks)))
    assert "".join(pieces) == text
    # U+FFFD in the text itself is all there may be.
    assert sum(p.count("\ufffd") for p in pieces) == text.count("\ufffd")


@given(TOKENS, st.booleans())
def test_pieces_of_any_bytes_add_up(token_ids, skip_special_tokens):
    tokenizer = ByteTokenizer()
    pieces = pieces_of(tokenizer, token_ids, skip_special_tokens)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens)


def test_a_character_comes_out_with_its_last_byte():
    assert pieces_of(ByteTokenizer(), [97, *"😀".encode(), 98, 0xE4, 0xBD]) == [
        "a", "", "", "", "😀", "b", "", "", "\ufffd",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("token_ids", "window"),
    [
        pytest.param(list("0123456789é😀".encode()) * 300, MAX_WINDOW, id="text"),
        pytest.param([EOS] * 5000, MAX_WINDOW, id="special tokens only"),
        pytest.param([97] + [EOS] * 5000, MAX_WINDOW, id="special tokens after text"),
        pytest.param([0xFF] * 5000, MAX_BROKEN_WINDOW, id="bytes that are no text"),
        pytest.param([0x80] + [0xF0, 0x9F] * 2500, MAX_BROKEN_WINDOW, id="half characters"),
    ],
)
def test_cost_of_a_token_does_not_grow(token_ids, window):
    tokenizer = ByteTokenizer()
    pieces = pieces_of(tokenizer, token_ids)
    assert tokenizer.num_decoded_tokens < 1.1 * window * len(token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids)


class SpaceTokenizer:
    """Like Llama 2's: the text loses its first space, single bytes have tokens of their own."""

    vocab_size = 262
    eos_token_ids: list[int] = []

    def __init__(self):
        vocab = {f"<0x{i:02X}>": i for i in range(256)}
        vocab |= {
            "\u2581": 256,
            "\u2581hi": 257,
            "ho": 258,
            "\u2581\u2581": 259,
            "é": 260,
            "x": 261,
        }
        self.backend = Tokenizer(BPE(vocab, [], byte_fallback=True))
        self.backend.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )

    def decode(self, token_ids, skip_special_tokens=True):
        return self.backend.decode(list(token_ids))


@given(
    st.lists(st.integers(256, 261).map(lambda t: [t]) | st.just(list("你".encode())), max_size=60)
)
def test_pieces_add_up_where_spaces_depend_on_what_is_before(groups):
    tokenizer, token_ids = SpaceTokenizer(), sum(groups, [])
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids)
    assert "\ufffd" not in "".join(pieces)


def run(chunks: list[bytes], **params) -> tuple[str, str | None, int]:
    """(text, stop string, tokens used), checking on the way that visible text is never revoked."""
    detokenizer = Detokenizer(ChunkTokenizer(chunks), SamplingParams(**params))
    visible, stop = "", None
    for num_tokens in range(1, len(chunks) + 1):
        stop = detokenizer.push(num_tokens - 1)
        if stop is not None:
            break
        shown = detokenizer.visible_text()
        assert shown.startswith(visible)
        visible = shown
    else:
        stop = detokenizer.finish()
    assert detokenizer.text.startswith(visible)
    return detokenizer.text, stop, num_tokens


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(start, end) by definition: the shortest beginning that ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [end - len(s) for s in stops if text[:end].endswith(s)]
        if found:
            return min(found), end
    return None


@given(
    st.text(alphabet="ab\n😀", min_size=1, max_size=40),
    st.lists(st.integers(0, 100)),
    st.lists(st.text(alphabet="ab\n😀", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_strings_are_found_wherever_they_straddle_tokens(text, cuts, stops, keeps):
    chunks = cut(text.encode(), cuts)
    got = run(chunks, stop=stops, include_stop_str_in_output=keeps)
    found = first_stop(text, stops)
    if found is None:
        assert got[:2] == (text, None)
    else:
        start, end = found
        assert got[:2] == (text[: end if keeps else start], text[start:end])
        num_bytes = len(text[:end].encode())
        assert got[2] == next(
            n for n in range(1, len(chunks) + 1) if len(b"".join(chunks[:n])) >= num_bytes
        )


def test_beginning_of_a_stop_string_is_held_back_until_it_is_decided():
    detokenizer = Detokenizer(ByteTokenizer(), SamplingParams(stop=["\n\nUser", "###"]))
    shown = []
    for token_id in b"a\n\nUs\nb##":
        assert detokenizer.push(token_id) is None
        shown.append(detokenizer.visible_text())
    assert shown == ["a"] * 5 + ["a\n\nUs", "a\n\nUs\nb", "a\n\nUs\nb", "a\n\nUs\nb"]
    assert detokenizer.push(ord("#")) == "###"
    assert detokenizer.text == "a\n\nUs\nb"


def test_text_is_not_held_back_where_the_stop_string_stays():
    detokenizer = Detokenizer(
        ByteTokenizer(), SamplingParams(stop="xy", include_stop_str_in_output=True)
    )
    assert detokenizer.push(ord("x")) is None
    assert detokenizer.visible_text() == "x"


def test_stop_strings_do_not_count_before_min_tokens():
    chunks = [b"a.", b"b.", b"c", b"d.e"]
    assert run(chunks, stop=".", min_tokens=1) == ("a", ".", 1)
    assert run(chunks, stop=".", min_tokens=2) == ("a.b", ".", 2)
    assert run(chunks, stop=".", min_tokens=3) == ("a.b.cd", ".", 4)
    # One that began earlier counts when it is completed.
    assert run([b"a.", b".b"], stop="..", min_tokens=2) == ("a", "..", 2)


def test_stop_string_in_text_that_only_the_end_releases():
    assert run([b"a", b"\xe4"], stop="\ufffd") == ("a", "\ufffd", 2)
