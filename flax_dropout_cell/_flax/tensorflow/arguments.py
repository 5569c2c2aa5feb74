"""The arguments and methods that linen's and NNX's `RNNCellDropoutWrapper` share."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..._arguments import check_flag
from ..._messages import must_be, short_repr, shorten, with_article
from ..._spec.recurrent_dropout import PyTree, RecurrentDropout
from ...noises.arguments import check_probability
from ...noises.dropout import Dropout
from ..carry import DropoutCarry
from ..cell_weights import complex_dtype
from ..wrapper import CellWrapper, for_likely_inputs, is_shape
from .configs import keep_prob_to_config, plan_wrapper, to_config
from .state_filters import Visitor, place_visited
from .trusted_names import TrustedNames, collect_names, to_name

KEEP_PROBS = ("input_keep_prob", "state_keep_prob", "output_keep_prob")


class TensorFlowWrapper(CellWrapper):
    """`tf.nn.RNNCellDropoutWrapper`'s methods, and its arguments as a `RecurrentDropout`."""

    input_keep_prob: Any
    output_keep_prob: Any
    state_keep_prob: Any
    variational_recurrent: bool
    input_size: Any
    dtype: Any
    seed: int | np.integer | None
    dropout_state_filter_visitor: Visitor | None
    broadcast_dims: Sequence[int]
    deterministic: bool
    _cell_class: ClassVar[type]
    _cell_modules: ClassVar[tuple[str, ...]]
    _no_config_arguments: ClassVar[tuple[str, ...]]

    def _features(self) -> list[Any]:
        """The shapes of the cell's inputs at a step; several if their width does not matter."""
        raise NotImplementedError

    def _arguments(self, cell: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _spec_for(self, cell_carry: PyTree) -> RecurrentDropout:
        def noise(keep_prob: Any) -> Dropout | None:
            return keep_prob_noise(keep_prob, self.variational_recurrent, self.broadcast_dims)

        state = noise(self.state_keep_prob)
        if state is not None:
            state = place_visited(
                self._framework, self.cell, cell_carry, state, self.dropout_state_filter_visitor
            )
        return RecurrentDropout(
            input=noise(self.input_keep_prob), output=noise(self.output_keep_prob), state=state
        )

    def _start(self, rng: jax.Array | None, cell_carry: PyTree, inputs: Any) -> DropoutCarry:
        rng = None if rng is None else fold_seed(rng, self.seed)
        return super()._start(rng, cell_carry, inputs)

    @property
    def wrapped_cell(self) -> Any:
        """The cell itself."""
        return self.cell

    @property
    def state_size(self) -> Any:
        """The cell's `state_size`, or else the feature sizes of its carry, leaf by leaf.

        Raises:
          ValueError: if the sizes depend on the cell's inputs and `input_size` is not given.
        """
        if hasattr(self.cell, "state_size"):
            return self.cell.state_size
        return jax.tree.map(lambda leaf: size_of(leaf.shape), self._batched_state_shapes(()))

    @property
    def output_size(self) -> Any:
        """The cell's `output_size`, or else the feature sizes of its output, leaf by leaf.

        Raises:
          ValueError: if the sizes depend on the cell's inputs and `input_size` is not given.
        """
        if hasattr(self.cell, "output_size"):
            return self.cell.output_size

        def of(features: Any) -> PyTree:
            cell_carry = self._framework.carry_shapes(self.cell, features)
            return for_likely_inputs(
                features, cell_carry, lambda x: self._output_shapes(cell_carry, x)
            )

        return jax.tree.map(lambda leaf: size_of(leaf.shape), self._of_any_width(of))

    def zero_state(self, batch_size: int, dtype: Any) -> Any:
        """The cell's `zero_state`, or else zeros for each leaf of its carry.

        This is a state of the cell; `redraw_masks` makes a carry of it.
        """
        if hasattr(self.cell, "zero_state"):
            return self.cell.zero_state(batch_size, dtype)

        def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
            return jnp.zeros(leaf.shape, complex_dtype(dtype) if is_complex else dtype)

        return jax.tree.map(zeros, self._batched_state_shapes((batch_size,)))

    def _batched_state_shapes(self, batch: tuple[int, ...]) -> PyTree:
        def of(features: Any) -> PyTree:
            shapes = jax.tree.map(lambda shape: batch + shape, features, is_leaf=is_shape)
            return self._framework.carry_shapes(self.cell, shapes)

        return self._of_any_width(of)

    def _of_any_width(self, shapes_of: Callable[[Any], PyTree]) -> PyTree:
        """The shapes for the cell's inputs; raises if they depend on a width that is not known."""
        found, *others = [shapes_of(features) for features in self._features()]
        if any(tree_shapes(other) != tree_shapes(found) for other in others):
            name = type(self.cell).__name__
            raise ValueError(f"sizes of {name} depend on the width of its inputs; give input_size.")
        return found

    def get_initial_state(
        self, inputs: Any = None, batch_size: int | None = None, dtype: Any = None
    ) -> Any:
        """`zero_state` for these inputs, or for this batch size and dtype.

        Raises:
          ValueError: if the arguments contradict each other, or the batch size or dtype is missing.
        """
        return self.zero_state(*batch_and_dtype(inputs, batch_size, dtype))

    def get_config(self) -> dict[str, Any]:
        """The arguments in a form that JSON can hold; `from_config` reads them.

        Raises:
          ValueError: if an argument has no such form: a traced keep_prob, or a function that
            cannot be imported by name, such as a lambda.
        """
        names, visitor = self._names(), self.dropout_state_filter_visitor
        return {
            "cell": self._cell_to_config(self.cell, names),
            **{name: keep_prob_to_config(name, getattr(self, name)) for name in KEEP_PROBS},
            "variational_recurrent": bool(self.variational_recurrent),
            "input_size": self._to_config("input_size", self.input_size, names),
            "dtype": None if self.dtype is None else jnp.dtype(self.dtype).name,
            "seed": None if self.seed is None else int(self.seed),
            "dropout_state_filter_visitor": None
            if visitor is None
            else {"import_path": to_name("dropout_state_filter_visitor", visitor, names)},
            "broadcast_dims": [int(dim) for dim in self.broadcast_dims],
            "deterministic": bool(self.deterministic),
        }

    @classmethod
    def _names(cls, trusted: Any = ()) -> TrustedNames:
        """The names that a config of this wrapper may use."""
        return collect_names(cls._cell_class, cls._cell_modules, cls._no_config_arguments, trusted)

    @classmethod
    def _read_config(cls, config: Any, trusted: Any, **rngs: Any) -> dict[str, Any]:
        """The arguments in a config; the cell is made last, after all other checks."""
        arguments, make_cell = plan_wrapper(config, cls, cls._names(trusted), **rngs)
        keep_probs = {name: arguments[name] for name in KEEP_PROBS if name in arguments}
        try:
            check_arguments(keep_probs, arguments.get("seed"), None)
        except TypeError as error:
            raise ValueError(f"the config is not a wrapper's: {error}") from None
        return {**arguments, "cell": make_cell()}

    def _to_config(self, what: str, value: Any, names: TrustedNames) -> Any:
        if isinstance(value, names.cell_class):
            return self._cell_to_config(value, names)
        if isinstance(value, list | tuple):
            return [self._to_config(what, entry, names) for entry in value]
        return to_config(what, value, names)

    def _cell_to_config(self, cell: Any, names: TrustedNames) -> dict[str, Any]:
        if not isinstance(cell, names.cell_class):
            raise ValueError(
                f"a config holds cells that are {with_article(names.cell_class.__name__)} of "
                f"{names.cell_class.__module__}, got {with_article(type(cell).__name__)}."
            )
        class_name = to_name("the cell's class", type(cell), names)
        if hasattr(cell, "get_config"):
            return {"class_name": class_name, "config": cell.get_config()}
        config = {
            name: self._to_config(f"{type(cell).__name__}.{name}", value, names)
            for name, value in self._arguments(cell).items()
        }
        return {"class_name": class_name, "config": config}


def check_arguments(
    keep_probs: dict[str, Any], seed: Any, dropout_state_filter_visitor: Any
) -> None:
    """Raises if a keep_prob, the seed or the visitor is wrong, when a wrapper is made."""
    if dropout_state_filter_visitor is not None and not callable(dropout_state_filter_visitor):
        name = "dropout_state_filter_visitor"
        raise TypeError(must_be(name, "callable", dropout_state_filter_visitor))
    for name, keep_prob in keep_probs.items():
        if not isinstance(keep_prob, int | float | np.number | np.ndarray | jax.Array):
            raise TypeError(must_be(name, "a number in [0, 1] or an array", keep_prob))
        check_probability(name, keep_prob)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer | None):
        raise TypeError(must_be("seed", "an int or None", seed))
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(must_be("seed", "an int of 64 bits", seed))


