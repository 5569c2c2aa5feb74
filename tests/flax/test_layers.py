"""`RNN` in linen and NNX: the stock layer's weights and numbers, and the core's masks."""

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import exact_lstm
import flax.linen as nn
import hosts
import jax
import jax.numpy as jnp
import linen_cells
import numpy as np
import orbax.checkpoint
import probes
import pytest
from asserts import assert_close, assert_same
from flax import nnx
from hand_masks import kept, site_key, with_number
from layers import (
    BATCH,
    FEATURES,
    FRAMEWORKS,
    LENGTHS,
    STEPS,
    UNITS,
    XS,
    Framework,
    differ_widely,
)
from nnx_cells import Sum
from quick_prng import quick_key

import flax_dropout_cell as fdc
from flax_dropout_cell._hoist.flat_jaxpr import all_equations

VARIATIONAL = fdc.Dropout(keep_prob=0.6, variational=True)
PER_STEP = fdc.Dropout(keep_prob=0.6)
KEY = quick_key(3)
NONE = fdc.RecurrentDropout()
EVERYWHERE = fdc.RecurrentDropout(
    input=VARIATIONAL,
    state=PER_STEP,
    output=PER_STEP,
    inside={"recurrent": VARIATIONAL, "candidate": PER_STEP},
    params=fdc.recurrent_kernels(VARIATIONAL),
)
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
noises = pytest.mark.parametrize("noise", [VARIATIONAL, PER_STEP], ids=["variational", "step"])


def layer_of(cell: Any, dropout: fdc.RecurrentDropout, **options: Any) -> Any:
    rnn: Any = fdc.nnx.RNN(cell, dropout, **options)
    return rnn


def own_layer(
    framework: Framework, cell: Any, dropout: fdc.RecurrentDropout, params: Any, **options: Any
) -> Any:
    """`run(xs, **call)` of a layer with options that the stock one lacks; NNX cells have params."""
    if framework.rnn is fdc.linen.RNN:
        rnn, variables = fdc.linen.RNN(cell, dropout, **options), {"params": {"cell": params}}
        return lambda xs, **given: rnn.apply(variables, xs, rng=KEY, **given)
    layer = layer_of(cell, dropout, **options)
    return lambda xs, **given: layer(xs, rngs=KEY, **given)


PAIRS = [
    ("nn.RNN", "LSTMCell"),
    ("nn.Bidirectional of copies", "residual"),
    ("nn.RNN in compact", "one cell twice"),
    ("nn.RNN in compact", "tuple of cells"),
    ("one cell in compact", "dict of modules"),
    ("made outside of compact", "a field called cell"),
    ("copies in setup", "made in setup"),
    ("nn.remat", "made in compact"),
    ("nn.RNN in compact", "ConvLSTMCell"),
]


@pytest.mark.parametrize(("host", "cell"), PAIRS)
def test_linen_weights_are_the_stock_layers(monkeypatch, host, cell) -> None:
    """The same names and first values in models of every build, and checkpoints load."""
    xs, make_model = linen_cells.inputs_of(cell), linen_cells.HOSTS[host]

    def model() -> Any:
        return make_model(linen_cells.CELLS[cell], lambda cell: cell)

    def run_stock(key: jax.Array) -> Any:
        variables = model().init(key, xs)
        return variables, model().apply(variables, xs)

    theirs, ys = jax.jit(run_stock)(KEY)
    evaluate = fdc.RecurrentDropout(input=PER_STEP)
    monkeypatch.setattr(nn, "RNN", lambda cell: fdc.linen.RNN(cell, evaluate, deterministic=True))
    ours = jax.jit(lambda key: model().init(key, xs))(KEY)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert_close(ours, theirs)
    assert_close(jax.jit(lambda variables: model().apply(variables, xs))(theirs), ys)


def test_nnx_weights_are_the_stock_layers() -> None:
    def cell(seed: int) -> nnx.LSTMCell:
        return nnx.LSTMCell(FEATURES, UNITS, rngs=nnx.Rngs(seed))

    ours, stock = layer_of(cell(0), EVERYWHERE, rngs=nnx.Rngs(1)), nnx.RNN(cell(0))
    assert_same(
        nnx.to_pure_dict(nnx.state(ours, nnx.Param)), nnx.to_pure_dict(nnx.state(stock, nnx.Param))
    )
    nnx.update(ours, nnx.state(nnx.RNN(cell(5)), nnx.Param))
    nnx.update(stock, nnx.state(ours, nnx.Param))
    assert_same(stock.cell.ii.kernel[...], cell(5).ii.kernel[...])  # type: ignore[attr-defined]


