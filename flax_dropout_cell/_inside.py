"""Sites that a cell has of its own: what it calls there, and the call of the cell itself."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import keystr, tree_leaves_with_path

from ._random.keys import name_hash
from ._shown import shown, shown_tree
from ._trees import PyTree, outline, shape_of

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # before JAX 0.8
    from jax.core import get_opaque_trace_state  # type: ignore[attr-defined, no-redef]

Cell = Callable[..., tuple[Any, Any]]
"""`cell(params, carry, x) -> (carry, y)`, any pytrees; `flax.linen.LSTMCell(64).apply` is one."""

_NO_SITES = object()

_OUR_CELLS = {
    "recurrent": "lstm_cell or gru_cell",
    "input_per_gate": "lstm_cell or gru_cell",
    "recurrent_per_gate": "lstm_cell or gru_cell",
    "candidate": "lstm_cell or gru_cell",
    "memory": "lstm_cell",
    "hidden": "lstm_cell or gru_cell",
}


def undisturbed(site: str, value: PyTree, previous: PyTree = None) -> PyTree:
    """Returns the value as it is: the default of a cell's `disturb` argument, for no noise.

    A cell calls `disturb` wherever noise may sit, in evaluation too.

    Args:
      site: the site's name, once in a step.
      value: what the cell has there.
      previous: what it had there at the step before, if a noise such as `Zoneout` is to mix it in.

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


def active(disturb: Callable[..., PyTree], site: str) -> bool:
    """Whether noise sits at a site: a cell asks before it does work that only noise needs."""
    if disturb is undisturbed:
        return False
    return getattr(disturb, "has", lambda site: True)(site)


class Sites:
    """What a cell gets as `disturb`: it passes values on to `noise`, and sees what goes wrong.

    Args:
      names: the sites that hold noise.
      noise: `noise(site, value, previous) -> value`, called for these.
    """

    def __init__(self, names: frozenset[str], noise: Callable[[str, PyTree, PyTree], PyTree]):
        self._names = names
        self._noise = noise
        self._trace = get_opaque_trace_state(convention="nnx")
        self._called: list[str] = []
        self._asked: set[str] = set()

    def has(self, site: str) -> bool:
        """Whether a site holds noise."""
        self._asked.add(site)
        return site in self._names

    def __call__(self, site: str, value: PyTree, previous: PyTree = None) -> PyTree:
        """The value, disturbed where the site holds noise."""
        if not isinstance(site, str):
            raise TypeError(
                f"disturb takes a site's name first, then the value; got a {type(site).__name__}."
            )
        if get_opaque_trace_state(convention="nnx") != self._trace:
            raise ValueError(
                f"disturb({site!r}, ..) was called under a transformation that the cell itself "
                f"opens, such as jax.vmap, jax.lax.scan, jax.checkpoint or jax.jit: all its rows "
                f"or depths would share one mask. Call it outside, or vmap dropout_scan with a "
                f"key for each row."
            )
        if site in self._called:
            raise ValueError(
                f"disturb({site!r}, ..) was called twice in a step, and both would get one mask; "
                f"give each place a name of its own, such as {'0/' + site!r} and {'1/' + site!r}."
            )
        for other in self._called:
            if name_hash(other) == name_hash(site):
                raise ValueError(
                    f"the sites {other!r} and {site!r} have one hash; rename one of them."
                )
        self._called.append(site)
        return self._noise(site, value, previous) if site in self._names else value

    @property
    def known(self) -> set[str]:
        """The sites that the cell has called or asked for."""
        return {*self._called, *self._asked}

    def check_all_called(self) -> None:
        """Refuses noise at a site that the cell has not."""
        for site in sorted(self._names.difference(self._called)):
            known = sorted(self.known - {site})
            has = f"it has {', '.join(known)}" if known else "it has none"
            where = f" Use {_OUR_CELLS[site]} of this library." if site in _OUR_CELLS else ""
            raise ValueError(
                f"dropout.inside has noise at {site!r}, but the cell has no site of that name: "
                f"{has}.{where}"
            )


def call_cell(
    cell: Cell,
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    sites: Sites | None = None,
    *,
    scanned: bool = False,
) -> tuple[PyTree, PyTree]:
    """Runs the cell, with `disturb=` where there are sites, and checks that it gives a pair.

    Where it is `scanned`, its carry must come out as it came in.
    """
    _check_cell(cell)
    try:
        result = (
            cell(params, carry, x) if sites is None else _offer_sites(cell, params, carry, x, sites)
        )
    except Exception as error:
        _add_shapes(error, carry, x)
        raise
    if sites is not None:
        if result is _NO_SITES:
            raise _no_sites(sites)
        sites.check_all_called()
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"cell must return (carry, y), got {shown_tree(result)}.")
    if jax.tree.structure(result[0]) != jax.tree.structure(carry):
        raise ValueError(
            f"the cell took a carry of structure {outline(carry)} and returned one of structure "
            f"{outline(result[0])}; they must be the same. It returns (carry, y), in this order."
        )
    if scanned:
        _check_kept(carry, result[0])
    return result


