"""The command ``msvq``: options from the dataclasses of training/config.py, errors in one line.

Nothing here imports torch before a command runs, so that help and typing errors answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import io
import os
import re
import sys
import typing
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Any, Literal, NamedTuple

from jsonargparse import ActionYesNo, ArgumentParser

from msvq_fast import __version__
from msvq_fast.training import compare_config, prior_config, share_config
from msvq_fast.training import config as configs


class Command(NamedTuple):
    """A command: its options' dataclass, and the function that takes one."""

    config: type[Any]
    module: str
    function: str
    help: str


COMMANDS = {
    "train": Command(
        configs.TrainConfig,
        "msvq_fast.training.loop",
        "run_train",
        "Train a model on images.",
    ),
    "evaluate": Command(
        configs.EvaluateConfig,
        "msvq_fast.training.evaluate",
        "run_evaluate",
        "Measure MSE, PSNR, SSIM, LPIPS, rFID and codebook usage of a trained model.",
    ),
    "compare": Command(
        compare_config.CompareConfig,
        "msvq_fast.training.compare",
        "run_compare",
        "Train MS-VQVAE and VQ-VAE 2 over seeds and print the paper's table.",
    ),
    "reconstruct": Command(
        share_config.ReconstructConfig,
        "msvq_fast.training.reconstruct",
        "run_reconstruct",
        "Draw images, their contributions and partial sums as a PNG grid.",
    ),
    "tokenize": Command(
        configs.TokenizeConfig,
        "msvq_fast.training.tokenize",
        "run_tokenize",
        "Write the codes of images as shards of 16-bit numbers.",
    ),
    "train-prior": Command(
        prior_config.TrainPriorConfig,
        "msvq_fast.training.prior",
        "run_train_prior",
        "Train a prior over the codes of tokenized images.",
    ),
    "sample": Command(
        prior_config.SampleConfig,
        "msvq_fast.training.sample",
        "run_sample",
        "Draw images from a prior, coarse to fine, as a PNG grid.",
    ),
    "export": Command(
        share_config.ExportConfig,
        "msvq_fast.training.export",
        "run_export",
        "Write encode and decode as ONNX or torch.export files and compare them with the model.",
    ),
    "push": Command(
        share_config.PushConfig,
        "msvq_fast.training.push",
        "run_push",
        "Upload a trained model and its model card to the hub.",
    ),
    "ui": Command(
        share_config.UiConfig,
        "msvq_fast.training.ui",
        "run_ui",
        "Serve a page that shows images through a model, and draws their details anew.",
    ),
    "info": Command(
        configs.InfoConfig,
        "msvq_fast.training.info",
        "run_info",
        "Say which op runs where and why not elsewhere; list the presets.",
    ),
}


_UNIONS = (typing.Union, UnionType)  # which one X | Y is depends on X before Python 3.14
_CONFIG_HELP = "YAML or JSON file with these options; the ones after it on the line win over it."


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``msvq`` and return its exit code.

    0 is success, 1 a training that broke down or an export that disagrees, 2 bad input, 128 plus
    its number a signal. Errors are one line on stderr.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and (
            stream.encoding.lower() != "utf-8" or stream.errors == "strict"
        ):
            stream.reconfigure(errors="replace")  # rather "?" than no help, or a name of odd bytes
    try:
        command, config = parse(argv)
        return _run(command, config)
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except SystemExit as exit_:  # --help, --version and --print_config have printed
        return int(exit_.code or 0)
    except ArgumentError as error:
        named = next((word for word in argv if word in COMMANDS), None)
        return _fail(_one_line(str(error), named), 2)


def parse(argv: Sequence[str]) -> tuple[Command, Any]:
    """The command of a command line and its configuration.

    Raises:
        ArgumentError: For an unknown command or option, or a value of the wrong type.
        SystemExit: After help or the like is printed.
    """
    try:
        parsed = _parser().parse_args([_underscored(argument) for argument in argv])
    except RecursionError:
        raise ArgumentError(None, "options nested too deeply; expected names and values") from None
    name = parsed["command"]
    command = COMMANDS[name]
    return command, _build(command.config, parsed[name].as_dict(), "")


def _run(command: Command, config: Any) -> int:
    from PIL import Image
    from torch import OutOfMemoryError

    from msvq_fast.ops.backend import NOT_BUILT, is_built
    from msvq_fast.ops.checks import InputError, WorkError
    from msvq_fast.training.allocator import keep_freed_memory

    keep_freed_memory()
    # Pillow warns of large images, which are read; twice as large ones are refused and named.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    if not is_built():
        print(f"msvq: note: {NOT_BUILT}; the CPU is several times slower without", file=sys.stderr)
    try:
        result = getattr(importlib.import_module(command.module), command.function)(config)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit:  # what rich makes of a broken pipe
        return 141
    except (InputError, OSError) as error:
        return _fail(str(error), 2)
    except OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        return _fail("; ".join([reason, *_memory_hint(config)]), 1)
    except WorkError as error:
        return _fail(str(error), 1)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    # Names in files may hold what a terminal obeys.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    print(f"msvq: error: {text}", file=sys.stderr)
    return code


def _memory_hint(config: Any) -> list[str]:
    """What to change where a device's memory was too small: what the command has of it."""
    remedies = []
    if isinstance(getattr(config, "memory", None), str):
        remedies.append("try memory=sequential, then strips")
    if hasattr(config, "accumulate"):
        remedies.append("lower batch_size and raise accumulate as much")
    elif hasattr(config, "batch_size"):
        remedies.append("lower batch_size")
    return remedies


