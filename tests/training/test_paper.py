from __future__ import annotations

import pytest
import torch

from msvq_fast.models import PRESETS
from msvq_fast.training.compare_report import FIGURES, paper_cell
from msvq_fast.training.paper import PAPER_RESULTS

# Tables 1 and 2 as printed, but that Table 2's usage is in the text.
PRINTED = {
    "vqvae2-celebahq1024-l": "2.2 | 100-69-18 (62) | 179-146-35 (120) | 2.35 0.75 0.39 26.28 64.47",
    "celebahq1024-l": "54.3 | 38-76-100 (71) | 88-170-163 (140) | 2.43 0.75 0.38 26.13 65.05",
    "vqvae2-celebahq1024-m": "2.2 | 100-38-7 (48) | 135-81-11 (75) | 1.30 0.80 0.28 28.85 38.76",
    "celebahq1024-m": "25.3 | 100-100-100 (100) | 222-195-121 (179) | 1.15 0.81 0.25 29.36 38.38",
    "vqvae2-celebahq1024-s": "2.1 | 100-100-35 (78) | 110-194-54 (119) | 0.60 0.88 0.14 32.18 6.44",
    "celebahq1024-s": "13.5 | 67-72-100 (79) | 142-118-109 (123) | 0.52 0.90 0.13 32.79 6.98",
    "vqvae2-imagenet256-l": "1.4 | 100-100 (100) | 559-699 (629) | 1.79 0.82 0.195 27.46 22.17",
    "imagenet256-l": "37.4 | 100-100 (100) | 815-599 (707) | 1.54 0.83 0.164 28.10 18.00",
    "vqvae2-imagenet256-s": "1.3 | 100-100 (100) | 273-380 (327) | 0.59 0.93 0.058 32.23 5.39",
    "imagenet256-s": "9.4 | 100-100 (100) | 371-262 (317) | 0.50 0.93 0.046 32.95 4.49",
}


@pytest.mark.parametrize("name", PRINTED)
def test_cells_are_what_the_paper_prints(name):
    cells = [paper_cell(PAPER_RESULTS[name], figure, "") for figure in FIGURES]
    assert cells.pop() == "-"  # KID
    parameters, usage, perplexity, *rest = cells
    assert " | ".join([parameters, usage, perplexity, " ".join(rest)]) == PRINTED[name]


def test_paper_rows_are_those_of_the_presets():
    assert set(PAPER_RESULTS) == {n for n in PRESETS if "celeba" in n or "imagenet" in n}
    for name, row in PAPER_RESULTS.items():
        assert len(row.usage) == len(row.perplexity) == PRESETS[name].num_scales
        # PSNR and MSE are the same figure on [0, 1], but for 8-bit rounding.
        psnr = float(-10 * torch.tensor(row.mse).log10())
        assert psnr == pytest.approx(row.psnr, abs=0.08), name
