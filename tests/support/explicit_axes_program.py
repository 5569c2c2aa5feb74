"""The cases of test_explicit_axes.py, on 4 CPU devices.

    python tests/support/explicit_axes_program.py                    # all of them
    python tests/support/explicit_axes_program.py 'CASE' 'CASE' ...   # these

On a mesh with explicit axes the sharding of an array is part of its type. Each program has all
noises at once, in the core and in the layers, and is compared with an LSTM in `jax.lax.scan` on one
device, to which masks are applied by hand. The masks are drawn on one device too.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import Cases
from quick_prng import quick_key

import flax_dropout_cell as fdc

DEVICES = 4
STEPS, BATCH, INPUTS, UNITS = 5, 8, 3, 16
# JAX 0.7 has explicit sharding, but cannot mix arrays that are sharded with ones that are not.
HAS_SET_MESH = hasattr(jax, "set_mesh")

CASES = Cases()

NOISES = {
    "input": fdc.Dropout(keep_prob=0.7, variational=True),
    "recurrent": fdc.Dropout(keep_prob=0.7, variational=True, broadcast_dims=(1,)),
    "candidate": fdc.ConcreteDropout(logit=np.full((), -1, np.float32)),
    "hidden": fdc.Zoneout(prob=np.full((), 0.3, np.float32)),
    "c": fdc.Zoneout(prob=0.3),
    "output": fdc.GaussianNoise(stddev=0.5),
    "params": fdc.GaussianNoise(stddev=0.1, variational=True),
}
SPEC = fdc.RecurrentDropout(
    params=NOISES["params"],
    input=NOISES["input"],
    state=(NOISES["c"], None),
    output=NOISES["output"],
    inside={site: NOISES[site] for site in ("recurrent", "candidate", "hidden")},
)


def numbers(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32) / 2


def rng() -> jax.Array:
    return quick_key(3)


draw = np.random.default_rng(0)
LENGTHS = np.array([5, 3, 1, 0, 5, 2, 4, 5])
RESETS = draw.random((STEPS, BATCH)) < 0.4
IDS = np.arange(BATCH) + BATCH * RESETS.cumsum(0)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"seq_lengths": LENGTHS},
    "valid": {"valid": draw.random((STEPS, BATCH)) < 0.7},
    "ids": {"sequence_ids": IDS[0]},
    "resets and ids": {"resets": RESETS, "sequence_ids": IDS},
    "all": {"resets": RESETS, "sequence_ids": IDS, "seq_lengths": LENGTHS, "reverse": True},
}
TYPES_ONLY: dict[str, dict[str, Any]] = OPTIONS | {
    "resets": {"resets": RESETS},
    "resets backward": {"resets": RESETS, "reverse": True},
    "checkpoints": {"checkpoint_every": 2},
}


# On one device -----------------------------------------------------------------------------------


def masks_on_one_device(params: Any, carry: Any, x: Any, options: dict[str, Any]) -> fdc.Masks:
    """The masks of every step, `[time, ...]`."""

    @jax.jit
    def at(step: Any, ids: Any) -> fdc.Masks:
        given: Any = {"cell": fdc.lstm_cell, "dropout": SPEC, "sequence_ids": ids}
        once = fdc.draw_masks(params, carry, x, rng(), **given)
        each = fdc.draw_step_masks(params, carry, x, rng(), 1, start=step, **given)
        each = jax.tree.map(lambda mask: mask[0], each)
        inside = {"recurrent": once.inside["recurrent"]}
        inside |= {site: each.inside[site] for site in ("candidate", "hidden")}
        return fdc.Masks(once.params, once.input, each.state, each.output, inside)

    ids = options.get("sequence_ids")
    of_steps = [ids if ids is None or ids.ndim == 1 else ids[step] for step in range(STEPS)]
    return jax.tree.map(lambda *masks: jnp.stack(masks), *map(at, range(STEPS), of_steps))


def dropped(mask: Any, value: Any) -> Any:
    return jnp.where(mask, value / 0.7, 0)


def relaxed(uniform: Any, value: Any) -> Any:
    """Gal, Hron and Kendall 2017, equation 5."""
    z = jax.nn.sigmoid((-1 + jnp.log(uniform) - jnp.log(1 - uniform)) / 0.1)
    return value * (1 - z) / (1 - jax.nn.sigmoid(-1.0))


def lstm_by_hand(weights: Any, carry: Any, x: Any, masks: fdc.Masks) -> Any:
    w, u, b = (w + 0.1 * m for w, m in zip(weights, masks.params, strict=True))
    (c, h), inside = carry, masks.inside
    x, read = dropped(masks.input, x), dropped(inside["recurrent"], h)
    i, f, g, o = jnp.split(x @ w + read @ u + b[None], 4, -1)
    g = relaxed(inside["candidate"], jnp.tanh(g))
    new_c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * g
    new_h = jnp.where(inside["hidden"], jax.nn.sigmoid(o) * jnp.tanh(new_c), h)
    return (jnp.where(masks.state[0], new_c, c), new_h), new_h + 0.5 * masks.output


def scan_by_hand(params: Any, carry: Any, xs: Any, masks: Any, options: dict[str, Any]) -> Any:
    reverse = options.get("reverse", False)
    resets = options.get("resets", np.zeros((STEPS, BATCH), bool))
    valid = options.get("valid", np.ones((STEPS, BATCH), bool))
    if "seq_lengths" in options:
        valid = np.arange(STEPS)[:, None] < options["seq_lengths"]
    begins = resets & valid
    if reverse:  # a row starts anew at its own last step
        begins = np.zeros_like(resets)
        for t, row in np.argwhere(resets & valid):
            before = np.flatnonzero(valid[:t, row])
            begins[before[-1:], row] = True

    def step(carry: Any, at: Any) -> Any:
        x, mask, begins, valid = at
        carry = jax.tree.map(lambda leaf: jnp.where(begins[:, None], 0, leaf), carry)
        new, y = lstm_by_hand(params, carry, x, mask)
        new = jax.tree.map(lambda new, old: jnp.where(valid[:, None], new, old), new, carry)
        return new, jnp.where(valid[:, None], y, 0)

    return jax.lax.scan(step, carry, (xs, masks, begins, valid), reverse=reverse)


# The hosts ---------------------------------------------------------------------------------------


def core(options: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
    def run(params: Any, carry: Any, xs: Any, key: Any) -> Any:
        return fdc.dropout_scan(params, carry, xs, key, cell=fdc.lstm_cell, dropout=SPEC, **options)

    return run, lambda weights: weights


def linen(options: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
    cell, given = fdc.linen.LSTMCell(UNITS), dict(options)
    every = given.pop("checkpoint_every", None)
    layer = fdc.linen.RNN(cell, SPEC, time_major=True, return_carry=True, checkpoint_every=every)

    def run(params: Any, carry: Any, xs: Any, key: Any) -> Any:
        weights = {"params": {"cell": fdc.linen.cell_params(params, cell)["params"]}}
        return layer.apply(weights, xs, rng=key, initial_carry=carry, **given)

    def weight_masks(weights: Any) -> Any:
        tree = fdc.linen.cell_params(weights, cell)["params"]
        return fdc.linen.core_params({"params": drawn_for(tree)}, cell)

    return run, weight_masks


def linen_with_its_own_carry(options: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
    run, weight_masks = linen(options)
    return (lambda params, carry, xs, key: run(params, None, xs, key)), weight_masks


def nnx_with_its_own_carry(options: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
    given = dict(options)
    every = given.pop("checkpoint_every", None)

    def cell_of(params: Any) -> Any:
        cell = fdc.nnx.LSTMCell(INPUTS, UNITS, rngs=nnx.Rngs(0))
        nnx.update(cell, fdc.nnx.cell_params(params, cell))
        return cell

    def run(params: Any, carry: Any, xs: Any, key: Any) -> Any:
        layer: Any = fdc.nnx.RNN(
            cell_of(params), SPEC, time_major=True, return_carry=True, checkpoint_every=every
        )
        return layer(xs, rngs=key, **given)

    def weight_masks(weights: Any) -> Any:
        cell = cell_of(weights)
        masks = drawn_for(nnx.to_pure_dict(nnx.state(cell, nnx.Param)))
        return fdc.nnx.core_params(masks, cell)

    return run, weight_masks


def drawn_for(tree: Any) -> Any:
    """The masks of a layer's weights, which have other names than the core's."""
    spec = fdc.RecurrentDropout(params=NOISES["params"])
    h = np.zeros((BATCH, UNITS))
    return fdc.draw_masks(tree, h, h, rng(), cell=lambda p, h, x: (h, h), dropout=spec).params


HOSTS = {
    "dropout_scan": core,
    "fdc.linen.RNN": linen,
    "fdc.linen.RNN, its own carry": linen_with_its_own_carry,
    "fdc.nnx.RNN, its own carry": nnx_with_its_own_carry,
}


def arrays(host: str) -> tuple[Any, ...]:
    params = fdc.LSTMParams(
        numbers(INPUTS, 4 * UNITS), numbers(UNITS, 4 * UNITS), numbers(4 * UNITS)
    )
    c, h = numbers(BATCH, UNITS), -numbers(BATCH, UNITS)
    carry = (0 * c, 0 * h) if "its own" in host else (c, h)
    return params, carry, numbers(STEPS, BATCH, INPUTS)


def mesh() -> Any:
    return jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Explicit,))


def put(tree: Any, *spec: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh(), P(*spec))), tree)


def spread(params: Any, carry: Any, xs: Any) -> tuple[Any, ...]:
    return put(params), put(carry, "batch"), put(xs, None, "batch"), put(rng())


def spread_options(options: dict[str, Any]) -> dict[str, Any]:
    """Arrays of a call, sharded over the batch as well."""
    return {
        name: put(value, *[None] * (value.ndim - 1), "batch")
        if isinstance(value, np.ndarray)
        else value
        for name, value in options.items()
    }


def assert_spread(carry: Any, ys: Any) -> None:
    for leaf in jax.tree.leaves(carry):
        assert leaf.sharding.spec == P("batch", None)
    assert ys.sharding.spec == P(None, "batch", None)


def assert_close(got: Any, want: Any) -> None:
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(
            np.asarray(got), np.asarray(want), rtol=1e-4, atol=1e-5
        ),
        got,
        want,
    )


# Each costs seconds to compile: the other combinations are tested by their types.
COMPILED = {
    "dropout_scan, plain": ("dropout_scan", "plain"),
    "dropout_scan, all": ("dropout_scan", "all"),
    "fdc.linen.RNN, lengths": ("fdc.linen.RNN, its own carry", "lengths"),
    "fdc.nnx.RNN, resets and ids": ("fdc.nnx.RNN, its own carry", "resets and ids"),
}


@CASES.over(case=COMPILED if HAS_SET_MESH else ())
def a_sequence_is_that_of_one_device(case: str) -> None:
    """Forward, and for a plain sequence the gradients too."""
    host, options = COMPILED[case]
    given, whole = OPTIONS[options], arrays(host)
    _, weight_masks = HOSTS[host](given)
    masks = masks_on_one_device(whole[0], whole[1], whole[2][0], given)
    of_weights = weight_masks(whole[0])
    if host != "dropout_scan":
        steps = jax.tree.map(lambda mask: jnp.stack([mask] * STEPS), of_weights)
        masks = masks._replace(params=fdc.LSTMParams(*steps))

    def run(*args: Any) -> Any:
        return HOSTS[host](placed)[0](*args)

    def by_hand(params: Any, carry: Any, xs: Any) -> Any:
        return scan_by_hand(params, carry, xs, masks, given)

    def and_gradient(function: Any) -> Any:
        def loss(params: Any, carry: Any, xs: Any, *key: Any) -> Any:
            results = function(params, carry, xs, *key)
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(results)), results

        return jax.grad(loss, argnums=(0, 2), has_aux=True)

    if options == "plain":
        run, by_hand = and_gradient(run), and_gradient(by_hand)
    with jax.set_mesh(mesh()):
        placed = given if options == "lengths" else spread_options(given)
        got = jax.jit(run)(*spread(*whole))
    assert_spread(*(got[1] if options == "plain" else got))
    assert_close(got, jax.jit(by_hand)(*whole))


@CASES.over(host=HOSTS, options=TYPES_ONLY if HAS_SET_MESH else ())
def a_sequence_keeps_its_sharding(host: str, options: str) -> None:
    with jax.set_mesh(mesh()):
        for given in (TYPES_ONLY[options], spread_options(TYPES_ONLY[options])):
            run, _ = HOSTS[host](given)
            assert_spread(*jax.eval_shape(run, *spread(*arrays(host))))


@CASES.over(noise=[*NOISES, "none"] if HAS_SET_MESH else ())
def each_noise_for_itself(noise: str) -> None:
    """So that none of them places an array for another."""
    value, spec = NOISES.get(noise), fdc.RecurrentDropout()
    if noise in ("recurrent", "candidate", "hidden"):
        spec = fdc.RecurrentDropout(inside={noise: value})
    elif noise != "none":
        spec = fdc.RecurrentDropout(
            **{"state": (value, None)} if noise == "c" else {noise: value}  # type: ignore[arg-type]
        )

    def run(params: Any, carry: Any, xs: Any, key: Any) -> Any:
        return fdc.dropout_scan(params, carry, xs, key, cell=fdc.lstm_cell, dropout=spec)

    with jax.set_mesh(mesh()):
        assert_spread(*jax.eval_shape(run, *spread(*arrays("dropout_scan"))))


@CASES.over(case=("masks of no mesh",) if HAS_SET_MESH else ())
def a_step_of_dropout_cell(case: str) -> None:
    params, (c, h), xs = arrays("dropout_scan")
    given: Any = {"cell": fdc.lstm_cell, "dropout": SPEC}
    masks = fdc.draw_masks(params, (c, h), xs[0], rng(), **given)
    want = fdc.dropout_cell(params, (c, h), xs[0], rng(), masks=masks, step=0, **given)

    def run(params: Any, carry: Any, x: Any, key: Any) -> Any:
        return fdc.dropout_cell(params, carry, x, key, masks=masks, step=0, **given)

    with jax.set_mesh(mesh()):
        placed = put(params), put((c, h), "batch"), put(xs[0], "batch"), put(rng())
        got = jax.jit(run)(*placed)
    for leaf in jax.tree.leaves(got):
        assert leaf.sharding.spec == P("batch", None)
    assert_close(got, want)


@CASES.over(prng=("threefry2x32", "rbg") if HAS_SET_MESH else ())
def masks_are_those_of_one_device(prng: str) -> None:
    """Bit for bit, rows that draw by ids too; and each device draws its own rows."""
    rows, units = 32, 96  # no other size in the program is 32
    x, key = np.ones((rows, units), np.float32), jax.random.key(3, impl=prng)
    spec = fdc.RecurrentDropout(state=fdc.Dropout(keep_prob=0.7, variational=True))

    def masks(x: Any, key: Any, ids: Any) -> Any:
        given: Any = {"cell": lambda p, h, x: (h, x), "dropout": spec}
        return [
            fdc.draw_masks(None, x, x, key, sequence_ids=of, **given).state for of in (None, ids)
        ]

    with jax.set_mesh(mesh()):
        placed = put(x, "batch"), put(key), put(np.arange(rows), "batch")
        lowered = jax.jit(masks).lower(*placed)
        got = jax.jit(masks)(*placed)
    for mask, want in zip(got, jax.jit(masks)(x, key, np.arange(rows)), strict=True):
        assert mask.sharding.spec == P("batch", None)
        np.testing.assert_array_equal(np.asarray(mask), np.asarray(want))
    if prng != "rbg":  # which is sharded only under a flag of XLA's
        text = str(lowered.compile().as_text())
        assert f"u32[{rows // DEVICES}," in text and f"u32[{rows}," not in text


@CASES.over(case=("vmap", "features", "shard_map") if HAS_SET_MESH else ())
def other_ways_to_spread_a_sequence(case: str) -> None:
    """The types of masks: `jax.vmap` over keys, sharded features, and a mesh with a manual axis."""
    spec = fdc.RecurrentDropout(
        input=fdc.Dropout(keep_prob=0.7, variational=True), state=fdc.Zoneout(prob=0.3)
    )

    def cell(params: Any, h: Any, x: Any) -> Any:
        h = jnp.tanh(h + x)
        return h, h

    def run(h: Any, xs: Any, key: Any) -> Any:
        return fdc.dropout_scan(None, h, xs, key, cell=cell, dropout=spec)[1]

    h, xs = numbers(BATCH, UNITS), numbers(STEPS, BATCH, UNITS)
    axes = jax.make_mesh((2, 2), ("batch", "model"), axis_types=(AxisType.Explicit,) * 2)

    def on(value: Any, *spec: Any) -> Any:
        return jax.device_put(value, NamedSharding(axes, P(*spec)))

    with jax.set_mesh(axes):
        placed = on(h, "batch", "model"), on(xs, None, "batch", "model")
        if case == "vmap":
            keys = jax.random.split(rng(), 2)
            got = jax.jit(jax.vmap(run, (None, None, 0)))(*placed, on(keys))
            want = jnp.stack([run(h, xs, key) for key in keys])
            assert got.sharding.spec == P(None, None, "batch", "model")
        elif case == "features":
            got, want = jax.jit(run)(*placed, on(rng())), run(h, xs, rng())
            assert got.sharding.spec == P(None, "batch", "model")
        else:
            mapped = jax.shard_map(
                run,
                in_specs=(P("batch"), P(None, "batch"), P()),
                out_specs=P(None, "batch"),
                axis_names={"batch"},
                check_vma=False,
            )
            got = jax.jit(mapped)(*placed, on(rng()))
            halves = [slice(0, BATCH // 2), slice(BATCH // 2, BATCH)]
            want = jnp.concatenate([run(h[at], xs[:, at], rng()) for at in halves], 1)
    assert_close(got, want)


@CASES.over(keep_prob=(0.5, 0.7) if HAS_SET_MESH else ())
def a_gradient_on_a_mesh_with_a_manual_axis(keep_prob: float) -> None:
    """That of `jax.lax.scan`, in a `shard_map` that checks; the rows are sharded over both axes."""
    spec = fdc.RecurrentDropout(input=fdc.Dropout(keep_prob=keep_prob))
    weights, h, xs = numbers(UNITS, UNITS), numbers(BATCH, UNITS), numbers(STEPS, BATCH, UNITS)
    axes = jax.make_mesh((2, 2), ("rows", "batch"), axis_types=(AxisType.Auto, AxisType.Explicit))

    def cell(weights: Any, h: Any, x: Any) -> Any:
        h = jnp.tanh(x + h @ weights / 8)
        return h, h

    def ours(*args: Any) -> Any:
        return fdc.dropout_scan(*args, cell=cell, dropout=spec)[1]

    def by_steps(weights: Any, h: Any, xs: Any, key: Any) -> Any:
        def step(h: Any, at: Any) -> Any:
            number, x = at
            options: dict[str, Any] = {"step": number, "cell": cell, "dropout": spec}
            return fdc.dropout_cell(weights, h, x, key, **options)

        return jax.lax.scan(step, h, (jnp.arange(STEPS), xs))[1]

    def gradient_of(way: Any) -> Any:
        def loss(weights: Any, h: Any, xs: Any, key: Any) -> Any:
            key = jax.random.fold_in(key, jax.lax.axis_index("rows"))
            return jax.lax.psum(way(weights, h, xs, key).sum(), "rows")

        specs = (P(), P("rows"), P(None, "rows"), P())
        mapped = jax.shard_map(
            jax.grad(loss), mesh=axes, axis_names={"rows"}, in_specs=specs, out_specs=P()
        )
        return jax.jit(mapped)

    def on(value: Any, *spec: Any) -> Any:
        return jax.device_put(value, NamedSharding(axes, P(*spec)))

    both = ("rows", "batch")
    with jax.set_mesh(axes):
        args = on(weights), on(h, both), on(xs, None, both), on(jax.random.key(3))
        assert_close(gradient_of(ours)(*args), gradient_of(by_steps)(*args))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    CASES.report(sys.argv[1:])
