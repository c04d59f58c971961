"""The tables of README and docs as Markdown, from the presets and the result files."""

from __future__ import annotations

import json
from typing import Any

from machine import RESULTS

from msvq_fast.models import PAPER_PARAMETERS, PRESETS
from msvq_fast.training.compare_report import NAMES, headings, rows
from msvq_fast.training.info import count_parameters

# The figures of the priors are in benchmarks/NOTES.md.
_NOT_SPEED = ("demo", "compare", "memory", "mismatches", "robustness", "priors")


def _read(pattern: str) -> list[dict[str, Any]]:
    """The result files of a name, sorted by it."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob(pattern))]


def presets_table() -> str:
    """Parameters of every preset of the paper beside the paper's."""
    rows = ["| preset | latents | K | built | paper |", "|---|---|---|---|---|"]
    for name, config in PRESETS.items():
        if name in PAPER_PARAMETERS:
            latents = "-".join(map(str, config.latents))
            built = count_parameters(name) / 1e6
            rows.append(
                f"| `{name}` | {latents} | {config.num_codes} | {built:.2f} "
                f"| {PAPER_PARAMETERS[name]} |"
            )
    return "\n".join(rows)


def speed_tables() -> str:
    """One table per suite, of its newest file: a row per group, what each peer took, ours first."""
    newest: dict[str, dict[str, Any]] = {}
    for record in _read("*--cpu.json"):
        suite = record["suite"]
        if suite not in newest or record["date"] > newest[suite]["date"]:
            newest[suite] = record
    return "\n\n".join(speed_table(r) for suite, r in newest.items() if suite not in _NOT_SPEED)


def suite_tables(suite: str) -> str:
    """The tables of a suite's result files, CPU."""
    tables = [speed_table(record) for record in _read(f"{suite}--*--cpu.json")]
    if any("±" in table for table in tables):
        tables.append(
            "± is an interquartile range of more than 30 %: other load disturbed that row."
        )
    return "\n\n".join(tables) if tables else "There is no result file of this op yet."


