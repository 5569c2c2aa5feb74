"""Each visible mistake is an error with the value that came and the code to write instead."""

# The mistakes are on purpose:
# pyright: reportArgumentType=false

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_dropout_cell as fdc
from flax_dropout_cell.linen import DropoutCell

B, F = 2, 3
RNG = jax.random.key(0)
X = jnp.ones((B, F))
CARRY = (jnp.zeros((B, F)), jnp.zeros((B, F)))
NOISE = fdc.Dropout(keep_prob=0.5)
FROZEN = fdc.Dropout(keep_prob=0.5, variational=True)


def cell(params, carry, x):
    return carry, x


def step(spec, rng=RNG, masks=None, carry=CARRY, x=X, cell=cell):
    return fdc.dropout_cell(None, carry, x, rng, cell=cell, dropout=spec, masks=masks)


def scan(spec=None, rng=RNG, carry=CARRY, xs=X, cell=cell, **options):
    spec = fdc.RecurrentDropout(input=NOISE) if spec is None else spec
    return fdc.dropout_scan(None, carry, xs, rng, cell=cell, dropout=spec, **options)


@pytest.mark.parametrize("bad", [-0.1, 1.5, 2, -1, float("nan"), float("inf"), np.float32(1.01)])
def test_keep_prob_out_of_range(bad) -> None:
    with pytest.raises(ValueError, match=f"keep_prob must be between 0 and 1, got {bad}"):
        fdc.Dropout(keep_prob=bad)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: fdc.Dropout(keep_prob=True),
            TypeError,
            "keep_prob must be a number in .0, 1. or an array, got True",
        ),
        (
            lambda: fdc.Dropout(keep_prob=0.5, variational="yes"),
            TypeError,
            "variational must be True or False, got 'yes'",
        ),
        (
            lambda: fdc.Dropout(keep_prob=0.5, broadcast_dims=0),
            TypeError,
            r"broadcast_dims must be a sequence of ints such as \(0,\), got 0",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=fdc.Dropout(keep_prob="0.5"))),
            TypeError,
            "keep_prob must be a number in .0, 1. or an array, got '0.5'",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=None))),
            TypeError,
            "keep_prob must be a number in .0, 1. or an array, got None",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=jnp.ones(4)))),
            ValueError,
            r"keep_prob has shape \(4,\), which does not broadcast to \(2, 3\); .*jax.vmap",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=jnp.ones((), int)))),
            TypeError,
            "keep_prob must be a floating-point array, got int32",
        ),
        (
            lambda: step(
                fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=0.5, broadcast_dims=(2,)))
            ),
            ValueError,
            r"broadcast_dims has 2, but the value has shape \(2, 3\)",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=0.5)),
            TypeError,
            r"dropout.input must hold noises such as Dropout\(keep_prob=0.8\) or None, got 0.5",
        ),
        (
            lambda: step(NOISE),
            TypeError,
            "dropout must be a RecurrentDropout, such as .*, got a Dropout",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=FROZEN)),
            ValueError,
            "dropout.input is variational and has no mask: call draw_masks before the loop",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=NOISE), rng=None, masks=fdc.Masks()),
            ValueError,
            "dropout.input draws at each step, so it needs a key as rng; got None",
        ),
        (
            lambda: step(fdc.RecurrentDropout(state=(NOISE, NOISE, NOISE))),
            ValueError,
            r"dropout.state has the structure \(\*, \*, \*\), which is not a prefix of the value's "
            r"structure \(\*, \*\)",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=(NOISE, FROZEN))),
            ValueError,
            r"dropout.input has the structure \(\*, \*\), but the value is one array: it takes one "
            r"noise\.",
        ),
        (
            lambda: step(
                fdc.RecurrentDropout(state=(None, NOISE)), carry=(X, jnp.ones((B, F), int))
            ),
            TypeError,
            r"state\[1\] is int32\[2, 3\], but noise needs floating-point values: "
            r"write .astype\(jnp.float32\), or give dropout.state a structure with None there",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=NOISE), x=jnp.ones((B, F), bool)),
            TypeError,
            "input is bool",
        ),
        (
            lambda: step(fdc.RecurrentDropout(state=(NOISE, None)), carry=(RNG, X)),
            TypeError,
            r"state\[0\] is key<fry>\[\]",
        ),
        (
            lambda: step(
                fdc.RecurrentDropout(input=FROZEN), masks=fdc.Masks(input=jnp.ones((5, F), bool))
            ),
            ValueError,
            r"masks.input has shape \(5, 3\), which does not broadcast to the value's shape "
            r"\(2, 3\)",
        ),
        (
            lambda: step(
                fdc.RecurrentDropout(state=(FROZEN, FROZEN)),
                masks=fdc.Masks(state=jnp.ones((B, F), bool)),
            ),
            ValueError,
            r"masks.state has one mask for \(\*, \*\); give each leaf its own",
        ),
        (
            lambda: step(fdc.RecurrentDropout(), masks=fdc.Masks(input=jnp.ones((B, F), bool))),
            ValueError,
            "masks.input has a mask where dropout.input has no noise",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=FROZEN), masks=(None, jnp.ones(3), None, None)),
            TypeError,
            "masks must be Masks, as draw_masks gives them, got ",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=NOISE), rng=0),
            TypeError,
            "rng must be one key.*, got 0",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=NOISE), rng=jax.random.split(RNG)),
            TypeError,
            r"rng must be one key.*, got key<fry>\[2\]",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=NOISE), rng=jnp.zeros(2)),
            TypeError,
            r"rng must be one key.*, got float32\[2\]",
        ),
        (
            lambda: step(
                fdc.RecurrentDropout(state={"h": NOISE}),
                carry=(X, X),
                cell=lambda p, c, x: ({"h": x}, x),
            ),
            ValueError,
            r"the cell took a carry \(\*, \*\) and returned",
        ),
        (
            lambda: step(fdc.RecurrentDropout(input=NOISE), cell=lambda p, c, x: x),
            TypeError,
            r"cell must return \(carry, y\), got ",
        ),
        (
            lambda: fdc.draw_masks(
                None, CARRY, X, None, cell=cell, dropout=fdc.RecurrentDropout(input=FROZEN)
            ),
            ValueError,
            r"draw_masks needs a key such as jax.random.key\(0\), got rng=None",
        ),
        (
            lambda: scan(xs=(X, jnp.ones((B + 1, F)))),
            ValueError,
            r"the arrays of xs must share their leading axis, time; got xs\[0\] \(2, 3\), "
            r"xs\[1\] \(3, 3\)",
        ),
        (lambda: scan(xs=jnp.ones(())), ValueError, "must share their leading axis, time"),
        (lambda: scan(xs=()), ValueError, "xs has no arrays"),
        (lambda: scan(start=-1), ValueError, "start must be at least 0 and below .*, got -1"),
        (lambda: scan(start=0.5), TypeError, "start must be an int, got 0.5"),
        (lambda: scan(seq_lengths=jnp.ones(B)), TypeError, "seq_lengths must be ints, got float32"),
        (
            lambda: scan(seq_lengths=jnp.ones(B + 1, int)),
            ValueError,
            r"carry\[0\] is float32\[2, 3\] at a step, which does not start with the batch dims of "
            r"seq_lengths, \(3,\)",
        ),
        (
            lambda: scan(fdc.RecurrentDropout(input=FROZEN), rng=None, masks=fdc.Masks()),
            ValueError,
            "dropout.input is variational and has no mask",
        ),
        (
            lambda: DropoutCell(nn.LSTMCell(3), NOISE),
            TypeError,
            "dropout must be a RecurrentDropout, such as .*, got a Dropout",
        ),
        (
            lambda: DropoutCell("lstm", fdc.RecurrentDropout()),
            TypeError,
            "'lstm' is not an RNNCell of flax.linen: give a cell such as nn.LSTMCell",
        ),
    ],
)
def test_errors(make, error, text) -> None:
    with pytest.raises(error, match=text):
        make()


