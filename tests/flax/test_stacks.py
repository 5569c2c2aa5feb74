"""The models of docs/sequences.md, against loops that are written out by hand."""

import doctest
import functools
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_cells
import pytest
from asserts import assert_close
from flax import nnx
from quick_prng import quick_key

import flax_dropout_cell as fdc

core_params: Any = fdc.linen.core_params
PAGE = Path(__file__).parents[2] / "docs/sequences.md"
KEY = quick_key(8)
LENGTHS = jnp.array([6, 2, 4])
X = jax.random.normal(jax.random.key(0), (3, 6, 4))
WORDS = jax.random.normal(jax.random.key(1), (3, 7, 4))
MIXED = fdc.RecurrentDropout(
    input=fdc.Dropout(keep_prob=0.6),
    inside={"recurrent": fdc.Dropout(keep_prob=0.6, variational=True)},
)


@pytest.fixture(scope="module")
def page() -> Any:
    """The definitions of the page; its calls run as its doctest."""
    names: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(PAGE.read_text()):
        if example.source.startswith(("import", "from", "class", "@", "dropout =", "writer =")):
            exec(example.source, names)
    return SimpleNamespace(**names)


def zeros(batch: int = 3) -> fdc.LSTMState:
    return fdc.LSTMState(jnp.zeros((batch, 8)), jnp.zeros((batch, 8)))


