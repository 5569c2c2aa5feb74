"""The call of a cell, with `disturb` if there is noise inside it, and checks of its results."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import keystr, tree_leaves_with_path

from .._compat import Literal, current_trace
from .._messages import must_be, short_repr, short_tree_repr
from .._random.keys import name_hash
from .._spec.prefixes import PyTree, shape_of, structure_str
from ..cells.disturb import undisturbed
from ..cells.known import list_cells_with

Cell = Callable[..., tuple[Any, Any]]
"""`cell(params, carry, x) -> (carry, y)`, any pytrees; `flax.linen.LSTMCell(64).apply` is one."""

_NO_SITES = object()


class DisturbFn:
    """A cell's `disturb` argument: it calls `noise`, and raises on calls that would be wrong.

    Args:
      names: the sites that have noise.
      noise: `noise(site, value, previous) -> value`, called at these sites.
    """

    def __init__(self, names: frozenset[str], noise: Callable[[str, PyTree, PyTree], PyTree]):
        self._names = names
        self._noise = noise
        # Under jax.vmap, all rows of a mask that is drawn outside would be the same. No value shows
        # this, so the trace in which the cell was called is compared with the current one.
        self._trace = current_trace()
        self._called: list[str] = []
        self._asked: set[str] = set()

    def has(self, site: str) -> bool:
        """Whether a site has noise."""
        self._asked.add(site)
        return site in self._names

    def __call__(self, site: str, value: PyTree, previous: PyTree = None) -> PyTree:
        """The value, with noise if the site has any."""
        if not isinstance(site, str):
            raise TypeError(must_be("the first argument of disturb", "a site's name", site))
        if current_trace() != self._trace:
            raise ValueError(
                f"disturb({site!r}, ..) was called under a transformation that the cell itself "
                f"opens, such as jax.vmap, jax.lax.scan or jax.jit, in which rows or steps may "
                f"share one mask. Call it outside, or vmap dropout_scan with a key for each row."
            )
        if site in self._called:
            raise ValueError(
                f"disturb({site!r}, ..) was called twice in a step, and both would get one mask; "
                f"give each place a name of its own, such as {'0/' + site!r} and {'1/' + site!r}."
            )
        for other in self._called:
            if name_hash(other) == name_hash(site):
                raise ValueError(
                    f"the sites {other!r} and {site!r} have the same hash, so they would have the "
                    f"same masks; rename one of them."
                )
        self._called.append(site)
        return self._noise(site, value, previous) if site in self._names else value

    @property
    def known(self) -> set[str]:
        """The sites that the cell has called or asked for."""
        return {*self._called, *self._asked}

    def check_all_called(self) -> None:
        """Raises if there is noise at a site that the cell does not have."""
        for site in sorted(self._names.difference(self._called)):
            known = sorted(self.known - {site})
            has = f"it has {', '.join(known)}." if known else "it has no sites."
            if ours := list_cells_with(site):
                has += f" Use {ours} of this library."
            problem = f"dropout.inside has noise at {site!r}, but the cell has no site of that name"
            raise ValueError(f"{problem}: {has}")


def call_cell(
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    disturb: DisturbFn | None = None,
    *,
    scanned: bool = False,
) -> tuple[PyTree, PyTree]:
    """Runs the cell, with `disturb=` if it is given, and checks that it returns a pair.

    If it is `scanned`, the new carry must have the shapes and dtypes of the old one.
    """
    _check_cell(cell)
    try:
        result = (
            cell(params, carry, x)
            if disturb is None
            else _call_disturbed(cell, params, carry, x, disturb)
        )
    except Exception as error:
        _add_shapes(error, carry, x)
        raise
    if disturb is not None:
        if result is _NO_SITES:
            raise _no_sites(disturb)
        disturb.check_all_called()
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"cell must return (carry, y), got {short_tree_repr(result)}.")
    if jax.tree.structure(result[0]) != jax.tree.structure(carry):
        raise ValueError(
            f"the cell took a carry {structure_str(carry)} and returned "
            f"{structure_str(result[0])}. It must return (carry, y), in this order, with a carry "
            f"of the structure that it took: start from one."
        )
    if scanned:
        _check_kept(carry, result[0])
    return result


def _check_kept(carry: PyTree, new_carry: PyTree) -> None:
    """Raises if `jax.lax.scan` would refuse the new carry, and says which carry to start from."""
    new_leaves = jax.tree.leaves(new_carry)
    for (path, old), new in zip(tree_leaves_with_path(carry), new_leaves, strict=True):
        came, left = jax.typeof(old), jax.typeof(new)
        same_shape = came.shape == left.shape
        if same_shape and (came.dtype == left.dtype or came.weak_type):
            continue
        what = "shape" if not same_shape else "dtype, or cast it in the cell"
        raise TypeError(
            f"carry{keystr(path)} goes into the cell as {short_repr(old)} and comes out as "
            f"{short_repr(new)}. Start from a carry of that {what}."
        )


def _check_cell(cell: Any) -> None:
    """Raises if the cell is not a function of (params, carry, x), such as a Flax module."""
    if isinstance(cell, type) or hasattr(cell, "initialize_carry") or not callable(cell):
        raise TypeError(
            f"cell must be a function cell(params, carry, x), got {short_repr(cell)}: write "
            f"nn.LSTMCell(64).apply, or use fdc.linen.RNN or fdc.nnx.RNN around the module."
        )


def _add_shapes(error: Exception, carry: PyTree, x: PyTree) -> None:
    """Adds the cell's arguments to an error that the cell raised, once."""
    note = "The cell was called with the carry "
    if not any(line.startswith(note) for line in getattr(error, "__notes__", ())):
        error.add_note(
            f"{note}{short_tree_repr(carry)} and the input {short_tree_repr(x)}, those of one "
            f"step; dropout_scan reads the first axis of xs as time."
        )


