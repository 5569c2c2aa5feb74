"""A noise at every site of an LSTM."""

from typing import Any

import flax_dropout_cell as fdc


def noise_everywhere(noise: fdc.Noise | None, **others: Any) -> fdc.RecurrentDropout:
    """The noise on the parameters, the input, h and the output; `others` says what has another."""
    sites = {"params": noise, "input": noise, "state": (None, noise), "output": noise}
    return fdc.RecurrentDropout(**sites | others)
