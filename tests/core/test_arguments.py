"""Arguments that Python or JAX would take for something else are one clear error each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hand_masks import kept, site_key

import flax_dropout_cell as fdc

KEY = jax.random.key(0)
B, T, F = 4, 5, 3
H, XS = jnp.zeros((B, F)), jnp.ones((T, B, F))
NOISE = fdc.Dropout(keep_prob=0.5)
FROZEN = fdc.Dropout(keep_prob=0.5, variational=True)
SPEC = fdc.RecurrentDropout(input=NOISE)


def cell(params: Any, h: Any, x: Any) -> Any:
    return h + x, x


def scan(spec: fdc.RecurrentDropout = SPEC, **options: Any) -> Any:
    given: dict[str, Any] = {"xs": XS, "rng": KEY, "cell": cell} | options
    xs, rng = given.pop("xs"), given.pop("rng")
    return fdc.dropout_scan(None, H, xs, rng, dropout=spec, **given)


def linen(spec: fdc.RecurrentDropout = SPEC, **options: Any) -> Any:
    layer = fdc.linen.RNN(nn.GRUCell(F), spec)
    return layer.apply(layer.init(KEY, XS), XS, rng=KEY, **options)


def tensorflow(*arguments: Any, **options: Any) -> Any:
    wrapper = fdc.linen.RNNCellDropoutWrapper(nn.GRUCell(F), *arguments, **options)
    return nn.RNN(wrapper).init_with_output({"params": KEY, "dropout": KEY}, XS)


class Returns:
    """A noise whose mask or whose value is None."""

    variational = False

    def __init__(self, mask: Any) -> None:
        self.mask = mask

    def draw_mask(self, rng: Any, shape: Any, dtype: Any) -> Any:
        return self.mask

    def apply(self, mask: Any, value: Any, previous: Any) -> Any:
        return None

    def expected(self, value: Any, previous: Any) -> Any:
        return value


Case = tuple[Callable[[], Any], type[Exception], str]
FLAGS: dict[str, Case] = {
    name: (call, TypeError, rf"{argument} must be True or False.*, got {got}")
    for name, argument, got, call in [
        ("reverse", "reverse", "'False'", lambda: scan(reverse="False")),
        ("parallel", "parallel", "'no'", lambda: scan(parallel="no")),
        ("tied", "tied", "'no'", lambda: fdc.recipes.gal2016(
            input_keep_prob=0.5, recurrent_keep_prob=0.5, tied="no")),  # type: ignore[arg-type]
        ("per_example", "per_example", "'no'", lambda: fdc.embedding_dropout(
            jnp.ones((3, 2)), jnp.zeros(2, int), KEY, keep_prob=0.5, per_example="no")),  # type: ignore[arg-type]
        ("a rate in its place", "deterministic", "0.8",
            lambda: fdc.linen.RNN(nn.GRUCell(F), SPEC, 0.8).init(KEY, XS)),  # type: ignore[arg-type]
        ("a rate in its place, NNX", "deterministic", "0.8", lambda: fdc.nnx.RNN(
            nnx.GRUCell(F, F, rngs=nnx.Rngs(0)), SPEC, 0.8)),  # type: ignore[arg-type]
        ("return_carry", "return_carry", "'no'", lambda: linen(return_carry="no")),
        ("time_major", "time_major", "'batch'", lambda: linen(time_major="batch")),
        ("a fourth keep_prob", "variational_recurrent", "0.9",
            lambda: tensorflow(0.8, 0.8, 0.8, 0.9)),
        ("use_recurrent_bias", "use_recurrent_bias", "'no'", lambda: fdc.nnx.GRUCell(
            F, F, use_recurrent_bias="no", rngs=nnx.Rngs(0))),  # type: ignore[arg-type]
        ("traced", "deterministic", r"bool\[\]",
            lambda: jax.jit(lambda flag: linen(deterministic=flag))(True)),
    ]
}  # fmt: skip
NUMBERS: dict[str, Case] = {
    "start below 0": (lambda: scan(start=np.array(-5)), ValueError, "start must be at least 0"),
    "start, a word": (lambda: scan(start="int32"), TypeError, "start must be an int, got 'int32'"),
    "start, a list": (lambda: scan(start=[0]), TypeError, "start must be an int"),
    "step below 0": (
        lambda: fdc.dropout_cell(
            None, H, XS[0], KEY, step=np.array(-1), cell=cell, dropout=SPEC),  # type: ignore[arg-type]
        ValueError, "step must be at least 0",
    ),
    "unroll": (lambda: scan(unroll=1.5), TypeError, "unroll must be an int of at least 0.*1.5"),
    "unroll, None": (lambda: scan(unroll=None), TypeError, "unroll must be an int of at least 0"),
    "too few rows": (
        lambda: fdc.episode_ids(jnp.arange(3), jnp.ones(3, bool), num_rows=1), ValueError,
        "num_rows must be at least 3, the rows of done, got 1",
    ),
    "rows by halves": (
        lambda: fdc.episode_ids(jnp.arange(3), jnp.ones(3, bool), num_rows=3.5),  # type: ignore[arg-type]
        TypeError, "num_rows must be an int of at least 1, got 3.5",
    ),
    "complex": (
        lambda: fdc.Dropout(keep_prob=np.complex64(0.5)), TypeError,  # type: ignore[arg-type]
        "keep_prob must be a number in .0, 1. or an array",
    ),
    "a bool as a dim": (
        lambda: fdc.Dropout(keep_prob=0.5, broadcast_dims=(True,)), TypeError, "a sequence of ints"
    ),
    "a stddev below 0": (
        lambda: fdc.gaussian_kl(0.0, -1.0), ValueError, "stddev must be a finite number, above 0"
    ),
    "a radius above 1": (
        lambda: fdc.init_lru(KEY, 3, 8, max_radius=1.5), ValueError,
        "0 <= min_radius <= max_radius <= 1.*, got 0.0 and 1.5",
    ),
    "no phase": (
        lambda: fdc.init_lru(KEY, 3, 8, max_phase=-1.0), ValueError, "max_phase must be above 0"
    ),
    "no features": (
        lambda: fdc.init_lru(KEY, 3, 0), ValueError, "features must be an int of at least 1, got 0"
    ),
    "features, a float": (
        lambda: fdc.init_min_gru(KEY, 3.0, 8), TypeError, "in_features must be an int"  # type: ignore[arg-type]
    ),
    "weights of ints": (
        lambda: fdc.init_gru(KEY, 3, 8, int), TypeError, "dtype must be a floating-point one"
    ),
    "a seed of 65 bits": (
        lambda: tensorflow(0.5, seed=2**64), ValueError, "seed must be an int of 64 bits"
    ),
    "a seed of 64 bits without a sign": (
        lambda: tensorflow(0.5, seed=np.uint64(2**63)), ValueError, "seed must be an int of 64 bits"
    ),
    "an id that is not in the table": (
        lambda: fdc.embedding_dropout(jnp.ones((3, 2)), np.array([0, 3]), None, keep_prob=0.5),  # type: ignore[arg-type]
        ValueError, "ids must be from -3 to 2, got 3",
    ),
}  # fmt: skip
KEYS: dict[str, Case] = {
    "an Rngs": (lambda: scan(rng=nnx.Rngs(0)), TypeError, "rng must be one key.*got an Rngs"),
    "weights without a key": (
        lambda: fdc.init_lstm(0, 3, 8), TypeError, r"rng must be one key.*, got 0"  # type: ignore[arg-type]
    ),
    "weights from two keys": (
        lambda: fdc.init_lstm(jax.random.split(KEY), 3, 8), TypeError, r"got key<fry>\[2\]"
    ),
    "a raw key of another PRNG": (
        lambda: scan(rng=jax.random.PRNGKey(0, impl="rbg")), TypeError,
        r"a raw key of 4 words is not one of threefry2x32.*write jax.random.wrap_key_data",
    ),
    "init_key": (lambda: linen(init_key=0), TypeError, "init_key must be one key.*, got 0"),
    "init_key, NNX": (
        lambda: fdc.nnx.RNN(nnx.GRUCell(F, F, rngs=nnx.Rngs(0)), SPEC)(
            XS, rngs=KEY, init_key="carry"),  # type: ignore[arg-type]
        TypeError, "init_key must be one key.*, got 'carry'",
    ),
    "an Embed without an Rngs": (
        lambda: fdc.nnx.Embed(9, 3, 0.5, rngs=None), TypeError, "rngs must be an Rngs such as"  # type: ignore[arg-type]
    ),
    "a linear cell without an Rngs": (
        lambda: fdc.nnx.MinGRUCell(3, 8, rngs=0), TypeError, "rngs must be an Rngs such as"  # type: ignore[arg-type]
    ),
}  # fmt: skip
SHAPES: dict[str, Case] = {
    "ids of other rows, in evaluation": (
        lambda: scan(rng=None, sequence_ids=np.arange(99)), ValueError,
        r"an id for each row, got shape \(99,\) for the carry float32\[4, 3\]",
    ),
    "ids for each unit": (
        lambda: scan(sequence_ids=np.arange(B * 4).reshape(B, 4), xs=jnp.ones((T, B, 4)),
            cell=lambda p, h, x: (h, x)),
        ValueError, r"an id for each row, got shape \(4, 4\) for the carry float32\[4, 3\]",
    ),
    "ids, a word": (lambda: scan(sequence_ids="abc"), TypeError, "sequence_ids must be ints"),
    "inputs as nested lists": (
        lambda: scan(xs=[[1.0] * 3] * 20), ValueError, r"share their leading axis.*, \.\.\.\."
    ),
    "masks in a list": (
        lambda: scan(masks=fdc.Masks(inside=[H])), TypeError, "masks.inside must be a dict of masks"
    ),
    "dims, one int": (
        lambda: fdc.nnx.RNNCellDropoutWrapper(
            nnx.GRUCell(F, F, rngs=nnx.Rngs(0)), 0.5, broadcast_dims=0, rngs=nnx.Rngs(0),  # type: ignore[arg-type]
        ).redraw_masks(H, XS[0]),
        TypeError, "broadcast_dims must be a sequence of ints.*, got 0",
    ),
}  # fmt: skip
OBJECTS: dict[str, Case] = {
    "no cell": (lambda: scan(cell=None), TypeError, r"cell must be a function .* got None"),
    "a mask of None": (
        lambda: scan(fdc.RecurrentDropout(input=Returns(None))), TypeError,
        "Returns.draw_mask gave None; it must return an array",
    ),
    "a mask of None for each id": (
        lambda: scan(
            fdc.RecurrentDropout(input=Returns(None)), xs=jnp.ones((T, B, F)),
            sequence_ids=np.arange(B),
        ),
        TypeError, "Returns.draw_mask gave None; it must return an array",
    ),
    "a value of None": (
        lambda: scan(fdc.RecurrentDropout(input=Returns(H))), TypeError,
        "dropout.input: Returns.apply gave None; it must return an array",
    ),
    "a noise that can change": (
        lambda: fdc.register_noise(dataclasses.make_dataclass("Loose", ["prob"])), TypeError,
        "takes a frozen dataclass: write .* between it and Loose",
    ),
    "a noise without a member": (
        lambda: fdc.register_noise(
            dataclasses.make_dataclass(
                "Half", ["prob"], frozen=True,
                namespace={"draw_mask": None, "apply": None, "expected": None},
            )
        ),
        TypeError, r"^Half lacks variational: a noise has variational, draw_mask, apply and exp",
    ),
    "a recipe with rates": (
        lambda: fdc.recipes.gal2016(0.2, 0.3), TypeError,  # type: ignore[misc]
        "^gal2016 takes its numbers by name: input_keep_prob, recurrent_keep_prob, "
        r"output_keep_prob, tied; got 0.2, 0.3. A keep_prob is 1 minus a rate.$",
    ),
    "a recipe in Keras' words": (
        lambda: fdc.recipes.merity2017(dropout=0.2), TypeError,  # type: ignore[call-arg]
        "^merity2017 takes its numbers by name: .*weight_keep_prob.*; got dropout",
    ),
    "no units to plot": (
        lambda: fdc.plot_masks(None, H, XS, KEY, cell=cell, dropout=SPEC, max_units=0), ValueError,
        "max_units must be an int of at least 1, got 0",
    ),
    "a sequence to describe": (
        lambda: fdc.describe(None, H, XS, cell=lambda _, h, x: (x, x), dropout=SPEC), ValueError,
        r"turned a carry of shape \(4, 3\) into one of \(5, 4, 3\): x must be .*of one step",
    ),
    "a plain class": (lambda: fdc.register_noise(Returns), TypeError, "takes a frozen dataclass"),
    "paths within a structure": (
        lambda: fdc.RecurrentDropout(params={"rec": fdc.at_paths(FROZEN, "*")}), ValueError,
        "at_paths and recurrent_kernels must be the whole of dropout.params",
    ),
    "a wrapper's carry in a layer": (
        lambda: linen(
            fdc.RecurrentDropout(state=fdc.Zoneout(prob=0.5)),
            initial_carry=fdc.linen.DropoutCell(nn.GRUCell(F), SPEC).initialize_carry(KEY, (B, F)),
        ),
        TypeError, r"initial_carry is a DropoutCarry: give initial_carry=carry.cell_carry",
    ),
    "a wrapper's carry at resets": (
        lambda: linen(
            resets=jnp.zeros(XS.shape[:2], bool),
            reset_carry=fdc.linen.DropoutCell(nn.GRUCell(F), SPEC).initialize_carry(KEY, (B, F)),
        ),
        TypeError, r"reset_carry is a DropoutCarry: give reset_carry=carry.cell_carry",
    ),
}  # fmt: skip
CASES = {"flags": FLAGS, "numbers": NUMBERS, "keys": KEYS, "shapes": SHAPES, "objects": OBJECTS}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name) for cases in CASES.values() for name, case in cases.items()],
)
def test_one_clear_error(case: Case) -> None:
    call, error, text = case
    with pytest.raises(error, match=text) as caught:
        call()
    assert len(str(caught.value).split("\n---", 1)[0].splitlines()) <= 5


def test_a_joined_carry_is_refused() -> None:
    """It has one key and one step, so the rows of the second part would go on with the first's."""
    wrapper = fdc.linen.DropoutCell(nn.GRUCell(F), SPEC)
    params = nn.GRUCell(F).init(KEY, H, XS[0])
    parts = [wrapper.initialize_carry(jax.random.key(seed), (B, F)) for seed in (1, 2)]
    joined: Any = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    with pytest.raises(ValueError, match="a DropoutCarry was sliced or joined with another"):
        wrapper.apply(params, joined, jnp.ones((2 * B, F)))


