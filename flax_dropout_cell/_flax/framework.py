"""The contract of an adapter: all that this library asks a framework about its cells.

`linen` and `nnx` each implement it once, in a `framework.py`. An adapter for another framework is
one folder like theirs: a `Framework`, and a layer that makes the initial carry and passes a key and
a pure cell to `run_layer`. If its cells are not like Flax's, it also overrides three methods that
are not abstract: `check_cell` (by default, a cell has `initialize_carry`), `num_feature_axes` (by
default, the cell's attribute) and `family` (by default, Flax's cells alone). Only wrappers use
`weights` and `run_on`.
"""

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol

import jax

from .._messages import short_repr
from .._spec.recurrent_dropout import PyTree, RecurrentDropout
from .._spec.state_noise import resolve_state_noise
from .._step.draw_masks import inside_names
from ..cells.family import Family
from ..cells.known import FAMILIES, family_of_module


class PureCell(Protocol):
    """A cell as a function of its weights, for a layer's scan.

    Attributes:
      params: the cell's weights; `dropout.params` is a prefix of them.
    """

    params: PyTree

    def __call__(
        self, params: PyTree, carry: PyTree, x: PyTree, **options: Any
    ) -> tuple[PyTree, PyTree]:
        """One step; raises if the cell draws or writes, as no pure function can."""
        ...


class Framework(abc.ABC):
    """A framework's cells.

    Attributes:
      name: the module that the cells come from.
      prefix: that module as users write it.
      ours: this library's module for it, as users write it.
      sizes: the arguments of a cell, as an example.
      weights_are: the place of weights in the framework, for messages.
      twins: this library's cells, by the stock cells that they replace.
    """

    name: ClassVar[str]
    prefix: ClassVar[str]
    ours: ClassVar[str]
    sizes: ClassVar[str]
    weights_are: ClassVar[str]
    twins: ClassVar[Mapping[type, type]]

    # An adapter implements these.

    @abc.abstractmethod
    def is_module(self, value: Any) -> bool:
        """Whether a value is a module of the framework."""

    @abc.abstractmethod
    def parts(self, cell: Any) -> Iterable[Any]:
        """A cell, and the modules that it holds."""

    @abc.abstractmethod
    def sizes_of(self, cell: Any) -> str:
        """The arguments that make a cell of the same size, as users write them."""

    @abc.abstractmethod
    def pure(self, cell: Any) -> PureCell:
        """A cell as a function of its weights, for a layer."""

    @abc.abstractmethod
    def weights(self, cell: Any) -> PyTree:
        """The weights of a cell that has them, for a wrapper; `dropout.params` is a prefix."""

    @abc.abstractmethod
    def run_on(
        self, cell: Any, params: PyTree, carry: PyTree, x: PyTree, **options: Any
    ) -> tuple[PyTree, PyTree]:
        """Runs a wrapper's cell on other weights; other variables that it writes stay written."""

    @abc.abstractmethod
    def traceable(self, cell: Any) -> Callable[..., tuple[PyTree, PyTree]]:
        """`run(params, carry, x, **options)`, to trace; the cell stays as it is.

        `params` may be None if only shapes are wanted.
        """

    @abc.abstractmethod
    def params_shapes(self, cell: Any, carry: PyTree, x: PyTree) -> PyTree:
        """The shapes of a cell's weights, also before it has any."""

    @abc.abstractmethod
    def carry_shapes(self, cell: Any, input_shape: Any) -> PyTree:
        """The shapes of a cell's initial carry."""

    # These are the same for all, unless a framework differs from Flax.

    def resolve_noise(
        self, dropout: RecurrentDropout, cell: Any, carry: PyTree
    ) -> RecurrentDropout:
        """Resolves one noise for the whole state; raises if the cell cannot take a noise."""
        self._check_sites(dropout, cell)
        return resolve_state_noise(dropout, carry, self.family(cell), in_module=True)

    def family(self, cell: Any) -> Family | None:
        """A cell's family, with the sites of its carry in the order of the framework's carry."""
        return family_of_module(cell)

    def num_feature_axes(self, cell: Any) -> int:
        """The number of feature axes of a cell's inputs, which come after batch and time."""
        return cell.num_feature_axes

    def check_weights(self, cell: Any, params: PyTree) -> PyTree:
        """The weights; raises if there are none for the noise at `params`."""
        if not jax.tree.leaves(params):
            got = f"dropout.params has noise, but {type(cell).__name__} has no weights for it"
            raise ValueError(f"{got}: they must be {self.weights_are}.")
        return params

    def check_cell(self, cell: Any) -> None:
        """Raises if `cell` is not an instance of a cell of this framework."""
        # By its methods, not its base class: a user's cell need not be an RNNCellBase.
        if self.is_module(cell) and callable(cell) and hasattr(cell, "initialize_carry"):
            return
        ours = getattr(cell, "__module__", "").startswith("flax_dropout_cell")
        if isinstance(cell, type):
            write = f"{self.ours if ours else self.prefix}.{cell.__name__}({self.sizes})"
            raise TypeError(f"the cell must be an instance, got a class: write {write}.")
        if ours and hasattr(cell, "__name__"):
            write = f"{self.ours}.{self._module_for(cell)}({self.sizes})"
            raise TypeError(f"{cell.__name__} is a function, for dropout_scan: write {write}.")
        raise TypeError(
            f"{short_repr(cell)} is not an RNNCell of {self.name}: give a cell such as "
            f"{self.prefix}.LSTMCell({self.sizes}), with initialize_carry and __call__."
        )

    def _check_sites(self, dropout: RecurrentDropout, cell: Any) -> None:
        """Raises if noise is inside a stock cell, which has no sites, and names one that has."""
        names = sorted(inside_names(dropout))
        module = type(cell).__module__
        # A cell under nn.map_variables may well have sites.
        if not names or not module.startswith(self.name) or module.endswith(".transforms"):
            return
        stock, twin = f"{self.prefix}.{type(cell).__name__}", self.twins.get(type(cell))
        if twin is None:
            cells = sorted({f"{self.ours}.{ours.__name__}" for ours in self.twins.values()})
            advice = f"cells with sites are {', '.join(cells)}."
        else:
            sizes = self.sizes_of(cell)
            advice = f"write {self.ours}.{twin.__name__}({sizes}) in place of {stock}({sizes})."
        sites = ", ".join(map(repr, names))
        raise TypeError(f"dropout.inside has noise at {sites}, but {stock} has no sites: {advice}")

    def _module_for(self, function: Any) -> str:
        """The name of the module for a cell function of this library, such as `lstm_cell`."""
        names = {name.lower(): name for family in FAMILIES for name in family.modules}
        return names.get(function.__name__.replace("_", ""), "LSTMCell")