def test_a_stock_checkpoint_leaves_the_streams_of_nnx_layers_alone(tmp_path: Path) -> None:
    """`nnx.RNN` has a stream of its own, the same in all layers: from it all would draw alike."""
    noise = fdc.RecurrentDropout(output=fdc.Dropout(keep_prob=0.5, variational=True))

    def cells() -> Any:
        return (nnx.LSTMCell(FEATURES, FEATURES, rngs=nnx.Rngs(seed)) for seed in (3, 4))

    class Stack(nnx.Module):
        def __init__(self, *layers: Any) -> None:
            self.first, self.second = layers

        def __call__(self) -> list[jax.Array]:
            return [self.first(XS), self.second(XS)]

    rngs = nnx.Rngs(1)
    theirs = Stack(*map(nnx.RNN, cells()))
    ours = Stack(*(layer_of(cell, noise, rngs=rngs) for cell in cells()))
    # Refused, or in Flax 0.11 laid beside the stream that is drawn from.
    with contextlib.suppress(ValueError):
        nnx.update(ours, nnx.state(theirs))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stock", nnx.state(theirs))
    wanted = orbax.checkpoint.args.PyTreeRestore(nnx.state(ours, nnx.Param), partial_restore=True)
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        weights = checkpointer.restore(tmp_path / "stock", args=wanted)
    for loaded in (None, nnx.state(theirs, nnx.Param), weights):
        if loaded is not None:
            nnx.update(ours, loaded)
        first, second = (ys == 0 for ys in ours())
        assert (first != second).any()
    ours.eval()
    assert_same(ours(), theirs())


@frameworks
def test_evaluation_is_the_stock_layer(framework: Framework) -> None:
    """With each option; padding's outputs alone are other: zero."""
    options = list(itertools.product([False, True], [False, True], [False, True], [None, LENGTHS]))
    layer = framework.layer(framework.stock_lstm(), fdc.RecurrentDropout(state=PER_STEP), XS)

    @jax.jit
    def run(xs: jax.Array) -> Any:
        results = []
        for time_major, reverse, keep_order, lengths in options:
            given: Any = {
                "time_major": time_major,
                "reverse": reverse,
                "keep_order": keep_order,
                "seq_lengths": lengths,
                "return_carry": True,
            }
            x = jnp.moveaxis(xs, 1, 0) if time_major else xs
            ours = layer.run(x, deterministic=True, **given)
            results.append((ours, layer.stock(x, **given)))
        return results

    for (time_major, *_, lengths), ((carry, ys), (stock_carry, stock_ys)) in zip(
        options, run(XS), strict=True
    ):
        assert_close(carry, stock_carry)
        ys, stock_ys = (jnp.moveaxis(y, 0, 1) if time_major else y for y in (ys, stock_ys))
        if lengths is not None:
            valid = (jnp.arange(STEPS)[None] < lengths[:, None])[..., None]
            stock_ys = jnp.where(valid, stock_ys, 0)
        assert_close(ys, stock_ys)


@frameworks
def test_a_layer_that_evaluates_by_its_field_trains_at_the_call(framework: Framework) -> None:
    """With the masks of the call's key, as a scan of the bare cell with masks by hand."""
    spec = fdc.RecurrentDropout(
        input=fdc.Dropout(keep_prob=0.5, variational=True), output=fdc.Dropout(keep_prob=0.5)
    )
    layer = framework.layer(framework.gru(), spec, XS)
    run = own_layer(framework, framework.gru(), spec, layer.params, deterministic=True)
    once = kept(site_key(KEY, "input"), BATCH, FEATURES)
    fresh = np.stack([kept(site_key(KEY, "output", t), BATCH, UNITS) for t in range(STEPS)])

    def step(h: Any, at: Any) -> Any:
        x, mask = at
        h, y = layer.cell(layer.params, h, jnp.where(once, 2 * x, 0))
        return h, jnp.where(mask, 2 * y, 0)

    _, wanted = jax.lax.scan(step, layer.carry, (jnp.moveaxis(XS, 1, 0), fresh))
    assert_same(run(XS, deterministic=False), layer.run(XS, KEY))
    assert_close(run(XS, deterministic=False), jnp.moveaxis(wanted, 0, 1))
    assert_close(run(XS), layer.stock(XS))


