"""Latents and codebooks on which searches of the nearest code are known to go wrong."""

from __future__ import annotations

import torch
from torch import Tensor


def latents(kind: str, count: int, num_codes: int) -> tuple[Tensor, Tensor]:
    """Rows and codes of a kind that is known to be hard."""
    z, codebook = torch.randn(count, 64), torch.randn(num_codes, 64)
    if kind == "initial":
        codebook = (torch.rand(num_codes, 64) * 2 - 1) / num_codes
    elif kind.startswith("offset"):
        z, codebook = z + float(kind[6:]), codebook + float(kind[6:])
    elif kind == "trained":
        z = codebook[torch.randint(num_codes, (count,))] + 0.3 * z
    elif kind == "zero":
        codebook.zero_()
    elif kind == "duplicates":
        codebook = codebook[torch.randint(max(1, num_codes // 3), (num_codes,))]
        z = codebook[torch.randint(num_codes, (count,))] + 0.1 * z
    elif kind.startswith("scale"):
        z, codebook = z * float(kind[5:]), codebook * float(kind[5:])
    elif kind == "mixed":
        z = z * 10.0 ** torch.randint(-10, 10, (count, 1))
    elif kind == "close":
        codebook[1::2] = codebook[::2][: num_codes // 2]
        codebook[1::2, 0] = codebook[1::2, 0].nextafter(torch.tensor(9.0))
        z = codebook[torch.randint(num_codes, (count,))] + 1e-4 * z
    elif kind.startswith("apart"):  # codes that agree, in different pairs of one lane
        step = int(kind[5:])
        blocks = codebook[: num_codes // (2 * step) * (2 * step)].view(-1, 2, step, 64)
        blocks[:, 1] = blocks[:, 0] + 1e-7 * torch.randn_like(blocks[:, 0])
        z = codebook[torch.randint(num_codes, (count,))] + 0.1 * z
    elif kind == "mirror":  # exact ties of different codes
        codebook[num_codes // 2 :] = -codebook[: (num_codes + 1) // 2]
        z[::2] = 0
    elif kind == "halfway":
        middle = (codebook[0] + codebook[-1]) / 2
        z = middle + 1e-6 * z
    elif kind == "even codes" and num_codes > 3:  # without rounding error; rows halfway between two
        grid = torch.randint(-128, 129, (num_codes // 2, 64)) / 64
        codebook = torch.cat([grid, -grid])
        a, b = codebook[torch.randint(len(codebook), (2, count))]
        noise, along = 0.1 * z, torch.nn.functional.normalize(a - b, dim=1)
        z = (a + b) / 2 + noise - (noise * along).sum(1, keepdim=True) * along
    elif (
        kind == "even rows" and num_codes > 3
    ):  # without rounding error; two codes as far from each
        grid = torch.randint(-128, 129, (num_codes // 4, 64)) / 64
        offset = 0.3 * torch.randn_like(grid)
        codebook = torch.cat([grid + offset, grid - offset, -grid - offset, offset - grid])
        z = grid[torch.randint(len(grid), (count,))]
    elif kind == "column":  # a mean that is large beside what the codes differ in
        codebook = codebook * 1e-40
        z, codebook[:, 5] = z * 1e-40, 1e3
        z[:, 5] = 1e3
    return z, codebook


KINDS = [
    "gaussian", "initial", "offset5", "offset1000", "trained", "zero", "duplicates", "scale1e-20",
    "scale1e15", "scale1e-40", "scale5e37", "column", "mixed", "close", "apart8",
    "apart64", "mirror", "even codes", "even rows", "halfway",
]  # fmt: skip
