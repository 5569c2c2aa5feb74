"""The pure cells against their equations in NumPy, their sites, and their compiled steps."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy_cells
import pytest
from jaxprs import equations

import flax_dropout_cell as fdc
from flax_dropout_cell.cells.disturb import undisturbed

FEATURES, UNITS, STEPS = 3, 8, 5


class CellCase(NamedTuple):
    """A cell, its equations, its weights, and the sites in the order in which it calls them."""

    cell: Callable[..., Any]
    in_numpy: Callable[..., Any]
    init: Callable[..., Any]
    gates: int
    sites: tuple[str, ...]


ALL = ("recurrent", "input_per_gate", "recurrent_per_gate", "candidate")
CELLS = {
    "lstm": CellCase(fdc.lstm_cell, numpy_cells.lstm, fdc.init_lstm, 4, (*ALL, "memory", "hidden")),
    "gru": CellCase(fdc.gru_cell, numpy_cells.gru, fdc.init_gru, 3, (*ALL, "hidden")),
}
cells = pytest.mark.parametrize("name", CELLS)


def draw(shape: tuple[int, ...], seed: int, dtype: Any = jnp.float32) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jnp.asarray(values, dtype)


def example(name: str, batch: tuple[int, ...] = (2,), dtype: Any = jnp.float32) -> Any:
    """Weights, biases not zero, with a carry and an input."""
    width = CELLS[name].gates * UNITS
    kernels = draw((FEATURES, width), 0, dtype), draw((UNITS, width), 1, dtype)
    params = fdc.LSTMParams(*kernels, draw((width,), 2, dtype))
    if name == "gru":
        params = fdc.GRUParams(*params, draw((UNITS,), 3, dtype))
    c, h = draw((*batch, UNITS), 4, dtype), draw((*batch, UNITS), 5, dtype)
    return params, fdc.LSTMState(c, h) if name == "lstm" else h, draw((*batch, FEATURES), 6, dtype)


def value_shape(name: str, site: str, batch: tuple[int, ...]) -> tuple[int, ...]:
    gates = (CELLS[name].gates,) if site.endswith("_per_gate") else ()
    return (*batch, *gates, FEATURES if site == "input_per_gate" else UNITS)


def masks_of(name: str, sites: Any, batch: tuple[int, ...] = (2,)) -> dict[str, np.ndarray]:
    return {
        site: np.asarray(draw(value_shape(name, site, batch), 10 + index))
        for index, site in enumerate(CELLS[name].sites)
        if site in sites
    }


class Stub:
    """A `disturb` that mixes value and previous by injected masks, and records its calls."""

    def __init__(self, masks: dict[str, Any]) -> None:
        self.masks, self.seen = masks, []

    def has(self, site: str) -> bool:
        return site in self.masks

    def __call__(self, site: str, value: Any, previous: Any = None) -> Any:
        self.seen.append((site, value.shape, previous is not None))
        return mix(self.masks[site], value, previous) if site in self.masks else value


def mix(mask: Any, value: Any, previous: Any) -> Any:
    return mask * value + (0 if previous is None else (1 - mask) * previous)


def in_numpy(masks: dict[str, Any]) -> dict[str, Any]:
    return {
        site: lambda value, previous, mask=mask: mix(mask, value, previous)
        for site, mask in masks.items()
    }


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        tuple(jax.tree.leaves(got)),
        tuple(jax.tree.leaves(want)),
    )


def some_sites(name: str) -> list[tuple[str, ...]]:
    sites = CELLS[name].sites
    return [(), *((site,) for site in sites), sites]


@pytest.mark.parametrize(
    ("name", "sites"),
    [(name, sites) for name in CELLS for sites in some_sites(name)],
    ids=lambda part: part if isinstance(part, str) else "+".join(part) or "none",
)
def test_a_step_is_its_equations(name: str, sites: tuple[str, ...]) -> None:
    case, masks = CELLS[name], masks_of(name, sites)
    params, carry, x = example(name)
    got = case.cell(params, carry, x, disturb=Stub(masks))
    numpy_carry = tuple(map(np.asarray, carry)) if name == "lstm" else np.asarray(carry)
    assert_close(got, case.in_numpy(params, numpy_carry, np.asarray(x), in_numpy(masks)))


@cells
@pytest.mark.parametrize("batch", [(), (2,), (2, 1, 3)], ids=str)
def test_any_number_of_batch_dims(name: str, batch: tuple[int, ...]) -> None:
    case, masks = CELLS[name], masks_of(name, CELLS[name].sites, batch)
    params, carry, x = example(name, batch)
    got = case.cell(params, carry, x, disturb=Stub(masks))
    numpy_carry = tuple(map(np.asarray, carry)) if name == "lstm" else np.asarray(carry)
    want = case.in_numpy(params, numpy_carry, np.asarray(x), in_numpy(masks))
    assert got[1].shape == (*batch, UNITS)
    assert_close(got, want)


@cells
def test_the_sites_and_what_they_hold(name: str) -> None:
    case, stub = CELLS[name], Stub(masks_of(name, CELLS[name].sites))
    case.cell(*example(name), disturb=stub)
    with_previous = ("memory", "hidden")
    assert stub.seen == [
        (site, value_shape(name, site, (2,)), site in with_previous) for site in case.sites
    ]


@cells
def test_previous_is_what_the_site_held_before(name: str) -> None:
    """A mask of zeros gives the old value back, which is carried on and emitted."""
    params, carry, x = example(name)
    zeros = {"hidden": jnp.zeros((2, UNITS))}
    new, y = CELLS[name].cell(params, carry, x, disturb=Stub(zeros))
    old_h = carry.h if name == "lstm" else carry
    np.testing.assert_array_equal(y, old_h)
    np.testing.assert_array_equal(jax.tree.leaves(new)[-1], old_h)
    if name == "lstm":
        zeros = {"memory": jnp.zeros((2, UNITS))}
        new, y = fdc.lstm_cell(params, carry, x, disturb=Stub(zeros))
        np.testing.assert_array_equal(new.c, carry.c)
        assert_close(jnp.abs(y) <= jnp.abs(jnp.tanh(carry.c)), jnp.ones((2, UNITS), bool))


@cells
def test_all_names_are_asked_for_or_called(name: str) -> None:
    """So that whoever runs the cell can list its sites, whichever hold noise."""
    asked: set[str] = set()

    def disturb(site: str, value: Any, previous: Any = None) -> Any:
        asked.add(site)
        return value

    disturb.has = lambda site: bool(asked.add(site))  # type: ignore[attr-defined]
    CELLS[name].cell(*example(name), disturb=disturb)
    assert asked == set(CELLS[name].sites)


@cells
def test_a_plain_function_disturbs_all_sites(name: str) -> None:
    seen: list[str] = []

    def disturb(site: str, value: Any, previous: Any = None) -> Any:
        seen.append(site)
        return value

    got = CELLS[name].cell(*example(name), disturb=disturb)
    assert tuple(seen) == CELLS[name].sites
    assert_close(got, CELLS[name].cell(*example(name)))


@cells
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=str)
def test_dtype_in_is_dtype_out(name: str, dtype: Any) -> None:
    got = CELLS[name].cell(*example(name, dtype=dtype))
    stub = Stub({site: jnp.asarray(m, dtype) for site, m in masks_of(name, ALL).items()})
    disturbed = CELLS[name].cell(*example(name, dtype=dtype), disturb=stub)
    assert {leaf.dtype for leaf in jax.tree.leaves((got, disturbed))} == {jnp.dtype(dtype)}
    want = CELLS[name].cell(*example(name))
    tolerance = 1e-5 if dtype == jnp.float32 else 0.1
    assert_close(jax.tree.map(lambda leaf: leaf.astype("float32"), got), want, tolerance)


@cells
def test_float64(name: str, float64: None) -> None:
    got = CELLS[name].cell(*example(name, dtype=jnp.float64))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float64")}


@cells
def test_the_carry_keeps_its_dtype(name: str) -> None:
    """Weights and inputs in half precision, a carry in float32: a scan needs it to stay so."""
    params, _, x = example(name, dtype=jnp.bfloat16)
    _, carry, _ = example(name)
    new, y = CELLS[name].cell(params, carry, x)
    assert {leaf.dtype for leaf in jax.tree.leaves((new, y))} == {jnp.dtype("float32")}


def test_an_lstm_carry_comes_back_as_it_came() -> None:
    params, state, x = example("lstm")
    as_state, y = fdc.lstm_cell(params, state, x)
    assert type(as_state) is fdc.LSTMState
    for kind in (tuple, list):
        new, _ = fdc.lstm_cell(params, kind(state), x)
        assert type(new) is kind
        np.testing.assert_array_equal(new[0], as_state.c)
    np.testing.assert_array_equal(as_state.h, y)


def test_a_gru_may_lack_its_second_bias() -> None:
    params, h, x = example("gru")
    zero = params._replace(recurrent_bias=jnp.zeros(UNITS))
    got = fdc.gru_cell(params._replace(recurrent_bias=None), h, x)
    assert_close(got, fdc.gru_cell(zero, h, x), 0)


@cells
def test_first_weights(name: str) -> None:
    features, units, gates = 64, 128, CELLS[name].gates
    params = CELLS[name].init(jax.random.key(0), features, units)
    assert not any(leaf.any() for leaf in params[2:])
    for kernel in jnp.split(params.recurrent_kernel, gates, -1):
        assert_close(kernel @ kernel.T, jnp.eye(units), 1e-4)
    stddev = params.input_kernel.std() * features**0.5
    assert abs(stddev - 1) < 5 / (2 * params.input_kernel.size) ** 0.5
    first, second = jnp.split(params.input_kernel, gates, -1)[:2]
    assert not (first == second).any()
    half = CELLS[name].init(jax.random.key(0), features, units, jnp.bfloat16)
    assert {leaf.dtype for leaf in half} == {jnp.dtype("bfloat16")}


class HaikuLikeState(NamedTuple):
    hidden: Any
    cell: Any


MISTAKES = {
    "an LSTM with a GRU's carry": (
        "lstm", lambda p, s, x: (p, s.h, x), TypeError, r"got float32\[2, 8\]"
    ),
    "another state": (
        "lstm", lambda p, s, x: (p, HaikuLikeState(*s), x), TypeError,
        r"got HaikuLikeState\(\w+=float32\[2, 8\], ",
    ),
    "c and h of two shapes": (
        "lstm", lambda p, s, x: (p, (s.c[:1], s.h), x), ValueError, r"got \[1, 8\] and \[2, 8\]"
    ),
    "a GRU with an LSTM's carry": (
        "gru",
        lambda p, h, x: (p, (h, h), x),
        TypeError,
        r"gru_cell takes the carry h as one array, got \(float32\[2, 8\], float32\[2, 8\]\)",
    ),
    "an input of another size": (
        "gru", lambda p, h, x: (p, h, h), ValueError, r"x \[2, 8\].*\[3, 24\] reads 3 features"
    ),
    "an h of another batch": (
        "gru", lambda p, h, x: (p, h[:1], x), ValueError, r"h \[1, 8\]; h must be \[2, 8\]"
    ),
    "kernels transposed, as PyTorch has them": (
        "gru", lambda p, h, x: (p._replace(recurrent_kernel=p[1].T), h, x), ValueError,
        r"recurrent_kernel \[features, 3 \* features\], got \[24, 8\]",
    ),
    "ints as the input": (
        "gru", lambda p, h, x: (p, h, x.astype(int)), TypeError,
        r"takes a floating-point x, got int32: write x.astype\(jnp.float32\)",
    ),
    "bools as the input": ("lstm", lambda p, s, x: (p, s, x > 0), TypeError, "got bool: write"),
    "a list as the input": (
        "gru", lambda p, h, x: (p, h, x.tolist()), TypeError, "takes x as one array, got"
    ),
    "ints as h": (
        "gru", lambda p, h, x: (p, h.astype(int), x), TypeError,
        "carries a floating-point h, such as float32, got int32",
    ),
    "ints as c": (
        "lstm", lambda p, s, x: (p, (s.c.astype(int), s.h), x), TypeError, "floating-point c"
    ),
    "weights of another cell": (
        "gru", lambda p, h, x: (fdc.LSTMParams(*p[:3]), h, x), TypeError,
        "gru_cell takes GRUParams, got an LSTMParams",
    ),
    "variables of Flax": (
        "lstm", lambda p, s, x: ({"params": p}, s, x), TypeError,
        r"takes LSTMParams, got a dict; .*write fdc.linen.core_params\(variables, cell\)",
    ),
    "a bias of one": (
        "lstm", lambda p, s, x: (p._replace(bias=jnp.ones(1)), s, x), ValueError,
        r"takes a bias \[32\], got \[1\]",
    ),
    "no bias": (
        "lstm", lambda p, s, x: (p._replace(bias=None), s, x), ValueError, r"\[32\], got None"
    ),
    "a second bias of one": (
        "gru", lambda p, h, x: (p._replace(recurrent_bias=jnp.ones(1)), h, x), ValueError,
        r"takes a recurrent_bias \[8\], got \[1\]",
    ),
    "an input kernel transposed": (
        "lstm", lambda p, s, x: (p._replace(input_kernel=p[0].T), s, x), ValueError,
        r"an input_kernel \[in_features, 4 \* 8\], got \[32, 3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    name, change, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message) as caught:
        CELLS[name].cell(*change(*example(name)))
    assert len(str(caught.value).splitlines()) <= 5


def compiled_scan(cell: Callable[..., Any], name: str) -> str:
    params, carry, x = example(name, (4,))

    def run(params: Any, carry: Any, xs: jax.Array) -> Any:
        return jax.lax.scan(lambda carry, x: cell(params, carry, x), carry, xs)

    text = jax.jit(run).lower(params, carry, jnp.stack([x] * STEPS)).compile().as_text()
    assert text is not None
    return text


def without_metadata(text: str) -> str:
    """A program's text without the names and source lines of its operations."""
    text = re.sub(r"^(File|Function|Stack)\w+\n(\d+ .*\n)*", "", text, flags=re.M)
    return re.sub(r", metadata=\{[^}]*\}|, stack_frame_id=\d+", "", text)