@frameworks
@noises
def test_masks_live_as_long_as_they_should(framework: Framework, noise) -> None:
    """Read off at each site, they are those of `dropout_scan`, bit for bit."""
    spec, xs = probes.noise_everywhere(noise), probes.ones()
    layer = framework.layer(framework.probe(), spec, xs, time_major=True, return_carry=True)
    run = jax.jit(lambda key: probes.seen(*layer.run(xs, key)))
    seen = run(jax.random.key(0))
    scanned = jax.jit(lambda key: hosts.run_dropout_scan(spec, key, xs).seen)
    assert_same(seen, scanned(jax.random.key(0)))
    other = run(jax.random.key(1))
    for site in probes.SITE_NAMES:
        masks = np.asarray(seen[site])
        assert set(np.unique(masks)) == {0, np.float32(1) / np.float32(0.6)}
        for t in range(1, probes.STEPS):
            assert (masks[t] == masks[0]).all() == noise.variational
        assert differ_widely(masks, other[site])
    evaluated = probes.seen(*layer.run(xs, deterministic=True))
    assert all((value == 1).all() for value in evaluated.values())
    carry, _ = layer.run(xs, jax.random.key(0))
    assert carry.keys() == {"a", "b"}  # the cell's own


@frameworks
def test_the_same_key_gives_what_dropout_scan_gives(framework: Framework) -> None:
    layer = framework.layer(framework.lstm(), EVERYWHERE, XS, return_carry=True)
    placed = fdc.RecurrentDropout(**{**vars(EVERYWHERE), "state": (None, PER_STEP)})

    @jax.jit
    def run(xs: jax.Array, **options: Any) -> Any:
        ours = layer.run(xs, KEY, **options)
        reverse = options.pop("keep_order", False)
        options.pop("reverse", None)
        carry, ys = fdc.dropout_scan(
            layer.params,
            layer.carry,
            jnp.moveaxis(xs, 1, 0),
            KEY,
            cell=layer.cell,
            dropout=placed,
            reverse=reverse is not False,
            **options,
        )
        return ours, (carry, jnp.moveaxis(ys, 0, 1))

    assert_same(*run(XS))
    assert_same(*run(XS, seq_lengths=LENGTHS, start=jnp.int32(5)))
    assert_same(*jax.jit(lambda xs: run.__wrapped__(xs, reverse=True, keep_order=True))(XS))  # type: ignore
    assert_same(*run(XS, sequence_ids=jnp.array([7, 2, 9])))


@frameworks
def test_windows_of_one_step_are_the_whole(framework: Framework) -> None:
    layer = framework.layer(framework.lstm(), EVERYWHERE, XS, return_carry=True)
    run = jax.jit(
        lambda params, carry, x, t: layer.run(x, KEY, params, initial_carry=carry, start=t)
    )
    carry, whole = run(layer.params, layer.carry, XS, 0)
    running, ys = layer.carry, []
    for t in range(STEPS):
        running, y = run(layer.params, running, XS[:, t : t + 1], t)
        ys.append(y)
    assert_same((running, jnp.concatenate(ys, 1)), (carry, whole))
    spec = probes.noise_everywhere(VARIATIONAL)
    probe = framework.layer(framework.probe(), spec, probes.ones(), time_major=True)
    windows = [probe.run(probes.ones(1), KEY, start=t)["input"] for t in range(2)]
    assert_same(jnp.concatenate(windows), probe.run(probes.ones(2), KEY)["input"])


@frameworks
def test_one_noise_for_an_lstms_state_means_h(framework: Framework) -> None:
    layers = [
        framework.layer(framework.stock_lstm(), fdc.RecurrentDropout(state=state), XS)
        for state in (VARIATIONAL, (None, VARIATIONAL))
    ]
    assert_same(*(layer.run(XS, KEY) for layer in layers))
    gru = framework.layer(framework.gru(), fdc.RecurrentDropout(state=VARIATIONAL), XS)
    with pytest.raises(ValueError, match="a GRU's h"):
        gru.run(XS, KEY)


