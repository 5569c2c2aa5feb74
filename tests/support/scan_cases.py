"""Loops that test_hoisted_scan.py runs over: a case for each thing that a step can hold."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_dropout_cell._hoist.hoisted_scan import scan_in_parts

T, B, D, H = 3, 2, 3, 4
# Functions with a `custom_jvp` in the step, and branches that pick masks.
TAKES_RULES = jax.__version_info__ >= (0, 12)
Scan = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A loop `run(scan, **arrays)`, and the arrays that it is differentiated by.

    Attributes:
      run: runs the loop and returns its result.
      shapes: of the arrays.
      hoists: whether weights' gradients are to be kept out of the loop.
    """

    run: Callable[..., Any]
    shapes: dict[str, Any]
    hoists: bool

    def arrays(self, seed: int = 0, dtype: Any = None) -> dict[str, Any]:
        draw = np.random.default_rng(seed)

        def make(shape: tuple[int, ...]) -> jax.Array:
            return jnp.asarray(draw.normal(size=shape), dtype)

        return jax.tree.map(make, self.shapes, is_leaf=_is_shape)

    def loss(self, scan: Scan, arrays: dict[str, Any]) -> jax.Array:
        leaves = jax.tree.leaves(self.run(scan, **arrays))
        real = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum((jnp.sum(jnp.sin(leaf)) for leaf in real), start=jnp.zeros((), real[0].dtype))


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(dim, int) for dim in node)


CASES: dict[str, Case] = {}
CELL = {"wx": (D, H), "wh": (H, H), "b": (1, H), "h": (B, H), "xs": (T, B, D)}


