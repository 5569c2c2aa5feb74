"""A wrapped cell in linen's hosts: keys, weights of every kind, carries of other specs."""

import dataclasses
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from added_noise import Added
from flax import serialization
from flax.core import freeze
from linen_cells import UNITS, Delegating, MadeInCompact, MadeInSetup, Residual
from quick_prng import QUICK, quick_key

import flax_dropout_cell as fdc
from flax_dropout_cell.linen import DropoutCell

B, T, F, H = 4, 5, 3, 8
RNG = quick_key(5)
XS = jax.random.normal(jax.random.key(1), (B, T, F))
FIXED = fdc.Dropout(keep_prob=0.5, variational=True)
PER_STEP = fdc.Dropout(keep_prob=0.5)


def train(rnn: nn.Module, variables: Any, xs: jax.Array, rng: Any = RNG, **kwargs: Any) -> Any:
    return rnn.apply(variables, xs, rngs={"dropout": rng}, **kwargs)


@dataclasses.dataclass(frozen=True)
class Flipped:
    """Turns the sign where the mask is True, and always in evaluation."""

    variational: bool = True

    def draw_mask(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        del dtype
        return jax.random.bernoulli(rng, 0.5, shape)

    def apply(self, mask: jax.Array, value: jax.Array, previous: Any) -> jax.Array:
        del previous
        return jnp.where(mask, -value, value)

    def expected(self, value: jax.Array, previous: Any) -> jax.Array:
        del previous
        return -value


def typed(words: jax.Array) -> jax.Array:
    """The key that a wrapper's carry keeps as words."""
    return jax.random.wrap_key_data(words, impl=QUICK)


class Shift(nn.RNNCellBase):
    """A cell of one state, with one weight for each unit."""

    features: int = H

    @nn.compact
    def __call__(self, carry: jax.Array, inputs: jax.Array) -> Any:
        w = self.param("w", nn.initializers.ones, (self.features,))
        return carry, jnp.broadcast_to(w, (*inputs.shape[:-1], self.features))

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: Any) -> jax.Array:
        return jax.random.normal(rng, (*input_shape[:-1], self.features))

    @property
    def num_feature_axes(self) -> int:
        return 1


class Counting(Shift):
    @nn.compact
    def __call__(self, carry: jax.Array, inputs: jax.Array) -> Any:
        self.variable("count", "calls", lambda: jnp.zeros((), jnp.int32)).value += 1
        return super().__call__(carry, inputs)


