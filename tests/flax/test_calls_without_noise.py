"""Noises that do nothing need no stream; `deterministic=` at the call; cells that write."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hand_masks import site_key
from linen_cells import Delegating
from nnx_cells import Sum
from quick_prng import quick_key

import flax_dropout_cell as fdc

KEY, X, IDS = quick_key(0), jnp.ones((2, 5, 3)), jnp.zeros((2, 5), int)
ONE = fdc.Dropout(keep_prob=1.0, variational=True)
NOTHING = {
    "empty": fdc.RecurrentDropout(),
    "keep_prob 1": fdc.RecurrentDropout(
        input=ONE, state=(None, ONE), output=fdc.Dropout(keep_prob=1), params=ONE
    ),
    "inside": fdc.RecurrentDropout(inside={"recurrent": ONE}),
}
NOISE = fdc.Dropout(keep_prob=0.5, variational=True)
SPEC = fdc.RecurrentDropout(input=NOISE, output=fdc.Dropout(keep_prob=0.5))
nothing = pytest.mark.parametrize("spec", NOTHING.values(), ids=NOTHING)


def linen_runs(spec: Any) -> dict[str, Any]:
    """Modules that train without a stream, each beside the bare one with its weights."""
    cell, bare = fdc.linen.LSTMCell(4), nn.RNN(nn.LSTMCell(4))
    return {
        "layer": (fdc.linen.RNN(cell, spec), bare),
        "DropoutCell": (nn.RNN(fdc.linen.DropoutCell(cell, spec)), bare),
        "twice": (nn.RNN(fdc.linen.DropoutCell(fdc.linen.DropoutCell(cell, spec), spec)), bare),
        "wrapper": (
            nn.RNN(fdc.linen.RNNCellDropoutWrapper(cell, variational_recurrent=True)),
            bare,
        ),
    }


def nnx_runs(spec: Any) -> dict[str, Any]:
    def cell() -> Any:
        return fdc.nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))

    return {
        "layer": fdc.nnx.RNN(cell(), spec),
        "DropoutCell": nnx.RNN(fdc.nnx.DropoutCell(cell(), spec)),
        "twice": nnx.RNN(fdc.nnx.DropoutCell(fdc.nnx.DropoutCell(cell(), spec), spec)),
        "wrapper": nnx.RNN(fdc.nnx.RNNCellDropoutWrapper(cell())),
    }


class TestNoStream:
    @nothing
    def test_linen(self, spec: fdc.RecurrentDropout) -> None:
        variables = nn.RNN(nn.LSTMCell(4)).init(KEY, X)
        for name, (module, bare) in linen_runs(spec).items():
            ys = module.apply(variables, X)
            np.testing.assert_allclose(ys, bare.apply(variables, X), rtol=1e-5, err_msg=name)

    @nothing
    def test_nnx(self, spec: fdc.RecurrentDropout) -> None:
        bare: Any = nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0)))
        for name, module in nnx_runs(spec).items():
            np.testing.assert_allclose(module(X), bare(X), rtol=1e-5, err_msg=name)

    def test_embeddings(self) -> None:
        linen = fdc.linen.Embed(7, 3, keep_prob=1.0)
        variables = linen.init(KEY, IDS)
        np.testing.assert_array_equal(
            linen.apply(variables, IDS), nn.Embed(7, 3).apply(variables, IDS)
        )
        module = fdc.nnx.Embed(7, 3, keep_prob=1.0, rngs=nnx.Rngs(params=0))
        ids = jnp.array([[6, 0, 3], [3, 3, 1]])
        np.testing.assert_array_equal(module(ids), module.embedding[...][ids])

    def test_a_stream_that_is_there_is_not_read(self) -> None:
        module = fdc.nnx.RNN(
            nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)), NOTHING["empty"], rngs=nnx.Rngs(1)
        )
        module(X)
        assert module.dropout_stream is not None
        assert int(module.dropout_stream.count[...]) == 0

    def test_an_array_of_ones_may_change_so_it_needs_one(self) -> None:
        spec = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=jnp.float32(1)))
        layer = fdc.linen.RNN(nn.LSTMCell(4), spec)
        variables = layer.init(KEY, X)
        with pytest.raises(ValueError, match="needs a 'dropout' stream"):
            layer.apply(variables, X)

    def test_masks_of_other_noises_are_still_refused(self) -> None:
        trained = nn.RNN(fdc.linen.DropoutCell(nn.LSTMCell(4), SPEC), return_carry=True)
        variables = trained.init(KEY, X)
        carry, _ = trained.apply(variables, X, rngs={"dropout": KEY})
        quiet = nn.RNN(fdc.linen.DropoutCell(nn.LSTMCell(4), fdc.RecurrentDropout()))
        with pytest.raises(ValueError, match="another spec"):
            quiet.apply(variables, X, initial_carry=carry)


class LinenEcho(Delegating):
    """Emits its inputs."""

    def __call__(self, carry: Any, inputs: jax.Array) -> Any:
        return carry, inputs


class TestDeterministicAtTheCall:
    """A step of a wrapper and a lookup evaluate, or train, whatever the module's own setting is."""

    @pytest.mark.parametrize("own", list(itertools.product([False, True], repeat=2)), ids=str)
    @pytest.mark.parametrize("framework", ["linen", "nnx"])
    def test_steps(self, framework: str, own: tuple[bool, bool]) -> None:
        """Of a wrapper in a wrapper, each with its own field: those that train show their masks."""
        x, spec, key = jnp.ones((2, 64)), fdc.RecurrentDropout(input=NOISE), quick_key(3)
        inner, outer = own
        if framework == "linen":
            linen = fdc.linen.DropoutCell(LinenEcho(), spec, deterministic=inner)
            linen = fdc.linen.DropoutCell(linen, spec, deterministic=outer)

            def step(**options: Any) -> Any:
                carry = linen.redraw_masks(x, x, rng=key, **options)
                return carry, linen.apply({}, carry, x, **options)[1]
        else:
            cell = fdc.nnx.DropoutCell(Sum(), spec, inner)
            cell = fdc.nnx.DropoutCell(cell, spec, outer)

            def step(**options: Any) -> Any:
                carry = cell.redraw_masks(x, x, rngs=key, **options)
                return carry, cell(carry, x, **options)[1]

        for given in (None, False, True):
            options = {} if given is None else {"deterministic": given}
            carry, y = step(**options)
            wanted = np.ones(x.shape, np.float32)
            evaluates = (inner, outer) if given is None else (given, given)
            for off, of_wrapper in zip(evaluates, (carry.cell_carry, carry), strict=True):
                assert (of_wrapper.masks is None) == off
                if not off:
                    mask = np.asarray(of_wrapper.masks.input)
                    assert 0.3 < mask.mean() < 0.7
                    wanted *= mask / np.float32(0.5)
            np.testing.assert_array_equal(y, wanted)

    @pytest.mark.parametrize("framework", ["linen", "nnx"])
    def test_embeddings_that_evaluate_by_their_field(self, framework: str) -> None:
        ids, key = jnp.arange(40).reshape(4, 10) % 20, jax.random.key(5)
        if framework == "linen":
            linen = fdc.linen.Embed(20, 3, keep_prob=0.5, deterministic=True)
            variables = linen.init(KEY, ids)
            table = variables["params"]["embedding"]

            def run(**given: Any) -> Any:
                return linen.apply(variables, ids, rng=key, **given)
        else:
            module = fdc.nnx.Embed(20, 3, 0.5, deterministic=True, rngs=nnx.Rngs(0))
            table = module.embedding[...]

            def run(**given: Any) -> Any:
                return module(ids, rngs=key, **given)

        words = jax.random.bits(jax.random.fold_in(key, np.uint32(2**32 - 1)), (20,), jnp.uint32)
        kept = np.asarray(words) >= 2**31
        assert 0 < kept.mean() < 1
        np.testing.assert_array_equal(run(), table[ids])
        wanted = np.where(kept[:, None], 2 * np.asarray(table), 0)
        np.testing.assert_array_equal(run(deterministic=False), wanted[ids])

    def test_redraw_masks_in_evaluation_draws_nothing(self) -> None:
        """It neither needs a stream for dropout nor counts one on."""
        cell = fdc.nnx.DropoutCell(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), SPEC)
        h, rngs = jnp.zeros((2, 4)), nnx.Rngs(dropout=1)
        for given in (nnx.Rngs(params=0), rngs):
            carry = cell.redraw_masks(h, X[:, 0], rngs=given, deterministic=True)
            assert carry.masks is None
        assert rngs.dropout.count[...] == 0
        cell.redraw_masks(h, X[:, 0], rngs=rngs)
        assert rngs.dropout.count[...] == 1

    @pytest.mark.parametrize("framework", ["linen", "nnx"])
    @pytest.mark.parametrize("outer", ["evaluates", "has no noise"])
    def test_an_inner_wrapper_draws_from_the_key_of_redraw_masks(self, framework, outer) -> None:
        """Its own stream would give other masks, and count on."""
        spec, h, x = fdc.RecurrentDropout(input=NOISE), jnp.zeros((2, 4)), X[:, 0]
        of_outer = spec if outer == "evaluates" else fdc.RecurrentDropout()
        if framework == "linen":
            cell: Any = fdc.linen.DropoutCell(nn.GRUCell(4), spec)
            cell = fdc.linen.DropoutCell(cell, of_outer, deterministic=outer == "evaluates")
            carry = cell.redraw_masks(h, x, rng=jax.random.key(7))
        else:
            inner = fdc.nnx.DropoutCell(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), spec, rngs=nnx.Rngs(5))
            cell = fdc.nnx.DropoutCell(inner, of_outer, outer == "evaluates")
            carry = cell.redraw_masks(h, x, rngs=jax.random.key(7))
        # The key for a wrapper's cell, and then that of its input, whose leaf is the first.
        of_cell = jax.random.fold_in(jax.random.key(7), np.uint32(2**32 - 1))
        wanted = NOISE.draw_mask(site_key(of_cell, "input"), x.shape, x.dtype)
        np.testing.assert_array_equal(carry.cell_carry.masks.input, wanted)

    def test_evaluation_keeps_the_masks_in_the_carry(self) -> None:
        cell: Any = fdc.nnx.RNNCellDropoutWrapper(
            nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), 0.5, variational_recurrent=True, rngs=nnx.Rngs(1)
        )
        carry = cell.initialize_carry((2, 3), nnx.Rngs(2))
        after, _ = cell(carry, X[:, 0], deterministic=True)
        np.testing.assert_array_equal(after.masks.input, carry.masks.input)