def _underscored(argument: str) -> str:
    """Accept ``--batch-size`` for ``--batch_size``."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="msvq",
        exit_on_error=False,
        allow_abbrev=False,
        description="Train and use MS-VQVAE and VQ-VAE 2 image tokenizers.",
    )
    parser.add_argument("--version", action="version", version=f"msvq_fast {__version__}")
    commands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = ArgumentParser(exit_on_error=False, allow_abbrev=False, description=command.help)
        sub.add_argument("--config", action="config", help=_CONFIG_HELP)
        _add_options(sub, command.config, "")
        commands.add_subcommand(name, sub, help=command.help)
    return parser


def _add_options(parser: ArgumentParser, config: type[Any], prefix: str) -> None:
    hints, texts = typing.get_type_hints(config), attribute_texts(config)
    for field in dataclasses.fields(config):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            _add_options(parser, typing.cast("type[Any]", hint), f"{name}.")
            continue
        options: dict[str, Any] = {"help": texts.get(field.name, "").replace("%", "%%")}
        if field.default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = field.default
        if hint is bool:
            parser.add_argument(f"--{name}", action=ActionYesNo(no_prefix="no_"), **options)
        else:
            parser.add_argument(f"--{name}", type=hint, **options)


def attribute_texts(config: type[Any]) -> dict[str, str]:
    """Read the ``Attributes:`` section of a docstring: the one place that documents a field."""
    # From Python 3.13 on docstrings come without their indentation, under -OO not at all.
    section = inspect.cleandoc(config.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    plain = {name: " ".join(text.split()).replace("``", "") for name, text in entries}
    return {name: re.sub(r"\bNone\b", "null", text) for name, text in plain.items()}


def _build(config: type[Any], values: dict[str, Any], prefix: str) -> Any:
    """Fill a dataclass; refuses null, which the parser takes of any option in a file."""
    hints, built = typing.get_type_hints(config), {}
    for field in dataclasses.fields(config):
        name, hint, value = f"{prefix}{field.name}", hints[field.name], values[field.name]
        if not dataclasses.is_dataclass(hint):
            if value is None and type(None) not in typing.get_args(hint):
                raise ArgumentError(None, f"--{name} null: expected {_describe(hint)}")
            built[field.name] = value
        elif isinstance(value, dict):
            built[field.name] = _build(typing.cast("type[Any]", hint), value, f"{name}.")
        elif value is not None:
            some = f"--{name}.{dataclasses.fields(hint)[0].name}"
            raise ArgumentError(None, f"--{name} {value}: expected options, such as {some}")
    return config(**built)


def _one_line(message: str, command: str | None) -> str:
    """Turn what jsonargparse says into one line, with a near miss where there is one."""
    if found := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        return _unknown_option(found[1].split()[0].partition("=")[0], command)
    if found := re.match(r"argument (--[\w.]+)/(--[\w.]+): ignored explicit argument", message):
        return f"{found[1]} takes no value; its opposite is {found[2]}"
    if found := re.search(r"does not accept option '([\w.-]+)'", message):
        return _unknown_option(f"--{found[1]}", command)
    if found := re.search(r"invalid choice: '(.*?)'", message):
        return f"unknown command {found[1]}; {_hint(found[1], COMMANDS, '')}"
    if found := re.search(r"arguments are required: ([\w-]+)\.([\w.]+)", message):
        return f"{found[1]} needs --{found[2]}"
    if 'expected "command"' in message:
        return f"no command given; expected one of {', '.join(COMMANDS)} (msvq --help)"
    if found := re.match(r"Unexpected config:\s*(.*)", message):
        said = f"starts with {found[1]!r}" if found[1] else "is empty"
        return f"--config: the file {said}; expected options with values, such as 'seed: 1'"
    if found := re.search(r'Parser key "([\w.-]+)":', message):
        value = re.search(r"(?:Given|Got) value: (.*)", message)
        # A message of a config file has the command in front of the option's name.
        hint = _options(command).get(found[1].removeprefix(f"{command}."))
        if value and hint is not None:
            given = "null" if value[1] == "None" else value[1]
            return f"--{found[1]} {given}: expected {_describe(hint)}"
    return re.sub(r'^Parser key "([\w.-]+)":', r"--\1:", message)


def _unknown_option(name: str, command: str | None) -> str:
    if not name.startswith("-"):
        return f"{name!r} belongs to no option; those that are true or false take no value"
    options = [f"--{option}" for option in _options(command)]
    return f"unknown option {name}; {_hint(name, options, f'{command} ' if command else '')}"


def _hint(name: str, known: Iterable[str], command: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"msvq {command}--help lists what there is"


def _options(command: str | None) -> dict[str, Any]:
    """Names and types of a command's options."""
    return _option_names(COMMANDS[command].config) if command else {}


def _option_names(config: type[Any]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            nested = _option_names(typing.cast("type[Any]", hint))
            names.update({f"{name}.{key}": value for key, value in nested.items()})
        else:
            names[name] = hint
    return names


def _describe(hint: Any) -> str:
    """An option's type in words."""
    words: list[str] = []
    for part in typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,):
        if typing.get_origin(part) is Literal:
            words += [str(choice) for choice in typing.get_args(part)]
        elif typing.get_origin(part) is tuple:
            kinds = ["..." if kind is ... else _describe(kind) for kind in typing.get_args(part)]
            words.append(f"a list [{', '.join(kinds)}]")
        else:
            words.append("null" if part is type(None) else part.__name__)
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
