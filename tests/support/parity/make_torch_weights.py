"""Stores PyTorch's cells and their outputs for `tests/cells/test_weights_from_elsewhere.py`.

Needs `pip install torch`; run it by hand, never in CI:

    python tests/support/parity/make_torch_weights.py
"""
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false

from pathlib import Path

import numpy as np

if __name__ == "__main__":  # Not where pytest imports every file to look for doctests.
    import torch

STEPS, BATCH, FEATURES, UNITS = 5, 2, 3, 4
NAMES = ("w_ih", "w_hh", "b_ih", "b_hh")


def store(name: str, cell: "torch.nn.Module") -> None:
    """A cell's weights, a sequence from a state of zeros, and its inputs' gradient."""
    xs = torch.randn(STEPS, BATCH, FEATURES, requires_grad=True)
    state, ys = None, []
    for x in xs:
        state = cell(x, state)
        ys.append(state[0] if isinstance(state, tuple) else state)
    ys = torch.stack(ys)
    (gradient,) = torch.autograd.grad((ys**2).sum(), xs)
    arrays = dict(zip(NAMES, cell.parameters(), strict=True))
    arrays |= {"xs": xs, "ys": ys, "gradient": gradient}
    path = Path(__file__).with_name(f"weights_torch_{name}.npz")
    np.savez_compressed(path, **{key: value.detach().numpy() for key, value in arrays.items()})


if __name__ == "__main__":
    torch.manual_seed(0)
    store("lstm", torch.nn.LSTMCell(FEATURES, UNITS))
    store("gru", torch.nn.GRUCell(FEATURES, UNITS))
