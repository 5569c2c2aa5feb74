"""The `dropout` stream of linen modules."""

import flax.linen as nn
import jax

from .._flax.compat import give_own_stream, path_with_same_key

_LIFTED = " nn.scan and nn.vmap pass on only the streams that split_rngs names."


def dropout_key(
    module: nn.Module, rng: jax.Array | None, name: str, *, at_call: bool = True
) -> jax.Array | None:
    """The key to draw from: `rng`, or the next one of the module's stream; None in `init`.

    Args:
      module: the module whose stream it is.
      rng: the key that the call was given.
      name: the name of the module that draws, for the error.
      at_call: whether its call takes `rng`, as a wrapper's call in a host does not.

    Raises:
      ValueError: if there is neither, and this is not `init`, or if Flax gives another module the
        same key.
    """
    if rng is not None:
        return rng
    if module.has_rng("dropout"):
        if not give_own_stream(module):
            raise ValueError(
                f"in nn.jit or nn.fold_rngs, this {name} would have the masks of other modules, "
                f"because the module that holds it was made outside. Make it inside the module "
                f"that is transformed, or use nn.remat, or jax.jit around the model."
            )
        key = module.make_rng("dropout")
        if (other := path_with_same_key(module)) is not None:
            path = "/".join(module.path)
            raise ValueError(
                f"the {name} at {path} would have the masks of the one at {other}, because Flax "
                f"joins the names on a path without a separator. Rename one of them, or call "
                f"flax.config.update('flax_fix_rng_separator', True), which changes all masks."
            )
        return key
    if module.is_initializing():  # its outputs are thrown away
        return None
    raise ValueError(
        f"{name} needs a 'dropout' stream in training: pass rngs={{'dropout': key}} to apply"
        f"{' or rng=key at the call' if at_call else ''}, or evaluate with deterministic=True"
        f"{', at the call or' if at_call else ''} in {name}(.., deterministic=True)."
        + (_LIFTED if at_call else " In nn.scan, call initialize_carry before the scan.")
        # Flax's own modules fall back to it.
        + (" Masks are never drawn from the 'params' stream." if module.has_rng("params") else "")
    )