def rnn_of(spec, **options):
    return nn.RNN(DropoutCell(nn.LSTMCell(F), spec, **options))


XS = jnp.ones((B, 4, F))


def variables():
    return nn.RNN(nn.LSTMCell(F)).init(RNG, XS)


@pytest.mark.parametrize("rngs", [None, {"params": RNG}], ids=["none", "params only"])
@pytest.mark.parametrize("noise", [NOISE, FROZEN], ids=["step", "variational"])
def test_training_without_a_dropout_stream(rngs, noise) -> None:
    """Also where linen would fall back to the params stream without a word."""
    with pytest.raises(ValueError, match="DropoutCell needs a 'dropout' stream in training: pass"):
        rnn_of(fdc.RecurrentDropout(input=noise)).apply(variables(), XS, rngs=rngs)


def test_init_and_evaluation_need_no_dropout_stream() -> None:
    for noise in (NOISE, FROZEN):
        spec = fdc.RecurrentDropout(input=noise, params=noise)
        rnn_of(spec).init(RNG, XS)
        evaluated = rnn_of(spec, deterministic=True).apply(variables(), XS)
        np.testing.assert_array_equal(evaluated, nn.RNN(nn.LSTMCell(F)).apply(variables(), XS))


def test_a_carry_that_is_not_the_wrappers() -> None:
    bare = (jnp.zeros((B, F)),) * 2
    with pytest.raises(
        TypeError, match="the carry must be a DropoutCarry, got a tuple: start with"
    ):
        rnn_of(fdc.RecurrentDropout(input=NOISE)).apply(
            variables(), XS, initial_carry=bare, rngs={"dropout": RNG}
        )


def test_training_on_from_a_carry_of_evaluation() -> None:
    evaluated, _ = rnn_of(fdc.RecurrentDropout(input=NOISE), deterministic=True).apply(
        variables(), XS, return_carry=True
    )
    with pytest.raises(ValueError, match="the carry was made in evaluation and has no masks: call"):
        rnn_of(fdc.RecurrentDropout(input=NOISE)).apply(
            variables(), XS, initial_carry=evaluated, rngs={"dropout": RNG}
        )


