"""Latents and codebooks, D = 64, on which the Hopper kernel's bound and ties are tried."""

from __future__ import annotations

import torch
from ops import test_nearest_code
from torch import Tensor


def latents(kind: str, count: int, num_codes: int) -> tuple[Tensor, Tensor]:
    """``(count, 64)`` rows and ``(num_codes, 64)`` codes."""
    z, codebook = test_nearest_code.make_data(kind, count, num_codes, 64)  # normal if not its own
    some = torch.randint(num_codes, (count,))
    if kind.startswith("apart"):  # codes that agree, in different pairs of one lane
        step = int(kind[5:])
        blocks = codebook[: num_codes // (2 * step) * (2 * step)].view(-1, 2, step, 64)
        blocks[:, 1] = blocks[:, 0] + 1e-7 * torch.randn_like(blocks[:, 0])
        z = codebook[some] + 0.1 * z
    elif kind == "repeated":  # rows near codes that come again
        codebook = codebook[torch.randint(max(1, num_codes // 3), (num_codes,))]
        z = codebook[some] + 0.1 * z
    elif kind == "mirror":  # exact ties of different codes
        codebook[num_codes // 2 :] = -codebook[: (num_codes + 1) // 2]
        z[::2] = 0
    elif kind == "halfway":
        z = (codebook[0] + codebook[-1]) / 2 + 1e-6 * z
    elif kind == "even_codes" and num_codes > 3:  # exact in half precision; rows between two
        grid = torch.randint(-128, 129, (num_codes // 2, 64)) / 64
        codebook = torch.cat([grid, -grid])
        a, b = codebook[torch.randint(len(codebook), (2, count))]
        noise, along = 0.1 * z, torch.nn.functional.normalize(a - b, dim=1)
        z = (a + b) / 2 + noise - (noise * along).sum(1, keepdim=True) * along
    elif kind == "even_rows" and num_codes > 3:  # exact in half precision; two codes as far
        grid = torch.randint(-128, 129, (num_codes // 4, 64)) / 64
        offset = 0.3 * torch.randn_like(grid)
        codebook = torch.cat([grid + offset, grid - offset, -grid - offset, offset - grid])
        z = grid[torch.randint(len(grid), (count,))]
    elif kind == "column":  # a mean that is large beside what the codes differ in
        z, codebook = z * 1e-40, codebook * 1e-40
        z[:, 5] = codebook[:, 5] = 1e3
    return z, codebook


OWN_KINDS = (
    "apart8", "apart64", "repeated", "mirror", "halfway", "even_codes", "even_rows", "column",
    "scale5e37",
)  # fmt: skip
KINDS = (*test_nearest_code.KINDS, *OWN_KINDS)