@pytest.mark.parametrize("site", ["input", "output"])
def test_masks_of_one_row_are_not_shared_by_a_batch(site: str) -> None:
    wrapper = fdc.linen.DropoutCell(nn.GRUCell(F), fdc.RecurrentDropout(**{site: FROZEN}))
    params = nn.GRUCell(F).init(KEY, H, XS[0])
    for carry in (
        wrapper.initialize_carry(KEY, (1, F)),
        wrapper.redraw_masks(H, XS[0, :1], KEY),
    ):
        with pytest.raises(ValueError, match=r"input of shape \(1, 3\), and this one has \(4, 3\)"):
            wrapper.apply(params, carry, XS[0])


def test_a_mask_that_is_of_one_row_on_purpose() -> None:
    """A noise may draw a mask that broadcasts, and a value inside a cell may have one row."""

    class Row(Returns):
        variational = True

        def draw_mask(self, rng: Any, shape: Any, dtype: Any) -> Any:
            return jnp.full((1, shape[-1]), 2.0, dtype)

        def apply(self, mask: Any, value: Any, previous: Any) -> Any:
            return mask * value

    class Echo(nn.RNNCellBase):
        features: int = F

        def __call__(self, carry: Any, x: Any, *, disturb: Any = fdc.undisturbed) -> Any:
            return carry, x + disturb("decay", jnp.ones((1, F)))

        def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
            return jnp.zeros(input_shape)

        @property
        def num_feature_axes(self) -> int:
            return 1

    spec = fdc.RecurrentDropout(input=Row(None), inside={"decay": Row(None)})
    wrapper = fdc.linen.DropoutCell(Echo(), spec)
    _, y = wrapper.apply({}, wrapper.initialize_carry(KEY, (B, F)), XS[0])  # type: ignore[misc]
    np.testing.assert_array_equal(y, np.full((B, F), 4))