def _call_disturbed(
    cell: Cell, params: PyTree, carry: PyTree, x: PyTree, disturb: DisturbFn
) -> Any:
    """Runs the cell with `disturb=`; returns `_NO_SITES` if it does not take that argument."""
    if not _takes_disturb(cell):
        return _NO_SITES
    try:
        return cell(params, carry, x, disturb=disturb)
    except TypeError as error:
        # A Flax module's apply accepts any keyword, so only the call shows that its __call__ has no
        # `disturb`. If the cell names it, a function that the cell calls has raised the error.
        if not _names_disturb(cell) and "unexpected keyword argument 'disturb'" in str(error):
            return _NO_SITES
        if DisturbFn.__name__ in str(error):
            raise TypeError(
                "dropout.inside has noise, but the cell is under a transformation such as "
                "jax.checkpoint, nn.remat or nn.jit, which takes arrays and no `disturb`: give the "
                "cell itself. To save memory, use checkpoint_every of dropout_scan or RNN."
            ) from None
        raise


def _takes_disturb(cell: Cell) -> bool:
    parameters = _parameters_of(cell)
    if parameters is None:
        return True  # its call will tell
    return "disturb" in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _names_disturb(cell: Cell) -> bool:
    return "disturb" in (_parameters_of(cell) or ())


def _parameters_of(cell: Cell) -> Mapping[str, inspect.Parameter] | None:
    """The parameters of a cell; None if it cannot be inspected."""
    try:
        return inspect.signature(cell).parameters
    except (TypeError, ValueError):
        return None


def _no_sites(disturb: DisturbFn) -> TypeError:
    names = sorted(disturb._names)
    ours = {name: list_cells_with(name) for name in names if list_cells_with(name)}
    where = "".join(f" For {name!r} use {cell} of this library." for name, cell in ours.items())
    return TypeError(
        f"dropout.inside has noise at {', '.join(map(repr, names))}, but the cell has no sites: it "
        f"takes no argument `disturb`.{where} A cell of your own has the site if it is written "
        f"def cell(params, carry, x, disturb=fdc.undisturbed) and calls "
        f"disturb({names[0]!r}, value)."
    )


