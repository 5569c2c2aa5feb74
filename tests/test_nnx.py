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
NOTHING = {"params": None, "input": None, "state": None, "output": None}
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

    def __init__(self, in_features: int = UNITS) -> None:
        self.in_features = in_features

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        return carry + inputs, inputs

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.zeros(input_shape)

    @property
    def num_feature_axes(self) -> int:
        return 1


class TwoOutputs(Sum):
    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        return carry, {"a": jnp.ones_like(inputs), "b": inputs}


def probe_of(noise: fdc.Noise | None, seed: Any = 0, **options: Any) -> DropoutCell:
    return DropoutCell(Probe(), probes.spec_of(noise), rngs=nnx.Rngs(dropout=seed), **options)


def rnn_of(cell: Any, **options: Any) -> Any:
    return nnx.RNN(cell, **options)


def start(cell: Any, features: int = UNITS) -> Any:
    return cell.initialize_carry((BATCH, features), nnx.Rngs(0))


def in_rnn(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    return rnn_of(cell, time_major=True, return_carry=True)(xs)


def in_both_directions(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    other = DropoutCell(Probe(), cell.dropout, cell.deterministic, rngs=nnx.Rngs(dropout=1))
    both: Any = nnx.Bidirectional(
        rnn_of(cell), rnn_of(other), merge_fn=lambda *ys: jnp.stack(ys), return_carry=True
    )
    return both(xs, time_major=True)


def in_bidirectional(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    carries, ys = in_both_directions(cell, xs)
    return carries[0], jax.tree.map(lambda leaf: leaf[0], ys)


def in_scan(cell: Any, xs: jax.Array, axes: Any = None) -> tuple[Any, Any]:
    carry = start(cell, xs.shape[-1])
    scan: Any = nnx.scan(
        lambda cell, carry, x: cell(carry, x),
        in_axes=(axes, nnx.Carry, 0),
        out_axes=(nnx.Carry, 0),
    )
    return scan(cell, carry, xs)


def in_scan_that_carries_the_state(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    return in_scan(cell, xs, nnx.StateAxes({...: nnx.Carry}))


def in_lax_scan(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    return jax.lax.scan(lambda carry, x: cell(carry, x), start(cell, xs.shape[-1]), xs)


def in_python_loop(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    carry, outputs = start(cell, xs.shape[-1]), []
    for x in xs:
        carry, y = cell(carry, x)
        outputs.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


Host = Callable[[Any, jax.Array], tuple[Any, Any]]

HOSTS: dict[str, Host] = {
    "nnx.RNN": in_rnn,
    "nnx.Bidirectional": in_bidirectional,
    "nnx.scan": in_scan,
    "python loop": in_python_loop,
}
all_hosts = pytest.mark.parametrize("host", HOSTS)


compiled: Any = functools.cache(nnx.jit)


def look(host: Any, cell: Any) -> dict[str, np.ndarray]:
    """The masks of a call, compiled but for the Python loop."""
    carry, ys = (host if host is in_python_loop else compiled(host))(cell, probes.ones())
    return jax.tree.map(np.asarray, probes.seen(carry.cell_carry, ys))


@functools.cache
def look_twice(host: str, noise: fdc.Noise) -> tuple[dict[str, np.ndarray], ...]:
    """The masks of two calls of one module, each of which draws one key."""
    cell = probe_of(noise)
    runs = []
    for calls in (1, 2):
        runs.append(look(HOSTS[host], cell))
        assert draws_of(cell) == calls
    return tuple(runs)


def differ(a: Any, b: Any) -> bool:
    """Two masks of half ones: equal only by chance, once in 2**64 for the smallest here."""
    return bool((np.asarray(a) != np.asarray(b)).any())


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a: Any, b: Any) -> None:
    """Up to the rounding of a cell's own sums, which a compiler may order as it likes."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def draws_of(cell: Any) -> int:
    """How many keys the cell's stream has given."""
    return int(cell.rngs.count[...])


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


@both_modes
def test_compiling_changes_nothing(noise: fdc.Dropout) -> None:
    carry, ys = in_rnn(probe_of(noise), probes.ones())
    assert_same(probes.seen(carry.cell_carry, ys), look_twice("nnx.RNN", noise)[0])


@both_modes
def test_every_host_draws_the_same(noise: fdc.Dropout) -> None:
    for host in HOSTS:
        assert_same(look_twice(host, noise)[0], look_twice("nnx.RNN", noise)[0])


@both_modes
def test_directions_have_masks_of_their_own(noise: fdc.Dropout) -> None:
    _, ys = compiled(in_both_directions)(probe_of(noise), probes.ones())
    for site in ("params", "input", "output"):
        forward, backward = ys[site]
        assert (backward == backward[:1]).all() == noise.variational
        for s, t in itertools.product(range(STEPS), repeat=2):
            assert differ(forward[s], backward[t]), site


@pytest.mark.parametrize("host", [in_scan_that_carries_the_state, in_lax_scan])
def test_other_loops(host: Host) -> None:
    """The module's state in the carry, and the functional loop around a module from outside."""
    spec = fdc.RecurrentDropout(params=VARIATIONAL, output={**NOTHING, "output": PER_STEP})
    nested = DropoutCell(Probe(), fdc.RecurrentDropout(params=VARIATIONAL), rngs=nnx.Rngs(0))
    cell = DropoutCell(nested, spec, rngs=nnx.Rngs(1))
    _, ys = host(cell, probes.ones())
    assert set(np.unique(ys["params"])) == {0.0, 4.0}
    assert (ys["params"] == ys["params"][:1]).all()
    for s, t in itertools.combinations(range(STEPS), 2):
        assert differ(ys["output"][s], ys["output"][t])
    assert draws_of(cell) == draws_of(nested) == 1


@both_modes
def test_layers_have_masks_of_their_own(noise: fdc.Dropout) -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> Any:
        return rnn_of(DropoutCell(Sum(), fdc.RecurrentDropout(input=noise), rngs=rngs))

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
    def run(layer: Any, x: jax.Array) -> Any:
        return x, layer(x)

    layers = make(nnx.Rngs(0))
    call: Any = run
    _, first = call(layers, jnp.ones((BATCH, STEPS, UNITS)))
    _, second = call(layers, jnp.ones((BATCH, STEPS, UNITS)))
    runs = [*first, *second]
    for one, other in itertools.combinations(runs, 2):
        assert differ(one[:, 0], other[:, 0])
    for one in runs:
        assert differ(one[:, :1], one) is not noise.variational
    assert layers.cell.rngs.count[...].tolist() == [2, 2, 2]


# Where the randomness comes from


def test_steps_draw_no_key() -> None:
    cell = probe_of(PER_STEP)
    carry = start(cell)
    for _ in range(2):
        assert draws_of(cell) == 1
        carry, _ = cell(carry, jnp.ones(SHAPE))
    assert draws_of(cell) == 1


def test_the_stream_is_forked_as_dropout_forks_it() -> None:
    for make in (lambda: nnx.Rngs(dropout=3), lambda: nnx.Rngs(3), lambda: nnx.Rngs(3).dropout):
        theirs, ours = make(), make()
        stream: Any = nnx.Dropout(0.5, rngs=theirs).rngs
        cell = DropoutCell(Sum(), fdc.RecurrentDropout(), rngs=ours)
        assert next_key(cell) == stream()
        assert cell.rngs is not None and cell.rngs.tag == stream.tag
        assert_same(*(jax.tree.leaves(nnx.state(rngs, nnx.RngCount)) for rngs in (theirs, ours)))


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
    cell = DropoutCell(Sum(), fdc.RecurrentDropout(input=VARIATIONAL), rngs=nnx.Rngs(0))
    twin = nnx.clone(cell)
    x = jnp.ones((BATCH, 1, UNITS))
    first = rnn_of(cell)(x)
    assert differ(first, rnn_of(cell)(x))
    assert_same(first, rnn_of(twin, rngs=nnx.Rngs(7))(x))


def test_the_hosts_stream_is_for_the_cells_own_carry() -> None:
    class Started(Sum):
        def initialize_carry(
            self, input_shape: Any, rngs: Any = None, carry_init: Any = None
        ) -> Any:
            return jnp.full(input_shape, rngs if carry_init is None else carry_init)

    cell: Any = DropoutCell(Started(), fdc.RecurrentDropout(input=VARIATIONAL), rngs=nnx.Rngs(0))
    assert (cell.initialize_carry(SHAPE, 3.0).cell_carry == 3).all()
    assert (cell.initialize_carry(SHAPE, None, 4.0).cell_carry == 4).all()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_every_kind_of_key(make_key: Any, impl: str) -> None:
    spec = fdc.RecurrentDropout(input=VARIATIONAL, output={"a": PER_STEP, "b": None})
    with jax.default_prng_impl(impl):
        cell = DropoutCell(TwoOutputs(), spec, rngs=nnx.Rngs(dropout=make_key(0)))
        rnn = rnn_of(cell, time_major=True, return_carry=True)
        carry, first = rnn(probes.ones(), seq_lengths=jnp.full(BATCH, STEPS))
        _, second = rnn(probes.ones(), initial_carry=carry)
    assert jax.random.key_impl(cell.rngs.key[...]) == impl  # pyright: ignore
    frozen, fresh = (jnp.concatenate([first[name], second[name]]) for name in "ba")
    assert set(np.unique(frozen)) == set(np.unique(fresh)) == {0.0, 2.0}
    assert (frozen == frozen[:1]).all()
    for s, t in itertools.combinations(range(2 * STEPS), 2):
        assert differ(fresh[s], fresh[t])


def test_gradients_move_the_stream_too() -> None:
    rnn = rnn_of(DropoutCell(Probe(), fdc.RecurrentDropout(params=VARIATIONAL), rngs=nnx.Rngs(0)))

    def loss(rnn: Any) -> Any:
        return jnp.sum(rnn(jnp.ones((BATCH, STEPS, UNITS)))["params"])

    transforms: list[Any] = [
        nnx.grad(loss),
        nnx.jit(nnx.grad(loss)),
        nnx.grad(nnx.remat(loss)),
        lambda rnn: nnx.value_and_grad(loss)(rnn)[1],
    ]
    masks = []
    for calls, grad in enumerate(transforms, start=1):
        (mask,) = jax.tree.leaves(grad(rnn))  # d/dw of the sum of w * mask / keep_prob
        assert set(np.unique(mask)) == {0.0, 2.0 * STEPS * BATCH}
        assert draws_of(rnn.cell) == calls
        masks.append(mask)
    for one, other in itertools.combinations(masks, 2):
        assert differ(one, other)


def test_a_key_from_outside_of_a_transform_is_flaxs_error() -> None:
    """A stream that is closed over would give every call the same key."""
    cell = probe_of(VARIATIONAL)
    with pytest.raises(Exception, match="trace level"):
        jax.jit(lambda: start(cell))()


def random_primitives(jaxpr: Any, in_loop: bool = False) -> Iterator[tuple[str, bool]]:
    """The names of what draws in a program, and whether it does so in the loop over time."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name.startswith(("random_", "threefry")):
            yield eqn.primitive.name, in_loop
        over_time = eqn.primitive.name == "scan" and eqn.params["length"] == STEPS
        for leaf in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            if hasattr(leaf, "eqns"):
                yield from random_primitives(leaf, in_loop or over_time)


@pytest.mark.parametrize("host", ["nnx.RNN", "nnx.Bidirectional", "nnx.scan"])
@both_modes
def test_variational_masks_cost_the_loop_no_randomness(host: str, noise: fdc.Dropout) -> None:
    graphdef, state = nnx.split(probe_of(noise))
    jaxpr: Any = jax.make_jaxpr(lambda state, xs: HOSTS[host](nnx.merge(graphdef, state), xs))(
        state, probes.ones()
    )
    found = set(random_primitives(jaxpr.jaxpr))
    assert ("random_bits", False) in found or not noise.variational
    assert any(in_loop for _, in_loop in found) is not noise.variational, found


# Evaluation


def evaluate_by_eval(cell: DropoutCell) -> Any:
    rnn_of(cell).eval()
    return cell


def evaluate_by_view(cell: DropoutCell) -> Any:
    if not hasattr(nnx, "view"):
        pytest.skip("this Flax has no nnx.view")
    view = nnx.view(rnn_of(cell), deterministic=True)
    assert cell.deterministic is False
    return view.cell


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
    assert draws_of(evaluated) == 0
    rnn_of(evaluated).train()
    assert_same(look(in_rnn, evaluated), look_twice("nnx.RNN", noise)[0])


def test_a_training_carry_in_evaluation_keeps_its_masks() -> None:
    cell = probe_of(VARIATIONAL)
    carry = start(cell)
    cell.eval()
    after, ys = cell(carry, jnp.ones(SHAPE))
    assert (ys["input"] == 1).all()
    assert_same(after.masks, carry.masks)


def test_params_are_undisturbed_in_evaluation_whatever_the_prefix() -> None:
    cell = DropoutCell(Probe(), fdc.RecurrentDropout(params={"w": VARIATIONAL}), deterministic=True)
    _, y = cell(start(cell), jnp.ones(SHAPE))
    assert (y["params"] == 1).all()


# Windows, padding, new masks on an old state


def wrapped(cell_class: Any, spec: fdc.RecurrentDropout) -> Any:
    rngs = nnx.Rngs(params=0, dropout=1)
    return DropoutCell(cell_class(3, 8, rngs=rngs), spec, rngs=rngs)


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(5), (BATCH, STEPS, 3))


def run_rnn(rnn: Any, x: jax.Array, carry: Any = None) -> Any:
    return rnn(x, initial_carry=carry, return_carry=True)


def test_a_sequence_that_is_cut_is_the_uncut_one() -> None:
    spec = fdc.RecurrentDropout(input=VARIATIONAL, state=PER_STEP, params=VARIATIONAL)
    whole_carry, whole = compiled(run_rnn)(rnn_of(wrapped(nnx.SimpleCell, spec)), inputs())
    rnn = rnn_of(wrapped(nnx.SimpleCell, spec))
    carry, first = compiled(run_rnn)(rnn, inputs()[:, :2])
    carry, second = compiled(run_rnn)(rnn, inputs()[:, 2:], carry)
    assert_same(jnp.concatenate([first, second], axis=1), whole)
    assert_same(carry._replace(rng=None), whole_carry._replace(rng=None))
    assert carry.rng.key[0] == whole_carry.rng.key[0]
    assert carry.rng.step.tolist() == [STEPS]
    assert draws_of(rnn.cell) == 1


@both_modes
def test_a_second_window_goes_on_with_the_masks_of_the_first(noise: fdc.Dropout) -> None:
    rnn = rnn_of(DropoutCell(Sum(), fdc.RecurrentDropout(input=noise), rngs=nnx.Rngs(0)))
    x = jnp.ones((BATCH, STEPS, UNITS))
    carry, first = run_rnn(rnn, x)
    _, second = run_rnn(rnn, x, carry)
    for s, t in itertools.product(range(STEPS), repeat=2):
        assert differ(first[:, s], second[:, t]) is not noise.variational


@both_modes
def test_redraw_masks_keeps_the_state_and_nothing_else(noise: fdc.Dropout) -> None:
    cell: Any = probe_of(noise)
    carry, _ = cell(start(cell), jnp.ones(SHAPE))
    fresh: Any = cell.redraw_masks(carry, SHAPE)
    assert draws_of(cell) == 2
    assert_same(fresh.cell_carry, carry.cell_carry)
    old_masks, masks = jax.tree.leaves(carry.masks), jax.tree.leaves(fresh.masks)
    assert len(masks) == (5 if noise.variational else 0)
    for mask, old in zip(masks, old_masks, strict=True):
        assert differ(mask, old)
    if not noise.variational:
        assert fresh.rng.key[0] != carry.rng.key[0]
        assert fresh.rng.step.tolist() == [0]
    of_the_cell = cell.redraw_masks(carry.cell_carry, SHAPE)
    assert_same(of_the_cell.cell_carry, carry.cell_carry)
    cell(of_the_cell, jnp.ones(SHAPE))


@both_modes
def test_padded_rows_keep_the_carry_of_their_last_step(noise: fdc.Dropout) -> None:
    """`nnx.RNN` takes every leaf of the carry at [length - 1, row]."""
    spec = fdc.RecurrentDropout(
        params={"w": noise},
        input=noise,
        state={
            "a": fdc.Dropout(keep_prob=0.5, variational=noise.variational, broadcast_dims=(0,)),
            "b": noise,
        },
    )
    lengths = jnp.array([3, 1, STEPS, 2])
    cell = DropoutCell(Probe(), spec, rngs=nnx.Rngs(0))
    rnn = rnn_of(cell, time_major=True)
    first = carry = start(cell)
    history = []
    for x in probes.ones():
        carry, _ = cell(carry, x)
        history.append(carry)
    padded = rnn(probes.ones(), initial_carry=first, seq_lengths=lengths)
    last, ys = rnn(probes.ones(), initial_carry=first, seq_lengths=lengths, return_carry=True)
    assert_same(ys, padded)
    for row, length in enumerate(lengths.tolist()):
        for name in "ab":
            assert_same(last.cell_carry[name][row], history[length - 1].cell_carry[name][row])
    if noise.variational:
        assert_same(last.masks.input, first.masks.input)
        assert_same(last.masks.state["a"], jnp.broadcast_to(first.masks.state["a"], SHAPE))
    else:
        assert last.rng.step.tolist() == lengths.tolist()

    # A next window goes on from there; where rows differ, the furthest step sets the pace.
    after, zs = rnn(probes.ones(), initial_carry=last, return_carry=True)
    for site in ("params", "input"):
        for s, t in itertools.product(range(STEPS), repeat=2):
            assert differ(zs[site][t], ys[site][s]) is not noise.variational
    if not noise.variational:
        assert after.rng.step.tolist() == [2 * STEPS] * BATCH


def test_padded_rows_of_a_reversed_sequence() -> None:
    lengths = jnp.array([3, 1, STEPS, 2])
    cell = wrapped(nnx.SimpleCell, fdc.RecurrentDropout(input=VARIATIONAL, state=PER_STEP))
    carry = start(cell, 3)
    last, _ = rnn_of(cell)(
        inputs(), initial_carry=carry, seq_lengths=lengths, reverse=True, return_carry=True
    )
    step = compiled(lambda cell, carry, x: cell(carry, x))
    for row, length in enumerate(lengths.tolist()):
        alone = carry
        for t in reversed(range(length)):
            alone, _ = step(cell, alone, inputs()[:, t])
        assert_close(last.cell_carry[row], alone.cell_carry[row])


# Cells and numbers


@pytest.mark.parametrize(
    ("cell_class", "params", "state"),
    [
        (nnx.LSTMCell, None, (None, PER_STEP)),
        (nnx.OptimizedLSTMCell, None, (PER_STEP, VARIATIONAL)),
        (nnx.SimpleCell, VARIATIONAL, VARIATIONAL),
        (nnx.GRUCell, None, PER_STEP),
    ],
)
def test_a_host_gives_the_numbers_of_dropout_scan(cell_class: Any, params: Any, state: Any) -> None:
    spec = fdc.RecurrentDropout(input=VARIATIONAL, output=PER_STEP, state=state, params=params)
    cell = wrapped(cell_class, spec)
    key = next_key(cell)
    graphdef, weights, rest = nnx.split(cell.cell, nnx.Param, ...)
    scan = jax.jit(
        lambda: fdc.dropout_scan(
            weights,
            start(cell.cell, 3),
            jnp.swapaxes(inputs(), 0, 1),
            key,
            cell=lambda weights, carry, x: nnx.merge(graphdef, weights, rest)(carry, x),
            dropout=spec,
        )
    )
    carry, ys = scan()
    got_carry, got = run_rnn(rnn_of(cell), inputs())
    got = jnp.swapaxes(got, 0, 1)
    assert_same(got == 0, ys == 0)
    assert_close((got_carry.cell_carry, got), (carry, ys))


@both_modes
def test_the_masks_are_those_of_dropout_scan(noise: fdc.Dropout) -> None:
    """Bit for bit: a probe computes nothing."""
    key = next_key(probe_of(noise))
    run = probes.run_dropout_scan(probes.spec_of(noise), key, probes.ones())
    assert_same(look_twice("nnx.RNN", noise)[0], run.seen)


@pytest.mark.parametrize("variational", [True, False], ids=["variational", "step"])
def test_linen_and_nnx_agree(variational: bool) -> None:
    """One carry, one set of weights, one answer."""
    ours = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    weights = {
        name.rstrip("_"): jax.tree.map(lambda leaf: leaf + 0.1, layer)
        for name, layer in nnx.to_pure_dict(nnx.state(ours, nnx.Param)).items()
    }
    nnx.update(ours, {name + "_" * (name == "if"): layer for name, layer in weights.items()})
    noise = fdc.Dropout(keep_prob=0.7, variational=variational)
    params = noise if variational else None
    spec = fdc.RecurrentDropout(input=noise, state=noise, output=noise, params=params)
    cell: Any = DropoutCell(ours, spec, rngs=nnx.Rngs(0))
    carry = their_carry = start(cell, 3)
    if variational:
        renamed = {name.rstrip("_"): mask for name, mask in carry.masks.params.items()}
        their_carry = carry._replace(masks=carry.masks._replace(params=renamed))
    agree(cell, linen.DropoutCell(nn.LSTMCell(8), spec), weights, carry, their_carry)


def test_linen_and_nnx_wrappers_agree() -> None:
    ours = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    weights = {
        name.rstrip("_"): layer
        for name, layer in nnx.to_pure_dict(nnx.state(ours, nnx.Param)).items()
    }
    args = (0.5, 0.6, 0.7, True)
    cell: Any = RNNCellDropoutWrapper(ours, *args, seed=3, rngs=nnx.Rngs(0))
    carry = start(cell, 3)
    theirs = linen.RNNCellDropoutWrapper(nn.LSTMCell(8), *args, seed=3)
    agree(cell, theirs, weights, carry, carry)


def agree(ours: Any, theirs: Any, weights: Any, carry: Any, their_carry: Any) -> None:
    last, ys = run_rnn(rnn_of(ours), inputs(), carry)
    rnn: Any = nn.RNN(theirs, return_carry=True)
    variables = {"params": {"cell": weights}}
    their_last, their_ys = rnn.apply(variables, inputs(), initial_carry=their_carry)
    assert_same(ys == 0, their_ys == 0)
    assert (ys == 0).any()
    assert_close((last.cell_carry, ys), (their_last.cell_carry, their_ys))


class MyLSTM(nnx.LSTMCell):
    pass


@pytest.mark.parametrize("cell_class", [nnx.LSTMCell, nnx.OptimizedLSTMCell, MyLSTM])
def test_one_noise_for_an_lstms_state_means_h(cell_class: Any) -> None:
    cell = cell_class(3, 8, rngs=nnx.Rngs(0))
    spec = fdc.RecurrentDropout(state=VARIATIONAL)
    nested = DropoutCell(cell, fdc.RecurrentDropout(), rngs=nnx.Rngs(0))
    for state in (
        start(DropoutCell(cell, spec, rngs=nnx.Rngs(0)), 3).masks.state,
        start(DropoutCell(nested, spec, rngs=nnx.Rngs(0)), 3).masks.state.cell_carry,
    ):
        assert state[0] is None
        assert state[1].shape == (BATCH, 8)
    both = fdc.RecurrentDropout(state=(VARIATIONAL, VARIATIONAL))
    c, h = start(DropoutCell(cell, both, rngs=nnx.Rngs(0)), 3).masks.state
    assert differ(c, h)


class Stack(nnx.RNNCellBase):
    """A user's own stacked cell, whose layers drop out by themselves."""

    def __init__(self, noise: fdc.Dropout, rngs: nnx.Rngs) -> None:
        spec = fdc.RecurrentDropout(output=noise)
        self.first: Any = DropoutCell(Sum(), spec, rngs=rngs)
        self.second: Any = DropoutCell(Sum(), spec, rngs=rngs)

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
    rnn = rnn_of(Stack(noise, nnx.Rngs(0)), time_major=True)
    layers = [ys[:, layer] for ys in (rnn(probes.ones()), rnn(probes.ones())) for layer in (0, 1)]
    for ys in layers:
        assert set(np.unique(ys)) == {0.0, 2.0}
        assert (ys[1:] == ys[:1]).all() == noise.variational
    for one, other in itertools.combinations(layers, 2):
        assert differ(one[0], other[0])


def test_one_noise_over_a_cell_that_holds_dropout_cells() -> None:
    spec = fdc.RecurrentDropout(state=VARIATIONAL)
    with pytest.raises(ValueError, match="would reach the memory c of the DropoutCell that it"):
        start(DropoutCell(Stack(PER_STEP, nnx.Rngs(0)), spec, rngs=nnx.Rngs(0)))


@both_modes
def test_wrappers_nest(noise: fdc.Dropout) -> None:
    spec = fdc.RecurrentDropout(input=noise, state=noise)
    inner = DropoutCell(Sum(), spec, rngs=nnx.Rngs(1))
    outer = DropoutCell(inner, spec, rngs=nnx.Rngs(2))
    rnn = rnn_of(outer)
    x = jnp.ones((BATCH, STEPS, UNITS))
    carry, ys = run_rnn(rnn, x)
    assert set(np.unique(ys)) == {0.0, 4.0}  # both have to keep a unit
    assert (ys[:, 1:] == ys[:, :1]).all() == noise.variational
    assert draws_of(inner) == draws_of(outer) == 1
    fresh: Any = outer.redraw_masks(carry, SHAPE)
    assert draws_of(inner) == draws_of(outer) == 2
    assert_same(fresh.cell_carry.cell_carry, carry.cell_carry.cell_carry)
    if noise.variational:
        for other in (start(outer), fresh):
            assert differ(carry.masks.input, other.masks.input)
            assert differ(carry.masks.state.cell_carry, other.masks.state.cell_carry)
            assert differ(carry.cell_carry.masks.input, other.cell_carry.masks.input)
            assert differ(carry.cell_carry.masks.state, other.cell_carry.masks.state)
    rnn.eval()
    _, ys = run_rnn(rnn, x)
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


@pytest.mark.parametrize("host", [in_rnn, in_scan_that_carries_the_state, in_python_loop])
def test_disturbed_weights_leave_the_cell_as_it_was(host: Host) -> None:
    spec = fdc.RecurrentDropout(params=VARIATIONAL)
    cell: Any = DropoutCell(Counting(), spec, rngs=nnx.Rngs(0))
    _, ys = host(cell, probes.ones())
    assert (ys["params"] == 0).any()
    assert (cell.cell.w[...] == 1).all()
    assert int(cell.cell.steps[...]) == STEPS  # what else the cell writes stays


def test_tracing_for_shapes_leaves_the_cell_as_it_was() -> None:
    spec = fdc.RecurrentDropout(output={**NOTHING, "output": VARIATIONAL})
    inner: Any = DropoutCell(Counting(), spec, rngs=nnx.Rngs(0))
    start(DropoutCell(inner, spec, rngs=nnx.Rngs(0)))
    assert int(inner.cell.steps[...]) == 0
    assert draws_of(inner) == 1  # for its own masks
    assert inner.deterministic is False


@pytest.mark.parametrize("cell_class", CELLS)
def test_dropped_weights_get_no_gradient(cell_class: Any) -> None:
    cell = wrapped(cell_class, fdc.RecurrentDropout(params=VARIATIONAL))
    carry = start(cell, 3)

    def loss(cell: Any) -> jax.Array:
        ones = jax.tree.map(jnp.ones_like, carry.cell_carry)
        _, y = cell(carry._replace(cell_carry=ones), inputs()[:, 0])
        return jnp.sum(y**2)

    grads: Any = nnx.jit(nnx.grad(loss))(cell)
    masks = jax.tree.leaves(carry.masks.params)
    for grad, mask in zip(jax.tree.leaves(grads), masks, strict=True):
        assert_same(grad != 0, np.asarray(mask[0]))


def test_a_prefix_of_weights_is_a_plain_dict() -> None:
    spec = fdc.RecurrentDropout(params={"dense_h": {"kernel": VARIATIONAL}, "dense_i": None})
    cell = wrapped(nnx.GRUCell, spec)
    masks = start(cell, 3).masks.params
    assert masks["dense_i"] == {"bias": None, "kernel": None}
    assert masks["dense_h"]["kernel"].shape == (1, 8, 24)
    _, first = compiled(run_rnn)(rnn_of(cell), inputs())
    _, second = compiled(run_rnn)(rnn_of(cell), inputs())
    assert differ(first, second)


# Training


def test_training_steps_do_not_retrace() -> None:
    spec = fdc.RecurrentDropout(
        input=VARIATIONAL, output=PER_STEP, params=fdc.Dropout(keep_prob=0.9)
    )
    model = rnn_of(wrapped(nnx.SimpleCell, spec))
    traces = 0

    def loss(model: Any, x: jax.Array) -> Any:
        nonlocal traces
        traces += 1
        y = model(x)
        return jnp.mean((y - 0.5) ** 2), y == 0

    @nnx.jit
    def train_step(model: Any, x: jax.Array) -> Any:
        (value, dropped), grads = nnx.value_and_grad(loss, has_aux=True)(model, x)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda param, grad: param - 0.3 * grad, params, grads))
        return value, dropped

    step: Any = train_step
    values, dropped = zip(*(step(model, inputs()) for _ in range(30)), strict=True)
    assert traces == 1
    for one, other in itertools.pairwise(dropped):
        assert differ(one, other)
    assert np.mean(values[-5:]) < np.mean(values[:5])
    assert draws_of(model.cell) == 30


def test_a_schedule_does_not_retrace() -> None:
    """Arrays in `dropout` are data of the module, numbers are constants of the program."""
    cell = DropoutCell(Sum(1024), fdc.RecurrentDropout(), rngs=nnx.Rngs(0))
    traces = 0

    @nnx.jit
    def masks(cell: Any) -> Any:
        nonlocal traces
        traces += 1
        _, y = cell(start(cell, 1024), jnp.ones((BATCH, 1024)))
        return y

    for keep_prob in (1.0, 0.25, 0.0):
        noise = fdc.Dropout(keep_prob=jnp.float32(keep_prob), variational=True)
        cell.dropout = fdc.RecurrentDropout(input=noise)
        assert_same(cell.dropout.input.keep_prob, jnp.float32(keep_prob))
        ys: Any = masks(cell)
        assert abs(float((ys != 0).mean()) - keep_prob) < 0.1
        assert keep_prob == 0 or set(np.unique(ys)) <= {0.0, 1 / keep_prob}
    assert traces == 1


def test_a_keep_prob_can_be_a_variable() -> None:
    keep_prob: Any = nnx.Param(jnp.float32(0.5))
    spec = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=keep_prob, variational=True))
    cell = DropoutCell(Sum(), spec, rngs=nnx.Rngs(0))

    def total(cell: Any) -> jax.Array:
        _, y = cell(start(cell), jnp.ones(SHAPE))
        return y.sum()

    value, grads = nnx.value_and_grad(total)(cell)
    # d/dp of kept / p
    np.testing.assert_allclose(jax.tree.leaves(grads), [-value / 0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        nnx.clone,
        lambda model: nnx.merge(*nnx.split(model)),
        lambda model: pickle.loads(pickle.dumps(model)),
    ],
    ids=["deepcopy", "clone", "merge", "pickle"],
)
def test_a_copy_draws_what_the_original_draws(copied: Any) -> None:
    noise = fdc.Dropout(keep_prob=jnp.float32(0.5), variational=True)
    spec = fdc.RecurrentDropout(input=noise, output=PER_STEP)
    cell = DropoutCell(Sum(), spec, rngs=nnx.Rngs(0))
    twin = copied(nnx.clone(cell))  # some copies share the variables that they are made from
    assert twin.dropout == spec
    for _ in range(2):
        assert_same(start(cell).masks, start(twin).masks)
    start(cell)
    nnx.update(twin, nnx.state(cell))
    assert_same(start(nnx.clone(cell)).masks, start(twin).masks)


def test_reseeding_reaches_the_stream() -> None:
    cell = DropoutCell(Sum(), fdc.RecurrentDropout(input=VARIATIONAL), rngs=nnx.Rngs(dropout=0))
    first = start(cell)
    again = []
    for _ in range(2):
        nnx.reseed(cell, dropout=9)
        again.append(start(cell))
    assert_same(*(carry.masks for carry in again))
    assert differ(first.masks.input, again[0].masks.input)


# Mistakes


@pytest.mark.parametrize("rngs", [None, {"params": 0}], ids=["none", "params only"])
@both_modes
def test_training_without_a_stream_says_what_to_pass(rngs: Any, noise: fdc.Dropout) -> None:
    rngs = rngs and nnx.Rngs(**rngs)
    cell = DropoutCell(Sum(), fdc.RecurrentDropout(input=noise), rngs=rngs)
    text = r"DropoutCell needs a 'dropout' stream in training: .*rngs=nnx.Rngs\(dropout=0\)"
    with pytest.raises(ValueError, match=text):
        rnn_of(cell)(jnp.ones((BATCH, STEPS, UNITS)))
    cell.eval()
    start(cell)
    cell.train()
    cell.rngs = nnx.Rngs(0).dropout.fork()
    start(cell)


def test_mistakes_at_construction() -> None:
    mistakes: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
        (DropoutCell, (nn.LSTMCell(8), MIXED), {}, r"is not an RNNCell of flax.nnx: give a cell"),
        (DropoutCell, (nnx.LSTMCell, MIXED), {}, r"is not an RNNCell of flax.nnx"),
        (RNNCellDropoutWrapper, (nnx.Dropout(0.5),), {}, r"is not an RNNCell of flax.nnx"),
        (DropoutCell, (Sum(), 0.5), {}, r"dropout must be a RecurrentDropout.*got 0.5"),
        (DropoutCell, (Sum(), MIXED), {"rngs": 3}, r"rngs must be Rngs, an RngStream.*got 3"),
    ]
    for make, args, options, text in mistakes:
        with pytest.raises(TypeError, match=text):
            make(*args, **options)