@frameworks
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_an_actor_and_a_learner_see_the_same_masks(framework: Framework, impl: str) -> None:
    """Two rollouts step by step, the second one learned whole with its rows permuted: same bits."""
    rng, draw = jax.random.key(3, impl=impl), np.random.default_rng(0)
    once, fresh = (dataclasses.replace(noise, scale=False) for noise in (VARIATIONAL, PER_STEP))
    spec = fdc.RecurrentDropout(input=once, state=fresh, inside={"recurrent": once})
    cell = framework.lstm(**exact_lstm.FUNCTIONS)
    layer = framework.layer(cell, spec, XS, return_carry=True)
    params = jax.tree.map(lambda leaf: exact_lstm.integers(draw, *leaf.shape), layer.params)
    done = jax.random.bernoulli(jax.random.key(3), 0.3, (BATCH, 2 * STEPS)).at[:, STEPS].set(False)
    ids = jnp.arange(BATCH)[:, None] + BATCH * done.astype(int).cumsum(1)
    xs = jnp.asarray(exact_lstm.integers(draw, BATCH, 2 * STEPS, FEATURES))

    @jax.jit
    def run(params: Any, carry: Any, window: Any, start: jax.Array) -> Any:
        x, done, ids = window
        given = {"initial_carry": carry, "resets": done, "sequence_ids": ids, "start": start}
        return layer.run(x, rng, params, **given)

    carry, half, acted = layer.carry, None, []
    for t in range(2 * STEPS):
        half = carry if t == STEPS else half
        now = slice(t, t + 1)
        carry, y = run(params, carry, (xs[:, now], done[:, now], ids[:, now]), t)
        acted.append(y)
    order, late = jnp.array([2, 0, 1]), slice(STEPS, None)
    _, learned = run(
        params,
        jax.tree.map(lambda leaf: leaf[order], half),
        (xs[order, late], done[order, late], ids[order, late]),
        STEPS,
    )
    assert_same(learned, jnp.concatenate(acted, 1)[order, late])
    assert len(np.unique(learned)) > 3


@frameworks
def test_a_reset_starts_from_the_cells_first_carry(framework: Framework) -> None:
    xs = probes.ones(4, 2)
    layer = framework.layer(
        framework.probe(), probes.noise_everywhere(VARIATIONAL), xs, time_major=True
    )
    resets = jnp.zeros((4, 2), bool).at[2, 0].set(True)
    zeros = jax.tree.map(jnp.zeros_like, layer.carry)
    ys = layer.run(xs, KEY, initial_carry=zeros, resets=resets)
    assert (ys["state"]["a"][0] == 0).all()
    assert (ys["state"]["a"][2, 0] == 1).all()
    assert differ_widely(ys["input"][2, 0], ys["input"][1, 0])
    assert_same(ys["input"][2, 1], ys["input"][1, 1])


@frameworks
def test_gradients(framework: Framework) -> None:
    """Those of `dropout_scan`."""
    layer = framework.layer(framework.lstm(), EVERYWHERE, XS)
    placed = fdc.RecurrentDropout(**{**vars(EVERYWHERE), "state": (None, PER_STEP)})

    def of_scan(params: Any, xs: jax.Array) -> jax.Array:
        xs = jnp.moveaxis(xs, 1, 0)
        scan = fdc.dropout_scan
        return (scan(params, layer.carry, xs, KEY, cell=layer.cell, dropout=placed)[1] ** 2).sum()

    if framework.rnn is fdc.linen.RNN:
        rnn = fdc.linen.RNN(framework.lstm(), EVERYWHERE)

        def loss(params: Any, xs: jax.Array) -> Any:
            return (rnn.apply({"params": {"cell": params}}, xs, rng=KEY) ** 2).sum()  # type: ignore

        ours = jax.jit(jax.grad(loss, (0, 1)))(layer.params, XS)
    else:
        rnn = layer_of(framework.lstm(), EVERYWHERE)
        take = nnx.grad(lambda rnn, xs: (rnn(xs, rngs=KEY) ** 2).sum(), argnums=(0, 1))
        grads, of_xs = nnx.jit(take)(rnn, XS)
        ours = nnx.to_pure_dict(grads)["cell"], of_xs
    assert_close(ours, jax.jit(jax.grad(of_scan, (0, 1)))(layer.params, XS))
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(ours))


@frameworks
def test_samples_over_a_layer_that_is_closed_over(framework: Framework) -> None:
    layer, rng = framework.layer(framework.lstm(), EVERYWHERE, XS), jax.random.key(3)
    for chunk_size in (None, 1):
        samples = fdc.mc_samples(lambda key: layer.run(XS, key), rng, 3, chunk_size=chunk_size)
        assert samples.shape == (3, BATCH, STEPS, UNITS)
        assert differ_widely(samples[0], samples[1])
    keys = jax.random.split(rng, 2)
    mapped = jax.lax.map(lambda key: layer.run(XS, key), keys)
    assert_close(mapped[1], layer.run(XS, keys[1]))


