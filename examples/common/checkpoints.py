"""Checkpoints on disk, by Orbax: whole or not there, and checked when they are read."""

import hashlib
import json
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from common import files
from common.packing import pack, unpack

ARRAYS, NOTES = "arrays", "notes"


class CheckpointError(Exception):
    """The checkpoints cannot be used; the message says why and what to do."""


class Checkpoint(NamedTuple):
    """One state of a run."""

    arrays: list[np.ndarray]
    notes: dict[str, Any]  # Whatever JSON can say.


class Checkpoints:
    """The last few checkpoints in a folder.

    Each is written under another name and renamed when it is whole, so that a program that dies
    while it writes leaves the one before. Writing goes on beside the training.

    Args:
      folder: made if it is not there.
      keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        # Of several processes this one alone reads and writes.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=folder.name,
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=False,
                cleanup_tmp_directories=True,
                multiprocessing_options=alone if jax.process_count() > 1 else _DEFAULT,
            ),
        )

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint; a step that is there already stays as it is."""
        if step in self._manager.all_steps():
            return
        # A copy: writing goes on beside the training, to whose lists the next step adds.
        notes = json.loads(json.dumps(checkpoint.notes))
        notes["checksum"] = _checksum(checkpoint)
        notes["layout"] = [(array.dtype.name, array.shape) for array in checkpoint.arrays]
        # As one array: of several, those that Orbax still reads when one turns out to be damaged
        # print tracebacks.
        data = np.frombuffer(pack(checkpoint.arrays), np.uint8)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{ARRAYS: ocp.args.PyTreeSave([data]), NOTES: ocp.args.JsonSave(notes)}
            ),
        )

    def restore(self) -> Checkpoint | None:
        """The newest checkpoint that is not damaged, or None where there is none at all.

        Damaged ones are reported on stderr and set aside, under another name.

        Raises:
          CheckpointError: there are checkpoints, and all are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return self._read(step)
            except Exception as error:  # Whatever reading a broken file can raise.
                aside = self.folder / f"damaged-{step}"
                while aside.exists():
                    aside = aside.with_name(f"{aside.name}-again")
                os.replace(self.folder / str(step), aside)
                self._manager.reload()
                reason = str(error).strip().partition("\n")[0][:200]
                print(
                    f"checkpoint {step} in {self.folder} is damaged, and {aside.name} now "
                    f"({reason})",
                    file=sys.stderr,
                )
        if any(self.folder.glob("damaged-*")):  # Now, or at a call before.
            raise CheckpointError(
                f"all checkpoints in {self.folder} are damaged. To start anew, give another "
                "--checkpoint-dir or delete this one"
            )
        return None

    def _read(self, step: int) -> Checkpoint:
        read = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{ARRAYS: ocp.args.PyTreeRestore(), NOTES: ocp.args.JsonRestore()}
            ),
        )
        notes = dict(read[NOTES])
        checksum, layout = notes.pop("checksum"), notes.pop("layout")
        like = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in layout]
        [data] = read[ARRAYS]
        arrays = unpack(np.asarray(data), like)
        if _checksum(checkpoint := Checkpoint(arrays, notes)) != checksum:
            raise ValueError("its contents are not what was written")
        return checkpoint

    def wait(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is written, and writes no more."""
        self.wait()
        self._manager.close()


_DEFAULT = ocp.options.MultiprocessingOptions()


def fingerprint(arrays: Sequence[np.ndarray]) -> str:
    """What arrays hold, as a short text that differs where they do."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).tobytes() if array.size else b"")
    return digest.hexdigest()[:16]


def _checksum(checkpoint: Checkpoint) -> str:
    notes = json.dumps(checkpoint.notes, sort_keys=True).encode()
    return fingerprint([*checkpoint.arrays, np.frombuffer(notes, np.uint8)])


def read_json(path: Path) -> dict[str, Any]:
    """What a file of a checkpoint folder says.

    Raises:
      CheckpointError: it is damaged.
    """
    try:
        if not isinstance(read := json.loads(path.read_text(encoding="utf-8")), dict):
            raise ValueError("it is no JSON object")
        return read
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): delete it, and the command that trains writes it anew"
        ) from error


def check_configuration(
    folder: Path, configuration: dict[str, Any], may_change: Collection[str] = ()
) -> list[str]:
    """Writes down what the checkpoints in a folder belong to, and compares it with what was there.

    Args:
      folder: made if it is not there.
      configuration: option to value, of what changes the course of a run.
      may_change: options that may have other values than before.

    Returns:
      What has changed, in words.

    Raises:
      CheckpointError: the folder is of another configuration, or what says so is damaged.
    """
    path = folder / "configuration.json"
    configuration = json.loads(json.dumps(configuration))
    there = read_json(path) if path.exists() else configuration
    changes = {
        name: f"{name}: {there.get(name, 'nothing')} there, "
        f"{configuration.get(name, 'nothing')} here"
        for name in sorted(there.keys() | configuration.keys())
        if there.get(name) != configuration.get(name)
    }
    if forbidden := [change for name, change in changes.items() if name not in may_change]:
        differences = "\n  ".join(forbidden)
        raise CheckpointError(
            f"the checkpoints in {folder} are of another configuration:\n  {differences}\n"
            "Give the options as they were, or another --checkpoint-dir"
        )
    files.write(path, json.dumps(configuration, indent=2) + "\n")
    return [*changes.values()]
