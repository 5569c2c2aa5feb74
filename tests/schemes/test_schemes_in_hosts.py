"""Each published scheme in every Flax host: its paper's equations, with the masks drawn there."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scheme_equations as equations
from flax import nnx
from paper_schemes import BATCH, FEATURES, FULL, SCHEMES, STEPS, UNITS, example, frozen, schemes
from quick_prng import QUICK
from scheme_hosts import (
    EVALUATION,
    LINEN_HOSTS,
    Framework,
    Ran,
    in_nnx,
    linen,
    linen_module,
    nnx_cell,
)

import flax_dropout_cell as fdc

KEY = jax.random.key(3, impl=QUICK)
FRAMEWORKS = {"linen": linen, "nnx": in_nnx}
LINEN_CELLS = {"lstm": fdc.linen.LSTMCell, "gru": fdc.linen.GRUCell}
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)

# The programs here run once, so they need not be fast.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@frameworks
@schemes
def test_in_every_host_it_is_the_papers_equations(name: str, framework: str) -> None:
    """In training, with the masks that the host drew."""
    scheme = SCHEMES[name]
    made = FRAMEWORKS[framework](scheme.cell)
    params, carry, xs = first_example(scheme.cell)

    @compiled
    def train(key: jax.Array, xs: Any) -> Any:
        return {host: run(scheme.spec, key, xs) for host, run in made.hosts.items()}

    draw_each = drawer_of_steps(made, scheme)
    for host, directions in train(KEY, xs).items():
        assert len(directions) == (2 if "Bidirectional" in host else 1)
        # The second direction runs from the end.
        for ran, inputs in zip(directions, (xs, xs[::-1]), strict=False):
            masks = masks_in(ran, made, scheme, draw_each)
            check(ran, equations.loop(scheme.step, params, carry, inputs, masks, FULL))


@frameworks
@schemes
def test_evaluation_in_every_host_is_the_papers_rule(name: str, framework: str) -> None:
    """And needs no stream. Where nothing else is expected it is the program without any noise."""
    scheme = SCHEMES[name]
    made = FRAMEWORKS[framework](scheme.cell)
    bare = evaluation(framework, scheme.cell, fdc.RecurrentDropout())
    ours = evaluation(framework, scheme.cell, scheme.spec)
    if str(ours) != str(bare):
        check_evaluation(made, scheme.cell, scheme.spec, scheme.evaluate)
    else:
        assert scheme.evaluate in (equations.bare_lstm, equations.bare_gru)


@frameworks
@pytest.mark.parametrize(
    ("cell", "step"), [("lstm", equations.bare_lstm), ("gru", equations.bare_gru)]
)
def test_without_noise_every_host_is_the_bare_cell(cell: str, step: Any, framework: str) -> None:
    check_evaluation(FRAMEWORKS[framework](cell), cell, fdc.RecurrentDropout(), step)


def evaluation(framework: str, cell: str, spec: fdc.RecurrentDropout) -> Any:
    """The program of all hosts."""

    def run_all(xs: Any) -> Any:
        hosts = FRAMEWORKS[framework](cell).hosts.values()
        return [(ran.carry, ran.ys) for run in hosts for ran in run(spec, EVALUATION, xs)]

    return jax.make_jaxpr(run_all)(example(cell)[2])


def check_evaluation(made: Framework, cell: str, spec: fdc.RecurrentDropout, step: Any) -> None:
    params, carry, xs = first_example(cell)
    nothing: Any = [{}] * STEPS

    @compiled
    def evaluate(xs: Any) -> Any:
        return [run(spec, EVALUATION, xs) for run in made.hosts.values()]

    for directions in evaluate(xs):
        for ran, inputs in zip(directions, (xs, xs[::-1]), strict=False):
            assert ran.masks is None
            check(ran, equations.loop(step, params, carry, inputs, nothing, FULL))


def first_example(cell: str) -> Any:
    """With a carry of zeros, as hosts begin."""
    params, carry, xs = example(cell)
    return params, jax.tree.map(np.zeros_like, carry), xs


def check(ran: Ran, want: Any) -> None:
    got = (*equations.as_tuple(ran.carry), ran.ys)
    for ours, theirs in zip(got, (*equations.as_tuple(want[0]), want[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def drawer_of_steps(framework: Framework, scheme: Any) -> Callable[..., Any]:
    """Gives the masks of every step from a carry and their keys; compiled once for all hosts."""
    x, spec = jnp.zeros((BATCH, FEATURES)), frozen(scheme.spec)

    def draw(carry: Any, key: jax.Array) -> fdc.Masks:
        first = jax.tree.map(jnp.zeros_like, carry)
        return fdc.draw_masks(framework.tree, first, x, key, cell=framework.pure, dropout=spec)

    return compiled(jax.vmap(draw, in_axes=(None, 0)))


def masks_in(
    ran: Ran, framework: Framework, scheme: Any, draw_each: Callable[..., Any]
) -> list[dict[str, Any]]:
    """The masks of each step: those that the host drew once, and those from each step's key."""
    once = framework.masks(ran.masks)
    if frozen(scheme.spec) == scheme.spec:
        return [once] * STEPS
    steps = framework.masks(draw_each(ran.carry, jax.random.split(ran.rng, STEPS)))
    return [jax.tree.map(lambda mask, t=t: mask[t], steps) | once for t in range(STEPS)]


@schemes
def test_init_needs_no_stream_and_takes_one(name: str) -> None:
    """The weights are those of the bare cell, under the same names, whatever the scheme."""
    scheme = SCHEMES[name]
    cell = LINEN_CELLS[scheme.cell](UNITS)
    xs = example(scheme.cell)[2]
    bare = jax.eval_shape(nn.RNN(cell, time_major=True).init, KEY, xs)["params"]
    for host in LINEN_HOSTS:
        init = linen_module(host, cell, scheme.spec, evaluate=False).init
        params = bare if "Bidir" not in host else {"forward_rnn": bare, "backward_rnn": bare}
        for rngs in (KEY, {"params": KEY, "dropout": KEY}):
            assert jax.eval_shape(init, rngs, xs)["params"] == params


@schemes
def test_training_without_a_stream_is_refused(name: str) -> None:
    scheme = SCHEMES[name]
    xs = example(scheme.cell)[2]
    refused = functools.partial(pytest.raises, ValueError, match="needs a 'dropout' stream in tr")
    params: Any = {"cell": linen(scheme.cell).tree}
    params = params | {"forward_rnn": params, "backward_rnn": params}
    for host in LINEN_HOSTS:
        module = linen_module(host, LINEN_CELLS[scheme.cell](UNITS), scheme.spec, evaluate=False)
        for rngs in (None, {"params": KEY}):
            with refused():
                module.apply({"params": params}, xs, rngs=rngs)
    cell = nnx_cell(scheme.cell)
    layers: list[Any] = [nnx.RNN(fdc.nnx.DropoutCell(cell, scheme.spec))]
    layers.append(fdc.nnx.RNN(cell, scheme.spec))
    for layer in layers:
        with refused():
            layer(xs)