def products(text: str) -> list[str]:
    """The matrix products, with batch dims or without."""
    return re.findall(r"= \S+ (?:dot|custom-call)\(.*|= \S+ .*__onednn\$matmul.*", text)


@cells
def test_a_site_without_noise_adds_nothing(name: str) -> None:
    """Of a cell that is asked about its sites, the program is that of one without any."""
    stub = Stub({})
    bare = compiled_scan(plain_lstm if name == "lstm" else plain_gru, name)
    with_sites = compiled_scan(CELLS[name].cell, name)
    asked = compiled_scan(lambda *args: CELLS[name].cell(*args, disturb=stub), name)
    assert stub.seen
    assert without_metadata(with_sites) == without_metadata(bare)
    assert without_metadata(asked) == without_metadata(bare)


def plain_lstm(params: Any, carry: Any, x: jax.Array) -> Any:
    read = x @ params.input_kernel + carry.h @ params.recurrent_kernel
    i, f, g, o = jnp.split(read + params.bias.reshape(1, -1), 4, -1)
    g = jnp.tanh(g)
    c = jax.nn.sigmoid(f) * carry.c + jax.nn.sigmoid(i) * g
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return fdc.LSTMState(c, h), h


def plain_gru(params: Any, h: jax.Array, x: jax.Array) -> Any:
    (of_x, n_of_x), (of_h, n_of_h), (bias, n_bias) = (
        jnp.split(weights, [2 * UNITS], -1) for weights in params[:3]
    )
    r, z = jnp.split(x @ of_x + h @ of_h + bias.reshape(1, -1), 2, -1)
    x_n, h_n = x @ n_of_x + n_bias.reshape(1, -1), h @ n_of_h + params.recurrent_bias.reshape(1, -1)
    n = jnp.tanh(x_n + jax.nn.sigmoid(r) * h_n)
    z = jax.nn.sigmoid(z)
    h = (1 - z) * n + z * h
    return h, h


