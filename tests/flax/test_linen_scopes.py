"""The layer in Flax's own tools: error paths, tables, sown and captured values, streams."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from linen_cells import FromZeros
from quick_prng import quick_key

import flax_dropout_cell as fdc

SPEC = fdc.RecurrentDropout(
    input=fdc.Dropout(keep_prob=0.5, variational=True), output=fdc.Dropout(keep_prob=0.5)
)
KEY, X = quick_key(0), jnp.ones((2, 5, 3))


class Sows(nn.RNNCellBase):
    """A cell that sows its state, and one number for the whole batch."""

    features: int = 4
    num_feature_axes = 1  # type: ignore[assignment]

    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> Any:
        h = jnp.tanh(nn.Dense(4)(x) + carry)
        self.sow("intermediates", "h", h)
        self.sow("losses", "size", jnp.mean(h**2))
        return h, h

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros((*input_shape[:-1], 4))


class Model(nn.Module):
    layer: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2)(self.layer()(x))


def names_in(table: str) -> list[str]:
    """The paths in the first column of `tabulate`'s table."""
    rows = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    return [row for row in rows if row]


def tabulate(model: nn.Module, **options: Any) -> str:
    rngs = {"params": KEY, "dropout": KEY}
    return model.tabulate(
        rngs, X, console_kwargs={"force_terminal": False, "width": 200}, **options
    )


class TestPaths:
    def test_an_error_of_the_cell_has_its_path(self) -> None:
        class Deep(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return Model(lambda: fdc.linen.RNN(nn.LSTMCell(4), SPEC))(x)

        with pytest.raises(errors.ScopeCollectionNotFound, match=r'"/Model_0/LSTMCell_0/'):
            Deep().apply({"params": {}}, X, rngs={"dropout": KEY})

    def test_tabulate_has_the_rows_of_the_stock_layer(self) -> None:
        ours = Model(lambda: fdc.linen.RNN(nn.LSTMCell(4), SPEC))
        stock = Model(lambda: nn.RNN(nn.LSTMCell(4)))
        assert names_in(tabulate(ours)) == names_in(tabulate(stock))

    @pytest.mark.parametrize(
        "model",
        [
            Model(lambda: fdc.linen.RNN(nn.LSTMCell(4), SPEC)),
            Model(lambda: nn.RNN(fdc.linen.DropoutCell(nn.LSTMCell(4), SPEC))),
        ],
    )
    @pytest.mark.parametrize("flops", [False, True])
    def test_tabulate(self, model: nn.Module, flops: bool) -> None:
        assert "LSTMCell_0/hi" in names_in(tabulate(model, compute_flops=flops))

    def test_a_carry_is_a_tuple_like_any_other(self) -> None:
        cell = fdc.linen.DropoutCell(nn.LSTMCell(4), SPEC)
        carry = cell.initialize_carry(KEY, (2, 3))
        assert next(iter(carry)) is carry.cell_carry
        assert carry._replace(masks=None).cell_carry is carry.cell_carry


class TestSow:
    def run(self, layer: nn.Module, **options: Any) -> Any:
        variables = {"params": nn.RNN(Sows()).init(KEY, X)["params"]}
        return layer.apply(variables, X, rngs={"dropout": KEY}, **options)

    def test_sown_values_are_those_of_the_stock_layer(self) -> None:
        axes: Any = {"intermediates": 0, "losses": 0}
        _, stock = self.run(nn.RNN(Sows(), variable_axes=axes), mutable=list(axes))
        layer = fdc.linen.RNN(Sows(), fdc.RecurrentDropout())
        _, ours = self.run(layer, mutable=list(axes))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, stock)

    def test_collecting_changes_no_mask(self) -> None:
        layer = fdc.linen.RNN(Sows(), SPEC)
        ys, sown = self.run(layer, mutable=["intermediates"])
        np.testing.assert_array_equal(ys, self.run(layer))
        h = jnp.swapaxes(sown["intermediates"]["cell"]["h"][0], 0, 1)
        np.testing.assert_allclose(ys, jnp.where(ys == 0, 0, h / 0.5), rtol=1e-6)

    def test_two_calls_append(self) -> None:
        class Twice(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> Any:
                layer = fdc.linen.RNN(Sows(), SPEC)
                return layer(x) + layer(x + 1)

        variables = {"params": Twice().init(KEY, X)["params"]}
        options = {"rngs": {"dropout": KEY}, "mutable": ["intermediates"]}
        sown: Any = Twice().apply(variables, X, **options)[1]
        first, second = sown["intermediates"]["Sows_0"]["h"]
        assert first.shape == second.shape == (5, 2, 4)
        assert not np.array_equal(first, second)

    def test_captured_values_of_the_cell(self) -> None:
        layer = fdc.linen.RNN(Sows(), SPEC)
        _, captured = self.run(layer, capture_intermediates=True, mutable=["intermediates"])
        assert captured["intermediates"]["cell"]["Dense_0"]["__call__"][0].shape == (5, 2, 4)

    def test_a_cell_that_writes_another_collection_is_refused(self) -> None:
        class Counts(Sows):
            @nn.compact
            def __call__(self, carry: jax.Array, x: jax.Array) -> Any:
                count = self.variable("counts", "n", lambda: jnp.zeros(()))
                if not self.is_initializing():
                    count.value += 1
                return carry, carry + nn.Dense(4)(x)

        layer = fdc.linen.RNN(Counts(), SPEC)
        variables = {"params": {"cell": Counts().init(KEY, jnp.zeros((2, 4)), X[:, 0])["params"]}}
        variables["counts"] = {"cell": {"n": jnp.zeros(())}}
        for mutable in (False, ["counts"], True):
            with pytest.raises(TypeError, match="Counts writes a variable at each step"):
                layer.apply(variables, X, rngs={"dropout": KEY}, mutable=mutable)


class TestStreams:
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_a_cell_that_draws_if_it_has_a_stream_is_refused(self, deterministic: bool) -> None:
        class Draws(Sows):
            @nn.compact
            def __call__(self, carry: jax.Array, x: jax.Array) -> Any:
                x = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)
                return carry, carry + nn.Dense(4)(x)

        layer = fdc.linen.RNN(Draws(), SPEC, deterministic)
        variables = layer.init(KEY, X)
        with pytest.raises(TypeError, match="Draws draws from an rng stream at each step"):
            layer.apply(variables, X, rngs={"dropout": KEY})

    def test_it_is_seen_under_a_transformation_too(self) -> None:
        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)

        class Draws(Sows):
            @nn.compact
            def __call__(self, carry: jax.Array, x: jax.Array) -> Any:
                return carry, carry + nn.Dense(4)(nn.remat(Inner)()(x))

        layer = fdc.linen.RNN(Draws(), SPEC)
        variables = layer.init(KEY, X)
        with pytest.raises(TypeError, match="Draws draws from an rng stream at each step"):
            layer.apply(variables, X, rngs={"dropout": KEY})


