"""Noises on weights by name: resolved on the weights of each framework's cells."""

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import keystr, tree_leaves_with_path

import flax_dropout_cell as fdc
from flax_dropout_cell._spec.prefixes import DeferredPrefix

NOISE = fdc.Dropout(keep_prob=0.5, variational=True)
IN, UNITS = 5, 4


def chosen(prefix: DeferredPrefix, params: Any) -> list[str]:
    """The paths that get the noise; all else in the resolved tree must be None."""

    def is_noise(node: Any) -> bool:
        return isinstance(node, fdc.Dropout)

    resolved = prefix.resolve(params)
    places = jax.tree.leaves(resolved, is_leaf=lambda node: node is None or is_noise(node))
    assert len(places) >= len(jax.tree.leaves(params))
    leaves = tree_leaves_with_path(resolved, is_leaf=is_noise)
    assert all(leaf == NOISE for _, leaf in leaves)
    return [keystr(path, simple=True, separator="/") for path, _ in leaves]


class Weights(NamedTuple):
    recurrent_kernel: jax.Array
    layers: list[Any]


WEIGHTS = {
    "hf": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
    "if": {"kernel": jnp.ones((3, 4))},
    "deep": Weights(jnp.ones((4, 4)), [{"kernel": jnp.ones(2)}, {"kernel": jnp.ones(2)}]),
}


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["h*/kernel"], ["hf/kernel"]),
        (["kernel"], ["deep/layers/0/kernel", "deep/layers/1/kernel", "hf/kernel", "if/kernel"]),
        (["1/kernel"], ["deep/layers/1/kernel"]),
        (["deep/*/*/kernel"], ["deep/layers/0/kernel", "deep/layers/1/kernel"]),
        (["hf/*"], ["hf/bias", "hf/kernel"]),
        (
            ["*/recurrent_kernel", "[hi]f/kernel"],
            ["deep/recurrent_kernel", "hf/kernel", "if/kernel"],
        ),
        (["hf/kernel", "h?/kernel"], ["hf/kernel"]),
    ],
)
def test_a_pattern_matches_the_end_of_a_path_name_by_name(
    patterns: list[str], wanted: list[str]
) -> None:
    assert chosen(fdc.at_paths(NOISE, *patterns), WEIGHTS) == wanted
    shapes = jax.eval_shape(lambda: WEIGHTS)
    assert chosen(fdc.at_paths(NOISE, *patterns), shapes) == wanted


@pytest.mark.parametrize("pattern", ["nothing", "f/kernel", "HF/kernel", "hf", "x/hf/kernel"])
def test_a_pattern_that_matches_no_weight_is_an_error_that_lists_them(pattern: str) -> None:
    with pytest.raises(ValueError, match=f"'{pattern}' matches no weight") as raised:
        fdc.at_paths(NOISE, "hf/kernel", pattern).resolve(WEIGHTS)
    message = str(raised.value)
    assert "deep/layers/0/kernel, deep/layers/1/kernel, hf/bias, hf/kernel" in message
    assert len(message.splitlines()) <= 5


def test_long_lists_are_cut() -> None:
    many = {f"layer{index:03}": jnp.ones(2) for index in range(500)}
    with pytest.raises(ValueError, match="layer019 and 480 more"):
        fdc.at_paths(NOISE, "kernel").resolve(many)


# Recurrent kernels -------------------------------------------------------------------------------


def linen_params(cell: nn.RNNCellBase, shape: tuple[int, ...] = (2, IN)) -> Any:
    def init(rng: jax.Array) -> Any:
        x = jnp.ones(shape)
        return cell.init(rng, cell.initialize_carry(rng, x.shape), x)

    return jax.eval_shape(init, jax.random.key(0))["params"]


def nnx_params(cell: type[nnx.Module]) -> Any:
    make: Any = cell
    return nnx.to_pure_dict(nnx.state(make(IN, UNITS, rngs=nnx.Rngs(0)), nnx.Param))


def haiku_params(core: Any, shape: tuple[int, ...] = (2, IN)) -> Any:
    def run() -> Any:
        made = core()
        return made(jnp.ones(shape), made.initial_state(2))

    return jax.eval_shape(hk.transform(run).init, jax.random.key(0))