def dots(function: Callable[..., Any], *args: Any) -> list[Any]:
    """The matrix products in a program, in loops and functions too."""
    found = (equation for equation, _ in equations(jax.make_jaxpr(function)(*args)))
    return [equation for equation in found if equation.primitive.name == "dot_general"]


# One product for all gates that read the same value, because one for each is slower with large
# weights. A GRU's n stands alone: r scales its product with h, so the two are not added up.
PRODUCTS_APART = ("input_per_gate", "recurrent_per_gate")
PRODUCTS = {
    ("lstm", ()): 2,
    ("lstm", ("recurrent", "candidate", "memory", "hidden")): 2,
    ("lstm", ("input_per_gate",)): 4 + 1,
    ("lstm", ("recurrent_per_gate",)): 1 + 4,
    ("lstm", ("input_per_gate", "recurrent_per_gate")): 4 + 4,
    ("gru", ()): 4,
    ("gru", ("input_per_gate",)): 3 + 1,
    ("gru", ("recurrent_per_gate",)): 1 + 3,
    ("gru", ("input_per_gate", "recurrent_per_gate")): 3 + 3,
}


@pytest.mark.parametrize(("name", "sites"), PRODUCTS, ids=str)
def test_products_of_a_step(name: str, sites: tuple[str, ...]) -> None:
    """As many as listed, in the step and in the compiled loop; batched ones are slow on a CPU."""
    stub = Stub(masks_of(name, sites, (4,)))

    def step(*args: Any) -> Any:
        return CELLS[name].cell(*args, disturb=stub)

    found = dots(step, *example(name, (4,)))
    assert len(found) == PRODUCTS[name, sites]
    assert all(dot.params["dimension_numbers"][1] == ((), ()) for dot in found)
    text = compiled_scan(step, name)
    inside = [line for line in products(text) if "while/body" in line]
    assert len(inside) == len(found)