def test_mistakes_with_the_carry() -> None:
    cell: Any = probe_of(VARIATIONAL)
    with pytest.raises(TypeError, match=r"must be a DropoutCarry, got dict: start with init"):
        cell(start(cell.cell), jnp.ones(SHAPE))
    cell.eval()
    carry = start(cell)
    cell.train()
    with pytest.raises(ValueError, match=r"made in evaluation and has no masks: call redraw_masks"):
        cell(carry, jnp.ones(SHAPE))
    cell(cell.redraw_masks(carry, SHAPE), jnp.ones(SHAPE))


# TensorFlow's names


def wrap(cell: Any, *args: Any, **options: Any) -> Any:
    return RNNCellDropoutWrapper(cell, *args, **options, rngs=nnx.Rngs(dropout=0))


def visit_memories(state: Any) -> Any:
    return (True, False) if isinstance(state, tuple) else True


@pytest.mark.parametrize(
    ("cell_class", "variational"), [(nnx.OptimizedLSTMCell, True), (nnx.SimpleCell, False)]
)
def test_wrapper_is_a_dropout_cell(cell_class: Any, variational: bool) -> None:
    """TensorFlow's order of arguments: input, output, state, variational."""
    noise = functools.partial(fdc.Dropout, variational=variational, broadcast_dims=(0,))
    state = (None, noise(0.5)) if cell_class is nnx.OptimizedLSTMCell else noise(0.5)
    spec = fdc.RecurrentDropout(input=noise(0.9), output=noise(0.8), state=state)
    cell = cell_class(3, 8, rngs=nnx.Rngs(0))
    wrapper = wrap(cell, 0.9, 0.8, 0.5, variational, 3, jnp.float32, broadcast_dims=[0])
    theirs = DropoutCell(cell, spec, rngs=nnx.Rngs(dropout=0))
    carry, ys = compiled(run_rnn)(rnn_of(wrapper), inputs())
    their_carry, their_ys = compiled(run_rnn)(rnn_of(theirs), inputs())
    assert_same(
        (carry.cell_carry, carry.masks, ys), (their_carry.cell_carry, their_carry.masks, their_ys)
    )
    dropped = np.asarray(ys == 0)
    assert dropped.any()
    assert (dropped == dropped[:1]).all()  # one mask for the batch
    assert (dropped == dropped[:, :1]).all() == variational
    _, again = compiled(run_rnn)(rnn_of(wrapper), inputs())
    assert differ(dropped, again == 0)