class TestKeys:
    def test_nested_unbound_wrappers_draw_masks_of_their_own(self) -> None:
        """Two masks keep a quarter; the carry's random start has a key of its own too."""
        cell = DropoutCell(
            DropoutCell(Shift(), fdc.RecurrentDropout(input=FIXED)),
            fdc.RecurrentDropout(input=FIXED),
        )
        shape = (64, 256)

        def kept(carry: Any) -> float:
            return float((carry.masks.input & carry.cell_carry.masks.input).mean())

        carry: Any = cell.initialize_carry(RNG, shape)
        assert abs(kept(carry) - 0.25) < 5 * (0.25 * 0.75 / (64 * 256)) ** 0.5
        again: Any = cell.redraw_masks(carry, jnp.ones(shape), rng=jax.random.key(8))
        assert abs(kept(again) - 0.25) < 5 * (0.25 * 0.75 / (64 * 256)) ** 0.5
        start = carry.cell_carry.cell_carry
        assert (start != jax.random.normal(RNG, start.shape)).all()

    def test_a_wrapper_deep_in_a_cell_has_another_key(self) -> None:
        inner = DropoutCell(nn.SimpleCell(H), fdc.RecurrentDropout(input=FIXED))

        class Around(Residual):
            @nn.nowrap
            def initialize_carry(self, rng: jax.Array, input_shape: Any) -> Any:
                return self.inner.initialize_carry(rng, input_shape)

        cell = DropoutCell(Around(inner), fdc.RecurrentDropout(input=FIXED))
        carry: Any = cell.initialize_carry(RNG, (B, 64))
        assert (carry.masks.input != carry.cell_carry.masks.input).any()

    def test_redraw_masks_with_a_key_is_the_cores_draw(self) -> None:
        spec = fdc.RecurrentDropout(input=FIXED, state=(None, FIXED), output=FIXED)
        cell = nn.LSTMCell(H)
        x = jnp.ones((B, F))
        state = cell.initialize_carry(RNG, x.shape)
        variables = cell.init(RNG, state, x)
        wrapped: Any = DropoutCell(cell, spec)
        for given in (x, jax.ShapeDtypeStruct(x.shape, x.dtype)):
            carry = wrapped.redraw_masks(state, given, rng=RNG)
            want = fdc.draw_masks(variables, state, x, RNG, cell=cell.apply, dropout=spec)
            for site in ("input", "state", "output"):
                got, wanted = getattr(carry.masks, site), getattr(want, site)
                jax.tree.map(np.testing.assert_array_equal, got, wanted)

    def test_a_given_key_wins_over_the_stream(self) -> None:
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> Any:
                cell = DropoutCell(nn.SimpleCell(H), fdc.RecurrentDropout(input=FIXED))
                carry: Any = cell.redraw_masks(jnp.zeros((B, H)), x, rng=RNG)
                return carry.masks.input

        model: Any = Model()
        masks = [model.apply({}, XS[:, 0], rngs={"dropout": jax.random.key(n)}) for n in (0, 1)]
        np.testing.assert_array_equal(*masks)