@cells
@pytest.mark.parametrize("inside", [(), ("recurrent", "candidate")], ids=str)
def test_products_of_a_scan_under_noise(name: str, inside: tuple[str, ...]) -> None:
    """Noise at sites that all gates share leaves the products as they are."""
    params, carry, x = example(name)
    noise = fdc.Dropout(keep_prob=0.5, variational=True)
    spec = fdc.RecurrentDropout(input=noise, output=noise, inside=dict.fromkeys(inside, noise))
    scan = functools.partial(fdc.dropout_scan, cell=CELLS[name].cell, dropout=spec)
    found = dots(scan, params, carry, jnp.stack([x] * 3), jax.random.key(0))
    assert len(found) == PRODUCTS[name, ()]


@pytest.mark.parametrize(
    ("name", "sites"), [key for key in PRODUCTS if key[1] in ((), PRODUCTS_APART)], ids=str
)
def test_a_gradient_by_the_weights_computes_none_by_x(name: str, sites: tuple[str, ...]) -> None:
    """Each product gives its weight's gradient, and that of h; one of [x, h] would give x's too."""
    case, (params, carry, x) = CELLS[name], example(name)
    stub = Stub(masks_of(name, sites))

    def loss(params: Any, xs: jax.Array) -> jax.Array:
        step = functools.partial(case.cell, params, disturb=stub)
        return (jax.lax.scan(step, carry, xs)[1] ** 2).sum()

    total, of_h = PRODUCTS[name, sites], PRODUCTS[name, sites] // 2
    assert len(dots(jax.grad(loss), params, jnp.stack([x] * 3))) == 2 * total + of_h
    assert len(dots(jax.grad(loss, (0, 1)), params, jnp.stack([x] * 3))) == 3 * total