def _check_kept(carry: PyTree, new_carry: PyTree) -> None:
    """Refuses what `jax.lax.scan` would, in words that tell what to start from."""
    new_leaves = jax.tree.leaves(new_carry)
    for (path, old), new in zip(tree_leaves_with_path(carry), new_leaves, strict=True):
        came, left = jax.typeof(old), jax.typeof(new)
        same_shape = came.shape == left.shape
        if same_shape and (came.dtype == left.dtype or came.weak_type):
            continue
        what = "shape" if not same_shape else "dtype, or cast it in the cell"
        raise TypeError(
            f"carry{keystr(path)} goes into the cell as {shown(old)} and comes out as "
            f"{shown(new)}; from step to step it must be the same. Start from a carry of that "
            f"{what}."
        )


def _check_cell(cell: Any) -> None:
    """Refuses what is no function of (params, carry, x), such as a module of Flax's."""
    if isinstance(cell, type) or hasattr(cell, "initialize_carry"):
        raise TypeError(
            f"cell must be a function cell(params, carry, x) -> (carry, y), got {shown(cell)}. "
            f"Of a linen module that is its apply, such as nn.LSTMCell(64).apply; or use "
            f"fdc.linen.RNN or fdc.nnx.RNN around the module."
        )


def _add_shapes(error: Exception, carry: PyTree, x: PyTree) -> None:
    """Says beneath an error of the cell's own what the cell was called with, once."""
    note = "The cell was called with the carry "
    if not any(line.startswith(note) for line in getattr(error, "__notes__", ())):
        error.add_note(
            f"{note}{shown_tree(carry)} and the input {shown_tree(x)}, those of one step; "
            f"dropout_scan reads the first axis of xs as time."
        )


def _offer_sites(cell: Cell, params: PyTree, carry: PyTree, x: PyTree, sites: Sites) -> Any:
    """Runs the cell with `disturb=`; `_NO_SITES` where it takes none."""
    if not _takes_disturb(cell):
        return _NO_SITES
    try:
        return cell(params, carry, x, disturb=sites)
    except TypeError as error:
        # A Flax module's `apply` takes any keyword, and its `__call__` does not.
        if "unexpected keyword argument 'disturb'" in str(error):
            return _NO_SITES
        raise


def _takes_disturb(cell: Cell) -> bool:
    try:
        parameters = inspect.signature(cell).parameters
    except (TypeError, ValueError):
        return True
    return "disturb" in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _no_sites(sites: Sites) -> TypeError:
    names = sorted(sites._names)
    ours = {name: _OUR_CELLS[name] for name in names if name in _OUR_CELLS}
    where = "".join(f" For {name!r} use {cell} of this library." for name, cell in ours.items())
    return TypeError(
        f"dropout.inside has noise at {', '.join(map(repr, names))}, but the cell has no sites: it "
        f"takes no argument `disturb`.{where} A cell of your own calls disturb(site, value) "
        f"where noise may sit; see fdc.undisturbed."
    )


def trace_cell(
    cell: Cell, params: PyTree, carry: PyTree, x: PyTree, names: frozenset[str]
) -> tuple[PyTree, dict[str, PyTree]]:
    """The shapes of a cell's output and of what stands at its sites `names`."""
    seen: dict[str, PyTree] = {}

    def note(site: str, value: PyTree, previous: PyTree) -> PyTree:
        del previous
        seen[site] = jax.tree.map(shape_of, value)
        return value

    def run(params: PyTree, carry: PyTree, x: PyTree) -> PyTree:
        return call_cell(cell, params, carry, x, Sites(names, note) if names else None)[1]

    return _eval_shape(run, params, carry, x), seen


def sites_of_cell(cell: Cell, params: PyTree, carry: PyTree, x: PyTree) -> list[str]:
    """The names of the sites that a cell has, whether noise sits there or not."""
    known: set[str] = set()

    def run(params: PyTree, carry: PyTree, x: PyTree) -> None:
        sites = Sites(frozenset(), undisturbed)
        _offer_sites(cell, params, carry, x, sites)
        known.update(sites.known)

    _eval_shape(run, params, carry, x)
    return sorted(known)


def _eval_shape(run: Callable[..., PyTree], *values: PyTree) -> PyTree:
    """`jax.eval_shape` for values that may hold what is no array, such as functions."""
    leaves, structure = jax.tree.flatten(values)

    def run_filled(arrays: list[Any]) -> PyTree:
        pairs = zip(leaves, arrays, strict=True)
        filled = [leaf if array is None else array for leaf, array in pairs]
        return run(*jax.tree.unflatten(structure, filled))

    return jax.eval_shape(run_filled, [leaf if _is_traceable(leaf) else None for leaf in leaves])


def _is_traceable(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)
