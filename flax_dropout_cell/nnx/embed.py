"""`Embed`: NNX's embedding with dropout of whole word types."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from .._arguments import check_flag
from .._flax.compat import data_or_static
from .._flax.deterministic import is_evaluation
from .._training.embedding import check_embed, embedding_dropout
from ..noises.arguments import check_probability
from ..noises.dropout import Dropout
from .streams import check_rngs, dropout_key, fork_stream
from .switchable import Switchable


class Embed(Switchable, nnx.Embed):
    """`nnx.Embed` with dropout of whole word types, as `fdc.embedding_dropout` does it.

    In training a call draws from the module's own `dropout` stream once, for all of its ids.
    Evaluation, by `eval()`, `nnx.view` or `deterministic=True`, needs no stream. Windows of one
    sequence agree if their calls get the same key as `rngs`. The table is `embedding`, as in
    `nnx.Embed`, so checkpoints load unchanged; `attend` uses it without dropout.

    Args:
      num_embeddings: the number of word types.
      features: the size of an embedding.
      keep_prob: the probability that a type is kept, as in `embedding_dropout`.
      per_example: if True, each row of the ids drops types of its own.
      deterministic: if True, this is evaluation. The argument at the call takes precedence.
      rngs: the table is initialized from its `params` stream, and its `dropout` stream is forked
        for the masks.
      **options: other arguments of `nnx.Embed`: `dtype`, `param_dtype`, `embedding_init`...

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> embed = fdc.nnx.Embed(10_000, 32, keep_prob=0.9, rngs=nnx.Rngs(params=0, dropout=1))
      >>> embed(jnp.zeros((4, 20), int)).shape
      (4, 20, 32)
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        keep_prob: float | jax.Array,
        *,
        per_example: bool = False,
        deterministic: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        check_embed(num_embeddings, features, keep_prob)
        check_rngs(rngs)
        super().__init__(num_embeddings, features, rngs=rngs, **options)
        self.keep_prob = keep_prob
        self.per_example = per_example
        self.deterministic = check_flag("deterministic", deterministic)
        self.dropout_stream: nnx.RngStream | None = fork_stream(rngs)

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "keep_prob":
                check_probability(name, value)
                value = data_or_static(value)
            super().__setattr__(name, value)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: jax.Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Looks up ids, with dropout in training.

        Args:
          inputs: integers of any shape; `[batch, ...]` with `per_example`.
          deterministic: if True, this is evaluation. None uses the module's own setting.
          rngs: drawn from instead of the module's own stream: an `nnx.Rngs`, an `nnx.RngStream`
            or a key. With a key the call changes no state.

        Returns:
          `[*inputs.shape, features]`.

        Raises:
          ValueError: in training, if there is no stream and no key.
        """
        if self.num_embeddings == 1:  # as nnx.Embed has it: any id is the only type
            inputs = jnp.zeros_like(inputs)
        evaluate = is_evaluation(deterministic, self.deterministic)
        evaluate = evaluate or Dropout(keep_prob=self.keep_prob).is_identity
        rows = embedding_dropout(
            self.embedding[...],
            inputs,
            None if evaluate else dropout_key("Embed", rngs, self.dropout_stream),
            keep_prob=self.keep_prob,
            per_example=self.per_example,
        )
        (rows,) = self.promote_dtype((rows,), dtype=self.dtype, inexact=False)
        return rows