@cells
def test_the_loop_keeps_each_gates_cotangent_once(name: str) -> None:
    """Weights whose products are added up share a cotangent, which waits for the loop's end."""
    case, (_, carry, x) = CELLS[name], example(name, (1,))
    params = case.init(jax.random.key(0), FEATURES, UNITS)
    scan = functools.partial(fdc.dropout_scan, cell=case.cell, dropout=fdc.RecurrentDropout())

    def loss(params: Any, xs: jax.Array) -> jax.Array:
        return (scan(params, carry, xs, None)[1] ** 2).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, jnp.stack([x] * STEPS)).jaxpr
    *_, backward = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    avals: list[Any] = [out.aval for out in backward.outvars]
    stacked = [aval.shape for aval in avals if aval.shape[:1] == (STEPS,)]
    # A GRU's n has two: of what it reads of x, and of what it reads of h.
    assert sum(shape[-1] for shape in stacked) == UNITS * 4


def test_undisturbed_gives_the_value_back() -> None:
    value = object()
    assert undisturbed("hidden", value) is value


@pytest.mark.parametrize("init", [fdc.init_lstm, fdc.init_gru])
def test_first_kernels_are_drawn_apart(init: Any) -> None:
    """Of one key, a kernel of x and one of h would be nearly parallel."""
    params = init(jax.random.key(3), 64, 64)
    for x in np.split(np.asarray(params.input_kernel), params.bias.size // 64, -1):
        for h in np.split(np.asarray(params.recurrent_kernel), params.bias.size // 64, -1):
            assert abs(np.corrcoef(x.ravel(), h.ravel())[0, 1]) < 5 / 64