def test_wrapper_keeps_everything_by_default() -> None:
    cell = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    carry = start(wrap(cell), 3)
    assert not jax.tree.leaves(carry.masks)
    assert carry.rng is None
    assert_same(rnn_of(wrap(cell))(inputs()), rnn_of(cell)(inputs()))


def test_wrapper_evaluates() -> None:
    cell = nnx.SimpleCell(3, 8, rngs=nnx.Rngs(0))
    plain = rnn_of(cell)(inputs())
    off = RNNCellDropoutWrapper(cell, 0.5, 0.5, 0.5, deterministic=True)
    assert_same(rnn_of(off)(inputs()), plain)
    on = rnn_of(wrap(cell, 0.5, 0.5, 0.5))
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
        wrapper = wrap(cell, 1.0, 1.0, 0.5, True, dropout_state_filter_visitor=visitor)
        assert tuple(mask is not None for mask in start(wrapper, 3).masks.state) == wanted
    wrapper = wrap(cell, 1.0, 1.0, 0.5, True, dropout_state_filter_visitor=lambda _: 1)
    with pytest.raises(TypeError, match="returned 1, a non-bool scalar"):
        start(wrapper, 3)


def test_seed_is_folded_into_the_stream() -> None:
    def mask(seed: int | None, rngs: int = 0) -> Any:
        wrapper = RNNCellDropoutWrapper(
            Sum(), 0.5, 1.0, 0.5, True, seed=seed, rngs=nnx.Rngs(dropout=rngs)
        )
        first, second = start(wrapper).masks.input, start(wrapper).masks.input
        assert differ(first, second)
        return first

    for one, other in itertools.combinations([None, 0, 1, -1, 2**32], 2):
        assert differ(mask(one), mask(other)), (one, other)
    assert_same(mask(3), mask(3))
    assert differ(mask(3), mask(3, rngs=1))


