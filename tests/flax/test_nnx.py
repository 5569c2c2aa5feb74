"""NNX alone: streams that advance, modules in modules, evaluation, mistakes."""

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import nnx_hosts
import numpy as np
import probes
import pytest
from asserts import assert_close, assert_same
from flax import nnx
from hand_masks import kept, lstm_row, site_key
from hosts import SPECS, is_frozen
from nnx_cells import (
    MIXED,
    PER_STEP,
    VARIATIONAL,
    Sum,
    both_modes,
    compiled,
    draws_of,
    next_key,
    probe_of,
    rnn_of,
    start,
)
from nnx_hosts import nnx_probe
from probes import BATCH, NOTHING, SHAPE, SITE_NAMES, STEPS, UNITS, NnxProbe, differ

import flax_dropout_cell as fdc
from flax_dropout_cell.nnx import DropoutCell, RNNCellDropoutWrapper

# Where the randomness comes from


def see(host: Any, cell: Any) -> dict[str, Any]:
    carry, ys = host(cell, probes.ones())
    return probes.seen(carry.cell_carry, ys)


@pytest.mark.parametrize(
    ("host", "spec"),
    [
        (compiled(nnx_hosts.in_nnx_rnn), "ends frozen"),
        (compiled(nnx_hosts.in_nnx_rnn), "weights and state frozen"),
        (compiled(nnx_hosts.in_nnx_scan), "ends frozen"),
        (nnx_hosts.in_nnx_loop, "weights and state frozen"),
    ],
    ids=["nnx.RNN, ends", "nnx.RNN, state", "nnx.scan", "python loop"],
)
def test_the_next_call_has_new_masks(host: Any, spec: str) -> None:
    """From the next key of the module's stream, which each call moves on by one."""
    cell = nnx_probe(SPECS[spec], nnx.Rngs(0))
    runs = []
    for calls in (1, 2):
        runs.append(see(host, cell))
        assert draws_of(cell) == calls
    for site in SITE_NAMES:
        for run in runs:
            assert (run[site] == run[site][:1]).all() == is_frozen(spec, site)
        for s, t in itertools.product(range(STEPS), repeat=2):
            assert differ(runs[0][site][s], runs[1][site][t]), (site, s, t)


@both_modes
def test_the_next_call_in_both_directions_has_new_masks(noise: fdc.Dropout) -> None:
    rngs = nnx.Rngs(0)
    cells = tuple(nnx_probe(probes.noise_everywhere(noise), rngs) for _ in range(2))
    runs = []
    for calls in (1, 2):
        _, ys = compiled(nnx_hosts.in_nnx_bidirectional)(cells, probes.ones())
        runs += list(ys["input"])
        assert [draws_of(cell) for cell in cells] == [calls, calls]
    for one, other in itertools.combinations(runs, 2):
        for s, t in itertools.product(range(STEPS), repeat=2):
            assert differ(one[s], other[t])


