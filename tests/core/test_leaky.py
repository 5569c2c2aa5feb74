"""Noise that would explode is an error at every entry, and other noise stays bounded."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc

RNG = jax.random.key(2)
B, D, H = 2, 3, 8
XS = jax.random.normal(jax.random.key(1), (1000, B, D))
NOISE = fdc.Dropout(keep_prob=0.8)
FROZEN = fdc.Dropout(keep_prob=0.8, variational=True)
LSTM = nn.OptimizedLSTMCell(H)
GRUS = {"nn.GRUCell": nn.GRUCell(H), "nn.MGUCell": nn.MGUCell(H)}
WAYS_OUT = {  # no cell of this library is an MGU with sites inside
    "nn.GRUCell": r"a GRU's h.*explode.*'recurrent': noise.*gru_cell.*scale=Fal",
    "nn.MGUCell": r"an MGU's h, which .* the values would explode. Use Dropout",
}


def variables_of(cell):
    carry = cell.initialize_carry(jax.random.key(0), (B, D))
    return cell.init(jax.random.key(3), carry, XS[0]), carry


def run(cell, carry, variables, dropout, entry=fdc.dropout_scan, xs=XS):
    return entry(variables, carry, xs, RNG, cell=cell, dropout=dropout)


def entries(cell, carry, variables, dropout):
    """The entries of the core."""
    yield lambda: run(cell, carry, variables, dropout)
    yield lambda: run(cell, carry, variables, dropout, fdc.dropout_cell, XS[0])
    yield lambda: run(cell, carry, variables, dropout, fdc.draw_masks, XS[0])
    draw = functools.partial(fdc.draw_step_masks, num_steps=3)
    yield lambda: run(cell, carry, variables, dropout, draw, XS[0])


@pytest.mark.parametrize("noise", [NOISE, FROZEN, fdc.Dropout(keep_prob=0.8, scale=False)])
def test_one_noise_for_several_leaves_is_refused(noise) -> None:
    variables, carry = variables_of(LSTM)
    spec = fdc.RecurrentDropout(state=noise)
    for entry in entries(LSTM.apply, carry, variables, spec):
        with pytest.raises(ValueError, match=r"Say which leaves .* state=\(None, noise\)"):
            entry()


@pytest.mark.parametrize("noise", [NOISE, FROZEN], ids=["step", "variational"])
def test_one_noise_for_an_lstm_state_means_h(noise) -> None:
    variables, (c, h) = variables_of(LSTM)

    def cell(params, carry, x):
        (c, h), y = LSTM.apply(params, tuple(carry), x)  # type: ignore
        return fdc.LSTMState(c, h), y

    one, named = (
        run(cell, fdc.LSTMState(c, h), variables, fdc.RecurrentDropout(state=state))
        for state in (noise, fdc.LSTMState(None, noise))
    )
    jax.tree.map(np.testing.assert_array_equal, one, named)
    assert isinstance(one[0], fdc.LSTMState)
    assert jnp.abs(one[0].c).max() < 10
    assert (one[0].h == 0).any()


def equinox_like(params, carry, x):
    """Carries `(h, c)`, as Equinox's LSTM does."""
    h, c = carry
    c = c + params * x
    return (jnp.tanh(c), c), h


@pytest.mark.parametrize("noise", [NOISE, FROZEN], ids=["step", "variational"])
def test_c_and_h_by_name_on_a_pair_of_unknown_order_are_refused(noise) -> None:
    spec = fdc.RecurrentDropout(state=fdc.LSTMState(c=None, h=noise))
    for entry in entries(equinox_like, (XS[0], XS[0]), jnp.ones(D), spec):
        with pytest.raises(ValueError, match=r"Equinox carries \(h, c\).*state=\(noise, None\)"):
            entry()
    variables, carry = variables_of(LSTM)
    assert jnp.isfinite(run(LSTM.apply, carry, variables, spec)[1]).all()  # a Flax LSTM's (c, h)


class Attention(NamedTuple):
    cell_state: Any
    time: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Memory:
    c: Any
    h: Any


