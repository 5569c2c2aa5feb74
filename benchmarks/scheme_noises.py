"""The schemes that `schemes.py` compares: each one's noise of a strength, and its strengths."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax_dropout_cell as fdc

KEPT = (0.9, 0.8, 0.65, 0.5)
ZONED_OUT = (0.05, 0.15, 0.3, 0.5)
STDDEVS = (0.02, 0.05, 0.1, 0.2)
RATES = (0.25, 0.5, 1.0, 2.0)


class Setting(NamedTuple):
    """The choices of a training: a scheme's strength, a factor of the learning rate, a decay."""

    strength: Any = 0.0
    rate: Any = 1.0
    weight_decay: Any = 0.0


class Scheme(NamedTuple):
    """A scheme: its noise of a strength, the strengths to pick from, and how it is tested.

    `noise(strength, before, cell)` takes what to keep of the inputs apart: some tasks drop none.
    With `scales_rate`, a strength is a factor of the learning rate.
    """

    name: str
    noise: Callable[[Any, Any, str], fdc.RecurrentDropout]
    strengths: tuple[float, ...]
    monte_carlo: bool = False
    scales_rate: bool = False


def no_dropout(_: Any, __: Any, cell: str) -> fdc.RecurrentDropout:
    return fdc.RecurrentDropout()


def zaremba(keep: Any, before: Any, cell: str) -> fdc.RecurrentDropout:
    return fdc.recipes.zaremba2014(input_keep_prob=before, output_keep_prob=keep)


def gal(keep: Any, before: Any, cell: str, tied: bool = True) -> fdc.RecurrentDropout:
    return fdc.recipes.gal2016(
        input_keep_prob=before, recurrent_keep_prob=keep, output_keep_prob=keep, tied=tied
    )


def semeniuta(keep: Any, before: Any, cell: str) -> fdc.RecurrentDropout:
    return fdc.recipes.semeniuta2016(
        candidate_keep_prob=keep, input_keep_prob=before, output_keep_prob=keep
    )


def zoneout(prob: Any, _: Any, cell: str) -> fdc.RecurrentDropout:
    if cell == "gru":
        return fdc.RecurrentDropout(inside={"hidden": fdc.Zoneout(prob=prob)})
    return fdc.recipes.krueger2016(cell_prob=prob, hidden_prob=prob / 3)


def weight_drop(keep: Any, before: Any, cell: str) -> fdc.RecurrentDropout:
    spec = fdc.recipes.merity2017(weight_keep_prob=keep, input_keep_prob=before)
    output = fdc.Dropout(keep_prob=keep, variational=True)
    return dataclasses.replace(spec, output=output)


def weight_noise(stddev: Any, _: Any, cell: str) -> fdc.RecurrentDropout:
    return fdc.RecurrentDropout(params=fdc.GaussianNoise(stddev=stddev, variational=True))


def linear_dropout(keep: Any, before: Any, cell: str) -> fdc.RecurrentDropout:
    """Gal's tied masks without the one on h, for no product reads h."""
    return fdc.RecurrentDropout(
        input=fdc.Dropout(keep_prob=before, variational=True),
        output=fdc.Dropout(keep_prob=keep, variational=True),
    )


def linear_candidate(keep: Any, before: Any, cell: str) -> fdc.RecurrentDropout:
    candidate = fdc.Dropout(keep_prob=keep)
    return dataclasses.replace(linear_dropout(keep, before, cell), inside={"candidate": candidate})


def linear_zoneout(prob: Any, _: Any, cell: str) -> fdc.RecurrentDropout:
    return fdc.RecurrentDropout(inside={"hidden": fdc.Zoneout(prob=prob)})


def linear_weight_drop(keep: Any, before: Any, cell: str) -> fdc.RecurrentDropout:
    """DropConnect on the kernels: B and C of an LRU, those of a minGRU's gates."""
    noise = fdc.Dropout(keep_prob=keep, variational=True)
    kernels = ("input_kernel", "output_kernel") if cell == "lru" else ("input_kernel",)
    return dataclasses.replace(
        linear_dropout(keep, before, cell), params=fdc.at_paths(noise, *kernels)
    )


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("none", no_dropout, RATES, scales_rate=True),
        Scheme("Zaremba", zaremba, KEPT),
        Scheme("Gal, tied", gal, KEPT),
        Scheme("Gal, tied, Monte Carlo", gal, KEPT, monte_carlo=True),
        Scheme("Gal, untied", functools.partial(gal, tied=False), KEPT),
        Scheme("Semeniuta", semeniuta, KEPT),
        Scheme("zoneout", zoneout, ZONED_OUT),
        Scheme("weight-drop", weight_drop, KEPT),
        Scheme("weight noise", weight_noise, STDDEVS),
        Scheme("input and output", linear_dropout, KEPT),
        Scheme("candidate", linear_candidate, KEPT),
        Scheme("state zoneout", linear_zoneout, ZONED_OUT),
        Scheme("kernel weight-drop", linear_weight_drop, KEPT),
    )
}
COMPARED = {
    "lstm": (
        "none",
        "Zaremba",
        "Gal, tied",
        "Gal, tied, Monte Carlo",
        "Gal, untied",
        "Semeniuta",
        "zoneout",
        "weight-drop",
        "weight noise",
    ),
    "gru": ("none", "Zaremba", "Gal, tied", "zoneout", "weight-drop"),
}
# Cells that are linear in their state have sites, and so schemes, of their own.
LINEAR = ("none", "input and output", "candidate", "state zoneout", "kernel weight-drop")
COMPARED |= {"lru": LINEAR, "min_gru": LINEAR}