def in_scan_that_carries_the_state(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    return nnx_hosts.in_nnx_scan(cell, xs, axes=nnx.StateAxes({...: nnx.Carry}))


def in_lax_scan(cell: Any, xs: jax.Array) -> tuple[Any, Any]:
    return jax.lax.scan(lambda carry, x: cell(carry, x), start(cell, xs.shape[-1]), xs)


@pytest.mark.parametrize("host", [in_scan_that_carries_the_state, in_lax_scan])
def test_other_loops(host: Any) -> None:
    """The module's state in the carry, and the functional loop around a module from outside."""
    spec = fdc.RecurrentDropout(params=VARIATIONAL, output={**NOTHING, "output": PER_STEP})
    nested = DropoutCell(NnxProbe(), fdc.RecurrentDropout(params=VARIATIONAL), rngs=nnx.Rngs(0))
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
    assert layers.cell.dropout_stream.count[...].tolist() == [2, 2, 2]


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
        assert cell.dropout_stream is not None and cell.dropout_stream.tag == stream.tag
        assert_same(*(jax.tree.leaves(nnx.state(rngs, nnx.RngCount)) for rngs in (theirs, ours)))


def test_cells_made_from_one_rngs_have_masks_of_their_own() -> None:
    rngs = nnx.Rngs(0)
    one, other = (
        DropoutCell(NnxProbe(), probes.noise_everywhere(VARIATIONAL), rngs=rngs).initialize_carry(
            SHAPE
        )
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


def test_the_stream_keeps_its_kind_of_key() -> None:
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        for make_key in (jax.random.key, jax.random.PRNGKey):
            with jax.default_prng_impl(impl):
                cell: Any = DropoutCell(Sum(), MIXED, rngs=nnx.Rngs(dropout=make_key(0)))
            assert str(jax.random.key_impl(cell.dropout_stream.key[...])) == impl


def test_gradients_move_the_stream_too() -> None:
    rnn = rnn_of(
        DropoutCell(NnxProbe(), fdc.RecurrentDropout(params=VARIATIONAL), rngs=nnx.Rngs(0))
    )

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


def test_a_stream_from_outside_of_a_transform_is_an_error() -> None:
    """A stream that is closed over would give every call the same key."""
    cell = probe_of(VARIATIONAL)
    with pytest.raises(ValueError, match=r"cannot track.*nnx\.jit.*rngs=key to redraw_masks"):
        jax.jit(lambda: start(cell))()


def test_reseeding_reaches_the_stream() -> None:
    cell = DropoutCell(Sum(), fdc.RecurrentDropout(input=VARIATIONAL), rngs=nnx.Rngs(dropout=0))
    first = start(cell)
    again = []
    for _ in range(2):
        nnx.reseed(cell, dropout=9)
        again.append(start(cell))
    assert_same(*(carry.masks for carry in again))
    assert differ(first.masks.input, again[0].masks.input)


# Evaluation


def evaluate_by_eval(cell: DropoutCell) -> Any:
    rnn_of(cell).eval()
    return cell


def view_of(module: Any) -> Any:
    """It, evaluating."""
    if not hasattr(nnx, "view"):
        pytest.skip("this Flax has no nnx.view")
    view = nnx.view(module, deterministic=True)
    assert module.deterministic is False and view.deterministic is True
    return view


def evaluate_by_view(cell: DropoutCell) -> Any:
    return view_of(cell)


@pytest.mark.parametrize("evaluate", [evaluate_by_eval, evaluate_by_view])
@both_modes
def test_switching_to_evaluation_and_back(evaluate: Any, noise: fdc.Dropout) -> None:
    cell = probe_of(noise)
    trained = see(compiled(nnx_hosts.in_nnx_rnn), nnx.clone(cell))
    evaluated = evaluate(cell)
    for mask in see(compiled(nnx_hosts.in_nnx_rnn), evaluated).values():
        assert_same(mask, np.ones((STEPS, *SHAPE)))
    assert draws_of(evaluated) == 0
    rnn_of(evaluated).train()
    assert_same(see(compiled(nnx_hosts.in_nnx_rnn), evaluated), trained)


def test_a_view_of_a_layer_evaluates() -> None:
    """It draws nothing; the layer itself draws the mask of its stream's first key."""
    spec = fdc.RecurrentDropout(input=VARIATIONAL)
    x = jax.random.normal(jax.random.key(1), (2, STEPS, 3))
    layer: Any = fdc.nnx.RNN(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)), spec, rngs=nnx.Rngs(dropout=1))
    stock = rnn_of(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)))
    view = view_of(layer)
    assert_close(view(x), stock(x))
    key = jax.random.fold_in(layer.dropout_stream.key[...], 0)
    mask = kept(site_key(key, "input"), 2, 3)
    assert_close(layer(x), stock(np.where(mask[:, None], 2 * x, 0)))
    assert int(layer.dropout_stream.count[...]) == 1
    view.set_view()
    assert view.deterministic


def test_an_embedding_casts_as_flaxs_does() -> None:
    """By `promote_dtype`, an option of `nnx.Embed`, in the lookup and in `attend`."""

    def doubled(arrays: Any, **_: Any) -> Any:
        return tuple(2 * array for array in arrays)

    options: Any = {"promote_dtype": doubled, "rngs": nnx.Rngs(params=0, dropout=1)}
    ours, flaxs = fdc.nnx.Embed(20, 3, 1.0, **options), nnx.Embed(20, 3, **options)
    ours.embedding[...] = flaxs.embedding[...]
    ids, query = jnp.arange(5), jnp.ones((2, 3))
    assert_same(ours(ids), flaxs(ids))
    assert_same(ours.attend(query), flaxs.attend(query))


def test_a_view_of_an_embedding_evaluates() -> None:
    ids = jnp.arange(20).reshape(2, 10)
    embed = fdc.nnx.Embed(20, 3, 0.5, rngs=nnx.Rngs(params=0, dropout=1))
    table, stream = embed.embedding[...], embed.dropout_stream
    assert stream is not None
    view = view_of(embed)
    assert_same(view(ids), table[ids])
    key = jax.random.fold_in(stream.key[...], 0)
    words = jax.random.bits(jax.random.fold_in(key, np.uint32(2**32 - 1)), (20, 1), jnp.uint32)
    assert_same(embed(ids), np.where(np.asarray(words) >= 2**31, 2 * table, 0)[ids])
    assert int(stream.count[...]) == 1
    view.set_view()
    assert view.deterministic


