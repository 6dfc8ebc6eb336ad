"""The course of a training run: epochs and steps that an interruption does not lose."""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import numpy as np
from flax import nnx

from common.checkpoints import Checkpoint, CheckpointError, Checkpoints, check_configuration
from common.devices import Group
from common.reporting import Meter

Curves = dict[str, dict[str, list[float]]]
"""Quantity to name to one value an epoch: `{"loss": {"train": [...], "test": [...]}}`."""

# Where things are and how they are reported does not change the course of a run; nor does the
# number of devices, but for rounding.
NOT_IN_CONFIGURATION = {"out", "log_dir", "checkpoint_dir", "save_every", "devices"}
NOT_IN_CONFIGURATION |= {"coordinator", "num_processes", "process_id"}

STEPS_BETWEEN_MEETINGS = 10  # Of several processes, to agree on whether to stop.
LOSSES_AT_ONCE = 20  # Waiting for each would keep an accelerator idle between two steps.


class Run:
    """One training run, which goes on where the newest checkpoint of an earlier one left off.

    ```
    with Run(args, group, modules=(model, optimizer), steps_per_epoch=100) as run:
        for epoch in run.epochs():
            for step in run.steps():
                run.record(train_step(...), len(batch))
            run.end_epoch({"loss": {"train": run.mean_loss(), "test": ...}})
    ```

    What a step does must follow from the modules, the carry, the epoch and the step alone: order
    the data by a generator made from seed and epoch, and draw dropout from `run.key()`. Then a run
    that was interrupted ends with the same weights, to the bit, as one that was not. So does one
    that ended and is given more epochs, unless the number of epochs itself has a say in its steps,
    as in that of a learning rate that falls until the last one.

    Args:
      args: of `options.add_training_arguments`, with `epochs` and `seed`.
      group: the devices.
      modules: their variables, but random state, are what is trained and kept; the first is the
        model. They are placed on all devices.
      steps_per_epoch: as it says.
      carry: state that goes from one step to the next, and starts every epoch anew: a pytree of
        arrays of all rows. `run.carry` holds it, spread over the devices.
      carry_axis: of its rows.
      data: what the run learns from, as a short text that differs where the data does.
      unit: what `record` counts.
      best: quantity and name; the weights of the epoch where it was least are kept.

    Raises:
      CheckpointError: the checkpoint folder is of another configuration, or damaged.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        group: Group,
        *,
        modules: tuple[nnx.Module, ...],
        steps_per_epoch: int,
        carry: Any = None,
        carry_axis: int = 0,
        data: str = "",
        unit: str = "sequences",
        best: tuple[str, str] | None = None,
    ) -> None:
        self.epoch, self.step = 1, 0
        self.curves: Curves = {}
        self._args, self._group, self._modules, self._unit = args, group, modules, unit
        self._steps_per_epoch = steps_per_epoch
        self._initial_carry, self._carry_axis = carry, carry_axis
        self._best, self._best_params = best, None
        self._losses: list[float] = []  # Of this epoch,
        self._waiting: list[jax.Array] = []  # and the last of them, which may not be there yet.
        self._meter: Meter | None = None
        self._signal: int | None = None
        self._checkpoints = self._best_checkpoints = self._writer = None
        self.carry = group.split_whole(carry, carry_axis)
        if args.checkpoint_dir is not None:
            self._open_checkpoints(_configuration(args, data, steps_per_epoch))
        for module, values in zip(modules, group.replicate(self._state()), strict=True):
            nnx.update(module, values)
        if args.log_dir is not None and group.is_main:
            # Not above: it takes two seconds where PyTorch is installed, which it looks for.
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(args.log_dir), purge_step=self.global_step)

    @property
    def global_step(self) -> int:
        """How many steps have been done."""
        return (self.epoch - 1) * self._steps_per_epoch + self.step

    def key(self) -> jax.Array:
        """A random key for this step."""
        return jax.random.fold_in(jax.random.key(self._args.seed), self.global_step)

    def epochs(self) -> Iterator[int]:
        """The epochs still to do, from 1."""
        while self.epoch <= self._args.epochs:
            epoch = self.epoch
            yield epoch
            if self.epoch == epoch:
                raise RuntimeError("end_epoch was not called in the body of the loop over epochs")

    def steps(self) -> Iterator[int]:
        """The steps of this epoch still to do, from 0."""
        width = len(str(self._args.epochs))
        name = f"epoch {self.epoch:{width}}/{self._args.epochs}"
        with Meter(name, self._steps_per_epoch, self.step, self._unit) as self._meter:
            while self.step < self._steps_per_epoch:
                yield self.step
                self.step += 1
                self._stop_if_asked()
                is_last = self.step == self._steps_per_epoch  # After it end_epoch saves.
                if self.global_step % self._args.save_every == 0 and not is_last:
                    self._save()

    def record(self, loss: jax.Array, size: int) -> None:
        """Notes a step's loss, and how many units it has learnt from."""
        self._waiting.append(loss)
        self._meter.advance(size)
        if len(self._waiting) == LOSSES_AT_ONCE:
            self._fetch_losses()

    def mean_loss(self) -> float:
        """Of this epoch's steps."""
        self._fetch_losses()
        return float(np.mean(self._losses))

    def end_epoch(self, values: dict[str, dict[str, float]]) -> None:
        """Notes what was measured, prints it and keeps a checkpoint.

        Args:
          values: quantity to name to value: `{"loss": {"train": 0.3, "test": 0.4}}`.
        """
        self._fetch_losses()
        for quantity, lines in values.items():
            for name, value in lines.items():
                self.curves.setdefault(quantity, {}).setdefault(name, []).append(float(value))
                if self._writer is not None:
                    self._writer.add_scalar(f"{quantity}/{name}", value, self.global_step)
        self._print_epoch(values)
        if self._best is not None:
            self._keep_if_best()
        self.epoch, self.step, self._losses = self.epoch + 1, 0, []
        self.carry = self._group.split_whole(self._initial_carry, self._carry_axis)
        self._save()
        self._stop_if_asked()

    def use_best(self) -> None:
        """Gives the model the weights of its best epoch."""
        if self._best_params is not None:
            self._set_params(self._best_params)
            return
        if (folder := self._args.checkpoint_dir) is None:
            return
        found = self._read_on_main(lambda: _read_best(self._best_checkpoints, folder))
        self._set_params(self._group.arrays_from_main(found and found.arrays, self._params()))

    def __enter__(self) -> Self:
        self._handlers = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for closable in (self._checkpoints, self._best_checkpoints, self._writer):
            if closable is not None:
                closable.close()

    def _open_checkpoints(self, configuration: dict[str, Any]) -> None:
        """Goes on from the newest checkpoint, if there is one."""
        changes, folder = [], self._args.checkpoint_dir

        def open_and_read() -> Checkpoint | None:
            changes.extend(check_configuration(folder, configuration, may_change={"--epochs"}))
            self._checkpoints = Checkpoints(folder / "last")
            if self._best is not None:
                self._best_checkpoints = Checkpoints(folder / "best", keep=1)
            return self._checkpoints.restore()

        found = self._read_on_main(open_and_read)
        notes = self._group.from_main(json.dumps(found and found.notes).encode())
        if (position := json.loads(notes)) is None:
            return
        done = position["epoch"] - (not position["step"])  # The epoch that has begun counts.
        if done > self._args.epochs:
            raise CheckpointError(
                f"the run in {folder} has come to epoch {done}, further than --epochs "
                f"{self._args.epochs}: give at least {done}, or another --checkpoint-dir"
            )
        like = self._state(), self._initial_carry
        state, carry = self._group.arrays_from_main(found and found.arrays, like)
        for module, values in zip(self._modules, state, strict=True):
            nnx.update(module, values)
        self.carry = self._group.split_whole(carry, self._carry_axis)
        self.epoch, self.step = position["epoch"], position["step"]
        self.curves, self._losses = position["curves"], position["losses"]
        finished = self.epoch > self._args.epochs
        where = "its end" if finished else f"epoch {self.epoch}, step {self.step}"
        print(", ".join([f"going on from {where}, found in {folder}", *changes]), flush=True)

    def _read_on_main(self, read: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        """What the main process reads, there. Where it cannot, all processes end alike."""
        found, error = None, ""
        if self._group.is_main:
            try:
                found = read()
            except CheckpointError as problem:
                error = str(problem)
        if error := self._group.from_main(error.encode()).decode():
            raise CheckpointError(error)
        return found

    def _save(self) -> None:
        self._fetch_losses()
        if self._args.checkpoint_dir is None:
            return
        arrays = jax.tree.leaves(self._group.whole((self._state(), self.carry)))
        notes = {
            "epoch": self.epoch,
            "step": self.step,
            "curves": self.curves,
            "losses": self._losses,
        }
        if self._checkpoints is not None:
            # The end of an epoch is another state than its last step.
            self._checkpoints.save(self.global_step + self.epoch, Checkpoint(arrays, notes))

    def _stop_if_asked(self) -> None:
        if jax.process_count() > 1 and self.global_step % STEPS_BETWEEN_MEETINGS:
            return
        if not self._group.any_process(self._signal is not None):
            return
        self._save()
        where = f"epoch {self.epoch}, step {self.step}"
        if self._args.checkpoint_dir is None:
            print(f"stopped in {where}; nothing is kept without --checkpoint-dir", flush=True)
        else:
            print(
                f"stopped in {where} and saved to {self._args.checkpoint_dir}: the same command "
                "goes on from there",
                flush=True,
            )
        sys.exit(128 + (self._signal or signal.SIGTERM))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(number, self._handlers[number])  # A second one does not wait.

    def _fetch_losses(self) -> None:
        for loss in self._waiting:
            self._losses.append(float(loss))
            if self._writer is not None:
                step = (self.epoch - 1) * self._steps_per_epoch + len(self._losses)
                self._writer.add_scalar("loss/step", self._losses[-1], step)
        if self._waiting and self._meter is not None:
            self._meter.show(self._losses[-1])
        self._waiting = []

    def _print_epoch(self, values: dict[str, dict[str, float]]) -> None:
        width = len(str(self._args.epochs))
        measured = ", ".join(
            f"{name} {quantity} {value:.4f}"
            for quantity, lines in values.items()
            for name, value in lines.items()
        )
        print(
            f"epoch {self.epoch:{width}}/{self._args.epochs}: {measured}, "
            f"{self._meter.speed:,.0f} {self._unit}/s",
            flush=True,
        )

    def _keep_if_best(self) -> None:
        quantity, name = self._best
        values = self.curves[quantity][name]
        if values[-1] > min(values):
            return
        self._best_params = self._group.whole(self._params())
        if self._best_checkpoints is not None:
            arrays = jax.tree.leaves(self._best_params)
            notes = {"epoch": self.epoch, quantity: {name: values[-1]}}
            self._best_checkpoints.save(self.epoch, Checkpoint(arrays, notes))
            self._best_checkpoints.wait()  # Or a run that goes on later might miss its best.

    def _state(self) -> tuple[nnx.State, ...]:
        return tuple(nnx.state(module, nnx.Not(nnx.RngState)) for module in self._modules)

    def _params(self) -> nnx.State:
        return nnx.state(self._modules[0], nnx.Param)

    def _set_params(self, values: nnx.State) -> None:
        nnx.update(self._modules[0], self._group.replicate(values))


def load_best(folder: Path, model: nnx.Module) -> None:
    """Gives a model the best weights that a run with `best` has kept in its checkpoint folder.

    Raises:
      CheckpointError: there are none, or they are damaged.
    """
    checkpoints = Checkpoints(folder / "best", keep=1) if (folder / "best").is_dir() else None
    found = _read_best(checkpoints, folder)
    checkpoints.close()
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(params), found.arrays))


def _read_best(checkpoints: Checkpoints | None, folder: Path) -> Checkpoint:
    found = checkpoints.restore() if checkpoints else None
    if found is None:
        raise CheckpointError(
            f"{folder} holds no best weights: give the --checkpoint-dir of a run that has "
            "finished an epoch"
        )
    return found


def _configuration(args: argparse.Namespace, data: str, steps_per_epoch: int) -> dict[str, Any]:
    """What changes the course of a run: options, and what files hold rather than where they are."""
    options = {
        "--" + name.replace("_", "-"): value
        for name, value in vars(args).items()
        if name not in NOT_IN_CONFIGURATION and not isinstance(value, Path)
    }
    return {**options, "data": data, "steps per epoch": steps_per_epoch}