@pytest.mark.parametrize(
    ("carry", "written", "line"),
    [
        (
            Attention((XS[0], XS[0]), XS[0]),
            "Attention(cell_state=(*, *), time=*)",
            "state=Attention(cell_state=(None, noise), time=None)",
        ),
        (Memory(XS[0], XS[0]), "Memory(c=*, h=*)", "state=Memory(c=None, h=noise)"),
        ({"a": XS[0], "b": XS[0]}, "{'a': *, 'b': *}", "state={'a': None, 'b': noise}"),
        ([XS[0]] * 3, "[*, *, *]", "state=[None, noise, None]"),
    ],
    ids=["named tuple", "dataclass", "dict", "list"],
)
def test_the_error_for_one_noise_shows_the_carry_and_the_line_to_write(carry, written, line):
    def cell(params, carry, x):
        return carry, x

    with pytest.raises(ValueError) as error:
        run(cell, carry, None, fdc.RecurrentDropout(state=NOISE))
    assert written in str(error.value)
    assert line in str(error.value)
    state = eval(line.removeprefix("state="), {**globals(), "noise": NOISE})
    run(cell, carry, None, fdc.RecurrentDropout(state=state))


@pytest.mark.parametrize("name", GRUS)
@pytest.mark.parametrize("noise", [NOISE, FROZEN], ids=["step", "variational"])
def test_a_scaling_noise_on_the_h_of_a_gru_is_refused(name, noise) -> None:
    variables, carry = variables_of(GRUS[name])
    apply = GRUS[name].apply
    cells = (apply, functools.partial(apply, mutable=False), jax.jit(apply))
    for cell in cells:
        for site in ({"state": noise}, {"inside": {"hidden": noise}}):
            for entry in entries(cell, carry, variables, fdc.RecurrentDropout(**site)):
                with pytest.raises(ValueError, match=WAYS_OUT[name]):
                    entry()


@pytest.mark.parametrize("name", GRUS)
def test_what_does_not_scale_is_welcome_and_stays_bounded(name) -> None:
    variables, carry = variables_of(GRUS[name])
    noise = fdc.Dropout(keep_prob=0.8, scale=False)
    h, ys = run(GRUS[name].apply, carry, variables, fdc.RecurrentDropout(state=noise))
    assert jnp.abs(ys).max() <= 1
    assert (h == 0).any()
    run(GRUS[name].apply, carry, variables, fdc.RecurrentDropout(state=fdc.Dropout(keep_prob=1)))


@pytest.mark.parametrize("noise", [NOISE, FROZEN], ids=["step", "variational"])
def test_a_scaling_noise_on_a_memory_is_refused(noise) -> None:
    def cell(params, c, x, *, disturb=fdc.undisturbed):
        return disturb("memory", c + x), x

    spec = fdc.RecurrentDropout(inside={"memory": noise})
    for entry in entries(cell, XS[0], None, spec):
        with pytest.raises(ValueError, match=r"inside\['memory'\]: Dropout .* would explode"):
            entry()


def test_what_would_have_happened() -> None:
    """The numbers that these errors are for: a kept unit of a leaky path grows without bound."""
    variables, carry = variables_of(GRUS["nn.GRUCell"])

    def hidden(params, h, x):
        return GRUS["nn.GRUCell"].apply(params, h, x)

    keeps = jax.tree.map(jnp.zeros_like, variables)
    keeps["params"]["iz"]["bias"] += 5.0  # a unit that remembers: z is 0.993
    h, _ = run(hidden, carry + 1, keeps, fdc.RecurrentDropout(state=FROZEN), xs=XS[:100])
    assert jnp.abs(h).max() > 1e6


def test_names_of_c_and_h_for_a_pair_of_a_users_own_cell() -> None:
    """Whether it carries (c, h) or (h, c) is not known, in a layer either."""

    class Reversed(nn.RNNCellBase):
        def __call__(self, carry, inputs):
            h, c = carry
            return (h, c + inputs), h

        def initialize_carry(self, rng, input_shape):
            return jnp.zeros(input_shape), jnp.zeros(input_shape)

        @property
        def num_feature_axes(self) -> int:
            return 1

    spec = fdc.RecurrentDropout(state=fdc.LSTMState(None, NOISE))
    xs = jnp.ones((2, 3, 4))
    for layer in (fdc.linen.RNN(Reversed(), spec), nn.RNN(fdc.linen.DropoutCell(Reversed(), spec))):
        with pytest.raises(ValueError, match="plain pair of unknown order"):
            layer.apply({}, xs, rngs={"dropout": RNG})
