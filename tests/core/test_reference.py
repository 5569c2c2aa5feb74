"""The core against a NumPy reference that is written from the contract, on generated pytrees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_prng import quick_key

import flax_dropout_cell as fdc

KEEP_PROBS = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])
"""Their inverses are exact, so the reference and the library must agree to the last bit."""

SHAPES = st.sampled_from([(), (3,), (2, 3), (2, 1, 4)])  # few, since each is compiled for


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=2),
        ),
        max_leaves=4,
    )


@st.composite
def arrays(draw: Any) -> np.ndarray:
    shape = draw(SHAPES)
    seed = draw(st.integers(0, 2**16))
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


@st.composite
def noises(draw: Any, rank: int) -> fdc.Dropout | None:
    if draw(st.booleans()):
        return None
    dims = draw(st.lists(st.integers(0, rank - 1), unique=True)) if rank else []
    return fdc.Dropout(
        keep_prob=draw(KEEP_PROBS), variational=draw(st.booleans()), broadcast_dims=dims
    )


def is_leaf(node: Any) -> bool:
    return not isinstance(node, tuple | dict)


def smallest_rank(value: Any) -> int:
    return min(leaf.ndim for leaf in jax.tree.leaves(value))


@st.composite
def prefixes(draw: Any, value: Any) -> Any:
    """A pytree prefix of noises for a value: cut off anywhere."""
    if is_leaf(value) or draw(st.booleans()):
        return draw(noises(smallest_rank(value)))
    if isinstance(value, dict):
        return {key: draw(prefixes(child)) for key, child in value.items()}
    return tuple(draw(prefixes(child)) for child in value)


def spread(prefix: Any, value: Any) -> list[fdc.Dropout | None]:
    """The contract's pytree prefix, written out: one noise per leaf, in the order of leaves."""
    if isinstance(prefix, fdc.Dropout | None):
        return [prefix] * len(jax.tree.leaves(value))
    keys = sorted(prefix) if isinstance(prefix, dict) else range(len(prefix))
    return [noise for key in keys for noise in spread(prefix[key], value[key])]


def disturb(prefix: Any, value: Any, masks: Any) -> Any:
    """The contract's dropout, written out: x / keep_prob where the mask is True, 0 elsewhere."""
    leaves, structure = jax.tree.flatten(value)
    mask_leaves = iter([None] * len(leaves) if masks is None else structure.flatten_up_to(masks))
    done = []
    for leaf, noise in zip(leaves, spread(prefix, value), strict=True):
        mask = next(mask_leaves)
        if noise is None or noise.keep_prob == 1:
            assert mask is None
            done.append(leaf)
        elif noise.keep_prob == 0:
            done.append(np.zeros_like(leaf))
        else:
            assert mask is not None
            done.append(np.where(mask, leaf / np.float32(noise.keep_prob), np.float32(0)))
    return jax.tree.unflatten(structure, done)


def named_leaf_by_leaf(state: Any, carry: Any) -> Any:
    """One noise for a state of several leaves is refused; this says that all are meant."""
    return jax.tree.map(lambda _: state, carry) if isinstance(state, fdc.Dropout) else state


def cell(params: Any, carry: Any, x: Any) -> tuple[Any, Any]:
    """Sums of small integers, exact in any order."""
    total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves((params, x)))
    return jax.tree.map(lambda leaf: leaf + total, carry), {"x": x, "carry": carry}


def numpy_cell(params: Any, carry: Any, x: Any) -> tuple[Any, Any]:
    total = sum(np.sum(leaf) for leaf in jax.tree.leaves((params, x)))
    return jax.tree.map(lambda leaf: leaf + total, carry), {"x": x, "carry": carry}


@settings(max_examples=50)
@given(data=st.data(), params=trees(arrays()), carry=trees(arrays()), x=trees(arrays()))
def test_one_step(data: Any, params: Any, carry: Any, x: Any) -> None:
    spec = fdc.RecurrentDropout(
        params=data.draw(prefixes(params)),
        input=data.draw(prefixes(x)),
        state=named_leaf_by_leaf(data.draw(prefixes(carry)), carry),
        output={"x": data.draw(prefixes(x)), "carry": data.draw(prefixes(carry))},
    )
    rng = quick_key(data.draw(st.integers(0, 100)))
    frozen = jax.tree.map(
        lambda noise: fdc.Dropout(
            keep_prob=noise.keep_prob, variational=True, broadcast_dims=noise.broadcast_dims
        ),
        spec,
        is_leaf=lambda node: isinstance(node, fdc.Dropout),
    )
    with jax.disable_jit():
        drawn = fdc.draw_masks(params, carry, x, rng, cell=cell, dropout=spec)
        masks = fdc.draw_masks(params, carry, x, rng, cell=cell, dropout=frozen)
        got = fdc.dropout_cell(params, carry, x, None, cell=cell, dropout=spec, masks=masks)
        evaluated = fdc.dropout_cell(params, carry, x, None, cell=cell, dropout=spec)
        trained = fdc.dropout_cell(params, carry, x, rng, cell=cell, dropout=frozen, masks=masks)

    y = {"x": x, "carry": carry}
    for site, value in (("params", params), ("input", x), ("state", carry), ("output", y)):
        check_masks(getattr(spec, site), value, getattr(drawn, site), getattr(masks, site))

    noisy = disturb(spec.params, params, masks.params), disturb(spec.input, x, masks.input)
    new_carry, y = numpy_cell(noisy[0], carry, noisy[1])
    want = disturb(spec.state, new_carry, masks.state), disturb(spec.output, y, masks.output)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(np.testing.assert_array_equal, trained, want)
    jax.tree.map(np.testing.assert_array_equal, evaluated, numpy_cell(params, carry, x))


