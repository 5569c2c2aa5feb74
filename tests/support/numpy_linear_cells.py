"""The linear cells in NumPy, written from their papers, in float64.

`sites` maps a site's name to a function `(value, previous) -> value`, as in `numpy_cells`.
"""

from typing import Any

import numpy as np
from numpy_cells import DisturbFn, at, sigmoid


def in_float64(params: Any) -> Any:
    return type(params)(*(np.asarray(leaf, np.float64) for leaf in params))


def gates_of(params: Any, x: np.ndarray, gates: int) -> list[np.ndarray]:
    return np.split(x @ params.input_kernel + params.bias, gates, -1)


def lru(params: Any, h: np.ndarray, x: np.ndarray, sites: DisturbFn) -> tuple[Any, np.ndarray]:
    """Orvieto et al. 2023, equations 1 and 7."""
    params = in_float64(params)
    units = params.nu_log.size
    b = params.input_kernel[:, :units] + 1j * params.input_kernel[:, units:]
    c = params.output_kernel[:units] - 1j * params.output_kernel[units:]
    eigenvalues = np.exp(-np.exp(params.nu_log) + 1j * np.exp(params.theta_log))
    candidate = at(sites, "candidate", x @ b)
    new = at(sites, "hidden", eigenvalues * h + np.exp(params.gamma_log) * candidate, h)
    return new, (new @ c).real + x @ params.skip_kernel


def min_gru(params: Any, h: np.ndarray, x: np.ndarray, sites: DisturbFn) -> tuple[Any, np.ndarray]:
    """Feng et al. 2024, section 3.1."""
    z, n = gates_of(in_float64(params), x, 2)
    n = at(sites, "candidate", n)
    new = at(sites, "hidden", (1 - sigmoid(z)) * h + sigmoid(z) * n, h)
    return new, new


def min_lstm(params: Any, h: np.ndarray, x: np.ndarray, sites: DisturbFn) -> tuple[Any, np.ndarray]:
    """Feng et al. 2024, section 3.2, with normalised gates."""
    f, i, n = gates_of(in_float64(params), x, 3)
    f, i = sigmoid(f), sigmoid(i)
    n = at(sites, "candidate", n)
    new = at(sites, "hidden", f / (f + i) * h + i / (f + i) * n, h)
    return new, new


def rg_lru(params: Any, h: np.ndarray, x: np.ndarray, sites: DisturbFn) -> tuple[Any, np.ndarray]:
    """De et al. 2024, equations 1 to 4, on `x W_n + b_n`."""
    params = in_float64(params)
    r, i, n = gates_of(params, x, 3)
    decay = sigmoid(params.decay_logit) ** (8 * sigmoid(r))
    candidate = at(sites, "candidate", sigmoid(i) * n)
    new = at(sites, "hidden", decay * h + np.sqrt(1 - decay**2) * candidate, h)
    return new, new