class TestNoiseOnWeights:
    def test_evaluation_gives_the_expected_weights(self) -> None:
        rnn = nn.RNN(Shift())
        variables = {"params": rnn.init(RNG, XS)["params"]}
        for nested in (False, True):
            cell: Any = DropoutCell(
                Shift(), fdc.RecurrentDropout(params=Flipped()), deterministic=True
            )
            if nested:
                cell = DropoutCell(cell, fdc.RecurrentDropout(input=PER_STEP), deterministic=True)
            ys: Any = nn.RNN(cell).apply(variables, XS)
            assert (ys == -1).all()

    def test_init_runs_the_cell_once(self) -> None:
        x = jnp.ones((B, F))
        cell = DropoutCell(Counting(), fdc.RecurrentDropout(params=FIXED, input=FIXED))
        for rngs in (RNG, {"params": RNG, "dropout": RNG}):
            carry = cell.redraw_masks(jnp.zeros((B, H)), x, rng=RNG)
            variables = cell.init(rngs, carry, x)
            assert variables["count"]["calls"] == 1

    @pytest.mark.parametrize("frozen", [False, True])
    def test_named_weights(self, frozen) -> None:
        """A dict of noises: `init` needs no stream, and evaluation is the bare cell."""
        spec = fdc.RecurrentDropout(params={"i": None, "h": {"kernel": FIXED}})
        rnn = nn.RNN(DropoutCell(nn.SimpleCell(H), spec), return_carry=True)
        variables = rnn.init(RNG, XS)
        jax.tree.map(
            np.testing.assert_array_equal, variables, nn.RNN(nn.SimpleCell(H)).init(RNG, XS)
        )
        variables = freeze(variables) if frozen else variables
        evaluated = nn.RNN(DropoutCell(nn.SimpleCell(H), spec, deterministic=True))
        want = nn.RNN(nn.SimpleCell(H)).apply(variables, XS)
        np.testing.assert_array_equal(evaluated.apply(variables, XS), want)
        carry, _ = train(rnn, variables, XS)
        assert carry.masks.params["h"]["kernel"].shape == (1, H, H)
        assert carry.masks.params["i"]["kernel"] is None
        grads = jax.grad(lambda v: train(rnn, v, XS)[1].sum())(variables)["params"]["cell"]
        kept = carry.masks.params["h"]["kernel"][0]
        np.testing.assert_array_equal(grads["h"]["kernel"] == 0, ~kept)

    @pytest.mark.parametrize("noise", [FIXED, PER_STEP], ids=["variational", "step"])
    def test_boxed_weights(self, noise) -> None:
        """Weights with partition names are disturbed as those without, and stay boxed."""
        boxed_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        cells = [nn.SimpleCell(H, kernel_init=boxed_init), nn.SimpleCell(H)]
        got, variables = [], {}
        for cell in cells:
            rnn = nn.RNN(DropoutCell(cell, fdc.RecurrentDropout(params=noise)))
            variables = rnn.init(RNG, XS)
            bare = nn.RNN(cell).init(RNG, XS)
            assert jax.tree.structure(variables) == jax.tree.structure(bare)
            got.append(train(rnn, variables, XS))
        np.testing.assert_array_equal(*got)
        assert (got[0] != nn.RNN(cells[1]).apply(nn.unbox(variables), XS)).any()

    def test_weights_that_a_step_does_not_make(self) -> None:
        """A head that only another method uses, in a host and with a carry from outside."""

        class WithHead(Delegating):
            def setup(self) -> None:
                self.cell = nn.SimpleCell(H)
                self.head = nn.Dense(2)

            def __call__(self, carry: Any, inputs: jax.Array) -> Any:
                return self.cell(carry, inputs)

            def read(self, h: jax.Array) -> jax.Array:
                return self.head(h)

            @nn.nowrap
            def initialize_carry(self, rng: jax.Array, input_shape: Any) -> Any:
                return nn.SimpleCell(H, parent=None).initialize_carry(rng, input_shape)

        class Model(nn.Module):
            cell: nn.RNNCellBase
            spec: fdc.RecurrentDropout

            @nn.compact
            def __call__(self, xs: jax.Array, carry: Any = None) -> Any:
                ys = nn.RNN(DropoutCell(self.cell, self.spec))(xs, initial_carry=carry)
                cell: Any = self.cell
                return ys, cell.read(ys)

        model = Model(WithHead(), fdc.RecurrentDropout(params=FIXED))
        variables = model.init(RNG, XS)
        assert set(variables["params"]["cell"]) == {"cell", "head"}
        ys, read = train(model, variables, XS)
        head = variables["params"]["cell"]["head"]
        np.testing.assert_allclose(read, ys @ head["kernel"] + head["bias"][None, None], rtol=1e-5)
        unbound = DropoutCell(WithHead(), fdc.RecurrentDropout(params=FIXED))
        carry = unbound.initialize_carry(RNG, XS[:, 0].shape)
        outside, _ = model.apply(variables, XS, carry)
        assert (outside != ys).any()

    @pytest.mark.parametrize("noise", [FIXED, PER_STEP], ids=["variational", "step"])
    def test_weights_that_are_bound_elsewhere(self, noise) -> None:
        """A cell and the module in its field have scopes of their own: each gets its own masks."""

        class Model(nn.Module):
            spec: fdc.RecurrentDropout

            @nn.compact
            def __call__(self, xs: jax.Array) -> Any:
                inner = nn.SimpleCell(UNITS, name="inner")
                cell = DropoutCell(Residual(inner, name="outer"), self.spec)
                ys = nn.RNN(cell, return_carry=True)(xs)
                return ys, inner(jnp.zeros((B, UNITS)), xs[:, 0])[1]

        everything = Model(fdc.RecurrentDropout(params=noise))
        variables = everything.init(RNG, XS)
        assert set(variables["params"]) == {"inner", "outer"}
        (carry, _), plain = train(everything, variables, XS)
        if noise.variational:
            shapes = jax.tree.map(lambda mask: mask.shape[1:], carry.masks.params)
            weights = {**variables["params"]["outer"], "inner": variables["params"]["inner"]}
            want = jax.tree.map(jnp.shape, weights)
            assert shapes == want
        # The cell's own use of its weights, outside of the wrapper, is undisturbed.
        inner = nn.SimpleCell(UNITS)
        own = {"params": variables["params"]["inner"]}
        np.testing.assert_array_equal(plain, inner.apply(own, jnp.zeros((B, UNITS)), XS[:, 0])[1])

        def grads(spec: fdc.RecurrentDropout) -> Any:
            return jax.grad(lambda v: train(Model(spec), v, XS)[0][1].sum())(variables)["params"]

        if noise.variational:
            masks = carry.masks.params
            got = grads(everything.spec)
            np.testing.assert_array_equal(
                got["inner"]["h"]["kernel"] == 0, ~masks["inner"]["h"]["kernel"][0]
            )
            outer = masks["Dense_0"]["kernel"][0]
            np.testing.assert_array_equal(got["outer"]["Dense_0"]["kernel"] == 0, ~outer)
        named = fdc.RecurrentDropout(
            params={"inner": None, "Dense_0": {"kernel": noise, "bias": None}}
        )
        got = grads(named)
        assert (got["inner"]["h"]["kernel"] != 0).all()

    def test_a_cell_without_weights_is_an_error(self) -> None:
        class Echo(Delegating):
            def __call__(self, carry: Any, inputs: jax.Array) -> Any:
                return carry, inputs

        for noise in (FIXED, PER_STEP):
            rnn = nn.RNN(DropoutCell(Echo(), fdc.RecurrentDropout(params=noise)))
            with pytest.raises(ValueError, match="Echo has no weights"):
                train(rnn, {}, XS)
            rnn = nn.RNN(
                DropoutCell(Echo(), fdc.RecurrentDropout(params=noise), deterministic=True)
            )
            with pytest.raises(ValueError, match="Echo has no weights"):
                rnn.apply({}, XS)