def test_wrapper_checks_what_arrives() -> None:
    cell, x = Sum(3), jnp.ones((BATCH, 3))

    def step(**options: Any) -> None:
        wrapper = wrap(cell, **options)
        wrapper(start(wrapper, 3), x)

    step(input_size=3, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"input_size is 4, but an input of shape \(4, 3\)"):
        step(input_size=4)
    with pytest.raises(TypeError, match=r"dtype is bfloat16, but a float32 input arrived"):
        step(dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="RNNCellDropoutWrapper needs a 'dropout' stream"):
        start(RNNCellDropoutWrapper(cell, 0.5))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"input_keep_prob": 1.5}, ValueError, r"input_keep_prob must be between 0 and 1, got 1.5"),
        ({"state_keep_prob": "half"}, TypeError, r"state_keep_prob must be a number in \[0, 1\]"),
        ({"seed": 1.0}, TypeError, r"seed must be an int or None, got 1.0"),
        ({"dropout_state_filter_visitor": 3}, TypeError, r"visitor must be callable, got 3"),
    ],
)
def test_wrapper_checks_its_arguments(options: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        wrap(Sum(), **options)


def test_traced_keep_probs_do_not_retrace() -> None:
    traces = 0

    @nnx.jit
    def step(cell: Any) -> Any:
        nonlocal traces
        traces += 1
        _, y = cell(start(cell), jnp.ones(SHAPE))
        return y

    cell = wrap(Sum(), jnp.float32(1.0))
    for keep_prob in (1.0, 0.5):
        cell.input_keep_prob = jnp.float32(keep_prob)
        ys: Any = step(cell)
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
    assert draws_of(wrapper) == 0
    for state in (
        wrapper.zero_state(5, jnp.bfloat16),
        wrapper.get_initial_state(batch_size=5, dtype=jnp.bfloat16),
        wrapper.get_initial_state(jnp.ones((5, 3), jnp.bfloat16)),
    ):
        for leaf in state:
            assert_same(leaf, jnp.zeros((5, 8), jnp.bfloat16))
            assert leaf.dtype == jnp.bfloat16
    carry = wrapper.redraw_masks(wrapper.zero_state(BATCH, jnp.float32), (BATCH, 3))
    wrapper(carry, inputs()[:, 0])

    nested = wrap(DropoutCell(cell, MIXED))
    assert nested.output_size == 8
    assert nested.state_size == DropoutCarry((8, 8), None, None)
    assert nested.zero_state(2, jnp.float32).masks is None

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
        cell, 0.5, 0.6, jnp.float32(0.5), True, 3, jnp.bfloat16, 7, visit_memories, (0,), True
    )
    config = wrapper.get_config()
    assert (config["seed"], config["deterministic"]) == (7, True)
    kept = {"in_features", "hidden_features", "activation_fn", "param_dtype"}
    assert config["cell"]["config"].keys() == kept
    stored = json.loads(json.dumps(config))
    twin: Any = RNNCellDropoutWrapper.from_config(stored, rngs=nnx.Rngs(0), trusted=(__name__,))
    assert twin.get_config() == config
    assert twin.cell.activation_fn is jnp.sin
    assert twin.dropout_state_filter_visitor is visit_memories
    assert twin.cell.hi.kernel[...].dtype == jnp.bfloat16
    twin.train()
    _, y = twin(start(twin, 3), inputs()[:, 0].astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


def test_config_of_nested_wrappers() -> None:
    wrapper = wrap(wrap(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)), 0.5), 0.25)
    twin: Any = RNNCellDropoutWrapper.from_config(wrapper.get_config(), rngs=nnx.Rngs(0))
    assert (twin.input_keep_prob, twin.cell.input_keep_prob) == (0.25, 0.5)
    start(twin, 3)


