"""Every mistake with a layer that can be seen is one clear error, in linen and in NNX."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import FRAMEWORKS, XS, Framework

import flax_dropout_cell as fdc

frameworks = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
NOISE = fdc.Dropout(keep_prob=0.5, variational=True)
SPEC = fdc.RecurrentDropout(input=NOISE)
KEY = jax.random.key(0)
RESETS = jnp.zeros((3, 6), bool)
CARRY = (jnp.zeros((3, 16)), jnp.zeros((3, 16)))

CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "resets, float": ({"resets": jnp.zeros((3, 6))}, TypeError, "must be bools, got float32"),
    "resets, int": ({"resets": jnp.zeros((3, 6), int)}, TypeError, "must be bools, got int32"),
    "resets, too short": (
        {"resets": RESETS[:, 1:]},
        ValueError,
        r"resets must be \[\*batch, time\], like the inputs, \(3, 6\), got shape \(3, 5\)",
    ),
    "resets, no time": ({"resets": RESETS[:, 0]}, ValueError, r"\(3, 6\), got shape \(3,\)"),
    "valid, int": ({"valid": jnp.zeros((3, 6), int)}, TypeError, "valid must be bools, got int32"),
    "valid, time first": (
        {"valid": RESETS.T},
        ValueError,
        r"valid must be \[\*batch, time\].*\(3, 6\), got shape \(6, 3\)",
    ),
    "valid, lengths": (
        {"valid": RESETS, "seq_lengths": jnp.ones(3, int)},
        ValueError,
        "give seq_lengths or valid, not both",
    ),
    "lengths, too long": ({"seq_lengths": [6, 7, 1]}, ValueError, "must be from 0 to 6"),
    "inputs, other batch": (
        {"x": (XS, XS[:2])},
        ValueError,
        r"the same 2 axes, batch and time, got \(float32\[3, 6, 4\], float32\[2, 6, 4\]\)",
    ),
    "ids, float": ({"sequence_ids": jnp.zeros(3)}, TypeError, "must be ints, got float32"),
    "ids, bool": ({"sequence_ids": jnp.zeros(3, bool)}, TypeError, "must be ints, got bool"),
    "ids, scalar": (
        {"sequence_ids": 3},
        ValueError,
        r"without resets must be \[\*batch\].*\(3,\), got shape \(\)",
    ),
    "ids with time, no resets": (
        {"sequence_ids": jnp.zeros((3, 6), int)},
        ValueError,
        r"sequence_ids without resets must be \[\*batch\], like .*, \(3,\), got shape \(3, 6\)",
    ),
    "ids without time, resets": (
        {"sequence_ids": jnp.zeros(3, int), "resets": RESETS},
        ValueError,
        r"sequence_ids with resets must be \[\*batch, time\].*\(3, 6\), got shape \(3,\)",
    ),
    "lengths, float": ({"seq_lengths": jnp.ones(3)}, TypeError, "must be ints, got float32"),
    "lengths, a mask": ({"seq_lengths": ~RESETS}, TypeError, "seq_lengths must be ints, got bool"),
    "lengths, other batch": (
        {"seq_lengths": jnp.ones(4, int)},
        ValueError,
        r"seq_lengths must have the batch dims of the inputs, \(3,\), got shape \(4,\)",
    ),
    "one example at one step": (
        {"x": XS[0, 0]},
        ValueError,
        r"the inputs must be \[\*batch, time, features\], got shape \(4,\)",
    ),
    "carry, other batch": (
        {"initial_carry": (jnp.zeros((2, 16)), jnp.zeros((2, 16)))},
        ValueError,
        r"initial_carry is \(float32\[2, 16\], float32\[2, 16\]\), but for inputs of shape "
        r"\(3, 6, 4\) the cell's carry is \(float32\[3, 16\], float32\[3, 16\]\)",
    ),
    "carry, one row": (
        {"initial_carry": (jnp.zeros((1, 16)), jnp.zeros((1, 16)))},
        ValueError,
        r"initial_carry is \(float32\[1, 16\]",
    ),
    "carry, other size": (
        {"initial_carry": (jnp.zeros((3, 8)), jnp.zeros((3, 8)))},
        ValueError,
        r"initial_carry is \(float32\[3, 8\]",
    ),
    "carry, h alone": (
        {"initial_carry": CARRY[0]},
        ValueError,
        r"initial_carry is float32\[3, 16\]",
    ),
    "carry, a list": (
        {"initial_carry": [CARRY[0], CARRY[0]], "resets": RESETS},
        ValueError,
        r"initial_carry is \[float32\[3, 16\], float32\[3, 16\]\]",
    ),
    "carry, other batch, lengths": (
        {
            "initial_carry": (jnp.zeros((2, 16)), jnp.zeros((2, 16))),
            "seq_lengths": jnp.ones(3, int),
        },
        ValueError,
        r"initial_carry is \(float32\[2, 16\]",
    ),
    "a wrapper's carry": (
        {"initial_carry": fdc.linen.DropoutCell(nn.LSTMCell(16), SPEC)},
        TypeError,
        r"initial_carry is a DropoutCarry.*give initial_carry=carry.cell_carry",
    ),
    "rng, a seed": (
        {"key": 0},
        TypeError,
        r"one key(, such as jax.random.key\(0\),)? or None, got 0\.",
    ),
    "rng, floats": ({"key": jnp.ones(2)}, TypeError, r"one key.*, got float32\[2\]"),
    "rng, many keys": ({"key": jax.random.split(KEY, 3)}, TypeError, r"one key.*key<fry>\[3\]"),
    "rng, a name": ({"key": "dropout"}, TypeError, "one key.*, got 'dropout'"),
    "no stream": (
        {"key": None},
        ValueError,
        r"RNN needs a 'dropout' stream in training: .* at the call, or evaluate with",
    ),
    "start, float": ({"start": 0.5}, TypeError, "start must be an int, got 0.5"),
    "start, negative": ({"start": -1}, ValueError, "start must be at least 0.*got -1"),
}


@frameworks
@pytest.mark.parametrize("case", CALLS)
def test_calls(framework: Framework, case: str) -> None:
    given, error, text = CALLS[case]
    given = {"x": XS, "key": KEY} | given
    if isinstance(cell := given.get("initial_carry"), nn.Module):
        given["initial_carry"] = cell.initialize_carry(KEY, (3, 4))
    layer = framework.layer(framework.lstm(), SPEC, XS)
    with pytest.raises(error, match=text) as raised:
        layer.run(given.pop("x"), given.pop("key"), **given)
    assert str(raised.value).count("\n") < 5


@frameworks
@pytest.mark.parametrize("shape", [(2, 16), (3, 8), (1, 16)])
def test_a_stock_cells_carry(framework: Framework, shape: tuple[int, int]) -> None:
    """Of another batch or size, or one that broadcasts: with weights, and in `init`."""
    layer = framework.layer(framework.gru(), SPEC, XS)
    text = rf"initial_carry is float32\[{shape[0]}, {shape[1]}\], but .* is float32\[3, 16\]"
    with pytest.raises(ValueError, match=text):
        layer.run(XS, KEY, initial_carry=jnp.zeros(shape))
    # In `init` a linen GRU is as large as its carry.
    if framework.rnn is fdc.linen.RNN and shape[1] == 16:
        rnn = fdc.linen.RNN(framework.gru(), SPEC)
        with pytest.raises(ValueError, match=text):
            rnn.init(KEY, XS, initial_carry=jnp.zeros(shape))


@frameworks
def test_carries_that_work_are_taken(framework: Framework) -> None:
    """Of another structure than the cell's own first one; and its other mistakes stay its own."""
    layer = framework.layer(framework.lstm(), SPEC, XS)
    ys = layer.run(XS, KEY, initial_carry=fdc.LSTMState(*CARRY))
    assert (ys == layer.run(XS, KEY)).all()
    with pytest.raises(ValueError, match=r"dropout\.input has the structure"):
        wrong = fdc.RecurrentDropout(input=(NOISE, NOISE))
        framework.layer(framework.lstm(), wrong, XS).run(XS, KEY, initial_carry=CARRY)


