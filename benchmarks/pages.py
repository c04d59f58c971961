"""Fill the generated parts of docs/*.md: contracts, options, results; ``--check`` only compares.

python benchmarks/pages.py [--check]
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

import readme

from msvq_fast import cli, ops
from msvq_fast.training.config import InfoConfig
from msvq_fast.training.info import memory_table

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
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


def speed(suite: str) -> str:
    """The tables of a suite's result files, CPU."""
    paths = sorted(readme.RESULTS.glob(f"{suite}--*--cpu.json"))
    tables = [readme.speed_table(json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    if any("±" in table for table in tables):
        tables.append(
            "± is an interquartile range of more than 30 %: other load disturbed that row."
        )
    return "\n\n".join(tables) if tables else "There is no result file of this op yet."


def memory() -> str:
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
        text = texts[field.name].replace("|", "\\|").replace("<", "&lt;")
        found.append((f"{prefix}{field.name}".replace("_", "-"), default, text))
    return found


def render(text: str) -> str:
    """Return a page with its generated parts made anew."""

    def part(found: re.Match[str]) -> str:
        name, _, argument = found[2].partition(" ")
        return f"{found[1]}{_MAKE[name](*([argument] if argument else []))}\n{found[3]}"

    return _PART.sub(part, text)


_MAKE: dict[str, Any] = {
    "commands": commands,
    "contract": contract,
    "memory": memory,
    "mismatches": readme.mismatch_table,
    "presets": readme.presets_table,
    "speed": speed,
}


def main() -> int:
    """Rewrite the pages, or with ``--check`` say whether they are up to date."""
    only_compares = readme.check_option(__doc__)
    old = False
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        rendered = render(text)
        old |= text != rendered
        if not only_compares:
            path.write_text(rendered, encoding="utf-8")
    return int(old and only_compares)


if __name__ == "__main__":
    sys.exit(main())
