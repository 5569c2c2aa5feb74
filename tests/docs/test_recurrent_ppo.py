"""The policies on a T-maze: masks that actor and learner share, and the mazes themselves."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_runs import EXAMPLES, PNG_SIGNATURE, load_example

import flax_dropout_cell as fdc

PROGRAM = EXAMPLES / "recurrent_ppo.py"
STORED = EXAMPLES.parent / "docs/results/recurrent_ppo.json"
PAGE = EXAMPLES.parent / "docs/rl.md"
ppo = load_example(PROGRAM)
SMALL = ppo.Config(units=32, mazes=10, steps=24, epochs=1, iterations=3)


@pytest.fixture(autouse=True)
def standard_dtype_promotion() -> Iterator[None]:
    # The suite's is strict, and Optax's Adam needs more.
    with jax.numpy_dtype_promotion("standard"):
        yield


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    return {result["model"]: result for result in json.loads(path.read_text())["results"]}


class Halves(fdc.linen.LSTMCell):
    """Sums and halves alone: no CPU rounds them, whatever the shape of an array."""

    def __call__(self, carry: Any, inputs: Any, *, disturb: Any = lambda _, value: value) -> Any:
        c, h = carry
        h = (disturb("recurrent", h) + inputs.sum(-1, keepdims=True) + 1) / 2
        return (c, h), h


class FirstUnits(nn.Module):
    """In place of a `Dense`: as many of the units, each times a weight."""

    features: int

    @nn.compact
    def __call__(self, hs: jax.Array) -> jax.Array:
        weights = self.param("weights", nn.initializers.ones, (self.features,))
        return weights[None, None] * hs[..., : self.features]


def test_actor_and_learner_have_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: episodes run on between the rollouts, and the learner's rows are permuted."""
    monkeypatch.setattr(ppo.fdc.linen, "LSTMCell", Halves)
    monkeypatch.setattr(ppo.nn, "Dense", FirstUnits)
    learned = list(ppo.train(dataclasses.replace(SMALL, keep_prob=0.5), "memory, dropout"))
    assert [each.ratio_error for each in learned] == [0.0, 0.0, 0.0]
    assert len({each.mean_return for each in learned}) == 3


def test_the_first_ratios_are_one_up_to_rounding() -> None:
    """XLA picks a matrix product by its shape, so the last bits may differ on some CPUs."""
    learned = list(ppo.train(dataclasses.replace(SMALL, keep_prob=0.5), "memory, dropout"))
    assert max(each.ratio_error for each in learned) < 1e-6
    assert len({each.mean_return for each in learned}) == 3


