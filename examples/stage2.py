"""Both stages on photographs: train, tokenize, train two priors, sample; minutes on two cores.

python examples/stage2.py [--data FOLDER] [--out runs/stage2]
"""

from __future__ import annotations

import argparse
import time

from msvq_fast.cli import main as msvq

KINDS = ("autoregressive", "maskgit")


def run(command: str, *options: str) -> None:
    """Run a command of ``msvq`` and say how long it took; an error ends the script."""
    start = time.perf_counter()
    code = msvq([command, *options])
    if code:
        raise SystemExit(code)
    print(f"-- {command}: {time.perf_counter() - start:.0f} s\n", flush=True)


def main() -> None:
    """Run everything; started again it goes on where it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="builtin:photos")
    parser.add_argument("--out", default="runs/stage2")
    parser.add_argument("--steps", type=int, default=1000, help="of the autoencoder")
    parser.add_argument("--prior-steps", type=int, default=600, help="of each prior")
    args = parser.parse_args()
    data, out = f"--data={args.data}", args.out
    model = f"--checkpoint={out}/model"

    # Short side 128 px: a crop of 64 px is a part of a scene and not a patch of fur.
    places = (data, "--resize=128", f"--out={out}/model", "--resume=auto")
    run("train", *places, "--preset=tiny", f"--steps={args.steps}", "--log_every=100")
    crops = ("--crop=random", "--resize=128", "--repeat=256", "--flip")
    run("tokenize", model, data, "--split=train", f"--out={out}/train", *crops)
    run("tokenize", model, data, "--split=val", "--resize=128", f"--out={out}/val")

    tokens = (f"--tokens={out}/train", f"--validation={out}/val")
    sizes = ("--depth=4", "--width=128", "--heads=4", "--batch_size=16", "--log_every=50")
    for kind in KINDS:
        run(
            "train-prior",
            *(*tokens, *sizes, f"--kind={kind}", f"--out={out}/{kind}", "--resume=auto"),
            *(f"--steps={args.prior_steps}", "--lr=1e-3", "--keep_last=1"),
        )
    for kind in KINDS:
        prior = (f"--prior={out}/{kind}", model)
        run("sample", *prior, "--images=8", f"--out={out}/{kind}.png")
        run(
            "sample",
            *(*prior, "--images=32", "--reject=keep=3", "--variations=4"),
            f"--out={out}/{kind}_variations.png",
        )
    print(f"look at {out}/*.png")


if __name__ == "__main__":
    main()
