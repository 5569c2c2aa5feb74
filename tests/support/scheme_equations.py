"""Each published scheme's step in NumPy, written from its paper, with the masks given.

A step is `step(params, carry, x, masks) -> (carry, y)`, in which `masks` maps a site to its mask:
True where the NEW value passes. All of it is analytic and takes complex numbers, so that
derivatives come out exact to the last digit by a step in the imaginary direction.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy_cells import sigmoid

KEEP = 0.75
"""Every dropout's keep_prob here; 1 / KEEP is no power of two."""
ZONE_C, ZONE_H = 0.5, 0.25
STDDEV = 0.125

Masks = dict[str, Any]


def drop(mask: Any, value: Any) -> Any:
    """Inverted dropout."""
    return np.where(mask, value / KEEP, 0)


def split(value: Any, gates: int) -> list[Any]:
    return np.split(np.asarray(value), gates, -1)


def lstm_gates(p: Any, x: Any, h: Any) -> list[Any]:
    return split(x @ p.input_kernel + h @ p.recurrent_kernel + p.bias, 4)


def gru_gates(p: Any, xs: list[Any], hs: list[Any]) -> tuple[Any, Any]:
    """The update gate z and the candidate n, from each gate's view of x and h."""
    w, u, b = split(p.input_kernel, 3), split(p.recurrent_kernel, 3), split(p.bias, 3)
    r = sigmoid(xs[0] @ w[0] + b[0] + hs[0] @ u[0])
    z = sigmoid(xs[1] @ w[1] + b[1] + hs[1] @ u[1])
    return z, np.tanh(xs[2] @ w[2] + b[2] + r * (hs[2] @ u[2] + p.recurrent_bias))


def lstm_update(gates: list[Any], c: Any) -> tuple[Any, Any]:
    i, f, g, o = gates
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return (c, sigmoid(o) * np.tanh(c)), sigmoid(o) * np.tanh(c)


def bare_lstm(p: Any, carry: Any, x: Any, masks: Masks) -> Any:
    c, h = carry
    return lstm_update(lstm_gates(p, x, h), c)


def bare_gru(p: Any, h: Any, x: Any, masks: Masks) -> Any:
    z, n = gru_gates(p, [x] * 3, [h] * 3)
    h = (1 - z) * n + z * h
    return h, h


def zaremba(p: Any, carry: Any, x: Any, masks: Masks) -> Any:
    """Zaremba et al. 2014: D on each layer's input and on the input of the softmax."""
    c, h = carry
    carry, y = lstm_update(lstm_gates(p, drop(masks["input"], x), h), c)
    return carry, drop(masks["output"], y)


def gal_tied(p: Any, carry: Any, x: Any, masks: Masks) -> Any:
    """Gal and Ghahramani 2016, equation 7."""
    c, h = carry
    read_x, read_h = drop(masks["input"], x), drop(masks["recurrent"], h)
    carry, y = lstm_update(lstm_gates(p, read_x, read_h), c)
    return carry, drop(masks["output"], y)


def gal_untied(p: Any, carry: Any, x: Any, masks: Masks) -> Any:
    """Gal and Ghahramani 2016, equation 5: masks `[batch, gate, size]`, a loop over the gates."""
    c, h = carry
    w, u, b = split(p.input_kernel, 4), split(p.recurrent_kernel, 4), split(p.bias, 4)
    gates = [
        drop(masks["input_per_gate"][:, k], x) @ w[k]
        + drop(masks["recurrent_per_gate"][:, k], h) @ u[k]
        + b[k]
        for k in range(4)
    ]
    carry, y = lstm_update(gates, c)
    return carry, drop(masks["output"], y)


def gal_tied_gru(p: Any, h: Any, x: Any, masks: Masks) -> Any:
    z, n = gru_gates(p, [drop(masks["input"], x)] * 3, [drop(masks["recurrent"], h)] * 3)
    h = (1 - z) * n + z * h
    return h, drop(masks["output"], h)


def gal_untied_gru(p: Any, h: Any, x: Any, masks: Masks) -> Any:
    xs = [drop(masks["input_per_gate"][:, k], x) for k in range(3)]
    hs = [drop(masks["recurrent_per_gate"][:, k], h) for k in range(3)]
    z, n = gru_gates(p, xs, hs)
    h = (1 - z) * n + z * h
    return h, drop(masks["output"], h)


def semeniuta_lstm(p: Any, carry: Any, x: Any, masks: Masks) -> Any:
    """Semeniuta et al. 2016: c' = f c + i D(g)."""
    c, h = carry
    i, f, g, o = lstm_gates(p, drop(masks["input"], x), h)
    c = sigmoid(f) * c + sigmoid(i) * drop(masks["candidate"], np.tanh(g))
    h = sigmoid(o) * np.tanh(c)
    return (c, h), drop(masks["output"], h)


