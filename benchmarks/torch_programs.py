"""PyTorch: `nn.LSTM` without dropout, and a loop over `nn.LSTMCell` with masks."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from program import KEEP_PROBS, Compiled, Config, Programs


def versions() -> dict[str, str]:
    return {"torch": torch.__version__}


def make_timed(module: torch.nn.Module, run: Callable[[], torch.Tensor]) -> Compiled:
    """Eager code: nothing is compiled, and no one counts its temporary memory."""
    params = list(module.parameters())

    def forward() -> Any:
        with torch.no_grad():
            return run()

    return Compiled(forward, lambda: torch.autograd.grad((run() ** 2).mean(), params))


def make_inputs(config: Config) -> torch.Tensor:
    return torch.randn(config.time, config.batch, config.features)


def make_bare(config: Config) -> Compiled:
    lstm, xs = torch.nn.LSTM(config.features, config.features), make_inputs(config)
    return make_timed(lstm, lambda: lstm(xs)[0])


def make_loop(mode: str, config: Config) -> Compiled:
    cell, xs = torch.nn.LSTMCell(config.features, config.features), make_inputs(config)
    keep_prob, shape = KEEP_PROBS[0], (config.batch, config.features)

    def draw_masks() -> list[torch.Tensor]:
        return [torch.empty(shape).bernoulli_(keep_prob) / keep_prob for _ in range(3)]

    def run() -> torch.Tensor:
        c, h, ys = torch.zeros(shape), torch.zeros(shape), []
        masks = draw_masks()
        for x in xs:
            if mode == "per step":
                masks = draw_masks()
            h, c = cell(x * masks[0], (h, c))
            ys.append(h * masks[2])
            h = h * masks[1]
        return torch.stack(ys)

    return make_timed(cell, run)


PROGRAMS: Programs = {
    "PyTorch nn.LSTM: bare": make_bare,
    "PyTorch loop: variational": functools.partial(make_loop, "variational"),
    f"PyTorch loop: per step, {KEEP_PROBS[0]}": functools.partial(make_loop, "per step"),
}
