"""The table of docs/models.md, from what the tests of architectures run. `python
tests/support/model_table.py` writes it anew; a test fails while it is stale."""

from __future__ import annotations

import inspect
from pathlib import Path

from architectures import CASES, FALLBACK_CASES, architecture_of, tiny_config

from loraplex.engine.models.registry import ARCHITECTURES, base_model_spec

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin of the generated table -->\n", "<!-- end of the generated table -->\n"


def render_table() -> str:
    """One row for each architecture, in the order of the tests."""
    rows: dict[str, list[str]] = {}
    for case in (*CASES, *FALLBACK_CASES):
        rows.setdefault(architecture_of(tiny_config(case)), []).append(case)
    lines = [
        "| architecture | tested as | what it is | adapters on |",
        "|---|---|---|---|",
    ]
    for architecture, cases in rows.items():
        config = tiny_config(cases[0]).get_text_config()
        config.architectures = [architecture]
        modules = dict.fromkeys(module.name for module in base_model_spec(config).modules)
        description = "through transformers' implementation"
        if architecture in ARCHITECTURES:
            text = inspect.cleandoc(ARCHITECTURES[architecture].__doc__ or "")
            description = " ".join(text.split()).rstrip(".")
        cells = (
            f"`{architecture}`", "; ".join(cases), description,
            ", ".join(f"`{module}`" for module in modules),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def render_document() -> str:
    """The document with the table as it should be."""
    before, rest = DOCUMENT.read_text().split(BEGIN)
    return before + BEGIN + render_table() + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(render_document())
