"""Spreads a batch over devices, of one process or of several on one or many machines.

Every device holds all parameters and some of the batch's rows. The loss and its gradient are
computed by each device on its own rows, under `jax.shard_map`, and summed over devices once a
training step: no device waits for another at a time step of a recurrence.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from common.packing import pack, unpack

AXIS = "data"
AUTO = "auto"


class DeviceError(Exception):
    """The devices cannot be had or used as asked; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The devices that a batch is spread over; hashable, so that it may be static under jit."""

    mesh: Mesh

    @property
    def count(self) -> int:
        """How many devices there are, of all processes."""
        return self.mesh.size

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints, draws and keeps checkpoints."""
        return jax.process_index() == 0

    def check_batch(self, batch_size: int) -> None:
        """Raises DeviceError unless every device gets as many rows."""
        if batch_size % self.count:
            raise DeviceError(
                f"--batch-size {batch_size} cannot be spread over {self.count} devices: "
                f"give a multiple of {self.count}"
            )

    def rows(self, batch_size: int) -> slice:
        """Which rows of a batch this process reads."""
        share = batch_size // jax.process_count()
        return slice(jax.process_index() * share, (jax.process_index() + 1) * share)

    def split(self, rows: Any, axis: int = 0) -> Any:
        """Arrays spread over the devices, from this process's rows along `axis` of each leaf."""
        sharding = NamedSharding(self.mesh, _along(axis))
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), rows
        )

    def split_whole(self, values: Any, axis: int = 0) -> Any:
        """The same from all rows, which every process has."""
        return self._place(values, _along(axis))

    def replicate(self, values: Any) -> Any:
        """Arrays that every device holds, from values that every process has alike."""
        return self._place(values, PartitionSpec())

    def _place(self, values: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(self.mesh, spec)

        def place(leaf: Any) -> jax.Array:
            value = np.asarray(leaf)
            return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])

        return jax.tree.map(place, values)

    def whole(self, values: Any) -> Any:
        """NumPy arrays of all rows, on every process; all processes have to call it."""

        def fetch(leaf: Any) -> np.ndarray:
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                if leaf.is_fully_replicated:
                    return np.asarray(leaf.addressable_data(0))
                return multihost_utils.process_allgather(leaf, tiled=True)
            return np.asarray(leaf)

        return jax.tree.map(fetch, values)

    def from_main(self, data: bytes) -> bytes:
        """What the main process gives, on every process; all processes have to call it."""
        if jax.process_count() == 1:
            return data
        size = int(multihost_utils.broadcast_one_to_all(np.array(len(data), np.int32)))
        sent = np.frombuffer(data.ljust(size, b"\0")[:size], np.uint8)
        return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes()

    def arrays_from_main(self, arrays: list[np.ndarray] | None, like: Any) -> Any:
        """A pytree like another, of the arrays that the main process gives for its leaves."""
        leaves, structure = jax.tree.flatten(like)
        # As bytes, which come as they are: JAX would send a sum, in which -0.0 becomes 0.0.
        data = self.from_main(pack(arrays or []))
        return jax.tree.unflatten(structure, unpack(data, leaves))

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set on any process; all processes have to call it."""
        if jax.process_count() == 1:
            return flag
        return bool(multihost_utils.process_allgather(np.array(flag)).any())

    def value_and_grad(
        self,
        loss_fn: Callable[..., tuple[jax.Array, jax.Array, Any]],
        model: nnx.Module,
        *batch: Any,
        axis: int = 0,
        key: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, Any], nnx.State]:
        """The mean loss of a batch, what else the loss function returns, and the gradient.

        Args:
          loss_fn: `(model, *batch, key) -> (sum of losses, number of them, anything else)`, for
            some rows of the batch.
          model: its `nnx.Param`s are differentiated. Nothing in it may change in a call: dropout
            is drawn from the key.
          batch: pytrees of arrays with the rows along `axis`.
          axis: of the batch, and of what else the loss function returns.
          key: for dropout; each device gets one of its own.

        Returns:
          `((loss, aux), gradient)`, as `nnx.value_and_grad` with `has_aux`.
        """
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        rows = _along(axis)

        def of_own_rows(params: Any, rest: Any, key: Any, *batch: Any) -> Any:
            own_key = None if key is None else jax.random.fold_in(key, jax.lax.axis_index(AXIS))

            def mean_loss(params: Any) -> Any:
                total, number, aux = loss_fn(nnx.merge(graph, params, rest), *batch, own_key)
                # A device's own, though it may be a constant: a sum takes only what may differ.
                number = number + 0 * jax.lax.axis_index(AXIS)
                # At least 1: a batch may be padding all over.
                number = jnp.maximum(jax.lax.psum(number, AXIS), 1)
                return jax.lax.psum(total, AXIS) / number.astype(total.dtype), aux

            return jax.value_and_grad(mean_loss, has_aux=True)(params)

        everywhere = PartitionSpec()
        return jax.shard_map(
            of_own_rows,
            mesh=self.mesh,
            in_specs=(everywhere, everywhere, everywhere, *(rows for _ in batch)),
            out_specs=((everywhere, rows), everywhere),
        )(params, rest, key, *batch)


def connect(args: argparse.Namespace) -> Group:
    """Joins the other processes, if there are any, and gathers the devices that are asked for.

    To be called before anything is computed.

    Args:
      args: of `options.add_training_arguments`.

    Raises:
      DeviceError: the options do not fit each other, or there are fewer devices.
    """
    if args.coordinator is None and (args.num_processes, args.process_id) != (None, None):
        raise DeviceError(
            "--num-processes and --process-id need the address to meet at: give --coordinator "
            f"HOST:PORT, or --coordinator {AUTO} where the cluster knows it"
        )
    if args.coordinator is not None and args.coordinator != AUTO:
        if None in (args.num_processes, args.process_id):
            raise DeviceError(
                "--coordinator HOST:PORT needs --num-processes and --process-id, another on each"
            )
        if args.process_id >= args.num_processes:
            raise DeviceError(
                f"--process-id {args.process_id}: expected 0 to {args.num_processes - 1}, since "
                f"there are --num-processes {args.num_processes}"
            )
    _make_cpu_devices(args)
    if args.coordinator is not None:
        address = None if args.coordinator == AUTO else args.coordinator
        try:
            jax.distributed.initialize(address, args.num_processes, args.process_id)
        except (RuntimeError, ValueError) as error:
            raise DeviceError(
                f"the processes cannot meet by --coordinator {args.coordinator} ({error}): give "
                "HOST:PORT of the first one, with --num-processes and --process-id"
            ) from error
    available = jax.devices()
    count = args.devices or (1 if args.coordinator is None else len(available))
    if count > len(available):
        raise DeviceError(f"--devices {count}: this machine has {len(available)}")
    if jax.process_count() > 1 and count < len(available):
        raise DeviceError(
            f"--devices {count}: the processes have {len(available)}, and all of "
            "them take part: leave --devices out"
        )
    if jax.process_index() > 0:
        # Every process does the same; only the first one says so.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return Group(Mesh(np.array(available[:count]), (AXIS,), axis_types=(AxisType.Auto,)))


def _make_cpu_devices(args: argparse.Namespace) -> None:
    """Lets a CPU stand for as many devices as are asked for: to try a program, and for tests."""
    if args.devices is None or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    own, rest = divmod(args.devices, args.num_processes or 1)
    if rest:
        raise DeviceError(
            f"--devices {args.devices} is of all processes: give a multiple of "
            f"--num-processes {args.num_processes}"
        )
    # Where JAX has started, devices are made already, and are counted later.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", own)


def _along(axis: int) -> PartitionSpec:
    return PartitionSpec(*(None for _ in range(axis)), AXIS)