def speed_table(record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    lines = [
        f"**{record['suite']}** — {machine['cpu']}, {machine['threads']} threads, "
        f"{machine['isa']}, torch {versions['torch']}, commit `{record['commit']}`",
        "",
        "| | ms, times slower than ours |",
        "|---|---|",
    ]
    for group, results in _by_group(record).items():
        if all(r["name"] != "native" for r in results):  # ours alone, in several sizes
            cells = [f"{r['name']} {_time(r)}{_added_peak(r)}" for r in results]
            lines.append(f"| {group} | {' · '.join(cells)} |")
            continue
        native = next(r for r in results if r["name"] == "native")
        ours = native["median_s"]
        results = sorted(results, key=lambda r: r["median_s"])
        cells = [
            f"**native {_time(native)}**"
            if r["name"] == "native"
            else f"{r['name']} {_time(r)} (x{_short(r['median_s'] / ours, 2)})"
            for r in results
        ]
        lines.append(f"| {group} | {' · '.join(cells)} |")
    return "\n".join(lines)


def gpu_tables() -> str:
    """One table per suite of a GPU's result files, ours of each group first."""
    return "\n\n".join(gpu_table(record) for record in _read("*--cuda.json"))


def gpu_table(record: dict[str, Any]) -> str:
    """A row per group of which ours was measured; other ways of ours stand behind the first."""
    machine, versions = record["machine"], record["versions"]
    lines = [
        f"**{record['suite']}** — {machine['gpu']}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, commit `{record['commit']}`",
        "",
        "| | ms (percent of the floor) | times slower |",
        "|---|---|---|",
    ]
    for group, results in _by_group(record).items():
        ours = [r for r in results if r["name"].startswith("msvq_fast")]
        if not ours:
            continue
        cells = [
            f"{r['name'].removeprefix('msvq_fast').strip(', ')} {_ms(r['median_s'])} "
            f"({r['extra']['percent_of_floor']:.0f} %)".strip()
            for r in ours
        ]
        peers = [
            f"{r['name']} {_short(r['median_s'] / ours[0]['median_s'], 2)}"
            for r in sorted(results, key=lambda r: r["median_s"])
            if r not in ours
        ]
        lines.append(f"| {group} | {', '.join(cells)} | {', '.join(peers)} |")
    return "\n".join(lines)


def _by_group(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in record["results"]:
        groups.setdefault(result["group"], []).append(result)
    return groups


def _added_peak(result: dict[str, Any]) -> str:
    peak = result["extra"].get("added_peak_bytes")
    return "" if peak is None else f" (+{peak / 2**20:.0f} MiB)"


def memory_table() -> str:
    """One optimisation step at 1024 px in every memory mode."""
    record = _read("memory--*.json")[0]
    lines = ["| | s a step | added peak MiB | predicted MiB |", "|---|---|---|---|"]
    for result in record["results"]:
        extra = result["extra"]
        lines.append(
            f"| {result['name']} | {result['median_s']:.1f} | {extra['step_bytes'] / 2**20:.0f} "
            f"| {extra['predicted_bytes'] / 2**20:.0f} |"
        )
    extra, machine = record["results"][0]["extra"], record["machine"]
    group, precision = record["results"][0]["group"], extra["precision"]
    lines += [
        "",
        f"{group}, batch {extra['batch']}, {precision}; {machine['cpu']}, {machine['threads']} "
        f"threads, torch {record['versions']['torch']}, commit `{record['commit']}`.",
    ]
    return "\n".join(lines)


def _time(result: dict[str, Any]) -> str:
    """Milliseconds; with their interquartile range where other load disturbed the run."""
    median, spread = result["median_s"], result["iqr_s"]
    return f"{_ms(median)} ± {_ms(spread)}" if spread > 0.3 * median else _ms(median)


def _ms(seconds: float) -> str:
    return _short(1e3 * seconds, 3)


def _short(value: float, digits: int) -> str:
    whole = round(value, 0) >= 10**digits  # 99.6 to two digits is 100, not 1e+02
    return f"{value:.0f}" if whole else f"{value:.{digits}g}"


def demo_table() -> str:
    """What the demo's evaluation measured."""
    record = _read("demo--*.json")[0]
    evaluation, machine = record["evaluation"], record["machine"]
    lines = [
        f"Three held-out photographs, {evaluation['images']} tiles of 64 px, images in [0, 1]; "
        f"`make demo` took {record['wall_s']} s with everything it installs on {machine['cpu']}, "
        f"{machine['cores']} cores.",
        "",
        "| scale | MSE | PSNR dB | SSIM | codes used | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for scale, codes in zip(evaluation["reconstructions"], evaluation["codebooks"], strict=True):
        lines.append(
            f"| x̂_{scale['scale']} | {scale['mse']:.5f} | {scale['psnr']:.2f} "
            f"| {scale['ssim']:.3f} | {codes['usage']:.0f} % | {codes['perplexity']:.0f} |"
        )
    steps = record["validation"]
    shown = ", ".join(f"{v['psnr'][-1]:.1f} at step {v['step']}" for v in steps)
    return "\n".join([*lines, "", f"PSNR of the validation tiles while it trains: {shown} (dB)."])


def compare_tables() -> str:
    """One table per comparison, in the paper's form, and what its directions say."""
    record = _read("compare--*.json")[0]
    parts = []
    for comparison in record["comparisons"]:
        columns = headings(comparison)
        settings = comparison["settings"]
        lines = [
            f"**Latents {'-'.join(map(str, comparison['latents']))}** (`{comparison['preset']}`, "
            f"width x {settings['width_scale']:g}, {settings['steps']} steps of "
            f"{settings['batch_size']} crops, {len(settings['seeds'])} seeds, "
            f"{comparison['images']} held-out tiles)",
            "",
            f"| | {' | '.join(columns)} |",
            f"|---|{'---|' * len(columns)}",
        ]
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows(comparison)]
        parts.append("\n".join(lines))
    machine, versions = record["machine"], record["versions"]
    parts.append(
        f"{record['data']}; {machine['cpu']}, torch {versions['torch']}, commit "
        f"`{record['commit']}`. ± is the standard deviation over seeds."
    )
    return "\n\n".join(parts)


def robustness_table() -> str:
    """Every way to train the codebooks, both models side by side."""
    record = _read("robustness--*.json")[0]
    figures = {"psnr": 2, "usage": 0, "perplexity": 0}  # digits
    columns = [f"{NAMES[key]} {name}" for name in ("PSNR", "used %", "perplexity") for key in NAMES]
    lines = [
        f"| start | restart below | gradient | {' | '.join(columns)} |",
        f"|---|---|---|{'---|' * len(columns)}",
    ]
    for comparison in record["comparisons"]:
        settings, models = comparison["settings"], comparison["models"]
        gradient = settings["gradient"] or "straight-through"
        cells = [
            _mean_and_spread(models[key]["figures"][figure], digits)
            for figure, digits in figures.items()
            for key in NAMES
        ]
        way = f"{settings['codebook_init']} | {settings['restart_below']:g} | {gradient}"
        lines.append(f"| {way} | {' | '.join(cells)} |")
    settings = record["comparisons"][0]["settings"]
    versions = record["versions"]
    lines += [
        "",
        f"`{settings['preset']}` and its baseline, {settings['steps']} steps of "
        f"{settings['batch_size']} crops, {len(settings['seeds'])} seeds; {record['data']}; "
        f"{record['machine']['cpu']}, torch {versions['torch']}, commit `{record['commit']}`.",
    ]
    return "\n".join(lines)


def _mean_and_spread(figure: dict[str, Any], digits: int) -> str:
    return f"{figure['mean']:.{digits}f} ± {figure['spread']:.{digits}f}"


def mismatch_table() -> str:
    """Wrong codes: a row per way, a column per data set and K."""
    record = _read("mismatches--*.json")[0]
    groups = list(dict.fromkeys(r["group"] for r in record["results"]))
    rows: dict[str, list[str]] = {}
    for result in record["results"]:
        wrong = result["wrong_codes"]
        share = f" ({100 * wrong / result['of']:.2g} %)" if wrong else ""
        rows.setdefault(result["name"], []).append(f"{wrong}{share}")
    lines = [f"| | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    versions = record["versions"]
    names = ("torch", "faiss-cpu", "vector-quantize-pytorch")
    tested = ", ".join(f"{name} {versions[name]}" for name in names)
    meaning = "; ".join(f"*{name}*: {text}" for name, text in record["data"].items())
    return "\n".join([*lines, "", f"{meaning}. {tested}, commit `{record['commit']}`."])
