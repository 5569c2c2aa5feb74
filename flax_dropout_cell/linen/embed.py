"""`Embed`: linen's embedding, from which whole word types are dropped."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from .._embedding import check_embed, embedding_dropout
from .constant_fields import ConstantFields


class Embed(nn.Module):
    """`nn.Embed` with `flax_dropout_cell.embedding_dropout`: whole word types are dropped.

    In training a call reads the `dropout` stream once, for all of its ids; `init` and evaluation
    need none. To make windows of one sequence agree, give their calls one key as `rng`. The table
    has the name that it has in `nn.Embed`, so its weights load as they are.

    Args:
      num_embeddings: the number of word types.
      features: the size of an embedding.
      keep_prob: the probability that a type is kept, as in `embedding_dropout`.
      per_example: each row of the ids drops types of its own, instead of the same for all rows.
      deterministic: True is evaluation. What is given at the call wins.
      dtype: the dtype of the result; None is the table's. Only rows are cast, not the table.
      param_dtype: the dtype of the table.
      embedding_init: how the table is initialized; the default is that of `nn.Embed`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> embed = fdc.linen.Embed(num_embeddings=10_000, features=32, keep_prob=0.9)
      >>> ids = jnp.zeros((4, 20), int)
      >>> variables = embed.init(jax.random.key(0), ids)
      >>> embed.apply(variables, ids, rngs={"dropout": jax.random.key(1)}).shape
      (4, 20, 32)
    """

    num_embeddings: int
    features: int
    keep_prob: float | jax.Array
    per_example: bool = False
    deterministic: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    embedding_init: nn.initializers.Initializer = nn.Embed.embedding_init
    __fn_or_cls__ = ConstantFields()

    def __post_init__(self) -> None:
        check_embed(self.num_embeddings, self.features, self.keep_prob)
        super().__post_init__()

    def setup(self) -> None:
        shape = (self.num_embeddings, self.features)
        self.embedding = self.param("embedding", self.embedding_init, shape, self.param_dtype)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: bool | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Looks ids up, in training with dropout.

        Args:
          inputs: integers of any shape, `[batch, ...]` where `per_example`.
          deterministic: True is evaluation; None is as the module has it.
          rng: the key to draw from, instead of the `dropout` stream.

        Returns:
          `[*inputs.shape, features]`.

        Raises:
          ValueError: neither `rng` nor a `dropout` stream, and this is neither evaluation nor
            `init`.
        """
        if self.num_embeddings == 1:  # as nn.Embed has it: any id is the only type
            inputs = jnp.zeros_like(inputs)
        evaluate = self.deterministic if deterministic is None else deterministic
        rows = embedding_dropout(
            self.embedding,
            inputs,
            None if evaluate else self._call_rng(rng),
            keep_prob=self.keep_prob,
            per_example=self.per_example,
        )
        return rows if self.dtype is None else rows.astype(self.dtype)

    def attend(self, query: jax.Array) -> jax.Array:
        """The products of a query with all embeddings, for weight tying; nothing is dropped.

        Args:
          query: `[..., features]`.

        Returns:
          `[..., num_embeddings]`.
        """
        query, table = promote_dtype(query, self.embedding, dtype=self.dtype)
        return jnp.dot(query, table.T)

    def _call_rng(self, rng: jax.Array | None) -> jax.Array | None:
        if rng is not None:
            return rng
        if self.has_rng("dropout"):
            return self.make_rng("dropout")
        if self.is_initializing():
            return None
        raise ValueError(
            "Embed needs a 'dropout' stream in training: pass rngs={'dropout': key} to apply or "
            "rng=key at the call, or evaluate with deterministic=True."
        )
