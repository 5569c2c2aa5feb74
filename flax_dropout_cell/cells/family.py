"""A cell's declaration: its sites, and which of them carry a value on.

A new site is a call of `disturb` in the cell and a `CellSite` of its family, in the order of the
calls; the layers and `describe` find it by themselves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class CellSite(NamedTuple):
    """A site that a cell has.

    Attributes:
      name: the name with which the cell calls `disturb`.
      carried: the value is a part of the next carry, and the cell gives its `previous`.
      leaky: the next value is this one times a gate, plus something new. Noise that enlarges kept
        units does so again at every step there, so the value explodes.
    """

    name: str
    carried: bool = False
    leaky: bool = False


class Family(NamedTuple):
    """One kind of cell, in the core and in Flax.

    Attributes:
      name: as a message calls it, such as "a GRU".
      cell: this library's cell of that kind; None if it has none, but knows Flax's.
      sites: its sites, in the order in which it calls them. Those that are carried are in the
        order of the carry's leaves.
      modules: the names of the classes of that kind, in Flax and in this library's `linen` and
        `nnx`.
    """

    name: str
    cell: Callable[..., Any] | None
    sites: tuple[CellSite, ...]
    modules: tuple[str, ...]

    @property
    def carried(self) -> tuple[CellSite, ...]:
        """The sites whose values are the next carry."""
        return tuple(site for site in self.sites if site.carried)

    def has(self, name: str) -> bool:
        """Whether the cell has a site of that name."""
        return any(site.name == name for site in self.sites)