def test_a_training_carry_in_evaluation_keeps_its_masks() -> None:
    cell = probe_of(VARIATIONAL)
    carry = start(cell)
    cell.eval()
    after, ys = cell(carry, jnp.ones(SHAPE))
    assert (ys["input"] == 1).all()
    assert_same(after.masks, carry.masks)


def test_params_are_undisturbed_in_evaluation_whatever_the_prefix() -> None:
    cell = DropoutCell(
        NnxProbe(), fdc.RecurrentDropout(params={"w": VARIATIONAL}), deterministic=True
    )
    _, y = cell(start(cell), jnp.ones(SHAPE))
    assert (y["params"] == 1).all()


# Inputs


class Tokens(nnx.RNNCellBase):
    """A cell that looks its inputs up."""

    def __init__(self) -> None:
        self.embed = nnx.Embed(7, UNITS, rngs=nnx.Rngs(0))

    def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, Any]:
        return carry, jnp.ones_like(self.embed(inputs))

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.zeros((*input_shape, UNITS))

    @property
    def num_feature_axes(self) -> int:
        return 0


@both_modes
@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_tokens(dtype: str, noise: fdc.Dropout) -> None:
    """Nobody says the inputs' dtype before they come, and the output's mask needs the cell's."""
    cell = DropoutCell(Tokens(), fdc.RecurrentDropout(output=noise), rngs=nnx.Rngs(0))
    ys = rnn_of(cell)(jnp.ones((BATCH, STEPS), dtype))
    assert set(np.unique(ys)) == {0.0, 2.0}
    assert bool((ys == ys[:, :1]).all()) == noise.variational


def test_no_batch_dim() -> None:
    """As a loop over the bare cell, with masks by hand."""
    spec = fdc.RecurrentDropout(input=PER_STEP, state=VARIATIONAL, params=VARIATIONAL)
    bare = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
    cell = DropoutCell(bare, spec, rngs=nnx.Rngs(dropout=1))
    graphdef, params = nnx.split(bare, nnx.Param)
    x, key = jax.random.normal(jax.random.key(5), (STEPS, 3)), next_key(cell)

    def run(params: Any, carry: Any, x: jax.Array) -> Any:
        copy: Any = nnx.merge(graphdef, params)
        return copy(carry, x)

    assert_close(rnn_of(cell)(x), lstm_row(run, params, key, x))


@both_modes
def test_no_rows(noise: fdc.Dropout) -> None:
    spec = fdc.RecurrentDropout(input=noise, state=noise, output=noise, params=noise)
    rnn = rnn_of(DropoutCell(nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0)), spec, rngs=nnx.Rngs(0)))
    assert rnn(jnp.ones((0, STEPS, 3))).shape == (0, STEPS, 8)
    grads: Any = nnx.grad(lambda rnn: rnn(jnp.ones((0, STEPS, 3))).sum())(rnn)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


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
    cell.dropout_stream = nnx.Rngs(0).dropout.fork()
    start(cell)


def test_mistakes_at_construction() -> None:
    mistakes: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str]] = [
        (DropoutCell, (nn.LSTMCell(8), MIXED), {}, r"is not an RNNCell of flax.nnx: give a cell"),
        (DropoutCell, (nnx.LSTMCell, MIXED), {}, r"got a class: write nnx.LSTMCell\(32"),
        (RNNCellDropoutWrapper, (nnx.Dropout(0.5),), {}, r"is not an RNNCell of flax.nnx"),
        (DropoutCell, (Sum(), 0.5), {}, r"dropout must be a RecurrentDropout.*got 0.5"),
        (DropoutCell, (Sum(), MIXED), {"rngs": 3}, r"rngs must be an Rngs such as .*got 3"),
    ]
    for make, args, options, text in mistakes:
        with pytest.raises(TypeError, match=text):
            make(*args, **options)


def test_mistakes_with_the_carry() -> None:
    cell: Any = probe_of(VARIATIONAL)
    with pytest.raises(TypeError, match=r"must be a DropoutCarry, got a dict: start with init"):
        cell(start(cell.cell), jnp.ones(SHAPE))
    cell.eval()
    carry = start(cell)
    cell.train()
    with pytest.raises(ValueError, match=r"made in evaluation and has no masks: call redraw_masks"):
        cell(carry, jnp.ones(SHAPE))
    cell(cell.redraw_masks(carry, jnp.ones(SHAPE)), jnp.ones(SHAPE))