@pytest.mark.parametrize("way", ["remat", "jit", "jit, static"])
def test_deterministic_under_linens_transformations(way: str) -> None:
    """As `docs/flax_hosts.md` writes it: the field, or a static argument."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            if way == "jit, static":
                layer = nn.jit(fdc.linen.RNN, static_argnames="deterministic")
                return layer(nn.GRUCell(4), SPEC)(x, deterministic=not train)
            layer = nn.remat(fdc.linen.RNN) if way == "remat" else nn.jit(fdc.linen.RNN)
            return layer(nn.GRUCell(4), SPEC, deterministic=not train)(x)

    variables = Model().init(KEY, X, train=False)
    bare = nn.RNN(nn.GRUCell(4)).apply({"params": {"cell": variables["params"]["GRUCell_0"]}}, X)
    evaluated: Any = Model().apply(variables, X, train=False)
    np.testing.assert_allclose(evaluated, np.asarray(bare), rtol=1e-5)
    trained = Model().apply(variables, X, train=True, rngs={"dropout": KEY})
    assert 0.2 < (np.asarray(trained) == 0).mean() < 0.8


class Writes(nnx.RNNCellBase):
    """A cell that keeps running means, or draws from a stream of its own."""

    num_feature_axes = 1  # type: ignore[assignment]

    def __init__(self, inner: Any) -> None:
        self.dense, self.inner = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), inner

    def __call__(self, carry: jax.Array, x: jax.Array) -> Any:
        h = jnp.tanh(self.inner(self.dense(x)) + carry)
        return h, h

    def initialize_carry(self, input_shape: Any, rngs: Any = None, carry_init: Any = None) -> Any:
        return jnp.zeros((*input_shape[:-1], 4))


class TestNNXCellsThatWrite:
    @pytest.mark.parametrize("rngs", [None, KEY], ids=["stream", "key"])
    @pytest.mark.parametrize("jit", [False, True])
    @pytest.mark.parametrize(
        "inner",
        [lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0)), lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0))],
        ids=["BatchNorm", "Dropout"],
    )
    def test_training_is_refused(self, inner: Any, jit: bool, rngs: Any) -> None:
        layer = fdc.nnx.RNN(Writes(inner()), SPEC, rngs=nnx.Rngs(1))
        call = nnx.jit(lambda layer, x: layer(x, rngs=rngs)) if jit else layer.__call__
        args = (layer, X) if jit else (X,)
        with pytest.raises(
            TypeError, match="Writes writes a variable, or draws from an rng stream"
        ):
            call(*args)

    def test_evaluation_works(self) -> None:
        layer = fdc.nnx.RNN(Writes(nnx.BatchNorm(4, rngs=nnx.Rngs(0))), SPEC)
        layer.eval()
        assert layer(X).shape == (2, 5, 4)


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_reset_carry(framework: str, time_major: bool) -> None:
    """After a reset a row goes on as a sequence that starts from that carry."""
    x = jax.random.normal(KEY, (2, 6, 3))
    resets = jnp.zeros((2, 6), bool).at[0, 2].set(True).at[1, 4].set(True)
    first = (jnp.full((4,), 0.5), jnp.arange(4.0))
    if framework == "linen":
        cell = nn.LSTMCell(4)
        variables = nn.RNN(cell).init(KEY, x)

        def run(x: Any, **options: Any) -> Any:
            layer = fdc.linen.RNN(cell, fdc.RecurrentDropout(), time_major=time_major)
            return layer.apply(variables, x, **options)

        def stock(x: Any, carry: Any) -> Any:
            return nn.RNN(cell).apply(variables, x, initial_carry=carry)
    else:
        module = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))

        def run(x: Any, **options: Any) -> Any:
            layer: Any = fdc.nnx.RNN(module, fdc.RecurrentDropout(), time_major=time_major)
            return layer(x, **options)

        def stock(x: Any, carry: Any) -> Any:
            return nnx.RNN(module)(x, initial_carry=carry)

    swap = (lambda a: jnp.swapaxes(a, 0, 1)) if time_major else (lambda a: a)
    ys = swap(run(swap(x), resets=swap(resets), reset_carry=first))
    for row, step in ((0, 2), (1, 4)):
        carry = jax.tree.map(lambda leaf: leaf[None], first)
        fresh = stock(x[row : row + 1, step:], carry)
        np.testing.assert_allclose(ys[row : row + 1, step:], fresh, rtol=1e-5)
    with pytest.raises(ValueError, match="reset_carry needs resets"):
        run(swap(x), reset_carry=first)
