"""`Embed`: NNX's embedding, from which whole word types are dropped."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from .._embedding import check_embed, embedding_dropout
from ..noises.protocol import check_probability, is_array

_static = getattr(nnx, "static", lambda value: value)  # Flax 0.11 has none, and needs none


class Embed(nnx.Embed):
    """`nnx.Embed` with `flax_dropout_cell.embedding_dropout`: whole word types are dropped.

    In training a call draws from the module's own `dropout` stream once, for all of its ids;
    evaluation, by `eval()`, `nnx.view` or `deterministic=True`, needs none. To make windows of one
    sequence agree, give their calls one key as `rngs`. The table is `embedding`, as in
    `nnx.Embed`, so its weights load as they are; `attend` uses it with nothing dropped.

    Args:
      num_embeddings: the number of word types.
      features: the size of an embedding.
      keep_prob: the probability that a type is kept, as in `embedding_dropout`.
      per_example: each row of the ids drops types of its own, instead of the same for all rows.
      deterministic: True is evaluation. What is given at the call wins.
      rngs: the table is initialized from its `params` stream, and its `dropout` stream is forked
        for the masks.
      **options: what else `nnx.Embed` takes: `dtype`, `param_dtype`, `embedding_init`...

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
        super().__init__(num_embeddings, features, rngs=rngs, **options)
        self.keep_prob = keep_prob
        self.per_example = per_example
        self.deterministic = deterministic
        # No stream to fork is no error yet: evaluation needs none.
        has_stream = "dropout" in rngs or "default" in rngs
        self.rngs: nnx.RngStream | None
        self.rngs = rngs["dropout"].fork() if has_stream else nnx.data(None)

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            # A number is static and an array is data, also where one takes the other's place.
            if name == "keep_prob":
                check_probability(name, value)
                value = nnx.data(value) if is_array(value) else _static(value)
            super().__setattr__(name, value)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: jax.Array,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Looks ids up, in training with dropout.

        Args:
          inputs: integers of any shape, `[batch, ...]` where `per_example`.
          deterministic: True is evaluation; None is as the module has it.
          rngs: what to draw from instead of the module's own stream: an `nnx.Rngs`, an
            `nnx.RngStream` or a key. With a key the call changes no state.

        Returns:
          `[*inputs.shape, features]`.

        Raises:
          ValueError: there is nothing to draw from, and this is not evaluation.
        """
        if self.num_embeddings == 1:  # as nnx.Embed has it: any id is the only type
            inputs = jnp.zeros_like(inputs)
        evaluate = self.deterministic if deterministic is None else deterministic
        rows = embedding_dropout(
            self.embedding[...],
            inputs,
            None if evaluate else self._call_rng(rngs),
            keep_prob=self.keep_prob,
            per_example=self.per_example,
        )
        return rows.astype(self.dtype)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Switches between training and evaluation; `nnx.view` calls it.

        Args:
          deterministic: True is evaluation.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _call_rng(self, rngs: nnx.Rngs | nnx.RngStream | jax.Array | None) -> jax.Array:
        if rngs is None:
            rngs = self.rngs
        if isinstance(rngs, nnx.Rngs):
            return rngs["dropout"]()
        if isinstance(rngs, nnx.RngStream):
            return rngs()
        if rngs is None:
            raise ValueError(
                "Embed needs a 'dropout' stream in training: make it with "
                "rngs=nnx.Rngs(params=0, dropout=1), pass rngs= at the call, or evaluate with "
                "eval() or deterministic=True."
            )
        return rngs