def test_one_noise_over_a_cell_that_holds_lstms() -> None:
    class Stack(nn.RNNCellBase):
        layers: tuple

        @nn.nowrap
        def initialize_carry(self, rng, input_shape):
            return tuple(layer.initialize_carry(rng, input_shape) for layer in self.layers)

        def __call__(self, carry, inputs):
            raise NotImplementedError

    stack = Stack((nn.LSTMCell(F), nn.LSTMCell(F)))
    with pytest.raises(ValueError, match="one noise for the whole state would reach every leaf"):
        DropoutCell(stack, fdc.RecurrentDropout(state=FROZEN)).initialize_carry(RNG, (B, F))
    wrapper = fdc.linen.RNNCellDropoutWrapper(stack, state_keep_prob=0.5)
    with pytest.raises(ValueError, match="of Stack would reach the memory c of the LSTMCell"):
        wrapper.initialize_carry(RNG, (B, F))


def add(params, carry, x):
    carry = carry + x
    return carry, carry


def widen(params, carry, x):
    return carry.astype(jnp.float32), x


XS = jnp.ones((4, B, F))


@pytest.mark.parametrize(
    ("carry", "cell", "text"),
    [
        (
            jnp.zeros((1, F)),
            add,
            r"carry goes into the cell as float32\[1, 3\] and comes out as float32\[2, 3\]. "
            r"Start from a carry of that shape",
        ),
        (
            jnp.zeros((B, F), jnp.float16),
            widen,
            r"goes into the cell as float16\[2, 3\] .* a carry of that dtype, or cast",
        ),
    ],
    ids=["shape", "dtype"],
)
def test_a_scans_carry_that_changes(carry, cell, text) -> None:
    with pytest.raises(TypeError, match=text):
        scan(fdc.RecurrentDropout(state=FROZEN), carry=carry, xs=XS, cell=cell)


def test_a_number_starts_a_scan_as_in_jax() -> None:
    """It has no dtype of its own."""
    for start in (0.0, 0):
        total, _ = scan(fdc.RecurrentDropout(), carry=start, xs=jnp.ones(4), cell=add)
        assert (total, total.dtype) == (4, jnp.float32)


def test_a_mask_that_was_drawn_for_one_row() -> None:
    """A loop by hand takes a carry that broadcasts; a state's mask would go to every row."""
    row, shared = (
        jnp.zeros((1, F)),
        fdc.Dropout(keep_prob=0.5, variational=True, broadcast_dims=(0,)),
    )
    for noise, carry in ((FROZEN, row), (shared, row), (FROZEN, jnp.zeros((B, F)))):
        spec = fdc.RecurrentDropout(state=noise)
        masks = fdc.draw_masks(None, carry, X, RNG, cell=add, dropout=spec)
        if (noise, carry is row) != (FROZEN, True):
            step(spec, masks=masks, carry=row, cell=add)
            continue
        with pytest.raises(ValueError, match=r"shape \(1, 3\) and leaves .* \(2, 3\), so all rows"):
            step(spec, masks=masks, carry=row, cell=add)
    step(
        fdc.RecurrentDropout(state=NOISE), carry=row, cell=add
    )  # a fresh mask has the shape that comes out


def test_a_misspelt_submodule() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'lstm'"):
        _ = fdc.lstm  # type: ignore[attr-defined]


class Flip:
    """A user's own noise; each subclass has one thing wrong with it."""

    variational = False

    def draw_mask(self, rng, shape, dtype):
        return jax.random.bernoulli(rng, 0.5, shape)

    def apply(self, mask, value, previous):
        return jnp.where(mask, value, -value)

    def expected(self, value, previous):
        return value


class FlipToHalf(Flip):
    def apply(self, mask, value, previous):
        return super().apply(mask, value, previous).astype("float16")


class FlipToOneRow(Flip):
    def expected(self, value, previous):
        return value[0]


class FlipWithoutModes:
    draw_mask, apply = Flip.draw_mask, Flip.apply


@pytest.mark.parametrize(
    ("noise", "rng", "text"),
    [
        (FlipToHalf(), RNG, r"dropout.input: FlipToHalf.apply gave float16\[2, 3\] for a value of"),
        (FlipToOneRow(), None, r"FlipToOneRow.expected gave float32\[3\] for .* float32\[2, 3\]"),
        (
            FlipWithoutModes(),
            RNG,
            "got a FlipWithoutModes of test_errors, which lacks variational, expected: ",
        ),
        (0.8, RNG, "must hold noises such as Dropout.keep_prob=0.8. or None, got 0.8"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_noise_of_ones_own_that_is_none(noise, rng, text) -> None:
    with pytest.raises(TypeError, match=text):
        step(fdc.RecurrentDropout(input=noise), rng)


def test_a_noise_of_ones_own_that_is_one() -> None:
    _, y = step(fdc.RecurrentDropout(input=Flip()))
    np.testing.assert_array_equal(np.abs(y), X)