def trace_cell(
    cell: Cell, params: PyTree, carry: PyTree, x: PyTree, names: frozenset[str]
) -> tuple[PyTree, dict[str, PyTree]]:
    """The shapes of a cell's output and of the values at its sites `names`."""
    seen: dict[str, PyTree] = {}

    def note(site: str, value: PyTree, previous: PyTree) -> PyTree:
        del previous
        seen[site] = jax.tree.map(shape_of, value)
        return value

    def run(params: PyTree, carry: PyTree, x: PyTree) -> PyTree:
        return call_cell(cell, params, carry, x, DisturbFn(names, note) if names else None)[1]

    y = eval_shape(run, params, carry, x)
    if names:
        warn_of_unused_sites(cell, params, carry, x, names)
    return y, seen


def warn_of_unused_sites(
    cell: Cell, params: PyTree, carry: PyTree, x: PyTree, names: frozenset[str]
) -> None:
    """Warns if a cell's results do not depend on what `disturb` returns: the noise is lost.

    Not an error, because a cell may call a site to show its mask.
    """

    def mark(site: str, value: PyTree, previous: PyTree) -> PyTree:
        del previous
        return jax.tree.map(
            lambda leaf: checkpoint_name(leaf, site) if _is_traceable(leaf) else leaf, value
        )

    def run(params: PyTree, carry: PyTree, x: PyTree) -> list[Any]:
        results = call_cell(cell, params, carry, x, DisturbFn(names, mark))
        return [leaf for leaf in jax.tree.leaves(results) if _is_traceable(leaf)]

    run_filled, arrays = _without_objects(run, params, carry, x)
    used = _names_used(jax.make_jaxpr(run_filled)(arrays).jaxpr)
    for site in sorted(names - used):
        warnings.warn(
            f"the cell calls disturb({site!r}, ..) and does not use the value that it returns, so "
            f"the noise there is lost: write value = disturb({site!r}, value).",
            stacklevel=2,
        )


def _names_used(jaxpr: Any) -> set[str]:
    """The names that `checkpoint_name` gave to values on which the results depend."""
    needed = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    names = set()
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(var for var in eqn.invars if not isinstance(var, Literal))
            if eqn.primitive.name == "name":
                names.add(eqn.params["name"])
    return names


def sites_of_cell(cell: Cell, params: PyTree, carry: PyTree, x: PyTree) -> list[str]:
    """The names of all sites that a cell has, with and without noise."""
    known: set[str] = set()

    # Not `call_cell`, which would refuse a cell that has no sites.
    def run(params: PyTree, carry: PyTree, x: PyTree) -> None:
        disturb = DisturbFn(frozenset(), undisturbed)
        _call_disturbed(cell, params, carry, x, disturb)
        known.update(disturb.known)

    eval_shape(run, params, carry, x)
    return sorted(known)


def eval_shape(run: Callable[..., PyTree], *values: PyTree) -> PyTree:
    """`jax.eval_shape` for values that may hold other objects than arrays, such as functions."""
    run_filled, arrays = _without_objects(run, *values)
    return jax.eval_shape(run_filled, arrays)


def _without_objects(
    run: Callable[..., PyTree], *values: PyTree
) -> tuple[Callable[[list[Any]], PyTree], list[Any]]:
    """A function of the arrays among some values, and these arrays; None for other objects."""
    leaves, structure = jax.tree.flatten(values)

    def run_filled(arrays: list[Any]) -> PyTree:
        pairs = zip(leaves, arrays, strict=True)
        filled = [leaf if array is None else array for leaf, array in pairs]
        return run(*jax.tree.unflatten(structure, filled))

    return run_filled, [leaf if _is_traceable(leaf) else None for leaf in leaves]


def _is_traceable(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)