class TestWhatExplodes:
    @pytest.mark.parametrize("made", [MadeInSetup, MadeInCompact])
    def test_an_lstm_made_in_the_cell_is_refused(self, made) -> None:
        class Hidden(made):
            @nn.nowrap
            def initialize_carry(self, rng: jax.Array, input_shape: Any) -> Any:
                return nn.LSTMCell(H, parent=None).initialize_carry(rng, input_shape)

        for noise in (FIXED, PER_STEP):
            cell = DropoutCell(Hidden(), fdc.RecurrentDropout(state=noise))
            with pytest.raises(ValueError, match=r"every leaf of .*state=\(None, noise\)"):
                cell.initialize_carry(RNG, (B, F))

    def test_a_gru_of_any_kind_is_refused(self) -> None:
        class Mine(nn.GRUCell):
            pass

        for cell in (nn.GRUCell(H), nn.MGUCell(H), Mine(H), fdc.linen.GRUCell(H)):
            for wrapped in (cell, DropoutCell(cell, fdc.RecurrentDropout())):
                with pytest.raises(ValueError, match="would explode") as caught:
                    DropoutCell(wrapped, fdc.RecurrentDropout(state=PER_STEP)).initialize_carry(
                        RNG, (B, F)
                    )
                is_gru = not isinstance(cell, nn.MGUCell)  # the site `recurrent` is the GRU's alone
                assert ("GRU" in str(caught.value)) == is_gru
                assert (
                    ("gru_cell" in str(caught.value)) == ("inside" in str(caught.value)) == is_gru
                )
            DropoutCell(cell, fdc.RecurrentDropout(state=fdc.Zoneout(prob=0.1))).initialize_carry(
                RNG, (B, F)
            )