LSTM = ["hf/kernel", "hg/kernel", "hi/kernel", "ho/kernel"]
CELLS = {
    "nn.LSTMCell": (lambda: linen_params(nn.LSTMCell(UNITS)), LSTM),
    "nn.OptimizedLSTMCell": (lambda: linen_params(nn.OptimizedLSTMCell(UNITS)), LSTM),
    "nn.GRUCell": (
        lambda: linen_params(nn.GRUCell(UNITS)),
        ["hn/kernel", "hr/kernel", "hz/kernel"],
    ),
    "nn.SimpleCell": (lambda: linen_params(nn.SimpleCell(UNITS)), ["h/kernel"]),
    "nn.MGUCell": (lambda: linen_params(nn.MGUCell(UNITS)), ["hf/kernel", "hn/kernel"]),
    "nn.ConvLSTMCell": (
        lambda: linen_params(nn.ConvLSTMCell(UNITS, (3, 3)), (2, 8, 8, 3)),
        ["hh/kernel"],
    ),
    "nnx.LSTMCell": (lambda: nnx_params(nnx.LSTMCell), LSTM),
    "nnx.OptimizedLSTMCell": (lambda: nnx_params(nnx.OptimizedLSTMCell), ["dense_h/kernel"]),
    "nnx.GRUCell": (lambda: nnx_params(nnx.GRUCell), ["dense_h/kernel"]),
    "nnx.SimpleCell": (lambda: nnx_params(nnx.SimpleCell), ["dense_h/kernel"]),
    "eqx.nn.LSTMCell": (
        lambda: eqx.nn.LSTMCell(IN, UNITS, key=jax.random.key(0)),
        ["weight_hh"],
    ),
    "eqx.nn.GRUCell, no bias": (
        lambda: eqx.nn.GRUCell(IN, UNITS, use_bias=False, key=jax.random.key(0)),
        ["weight_hh"],
    ),
    "hk.GRU": (lambda: haiku_params(lambda: hk.GRU(UNITS)), ["gru/w_h"]),
    "hk.VanillaRNN": (
        lambda: haiku_params(lambda: hk.VanillaRNN(UNITS)),
        ["vanilla_rnn/linear_1/w"],
    ),
    "by hand": (lambda: WEIGHTS, ["deep/recurrent_kernel", "hf/kernel"]),
    "nn.LSTMCell.apply's": (
        lambda: {"params": linen_params(nn.LSTMCell(UNITS))},
        [f"params/{path}" for path in LSTM],
    ),
}


@pytest.mark.parametrize("name", CELLS)
def test_the_recurrent_kernels_of(name: str) -> None:
    make, wanted = CELLS[name]
    assert chosen(fdc.recurrent_kernels(NOISE), make()) == wanted


def test_flax_boxes_are_looked_into() -> None:
    """nn.with_partitioning boxes weights, and an NNX state holds variables."""
    boxed = {"hf": {"kernel": nn.Partitioned(jnp.ones((4, 4)), names=(None, "model"))}}
    assert chosen(fdc.recurrent_kernels(NOISE), boxed) == ["hf/kernel/value"]
    state = nnx.state(nnx.GRUCell(IN, UNITS, rngs=nnx.Rngs(0)), nnx.Param)
    resolved = fdc.at_paths(NOISE, "dense_h/kernel").resolve(state)
    noises = [leaf for leaf in jax.tree.leaves(resolved, is_leaf=lambda x: x == NOISE)]
    assert noises == [NOISE]


def test_what_is_no_array_gets_no_noise() -> None:
    """Modules of Equinox hold functions."""
    params = {"weight_hh": jnp.ones((4, 4)), "activation": jnp.tanh, "weight": jnp.ones(3)}
    assert chosen(fdc.at_paths(NOISE, "weight*"), params) == ["weight", "weight_hh"]
    with pytest.raises(ValueError, match="weights are weight, weight_hh"):
        fdc.at_paths(NOISE, "activation").resolve(params)


def test_a_joint_kernel_is_an_error_that_says_so() -> None:
    lstm = haiku_params(lambda: hk.LSTM(UNITS))
    with pytest.raises(ValueError, match="lstm/linear/w is one joint kernel for x and h"):
        fdc.recurrent_kernels(NOISE).resolve(lstm)
    both = haiku_params(lambda: hk.DeepRNN([hk.GRU(UNITS), hk.LSTM(UNITS)]))
    with pytest.raises(ValueError, match="one joint kernel"):
        fdc.recurrent_kernels(NOISE).resolve(both)
    assert chosen(fdc.at_paths(NOISE, "lstm/linear/w"), lstm) == ["lstm/linear/w"]


