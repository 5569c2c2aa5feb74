"""Types of command-line flags, whose errors are one line."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any, NoReturn

import flax_dropout_cell as fdc

EXIT_BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\n")


def count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2**32), got {text}")
    return int(text)


def positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return float(text)


def not_negative(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return float(text)


def keep_prob(text: str) -> float:
    try:
        fdc.Dropout(keep_prob=float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return float(text)


TYPES = {"keep_prob": keep_prob, "learning_rate": positive, "price": not_negative, "seed": seed}
"""The type of a flag, by its name; all other flags are counts."""


def read_config(description: str, config: type, **texts: str) -> tuple[Any, Path]:
    """Reads a config, with a flag for each of its fields, and makes the folder `--out`.

    `texts` say in `--help` what fields are.
    """
    parser = Parser(description=description)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("results"),
        help="folder for what it writes (results)",
    )
    for field in dataclasses.fields(config):
        flag, kind = f"--{field.name.replace('_', '-')}", TYPES.get(field.name, count)
        text = f"{texts.get(field.name, '')} ({field.default})".strip()
        parser.add_argument(flag, type=kind, default=field.default, metavar="N", help=text)
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder to write to, got {out}: {error.strerror}")
    return config(**arguments), out
