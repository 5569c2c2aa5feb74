"""Whole word types are dropped, at the cost of a lookup: the function, and both `Embed` layers."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from key_kinds import KINDS, keys_of

import flax_dropout_cell as fdc
from flax_dropout_cell._random.keys import EMBEDDING

TYPES, FEATURES = 40, 3
KEEP_PROB = 0.7


def table_of(types: int = TYPES, features: int = FEATURES) -> jax.Array:
    return 1 + jax.random.uniform(jax.random.key(1), (types, features))


def ids_of(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(2), shape, 0, TYPES)


@functools.partial(jax.jit, static_argnames=("types", "keep_prob", "per_example"))
def look_up_ones(
    ids: jax.Array,
    rng: jax.Array,
    types: int = TYPES,
    keep_prob: float = KEEP_PROB,
    per_example: bool = False,
) -> jax.Array:
    table = jnp.ones((types, 1))
    rows = fdc.embedding_dropout(table, ids, rng, keep_prob=keep_prob, per_example=per_example)
    return rows[..., 0] > 0


def kept(ids: jax.Array, rng: jax.Array, *args: Any, **options: Any) -> np.ndarray:
    """Which types a key keeps, read off a table of ones."""
    return np.asarray(look_up_ones(ids, rng, *args, **options))


# The function ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_prob", [0.5, 0.7, 1e-3, 1 - 2**-20])
def test_a_type_has_one_word_and_its_first_24_bits_decide(keep_prob: float) -> None:
    rng = jax.random.key(3)
    words = jax.random.bits(jax.random.fold_in(rng, EMBEDDING), (100_000,), jnp.uint32)
    wanted = np.asarray(words >> 8) >= 2**24 - round(float(np.float32(keep_prob)) * 2**24)
    got = kept(jnp.arange(100_000), rng, 100_000, keep_prob=keep_prob)
    np.testing.assert_array_equal(got, wanted)


def test_whole_rows_are_dropped_and_the_others_scaled() -> None:
    table, ids, rng = table_of(), ids_of(6, 9), jax.random.key(4)
    mask = kept(jnp.arange(TYPES), rng)
    assert 0 < mask.sum() < TYPES
    dropped = np.asarray(table) * mask[:, None] / np.float32(KEEP_PROB)
    got = fdc.embedding_dropout(table, ids, rng, keep_prob=KEEP_PROB)
    np.testing.assert_allclose(got, dropped[np.asarray(ids)], rtol=3e-7)


@pytest.mark.parametrize("per_example", [False, True])
def test_windows_and_single_steps_agree_with_the_whole(per_example: bool) -> None:
    ids, rng = ids_of(4, 12), jax.random.key(4)
    whole = kept(ids, rng, per_example=per_example)
    for width in (5, 1):
        for start in range(0, 12, width):
            window = ids[:, start : start + width]
            got = kept(window, rng, per_example=per_example)
            np.testing.assert_array_equal(got, whole[:, start : start + width])
    np.testing.assert_array_equal(kept(ids[:, 3], rng, per_example=per_example), whole[:, 3])


def test_all_rows_drop_the_same_types_unless_per_example() -> None:
    ids, rng = jnp.broadcast_to(jnp.arange(TYPES), (64, TYPES)), jax.random.key(4)
    shared = kept(ids, rng)
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:1], shared.shape))
    own = kept(ids, rng, per_example=True)
    assert all(0.1 < (own[0] != row).mean() < 0.8 for row in own[1:])
    # A row's types do not depend on how many rows there are, nor on how often a type occurs.
    np.testing.assert_array_equal(kept(ids[:2], rng, per_example=True), own[:2])
    twice = kept(jnp.concatenate([ids, ids[:, ::-1]], axis=1), rng, per_example=True)
    np.testing.assert_array_equal(twice, np.concatenate([own, own[:, ::-1]], axis=1))


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rates_with_every_kind_of_key(kind: str, per_example: bool) -> None:
    ids = jnp.arange(16_000).reshape(4, 4_000)
    with keys_of(kind) as (typed, raw):
        mask = kept(ids, typed, 16_000, per_example=per_example)
        # Not compiled before: a compiled program would take this key for its own PRNG's.
        from_raw = fdc.embedding_dropout(
            jnp.ones((16_000, 1)), ids, raw, keep_prob=KEEP_PROB, per_example=per_example
        )
        np.testing.assert_array_equal(mask, from_raw[..., 0] > 0)
        other = kept(ids, jax.random.split(typed)[0], 16_000, per_example=per_example)
    sigma = math.sqrt(KEEP_PROB * (1 - KEEP_PROB) / mask.size)
    assert abs(mask.mean() - KEEP_PROB) < 5 * sigma
    agree = KEEP_PROB**2 + (1 - KEEP_PROB) ** 2
    assert abs((mask == other).mean() - agree) < 5 * math.sqrt(agree * (1 - agree) / mask.size)
    pairs = (mask[:, 1:] == mask[:, :-1]).mean()
    assert abs(pairs - agree) < 5 * math.sqrt(agree * (1 - agree) / mask.size)


@pytest.mark.parametrize("kind", KINDS)
def test_under_vmap_each_key_has_its_own_masks(kind: str) -> None:
    """JAX gives rbg keys under vmap one stream; here each key draws as it does alone."""
    with keys_of(kind) as (typed, _):
        keys, ids = jax.random.split(typed, 5), jnp.arange(TYPES)

        def rows(rng: jax.Array) -> jax.Array:
            return fdc.embedding_dropout(table_of(), ids, rng, keep_prob=KEEP_PROB)

        mapped = jax.jit(jax.vmap(rows))(keys)
        alone = jnp.stack([jax.jit(rows)(key) for key in keys])
        np.testing.assert_array_equal(mapped == 0, alone == 0)
        np.testing.assert_allclose(mapped, alone, rtol=3e-7)
        assert len({np.asarray(row).tobytes() for row in mapped}) == 5


def test_evaluation_and_the_identity_are_the_plain_lookup() -> None:
    table, ids = table_of(), ids_of(4, 5)
    plain = jax.make_jaxpr(lambda table, ids: jnp.take(table, ids, axis=0))(table, ids)
    for rng, keep_prob in ((None, 0.5), (jax.random.key(4), 1), (jax.random.key(4), 1.0)):
        look_up = functools.partial(fdc.embedding_dropout, rng=rng, keep_prob=keep_prob)
        assert str(jax.make_jaxpr(look_up)(table, ids)) == str(plain)


def test_keep_prob_0_gives_zeros() -> None:
    for keep_prob in (0, jnp.float32(0)):
        rows = fdc.embedding_dropout(
            table_of(), ids_of(4, 5), jax.random.key(4), keep_prob=keep_prob
        )
        np.testing.assert_array_equal(rows, np.zeros((4, 5, FEATURES)))


def test_an_array_drops_what_its_number_drops_and_does_not_retrace() -> None:
    traces = []

    @jax.jit
    def run(keep_prob: jax.Array) -> jax.Array:
        traces.append(1)
        return fdc.embedding_dropout(table_of(), ids, rng, keep_prob=keep_prob)

    ids, rng = ids_of(4, 5), jax.random.key(4)
    for keep_prob in (0.3, 0.5, 0.9):
        number = fdc.embedding_dropout(table_of(), ids, rng, keep_prob=keep_prob)
        np.testing.assert_array_equal(run(jnp.float32(keep_prob)) > 0, number > 0)
        np.testing.assert_allclose(run(jnp.float32(keep_prob)), number, rtol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.uint16, jnp.uint32])
def test_ids_of_any_integer_type(dtype: Any) -> None:
    ids, rng = ids_of(4, 5), jax.random.key(4)
    np.testing.assert_array_equal(kept(ids.astype(dtype), rng), kept(ids, rng))
    if jnp.issubdtype(dtype, jnp.signedinteger):
        negative = (ids - TYPES).astype(dtype)
        np.testing.assert_array_equal(kept(negative, rng), kept(ids, rng))


def test_a_narrow_negative_id_counts_from_the_end_of_a_long_table() -> None:
    table, rng = jnp.arange(1.0, 201.0)[:, None], jax.random.key(4)
    ids = jnp.arange(72, 200)
    negative = (ids - 200).astype(jnp.int8)
    for keep_prob in (1.0, 0.5):
        got = fdc.embedding_dropout(table, negative, rng, keep_prob=keep_prob)
        wanted = fdc.embedding_dropout(table, ids, rng, keep_prob=keep_prob)
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(
        got[got > 0], 2.0 * (ids[:, None].astype(jnp.float32) + 1.0)[got > 0]
    )


def test_what_a_dropped_type_holds_does_not_come_through() -> None:
    rng, ids = jax.random.key(4), jnp.arange(TYPES)
    mask = kept(ids, rng)
    table = jnp.where(mask[:, None], table_of(), jnp.nan)

    def loss(table: jax.Array, keep_prob: jax.Array) -> jax.Array:
        return fdc.embedding_dropout(table, ids, rng, keep_prob=keep_prob).sum()

    value, (by_table, by_prob) = jax.value_and_grad(loss, argnums=(0, 1))(table, jnp.float32(0.7))
    assert np.isfinite(value) and np.isfinite(by_prob)
    np.testing.assert_allclose(
        by_table, np.broadcast_to(mask[:, None], table.shape) / np.float32(0.7), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_dtype_is_the_tables(dtype: Any) -> None:
    table = jnp.ones((TYPES, FEATURES), dtype)
    rows = fdc.embedding_dropout(table, ids_of(4), jax.random.key(4), keep_prob=0.8)
    assert rows.dtype == dtype


def test_tables_of_other_ranks() -> None:
    rng, ids = jax.random.key(4), ids_of(6)
    mask = kept(ids, rng)
    for shape in ((TYPES,), (TYPES, 2, 3)):
        rows = fdc.embedding_dropout(jnp.ones(shape), ids, rng, keep_prob=0.7)
        wanted = np.broadcast_to(mask.reshape(-1, *[1] * (len(shape) - 1)), rows.shape)
        np.testing.assert_array_equal(rows > 0, wanted)


ERRORS = {
    "a table of integers": (
        lambda: fdc.embedding_dropout(jnp.ones((4, 2), int), ids_of(3), None, keep_prob=0.5),
        TypeError,
        r"table must be floating-point, \[num_embeddings, \*features\], got int32\[4, 2\]",
    ),
    "ids that are no integers": (
        lambda: fdc.embedding_dropout(table_of(), jnp.ones(3), None, keep_prob=0.5),
        TypeError,
        r"ids must be integers, got float32\[3\]",
    ),
    "keep_prob above 1": (
        lambda: fdc.embedding_dropout(table_of(), ids_of(3), None, keep_prob=1.5),
        ValueError,
        "keep_prob must be between 0 and 1, got 1.5",
    ),
    "keep_prob of several": (
        lambda: fdc.embedding_dropout(table_of(), ids_of(3), None, keep_prob=jnp.ones(3)),
        ValueError,
        r"keep_prob must be one number, or an array without dims; got shape \(3,\)",
    ),
    "no key": (
        lambda: fdc.embedding_dropout(table_of(), ids_of(3), 0, keep_prob=0.5),  # type: ignore
        TypeError,
        "rng must be one key",
    ),
    "no rows": (
        lambda: fdc.embedding_dropout(
            table_of(), jnp.int32(3), None, keep_prob=0.5, per_example=True
        ),
        ValueError,
        "got a scalar",
    ),
    "no types": (lambda: fdc.linen.Embed(0, 3, 0.5), ValueError, "num_embeddings must be an int"),
    "linen, keep_prob": (lambda: fdc.linen.Embed(4, 3, 2), ValueError, "keep_prob must be between"),
    "nnx, keep_prob": (
        lambda: fdc.nnx.Embed(4, 3, 2, rngs=nnx.Rngs(0)),
        ValueError,
        "keep_prob must be between",
    ),
    "linen, no stream": (
        lambda: fdc.linen.Embed(TYPES, 3, 0.5).apply(
            {"params": {"embedding": table_of()}}, ids_of(3)
        ),
        ValueError,
        "Embed needs a 'dropout' stream in training",
    ),
    "nnx, no stream": (
        lambda: fdc.nnx.Embed(TYPES, 3, 0.5, rngs=nnx.Rngs(params=0))(ids_of(3)),
        ValueError,
        "Embed needs a 'dropout' stream in training",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_came_and_what_to_write(name: str) -> None:
    run, error, message = ERRORS[name]
    with pytest.raises(error, match=message) as raised:
        run()
    assert len(str(raised.value).splitlines()) <= 5


# Cost --------------------------------------------------------------------------------------------


def compile_lookup(look_up: Callable[..., jax.Array], direction: str, ids: int = 200) -> Any:
    def loss(table: jax.Array, *args: Any) -> jax.Array:
        return (look_up(table, *args) ** 2).sum()

    table = jax.ShapeDtypeStruct((50_000, 512), jnp.float32)
    run = look_up if direction == "forward" else jax.grad(loss)
    return (
        jax.jit(run)
        .lower(table, jax.ShapeDtypeStruct((ids,), jnp.int32), jax.random.key(0))
        .compile()
    )


def cost_of(compiled: Any) -> tuple[float, float]:
    return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("direction", ["forward", "gradient"])
@pytest.mark.parametrize("keep_prob", [0.7, "array"])
@pytest.mark.parametrize("per_example", [False, True])
def test_the_cost_grows_with_the_ids_and_not_with_the_table(
    direction: str, keep_prob: Any, per_example: bool
) -> None:
    """50,000 types, 200 ids: beyond the plain lookup, a word per id and a few passes over rows."""

    def plain(table: jax.Array, ids: jax.Array, rng: jax.Array) -> jax.Array:
        del rng
        return jnp.take(table, ids, axis=0)

    def dropped(table: jax.Array, ids: jax.Array, rng: jax.Array) -> jax.Array:
        prob = jax.random.uniform(rng) if keep_prob == "array" else keep_prob
        return fdc.embedding_dropout(table, ids, rng, keep_prob=prob, per_example=per_example)

    memory, flops = cost_of(compile_lookup(plain, direction))
    more_memory, more_flops = cost_of(compile_lookup(dropped, direction))
    rows, words = 200 * 512, 200
    assert more_memory - memory <= 2 * 4 * rows + 4096
    # A block of threefry is 20 rounds of six operations and ten additions of keys; two per word.
    assert more_flops - flops <= 6 * rows + 2 * 200 * words + 4096
    assert 50_000 * 512 > 20 * (6 * rows + 2 * 200 * words)  # so neither bound lets a table pass


# The layers --------------------------------------------------------------------------------------


def linen_embed(**options: Any) -> fdc.linen.Embed:
    return fdc.linen.Embed(TYPES, FEATURES, KEEP_PROB, **options)


def variables_of(table: jax.Array) -> Any:
    return {"params": {"embedding": table}}


def nnx_embed(table: jax.Array | None = None, **options: Any) -> fdc.nnx.Embed:
    options = {"rngs": nnx.Rngs(params=0, dropout=1)} | options
    embed = fdc.nnx.Embed(TYPES, FEATURES, KEEP_PROB, **options)
    if table is not None:
        embed.embedding[...] = table
    return embed


@pytest.mark.parametrize("per_example", [False, True])
def test_both_layers_are_the_function(per_example: bool) -> None:
    table, ids, rng = table_of(), ids_of(4, 5), jax.random.key(4)
    wanted = fdc.embedding_dropout(table, ids, rng, keep_prob=KEEP_PROB, per_example=per_example)
    in_linen = linen_embed(per_example=per_example).apply(variables_of(table), ids, rng=rng)
    np.testing.assert_array_equal(in_linen, wanted)
    in_nnx = nnx_embed(table, per_example=per_example)(ids, rngs=rng)
    np.testing.assert_array_equal(in_nnx, wanted)


def test_linen_starts_as_nn_embed_and_takes_its_weights() -> None:
    ids, stock = ids_of(4, 5), nn.Embed(TYPES, FEATURES)
    variables = stock.init(jax.random.key(0), ids)
    own = linen_embed().init(jax.random.key(0), ids)
    jax.tree.map(np.testing.assert_array_equal, own, variables)
    assert jax.tree.structure(own) == jax.tree.structure(variables)
    got = linen_embed(deterministic=True).apply(variables, ids)
    np.testing.assert_array_equal(got, stock.apply(variables, ids))
    query = jnp.ones((2, FEATURES))
    np.testing.assert_array_equal(
        linen_embed().apply(variables, query, method="attend"),
        stock.apply(variables, query, method="attend"),
    )


def test_linen_names_in_a_model_are_those_of_nn_embed() -> None:
    class Model(nn.Module):
        embed: Callable[..., nn.Module]

        @nn.compact
        def __call__(self, ids: jax.Array) -> jax.Array:
            embed: Any = self.embed(name="words")
            return embed.attend(embed(ids))

    stock = Model(lambda name: nn.Embed(TYPES, FEATURES, name=name))
    own = Model(lambda name: linen_embed(name=name, deterministic=True))
    variables = stock.init(jax.random.key(0), ids_of(3))
    np.testing.assert_array_equal(
        own.apply(variables, ids_of(3)), stock.apply(variables, ids_of(3))
    )


def test_linen_reads_the_dropout_stream_in_training_alone() -> None:
    table, ids = table_of(), ids_of(4, 5)
    apply = linen_embed().apply
    first, again, other = (
        apply(variables_of(table), ids, rngs={"dropout": jax.random.key(seed)})
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
    evaluated = apply(variables_of(table), ids, deterministic=True)
    np.testing.assert_array_equal(evaluated, table[ids])
    at_call = linen_embed(deterministic=True).apply(
        variables_of(table), ids, deterministic=False, rng=jax.random.key(3)
    )
    assert (np.asarray(at_call) == 0).any()


def test_nnx_starts_as_nnx_embed_and_takes_its_weights() -> None:
    ids, stock = ids_of(4, 5), nnx.Embed(TYPES, FEATURES, rngs=nnx.Rngs(params=7))
    same = nnx_embed(rngs=nnx.Rngs(params=7, dropout=1))
    np.testing.assert_array_equal(same.embedding[...], stock.embedding[...])
    own = nnx_embed()
    nnx.update(own, nnx.state(stock, nnx.Param))
    own.eval()
    np.testing.assert_array_equal(own(ids), stock(ids))
    query = jnp.ones((2, FEATURES))
    np.testing.assert_array_equal(own.attend(query), stock.attend(query))
    assert isinstance(own, nnx.Embed)


def test_nnx_draws_from_its_own_stream_in_training_alone() -> None:
    ids, table = ids_of(4, 5), table_of()
    embed, twin = nnx_embed(table), nnx_embed(table)
    first, second = embed(ids), embed(ids)
    assert (np.asarray(first) != np.asarray(second)).any()
    np.testing.assert_array_equal(twin(ids), first)
    np.testing.assert_array_equal(embed(ids, deterministic=True), table[ids])
    np.testing.assert_array_equal(
        embed(ids, rngs=nnx.Rngs(dropout=3)), embed(ids, rngs=nnx.Rngs(dropout=3)["dropout"])
    )
    embed.eval()
    np.testing.assert_array_equal(embed(ids), table[ids])
    embed.train()
    # Neither evaluation nor a call with its own key has drawn from the stream.
    np.testing.assert_array_equal(twin(ids), second)
    np.testing.assert_array_equal(twin(ids), embed(ids))


def test_nnx_with_a_key_at_the_call_may_be_closed_over() -> None:
    embed, ids = nnx_embed(table_of()), ids_of(4, 5)
    keys = jax.random.split(jax.random.key(0), 3)
    mapped = jax.jit(jax.vmap(lambda rng: embed(ids, rngs=rng)))(keys)
    alone = jnp.stack([embed(ids, rngs=key) for key in keys])
    np.testing.assert_allclose(mapped, alone, rtol=3e-7)
    assert len({np.asarray(rows).tobytes() for rows in mapped}) == 3


def test_nnx_keep_prob_may_be_an_array_or_become_one() -> None:
    ids, rng, traces = ids_of(4, 5), jax.random.key(0), []

    @nnx.jit
    def run(embed: fdc.nnx.Embed, ids: jax.Array) -> jax.Array:
        traces.append(1)
        return embed(ids, rngs=rng)

    embed = fdc.nnx.Embed(TYPES, FEATURES, jnp.float32(KEEP_PROB), rngs=nnx.Rngs(0))
    for keep_prob, traced in ((jnp.float32(0.7), 1), (jnp.float32(0.4), 1), (0.5, 2), (0.9, 3)):
        embed.keep_prob = keep_prob
        wanted = fdc.embedding_dropout(embed.embedding[...], ids, rng, keep_prob=keep_prob)
        np.testing.assert_allclose(run(embed, ids), wanted, rtol=1e-6)
        assert len(traces) == traced
    embed.keep_prob = jnp.float32(0.4)
    np.testing.assert_array_equal(run(embed, ids)[..., 0] != 0, kept(ids, rng, keep_prob=0.4))
    with pytest.raises(ValueError, match="keep_prob must be between"):
        embed.keep_prob = 2


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_only_rows_are_cast_and_one_type_is_any_id(framework: str) -> None:
    ids, rng = ids_of(4, 5), jax.random.key(4)
    table = table_of()
    one: Any
    if framework == "linen":
        rows = linen_embed(dtype=jnp.bfloat16).apply(variables_of(table), ids, rng=rng)
        one = fdc.linen.Embed(1, FEATURES, 0.5, deterministic=True).apply(
            variables_of(table[:1]), ids
        )
        text = str(
            jax.make_jaxpr(
                lambda table: linen_embed(dtype=jnp.bfloat16).apply(
                    variables_of(table), ids, rng=rng
                )
            )(table)
        )
    else:
        embed = nnx_embed(table, dtype=jnp.bfloat16)
        rows, text = embed(ids, rngs=rng), str(jax.make_jaxpr(lambda: embed(ids, rngs=rng))())
        single = fdc.nnx.Embed(1, FEATURES, 0.5, deterministic=True, rngs=nnx.Rngs(0))
        single.embedding[...] = table[:1]
        one = single(ids)
    wanted = fdc.embedding_dropout(table, ids, rng, keep_prob=KEEP_PROB).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rows, wanted)
    assert f"bf16[{TYPES}," not in text
    np.testing.assert_array_equal(one, np.broadcast_to(table[0], (4, 5, FEATURES)))


@pytest.mark.parametrize("wrong", [5, -6])
def test_the_first_ids_beyond_the_table(wrong: int) -> None:
    table = jnp.ones((5, 2))
    fdc.embedding_dropout(table, np.array([-5, 4]), None, keep_prob=0.5)
    with pytest.raises(ValueError, match=f"ids must be from -5 to 4, got {wrong}"):
        fdc.embedding_dropout(table, np.array([0, wrong]), None, keep_prob=0.5)