def test_an_unknown_cell_is_an_error_that_lists_its_weights() -> None:
    with pytest.raises(
        ValueError, match=r"no recurrent kernel by a name(.|\n)*are in, rec"
    ) as raised:
        fdc.recurrent_kernels(NOISE).resolve({"in": jnp.ones(2), "rec": jnp.ones(2)})
    assert len(str(raised.value).splitlines()) <= 5


# In the hosts ------------------------------------------------------------------------------------


def run_core(params: Any, spec: fdc.RecurrentDropout, rng: jax.Array) -> Any:
    zeros = jnp.zeros((2, UNITS))
    xs, cell = jnp.ones((3, 2, IN)), nn.LSTMCell(UNITS).apply
    return fdc.dropout_scan({"params": params}, (zeros, zeros), xs, rng, cell=cell, dropout=spec)[1]


def run_linen(params: Any, spec: fdc.RecurrentDropout, rng: jax.Array) -> Any:
    rnn = nn.RNN(fdc.linen.DropoutCell(nn.LSTMCell(UNITS), spec))
    variables = {"params": {"cell": params}}
    return rnn.apply(variables, jnp.ones((2, 3, IN)), rngs={"dropout": rng})


def run_nnx(params: Any, spec: fdc.RecurrentDropout, rng: jax.Array) -> Any:
    cell = nnx.LSTMCell(IN, UNITS, rngs=nnx.Rngs(0))
    nnx.update(cell, params)
    return nnx.RNN(fdc.nnx.DropoutCell(cell, spec, rngs=nnx.Rngs(dropout=rng)))(
        jnp.ones((2, 3, IN))
    )


@pytest.mark.parametrize("host", ["core", "linen", "nnx"])
@pytest.mark.parametrize("variational", [True, False])
def test_in_every_host_they_are_the_prefix_that_they_resolve_to(
    host: str, variational: bool
) -> None:
    run = {"core": run_core, "linen": run_linen, "nnx": run_nnx}[host]
    if host == "nnx":
        params = nnx_params(nnx.LSTMCell)
    else:
        cell = nn.LSTMCell(UNITS)
        zeros = jnp.zeros((2, UNITS))
        params = cell.init(jax.random.key(0), (zeros, zeros), jnp.ones((2, IN)))["params"]
    noise = fdc.Dropout(keep_prob=0.5, variational=variational)
    lazy, rng = fdc.recurrent_kernels(noise), jax.random.key(1)
    written = lazy.resolve({"params": params} if host == "core" else params)
    got = run(params, fdc.RecurrentDropout(params=lazy), rng)
    np.testing.assert_array_equal(got, run(params, fdc.RecurrentDropout(params=written), rng))
    bare = run(params, fdc.RecurrentDropout(), rng)
    assert (np.asarray(got) != np.asarray(bare)).any()


# As values ---------------------------------------------------------------------------------------


def test_they_are_pytrees_and_hashable() -> None:
    for prefix in (fdc.at_paths(NOISE, "h*/kernel"), fdc.recurrent_kernels(NOISE)):
        leaves, structure = jax.tree.flatten(prefix)
        assert jax.tree.unflatten(structure, leaves) == prefix
        assert hash(prefix) == hash(jax.tree.unflatten(structure, leaves))
        assert isinstance(prefix, DeferredPrefix)
    assert fdc.at_paths(NOISE, "a") != fdc.at_paths(NOISE, "b")
    traced = jax.jit(
        lambda prob: fdc.at_paths(fdc.Dropout(keep_prob=prob), "a").resolve({"a": prob})
    )(jnp.float32(0.3))
    assert traced["a"].keep_prob == jnp.float32(0.3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fdc.at_paths(0.5, "a"), TypeError, "noise of at_paths must be a noise .*got 0.5"),  # type: ignore
        (lambda: fdc.at_paths(fdc.Dropout, "a"), TypeError, "got the class .*Dropout"),  # type: ignore
        (lambda: fdc.at_paths(NOISE), ValueError, "at_paths needs a pattern"),
        (lambda: fdc.at_paths(NOISE, 3), TypeError, "patterns must be strings"),  # type: ignore
        (lambda: fdc.recurrent_kernels({"a": NOISE}), TypeError, "got a dict"),  # type: ignore
    ],
)
def test_errors_where_they_are_made(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