def case(hoists: bool = True, **shapes: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        CASES[run.__name__.replace("_", " ")] = Case(run, shapes, hoists)
        return run

    return register


# Cells -------------------------------------------------------------------------------------------


@case(kernel=(D + H, 4 * H), bias=(1, 4 * H), c=(B, H), h=(B, H), xs=(T, B, D))
def lstm_in_six_lines(scan, kernel, bias, c, h, xs):
    def step(carry, x):
        c, h = carry
        i, f, g, o = jnp.split(jnp.concatenate([x, h], -1) @ kernel + bias, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    return scan(step, (c, h), xs)


def add_flax_cell(cell: nn.RNNCellBase, hoists: bool = True, x: tuple[int, ...] = (B, D)) -> None:
    carry = jax.eval_shape(lambda: cell.initialize_carry(jax.random.key(0), x))
    params = jax.eval_shape(lambda carry: cell.init(jax.random.key(0), carry, jnp.zeros(x)), carry)
    shapes = jax.tree.map(lambda leaf: leaf.shape, {"params": params, "carry": carry})

    def run(scan, params, carry, xs):
        return scan(lambda carry, x: cell.apply(params, carry, x), carry, xs)

    CASES[f"nn.{type(cell).__name__}"] = Case(run, shapes | {"xs": (T, *x)}, hoists)


for flax_cell in (nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell, nn.MGUCell):
    add_flax_cell(flax_cell(H))
# A convolution's kernel is small beside its input.
add_flax_cell(nn.ConvLSTMCell(1, (2, 2)), hoists=False, x=(1, 3, 3, 1))


def unbatched(scan, u, v, h, xs):
    """A vector's product is a scalar, which is added to a vector."""

    def step(h, x):
        h = jnp.tanh(h @ u + x + h @ v)
        return h, h

    return scan(step, h, xs)


case(u=(H, H), v=(H,), h=(H,), xs=(T, H))(unbatched)
# As many steps as units: an axis in the wrong place would fit.
CASES["unbatched, H steps"] = Case(
    unbatched, {"u": (H, H), "v": (H,), "h": (H,), "xs": (H, H)}, True
)


@case(wx=(D, 2 * H), wh=(H, 2 * H), h=(B, H), xs=(T, 1, D))
def one_input_for_all_rows(scan, wx, wh, h, xs):
    def step(h, x):
        (zx, gx), (zh, gh) = jnp.split(x @ wx, 2, -1), jnp.split(h @ wh, 2, -1)
        h = jnp.tanh(zx + zh) * jax.nn.sigmoid(gx + gh)
        return h, h

    return scan(step, h, xs)


@case(w=(H, H), h=(), xs=(T,))
def a_product_with_a_scalar(scan, w, h, xs):
    def step(h, x):
        h = jnp.tanh(jnp.tensordot(h, w, 0).sum() + x)
        return h, h

    return scan(step, h, xs)


@case(kernel=(3, 4, 8), h=(2, 3, 4), xs=(T, 2, 3, 4))
def a_convolution_that_groups_rows(scan, kernel, h, xs):
    def step(h, x):
        z = jax.lax.conv_general_dilated(
            h, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), batch_group_count=2
        )
        h = jnp.tanh(jnp.concatenate(jnp.split(z, 2, -1)) + x)
        return h, h

    return scan(step, h, xs)


# Masks, keys and lengths -------------------------------------------------------------------------


@case(**CELL)
def masks_closed_over_and_in_xs(scan, wx, wh, b, h, xs):
    mask = jnp.arange(B * H).reshape(B, H) % 3 > 0
    masks = jnp.arange(T * B * D).reshape(T, B, D) % 4 > 0

    def step(h, at):
        x, keep = at
        h = jnp.tanh(jnp.where(keep, x, 0) @ wx + jnp.where(mask, h, 0) @ wh + b)
        return h, h

    return scan(step, h, (xs, masks))


@case(**CELL)
def keys_in_xs_and_in_the_carry(scan, wx, wh, b, h, xs):
    def step(carry, at):
        key, h = carry
        own, x = at
        key, used = jax.random.split(key)
        keep = jax.random.bernoulli(used, 0.7, h.shape)
        x = x * jax.random.uniform(own, x.shape, x.dtype)
        h = jnp.tanh(x @ wx + jnp.where(keep, h, 0) @ wh + b)
        return (key, h), h

    (key, h), ys = scan(step, (jax.random.key(1), h), (jax.random.split(jax.random.key(2), T), xs))
    return jax.random.key_data(key), h, ys


@case(**CELL)
def lengths_with_a_counter(scan, wx, wh, b, h, xs):
    lengths = jnp.array([2, 3], jnp.int32)

    def step(carry, x):
        at, h = carry
        new = jnp.tanh(x @ wx + h @ wh + b)
        valid = (at < lengths)[:, None]
        return (at + 1, jnp.where(valid, new, h)), (jnp.where(valid, new, 0), at)

    return scan(step, (jnp.zeros((), jnp.int32), h), xs)


# Uses of weights in a step ----------------------------------------------------------------------


@case(w=(H, H), h=(B, H), xs=(T, B, H))
def tied_and_elementwise_and_an_output(scan, w, h, xs):
    def step(h, x):
        h = jnp.tanh(x @ w + h @ w.T) * (1 + w[:B])
        return h, (h, w)

    return scan(step, h, xs)


@case(table=(5, H), wh=(H, H), h=(B, H))
def an_embedding_looked_up_inside(scan, table, wh, h):
    def step(h, word):
        h = jnp.tanh(jnp.take(table, word, axis=0, mode="clip") + h @ wh)
        return h, h @ table.T

    return scan(step, h, jnp.array([[0, 4], [1, 1], [4, 3]]))


@case(g=(1, H), unused=(H, H), **CELL)
def weight_norm_and_weight_drop(scan, g, unused, wx, wh, b, h, xs):
    del unused
    keep = jnp.arange(H * H).reshape(H, H) % 5 > 0

    def step(h, x):
        normed = g * wx / jnp.sqrt(jnp.sum(wx**2, axis=0, keepdims=True))
        z = x @ normed + h @ jnp.where(keep, wh, 0)
        h = jnp.tanh(z + b) * jax.nn.sigmoid(z)
        return h, h

    return scan(step, h, xs)


WIDE = 24  # a batched product waits for the end of the loop where its weight is large


@case(w=(2, WIDE, WIDE), left=(WIDE, B), bias=(WIDE,), h=(B, 2, WIDE), xs=(T, B, 2, WIDE))
def a_batched_product_and_one_from_the_left(scan, w, left, bias, h, xs):
    def step(h, x):
        z = jnp.einsum("bnh,nhk->bnk", h + x, w)
        h = jnp.tanh(z + jnp.einsum("kb,bnh->knh", left, z)[:B]) + bias[None, None]
        return h, h

    return scan(step, h, xs)


@case(**CELL)
def masked_copies_that_are_made_again_after_the_loop(scan, wx, wh, b, h, xs):
    masks = jnp.arange(2 * B * H).reshape(2, B, H) % 3 > 0

    def step(h, x):
        first, second = jnp.where(masks, h * b / 0.7, 0)
        h = jnp.tanh(2 * x @ wx + first @ wh + second @ wh.T)
        return h, h

    return scan(step, h, xs)


@case(wh=(H, H), h=(B, H))
def a_value_that_is_the_same_at_all_steps(scan, wh, h):
    def step(h, _):
        ones = jnp.broadcast_to(jnp.ones((1, H), h.dtype), (B, H))
        h = jnp.tanh(jnp.where(h > 0, h, 0) @ wh + ones @ wh)
        return h, None

    return scan(step, h, None, length=T)


@case(wq=(H, H), wk=(H, H), h=(B, H), xs=(T, B, 3, H))
def attention(scan, wq, wk, h, xs):
    def step(h, x):
        scores = jnp.einsum("bh,bsh->bs", h @ wq, x @ wk)
        h = jnp.tanh(jnp.einsum("bs,bsh->bh", jax.nn.softmax(scores), x))
        return h, h

    return scan(step, h, xs)


@case(wx=(D, H), wh=(H, H), b=(H,), scale=(H,), h=(H,), xs=(T, D))
def unbatched_with_layer_norm_and_no_y(scan, wx, wh, b, scale, h, xs):
    def step(h, x):
        z = x @ wx + h @ wh + b
        return jnp.tanh(scale * (z - z.mean()) / jnp.sqrt(z.var() + 0.1)), None

    return scan(step, h, xs)


@case(wx=(D, 2 * H), wh=(H, 2 * H), b=(1, H), h=(B, H), xs=(T, B, D))
def products_that_are_cut_and_then_added(scan, wx, wh, b, h, xs):
    def step(h, x):
        (zx, gx), (zh, gh) = jnp.split(x @ wx, 2, -1), jnp.split(h @ wh, 2, -1)
        h = jnp.tanh(zx + zh + b) * jax.nn.sigmoid(gh + gx)
        return h, h

    return scan(step, h, xs)


@case(wh=(H, 2 * H), h=(B, H), xs=(T, B, 2 * H))
def a_product_that_is_cut_and_added_to_the_input(scan, wh, h, xs):
    def step(h, x):
        (zx, gx), (zh, gh) = jnp.split(x, 2, -1), jnp.split(h @ wh, 2, -1)
        h = jnp.tanh(zx + zh) * jax.nn.sigmoid(gh + gx)
        return h, h

    return scan(step, h, xs)


@case(wx=(D, H), bias=(1, H), v=(1, H), h=(B, H), xs=(T, B, D), wh=(H, H))
def a_scale_a_divided_and_a_subtracted_weight(scan, wx, wh, bias, v, h, xs):
    def step(h, x):
        z = (x @ wx + h @ wh) * v - bias
        h = jnp.tanh(bias - z / (2 + v**2))
        return h, v / (2 + h**2)

    return scan(step, h, xs)


@case(**CELL)
def a_gate_of_the_input_alone(scan, wx, wh, b, h, xs):
    def step(h, x):
        h = jnp.tanh(h @ wh + b) * jax.nn.sigmoid(x @ wx)
        return h, h

    return scan(step, h, xs)


@case(v=(H, 2 * H), bias=(1, 2 * H), scale=(1, H), **CELL)
def heads_of_the_new_state_and_the_old(scan, v, bias, scale, wx, wh, b, h, xs):
    masks = jnp.arange(T * B * H).reshape(T, B, H) % 3 > 0

    def step(h, at):
        x, keep = at
        new = jnp.tanh(x @ wx + h @ wh + b)
        wide = jnp.tanh(jnp.where(keep, new * scale, 0) @ v + bias)
        return new, (2 * wide @ v.T, new, h @ wh)

    return scan(step, h, (xs, masks))


@case(**CELL, v=(H, D))
def a_gated_linear_recurrence_with_a_head(scan, wx, wh, b, h, xs, v):
    def step(h, x):
        decay = jax.nn.sigmoid(x @ wx + b)
        h = decay * h + (1 - decay) * jnp.tanh(x @ wx @ wh)
        return h, jnp.tanh(h @ v)

    return scan(step, h, xs)


# Complex numbers ---------------------------------------------------------------------------------


@case(nu=(1, H), theta=(1, H), bx=(2, D, H), cx=(2, H, D), h=(2, B, H), xs=(T, B, D))
def a_linear_recurrent_unit(scan, nu, theta, bx, cx, h, xs):
    turn = jnp.exp(jax.lax.complex(-jnp.exp(nu), theta))
    kernel, back = jax.lax.complex(*bx), jax.lax.complex(*cx)

    def step(h, x):
        h = turn * h + x.astype(h.dtype) @ kernel
        return h, (h @ back).real

    h, ys = scan(step, jax.lax.complex(*h), xs)
    return h.real, h.imag, ys


@case(w=(2, H, H), b=(2, 1, H), h=(2, B, H), xs=(2, T, B, H))
def complex_inputs_kernels_and_outputs(scan, w, b, h, xs):
    kernel, bias = jax.lax.complex(*w), jax.lax.complex(*b)

    def step(h, x):
        h = jnp.tanh((h + x) @ kernel + bias)
        return h, h.conj() * x

    h, ys = scan(step, jax.lax.complex(*h), jax.lax.complex(*xs))
    return h.real, h.imag, ys.real, ys.imag


@case(spectrum=(2, 1, H // 2 + 1), **CELL)
def a_transform_inside_a_real_cell(scan, spectrum, wx, wh, b, h, xs):
    multiplier = jax.lax.complex(*spectrum)

    def step(h, x):
        mixed = jnp.fft.irfft(jnp.fft.rfft(h) * multiplier, H)
        h = jnp.tanh(x @ wx + mixed @ wh + b)
        return h, h

    return scan(step, h, xs)


# Functions inside --------------------------------------------------------------------------------


@case(depth=(2, H, H), **CELL)
def loops_inside(scan, depth, wx, wh, b, h, xs):
    def step(h, x):
        h = jnp.tanh(x @ wx + h @ wh + b)
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, depth)
        h = jax.lax.fori_loop(0, 2, lambda i, h: h * (1 + b * i), h)
        power = jax.lax.while_loop(lambda n: n < 5, lambda n: n * 2, jnp.where(h[0, 0] > 0, 2, 1))
        return h, h * power

    return scan(step, h, xs)


@case(hoists=False, **CELL)
def a_branch_inside(scan, wx, wh, b, h, xs):
    def step(h, x):
        h = jnp.tanh(x @ wx + h @ wh + b)
        return h, jax.lax.cond(h[0, 0] > 0, lambda h: h @ wh, lambda h: h**2, h)

    return scan(step, h, xs)


@case(hoists=TAKES_RULES, **CELL)
def a_branch_inside_between_masks(scan, wx, wh, b, h, xs):
    mask = jnp.arange(B * H).reshape(B, H) % 3 > 0

    def step(h, x):
        keep = jax.lax.cond(h[0, 0] > 0, lambda mask: mask, jnp.logical_not, mask)
        h = jnp.tanh(x @ wx + jnp.where(keep, h, 0) @ wh + b)
        return h, h

    return scan(step, h, xs)


@case(hoists=TAKES_RULES, **CELL)
def calls_inside(scan, wx, wh, b, h, xs):
    @jax.jit
    def affine(x, h, b):
        return x @ wx + jax.jit(jnp.matmul)(h, wh) + b

    def step(h, x):
        h = jax.nn.silu(affine(x, h, b)) + jax.checkpoint(lambda h: jnp.tanh(h) * b)(h)
        return h, jax.nn.relu(h)

    return scan(step, h, xs)


@case(hoists=TAKES_RULES, **CELL)
def a_hoisted_scan_inside(scan, wx, wh, b, h, xs):
    def inner(h, w):
        h = jnp.tanh(h @ wh + w)
        return h, None

    def step(h, x):
        h, _ = scan_in_parts(inner, jnp.tanh(x @ wx + h @ wh), jnp.stack([b, 2 * b]))
        return h, h

    return scan(step, h, xs)


@case(wx=(0, H), wh=(H, H), h=(B, H), xs=(T, B, 0))
def no_features(scan, wx, wh, h, xs):
    def step(h, x):
        h = jnp.tanh(x @ wx + h @ wh)
        return h, h

    return scan(step, h, xs)


# Options -----------------------------------------------------------------------------------------


@case(**CELL)
def reverse_and_unrolled(scan, wx, wh, b, h, xs):
    def step(h, x):
        h = jnp.tanh(x @ wx + h @ wh + b)
        return h, h

    return scan(step, h, xs, reverse=True, unroll=2)


@case(wx=(D, H), wh=(H, H), b=(1, H), xs=(T, B, D))
def a_weakly_typed_carry(scan, wx, wh, b, xs):
    def step(carry, x):
        h, total = carry
        h = jnp.tanh(x @ wx + h @ wh + b)
        return (h, total * 0.5), h * total

    return scan(step, (jnp.full((B, H), 0.1), jnp.full((B, H), 2.0)), xs)


@case(wh=(H, H), h=(B, H))
def no_xs(scan, wh, h):
    return scan(lambda h, _: (jnp.tanh(h @ wh), h), h, None, length=T)
