"""Every use of JAX that its documentation does not promise, or that differs between its versions.

The rest of the package uses documented names only, so when JAX changes, this is the file to fix.
Flax has a file of its own, `_flax/compat.py`.
"""

from typing import Any

import jax
from jax.core import ShapedArray as ShapedArray
from jax.core import Tracer
from jax.core import eval_jaxpr as eval_jaxpr
from jax.extend.core import ClosedJaxpr as ClosedJaxpr  # type: ignore[attr-defined]
from jax.extend.core import Jaxpr as Jaxpr  # type: ignore[attr-defined]
from jax.extend.core import Literal as Literal  # type: ignore[attr-defined]
from jax.extend.core.primitives import convert_element_type_p

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # before JAX 0.8
    from jax.core import get_opaque_trace_state  # type: ignore[attr-defined, no-redef]

IS_BEFORE_0_8 = jax.__version_info__ < (0, 8)
IS_BEFORE_0_12 = jax.__version_info__ < (0, 12)
_HAS_PCAST = hasattr(jax.lax, "pcast")  # JAX 0.7 and 0.8.0 call it pvary


def is_traced(value: Any) -> bool:
    """Whether a value is not known yet, because a transformation is tracing."""
    return isinstance(value, Tracer)


def current_trace() -> Any:
    """Equal to the result of another call only if no transformation was opened in between."""
    # The convention tells JAX who asks: NNX is the one user that it was made for.
    return get_opaque_trace_state(convention="nnx")


def as_weakly_typed(value: jax.Array) -> jax.Array:
    """The same value with a weak type: like a Python number, it widens no other operand."""
    # jax.lax.convert_element_type leaves a value of the same dtype as it is.
    return convert_element_type_p.bind(value, new_dtype=value.dtype, weak_type=True, sharding=None)


def is_threefry_dtype(dtype: Any) -> bool:
    """Whether typed keys of a dtype are of threefry2x32."""
    return dtype.name == "key<fry>"


def varying_axes(aval: Any) -> frozenset[str]:
    """The axes of `jax.shard_map` over which a type says that an array differs."""
    newer = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(aval, "vma", None) or getattr(newer, "varying", ()))


def shape_struct(shape: Any, dtype: Any, sharding: Any, like: Any) -> jax.ShapeDtypeStruct:
    """A shape that varies over the same axes of `jax.shard_map` as the type `like`."""
    if not varying_axes(like):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    newer = getattr(like, "manual_axis_type", None)
    varying = {"vma": like.vma} if newer is None else {"manual_axis_type": newer}
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, **varying)


def vary_over(value: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The same array, with a type that says that it differs over more axes of `jax.shard_map`."""
    missing = tuple(sorted(axes - varying_axes(jax.typeof(value))))
    if not missing:
        return value
    if _HAS_PCAST:
        return jax.lax.pcast(value, missing, to="varying")
    return jax.lax.pvary(value, missing)  # pyright: ignore[reportAttributeAccessIssue]


def how_to_vary(name: str, axes: str) -> str:
    """The code with which a user does `vary_over`, for an error message."""
    if _HAS_PCAST:
        return f"jax.lax.pcast({name}, {axes}, to='varying')"
    return f"jax.lax.pvary({name}, {axes})"


def jaxpr_of(equation: Any, debug_info: Any) -> Jaxpr:
    """A jaxpr of one equation, whose arguments are the equation's variables."""
    variables = [atom for atom in equation.invars if not isinstance(atom, Literal)]
    # The names are those of the whole function; jax_enable_checks wants one for each variable.
    debug_info = debug_info._replace(
        arg_names=(None,) * len(variables), result_paths=(None,) * len(equation.outvars)
    )
    return Jaxpr([], variables, equation.outvars, [equation], equation.effects, debug_info)


def function_name(jaxpr: Any) -> str | None:
    """The name of the function that a jaxpr was traced from, if JAX has kept it."""
    info = getattr(getattr(jaxpr, "jaxpr", jaxpr), "debug_info", None)
    return getattr(info, "func_name", None)
