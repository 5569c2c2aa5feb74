"""Sites inside a cell: the function that a cell calls wherever noise may be applied."""

from typing import Any, Protocol

PyTree = Any


class Disturb(Protocol):
    """A cell's `disturb` argument: gives the value at a site, with noise if the site has any."""

    def __call__(self, site: str, value: PyTree, previous: PyTree = None) -> PyTree: ...


def undisturbed(site: str, value: PyTree, previous: PyTree = None) -> PyTree:
    """Returns the value unchanged: the default of a cell's `disturb` argument.

    A cell calls `disturb` wherever noise may be applied, in evaluation too.

    Args:
      site: the site's name; each name is called once in a step.
      value: the value at the site.
      previous: the value at the step before; a noise such as `Zoneout` needs it.

    Returns:
      `value`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> def cell(params, h, x, *, disturb=fdc.undisturbed):
      ...     h = h + disturb("candidate", jnp.tanh(x @ params))
      ...     return h, h
      >>> spec = fdc.RecurrentDropout(inside={"candidate": fdc.Dropout(keep_prob=0.75)})
      >>> h, y = fdc.dropout_cell(
      ...     jnp.ones((3, 8)), jnp.zeros((4, 8)), jnp.ones((4, 3)), jax.random.key(0), step=0,
      ...     cell=cell, dropout=spec,
      ... )
      >>> y.shape
      (4, 8)
    """
    del site, previous
    return value


def has_noise(disturb: Disturb, site: str) -> bool:
    """Whether a site has noise; a cell asks before doing work that only noise needs."""
    if disturb is undisturbed:
        return False
    return getattr(disturb, "has", lambda site: True)(site)
