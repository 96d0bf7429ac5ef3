"""Renders our Helm chart where there is no Helm: what we use of its template language."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml


def render_chart(chart: Path, settings: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The manifests, with settings as `helm install --set` takes them.

    Raises jinja2.UndefinedError for a value that does not exist, yaml.YAMLError.
    """
    values = yaml.safe_load((chart / "values.yaml").read_text())
    for setting in settings:
        name, _, value = setting.partition("=")
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        is_list = value.startswith("{")
        place[last] = value.strip("{}").split(",") if is_list else yaml.safe_load(value)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.filters["quote"] = lambda value: json.dumps(str(value))
    environment.filters["nindent"] = _nindent
    environment.globals.update(Values=values, Release={"Name": "demo"}, add=lambda a, b: a + b)
    manifests = []
    for path in sorted((chart / "templates").iterdir()):
        text = environment.from_string(_to_jinja(path.read_text())).render()
        manifests += [manifest for manifest in yaml.safe_load_all(text) if manifest]
    return manifests


def _to_jinja(text: str) -> str:
    """The same template, written for jinja2."""
    opened: list[str] = []

    def translate(found: re.Match[str]) -> str:
        dash, action = found[1], found[2].strip()
        word, _, rest = action.partition(" ")
        rest = re.sub(r"\.(Values|Release)\b", r"\1", rest)
        if word == "if":
            opened.append("if")
            return f"{{%{dash} if {rest.removeprefix('and ')} %}}"
        if word == "range":
            opened.append("for")
            return f"{{%{dash} for dot in {rest} %}}"
        if word == "else":
            return f"{{%{dash} else %}}"
        if word == "end":
            return f"{{%{dash} end{opened.pop()} %}}"
        if word == "toYaml":
            rest = re.sub(r"nindent (\d+)", r"nindent(\1)", rest)
            return f"{{{{{dash} {rest} }}}}"
        if word == "add":
            return f"{{{{{dash} add({', '.join(rest.split())}) }}}}"
        return f"{{{{{dash} {re.sub(r'^[.](?= )', 'dot', action).removeprefix('.')} }}}}"

    translated = re.sub(r"\{\{(-?)(.*?)\}\}", translate, text)
    assert not opened, "every block ends"
    return translated


def _nindent(value: Any, width: int) -> str:
    lines = yaml.safe_dump(value).splitlines()
    return "".join(f"\n{' ' * width}{line}" for line in lines)
