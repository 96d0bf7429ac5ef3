"""What keeping outputs to JSON schemas costs: one batch, every request with a schema of its own.

The same prompts run with schemas that were never seen (they are compiled on the way), with the
same schemas again, and with none, to the same lengths. Prefix caching is off, or the second run
would have less to do. Every output is checked against its schema.

    python benchmarks/structured_output.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from loraplex import LLM, SamplingParams, StructuredOutputsParams
from loraplex.benchmarks.results import write_result

KINDS = ("book", "city", "recipe", "planet", "employee", "invoice", "song", "animal")


def make_schema(number: int, round_number: int, max_length: int | None) -> dict[str, Any]:
    """No two are alike, in names or in shape. max_length: of their strings, if it is bounded."""
    text = {"type": "string", **({} if max_length is None else {"maxLength": max_length})}
    properties: dict[str, Any] = {
        f"title_{number}_{round_number}": text,
        "count": {"type": "integer", "minimum": 0, "maximum": 10 + number},
        "kind": {"enum": [f"{kind}_{number}" for kind in KINDS[: 2 + number % 4]]},
        "tags": {"type": "array", "items": text, "minItems": 1, "maxItems": 1 + number % 3},
    }
    if number % 2:
        properties["owner"] = {
            "type": "object",
            "properties": {"name": text, "active": {"type": "boolean"}},
            "required": ["name", "active"],
            "additionalProperties": False,
        }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is as a schema of make_schema says."""
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "string":
            return isinstance(value, str) and len(value) <= schema.get("maxLength", len(value))
        case "integer":
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            return is_integer and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "array":
            is_list = isinstance(value, list)
            return (
                is_list
                and schema["minItems"] <= len(value) <= schema["maxItems"]
                and all(conforms(item, schema["items"]) for item in value)
            )
    properties = schema["properties"]
    return (
        isinstance(value, dict)
        and value.keys() == properties.keys()
        and all(conforms(value[name], properties[name]) for name in properties)
    )


def run(llm: LLM, prompts: list[Any], params: list[SamplingParams]) -> tuple[float, list[Any]]:
    """(output tokens a CPU second, completions). Of CPU seconds, those of all threads count, so
    that neither the compilers' work nor what else the machine does is lost in the waiting."""
    start = time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.process_time() - start
    completions = [output.outputs[0] for output in outputs]
    return sum(len(c.token_ids) for c in completions) / seconds, completions


def run_round(
    llm: LLM, prompts: list[Any], number: int, max_tokens: int, max_length: int | None
) -> dict[str, Any]:
    """Rates of one round; how many outputs of the runs with schemas came to their end before
    max_tokens, and how many of those were valid."""
    schemas = [make_schema(i, number, max_length) for i in range(len(prompts))]
    structured = [
        SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            structured_outputs=StructuredOutputsParams(json=schema, disable_any_whitespace=True),
        )
        for schema in schemas
    ]
    new_rate, completions = run(llm, prompts, structured)
    rate, again = run(llm, prompts, structured)
    lengths = [len(completion.token_ids) for completion in again]
    plain_rate, _ = run(
        llm,
        prompts,
        [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths],
    )
    finished = [
        (completion, schema)
        for completion, schema in zip(completions + again, schemas * 2, strict=True)
        if completion.finish_reason == "stop"
    ]
    num_valid = sum(conforms(json.loads(c.text), schema) for c, schema in finished)
    return {
        "tokens": sum(lengths),
        "new_schemas_tokens_per_cpu_s": round(new_rate, 1),
        "known_schemas_tokens_per_cpu_s": round(rate, 1),
        "no_schemas_tokens_per_cpu_s": round(plain_rate, 1),
        "outputs": 2 * len(prompts),
        "finished": len(finished),
        "valid": num_valid,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=None, help="Bound on every string.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--output", type=Path, default=None, help="File to write; default: results/."
    )
    arguments = parser.parse_args()
    with LLM(max_model_len=1024, enable_prefix_caching=False) as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": f"Describe {KINDS[i % 8]} number {i} as JSON."}]
            )
            for i in range(arguments.num_requests)
        ]
        run_round(llm, prompts, -1, 40, arguments.max_length)
        rounds = [
            run_round(llm, prompts, number, arguments.max_tokens, arguments.max_length)
            for number in range(arguments.rounds)
        ]
    medians = {
        name: statistics.median(r[name] for r in rounds)
        for name in rounds[0]
        if "_per_cpu_s" in name
    }
    overheads = {
        f"overhead_of_{name}_schemas": round(
            statistics.median(
                1 - r[f"{name}_schemas_tokens_per_cpu_s"] / r["no_schemas_tokens_per_cpu_s"]
                for r in rounds
            ),
            4,
        )
        for name in ("new", "known")
    }
    figures = {"num_requests": arguments.num_requests, **medians, **overheads, "rounds": rounds}
    print(json.dumps(figures, indent=1))
    print("written:", write_result("structured_output", figures, arguments.output))


if __name__ == "__main__":
    main()