def keep_prob_noise(
    keep_prob: Any, variational: bool, broadcast_dims: Sequence[int]
) -> Dropout | None:
    """The `Dropout` for a keep_prob; None if it is the number 1."""
    variational = check_flag("variational_recurrent", variational)
    noise = Dropout(keep_prob=keep_prob, variational=variational, broadcast_dims=broadcast_dims)
    return None if noise.is_identity else noise


def fold_seed(rng: jax.Array, seed: int | np.integer | None) -> jax.Array:
    """Folds a seed, an int of 64 bits, into a key, word by word; None leaves the key unchanged."""
    if seed is None:
        return rng
    # Two words for every seed, so that an int32 and an int64 of one value agree.
    low, high = np.array(seed, "<i8").reshape(1).view("<u4")
    return jax.random.fold_in(jax.random.fold_in(rng, low), high)


def check_inputs(x: PyTree, input_size: Any, dtype: Any) -> None:
    """Raises if an input does not have the announced `input_size` and `dtype`."""
    leaves, structure = jax.tree.flatten(x)
    if input_size is not None:
        try:
            sizes = structure.flatten_up_to(input_size)
        except (ValueError, TypeError):
            raise ValueError(
                f"input_size is {short_repr(input_size)}, but the inputs have the structure "
                f"{shorten(str(structure))}."
            ) from None
        for leaf, size in zip(leaves, sizes, strict=True):
            features = tuple(np.atleast_1d(size).tolist())
            if leaf.shape[len(leaf.shape) - len(features) :] != features:
                raise ValueError(
                    f"input_size is {short_repr(input_size)}, but an input of shape {leaf.shape} "
                    f"arrived."
                )
    for leaf in leaves if dtype is not None else ():
        if leaf.dtype != jnp.dtype(dtype):
            raise TypeError(f"dtype is {jnp.dtype(dtype)}, but a {leaf.dtype} input arrived.")