class Around(Sum):
    """A cell that holds a cell."""

    def __init__(self, inner: Any, in_features: int = UNITS) -> None:
        super().__init__(in_features)
        self.inner = inner


def test_config_of_a_cell_that_holds_a_cell() -> None:
    wrapper = wrap(Around(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0))))
    config = json.loads(json.dumps(wrapper.get_config()))
    twin: Any = RNNCellDropoutWrapper.from_config(config, rngs=nnx.Rngs(0), trusted=(__name__,))
    assert twin.cell.inner.hidden_features == 8
    assert twin.get_config() == config


class Forgetful(Sum):
    def __init__(self, width: int) -> None:
        super().__init__(width)


def test_what_a_config_cannot_hold() -> None:
    config = wrap(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0))).get_config()
    with pytest.raises(ValueError, match=r"GRUCell needs a key.*rngs=nnx.Rngs\(0\) to from_config"):
        RNNCellDropoutWrapper.from_config(config)
    with pytest.raises(ValueError, match="has no import path"):
        wrap(Sum(), dropout_state_filter_visitor=lambda _: True).get_config()
    with pytest.raises(ValueError, match="Forgetful takes width and has no attribute of that name"):
        wrap(Forgetful(3)).get_config()
    with pytest.raises(ValueError, match="input_keep_prob is traced"):
        nnx.jit(lambda wrapper: wrapper.get_config())(wrap(Sum(), jnp.float32(0.5)))
    weightless: Any = RNNCellDropoutWrapper.from_config(
        wrap(Sum(3)).get_config(), trusted=(__name__,)
    )
    assert weightless.cell.in_features == 3


def test_input_sizes_of_any_structure() -> None:
    wrapper = wrap(Sum(), input_size={"a": 3, "b": [4]})
    assert wrapper.input_size == {"a": 3, "b": [4]}
    assert nnx.jit(lambda wrapper: wrapper.input_size["a"])(wrapper) == 3


def test_equal_modules_share_a_program() -> None:
    traces = 0

    @nnx.jit
    def trace(cell: Any) -> None:
        nonlocal traces
        traces += 1

    call: Any = trace
    cells: list[Any] = []  # kept, for a new object may have the id of one that is gone
    for keep_prob in (0.5, 0.5, 0.25):
        spec = fdc.RecurrentDropout(params={"w": fdc.Dropout(keep_prob=keep_prob)})
        cells.append(DropoutCell(Probe(), spec, rngs=nnx.Rngs(0)))
    cells += [wrap(Sum(), input_size={"a": size}) for size in (3, 3)]
    hashes = [hash(nnx.split(cell)[0]) for cell in cells]
    assert hashes[0] == hashes[1]
    assert hashes[3] == hashes[4]
    for cell, want in zip(cells, (1, 1, 2, 3, 3), strict=True):
        call(cell)
        assert traces == want