def test_ids_beside_a_carry_that_rows_share() -> None:
    """Each row's mask is that of its id, whatever else the carry holds."""

    def pair(params: Any, carry: Any, x: Any) -> Any:
        h, shared = carry
        return (h + x + shared[None], shared), x

    ids = np.array([3, 0, 7, 1], np.uint32)
    options: dict[str, Any] = {"cell": pair, "dropout": SPEC, "sequence_ids": ids}
    _, ys = fdc.dropout_scan(None, (H, jnp.ones(F)), XS, KEY, **options)
    for step in range(T):
        key = site_key(KEY, "input", step)
        rows = [jax.random.fold_in(jax.random.fold_in(key, row), 0) for row in ids]
        wanted = np.where(np.stack([kept(row, F) for row in rows]), 2 * XS[step], 0)
        np.testing.assert_array_equal(ys[step], wanted)


def test_weights_of_many_cells_are_read_at_once() -> None:
    """Weights that jax.vmap made have one more axis; each cell's are its own."""
    cell, xs = nn.GRUCell(8), jnp.ones((5, 3))
    variables = jax.vmap(lambda key: cell.init(key, jnp.zeros(8), jnp.zeros(3)))(
        jax.random.split(KEY, 5)
    )
    params: Any = fdc.linen.core_params(variables, cell)
    h = jax.random.normal(KEY, (5, 8))
    ours: Any = jax.vmap(fdc.gru_cell)(params, h, xs)
    theirs: Any = jax.vmap(cell.apply)(variables, h, xs)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-6)