def tree_shapes(tree: PyTree) -> PyTree:
    """The shape of each leaf."""
    return jax.tree.map(lambda leaf: leaf.shape, tree)


def size_of(shape: tuple[int, ...]) -> int | tuple[int, ...]:
    """A feature shape as TensorFlow writes it: a plain int if there is one axis."""
    return shape[0] if len(shape) == 1 else shape


def feature_shapes(input_size: Any, axes: int) -> Any:
    """`input_size` with each size written as a shape with `axes` feature axes."""
    if axes > 1:
        return tuple(input_size)
    return jax.tree.map(lambda size: (size,), input_size)


def batch_and_dtype(inputs: Any, batch_size: Any, dtype: Any) -> tuple[Any, Any]:
    """The batch size and dtype for `get_initial_state`; raises if its arguments disagree."""
    if inputs is not None:
        if batch_size is not None and batch_size != inputs.shape[0]:
            raise ValueError(
                f"batch_size is {batch_size}, but inputs have a batch of {inputs.shape[0]}."
            )
        if dtype is not None and jnp.dtype(dtype) != inputs.dtype:
            raise ValueError(f"dtype is {jnp.dtype(dtype)}, but inputs are {inputs.dtype}.")
        return inputs.shape[0], inputs.dtype
    if batch_size is None or dtype is None:
        raise ValueError(
            f"give inputs, or batch_size and dtype; got batch_size={batch_size}, dtype={dtype}."
        )
    return batch_size, dtype
