"""Flax hashes a path without a separator, so modules at 1/10 and 11/0 draw one key: an error."""

from collections.abc import Iterator
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_cells import FromZeros

import flax_dropout_cell as fdc

XS = jnp.ones((2, 3, 64))
NOISE = fdc.Dropout(keep_prob=0.5, variational=True)
SPEC = fdc.RecurrentDropout(input=NOISE)


class Echo(FromZeros):
    """Outputs its inputs, so that masks on the inputs show."""

    @nn.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        return carry, inputs


def wrapped(name: str) -> nn.Module:
    return nn.RNN(fdc.linen.DropoutCell(Echo(), SPEC, name=name))


def tensorflow(name: str) -> nn.Module:
    options = {"input_keep_prob": 0.5, "variational_recurrent": True, "name": name}
    return nn.RNN(fdc.linen.RNNCellDropoutWrapper(Echo(), **options))


MODULES: dict[str, Any] = {
    "RNN": lambda name: fdc.linen.RNN(Echo(), SPEC, name=name),
    "DropoutCell": wrapped,
    "RNNCellDropoutWrapper": tensorflow,
}


class Block(nn.Module):
    make: Any
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, xs: jax.Array) -> Any:
        return [self.make(name)(xs) for name in self.names]


class Model(nn.Module):
    make: Any
    first: tuple[str, str]
    second: tuple[str, str]

    @nn.compact
    def __call__(self, xs: jax.Array) -> Any:
        return [
            Block(self.make, (inner,), name=outer)(xs)[0]
            for outer, inner in (self.first, self.second)
        ]


def run(make: Any, first: tuple[str, str], second: tuple[str, str]) -> list[np.ndarray]:
    model = Model(make, first, second)
    return [np.asarray(ys) for ys in model.apply({}, XS, rngs={"dropout": jax.random.key(0)})]  # type: ignore[union-attr]


@pytest.fixture
def separator() -> Iterator[None]:
    flax.config.update("flax_fix_rng_separator", True)
    yield
    flax.config.update("flax_fix_rng_separator", False)


SAME = [(("1", "10"), ("11", "0")), (("a", "bc"), ("ab", "c"))]


@pytest.mark.parametrize("paths", SAME)
@pytest.mark.parametrize("kind", MODULES)
def test_modules_with_one_key_are_refused(kind: str, paths: Any) -> None:
    first, second = ("/".join(path) for path in paths)
    message = f"the {kind} at {second}.* would have the masks of the one at {first}"
    with pytest.raises(ValueError, match=message) as caught:
        run(MODULES[kind], *paths)
    assert "flax_fix_rng_separator" in str(caught.value)


@pytest.mark.parametrize("kind", MODULES)
def test_names_that_do_not_run_into_each_other_have_masks_of_their_own(kind: str) -> None:
    assert_independent(*run(MODULES[kind], ("1", "10"), ("2", "10")))


@pytest.mark.parametrize("kind", MODULES)
def test_a_separator_gives_each_module_its_own_masks(kind: str, separator: None) -> None:
    assert_independent(*run(MODULES[kind], *SAME[0]))


def assert_independent(first: np.ndarray, second: np.ndarray) -> None:
    """128 units of keep_prob 0.5: half of them agree, to 5 sigma."""
    agree = (first[:, 0] == second[:, 0]).mean()
    assert abs(agree - 0.5) < 5 * 0.5 / first[:, 0].size ** 0.5


def test_word_types_with_one_key_are_refused() -> None:
    def make(name: str) -> nn.Module:
        return fdc.linen.Embed(5, 64, keep_prob=0.5, name=name)

    model = Model(make, *SAME[0])
    tokens = jnp.zeros((2, 3), int)
    with pytest.raises(ValueError, match="would have the masks of the one at 1/10"):
        model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, tokens)


def test_flax_s_own_dropout_shares_its_mask() -> None:
    """The docs warn of it; when Flax mends it, this fails, and the warning may go."""

    def make(name: str) -> nn.Module:
        return nn.Dropout(0.5, deterministic=False, name=name)

    first, second = run(make, *SAME[0])
    np.testing.assert_array_equal(first, second)