def check_masks(prefix: Any, value: Any, drawn: Any, frozen: Any) -> None:
    """`draw_masks` fills in the variational leaves only, each as large as its noise says."""
    leaves, structure = jax.tree.flatten(value)
    nothing = [None] * len(leaves)
    drawn_leaves = nothing if drawn is None else structure.flatten_up_to(drawn)
    all_leaves = nothing if frozen is None else structure.flatten_up_to(frozen)
    for leaf, noise, mask, every in zip(
        leaves, spread(prefix, value), drawn_leaves, all_leaves, strict=True
    ):
        if noise is None or noise.keep_prob == 1:
            assert mask is None and every is None
            continue
        shared = tuple(1 if d in noise.broadcast_dims else n for d, n in enumerate(leaf.shape))
        assert every is not None
        assert every.shape == shared and every.dtype == bool
        assert (mask is not None) == noise.variational
        if mask is not None:
            np.testing.assert_array_equal(mask, every)


def either(value: Any, once: Any, now: Any) -> Any:
    """The mask of each leaf, whether it was drawn for the call or for the step."""
    structure = jax.tree.structure(value)
    nothing = [None] * structure.num_leaves
    masks = (nothing if drawn is None else structure.flatten_up_to(drawn) for drawn in (once, now))
    pairs = zip(*masks, strict=True)
    return jax.tree.unflatten(structure, [b if a is None else a for a, b in pairs])


@settings(max_examples=10)
@given(
    data=st.data(),
    carry=trees(arrays()),
    lengths=st.lists(st.integers(0, 4), min_size=2, max_size=2),
    steps=st.integers(1, 4),
    reverse=st.booleans(),
)
def test_a_sequence(data: Any, carry: Any, lengths: Any, steps: int, reverse: bool) -> None:
    """Loops, lengths and direction against a Python loop over the NumPy step."""
    carry = jax.tree.map(lambda leaf: np.stack([leaf, leaf + 1]), carry)
    lengths = [min(length, steps) for length in lengths]
    seed = data.draw(st.integers(0, 100))
    xs = np.random.default_rng(seed).integers(-8, 9, (steps, 2, 3)).astype(np.float32)
    spec = fdc.RecurrentDropout(
        input=data.draw(noises(2)),
        state=named_leaf_by_leaf(data.draw(prefixes(carry)), carry),
        output={"x": data.draw(noises(2)), "carry": None},
    )
    rng = jax.random.key(seed)

    def sum_cell(params: Any, carry: Any, x: Any) -> tuple[Any, Any]:
        total = x.sum(axis=-1)
        grow = lambda leaf: leaf + total.reshape((2,) + (1,) * (leaf.ndim - 1))  # noqa: E731
        return jax.tree.map(grow, carry), {"x": x, "carry": carry}

    got_carry, got = fdc.dropout_scan(
        None,
        carry,
        xs,
        rng,
        cell=sum_cell,
        dropout=spec,
        seq_lengths=np.array(lengths),
        reverse=reverse,
    )
    options = {"cell": sum_cell, "dropout": spec}
    once = fdc.draw_masks(None, carry, xs[0], rng, **options)
    of_steps = fdc.draw_step_masks(None, carry, xs[0], rng, steps, **options)
    want: dict[int, Any] = {}
    for t in reversed(range(steps)) if reverse else range(steps):
        now = jax.tree.map(lambda mask, t=t: mask[t], of_steps)
        x = disturb(spec.input, xs[t], either(xs[t], once.input, now.input))
        grow = lambda leaf, x=x: leaf + x.sum(-1).reshape(2, *[1] * (leaf.ndim - 1))  # noqa: E731
        new = disturb(spec.state, jax.tree.map(grow, carry), either(carry, once.state, now.state))
        y = {"x": x, "carry": carry}
        y = disturb(spec.output, y, either(y, once.output, now.output))
        new, y = jax.tree.map(jnp.asarray, (new, y))
        for row, length in enumerate(lengths):
            if t >= length:
                new = jax.tree.map(lambda n, c, row=row: n.at[row].set(c[row]), new, carry)
                y = jax.tree.map(
                    lambda leaf, row=row: leaf.at[row].set(0), jax.tree.map(jnp.asarray, y)
                )
        carry, want[t] = new, y
    jax.tree.map(np.testing.assert_array_equal, got_carry, carry)
    for t in range(steps):
        jax.tree.map(lambda a, b, t=t: np.testing.assert_array_equal(a[t], b), got, want[t])