def wrapped(framework: Framework) -> Any:
    wrapper = fdc.linen.DropoutCell if framework.rnn is fdc.linen.RNN else fdc.nnx.DropoutCell
    return wrapper(framework.lstm(), SPEC)  # type: ignore[arg-type]


BUILDS: dict[str, tuple[Callable[[Framework], Any], str]] = {
    "dropout left out": (lambda made: made.rnn(made.lstm()), "argument: 'dropout'"),
    "a number": (lambda made: made.rnn(made.lstm(), 0.2), "must be a RecurrentDropout.*0.2"),
    "a noise": (lambda made: made.rnn(made.lstm(), NOISE), r"must be a RecurrentDropout"),
    "a wrapper inside": (
        lambda made: made.rnn(wrapped(made), SPEC),
        r"RNN takes a cell without a wrapper, got a DropoutCell.*Write RNN\(cell, dropout\)",
    ),
    "a layer in a layer": (
        lambda made: made.rnn(made.rnn(made.lstm(), SPEC), SPEC),
        "is not an RNNCell of flax",
    ),
}


@frameworks
@pytest.mark.parametrize("case", BUILDS)
def test_builds(framework: Framework, case: str) -> None:
    build, text = BUILDS[case]
    with pytest.raises(TypeError, match=text) as raised:
        build(framework)
    assert str(raised.value).count("\n") < 5


def test_a_missing_stream_where_linen_would_fall_back_to_params() -> None:
    layer = fdc.linen.RNN(fdc.linen.LSTMCell(16), SPEC)
    variables = layer.init(KEY, XS)
    with pytest.raises(ValueError, match="needs a 'dropout' stream"):
        layer.apply(variables, XS, rngs={"params": KEY})