class TestSitesInside:
    @pytest.mark.parametrize("noise", [FIXED, PER_STEP], ids=["variational", "step"])
    @pytest.mark.parametrize("params", [None, FIXED], ids=["", "on weights too"])
    def test_nn_rnn_is_dropout_scan(self, noise, params) -> None:
        inside = {"recurrent": noise, "candidate": noise}
        spec = fdc.RecurrentDropout(inside=inside, params=params)
        rnn = nn.RNN(DropoutCell(fdc.linen.LSTMCell(H), spec), return_carry=True)
        variables = rnn.init(RNG, XS)
        carry, ys = train(rnn, variables, XS)
        key = RNG if carry.rng is None else typed(carry.rng.key[0])
        masks = carry.masks._replace(params=None)
        if params is not None:
            masks = masks._replace(
                params={"params": jax.tree.map(lambda mask: mask[0], carry.masks.params)}
            )
        cell = fdc.linen.LSTMCell(H)
        core = dataclasses.replace(spec, params=params and {"params": params})
        _, want = fdc.dropout_scan(
            {"params": variables["params"]["cell"]},
            cell.initialize_carry(RNG, XS[:, 0].shape),
            XS.swapaxes(0, 1),
            key,
            cell=cell.apply,
            dropout=core,
            masks=masks,
        )
        np.testing.assert_allclose(ys.swapaxes(0, 1), want, rtol=1e-5, atol=1e-6)
        assert (ys != nn.RNN(cell).apply(variables, XS)).any()


class TestCarriesOfOtherSpecs:
    def carry_of(self, spec: fdc.RecurrentDropout) -> tuple[Any, Any]:
        rnn = nn.RNN(DropoutCell(nn.SimpleCell(H), spec), return_carry=True)
        variables = rnn.init(RNG, XS)
        carry, _ = train(rnn, variables, XS)
        return variables, carry

    @pytest.mark.parametrize(
        "other",
        [
            fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=1.0, variational=True)),
            fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=0.9, variational=True)),
            fdc.RecurrentDropout(input=FIXED, output=PER_STEP),
            fdc.RecurrentDropout(),
        ],
        ids=["one", "more", "another site", "nothing"],
    )
    def test_is_refused(self, other) -> None:
        variables, carry = self.carry_of(fdc.RecurrentDropout(input=FIXED))
        rnn = nn.RNN(DropoutCell(nn.SimpleCell(H), other), return_carry=True)
        with pytest.raises(ValueError, match=r"another spec.*\n.*\n.*\n.*redraw_masks") as error:
            train(rnn, variables, XS, initial_carry=carry)
        assert len(str(error.value).splitlines()) <= 5
        fresh = DropoutCell(nn.SimpleCell(H), other).redraw_masks(carry, XS[:, 0], rng=RNG)
        train(rnn, variables, XS, initial_carry=fresh)
        # Evaluation uses no masks.
        rnn = nn.RNN(DropoutCell(nn.SimpleCell(H), other, deterministic=True))
        rnn.apply(variables, XS, initial_carry=carry)

    def test_an_equal_spec_goes_on(self) -> None:
        variables, carry = self.carry_of(fdc.RecurrentDropout(input=FIXED))
        again = fdc.Dropout(keep_prob=np.float64(0.5), variational=True, broadcast_dims=())
        ys = [
            train(
                nn.RNN(DropoutCell(nn.SimpleCell(H), fdc.RecurrentDropout(input=noise))),
                variables,
                XS,
                initial_carry=carry,
            )
            for noise in (again, FIXED)
        ]
        np.testing.assert_array_equal(*ys)
        dropped = jnp.where(carry.masks.input[:, None], 2 * XS, 0)
        wanted: Any = nn.RNN(nn.SimpleCell(H)).apply(
            variables, dropped, initial_carry=carry.cell_carry
        )
        np.testing.assert_allclose(ys[0], wanted, rtol=1e-5, atol=1e-6)

    def test_a_carry_is_saved_and_loaded(self) -> None:
        """Per-step keys, arrays and the outline, whatever kind of key the stream had."""
        noise = fdc.Dropout(keep_prob=jnp.float32(0.5), variational=True)
        spec = fdc.RecurrentDropout(input=noise, output=PER_STEP, params=FIXED)
        rnn = nn.RNN(DropoutCell(nn.SimpleCell(H), spec), return_carry=True)
        variables = rnn.init(RNG, XS)
        for rng in (RNG, jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")):
            carry, _ = train(rnn, variables, XS, rng)
            _, want = rnn.apply(variables, XS, initial_carry=carry)
            blank = jax.tree.map(jnp.zeros_like, carry)
            restored = serialization.from_bytes(blank, serialization.to_bytes(carry))
            for again in (restored, jax.tree.map(np.asarray, carry)):
                _, got = rnn.apply(variables, XS, initial_carry=again)
                np.testing.assert_array_equal(got, want)

    def test_a_restored_carry_keeps_its_prng(self) -> None:
        """The keys of rbg and unsafe_rbg have one shape, and draw other masks."""
        rnn = nn.RNN(
            DropoutCell(nn.SimpleCell(H), fdc.RecurrentDropout(output=PER_STEP)), return_carry=True
        )
        variables = rnn.init(RNG, XS)
        carries = {
            impl: train(rnn, variables, XS, jax.random.key(0, impl=impl))[0]
            for impl in ("rbg", "unsafe_rbg", "threefry2x32")
        }
        for impl in ("rbg", "threefry2x32"):
            _, want = rnn.apply(variables, XS, initial_carry=carries[impl])
            saved = serialization.to_bytes(carries[impl])
            for target in carries.values():
                restored = serialization.from_bytes(target, saved)
                _, got = rnn.apply(variables, XS, initial_carry=restored)
                np.testing.assert_array_equal(got, want)

    def test_a_saved_carry_of_another_spec_is_refused(self) -> None:
        variables, carry = self.carry_of(fdc.RecurrentDropout(input=FIXED))
        other = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=0.9, variational=True))
        _, target = self.carry_of(other)
        restored = serialization.from_bytes(target, serialization.to_bytes(carry))
        rnn = nn.RNN(DropoutCell(nn.SimpleCell(H), other))
        with pytest.raises(ValueError, match="another spec"):
            train(rnn, variables, XS, initial_carry=restored)

    @pytest.mark.parametrize("noise", [{"output": PER_STEP}, {"params": FIXED}])
    def test_a_sliced_carry_is_an_error_that_names_the_layer(self, noise) -> None:
        variables, carry = self.carry_of(fdc.RecurrentDropout(**noise))
        part = jax.tree.map(lambda leaf: leaf[2:], carry)
        rnn = nn.RNN(DropoutCell(nn.SimpleCell(H), fdc.RecurrentDropout(**noise)))
        with pytest.raises(ValueError, match=r"sliced.*\n?.*RNN with sequence_ids"):
            train(rnn, variables, XS[2:], initial_carry=part)


