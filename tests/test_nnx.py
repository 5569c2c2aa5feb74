"""NNX: the promises of the adaptor, in every host, and the ways of NNX with state and keys."""

import copy
import functools
import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from flax import nnx
from probes import BATCH, SITE_NAMES, STEPS, UNITS

import flax_dropout_cell as fdc
from flax_dropout_cell import linen
from flax_dropout_cell.nnx import DropoutCarry, DropoutCell, RNNCellDropoutWrapper

VARIATIONAL = fdc.Dropout(keep_prob=0.5, variational=True)
PER_STEP = fdc.Dropout(keep_prob=0.5)
MIXED = fdc.RecurrentDropout(
    input=VARIATIONAL, state=(None, PER_STEP), output=VARIATIONAL, params=PER_STEP
)
SHAPE = (BATCH, UNITS)
CELLS = (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.SimpleCell, nnx.GRUCell)

both_modes = pytest.mark.parametrize("noise", [VARIATIONAL, PER_STEP], ids=["variational", "step"])


class Probe(nnx.RNNCellBase):
    """`probes.probe_cell` as an NNX cell."""

    def __init__(self, units: int = UNITS) -> None:
        self.w = nnx.Param(jnp.ones(units))

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        return probes.probe_cell({"w": self.w[...]}, carry, inputs)

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return {"a": jnp.ones(input_shape), "b": jnp.ones(input_shape)}

    @property
    def num_feature_axes(self) -> int:
        return 1


