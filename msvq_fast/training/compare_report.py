"""Runs of two models as the paper's table: means, spread over seeds, and the paper's row beside."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from typing import IO, Any

from rich.box import HEAVY_HEAD
from rich.table import Table

from msvq_fast.training.compare_config import BASELINE
from msvq_fast.training.paper import PAPER_RESULTS, PaperRow
from msvq_fast.training.results import print_whole, table_console

NAMES = {"vqvae2": "VQ-VAE 2", "msvqvae": "MS-VQVAE"}
# figure: heading, factor, digits, whether more is better; None is a matter of taste
FIGURES: dict[str, tuple[str, float, int, bool | None]] = {
    "parameters": ("params M", 1e-6, 2, None),
    "usage": ("CB usage %", 1, 0, True),
    "perplexity": ("perplexity", 1, 0, True),
    "mse": ("MSE e-3", 1e3, 2, False),
    "ssim": ("SSIM", 1, 3, True),
    "lpips": ("LPIPS", 1, 3, False),
    "psnr": ("PSNR dB", 1, 2, True),
    "fd": ("rFID", 1, 2, False),
    "kid": ("KID e-3", 1e3, 1, False),
}

_PAPER = ", paper"


def summarize(preset: str, results: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of both models over their seeds.

    Args:
        preset: Of MS-VQVAE.
        results: What results.json holds, by (preset, seed).

    Returns:
        ``models``: per model and figure the values in the order of seeds, their mean, and their
        sample standard deviation (None for one seed); per-scale means of usage and perplexity.
        ``paper``: per model the paper's row or None. ``directions``: per figure that the paper
        reports for both, whether the runs agree. ``suffix`` of the set distances, ``images``.
    """
    models, paper = {}, {}
    for key, name in (("vqvae2", BASELINE + preset), ("msvqvae", preset)):
        runs = [result for (of, _), result in results.items() if of == name]
        figures = [_figures(run) for run in runs]
        models[key] = {
            "preset": name,
            "seeds": [seed for of, seed in results if of == name],
            "figures": {f: _spread([row[f] for row in figures]) for f in FIGURES},
            "usage_per_scale": _per_scale(runs, "usage"),
            "perplexity_per_scale": _per_scale(runs, "perplexity"),
        }
        row = PAPER_RESULTS.get(name)
        paper[key] = None if row is None else dataclasses.asdict(row)
    first = next(iter(results.values()))
    sets = first["reconstructed_set"]
    suffix = "" if sets is None else sets["suffix"]
    summary = {
        "preset": preset,
        "latents": first["model_config"]["latents"],
        "images": first["images"],
        "suffix": suffix,
        "models": models,
        "paper": paper,
    }
    return {**summary, "directions": _directions(models, paper, suffix)}


def print_comparison(summary: Mapping[str, Any], file: IO[str] | None = None) -> None:
    """Print the table: a row per model, mean ± spread over seeds, the paper's row below it."""
    console = table_console(file)
    table = Table(header_style="bold", box=HEAVY_HEAD if console.is_terminal else None)
    table.add_column("")
    for heading in headings(summary):
        table.add_column(heading, justify="right")
    for name, cells in rows(summary):
        paper = name.endswith(_PAPER)
        style = "dim" if paper and console.is_terminal else None
        table.add_row("  paper" if paper else name, *cells, style=style)
    seeds = summary["models"]["msvqvae"]["seeds"]
    console.print(
        f"{summary['preset']}: latents {'-'.join(map(str, summary['latents']))}, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}, {summary['images']} held-out tiles; "
        "usage and perplexity per scale, their mean in brackets"
        + ("; ± is the standard deviation over seeds" if len(seeds) > 1 else ""),
        soft_wrap=True,
    )
    print_whole(console, table)


def headings(summary: Mapping[str, Any]) -> list[str]:
    """Headings of the columns that have a value, the set distances under their own names."""
    suffix = summary["suffix"]
    own = {"fd": f"rFD{suffix}", "kid": f"rKID{suffix} e-3"} if suffix else {"kid": "rKID e-3"}
    return [own.get(figure, FIGURES[figure][0]) for figure in _shown(summary)]


def rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Name and cells of every row of the table."""
    shown = _shown(summary)
    for key, model in summary["models"].items():
        yield NAMES[key], [cell(model, figure) for figure in shown]
        if (row := PAPER_RESULTS.get(model["preset"])) is not None:
            cells = [paper_cell(row, figure, summary["suffix"]) for figure in shown]
            yield NAMES[key] + _PAPER, cells


def cell(model: Mapping[str, Any], figure: str) -> str:
    """A figure of one model: mean ± spread, usage and perplexity also per scale."""
    values = model["figures"][figure]
    if values is None:
        return "-"
    _, factor, digits, _ = FIGURES[figure]
    text = f"{factor * values['mean']:.{digits}f}"
    if values["spread"] is not None and figure != "parameters":
        text += f" ± {factor * values['spread']:.{digits}f}"
    if f"{figure}_per_scale" in model:
        text = "-".join(f"{v:.0f}" for v in model[f"{figure}_per_scale"]) + f" ({text})"
    return text


def paper_cell(row: PaperRow, figure: str, suffix: str) -> str:
    """The same figure as the paper prints it; of set distances it has the FID alone."""
    _, factor, digits, _ = FIGURES[figure]
    name = _name_in_paper(figure, suffix)
    if name is None:
        return "-"
    value = getattr(row, name)
    if isinstance(value, tuple):
        return "-".join(map(str, value)) + f" ({getattr(row, f'{name}_mean')})"
    if figure in ("parameters", "lpips"):  # LPIPS has two digits in Table 1, three in Table 2
        return f"{value}"
    return f"{factor * value:.{2 if figure == 'ssim' else digits}f}"


def describe(summary: Mapping[str, Any]) -> list[str]:
    """One line per figure that the paper reports: its direction and what the runs say to it."""
    lines = []
    for figure, found in summary["directions"].items():
        heading = FIGURES[figure][0]
        lines.append(
            f"{heading}: the paper's MS-VQVAE is {found['paper']}, this one {found['here']}: "
            f"{found['verdict']}"
        )
    return lines


def _name_in_paper(figure: str, suffix: str) -> str | None:
    if figure == "fd":
        return None if suffix else "rfid"
    return None if figure == "kid" else figure


def _directions(models: Mapping[str, Any], paper: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    """Per figure of the paper: better, worse or equal there and here.

    Here it is undecided where the ranges over seeds overlap, however far apart the means are.
    """
    if paper["vqvae2"] is None or paper["msvqvae"] is None:
        return {}
    found = {}
    for figure, (_, _, _, more_is_better) in FIGURES.items():
        base, ours = (models[key]["figures"][figure] for key in ("vqvae2", "msvqvae"))
        name = _name_in_paper(figure, suffix)
        if more_is_better is None or name is None or base is None or ours is None:
            continue
        there = [_mean(paper[key][name]) for key in models]
        sign = 1 if more_is_better else -1
        printed = sign * (there[1] - there[0])
        low, high = (sign * v for v in (min(ours["values"]), max(ours["values"])))
        others = [sign * v for v in base["values"]]
        here = "not clearly different"
        if min(low, high) > max(others):
            here = "better"
        elif max(low, high) < min(others):
            here = "worse"
        claimed = "equal" if printed == 0 else "better" if printed > 0 else "worse"
        verdict = "agrees" if here == claimed else "differs"
        if "not" in here or claimed == "equal":
            verdict = "undecided"
        found[figure] = {"paper": claimed, "here": here, "verdict": verdict}
    return found


def _figures(result: Mapping[str, Any]) -> dict[str, float | None]:
    final, sets = result["reconstructions"][-1], result["reconstructed_set"]
    return {
        **{name: result[name] for name in ("parameters", "usage", "perplexity")},
        **{name: final[name] for name in ("mse", "ssim", "lpips", "psnr")},
        "fd": None if sets is None else sets["fd"],
        "kid": None if sets is None else sets["kid"],
    }


def _spread(values: list[float | None]) -> dict[str, Any] | None:
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    spread = statistics.stdev(known) if len(known) > 1 else None
    return {"values": known, "mean": statistics.fmean(known), "spread": spread}


def _per_scale(runs: list[Mapping[str, Any]], what: str) -> list[float]:
    per_run = [[book[what] for book in run["codebooks"]] for run in runs]
    return [statistics.fmean(scale) for scale in zip(*per_run, strict=True)]


def _shown(summary: Mapping[str, Any]) -> list[str]:
    models = summary["models"].values()
    return [f for f in FIGURES if any(m["figures"][f] is not None for m in models)]


def _mean(value: float | tuple[float, ...] | list[float]) -> float:
    return statistics.fmean(value) if isinstance(value, (list, tuple)) else value
