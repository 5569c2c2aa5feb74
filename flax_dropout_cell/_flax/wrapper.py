"""Shared by linen's and NNX's wrappers: the start of a sequence, and its steps."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import export

from .._inspect.describe import Description, describe
from .._messages import with_article
from .._random.keys import cell_rng
from .._spec.prefixes import shape_of
from .._spec.recurrent_dropout import (
    PyTree,
    RecurrentDropout,
    SiteValues,
    active_noises,
    draws_once,
)
from .._step.call_cell import trace_cell, warn_of_unused_sites
from .._step.draw_masks import inside_names, site_values
from .carry import DropoutCarry, check_carry, run_wrapped_step, start_sequence
from .deterministic import is_evaluation, needs_key
from .framework import Framework


class CellWrapper:
    """The part of a wrapper that does not depend on the framework.

    A subclass has `cell` and `deterministic`, `_spec_for` and `_sequence_rng`.
    """

    cell: Any
    deterministic: bool
    _framework: ClassVar[Framework]

    def _spec_for(self, cell_carry: PyTree) -> RecurrentDropout:
        """The noise at each site, resolved for the cell's carry."""
        raise NotImplementedError

    def _sequence_rng(
        self, cell_carry: PyTree, rng: jax.Array | None, deterministic: bool | None = None
    ) -> jax.Array | None:
        """The key of a new sequence; None if it runs without dropout."""
        raise NotImplementedError

    def _params_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        shapes = self._framework.params_shapes(self.cell, cell_carry, x)
        return self._framework.check_weights(self.cell, shapes)

    def _output_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        run = self._framework.traceable(self.cell)
        return trace_cell(run, None, cell_carry, x, frozenset())[0]

    def _step(
        self,
        carry: DropoutCarry,
        inputs: PyTree,
        deterministic: bool | None,
        *,
        initializing: bool = False,
    ) -> tuple[DropoutCarry, PyTree]:
        """One step. While `initializing`, there are no weights yet, and the cell runs once."""
        check_carry(carry)
        evaluate = is_evaluation(deterministic, self.deterministic)
        dropout = self._spec_for(carry.cell_carry)
        params = None
        if active_noises(dropout.params) and not initializing:
            weights = self._framework.weights(self.cell)
            params = self._framework.check_weights(self.cell, weights)
            if carry.masks is not None and carry.masks.params is not None:
                params = _restrict(params, carry.masks.params)

        wrapped, is_wrapper = self.cell, isinstance(self.cell, CellWrapper)

        def cell(params: PyTree, carry: PyTree, x: PyTree, **options: Any) -> tuple[PyTree, PyTree]:
            if is_wrapper:
                options["deterministic"] = deterministic
            # Weights that are not disturbed stay where the framework has them.
            if params is None:
                return wrapped(carry, x, **options)
            return self._framework.run_on(wrapped, params, carry, x, **options)

        return run_wrapped_step(
            carry,
            inputs,
            cell=cell,
            params=params,
            dropout=dropout,
            deterministic=evaluate or (initializing and carry.masks is None),
            values=lambda x: self._values(dropout, carry.cell_carry, jax.tree.map(shape_of, x)),
        )

    def describe(self, inputs: Any) -> Description:
        """Describes the noise of the wrapper, as a table; needs no weights and no keys.

        Args:
          inputs: the input of one step, `[*batch, *features]`, such as `x[:, 0]`, or its
            `jax.ShapeDtypeStruct`.

        Returns:
          A `Description`, as `fdc.describe` gives it for the wrapped cell.
        """
        x = jax.tree.map(shape_of, inputs)
        shapes = jax.tree.map(lambda leaf: leaf.shape, x)
        carry = self._framework.carry_shapes(self.cell, shapes)
        params = self._framework.params_shapes(self.cell, carry, x)
        run = self._framework.traceable(self.cell)
        shown = describe(params, carry, x, cell=run, dropout=self._spec_for(carry))
        return dataclasses.replace(shown, evaluates=is_evaluation(None, self.deterministic))

    @property
    def num_feature_axes(self) -> int:
        """The number of feature axes of the wrapped cell's inputs."""
        return self._framework.num_feature_axes(self.cell)

    def _draws(self, cell_carry: PyTree, deterministic: bool | None) -> bool:
        """Whether a sequence needs a key."""
        return needs_key(self._spec_for(cell_carry), deterministic, self.deterministic)

    def _start(self, rng: jax.Array | None, cell_carry: PyTree, inputs: Any) -> DropoutCarry:
        """The carry of a new sequence; without a key, of one that runs without dropout.

        Args:
          rng: the sequence's key.
          cell_carry: the cell's own initial carry.
          inputs: the shape of a step's input, as hosts give it, or its `jax.ShapeDtypeStruct`.
        """
        if rng is None:
            return DropoutCarry(cell_carry, None, None)
        dropout = self._spec_for(cell_carry)
        values = self._values(dropout, cell_carry, inputs)
        if not draws_once(dropout.inside):  # otherwise `_values` has traced the cell
            self._check_sites(inside_names(dropout), cell_carry, inputs)
        return start_sequence(cell_carry, rng, dropout, values)

    def _check_sites(self, names: frozenset[str], cell_carry: PyTree, inputs: Any) -> None:
        """Warns if the cell does not use a value that it has disturbed."""
        state, run = jax.tree.map(shape_of, cell_carry), self._framework.traceable(self.cell)
        for x in _likely_inputs(inputs, cell_carry) if names else ():
            try:
                return warn_of_unused_sites(run, None, state, x, names)
            except (TypeError, ValueError):
                continue  # a cell of tokens does not take floats

    def _redraw(
        self, carry: PyTree, inputs: PyTree, rng: jax.Array | None, deterministic: bool | None
    ) -> DropoutCarry:
        """New masks for the same state, in this wrapper and in those that it holds."""
        cell_carry = carry.cell_carry if isinstance(carry, DropoutCarry) else carry
        if isinstance(self.cell, CellWrapper):
            inner = None if rng is None else cell_rng(rng)
            cell_carry = self.cell._redraw(cell_carry, inputs, inner, deterministic)
        key = self._sequence_rng(cell_carry, rng, deterministic)
        return self._start(key, cell_carry, inputs)

    def _values(self, dropout: RecurrentDropout, cell_carry: PyTree, inputs: Any) -> SiteValues:
        """The shapes and dtypes at each site, as far as masks are drawn there once."""
        return for_likely_inputs(
            inputs, cell_carry, lambda x: self._values_for(x, dropout, cell_carry)
        )

    def _values_for(self, x: PyTree, dropout: RecurrentDropout, cell_carry: PyTree) -> SiteValues:
        """`_values` for an input whose dtypes are known."""
        state = jax.tree.map(shape_of, cell_carry)
        # The framework's cell has its weights, so the trace is given none.
        run = self._framework.traceable(self.cell)
        values = site_values(None, state, x, run, dropout)
        if not draws_once(dropout.params):
            return values
        return values._replace(params=self._params_shapes(cell_carry, x))

    def _resolve_noise(self, dropout: RecurrentDropout, cell_carry: PyTree) -> RecurrentDropout:
        """Resolves the noise at `state` for the carry of the cell."""
        if isinstance(self.cell, CellWrapper):
            if isinstance(cell_carry, DropoutCarry):
                cell_carry = cell_carry.cell_carry
            placed = self.cell._resolve_noise(dropout, cell_carry)
            if placed.state is None:
                return placed
            return dataclasses.replace(placed, state=DropoutCarry(placed.state, None, None))
        return self._framework.resolve_noise(dropout, self.cell, cell_carry)