class Pair(nn.RNNCellBase):
    """A cell that adds up what two others give."""

    upper: nn.RNNCellBase
    lower: nn.RNNCellBase
    num_feature_axes = 1  # type: ignore[assignment]

    def __call__(self, carry: Any, x: jax.Array) -> Any:
        carries, ys = zip(self.upper(carry[0], x), self.lower(carry[1], 2 * x), strict=True)
        return carries, 10 * ys[0] + ys[1]

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        return (jnp.zeros((*input_shape[:-1], 4)),) * 2


@pytest.mark.parametrize("name", ["upper", "lower"])
def test_weights_that_two_scopes_share_are_told_apart(name: str) -> None:
    """Tied weights: noise on one cell's stays off the other's, as it does on equal copies."""
    gone = fdc.Dropout(keep_prob=0.0, variational=True)

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            pair = Pair(nn.SimpleCell(4), nn.SimpleCell(4))  # each in a scope of its own
            spec = fdc.RecurrentDropout(params={"upper": None, "lower": None, name: gone})
            return nn.RNN(fdc.linen.DropoutCell(pair, spec))(x)

    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            return nn.RNN(Pair(nn.SimpleCell(4), nn.SimpleCell(4)))(x)

    params = Tied().init(KEY, X)["params"]
    one = params["SimpleCell_0"]
    tied = {"SimpleCell_0": one, "SimpleCell_1": one}
    assert params.keys() == tied.keys()
    zeros = jax.tree.map(jnp.zeros_like, one)
    by_hand = {**tied, {"upper": "SimpleCell_0", "lower": "SimpleCell_1"}[name]: zeros}
    ys: Any = Tied().apply({"params": tied}, X, rngs={"dropout": KEY})
    wanted: Any = Bare().apply({"params": by_hand}, X)
    np.testing.assert_allclose(ys, wanted, rtol=1e-6)


