"""Checkpoints for training runs.

A run that is killed at any moment resumes from the last one when it is started again.

    checkpoints = open_checkpoints(folder, settings, every=100)
    state = checkpoints.restore(state)
    for step in range(int(state.step), steps):
        state = train_step(state)
        checkpoints.save(step + 1, state, last=step + 1 == steps)

Orbax writes them, as tensors and JSON: `STEP/state` and `STEP/settings`. Each also has checksums of
its files, because Orbax does not notice a flipped bit in a large array. With
several processes, the folder is one that all of them see, and all of them call everything here.
"""

import hashlib
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

CHECKSUMS = "checksums.json"
KEPT = 3

State = TypeVar("State")


class CheckpointError(Exception):
    """The folder cannot be used, or its checkpoints are of another run; one line says why."""


class Checkpoints(NamedTuple):
    """The checkpoints of one training run.

    Attributes:
      manager: Orbax's, of the folder where they are.
      settings: all that decides the run's numbers, for JSON.
      every: how many steps there are from one checkpoint to the next.
      newest: the step to resume from; None for the beginning.
    """

    manager: ocp.CheckpointManager
    settings: Mapping[str, Any]
    every: int
    newest: int | None

    def restore(self, state: State) -> State:
        """The state to resume from, sharded as the one given; at the beginning, the one given."""
        if self.newest is None:
            return state
        target = ocp.checkpoint_utils.construct_restore_args(state)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(state, restore_args=target))
        restored = self.manager.restore(self.newest, args=args)["state"]
        return jax.tree.map(committed_as, state, restored)

    def save(self, step: int, state: Any, last: bool) -> None:
        """Saves the state after `step` steps, if it is the turn of these or they were the last.

        Raises:
          CheckpointError: it cannot be written. The older ones are as they were.
        """
        if step % self.every and not last:
            return
        try:
            self._save(step, state)
        except (OSError, ValueError) as error:  # Orbax gives a full disk as a ValueError.
            full = "No space left on device" in str(error)
            reason = "no space is left on the device" if full else str(error).splitlines()[0]
            raise CheckpointError(
                f"checkpoint {step} cannot be saved in {self.manager.directory}: {reason}"
            ) from None

    def _save(self, step: int, state: Any) -> None:
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), settings=ocp.args.JsonSave(dict(self.settings))
        )
        self.manager.save(step, args=args, force=True)
        if jax.process_index() == 0:  # All processes have written by now.
            folder = Path(self.manager.directory) / str(step)
            half_written = folder / f"{CHECKSUMS}.tmp"
            half_written.write_text(json.dumps(compute_checksums(folder), indent=2) + "\n")
            half_written.replace(folder / CHECKSUMS)


def committed_as(given: jax.Array, restored: jax.Array) -> jax.Array:
    """Returns `restored`, uncommitted to devices if `given` was uncommitted.

    Otherwise a run that resumes would compile its programs anew, cached or not.
    """
    return restored if given.committed else jnp.asarray(np.asarray(restored))


def open_checkpoints(
    folder: Path, settings: Mapping[str, Any], every: int, *, read_only: bool = False
) -> Checkpoints:
    """Finds the checkpoint to resume from; prints it, and those that it skips, on stderr.

    A damaged checkpoint is renamed to `STEP.damaged`, so that its step can be saved again. With
    `read_only` all files stay as they are: a training that runs may be writing one.

    Raises:
      CheckpointError: the folder is not there or cannot be written to, or is from other settings.
    """
    if read_only and not folder.is_dir():
        raise CheckpointError(f"--checkpoint must be a folder with checkpoints, got {folder}")
    if not read_only:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            message = f"--checkpoint must be a folder to write to, got {folder}: {error.strerror}"
            raise CheckpointError(message) from None
    # Process 0 looks, and all resume from the one that it finds.
    first = jax.process_index() == 0
    newest = find_newest(folder, clean_up=not read_only) if first else None
    newest = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if newest is None else newest)))
    manager = build_manager(folder)
    if newest < 0:
        return Checkpoints(manager, settings, every, None)
    args = ocp.args.Composite(settings=ocp.args.JsonRestore())
    check_settings(folder, manager.restore(newest, args=args)["settings"], settings)
    say(f"resuming from checkpoint {newest} in {folder}")
    return Checkpoints(manager, settings, every, newest)


def build_manager(folder: Path) -> ocp.CheckpointManager:
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Failures are raised too, in one line.
    # One process writes each array. Writing it in pieces from all processes needs a JAX newer than
    # 0.7.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    registry = ocp.handlers.create_default_handler_registry(
        state=ocp.PyTreeCheckpointHandler(type_handler_registry=types),
        settings=ocp.JsonCheckpointHandler(),
    )
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options, handler_registry=registry)


def check_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if names:
        changes = ", ".join(f"{name} is {new.get(name)} and was {old.get(name)}" for name in names)
        raise CheckpointError(
            f"{folder} has checkpoints of a run with other settings: {changes}; "
            f"use the old settings, or another --checkpoint folder"
        )


def find_newest(folder: Path, *, clean_up: bool) -> int | None:
    """The newest step that is whole.

    To `clean_up` removes half-written checkpoints, and renames the damaged ones that are newer.
    """
    half_written = [*folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*")]
    for path in half_written:
        say(f"skipped checkpoint {path.name.partition('.')[0]} in {folder}: it is half-written")
        if clean_up:
            shutil.rmtree(path)
    found = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    for path in sorted(found, key=lambda path: int(path.name), reverse=True):
        damage = find_damage(path)
        if damage is None:
            return int(path.name)
        say(f"skipped checkpoint {path.name} in {folder}: {damage}")
        if clean_up:
            aside = path.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    if clean_up and (half_written or found):
        say(f"no good checkpoint in {folder}: starting from the beginning")
    return None


def find_damage(folder: Path) -> str | None:
    """The damage to a checkpoint, in a few words; None if it is whole."""
    try:
        written, found = json.loads((folder / CHECKSUMS).read_bytes()), compute_checksums(folder)
        differing = {name for name, _ in written.items() ^ found.items()}
    except FileNotFoundError:
        return f"it is half-written, without {CHECKSUMS}"
    except OSError as error:
        return str(error)
    except (ValueError, AttributeError, TypeError):
        return f"{CHECKSUMS} is damaged"
    if not differing:
        return None
    name = min(differing)
    return f"{name} is {'missing' if name not in found else 'damaged'}"


def compute_checksums(folder: Path) -> dict[str, str]:
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(CHECKSUMS):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            checksums[path.relative_to(folder).as_posix()] = digest
    return checksums


def say(message: str) -> None:
    """Prints to stderr, from process 0 only."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)
