"""The LSTM and the GRU in NumPy, written from the equations, with a mask at every site.

`sites` maps a site's name to a function `(value, previous) -> value`. Nothing here is the
library's: a test injects its masks into both.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

DisturbFn = Mapping[str, Callable[[np.ndarray, Any], np.ndarray]]


def sigmoid(value: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-value))


def at(sites: DisturbFn, name: str, value: np.ndarray, previous: Any = None) -> np.ndarray:
    return sites[name](value, previous) if name in sites else value


def per_gate(sites: DisturbFn, name: str, value: np.ndarray, gates: int) -> list[np.ndarray]:
    copies = np.stack([value] * gates, axis=-2)
    return [at(sites, name, copies)[..., gate, :] for gate in range(gates)]


def lstm(params: Any, carry: Any, x: np.ndarray, sites: DisturbFn) -> tuple[Any, np.ndarray]:
    c, h = carry
    w, u = (np.split(np.asarray(kernel), 4, -1) for kernel in params[:2])
    b = np.split(np.asarray(params.bias), 4)
    xs = per_gate(sites, "input_per_gate", x, 4)
    hs = per_gate(sites, "recurrent_per_gate", at(sites, "recurrent", h), 4)
    i, f, g, o = (xs[k] @ w[k] + hs[k] @ u[k] + b[k] for k in range(4))
    candidate = at(sites, "candidate", np.tanh(g))
    new_c = at(sites, "memory", sigmoid(f) * c + sigmoid(i) * candidate, c)
    new_h = at(sites, "hidden", sigmoid(o) * np.tanh(new_c), h)
    return (new_c, new_h), new_h


def gru(params: Any, h: np.ndarray, x: np.ndarray, sites: DisturbFn) -> tuple[Any, np.ndarray]:
    w, u = (np.split(np.asarray(kernel), 3, -1) for kernel in params[:2])
    b = np.split(np.asarray(params.bias), 3)
    xs = per_gate(sites, "input_per_gate", x, 3)
    hs = per_gate(sites, "recurrent_per_gate", at(sites, "recurrent", h), 3)
    r = sigmoid(xs[0] @ w[0] + b[0] + hs[0] @ u[0])
    z = sigmoid(xs[1] @ w[1] + b[1] + hs[1] @ u[1])
    n = np.tanh(xs[2] @ w[2] + b[2] + r * (hs[2] @ u[2] + np.asarray(params.recurrent_bias)))
    n = at(sites, "candidate", n)
    new_h = at(sites, "hidden", (1 - z) * n + z * h, h)
    return new_h, new_h
