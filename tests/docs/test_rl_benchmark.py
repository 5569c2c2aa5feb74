"""The benchmark of dropout in reinforcement learning: its tasks by hand, and a tiny run."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield SimpleNamespace(
            rl=importlib.import_module("rl"),
            tasks=importlib.import_module("rl_tasks"),
            tables=importlib.import_module("rl_tables"),
        )


def test_the_suit_of_three_cards_ago(modules: SimpleNamespace) -> None:
    """One agent names it at each step, one another suit; the first three steps do not count."""
    tasks = modules.tasks
    cards, seen, ends = tasks.deal(jax.random.key(0), jnp.arange(2)), [], []
    returns, done = np.zeros(2), jnp.zeros(2, bool)
    for step in range(tasks.CARDS):
        look = np.array(tasks.look_at_card(cards))
        assert (np.sort(look) == [0, 0, 0, 1]).all()
        seen.append(look.argmax(axis=1))
        suits = seen[step - 3] if step >= 3 else np.zeros(2, int)
        action = jnp.array([suits[0], (suits[1] + 1) % 4])
        cards, reward, done = tasks.name_suit(cards, action, jax.random.key(step))
        if step < 3:
            np.testing.assert_array_equal(reward, 0)
        returns += np.array(reward)
        ends.append(bool(done.any()))
    np.testing.assert_allclose(returns, [1, -1], rtol=1e-5)
    assert len(np.unique(seen)) == 4
    assert ends == [False] * 23 + [True] and bool(done.all())
    np.testing.assert_array_equal(cards.episode, [2, 3])
    np.testing.assert_array_equal(cards.clock, 0)


def swing_by_hand(state: Any, action: int, half_length: float) -> np.ndarray:
    """The lines of Gym's `CartPoleEnv.step`, in Python's floats."""
    x, x_dot, theta, theta_dot = map(float, state)
    force = 10.0 if action == 1 else -10.0
    costheta, sintheta = np.cos(theta), np.sin(theta)
    polemass_length, total_mass = 0.1 * half_length, 1.1
    temp = (force + polemass_length * theta_dot**2 * sintheta) / total_mass
    thetaacc = (9.8 * sintheta - costheta * temp) / (
        half_length * (4.0 / 3.0 - 0.1 * costheta**2 / total_mass)
    )
    xacc = temp - polemass_length * thetaacc * costheta / total_mass
    return np.array(
        [
            x + 0.02 * x_dot,
            x_dot + 0.02 * xacc,
            theta + 0.02 * theta_dot,
            theta_dot + 0.02 * thetaacc,
        ]
    )


@pytest.mark.parametrize("half_length", [0.5, 0.25])
def test_the_cart_pole_is_gyms(modules: SimpleNamespace, half_length: float) -> None:
    states = np.random.default_rng(0).normal(0, 0.1, (6, 4)).astype(np.float32)
    actions = [0, 1, 0, 1, 1, 0]
    swung = modules.tasks.swing(jnp.array(states), jnp.array(actions), half_length)
    by_hand = [swing_by_hand(*at, half_length) for at in zip(states, actions, strict=True)]
    np.testing.assert_allclose(swung, by_hand, rtol=1e-4, atol=1e-6)


def test_a_pole_that_falls_ends_an_episode(modules: SimpleNamespace) -> None:
    """Too far, too steep, too late, and none of these; velocities are not seen."""
    tasks = modules.tasks
    state = jnp.array([[2.39, 9, 0, 0], [0, 0, 0.2, 9.0], [0, 0, 0, 0], [1.2, 3, 0.1, 0]])
    poles = tasks.Poles(state, jnp.array([5, 5, 199, 5]), jnp.arange(4))
    np.testing.assert_allclose(
        tasks.look_at_pole(poles)[3], [0.5, 0.1 / (12 * np.pi / 180)], rtol=1e-5
    )
    after, reward, done = tasks.push(poles, jnp.ones(4, int), jax.random.key(0))
    assert done.tolist() == [True, True, True, False]
    np.testing.assert_allclose(reward, 1 / 200, rtol=1e-6)
    assert after.episode.tolist() == [4, 5, 6, 3] and after.clock.tolist() == [0, 0, 0, 6]
    assert (jnp.abs(after.state[:3]) <= 0.05).all()


def test_the_shifted_tests(modules: SimpleNamespace) -> None:
    tasks = modules.tasks
    mazes = tasks.build_longer(jax.random.key(0), jnp.arange(500))
    assert {*mazes.length.tolist()} == {*range(60, 81)}
    stddevs = (tasks.MAZE_NOISE, tasks.CARD_NOISE, tasks.POLE_NOISE)
    for memory, stddev in zip(tasks.TASKS.values(), stddevs, strict=True):
        state = memory.shifted.build(jax.random.key(0), jnp.arange(500))
        noise = np.array(memory.shifted.look(state) - memory.train.look(state))
        later = state._replace(clock=state.clock + 1)
        moved = np.array(memory.shifted.look(later) - memory.train.look(later))
        assert abs(np.corrcoef(noise.ravel(), moved.ravel())[0, 1]) < 5 / np.sqrt(noise.size)
        assert abs(noise.std() / stddev - 1) < 5 / np.sqrt(2 * noise.size)


def test_a_return_is_that_of_the_first_episode(modules: SimpleNamespace) -> None:
    """Episodes of 3 steps, each worth 1 but for the second, which would count 100."""
    rl, ppo = modules.rl, modules.tasks.ppo

    def walk(cards: Any, action: Any, rng: Any) -> Any:
        done = cards.clock == 2
        first = cards.suits[:, 0] == 0
        return (
            cards._replace(
                suits=jnp.where(done[:, None], 1, cards.suits),
                clock=jnp.where(done, 0, cards.clock + 1),
            ),
            jnp.where(first, 1.0, 100.0),
            done,
        )

    def build(rng: Any, episode: Any) -> Any:
        return modules.tasks.Cards(jnp.zeros((4, 4), int), jnp.zeros_like(episode), episode)

    task = ppo.Task(build, modules.tasks.look_at_card, walk, 4)
    policy = ppo.Policy(4, modules.rl.WAYS["zoneout"].dropout, True, 4)
    agent = ppo.begin(ppo.Config(units=4, mazes=4), policy, jax.random.key(0), task)[0]
    assert rl.mean_return(policy, agent.params, task, jax.random.key(1), rl.QUICK, 8) == 3


def test_a_tiny_run(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Masks by ids clip nothing at first, per-step ones too; the learner's own masks do."""
    ways = ["zoneout", "learner alone, keep 0.9"]
    arguments = ["rl.py", "--quick", "--task", "repeat previous", "--out", str(tmp_path)]
    arguments += [part for way in ways for part in ("--way", way)]
    monkeypatch.setattr("sys.argv", arguments)
    modules.rl.main()
    report = json.loads((tmp_path / "rl.json").read_text())
    zoneout, alone = report["rows"]
    assert [row["way"] for row in report["rows"]] == ways
    assert zoneout["worst_clipped"] == 0 and zoneout["ratio_error"] < 1e-5
    assert alone["worst_clipped"] > 0 and alone["ratio_error"] > 1e-3
    assert np.shape(zoneout["curves"]) == (2, 2)
    assert len({*zoneout["return"]}) == 2  # the seeds differ
    assert zoneout["command"].startswith("python benchmarks/rl.py --quick --task")
    assert str(tmp_path) not in zoneout["command"] and zoneout["versions"]["jax"]
    # Started again, it has nothing left to do.
    monkeypatch.setattr(modules.rl, "compare", None)
    modules.rl.main()
    assert json.loads((tmp_path / "rl.json").read_text()) == report


def test_better_and_worse_are_two_standard_errors(modules: SimpleNamespace) -> None:
    tables = modules.tables

    def row(way: str, *values: float) -> dict[str, Any]:
        return {"task": "t", "way": way, "return": [*values]}

    # Standard errors are 1 each, so that of a difference is the square root of 2.
    rows = [row(tables.BARE, 0, 2), row("a", 2.9, 4.9), row("b", 2.8, 4.8), row("c", -2.9, -0.9)]
    report = {"rows": rows}
    verdicts = [tables.verdict_of(report, row, "return") for row in rows]
    assert verdicts == ["", "better", "", "worse"]