@pytest.mark.parametrize("own", [None, 0], ids=["no stream", "a stream"])
def test_an_rngs_without_dropout_is_refused_whatever_stream_the_layer_has(own: Any) -> None:
    rngs = None if own is None else nnx.Rngs(dropout=own)
    layer: Any = fdc.nnx.RNN(fdc.nnx.LSTMCell(4, 16, rngs=nnx.Rngs(0)), SPEC, rngs=rngs)
    with pytest.raises(ValueError, match="needs a 'dropout' stream"):
        layer(XS, rngs=nnx.Rngs(params=0))


@frameworks
def test_an_initial_carry_is_not_blamed_for_another_mistake(framework: Framework) -> None:
    """An `LSTMState` for a plain pair works, so the mistake is another one."""
    layer = framework.layer(framework.lstm(), SPEC, XS)
    with pytest.raises(ValueError, match="start must be at least 0"):
        layer.run(XS, KEY, initial_carry=fdc.LSTMState(*CARRY), start=-1)


class Given(nn.RNNCellBase):
    """A linen cell whose state always comes from elsewhere."""

    @nn.compact
    def __call__(self, carry: Any, x: Any) -> Any:
        h = jnp.tanh(x + carry)
        return h, h

    def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
        raise NotImplementedError("an encoder gives it")

    @property
    def num_feature_axes(self) -> int:
        return 1


def test_a_cell_without_an_initial_carry_keeps_the_users_error() -> None:
    rnn, h = fdc.linen.RNN(Given(), SPEC), jnp.zeros((3, 4))
    assert rnn.apply({}, XS, initial_carry=h, rng=KEY).shape == XS.shape  # type: ignore
    with pytest.raises(ValueError, match="start must be at least 0"):
        rnn.apply({}, XS, initial_carry=h, rng=KEY, start=-1)


def test_outputs_that_rows_share_are_turned_round() -> None:
    """With lengths too, of which such an output has no padding."""

    class Counter(Given):
        @nn.compact
        def __call__(self, carry: Any, x: Any) -> Any:
            h, count = carry
            return (h + x, count + 1), (h, count)

    carry = (jnp.zeros((3, 4)), jnp.zeros(()))
    rnn = fdc.linen.RNN(Counter(), fdc.RecurrentDropout(), time_major=True, reverse=True)
    lengths = jnp.array([6, 2, 0])
    _, count = rnn.apply({}, XS.swapaxes(0, 1), initial_carry=carry, seq_lengths=lengths)  # type: ignore
    np.testing.assert_array_equal(count, np.arange(6))


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_a_wrappers_carry_as_reset_carry(framework: str) -> None:
    spec = fdc.RecurrentDropout()
    carry = fdc.linen.DropoutCell(nn.GRUCell(4), spec).initialize_carry(KEY, (2, 3))
    x, resets = jnp.ones((2, 5, 3)), jnp.zeros((2, 5), bool)
    if framework == "linen":
        layer: Any = fdc.linen.RNN(nn.GRUCell(4), spec)
        call: Any = lambda **given: layer.init(KEY, x, **given)  # noqa: E731
    else:
        call = lambda **given: fdc.nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), spec)(x, **given)  # noqa: E731
    with pytest.raises(TypeError, match=r"reset_carry is a DropoutCarry.*carry\.cell_carry"):
        call(resets=resets, reset_carry=carry)


@pytest.mark.parametrize("transform", [nn.remat, nn.jit])
@pytest.mark.parametrize("wraps", [fdc.linen.RNN, fdc.linen.DropoutCell])
def test_sites_under_a_transformation_of_linen(transform: Any, wraps: Any) -> None:
    """It takes arrays alone, and no `disturb`; noise around the cell needs none."""
    x, cell = jnp.ones((2, 5, 3)), transform(fdc.linen.LSTMCell)(8)

    def run(spec: fdc.RecurrentDropout) -> Any:
        layer = wraps(cell, spec)
        layer = nn.RNN(layer) if wraps is fdc.linen.DropoutCell else layer
        return layer.init_with_output({"params": KEY, "dropout": KEY}, x)

    inside = fdc.RecurrentDropout(inside={"recurrent": NOISE})
    with pytest.raises(TypeError, match=r"under a transformation such as .*checkpoint_every"):
        run(inside)
    if transform is nn.remat:
        assert run(fdc.RecurrentDropout(input=NOISE))[0].shape == (2, 5, 8)


@pytest.mark.parametrize("rngs", [KEY, {"params": KEY}], ids=["a key", "params"])
def test_the_params_stream_draws_no_masks(rngs: Any) -> None:
    """Flax's own Dropout falls back to it, without a word."""
    layer = fdc.linen.RNN(nn.GRUCell(8), SPEC)
    variables = layer.init(KEY, XS)
    told = r"rngs={'dropout': key}.*Masks are never drawn from the 'params' stream"
    with pytest.raises(ValueError, match=told):
        layer.apply(variables, XS, rngs=rngs)
    with pytest.raises(ValueError) as caught:
        layer.apply(variables, XS)
    assert "params" not in str(caught.value)