def check_unwrapped(framework: Framework, cell: Any) -> None:
    """Raises if a layer's cell is not a cell, or holds a wrapper with dropout of its own."""
    framework.check_cell(cell)
    for part in framework.parts(cell):
        if isinstance(part, CellWrapper):
            name = type(part).__name__
            holder = "" if part is cell else f"{with_article(type(cell).__name__)} that holds "
            raise TypeError(
                f"RNN takes a cell without a wrapper, got {holder}{with_article(name)}. Write "
                f"RNN(cell, dropout), or put the {name} into Flax's own RNN."
            )


def _restrict(tree: PyTree, masks: PyTree) -> PyTree:
    """The part of a tree of weights that has masks."""
    if not isinstance(tree, dict) or not isinstance(masks, dict):
        return tree
    return {name: _restrict(tree[name], mask) for name, mask in masks.items() if name in tree}


def for_likely_inputs(inputs: Any, cell_carry: PyTree, use: Callable[[PyTree], Any]) -> Any:
    """`use(x)` for the likeliest inputs of a step with which it does not fail.

    Before the loop, hosts know the shapes of the inputs but not their dtypes.
    """
    errors = []
    for x in _likely_inputs(inputs, cell_carry):
        try:
            return use(x)
        except (TypeError, ValueError) as error:
            errors.append(error)  # a cell of tokens does not take floats
    raise errors[0]


def _likely_inputs(inputs: Any, cell_carry: PyTree) -> Iterable[PyTree]:
    """Likely inputs of a step, the likeliest first.

    Their dtype is most often the carry's; tokens are ints. A mask that depends on it is drawn again
    if the inputs have another dtype.
    """
    leaves, structure = jax.tree.flatten(inputs, is_leaf=is_shape)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(cell_carry) if hasattr(leaf, "dtype")]
    floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    likely = floating[0] if floating else jnp.float32
    choices = [(likely, jnp.int32) if is_shape(leaf) else (leaf.dtype,) for leaf in leaves]
    for picked in itertools.islice(itertools.product(*choices), 16):
        yield jax.tree.unflatten(
            structure,
            [
                jax.ShapeDtypeStruct(leaf, dtype) if is_shape(leaf) else leaf
                for leaf, dtype in zip(leaves, picked, strict=True)
            ],
        )


def is_shape(node: Any) -> bool:
    """Tells a shape such as `(4, 20)` from a tuple of shapes."""
    return isinstance(node, tuple) and all(
        isinstance(dim, int) or export.is_symbolic_dim(dim) for dim in node
    )
