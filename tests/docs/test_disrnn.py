"""The example of information bottlenecks: its agent in NumPy, what it charges, and a short run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_runs import EXAMPLES, PNG_SIGNATURE, load_example, run_example

disrnn = load_example(EXAMPLES / "disrnn.py")


@pytest.fixture(autouse=True)
def as_users_have_it() -> Iterator[None]:
    """The suite's promotion is strict; a program of a user's runs with JAX's defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_the_agent_learns_and_forgets() -> None:
    """Its values are those of a loop over its own choices and rewards."""
    sessions = disrnn.play(jax.random.key(0), 30, 4)
    values = np.zeros((4, 2))
    for choice, reward, difference in zip(*map(np.asarray, sessions), strict=True):
        np.testing.assert_allclose(values[:, 1] - values[:, 0], difference, atol=1e-5)
        for session in range(4):
            target = np.zeros(2)
            target[int(choice[session])] = reward[session]
            values[session] += disrnn.LEARNING_RATE * (target - values[session])
    assert {*np.unique(sessions.choices), *np.unique(sessions.rewards)} == {0.0, 1.0}


def test_a_choice_is_predicted_from_the_trials_before_it() -> None:
    sessions = disrnn.play(jax.random.key(0), 5, 2)
    xs = disrnn.inputs_of(sessions, jax.random.key(1))
    assert xs.shape == (5, 2, 3)
    np.testing.assert_array_equal(xs[0, :, :2], 0)
    np.testing.assert_array_equal(xs[1:, :, 0], 2 * sessions.choices[:-1] - 1)
    np.testing.assert_array_equal(xs[1:, :, 1], 2 * sessions.rewards[:-1] - 1)


def test_what_a_closed_bottleneck_lets_through() -> None:
    """Of scale 0 and stddev 1: no information, and no gradient to what lies behind it."""
    params = disrnn.init_params(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (6, 3, 3))
    params["inputs"] = {"scale": jnp.array([1.0, 1.0, 0.0]), "log_stddev": jnp.zeros(3)}
    ran = disrnn.run(params, xs, jax.random.key(2))
    assert ran.of_inputs[2] == 0 and (ran.of_inputs[:2] > 0.1).all()
    assert ran.of_latents.shape == (disrnn.LATENTS,) and (ran.of_latents > 0).all()
    gradient = jax.grad(lambda xs: disrnn.run(params, xs, jax.random.key(2)).logits.sum())(xs)
    assert (gradient[..., 2] == 0).all() and (gradient[:-1, :, 0] != 0).all()


def test_the_open_latents_are_the_same_in_the_table_and_in_the_fit(capsys: Any) -> None:
    """They are those above `OPEN`; if there are none, the widest one alone."""
    sessions = disrnn.play(jax.random.key(0), 8, 2)
    latents = jax.random.normal(jax.random.key(1), (8, 2, disrnn.LATENTS))
    for nats, opened in (
        ([0.1, 0.15, 0.0, 0.12, 0.09], [1]),
        ([0.3, 0.15, 0.0, 0.21, 0.0], [0, 3]),
    ):
        ran = disrnn.Ran(latents[..., 0], latents, np.array(nats), np.zeros(3))
        np.testing.assert_array_equal(disrnn.open_latents(ran), latents[..., np.array(opened)])
        disrnn.report(ran, sessions, 0.5)
        found = re.findall(r"^latent (\d) .* open$", capsys.readouterr().out, re.MULTILINE)
        assert sorted(map(int, found)) == opened


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps: must be a whole number of at least 1, got 0"),
        ("--sessions 0", "--sessions: must be a whole number of at least 1, got 0"),
        ("--trials 0", "--trials: must be a whole number of at least 1, got 0"),
        ("--learning-rate nan", "--learning-rate: must be above 0, got nan"),
        ("--out file", "--out must be a folder to write to, got file"),
    ],
)
def test_bad_input_is_one_line_before_training(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(disrnn, "train", lambda _: pytest.fail("it trains"))
    monkeypatch.setattr("sys.argv", ["disrnn.py", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        disrnn.main()
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_short_run_reports_and_plots(tmp_path: Path) -> None:
    short = "--steps 300 --sessions 64 --trials 60 --learning-rate 0.01"
    process = run_example(
        EXAMPLES / "disrnn.py", *short.split(), "--out", tmp_path, trains_long=True
    )
    assert process.returncode == 0, process.stderr
    found = re.match(
        r"Choices of held-out sessions: ([\d.]+) nats each; .*: ([\d.]+); a coin", process.stdout
    )
    assert found is not None
    ours, agents = map(float, found.groups())
    assert agents - 0.01 < ours < 0.6
    lines = process.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:9]] == ["input"] * 3 + ["latent"] * 5
    assert (tmp_path / "disrnn.png").read_bytes().startswith(PNG_SIGNATURE)