class Reads(FromZeros):
    """A cell that sows its inputs."""

    @nn.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        self.sow("intermediates", "read", inputs)
        return carry, inputs


@pytest.mark.parametrize("keep_order", [False, True])
def test_sown_values_have_the_order_of_the_inputs(keep_order: bool) -> None:
    """Backward too, whatever the order of the outputs is."""
    xs = jax.random.normal(KEY, (2, 5, 3))
    layer = fdc.linen.RNN(Reads(), fdc.RecurrentDropout(), reverse=True, keep_order=keep_order)
    ys, sown = layer.apply({}, xs, mutable=["intermediates"])
    (read,) = sown["intermediates"]["cell"]["read"]
    np.testing.assert_array_equal(read, xs.swapaxes(0, 1))
    np.testing.assert_array_equal(ys, xs if keep_order else xs[:, ::-1])


class Factors(FromZeros):
    """`h' = a h + b x`, with a and b in one variable, which `writes` counts up."""

    writes: bool = False

    @nn.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        pair = self.variable("consts", "pair", lambda: (jnp.float32(1), jnp.float32(2)))
        a, b = pair.value
        if self.writes:
            pair.value = (a + 1, b)
        carry = a * carry + b * inputs
        return carry, carry


FACTORS = {"consts": {"cell": {"pair": (jnp.float32(10), jnp.float32(20))}}}


@pytest.mark.parametrize("mutable", [False, True, ["consts"]], ids=str)
def test_a_variable_that_is_a_tuple_is_not_sown(mutable: Any) -> None:
    """Sown values are tuples too. The numbers are those that came, and they stay."""
    x, layer = jnp.ones((1, 3, 1)), fdc.linen.RNN(Factors(), fdc.RecurrentDropout())
    ys: Any = layer.apply(FACTORS, x, mutable=mutable)
    if mutable:
        ys, after = ys
        assert jax.tree.map(float, after) == jax.tree.map(float, FACTORS)
    assert ys[0, :, 0].tolist() == [20, 220, 2220]
    made = layer.init(KEY, x)["consts"]["cell"]["pair"]
    assert tuple(map(float, made)) == (1, 2)


def test_a_variable_that_is_a_tuple_is_not_written() -> None:
    layer = fdc.linen.RNN(Factors(writes=True), fdc.RecurrentDropout())
    with pytest.raises(TypeError, match="Factors writes a variable at each step"):
        layer.apply(FACTORS, jnp.ones((1, 3, 1)), mutable=["consts"])


class Losses(FromZeros):
    @nn.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        self.sow("losses", "sum", inputs.sum())
        return carry, inputs


def test_sown_values_follow_those_that_came() -> None:
    """Those of `init`, say: `sow` appends to them, once for all steps."""
    layer, x = fdc.linen.RNN(Losses(), fdc.RecurrentDropout()), jnp.arange(3.0).reshape(1, 3, 1)
    for given in ({}, {"losses": {"cell": {"sum": (jnp.float32(7),)}}}):
        ran: Any = layer.apply(given, x, mutable=["losses"])
        _, after = ran
        *came, sown = after["losses"]["cell"]["sum"]
        assert [float(it) for it in came] == ([7] if given else [])
        assert sown.tolist() == [0, 1, 2]


@pytest.mark.parametrize("mutable", [True, ["params"], ["params", "losses"]], ids=str)
def test_a_cell_under_remat_runs_if_its_weights_are_mutable(mutable: Any) -> None:
    cell = nn.remat(nn.SimpleCell)(4)
    layer, stock = fdc.linen.RNN(cell, fdc.RecurrentDropout()), nn.RNN(cell)
    variables = stock.init(KEY, X)
    ys, _ = layer.apply(variables, X, mutable=mutable)
    wanted: Any = stock.apply(variables, X)
    np.testing.assert_allclose(ys, wanted, rtol=1e-6)


class SowsUnderRemat(FromZeros):
    @nn.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        return nn.remat(Losses)()(carry, inputs)


def test_sown_values_of_init_and_of_a_block_under_remat() -> None:
    layer, x = fdc.linen.RNN(SowsUnderRemat(), fdc.RecurrentDropout()), jnp.ones((1, 3, 1))
    variables = layer.init(KEY, x)
    _, after = layer.apply(variables, x, mutable=["losses"])
    (values,) = jax.tree.leaves(after, is_leaf=lambda node: isinstance(node, tuple))
    assert [np.shape(value) for value in values] == [(), (3,)]