@frameworks
def test_without_weights_in_the_scans_carry(framework: Framework) -> None:
    layer = framework.layer(framework.lstm(), EVERYWHERE, XS)
    jaxpr = jax.make_jaxpr(lambda xs: layer.run(xs, KEY))(XS)

    scans = [eqn for eqn in all_equations(jaxpr.jaxpr) if eqn.primitive.name == "scan"]
    # Results of a scan without a time axis are its carry: here the LSTM's c and h.
    carried = [
        [var for var in eqn.outvars if var.aval.shape[:1] != (STEPS,)]  # type: ignore
        for eqn in scans
    ]
    assert carried and max(map(len, carried)) <= 3


@frameworks
def test_the_settings_of_the_loop_reach_it(framework: Framework) -> None:
    """`unroll`, `checkpoint_every` and `parallel` show in the program, and change no number."""
    if framework.rnn is fdc.linen.RNN:
        cell: Any = fdc.linen.MinGRUCell(UNITS)
    else:
        cell = fdc.nnx.MinGRUCell(FEATURES, UNITS, rngs=nnx.Rngs(0))
    spec = fdc.RecurrentDropout(input=VARIATIONAL, output=PER_STEP)
    layer = framework.layer(cell, spec, XS)

    def program(**options: Any) -> tuple[list[Any], Any]:
        run = own_layer(framework, cell, spec, layer.params, **options)
        jaxpr = jax.make_jaxpr(run)(XS)
        return list(all_equations(jaxpr.jaxpr)), run(XS)

    def scans(equations: list[Any]) -> list[Any]:
        return [eqn.params for eqn in equations if eqn.primitive.name == "scan"]

    def is_parallel(equations: list[Any]) -> bool:
        return any("linear_solve" in eqn.primitive.name for eqn in equations)

    plain, wanted = program(parallel=False)
    assert [scan["unroll"] for scan in scans(plain)] == [1]
    assert not is_parallel(plain)
    for unroll in (2, 3):
        equations, ys = program(parallel=False, unroll=unroll)
        assert [scan["unroll"] for scan in scans(equations)] == [unroll]
        assert_close(ys, wanted)
    equations, ys = program(parallel=False, checkpoint_every=3)
    assert [scan["length"] for scan in scans(equations)] == [STEPS // 3, 3]
    assert any(eqn.primitive.name in ("remat", "remat2", "checkpoint") for eqn in equations)
    assert_close(ys, wanted)
    equations, ys = program(parallel=True)
    assert is_parallel(equations)
    assert_close(ys, wanted)


class HalfLinen(linen_cells.FromZeros):
    """Half of the old state, and the input."""

    def __call__(self, carry: Any, inputs: Any) -> Any:
        h = carry / 2 + inputs
        return h, h


class HalfNNX(Sum):
    """Half of the old state, and the input."""

    def __call__(self, carry: Any, inputs: Any) -> Any:
        h = carry / 2 + inputs
        return h, h


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_packed_rows_run_backward_as_each_sequence_alone(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    resets = np.zeros((2, 6), bool)
    resets[:, 0] = resets[0, 2] = resets[1, 4] = True
    ids = np.cumsum(resets.ravel()).reshape(2, 6) + 10
    key, wanted = jax.random.key(3), np.zeros_like(x)
    sequences = {(row, int(number)) for row in range(2) for number in ids[row]}
    for row, number in sequences:
        mask = 2 * kept(with_number(site_key(key, "input"), number), 4)
        h = np.zeros(4)
        for t in np.flatnonzero(ids[row] == number)[::-1]:
            h = wanted[row, t] = h / 2 + x[row, t] * mask
    noise = fdc.Dropout(keep_prob=0.5, variational=True)
    spec, given = fdc.RecurrentDropout(input=noise), {"resets": resets, "sequence_ids": ids}
    options: Any = {"reverse": True, "keep_order": True}
    if name == "linen":
        got: Any = fdc.linen.RNN(HalfLinen(), spec, **options).apply({}, x, rng=key, **given)
    else:
        got = layer_of(HalfNNX(), spec, **options)(x, rngs=key, **given)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