class Sum(nnx.RNNCellBase):
    """Emits its inputs and sums them up, so that either shows the masks."""

    def __init__(self, features: int = UNITS) -> None:
        self.in_features = features

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        return carry + inputs, inputs

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.zeros(input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


def probe_of(noise: fdc.Noise | None, seed: Any = 0, **options: Any) -> DropoutCell:
    return DropoutCell(Probe(), probes.spec_of(noise), rngs=nnx.Rngs(dropout=seed), **options)


def in_rnn(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    return nnx.RNN(cell, time_major=True, return_carry=True)(xs)


def in_bidirectional(cell: Any, xs: jax.Array, direction: int = 0) -> tuple[Any, Any]:
    other = DropoutCell(Probe(), cell.dropout, cell.deterministic, rngs=nnx.Rngs(dropout=1))
    both = nnx.Bidirectional(nnx.RNN(cell), nnx.RNN(other), merge_fn=lambda *ys: jnp.stack(ys))
    carries, ys = both(xs, time_major=True, return_carry=True)
    ys = jax.tree.map(lambda leaf: leaf[direction], ys)
    if direction == 1:  # back in the order in which the backward layer ran
        ys = jax.tree.map(lambda leaf: leaf[::-1], ys)
    return carries[direction], ys


def in_scan(cell: Any, xs: jax.Array, axes: Any = None) -> tuple[Any, Any]:
    carry = cell.initialize_carry(xs.shape[1:], nnx.Rngs(0))
    scan = nnx.scan(
        lambda cell, carry, x: cell(carry, x),
        in_axes=(axes, nnx.Carry, 0),
        out_axes=(nnx.Carry, 0),
    )
    return scan(cell, carry, xs)


def in_scan_that_carries_the_state(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    return in_scan(cell, xs, nnx.StateAxes({...: nnx.Carry}))


def in_lax_scan(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    carry = cell.initialize_carry(xs.shape[1:], nnx.Rngs(0))
    return jax.lax.scan(lambda carry, x: cell(carry, x), carry, xs)


def in_python_loop(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    carry, outputs = cell.initialize_carry(xs.shape[1:], nnx.Rngs(0)), []
    for x in xs:
        carry, y = cell(carry, x)
        outputs.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


Host = Callable[[Any, jax.Array], tuple[Any, Any]]

HOSTS: dict[str, Host] = {
    "nnx.RNN": in_rnn,
    "nnx.Bidirectional": in_bidirectional,
    "nnx.scan": in_scan,
    "nnx.scan that carries the state": in_scan_that_carries_the_state,
    "jax.lax.scan": in_lax_scan,
    "python loop": in_python_loop,
}
all_hosts = pytest.mark.parametrize("host", HOSTS)


compiled = functools.cache(nnx.jit)


def look(host: Host, cell: DropoutCell) -> dict[str, np.ndarray]:
    carry, ys = compiled(host)(cell, probes.ones())
    return jax.tree.map(np.asarray, probes.seen(carry.cell_carry, ys))


@functools.cache
def look_twice(host: str, noise: fdc.Noise) -> tuple[dict[str, np.ndarray], ...]:
    """The masks of two calls of one module."""
    cell = probe_of(noise)
    return look(HOSTS[host], cell), look(HOSTS[host], cell)


def differ(a: Any, b: Any) -> bool:
    """Two masks of half ones: equal only by chance, once in 2**64 for the smallest here."""
    return bool((np.asarray(a) != np.asarray(b)).any())


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a: Any, b: Any) -> None:
    """Up to the rounding of a cell's own sums, which a compiler may order as it likes."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def draws_of(stream: nnx.RngStream | None) -> int:
    assert stream is not None
    return int(stream.count[...])


def next_key(cell: Any) -> jax.Array:
    """The key that the cell's stream gives next."""
    return jax.random.fold_in(cell.rngs.key[...], cell.rngs.count[...])


# When a mask is fresh and when it is frozen


@all_hosts
def test_variational_mask_is_frozen_within_a_sequence(host: str) -> None:
    for run in look_twice(host, VARIATIONAL):
        for site in SITE_NAMES:
            assert set(np.unique(run[site])) == {0.0, 2.0}, site
            assert_same(run[site], np.broadcast_to(run[site][:1], run[site].shape))


@all_hosts
def test_per_step_mask_is_fresh_at_each_step(host: str) -> None:
    for run in look_twice(host, PER_STEP):
        for site in SITE_NAMES:
            assert set(np.unique(run[site])) == {0.0, 2.0}, site
            for s, t in itertools.combinations(range(STEPS), 2):
                assert differ(run[site][s], run[site][t]), (site, s, t)


@all_hosts
@both_modes
def test_the_next_call_has_new_masks(host: str, noise: fdc.Dropout) -> None:
    first, second = look_twice(host, noise)
    for site in SITE_NAMES:
        for s, t in itertools.product(range(STEPS), repeat=2):
            assert differ(first[site][s], second[site][t]), (site, s, t)


@all_hosts
@both_modes
def test_masks_differ_over_sites_leaves_and_examples(host: str, noise: fdc.Dropout) -> None:
    run, _ = look_twice(host, noise)
    for site, other in itertools.combinations(SITE_NAMES, 2):
        assert differ(run[site][0], run[other][0]), (site, other)
    for site in SITE_NAMES[1:]:
        for i, j in itertools.combinations(range(BATCH), 2):
            assert differ(run[site][0, i], run[site][0, j]), (site, i, j)


@all_hosts
@both_modes
def test_compiling_changes_nothing(host: str, noise: fdc.Dropout) -> None:
    carry, ys = HOSTS[host](probe_of(noise), probes.ones())
    assert_same(probes.seen(carry.cell_carry, ys), look_twice(host, noise)[0])


@both_modes
def test_every_host_draws_the_same(noise: fdc.Dropout) -> None:
    for host in HOSTS:
        assert_same(look_twice(host, noise)[0], look_twice("nnx.RNN", noise)[0])


@both_modes
def test_directions_have_masks_of_their_own(noise: fdc.Dropout) -> None:
    forward, backward = (
        look(functools.partial(in_bidirectional, direction=direction), probe_of(noise))
        for direction in (0, 1)
    )
    for site in SITE_NAMES:
        if noise.variational:
            assert (backward[site] == backward[site][:1]).all()
        for s, t in itertools.product(range(STEPS), repeat=2):
            assert differ(forward[site][s], backward[site][t]), site


@both_modes
def test_layers_have_masks_of_their_own(noise: fdc.Dropout) -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> nnx.RNN:
        return nnx.RNN(DropoutCell(Sum(), fdc.RecurrentDropout(input=noise), rngs=rngs))

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
    def run(layer: nnx.RNN, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, layer(x)

    layers = make(nnx.Rngs(0))
    _, first = run(layers, jnp.ones((BATCH, STEPS, UNITS)))
    _, second = run(layers, jnp.ones((BATCH, STEPS, UNITS)))
    runs = [*first, *second]
    for one, other in itertools.combinations(runs, 2):
        assert differ(one[:, 0], other[:, 0])
    for one in runs:
        assert differ(one[:, :1], one) is not noise.variational
    cell: Any = layers.cell
    assert cell.rngs.count[...].tolist() == [2, 2, 2]


# Where the randomness comes from


@all_hosts
@both_modes
def test_a_sequence_draws_one_key_and_its_steps_none(host: str, noise: fdc.Dropout) -> None:
    cell = probe_of(noise)
    carry = cell.initialize_carry(SHAPE)
    assert draws_of(cell.rngs) == 1
    for x in probes.ones():
        carry, _ = cell(carry, x)
    assert draws_of(cell.rngs) == 1
    compiled(HOSTS[host])(cell, probes.ones())
    assert draws_of(cell.rngs) == 2


def test_the_stream_is_forked_as_dropout_forks_it() -> None:
    for make in (lambda: nnx.Rngs(dropout=3), lambda: nnx.Rngs(3), lambda: nnx.Rngs(3).dropout):
        theirs, ours = make(), make()
        stream: Any = nnx.Dropout(0.5, rngs=theirs).rngs
        cell = DropoutCell(Sum(), fdc.RecurrentDropout(), rngs=ours)
        assert next_key(cell) == stream()
        assert cell.rngs is not None and cell.rngs.tag == stream.tag
        assert_same(nnx.to_pure_dict(nnx.state(theirs)), nnx.to_pure_dict(nnx.state(ours)))


def test_cells_made_from_one_rngs_have_masks_of_their_own() -> None:
    rngs = nnx.Rngs(0)
    one, other = (
        DropoutCell(Probe(), probes.spec_of(VARIATIONAL), rngs=rngs).initialize_carry(SHAPE)
        for _ in range(2)
    )
    for mask, other_mask in zip(*map(jax.tree.leaves, (one.masks, other.masks)), strict=True):
        assert differ(mask, other_mask)


def test_the_hosts_own_stream_draws_no_mask() -> None:
    """A host's stream starts from the same key whenever the host is made."""
    cell = probe_of(VARIATIONAL)
    again = [nnx.RNN(cell, time_major=True)(probes.ones())["input"][0] for _ in range(2)]
    assert differ(*again)
    others = [
        nnx.RNN(probe_of(VARIATIONAL), time_major=True, rngs=rngs)(probes.ones())["input"][0]
        for rngs in (True, nnx.Rngs(7))
    ]
    assert_same(*others)
    assert_same(others[0], again[0])


def test_the_hosts_stream_is_for_the_cells_own_carry() -> None:
    class Started(Sum):
        def initialize_carry(
            self, input_shape: Any, rngs: Any = None, carry_init: Any = None
        ) -> Any:
            return jnp.full(input_shape, rngs() if carry_init is None else carry_init)

    cell = DropoutCell(Started(), fdc.RecurrentDropout(input=VARIATIONAL), rngs=nnx.Rngs(0))
    assert (cell.initialize_carry(SHAPE, lambda: 3.0).cell_carry == 3).all()
    assert (cell.initialize_carry(SHAPE, None, 4.0).cell_carry == 4).all()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
@both_modes
def test_every_kind_of_key(make_key: Any, impl: str, noise: fdc.Dropout) -> None:
    with jax.default_prng_impl(impl):
        cell = DropoutCell(
            Sum(), fdc.RecurrentDropout(input=noise), rngs=nnx.Rngs(dropout=make_key(0))
        )
        rnn = nnx.RNN(cell, time_major=True, return_carry=True)
        lengths = jnp.full(BATCH, STEPS)
        carry, ys = rnn(probes.ones(), seq_lengths=lengths)
        _, zs = rnn(probes.ones(), initial_carry=carry)
    assert (ys[1:] == ys[:1]).all() == noise.variational
    assert (zs[0] == ys[-1]).all() == noise.variational
    assert set(np.unique(ys)) == {0.0, 2.0}


@both_modes
@pytest.mark.parametrize("wrap", [nnx.jit, nnx.remat, lambda f: f], ids=["jit", "remat", "plain"])
def test_gradients_move_the_stream_too(wrap: Any, noise: fdc.Dropout) -> None:
    rnn = nnx.RNN(probe_of(noise), time_major=True)
    cell: Any = rnn.cell

    def loss(rnn: nnx.RNN) -> Any:
        ys = rnn(probes.ones())
        return jnp.sum(ys["params"]), ys["input"][0]

    grad = wrap(nnx.value_and_grad(loss, has_aux=True))
    if wrap is nnx.remat:
        grad = nnx.value_and_grad(nnx.remat(loss), has_aux=True)
    masks = []
    for calls in (1, 2, 3):
        (_, mask), grads = grad(rnn)
        masks.append(mask)
        assert draws_of(cell.rngs) == calls
        # d/dw of the sum over steps and examples of w * mask / keep_prob
        got = nnx.to_pure_dict(nnx.state(grads))["cell"]["cell"]["w"] / BATCH
        assert set(np.unique(got)) <= set(np.arange(0.0, 2 * STEPS + 1, 2))
        if noise.variational:
            assert set(np.unique(got)) == {0.0, 2.0 * STEPS}
    for one, other in itertools.combinations(masks, 2):
        assert differ(one, other)


def test_a_key_from_outside_of_a_transform_is_flaxs_error() -> None:
    """A stream that is closed over would give every call the same key."""
    rnn = nnx.RNN(probe_of(VARIATIONAL))
    with pytest.raises(Exception, match="trace level"):
        jax.jit(lambda x: rnn(x))(probes.ones())


def random_primitives(jaxpr: Any, inside_scan: bool = False) -> Iterator[tuple[str, bool]]:
    for eqn in jaxpr.eqns:
        if "random" in eqn.primitive.name or "threefry" in eqn.primitive.name:
            yield eqn.primitive.name, inside_scan
        inside = inside_scan or eqn.primitive.name in ("scan", "while")
        for leaf in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(leaf, "jaxpr", leaf)
            if hasattr(inner, "eqns"):
                yield from random_primitives(inner, inside)


@pytest.mark.parametrize("host", ["nnx.RNN", "nnx.Bidirectional", "nnx.scan"])
@both_modes
def test_variational_masks_cost_the_loop_no_randomness(host: str, noise: fdc.Dropout) -> None:
    graphdef, state = nnx.split(probe_of(noise))
    jaxpr = jax.make_jaxpr(lambda state, xs: HOSTS[host](nnx.merge(graphdef, state), xs))(
        state, probes.ones()
    )
    found = set(random_primitives(jaxpr.jaxpr))
    assert ("random_bits", False) in found or not noise.variational
    assert any(inside for _, inside in found) is not noise.variational, found


# Evaluation


def evaluate_by_eval(cell: DropoutCell) -> DropoutCell:
    rnn = nnx.RNN(cell)
    rnn.eval()
    return cell


def evaluate_by_view(cell: DropoutCell) -> DropoutCell:
    if not hasattr(nnx, "view"):
        pytest.skip("this Flax has no nnx.view")
    view = nnx.view(nnx.RNN(cell), deterministic=True)
    assert cell.deterministic is False
    evaluated: Any = view.cell
    return evaluated


@all_hosts
@both_modes
def test_evaluation_disturbs_nothing_and_needs_no_stream(host: str, noise: fdc.Dropout) -> None:
    cell = DropoutCell(Probe(), probes.spec_of(noise), deterministic=True)
    for mask in look(HOSTS[host], cell).values():
        assert_same(mask, np.ones((STEPS, *SHAPE)))


@pytest.mark.parametrize("evaluate", [evaluate_by_eval, evaluate_by_view])
@both_modes
def test_switching_to_evaluation_and_back(evaluate: Any, noise: fdc.Dropout) -> None:
    cell = probe_of(noise)
    evaluated = evaluate(cell)
    for mask in look(in_rnn, evaluated).values():
        assert_same(mask, np.ones((STEPS, *SHAPE)))
    assert draws_of(evaluated.rngs) == 0
    nnx.RNN(evaluated).train()
    assert_same(look(in_rnn, evaluated), look_twice("nnx.RNN", noise)[0])


def test_a_training_carry_in_evaluation_keeps_its_masks() -> None:
    cell = probe_of(VARIATIONAL)
    carry = cell.initialize_carry(SHAPE)
    cell.eval()
    after, ys = cell(carry, jnp.ones(SHAPE))
    assert (ys["input"] == 1).all()
    assert_same(after.masks, carry.masks)


def test_params_are_undisturbed_in_evaluation_whatever_the_prefix() -> None:
    cell = DropoutCell(Probe(), fdc.RecurrentDropout(params={"w": VARIATIONAL}), deterministic=True)
    _, y = cell(cell.initialize_carry(SHAPE), jnp.ones(SHAPE))
    assert (y["params"] == 1).all()


# Windows, padding, new masks on an old state


def lstm(spec: fdc.RecurrentDropout, cell: Any = nnx.LSTMCell, **options: Any) -> DropoutCell:
    rngs = nnx.Rngs(params=0, dropout=1)
    return DropoutCell(cell(3, 8, rngs=rngs), spec, rngs=rngs, **options)


def inputs(batch: int = BATCH) -> jax.Array:
    return jax.random.normal(jax.random.key(5), (batch, STEPS, 3))


@pytest.mark.parametrize("cut", [1, 3])
def test_a_sequence_that_is_cut_is_the_uncut_one(cut: int) -> None:
    run = nnx.jit(
        lambda rnn, x, carry: rnn(x, initial_carry=carry, return_carry=True),
    )
    whole_carry, whole = run(nnx.RNN(lstm(MIXED)), inputs(), None)
    rnn = nnx.RNN(lstm(MIXED))
    carry, first = run(rnn, inputs()[:, :cut], None)
    carry, second = run(rnn, inputs()[:, cut:], carry)
    assert_same(jnp.concatenate([first, second], axis=1), whole)
    assert_same(carry._replace(rng=None), whole_carry._replace(rng=None))
    assert carry.rng.key[0] == whole_carry.rng.key[0]
    assert carry.rng.step.tolist() == [STEPS]
    cell: Any = rnn.cell
    assert draws_of(cell.rngs) == 1


@both_modes
def test_a_second_window_goes_on_with_the_masks_of_the_first(noise: fdc.Dropout) -> None:
    cell = probe_of(noise)
    rnn = nnx.RNN(cell, time_major=True, return_carry=True)
    carry, first = rnn(probes.ones())
    _, second = rnn(probes.ones(), initial_carry=carry)
    for s, t in itertools.product(range(STEPS), repeat=2):
        assert differ(first["input"][s], second["input"][t]) is not noise.variational


@both_modes
def test_redraw_masks_keeps_the_state_and_nothing_else(noise: fdc.Dropout) -> None:
    cell = probe_of(noise)
    carry, _ = in_rnn(cell, probes.ones())
    fresh = cell.redraw_masks(carry, SHAPE)
    assert draws_of(cell.rngs) == 2
    assert_same(fresh.cell_carry, carry.cell_carry)
    for mask, old in zip(*map(jax.tree.leaves, (fresh.masks, carry.masks)), strict=True):
        assert differ(mask, old)
    if not noise.variational:
        assert fresh.rng.key[0] != carry.rng.key[0]
        assert fresh.rng.step.tolist() == [0]
    of_the_cell = cell.redraw_masks(carry.cell_carry, SHAPE)
    assert_same(of_the_cell.cell_carry, carry.cell_carry)
    nnx.RNN(cell, time_major=True)(probes.ones(), initial_carry=of_the_cell)


@both_modes
def test_padded_rows_keep_the_carry_of_their_last_step(noise: fdc.Dropout) -> None:
    """`nnx.RNN` then takes every leaf of the carry at [length - 1, row]."""
    spec = fdc.RecurrentDropout(
        input=noise, state=fdc.Dropout(0.5, variational=noise.variational, broadcast_dims=(0,))
    )
    lengths = jnp.array([3, 1, STEPS, 2])
    cell = DropoutCell(Sum(), spec, rngs=nnx.Rngs(0))
    rnn = nnx.RNN(cell, time_major=True)
    first = cell.initialize_carry(SHAPE)
    carries, carry = [], first
    for x in probes.ones():
        carry, _ = cell(carry, x)
        carries.append(carry)
    plain = rnn(probes.ones(), initial_carry=first)
    padded = rnn(probes.ones(), initial_carry=first, seq_lengths=lengths)
    last, ys = rnn(probes.ones(), initial_carry=first, seq_lengths=lengths, return_carry=True)
    assert_same(padded, plain)
    assert_same(ys, plain)
    for row, length in enumerate(lengths.tolist()):
        assert_same(last.cell_carry[row], carries[length - 1].cell_carry[row])
    if noise.variational:
        assert_same(last.masks.input, first.masks.input)
        assert_same(last.masks.state, jnp.broadcast_to(first.masks.state, SHAPE))
    else:
        assert last.rng.step.tolist() == lengths.tolist()

    # A next window goes on from there; where rows differ, the furthest step sets the pace.
    after, zs = rnn(probes.ones(), initial_carry=last, return_carry=True)
    for t in range(STEPS):
        for s in range(STEPS):
            assert differ(zs[t], plain[s]) is not noise.variational
    if not noise.variational:
        assert after.rng.step.tolist() == [2 * STEPS] * BATCH


def test_padding_with_every_site_and_a_reversed_sequence() -> None:
    lengths = jnp.array([3, 1, STEPS, 2])
    cell = lstm(MIXED)
    rnn = nnx.RNN(cell, return_carry=True, reverse=True, keep_order=True)
    carry = cell.initialize_carry((BATCH, 3), nnx.Rngs(0))
    last, _ = rnn(inputs(), initial_carry=carry, seq_lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        # The row alone, cut at its length, under the same masks.
        alone, x = carry, inputs()[:, :length][:, ::-1]
        for t in range(length):
            alone, _ = cell(alone, x[:, t])
        assert_close(
            jax.tree.map(lambda leaf, row=row: leaf[row], last.cell_carry),
            jax.tree.map(lambda leaf, row=row: leaf[row], alone.cell_carry),
        )


# Cells and numbers


@pytest.mark.parametrize("cell_class", CELLS)
def test_a_host_gives_the_numbers_of_dropout_scan(cell_class: Any) -> None:
    state = (None, PER_STEP) if "LSTM" in cell_class.__name__ else PER_STEP
    spec = fdc.RecurrentDropout(
        input=VARIATIONAL, state=state, output=VARIATIONAL, params=VARIATIONAL
    )
    for spec in (spec, fdc.RecurrentDropout(params=PER_STEP, output=PER_STEP, state=state)):
        cell = lstm(spec, cell_class)
        key = next_key(cell)
        graphdef, params, rest = nnx.split(cell.cell, nnx.Param, ...)
        carry, ys = fdc.dropout_scan(
            params,
            cell.cell.initialize_carry((BATCH, 3), nnx.Rngs(0)),
            jnp.swapaxes(inputs(), 0, 1),
            key,
            cell=lambda params, carry, x: nnx.merge(graphdef, params, rest)(carry, x),
            dropout=spec,
        )
        got_carry, got = nnx.RNN(cell, return_carry=True)(inputs())
        assert_close(jnp.swapaxes(got, 0, 1), ys)
        assert_same(jnp.swapaxes(got, 0, 1) == 0, ys == 0)
        assert_close(got_carry.cell_carry, carry)


@both_modes
def test_the_masks_are_those_of_dropout_scan(noise: fdc.Dropout) -> None:
    """Bit for bit: a probe computes nothing."""
    cell = probe_of(noise)
    run = probes.run_dropout_scan(probes.spec_of(noise), next_key(cell), probes.ones())
    assert_same(look(in_rnn, cell), run.seen)


@pytest.mark.parametrize("wrapper", ["DropoutCell", "RNNCellDropoutWrapper"])
@pytest.mark.parametrize("variational", [True, False])
def test_linen_and_nnx_agree(wrapper: str, variational: bool) -> None:
    """One carry, one set of weights, one answer."""
    ours = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    weights = {
        name.rstrip("_"): jax.tree.map(lambda leaf: leaf + 0.1, layer)
        for name, layer in nnx.to_pure_dict(nnx.state(ours, nnx.Param)).items()
    }
    named = {name + "_" * (name == "if"): layer for name, layer in weights.items()}
    nnx.update(ours, named)
    if wrapper == "DropoutCell":
        noise = fdc.Dropout(0.7, variational=variational)
        spec = fdc.RecurrentDropout(input=noise, state=noise, output=noise, params=noise)
        mine, theirs = (
            DropoutCell(ours, spec, rngs=nnx.Rngs(0)),
            linen.DropoutCell(nn.LSTMCell(8), spec),
        )
    else:
        args = (0.5, 0.6, 0.7, variational)
        mine, theirs = (
            RNNCellDropoutWrapper(ours, *args, seed=3, rngs=nnx.Rngs(0)),
            linen.RNNCellDropoutWrapper(nn.LSTMCell(8), *args, seed=3),
        )
    carry = mine.initialize_carry((BATCH, 3), nnx.Rngs(0))
    their_carry = carry
    if carry.masks.params is not None:
        renamed = {name.rstrip("_"): mask for name, mask in carry.masks.params.items()}
        their_carry = carry._replace(masks=carry.masks._replace(params=renamed))
    last, ys = nnx.RNN(mine, return_carry=True)(inputs(), initial_carry=carry)
    result: Any = nn.RNN(theirs, return_carry=True).apply(
        {"params": {"cell": weights}}, inputs(), initial_carry=their_carry
    )
    their_last, their_ys = result
    assert_same(ys == 0, their_ys == 0)
    assert (ys == 0).any()
    assert_close(ys, their_ys)
    assert_close(last.cell_carry, their_last.cell_carry)


class MyLSTM(nnx.LSTMCell):
    pass


@pytest.mark.parametrize("cell_class", [nnx.LSTMCell, nnx.OptimizedLSTMCell, MyLSTM])
def test_one_noise_for_an_lstms_state_means_h(cell_class: Any) -> None:
    for nest in (lambda cell: cell, lambda cell: DropoutCell(cell, fdc.RecurrentDropout())):
        inner = nest(cell_class(3, 8, rngs=nnx.Rngs(0)))
        cell = DropoutCell(inner, fdc.RecurrentDropout(state=VARIATIONAL), rngs=nnx.Rngs(0))
        if inner is not cell.cell or isinstance(inner, DropoutCell):
            inner.deterministic = True
        masks = cell.initialize_carry((BATCH, 3), nnx.Rngs(0)).masks
        state = masks.state.cell_carry if isinstance(inner, DropoutCell) else masks.state
        assert state[0] is None
        assert state[1].shape == (BATCH, 8)
    both = DropoutCell(
        cell_class(3, 8, rngs=nnx.Rngs(0)),
        fdc.RecurrentDropout(state=(VARIATIONAL, VARIATIONAL)),
        rngs=nnx.Rngs(0),
    )
    c, h = both.initialize_carry((BATCH, 3), nnx.Rngs(0)).masks.state
    assert differ(c, h)


class Stack(nnx.RNNCellBase):
    """A user's own stacked cell, whose layers drop out by themselves."""

    def __init__(self, noise: fdc.Dropout, rngs: nnx.Rngs) -> None:
        spec = fdc.RecurrentDropout(output=noise)
        self.first = DropoutCell(Sum(), spec, rngs=rngs)
        self.second = DropoutCell(Sum(), spec, rngs=rngs)

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        first, y = self.first(carry[0], inputs)
        second, z = self.second(carry[1], jnp.ones_like(inputs))
        return (first, second), jnp.stack([y, z])

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return (
            self.first.initialize_carry(input_shape, rngs),
            self.second.initialize_carry(input_shape, rngs),
        )

    @property
    def num_feature_axes(self) -> int:
        return 1


@both_modes
def test_a_users_stack_of_dropout_cells(noise: fdc.Dropout) -> None:
    rnn = nnx.RNN(Stack(noise, nnx.Rngs(0)), time_major=True)
    calls = [nnx.jit(lambda rnn, x: rnn(x))(rnn, probes.ones()) for _ in range(2)]
    layers = [ys[:, layer] for ys in calls for layer in (0, 1)]
    for ys in layers:
        assert set(np.unique(ys)) == {0.0, 2.0}
        assert (ys[1:] == ys[:1]).all() == noise.variational
    for one, other in itertools.combinations(layers, 2):
        assert differ(one[0], other[0])


@both_modes
def test_wrappers_nest(noise: fdc.Dropout) -> None:
    inner = DropoutCell(Sum(), fdc.RecurrentDropout(input=noise, state=noise), rngs=nnx.Rngs(1))
    outer = DropoutCell(inner, fdc.RecurrentDropout(input=noise, state=noise), rngs=nnx.Rngs(2))
    rnn = nnx.RNN(outer, time_major=True, return_carry=True)
    carry, ys = rnn(probes.ones())
    assert set(np.unique(ys)) == {0.0, 4.0}  # both have to keep a unit
    assert (ys[1:] == ys[:1]).all() == noise.variational
    again, _ = rnn(probes.ones())
    assert draws_of(inner.rngs) == draws_of(outer.rngs) == 2
    fresh = outer.redraw_masks(carry, SHAPE)
    assert_same(fresh.cell_carry.cell_carry, carry.cell_carry.cell_carry)
    if noise.variational:
        for other in (again, fresh):
            assert differ(carry.masks.input, other.masks.input)
            assert differ(carry.masks.state.cell_carry, other.masks.state.cell_carry)
            assert differ(carry.cell_carry.masks.input, other.cell_carry.masks.input)
            assert differ(carry.cell_carry.masks.state, other.cell_carry.masks.state)
    rnn.eval()
    _, ys = rnn(probes.ones())
    assert (ys == 1).all()


# Weights and other state


class Counted(nnx.Variable):
    pass


class Counting(Probe):
    """A cell that writes to a variable, and reads a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = Counted(jnp.zeros((), jnp.int32))

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        self.steps[...] = self.steps[...] + 1
        return super().__call__(carry, inputs)


@pytest.mark.parametrize("host", ["nnx.RNN", "nnx.scan that carries the state", "python loop"])
@both_modes
def test_disturbed_weights_leave_the_cell_as_it_was(host: str, noise: fdc.Dropout) -> None:
    cell = DropoutCell(Counting(), probes.spec_of(noise), rngs=nnx.Rngs(0))
    counting: Any = cell.cell
    HOSTS[host](cell, probes.ones())
    assert (counting.w[...] == 1).all()
    assert int(counting.steps[...]) == STEPS  # what else the cell writes stays


def test_tracing_for_shapes_leaves_the_cell_as_it_was() -> None:
    cell = DropoutCell(Counting(), fdc.RecurrentDropout(output=VARIATIONAL), rngs=nnx.Rngs(0))
    counting: Any = cell.cell
    cell = DropoutCell(
        DropoutCell(
            counting,
            fdc.RecurrentDropout(
                output={"output": None, "params": None, "input": VARIATIONAL, "state": None}
            ),
            rngs=nnx.Rngs(0),
        ),
        fdc.RecurrentDropout(output=VARIATIONAL),
        rngs=nnx.Rngs(0),
    )
    before = nnx.to_pure_dict(nnx.state(cell.cell, Counted))
    cell.initialize_carry(SHAPE)
    assert_same(nnx.to_pure_dict(nnx.state(cell.cell, Counted)), before)


@pytest.mark.parametrize("cell_class", CELLS)
@both_modes
def test_dropped_weights_get_no_gradient(cell_class: Any, noise: fdc.Dropout) -> None:
    cell = lstm(fdc.RecurrentDropout(params=noise), cell_class)
    carry = cell.initialize_carry((BATCH, 3), nnx.Rngs(0))

    def loss(cell: DropoutCell) -> jax.Array:
        h = carry._replace(cell_carry=jax.tree.map(jnp.ones_like, carry.cell_carry))
        _, y = cell(h, inputs()[:, 0])
        return jnp.sum(y**2)

    grads = jax.tree.leaves(nnx.to_pure_dict(nnx.state(nnx.grad(loss)(cell))))
    if noise.variational:
        masks = jax.tree.leaves(carry.masks.params)
        for grad, mask in zip(grads, masks, strict=True):
            assert_same(grad != 0, np.asarray(mask[0]))
    else:
        share = np.mean([np.mean(grad == 0) for grad in grads if grad.size > 20])
        assert 0.3 < share < 0.7


def test_a_prefix_of_weights_is_a_plain_dict() -> None:
    spec = fdc.RecurrentDropout(
        params={"dense_h": {"kernel": VARIATIONAL}, "dense_i": None},
    )
    cell = lstm(spec, nnx.GRUCell)
    masks = cell.initialize_carry((BATCH, 3), nnx.Rngs(0)).masks.params
    assert masks["dense_i"] == {"bias": None, "kernel": None}
    assert masks["dense_h"]["kernel"].shape == (1, 8, 24)
    run = nnx.jit(lambda rnn, x: rnn(x))  # the spec is hashed
    rnn = nnx.RNN(cell)
    assert differ(run(rnn, inputs()), run(rnn, inputs()))


# Training


def test_training_steps_do_not_retrace() -> None:
    rngs = nnx.Rngs(params=0, dropout=1)
    spec = fdc.RecurrentDropout(
        input=VARIATIONAL, state=fdc.Dropout(0.9), output=PER_STEP, params=fdc.Dropout(0.9)
    )
    model = nnx.RNN(DropoutCell(nnx.GRUCell(3, 8, rngs=rngs), spec, rngs=rngs))
    traces = 0

    def loss(model: nnx.RNN, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        nonlocal traces
        traces += 1
        y = model(x)
        return jnp.mean((y - 1.0) ** 2), y

    @nnx.jit
    def train_step(model: nnx.RNN, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        (value, y), grads = nnx.value_and_grad(loss, has_aux=True)(model, x)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda param, grad: param - 0.3 * grad, params, grads))
        return value, y == 0

    dropped, losses = [], []
    for _ in range(30):
        value, zeros = train_step(model, inputs())
        losses.append(float(value))
        dropped.append(zeros)
    assert traces == 1
    for one, other in itertools.pairwise(dropped):
        assert differ(one, other)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    cell: Any = model.cell
    assert draws_of(cell.rngs) == 30


def test_a_schedule_does_not_retrace() -> None:
    """Arrays in `dropout` are data of the module, numbers are constants of the program."""
    cell = DropoutCell(Sum(), fdc.RecurrentDropout(), rngs=nnx.Rngs(0))
    rnn = nnx.RNN(cell)
    traces = 0

    @nnx.jit
    def run(rnn: nnx.RNN, x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return rnn(x)

    for keep_prob in (1.0, 0.25, 0.0):
        noise = fdc.Dropout(jnp.float32(keep_prob), variational=True)
        cell.dropout = fdc.RecurrentDropout(input=noise)
        assert_same(cell.dropout.input.keep_prob, jnp.float32(keep_prob))
        ys = run(rnn, jnp.ones((2, STEPS, 1024)))
        assert abs(float((ys != 0).mean()) - keep_prob) < 0.1
        assert keep_prob == 0 or set(np.unique(ys)) <= {0.0, 1 / keep_prob}
    assert traces == 1


def test_a_keep_prob_can_be_a_variable() -> None:
    keep_prob = nnx.Param(jnp.float32(0.5))
    spec = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob, variational=True))  # pyright: ignore
    rnn = nnx.RNN(DropoutCell(Sum(), spec, rngs=nnx.Rngs(0)))
    x = jnp.ones((BATCH, STEPS, UNITS))
    kept = float((nnx.clone(rnn)(x) != 0).sum())
    grads = nnx.grad(lambda rnn: rnn(x).sum())(rnn)
    # d/dp of kept / p
    np.testing.assert_allclose(jax.tree.leaves(nnx.state(grads)), [-kept / 0.25], rtol=1e-6)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        nnx.clone,
        lambda m: nnx.merge(*nnx.split(m)),
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
    ids=["deepcopy", "clone", "merge", "pickle"],
)
def test_a_copy_draws_what_the_original_draws(copied: Any) -> None:
    spec = fdc.RecurrentDropout(
        input=fdc.Dropout(jnp.float32(0.5), variational=True), output=PER_STEP
    )
    rnn = nnx.RNN(DropoutCell(Sum(), spec, rngs=nnx.Rngs(0)))
    twin = copied(rnn)
    x = jnp.ones((BATCH, STEPS, UNITS))
    assert_same(rnn(x), twin(x))
    assert differ(rnn(x), nnx.clone(rnn)(x))
    nnx.update(twin, nnx.state(rnn))
    assert_same(rnn(x), twin(x))


def test_reseeding_reaches_the_stream() -> None:
    rnn = nnx.RNN(
        DropoutCell(Sum(), fdc.RecurrentDropout(input=PER_STEP), rngs=nnx.Rngs(dropout=0))
    )
    x = jnp.ones((BATCH, STEPS, UNITS))
    first = rnn(x)
    nnx.reseed(rnn, dropout=9)
    second = rnn(x)
    nnx.reseed(rnn, dropout=9)
    assert_same(second, rnn(x))
    assert differ(first, second)


# Mistakes


def test_training_without_a_stream_says_what_to_pass() -> None:
    for rngs in (None, nnx.Rngs(params=0)):
        rnn = nnx.RNN(DropoutCell(Sum(), fdc.RecurrentDropout(input=PER_STEP), rngs=rngs))
        with pytest.raises(
            ValueError, match=r"DropoutCell needs a 'dropout' stream.*rngs=nnx.Rngs\(dropout=0\)"
        ):
            rnn(jnp.ones((BATCH, STEPS, UNITS)))
        rnn.eval()
        rnn(jnp.ones((BATCH, STEPS, UNITS)))
        rnn.train()
        cell: Any = rnn.cell
        cell.rngs = nnx.Rngs(0).dropout.fork()
        rnn(jnp.ones((BATCH, STEPS, UNITS)))


def test_mistakes_at_construction() -> None:
    with pytest.raises(TypeError, match=r"is not an RNNCell of flax.nnx"):
        DropoutCell(nn.LSTMCell(8), fdc.RecurrentDropout())  # pyright: ignore
    with pytest.raises(TypeError, match=r"is not an RNNCell of flax.nnx"):
        RNNCellDropoutWrapper(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))  # pyright: ignore
    with pytest.raises(TypeError, match=r"dropout must be a RecurrentDropout.*got 0.5"):
        DropoutCell(Sum(), 0.5)  # pyright: ignore
    with pytest.raises(TypeError, match=r"rngs must be Rngs, an RngStream or None.*got 3"):
        DropoutCell(Sum(), fdc.RecurrentDropout(), rngs=3)  # pyright: ignore


def test_mistakes_with_the_carry() -> None:
    cell = probe_of(VARIATIONAL)
    with pytest.raises(TypeError, match=r"must be a DropoutCarry, got dict: start with init"):
        cell(cell.cell.initialize_carry(SHAPE), jnp.ones(SHAPE))
    cell.eval()
    carry = cell.initialize_carry(SHAPE)
    cell.train()
    with pytest.raises(ValueError, match=r"made in evaluation and has no masks: call redraw_masks"):
        cell(carry, jnp.ones(SHAPE))
    cell(cell.redraw_masks(carry, SHAPE), jnp.ones(SHAPE))


# TensorFlow's names


def wrap(cell: Any, *args: Any, **options: Any) -> RNNCellDropoutWrapper:
    return RNNCellDropoutWrapper(cell, *args, **options, rngs=nnx.Rngs(dropout=0))


def visit_memories(state: Any) -> Any:
    return (True, False) if isinstance(state, tuple) else True


@pytest.mark.parametrize("cell_class", CELLS)
@pytest.mark.parametrize("variational", [True, False])
def test_wrapper_is_a_dropout_cell(cell_class: Any, variational: bool) -> None:
    """TensorFlow's order of arguments: input, output, state, variational."""
    noise = functools.partial(fdc.Dropout, variational=variational, broadcast_dims=(0,))
    state = (None, noise(0.5)) if "LSTM" in cell_class.__name__ else noise(0.5)
    spec = fdc.RecurrentDropout(input=noise(0.9), output=noise(0.8), state=state)
    cell = cell_class(3, 8, rngs=nnx.Rngs(0))
    wrapper = wrap(cell, 0.9, 0.8, 0.5, variational, 3, jnp.float32, broadcast_dims=[0])
    theirs = DropoutCell(cell, spec, rngs=nnx.Rngs(dropout=0))
    carry, ys = nnx.RNN(wrapper, return_carry=True)(inputs())
    assert_same((carry, ys), nnx.RNN(theirs, return_carry=True)(inputs()))
    zeros = np.asarray(ys == 0)
    assert zeros.any()
    assert (zeros == zeros[:1]).all()  # one mask for the batch
    assert (zeros == zeros[:, :1]).all() == variational
    _, again = nnx.RNN(wrapper, return_carry=True)(inputs())
    assert differ(ys == 0, again == 0)


def test_wrapper_keeps_everything_by_default() -> None:
    cell = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    assert_same(nnx.RNN(wrap(cell))(inputs()), nnx.RNN(cell)(inputs()))
    carry = wrap(cell).initialize_carry((BATCH, 3), nnx.Rngs(0))
    assert not jax.tree.leaves(carry.masks) and carry.rng is None
    assert isinstance(carry, DropoutCarry)


def test_wrapper_evaluates() -> None:
    cell = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    plain = nnx.RNN(cell)(inputs())
    off = RNNCellDropoutWrapper(cell, 0.5, 0.5, 0.5, deterministic=True)
    assert_same(nnx.RNN(off)(inputs()), plain)
    on = nnx.RNN(wrap(cell, 0.5, 0.5, 0.5))
    on.eval()
    assert_same(on(inputs()), plain)
    on.train()
    assert differ(on(inputs()), plain)


def test_visitor_says_which_state_is_dropped() -> None:
    cell = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    for visitor, wanted in (
        (None, (False, True)),
        (visit_memories, (True, False)),
        (lambda _: True, (True, True)),
    ):
        wrapper = wrap(
            cell,
            state_keep_prob=0.5,
            variational_recurrent=True,
            dropout_state_filter_visitor=visitor,
        )
        carry = wrapper.initialize_carry((BATCH, 3), nnx.Rngs(0))
        found = tuple(mask is not None for mask in carry.masks.state)
        assert found == wanted
    with pytest.raises(TypeError, match="returned 1 for an array"):
        bad = wrap(
            cell,
            state_keep_prob=0.5,
            dropout_state_filter_visitor=lambda s: 1 if isinstance(s, jax.Array) else True,
        )
        bad.initialize_carry((BATCH, 3), nnx.Rngs(0))


def test_seed_is_folded_into_the_stream() -> None:
    def masks(seed: int | None, rngs: int = 0) -> Any:
        wrapper = RNNCellDropoutWrapper(
            Sum(), 0.5, 1.0, 0.5, True, seed=seed, rngs=nnx.Rngs(dropout=rngs)
        )
        calls = [wrapper.initialize_carry(SHAPE).masks.input for _ in range(2)]
        assert differ(*calls)
        return calls[0]

    for one, other in itertools.combinations([None, 0, 1, -1, 2**32], 2):
        assert differ(masks(one), masks(other)), (one, other)
    assert_same(masks(3), masks(3))
    assert differ(masks(3), masks(3, rngs=1))


def test_wrapper_checks_what_arrives() -> None:
    cell = Sum(3)
    x = jnp.ones((BATCH, STEPS, 3))
    nnx.RNN(wrap(cell, input_size=3, dtype=jnp.float32))(x)
    with pytest.raises(ValueError, match=r"input_size is 4, but an input of shape \(4, 3\)"):
        nnx.RNN(wrap(cell, input_size=4))(x)
    with pytest.raises(TypeError, match=r"dtype is bfloat16, but a float32 input arrived"):
        nnx.RNN(wrap(cell, dtype=jnp.bfloat16))(x)
    with pytest.raises(ValueError, match=r"input_keep_prob must be between 0 and 1, got 1.5"):
        wrap(cell, 1.5)
    with pytest.raises(TypeError, match=r"state_keep_prob must be a number in \[0, 1\].*'half'"):
        wrap(cell, state_keep_prob="half")
    with pytest.raises(TypeError, match=r"seed must be an int or None, got 1.0"):
        wrap(cell, seed=1.0)
    with pytest.raises(TypeError, match=r"dropout_state_filter_visitor must be callable, got 3"):
        wrap(cell, dropout_state_filter_visitor=3)
    with pytest.raises(ValueError, match="RNNCellDropoutWrapper needs a 'dropout' stream"):
        nnx.RNN(RNNCellDropoutWrapper(cell, 0.5))(x)


def test_traced_keep_probs_do_not_retrace() -> None:
    traces = 0

    @nnx.jit
    def run(rnn: nnx.RNN, x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return rnn(x)

    cell = wrap(Sum(), jnp.float32(1.0))
    rnn = nnx.RNN(cell)
    for keep_prob in (1.0, 0.5):
        cell.input_keep_prob = jnp.float32(keep_prob)
        ys = run(rnn, jnp.ones((BATCH, STEPS, UNITS)))
        assert set(np.unique(ys)) == ({1.0} if keep_prob == 1 else {0.0, 2.0})
    assert traces == 1


class Sized(Sum):
    state_size = "theirs"
    output_size = "their own"

    def zero_state(self, batch_size: int, dtype: Any) -> Any:
        return batch_size, dtype


def test_sizes_and_states() -> None:
    cell = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    wrapper = wrap(cell, 0.5, 0.5, 0.5)
    assert wrapper.wrapped_cell is cell
    assert wrapper.state_size == (8, 8)
    assert wrapper.output_size == 8
    assert draws_of(wrapper.rngs) == 0
    for state in (
        wrapper.zero_state(5, jnp.bfloat16),
        wrapper.get_initial_state(batch_size=5, dtype=jnp.bfloat16),
        wrapper.get_initial_state(jnp.ones((5, 3), jnp.bfloat16)),
    ):
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), state) == (
            ((5, 8), "bfloat16"),
            ((5, 8), "bfloat16"),
        )
        assert not any(leaf.any() for leaf in state)
    carry = wrapper.redraw_masks(wrapper.zero_state(BATCH, jnp.float32), (BATCH, 3))
    nnx.RNN(wrapper)(inputs(), initial_carry=carry)

    nested = wrap(DropoutCell(cell, MIXED))
    assert nested.output_size == 8
    assert nested.zero_state(2, jnp.float32).masks is None
    assert nested.state_size == DropoutCarry((8, 8), None, None)

    sized = wrap(Sized())
    assert (sized.state_size, sized.output_size) == ("theirs", "their own")
    assert sized.zero_state(3, "f") == (3, "f")
    assert wrap(Probe(7), input_size=7).state_size == {"a": 7, "b": 7}
    with pytest.raises(ValueError, match="has no in_features; give input_size"):
        _ = wrap(Probe(7)).state_size
    with pytest.raises(ValueError, match="batch_size is 4, but inputs have a batch of 5"):
        wrapper.get_initial_state(jnp.ones((5, 3)), batch_size=4)
    with pytest.raises(ValueError, match="give inputs, or batch_size and dtype"):
        wrapper.get_initial_state()


def test_config_round_trip() -> None:
    cell = nnx.LSTMCell(3, 8, activation_fn=jnp.sin, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    wrapper = wrap(
        cell, 0.5, 0.6, jnp.float32(0.5), True, 3, jnp.float32, 7, visit_memories, (0,), True
    )
    config = wrapper.get_config()
    twin = RNNCellDropoutWrapper.from_config(json.loads(json.dumps(config)), rngs=nnx.Rngs(0))
    assert twin.get_config() == config
    assert config["seed"] == 7 and config["deterministic"] is True
    assert config["cell"]["config"] == {
        "in_features": 3,
        "hidden_features": 8,
        "activation_fn": {"import_path": "jax.numpy:sin"}
        if jnp.sin.__module__ == "jax.numpy"
        else {"import_path": f"{jnp.sin.__module__}:sin"},
        "param_dtype": {"dtype": "bfloat16"},
    }
    inner: Any = twin.wrapped_cell
    assert inner.activation_fn is jnp.sin
    assert inner.hi.kernel[...].dtype == jnp.bfloat16
    twin.train()
    assert nnx.RNN(twin)(inputs()).shape == (BATCH, STEPS, 8)


def test_config_of_nested_wrappers() -> None:
    wrapper = wrap(wrap(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)), 0.5), 0.25)
    twin = RNNCellDropoutWrapper.from_config(wrapper.get_config(), rngs=nnx.Rngs(0))
    inner: Any = twin.wrapped_cell
    assert (twin.input_keep_prob, inner.input_keep_prob) == (0.25, 0.5)
    assert twin.rngs is not None and inner.rngs is not None


class Forgetful(Sum):
    def __init__(self, width: int) -> None:
        super().__init__(width)


def test_what_a_config_cannot_hold() -> None:
    config = wrap(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0))).get_config()
    with pytest.raises(ValueError, match=r"GRUCell needs a key.*rngs=nnx.Rngs\(0\) to from_config"):
        RNNCellDropoutWrapper.from_config(config)
    with pytest.raises(ValueError, match="has no import path"):
        wrap(Sum(), dropout_state_filter_visitor=lambda _: True).get_config()
    with pytest.raises(ValueError, match="Forgetful needs width and has no attribute of that name"):
        wrap(Forgetful(3)).get_config()
    with pytest.raises(ValueError, match="input_keep_prob is traced"):
        nnx.jit(lambda wrapper: wrapper.get_config() and 0)(wrap(Sum(), jnp.float32(0.5)))
    plain = RNNCellDropoutWrapper.from_config(wrap(Sum(3)).get_config())  # has no weights
    assert plain.wrapped_cell.in_features == 3  # pyright: ignore


def test_input_sizes_of_any_structure_are_hashed() -> None:
    wrapper = wrap(Sum(), input_size={"a": 3, "b": [4]})
    assert wrapper.input_size == {"a": 3, "b": [4]}
    assert nnx.jit(lambda wrapper: wrapper.input_size["a"])(wrapper) == 3
    assert hash(nnx.split(wrapper)[0]) == hash(nnx.split(nnx.clone(wrapper))[0])