def test_masks_by_place_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ids a learner of permuted rows has other masks than the actor."""
    layer = ppo.fdc.linen.RNN

    class ByPlace(layer):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return super().__call__(*args, **options | {"sequence_ids": None, "start": 0})

    monkeypatch.setattr(ppo.fdc.linen, "RNN", ByPlace)
    with pytest.raises(AssertionError, match=r"actor and learner differ: a ratio is off by 0\.\d"):
        next(ppo.train(dataclasses.replace(SMALL, keep_prob=0.5), "memory, dropout"))


@pytest.mark.parametrize("remembers", [False, True])
def test_a_policy_forgets_or_remembers_what_was_seen_before(remembers: bool) -> None:
    policy = ppo.Policy(8, ppo.fdc.RecurrentDropout(), remembers)
    seen = jnp.zeros((2, 3, 3)).at[1, 0, 0].set(1.0)  # the second row saw a sign
    window = ppo.Window(seen, jnp.zeros((2, 3), bool), jnp.zeros((2, 3), int))
    carry = (jnp.zeros((2, 8)),) * 2
    _, logits, _ = jax.jit(lambda rng: policy.init_with_output(rng, carry, window, None)[0])(
        jax.random.key(0)
    )
    assert bool((logits[0, -1] != logits[1, -1]).any()) == remembers


def test_a_walk_through_a_maze() -> None:
    """Two mazes of length 4: one agent turns as its sign said, one the other way."""
    mazes = ppo.Mazes(*(jnp.array(pair) for pair in ([0, 1], [4, 4], [0, 0], [0, 0], [0, 1])))
    np.testing.assert_array_equal(ppo.look(mazes), [[1, 0, 0], [0, 1, 0]])
    actions = [ppo.LEFT, *[ppo.ON] * 4, ppo.LEFT]
    rewards, ends, seen = [], [], None
    for step, action in enumerate(actions):
        seen = ppo.look(mazes)
        mazes, reward, done = ppo.walk(mazes, jnp.array([action] * 2), jax.random.key(step))
        rewards.append(reward)
        ends.append(done)
    np.testing.assert_array_equal(seen, [[0, 0, 1], [0, 0, 1]])  # at the junction, no sign
    np.testing.assert_allclose(rewards, [[-0.1] * 2, *[[0.0] * 2] * 4, [1.0, -1.0]], atol=1e-6)
    np.testing.assert_array_equal(ends, [[False] * 2] * 5 + [[True] * 2])
    np.testing.assert_array_equal(mazes.episode, [2, 3])
    np.testing.assert_array_equal(mazes.place, 0)
    done = jnp.zeros(2, bool)
    for _ in range(ppo.PATIENCE):
        assert not done.any()
        mazes, _, done = ppo.walk(mazes, jnp.array([ppo.RIGHT] * 2), jax.random.key(9))
    assert done.all() and (mazes.clock == 0).all()


def test_advantages_are_those_of_the_equation() -> None:
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 3, 5)).astype(np.float32)
    done, last = rng.random((3, 5)) < 0.3, rng.normal(size=3).astype(np.float32)
    rollout = ppo.Rollout(None, None, None, None, *map(jnp.asarray, (value, reward, done)))
    expected, later, following = np.zeros((3, 5)), np.zeros(3), last
    for t in reversed(range(5)):
        goes_on = ppo.DISCOUNT * ~done[:, t]
        later = reward[:, t] + goes_on * following - value[:, t] + goes_on * ppo.TRACE * later
        expected[:, t], following = later, value[:, t]
    np.testing.assert_allclose(
        ppo.advantages_of(rollout, jnp.asarray(last)), expected, rtol=1e-5, atol=1e-6
    )


def test_interrupted_it_writes_what_was_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def train(config: Any, name: str) -> Iterator[Any]:
        yield ppo.Learned(-1.5, 0.0)
        if name == "memory":
            raise KeyboardInterrupt
        yield ppo.Learned(0.25, 1e-7)

    monkeypatch.setattr(ppo, "train", train)
    monkeypatch.setattr("sys.argv", [str(PROGRAM), "--out", str(tmp_path / "new"), "--mazes", "5"])
    assert ppo.main() == 130
    results = read_results(tmp_path / "new/recurrent_ppo.json")
    assert [(name, each["curve"]) for name, each in results.items()] == [
        ("no memory", [-1.5, 0.25]),
        ("memory", [-1.5]),
    ]
    captured = capsys.readouterr()
    assert re.search(r"^no memory +return +-0.625 .* at most 1.0e-07$", captured.out, re.MULTILINE)
    assert captured.err == "interrupted; this is what was learned until then:\n"
    assert (tmp_path / "new/recurrent_ppo.png").read_bytes().startswith(PNG_SIGNATURE)


def test_diverged_training_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It is not blamed on the masks, and the iterations before are reported."""
    small = "--mazes 4 --units 4 --steps 8 --iterations 9 --epochs 1 --learning-rate 1e30"
    monkeypatch.setattr("sys.argv", [str(PROGRAM), *small.split(), "--out", str(tmp_path)])
    assert ppo.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("no memory: the training diverged in iteration ")
    assert error.endswith("; this is what was learned until then:\n") and error.count("\n") == 1
    assert 0 < len(read_results(tmp_path / "recurrent_ppo.json")["no memory"]["curve"]) < 9


def test_a_bad_flag_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", [str(PROGRAM), "--keep-prob", "1.2"])
    with pytest.raises(SystemExit, match="2"):
        ppo.main()
    error = capsys.readouterr().err
    assert "keep_prob must be between 0 and 1, got 1.2" in error
    assert error.count("\n") == 1


def test_the_stored_run() -> None:
    """With the default flags: the task takes memory, with dropout as well as without."""
    config = json.loads(STORED.read_text())["config"]
    assert config == dataclasses.asdict(ppo.Config())
    results = read_results(STORED)
    assert [*results] == list(ppo.MODELS)
    assert {result["ratio_error"] for result in results.values()} == {0.0}
    assert abs(results["no memory"]["return"]) < 0.15
    assert results["memory"]["return"] > 0.98
    assert results["memory, dropout"]["return"] > 0.98
    ends = [
        f"{name.replace(', ', ' with ')} {each['return']:.2f}" for name, each in results.items()
    ]
    told = f"rollouts: {', '.join(ends)} (with dropout on while acting)."
    assert told in " ".join(PAGE.read_text().split())
