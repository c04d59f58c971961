"""Fill the generated parts of README.md and docs/*.md: contracts, options, results.

python benchmarks/pages.py
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from pathlib import Path
from typing import Any

import tables

from msvq_fast import cli, ops
from msvq_fast.training.config import InfoConfig
from msvq_fast.training.info import memory_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PART = re.compile(r"(<!-- ([\w ]+):begin -->\n).*?(<!-- \2:end -->)", flags=re.S)


def contract(name: str) -> str:
    """Signature and docstring of an op, as they stand in its source."""
    function = getattr(ops, name)
    source = inspect.getsource(function)
    signature = source[: source.index('"""')].rstrip().removesuffix(":")
    # Not marked as "python", which tests run.
    return f"```py\n{signature}\n```\n{_as_markdown(inspect.getdoc(function) or '')}"


def _as_markdown(docstring: str) -> str:
    """Sections in bold, arguments and exceptions as lists."""
    lines, section = [], ""
    for line in docstring.replace("``", "`").splitlines():
        if found := re.fullmatch(r"([A-Z][\w-]*):", line):
            section = found[1]
            lines += [f"**{section}**", ""]
        elif section in ("Args", "Raises") and (entry := re.match(r"    (\w+): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            lines.append(line.strip() if not line.startswith(" " * 8) else f"  {line.strip()}")
    return "\n".join(lines)


def predicted_memory() -> str:
    """What ``msvq info --memory`` counts."""
    table = memory_table(InfoConfig(memory=True))
    head = [str(column.header) for column in table.columns]
    cells = [list(column.cells) for column in table.columns]
    rows = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *zip(*cells, strict=True))]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])


def commands() -> str:
    """Every command with its options."""
    parts = []
    for name, command in cli.COMMANDS.items():
        rows = ["| option | default | |", "|---|---|---|"]
        for option, default, text in _options(command.config):
            rows.append(f"| `--{option}` | {default} | {text} |")
        parts.append("\n".join([f"## msvq {name}", command.help, "", *rows]))
    return "\n\n".join(parts)


def _options(config: type[Any], prefix: str = "") -> list[tuple[str, str, str]]:
    """Name, default and meaning of every option."""
    hints, texts = typing.get_type_hints(config), cli.attribute_texts(config)
    found = []
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[field.name]):
            found += _options(hints[field.name], f"{prefix}{field.name}.")
            continue
        missing = field.default is dataclasses.MISSING
        default = "needed" if missing else f"`{json.dumps(field.default)}`"
        text = _with_choices(texts[field.name], hints[field.name])
        text = text.replace("|", "\\|").replace("<", "&lt;")
        found.append((f"{prefix}{field.name}".replace("_", "-"), default, text))
    return found


def _with_choices(text: str, hint: Any) -> str:
    """The meaning of an option, with the words that it takes where not all are said."""
    parts = (hint, *typing.get_args(hint))
    words = [w for p in parts if typing.get_origin(p) is typing.Literal for w in typing.get_args(p)]
    said = all(re.search(rf"\b{re.escape(word)}\b", text) for word in words)
    return text if said else f"{text} One of {', '.join(words)}."


def render(text: str) -> str:
    """Return a page with its generated parts made anew."""

    def part(found: re.Match[str]) -> str:
        name, _, argument = found[2].partition(" ")
        return f"{found[1]}{_MAKE[name](*([argument] if argument else []))}\n{found[3]}"

    return _PART.sub(part, text)


_MAKE: dict[str, Any] = {
    "commands": commands,
    "compare": tables.compare_tables,
    "contract": contract,
    "demo": tables.demo_table,
    "gpu": tables.gpu_tables,
    "memory": tables.memory_table,
    "mismatches": tables.mismatch_table,
    "predicted_memory": predicted_memory,
    "presets": tables.presets_table,
    "robustness": tables.robustness_table,
    "speed": tables.speed_tables,
    "suite": tables.suite_tables,
}


def main() -> None:
    for path in PAGES:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