class TestTypesOfInputs:
    @pytest.mark.parametrize("noise", [FIXED, Added()], ids=["dropout", "added"])
    def test_tokens(self, noise) -> None:
        """Inputs that are ints, for which a host says no more than a shape."""

        class Tokens(nn.RNNCellBase):
            @nn.compact
            def __call__(self, carry: Any, inputs: jax.Array) -> Any:
                x = nn.Embed(5, F)(inputs[..., 0])
                return nn.SimpleCell(H)(carry, x)

            @nn.nowrap
            def initialize_carry(self, rng: jax.Array, input_shape: Any) -> Any:
                return jnp.zeros((*input_shape[:-1], H))

            @property
            def num_feature_axes(self) -> int:
                return 1

        tokens = jax.random.randint(RNG, (B, T, 1), 0, 5)
        rnn = nn.RNN(DropoutCell(Tokens(), fdc.RecurrentDropout(output=noise)), return_carry=True)
        variables = rnn.init(RNG, tokens)
        carry, ys = train(rnn, variables, tokens)
        want: Any = nn.RNN(Tokens()).apply(variables, tokens)
        for t in range(T):
            disturbed = noise.apply(carry.masks.output, want[:, t], None)
            np.testing.assert_allclose(ys[:, t], disturbed, rtol=1e-6)

    def test_boolean_masks_are_not_drawn_again(self) -> None:
        rnn = nn.RNN(
            DropoutCell(Shift(), fdc.RecurrentDropout(input=FIXED, output=FIXED)), return_carry=True
        )
        variables = {"params": {"cell": {"w": jnp.ones(H)}}}
        carry, _ = train(rnn, variables, XS.astype(jnp.bfloat16))
        assert carry.rng is None