def semeniuta_gru(p: Any, h: Any, x: Any, masks: Masks) -> Any:
    """Semeniuta et al. 2016: h' = (1 - z) D(n) + z h, z and 1 - z named the other way there."""
    z, n = gru_gates(p, [drop(masks["input"], x)] * 3, [h] * 3)
    h = (1 - z) * drop(masks["candidate"], n) + z * h
    return h, drop(masks["output"], h)


def moon(p: Any, carry: Any, x: Any, masks: Masks) -> Any:
    """Moon et al. 2015, RNNDrop: c' = m (f c + i g), unscaled."""
    c, h = carry
    i, f, g, o = lstm_gates(p, x, h)
    c = np.where(masks["memory"], sigmoid(f) * c + sigmoid(i) * np.tanh(g), 0)
    h = sigmoid(o) * np.tanh(c)
    return (c, h), h


def moon_in_evaluation(p: Any, carry: Any, x: Any, masks: Masks) -> Any:
    """Evaluation scales, because training did not: c' = q (f c + i g)."""
    c, h = carry
    i, f, g, o = lstm_gates(p, x, h)
    c = KEEP * (sigmoid(f) * c + sigmoid(i) * np.tanh(g))
    h = sigmoid(o) * np.tanh(c)
    return (c, h), h


def krueger(p: Any, carry: Any, x: Any, masks: Masks) -> Any:
    """Krueger et al. 2016: the output gate reads the new c, whether it is zoned out or not."""
    c, h = carry
    (new_c, new_h), _ = lstm_update(lstm_gates(p, x, h), c)
    c, h = np.where(masks["c"], new_c, c), np.where(masks["hidden"], new_h, h)
    return (c, h), h


def krueger_in_evaluation(p: Any, carry: Any, x: Any, masks: Masks) -> Any:
    """The expectation: d_c c + (1 - d_c) c' for the memory, and likewise for h."""
    c, h = carry
    (new_c, new_h), _ = lstm_update(lstm_gates(p, x, h), c)
    c, h = ZONE_C * c + (1 - ZONE_C) * new_c, ZONE_H * h + (1 - ZONE_H) * new_h
    return (c, h), h


def zoned_gru(p: Any, h: Any, x: Any, masks: Masks) -> Any:
    new_h, _ = bare_gru(p, h, x, {})
    h = np.where(masks["hidden"], new_h, h)
    return h, h


def zoned_gru_in_evaluation(p: Any, h: Any, x: Any, masks: Masks) -> Any:
    new_h, _ = bare_gru(p, h, x, {})
    h = ZONE_H * h + (1 - ZONE_H) * new_h
    return h, h


def wan(p: Any, carry: Any, x: Any, masks: Masks) -> Any:
    """Wan et al. 2013: DropConnect, on both kernels."""
    kernels = {
        name: drop(getattr(masks["params"], name), getattr(p, name))
        for name in ("input_kernel", "recurrent_kernel")
    }
    return bare_lstm(p._replace(**kernels), carry, x, {})


def merity(p: Any, carry: Any, x: Any, masks: Masks) -> Any:
    """Merity et al. 2017: DropConnect on U, and locked dropout on the input."""
    c, h = carry
    p = p._replace(recurrent_kernel=drop(masks["params"].recurrent_kernel, p.recurrent_kernel))
    return lstm_update(lstm_gates(p, drop(masks["input"], x), h), c)


def graves(p: Any, carry: Any, x: Any, masks: Masks) -> Any:
    """Graves 2013 and Jim et al. 1996: Gaussian noise added to all weights."""
    noisy = [weight + STDDEV * noise for weight, noise in zip(p, masks["params"], strict=True)]
    return bare_lstm(type(p)(*noisy), carry, x, {})


def loop(
    step: Callable[..., Any], params: Any, carry: Any, xs: Any, masks: list[Masks], lengths: Any
) -> tuple[Any, Any]:
    """A whole sequence. Past a row's length its carry stands still and its outputs are zero."""
    ys = []
    for t, (x, mask) in enumerate(zip(xs, masks, strict=True)):
        new, y = step(params, carry, x, mask)
        valid = (t < np.asarray(lengths))[:, None]
        stay = [np.where(valid, a, b) for a, b in zip(as_tuple(new), as_tuple(carry), strict=True)]
        carry = tuple(stay) if isinstance(carry, tuple) else stay[0]
        ys.append(np.where(valid, y, 0))
    return carry, np.stack(ys)


def as_tuple(carry: Any) -> tuple[Any, ...]:
    return tuple(carry) if isinstance(carry, tuple) else (carry,)
