"""Parsers of tool calls: the same events however the text is cut, and nothing lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.entrypoints.openai.tool_formats import TOOL_FORMATS, choose_tool_format
from loraplex.entrypoints.openai.tool_formats.base import CallBegin, Content, Tool

NAMES = ["add", "now"]
ARGUMENTS = {"x": [1, {"}": '"{\\'}], "y": "é\n"}
WRITTEN = json.dumps(ARGUMENTS)
HERMES = f'<tool_call>\n{{"name": "add", "arguments": {WRITTEN}}}\n</tool_call>'
LLAMA = f'{{"name": "add", "parameters": {WRITTEN}}}'
SINGLE = f'{{"name": "add", "arguments": {WRITTEN}}}'


def run(name: str, pieces: list[str], is_forced: bool = False) -> tuple[str, list[tuple]]:
    """(content, calls)"""
    parser = TOOL_FORMATS[name].make_parser(NAMES, is_forced)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.finish()
    content, calls = "", []
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallBegin):
            calls.append([event.name, ""])
        else:
            calls[-1][1] += event.text
    return content, [(name, arguments) for name, arguments in calls]


ADD, NOW = ("add", WRITTEN), ("now", "{}")
CASES = [
    ("hermes", "Hi < there", "Hi < there", []),
    ("hermes", HERMES, "", [ADD]),
    ("hermes", f"I look.\n{HERMES}\n{HERMES}\n", "I look.\n", [ADD, ADD]),
    ("hermes", '<tool_call>{"arguments":{},"name":"now"}</tool_call> bye', " bye", [NOW]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', []),
    ("hermes", "<tool_call>\nno JSON</tool_call>", "<tool_call>\nno JSON</tool_call>", []),
    ("hermes", '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"x": "a', "", [("add", '{"x": "a')]),
    ("llama3_json", LLAMA, "", [ADD]),
    ("llama3_json", f'\n{LLAMA}; {{"type": "function", "name": "now", "parameters": {{}}}}', "",
     [ADD, NOW]),
    ("llama3_json", "Hello", "Hello", []),
    ("llama3_json", ' {"name": "Bob", "age": 3}', ' {"name": "Bob", "age": 3}', []),
    ("llama3_json", '{"age": 3}', '{"age": 3}', []),
    ("mistral", f"Well.[TOOL_CALLS][{SINGLE}, {SINGLE}]", "Well.", [ADD, ADD]),
    ("mistral", f"[TOOL_CALLS] [{SINGLE}]", "", [ADD]),
    ("mistral", f"[TOOL_CALLS]add[ARGS]{WRITTEN}[TOOL_CALLS]now{{}}", "", [ADD, NOW]),
    ("mistral", "[TOOL_CALLS]rm{}", "rm{}", []),
    ("mistral", "[1] no [TOOL", "[1] no [TOOL", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_content_and_calls(name, text, content, calls):
    assert run(name, [text]) == (content, calls)
    assert run(name, list(text)) == (content, calls)


def test_forced_mistral_calls_come_behind_their_marker():
    assert run("mistral", [f"[{SINGLE}]"], is_forced=True) == ("", [ADD])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(CASES), st.data())
def test_cuts_make_no_difference(case, data):
    name, text, content, calls = case
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=5).map(sorted))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(name, pieces) == (content, calls)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(TOOL_FORMATS)), st.text('<tol_ca>[]TOLCAS{}":name,x/ ', max_size=60))
def test_what_is_no_call_comes_back_unchanged(name, text):
    content, calls = run(name, list(text))
    assert calls == []
    marker = "[TOOL_CALLS]" if name == "mistral" else ""
    assert content in (text, text.replace(marker, "")) or content.strip() in text


def test_formats_are_chosen_by_the_template():
    assert choose_tool_format("auto", "{{ tools }} <tool_call>") is TOOL_FORMATS["hermes"]
    assert choose_tool_format("auto", "{{ tools }} <|python_tag|>") is TOOL_FORMATS["llama3_json"]
    assert choose_tool_format("auto", "{{ tools }} [TOOL_CALLS]") is TOOL_FORMATS["mistral"]
    assert choose_tool_format("auto", "{{ tools }}") is TOOL_FORMATS["hermes"]
    assert choose_tool_format("llama3_json", "{{ tools }}") is TOOL_FORMATS["llama3_json"]
    with pytest.raises(ValueError, match="the chat template of this model knows no tools"):
        choose_tool_format("auto", "{{ messages }}")


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
@pytest.mark.parametrize("is_parallel", [True, False])
def test_what_the_grammar_lets_through_is_parsed(name, is_parallel):
    import xgrammar

    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    tools = [Tool("add", schema), Tool("now", {"type": "object", "properties": {}})]
    tag = {"type": "structural_tag",
           "format": TOOL_FORMATS[name].structural_tag(tools, is_parallel)}  # fmt: skip
    info = xgrammar.TokenizerInfo([chr(i) for i in range(128)], stop_token_ids=[0])
    compiled = xgrammar.GrammarCompiler(info).compile_structural_tag(json.dumps(tag))

    def admits(text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(compiled)
        return matcher.accept_string(text) and matcher.accept_token(0)

    add = {"hermes": '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>',
           "llama3_json": '{"name": "add", "parameters": {"x": 1}}',
           "mistral": '{"name": "add", "arguments": {"x": 1}}'}[name]  # fmt: skip
    now = add.replace("add", "now").replace('"x": 1', "")
    separator = {"hermes": "\n", "llama3_json": "; ", "mistral": ", "}[name]
    begin, end = ("[", "]") if name == "mistral" else ("", "")
    one, two = begin + add + end, begin + add + separator + now + end
    assert admits(one)
    assert admits(two) is is_parallel
    assert not admits("") and not admits("hello") and not admits(one.replace("1", "true"))
    assert run(name, [one], is_forced=True) == ("", [("add", '{"x": 1}')])
    assert run(name, [two], is_forced=True)[1] == [("add", '{"x": 1}'), ("now", "{}")]
