"""`Embed`: linen's embedding with dropout of whole word types."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from .._flax.compat import HashedFields
from .._flax.deterministic import is_evaluation
from .._training.embedding import check_embed, embedding_dropout
from ..noises.dropout import Dropout
from .streams import dropout_key


class Embed(nn.Module):
    """`nn.Embed` with dropout of whole word types, as `fdc.embedding_dropout` does it.

    In training a call reads the `dropout` stream once, for all of its ids; `init` and evaluation
    need no stream. Windows of one sequence agree if their calls get the same key as `rng`. The
    table has the same name as in `nn.Embed`, so checkpoints load unchanged.

    Args:
      num_embeddings: the number of word types.
      features: the size of an embedding.
      keep_prob: the probability that a type is kept, as in `embedding_dropout`.
      per_example: if True, each row of the ids drops types of its own.
      deterministic: if True, this is evaluation. The argument at the call takes precedence.
      dtype: the dtype of the result; the table's if None. Only the rows are cast, not the table.
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
    __fn_or_cls__ = HashedFields()

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
        """Looks up ids, with dropout in training.

        Args:
          inputs: integers of any shape; `[batch, ...]` with `per_example`.
          deterministic: if True, this is evaluation. None uses the module's own setting.
          rng: the key to draw from, instead of the `dropout` stream.

        Returns:
          `[*inputs.shape, features]`.

        Raises:
          ValueError: in training, if there is neither `rng` nor a `dropout` stream.
        """
        if self.num_embeddings == 1:  # as nn.Embed has it: any id is the only type
            inputs = jnp.zeros_like(inputs)
        # A keep_prob of 1 needs no stream, as a spec whose noises do nothing needs none.
        evaluate = is_evaluation(deterministic, self.deterministic)
        evaluate = evaluate or Dropout(keep_prob=self.keep_prob).is_identity
        rows = embedding_dropout(
            self.embedding,
            inputs,
            None if evaluate else dropout_key(self, rng, "Embed"),
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