class TestNoRows:
    @pytest.mark.parametrize("noise", [FIXED, PER_STEP], ids=["variational", "step"])
    def test_a_batch_of_no_rows(self, noise) -> None:
        spec = fdc.RecurrentDropout(input=noise, output=noise, state=noise, params=noise)
        rnn = nn.RNN(DropoutCell(nn.SimpleCell(H), spec), return_carry=True)
        variables = rnn.init(RNG, XS)
        _, ys = train(rnn, variables, XS[:0])
        assert ys.shape == (0, T, H)
        _, ys = train(rnn, variables, XS[:0], seq_lengths=jnp.zeros((0,), jnp.int32))
        assert ys.shape == (0, T, H)


def test_errors_are_short() -> None:
    class Big(nn.Module):
        parts: tuple[nn.Module, ...]

    big = Big(tuple(nn.Dense(n) for n in range(50)))
    with pytest.raises(TypeError, match=r"is not an RNNCell of flax.linen") as error:
        DropoutCell(big, fdc.RecurrentDropout())  # type: ignore[arg-type]
    assert len(str(error.value)) < 300
    with pytest.raises(TypeError, match="dropout must be a RecurrentDropout") as error:
        DropoutCell(nn.LSTMCell(H), big)  # type: ignore[arg-type]
    assert len(str(error.value)) < 300


def test_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnn = nn.RNN(
            DropoutCell(nn.SimpleCell(H), fdc.RecurrentDropout(params=FIXED, output=PER_STEP))
        )
        train(rnn, rnn.init(RNG, XS), XS)


def test_arrays_of_several_sites_in_init() -> None:
    """In `init` there are no weights to disturb; the other sites keep their own arrays."""

    class Sited(nn.RNNCellBase):
        @nn.compact
        def __call__(self, carry, x, *, disturb=fdc.undisturbed):
            h = jnp.tanh(nn.Dense(H)(x) + disturb("recurrent", carry))
            return h, h

        def initialize_carry(self, rng, input_shape):
            return jnp.zeros((*input_shape[:-1], H))

        @property
        def num_feature_axes(self) -> int:
            return 1

    def noise(keep_prob):
        return fdc.Dropout(keep_prob=keep_prob, variational=True)

    kernel = noise(jnp.full((F, H), 0.5))
    spec = fdc.RecurrentDropout(
        params={"Dense_0": {"bias": None, "kernel": kernel}},
        inside={"recurrent": noise(jnp.full((H,), 0.5))},
    )
    rnn = nn.RNN(DropoutCell(Sited(), spec))
    variables = rnn.init({"params": RNG, "dropout": jax.random.key(1)}, XS)
    ys: Any = rnn.apply(variables, XS, rngs={"dropout": RNG})
    assert ys.shape == (B, T, H)


def test_a_restored_carry_of_one_row_is_not_shared_by_a_batch() -> None:
    noise = fdc.Dropout(keep_prob=0.5, variational=True)
    cell = fdc.linen.DropoutCell(nn.SimpleCell(5), fdc.RecurrentDropout(input=noise))
    one, four = (cell.initialize_carry(RNG, (rows, 3)) for rows in (1, 4))
    restored = serialization.from_bytes(four, serialization.to_bytes(one))
    x = jnp.ones((4, 3))
    variables = cell.init(RNG, four, x)
    with pytest.raises(ValueError, match=r"drawn for an input of shape \(1, 3\).*share masks"):
        cell.apply(variables, restored, x)