def weights_of(model: nn.Module, *args: Any) -> Any:
    """Random weights, without a program to make them."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    return jax.tree.map(lambda leaf: jnp.float32(0.5 * rng.normal(size=leaf.shape)), shapes)


def nnx_params(cell: Any) -> Any:
    return fdc.nnx.core_params(nnx.state(cell), cell)


def dense(params: Any, x: jax.Array) -> jax.Array:
    params = nnx.to_pure_dict(nnx.state(params)) if isinstance(params, nnx.Module) else params
    return jnp.einsum("...i,ij->...j", x, params["kernel"]) + params["bias"].reshape(
        (1,) * (x.ndim - 1) + (-1,)
    )


def run_alone(params: fdc.LSTMParams, row: Any) -> np.ndarray:
    """One row `[time, features]` through an LSTM, without dropout, in NumPy."""
    carry, ys = (np.zeros(8), np.zeros(8)), []
    for x in np.asarray(row):
        carry, y = numpy_cells.lstm(params, carry, x, {})
        ys.append(y)
    return np.stack(ys)


def test_residuals(page: Any) -> None:
    """Evaluated, layer by layer; in training each layer has masks of its own."""
    variables = weights_of(page.Stack(), X)
    y = page.Stack(deterministic=True).apply(variables, X)
    params, cell = variables["params"], fdc.linen.LSTMCell(8)
    hand = dense(params["Dense_0"], X)
    for index in range(3):
        layer = core_params({"params": params[f"LSTMCell_{index}"]}, cell)
        hand = hand + np.stack([run_alone(layer, row) for row in hand])
    assert_close(y, hand, rtol=2e-5)
    # With one set of weights for all layers and x in place of a layer's output, they differ still.
    layers = [params[f"LSTMCell_{index}"] for index in range(3)]
    same = {**params, **{f"LSTMCell_{index}": layers[0] for index in range(3)}}
    seen: list[Any] = []

    def see(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if not isinstance(context.module, fdc.linen.RNN) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        seen.append(next_fun(jnp.ones((3, 6, 8))))
        return jnp.zeros_like(seen[-1])

    with nn.intercept_methods(see):
        page.Stack().apply({"params": same}, X, rngs={"dropout": KEY})
    assert len(seen) == 3
    for one, other in itertools.combinations(seen, 2):
        assert jnp.abs(one - other).max() > 0.01


def test_three_bidirectional_layers_with_lengths(page: Any) -> None:
    """In evaluation each row is the same as alone; in training padding has no effect."""
    tagger = page.Tagger()
    variables = weights_of(tagger, X, LENGTHS)
    run = jax.jit(lambda v: page.Tagger(deterministic=True).apply(v, X, LENGTHS))
    y = run(variables)
    cell, params = fdc.linen.LSTMCell(8), variables["params"]
    for row, length in enumerate(map(int, LENGTHS)):
        hand = X[row, :length]
        for index in range(3):
            ways = [params[f"LSTMCell_{2 * index + way}"] for way in (0, 1)]
            forth, back = (core_params({"params": way}, cell) for way in ways)
            ys = run_alone(forth, hand), run_alone(back, hand[::-1])[::-1]
            hand = np.concatenate(ys, -1)
        assert_close(y[row, :length], hand, rtol=2e-5)
        assert not y[row, length:].any()
    padding = (jnp.arange(6)[None] >= LENGTHS[:, None])[..., None]
    train = jax.jit(lambda x: tagger.apply(variables, x, LENGTHS, rngs={"dropout": KEY}))
    np.testing.assert_array_equal(train(X), train(jnp.where(padding, jnp.nan, X)))
    assert (train(X) != y).any()


def test_three_bidirectional_layers_in_nnx(page: Any) -> None:
    """In training: `dropout_scan` for each direction, with the key that its stream gives next."""
    tagger = page.NNXTagger(nnx.Rngs(params=0, dropout=1))
    hand, keys = jnp.moveaxis(X, 1, 0), []
    for layer in (tagger.first, tagger.second, tagger.third):
        ys = []
        for rnn, reverse in ((layer.forward_rnn, False), (layer.backward_rnn, True)):
            keys.append(nnx.clone(rnn.dropout_stream)())
            _, y = fdc.dropout_scan(
                nnx_params(rnn.cell),
                zeros(),
                hand,
                keys[-1],
                cell=fdc.lstm_cell,
                dropout=page.dropout,
                seq_lengths=LENGTHS,
                reverse=reverse,
            )
            ys.append(y)
        hand = jnp.concatenate(ys, -1)
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 6
    call: Any = nnx.jit(lambda tagger: tagger(X, LENGTHS))
    assert_close(call(tagger), jnp.moveaxis(hand, 0, 1), rtol=2e-5)


def decode_by_hand(params: fdc.LSTMParams, query: Any, logits: Any, carry: Any, memory: Any) -> Any:
    context, outputs, masks = jnp.zeros((3, 8)), [], None
    valid = jnp.arange(6)[None] < LENGTHS[:, None]
    options: Any = {"cell": fdc.lstm_cell, "dropout": MIXED}
    for t in range(WORDS.shape[1]):
        x = jnp.concatenate([WORDS[:, t], context], -1)
        if masks is None:
            masks = fdc.draw_masks(params, carry, x, KEY, **options)
        carry, h = fdc.dropout_cell(params, carry, x, KEY, step=t, masks=masks, **options)
        scores = (dense(query, h)[:, None] * memory).sum(-1)
        weights = jnp.where(valid, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
        weights = weights / weights.sum(-1, keepdims=True)
        context = (weights[..., None] * memory).sum(1)
        outputs.append(dense(logits, h + context))
    return jnp.stack(outputs, 1)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_an_attention_decoder_from_an_encoders_carry(page: Any, framework: str) -> None:
    """With both kinds of masks: those of `dropout_cell(step=t)` on the encoder's carry."""
    memory = jax.random.normal(jax.random.key(2), (3, 6, 8))
    carry = (memory[:, 0], memory[:, 1])
    if framework == "linen":
        decoder = page.Decoder(MIXED)
        variables = weights_of(decoder, carry, WORDS, memory, LENGTHS)
        run = jax.jit(lambda *args: decoder.apply(variables, *args, rng=KEY))
        params = variables["params"]
        cell = core_params({"params": params["cell"]}, fdc.linen.LSTMCell(8))
        query, logits = params["query"], params["logits"]
    else:
        decoder = page.NNXDecoder(MIXED, nnx.Rngs(0))
        step = nnx.jit(lambda decoder, *args: decoder(*args, rngs=KEY))
        run = functools.partial(step, decoder)
        cell, query, logits = nnx_params(decoder.cell.cell), decoder.query, decoder.logits
    decoded = run(carry, WORDS, memory, LENGTHS)
    assert_close(decoded, decode_by_hand(cell, query, logits, carry, memory), rtol=2e-5)


def test_sampling_keeps_the_contexts_masks(page: Any) -> None:
    """Context and words in one run, under the same masks, give the logits of each step."""
    context = jnp.array([[1, 2, 3, 4], [4, 3, 2, 1]])
    variables = weights_of(page.writer, context)
    words, logits = page.write(variables, context, KEY)
    both = jnp.concatenate([context, words], 1)
    masks_rng, words_rng = jax.random.split(KEY)
    _, whole = page.writer.apply(variables, both, rng=masks_rng)
    assert_close(logits, whole[:, 4:], rtol=2e-5)
    for index in range(3):
        rng = jax.random.fold_in(words_rng, index)
        drawn = jax.random.categorical(rng, whole[:, 3 + index])
        np.testing.assert_array_equal(drawn, words[:, index])
    _, others = page.writer.apply(variables, both, rng=jax.random.key(1))
    assert jnp.abs(others[:, 4:] - logits).max() > 0.01
