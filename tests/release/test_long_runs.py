"""A snippet that explodes within 1,000 steps is caught, whichever way it runs its steps."""

import re
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from example_runs import EXAMPLES, SMALL, load_example, write_corpus
from flax import nnx
from long_runs import BOUND, STEPS, watched

import flax_dropout_cell as fdc

XS = jnp.ones((2, 3, 4))
LOUD = fdc.RecurrentDropout(state=fdc.Dropout(keep_prob=0.5, variational=True))
RNG = jax.random.key(0)


def remember(params: Any, h: jax.Array, x: jax.Array) -> Any:
    """A leaky sum that nothing tells apart from any other cell."""
    h = 0.99 * h + 0.01 * x
    return h, h


class LinenCell(nn.RNNCellBase):
    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        return remember(None, carry, inputs)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: Any) -> Any:
        return jnp.ones(input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


class NnxCell(nnx.RNNCellBase):
    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        return remember(None, carry, inputs)

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.ones(input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


def scan(dropout: fdc.RecurrentDropout) -> Any:
    return fdc.dropout_scan(None, XS[0], XS, RNG, cell=remember, dropout=dropout)


def step(dropout: fdc.RecurrentDropout) -> Any:
    args: Any = (None, XS[0], XS[0], RNG)
    masks = fdc.draw_masks(*args, cell=remember, dropout=dropout)
    return fdc.dropout_cell(*args, step=0, cell=remember, dropout=dropout, masks=masks)


def train(dropout: fdc.RecurrentDropout) -> Any:
    return jax.jit(jax.grad(lambda h: fdc.dropout_scan(
        None, h, XS, RNG, cell=remember, dropout=dropout)[1].sum()))(XS[0])  # fmt: skip


def in_linen(dropout: fdc.RecurrentDropout) -> Any:
    rnn = nn.RNN(fdc.linen.DropoutCell(LinenCell(), dropout))
    return rnn.apply({}, XS, rngs={"dropout": RNG})


def in_nnx(dropout: fdc.RecurrentDropout) -> Any:
    rnn: Any = nnx.RNN(fdc.nnx.DropoutCell(NnxCell(), dropout, rngs=nnx.Rngs(0)))
    return rnn(XS)


def in_layers(dropout: fdc.RecurrentDropout) -> Any:
    return fdc.linen.RNN(LinenCell(), dropout).apply({}, XS, rng=RNG)


@pytest.mark.parametrize("snippet", [scan, step, train, in_linen, in_nnx, in_layers])
def test_what_explodes_is_seen(snippet: Any) -> None:
    with pytest.raises(AssertionError, match="1000 steps reach"), watched() as largest:
        snippet(LOUD)
    assert max(largest) > BOUND
    with watched() as largest:
        snippet(fdc.RecurrentDropout(state=fdc.Dropout(keep_prob=0.5, scale=False)))
    assert largest
    with watched() as largest:
        jax.lax.scan(lambda h, x: (2 * h, x), 1.0, XS)
    assert not largest  # no step of ours


def test_a_scan_over_sequences_has_no_steps_of_its_own() -> None:
    dropout = fdc.RecurrentDropout(state=fdc.Dropout(keep_prob=0.5, scale=False))

    def run_sequence(h: jax.Array, x: jax.Array) -> Any:
        return fdc.dropout_scan(None, h, XS, RNG, cell=remember, dropout=dropout)

    with watched() as largest:
        jax.lax.scan(run_sequence, XS[0], XS)
    assert 0 < len(largest) < STEPS  # not a thousand sequences of a thousand steps


LONG_WINDOWS = "--batch-size 4 --window 30".split()
PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "data_parallel": ("--steps 1 --batch-size 2 --hidden-size 4", {}),
    "disrnn": ("--steps 1 --sessions 2 --trials 6", {}),
    "functional_scan": ("", {"EPOCHS": 1}),
    # A few windows, for each of them runs on for a thousand steps.
    "language_model": (" ".join([*SMALL, "--epochs 1 --scheme variational", *LONG_WINDOWS]), {}),
    "recurrent_ppo": (
        "--mazes 4 --units 4 --steps 2 --iterations 1 --epochs 1",
        {"MODELS": ("memory, dropout",)},
    ),
    "uncertainty": ("--steps 1 --units 4 --samples 2", {}),
}
"""Programs with their shortest arguments, and with constants to shorten those that take none."""


def test_all_programs_are_here() -> None:
    texts = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    programs = {name for name, text in texts.items() if "__main__" in text}
    says_so = "RecurrentDropout|recipes|build_dropouts"
    drop = {name for name in programs if re.search(says_so, texts[name])}
    assert drop == PROGRAMS.keys()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_stays_bounded(name: str, monkeypatch: Any, tmp_path: Any) -> None:
    arguments, constants = PROGRAMS[name]
    program = load_example(EXAMPLES / f"{name}.py")
    for constant, value in constants.items():
        monkeypatch.setattr(program, constant, value)
    if "--out" in (EXAMPLES / f"{name}.py").read_text():
        arguments += f" --out {tmp_path / 'out'}"
    if name == "language_model":
        arguments += f" --data {write_corpus(tmp_path / 'corpus')}"
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    standard = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with standard[0], standard[1], watched() as largest:
        assert not program.main()
    assert largest
