"""Programs of the peers that are written in JAX: each brings a `Network` and a `Stepper`."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.cases import Case
from benchmarks.data import Data
from benchmarks.peers import program
from benchmarks.results import DEVICES


class Network(NamedTuple):
    """A layer over whole sequences.

    Attributes:
      convert: `Data.weights` -> the library's parameters, in JAX, so that its transpose brings the
        gradients back.
      apply: `(params, xs, lengths)` -> `(states, ys)`; states by layer and direction, h before c.
      batch_major: xs and ys are (batch, time, features) and not (time, batch, features).
    """

    convert: Callable[[Any], Any]
    apply: Callable[[Any, jax.Array, jax.Array | None], tuple[Any, jax.Array]]
    batch_major: bool = False


class Stepper(NamedTuple):
    """A cell, one step at a time.

    Attributes:
      convert: `CellWeights` -> the library's parameters.
      step: `(params, carry, x)` -> `(carry, y)`.
      initial_carry: the library's, of zeros.
    """

    convert: Callable[[Any], Any]
    step: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]]
    initial_carry: Any


class JaxPeer(program.Peer):
    """A library on JAX: says what it computes, and this compiles it.

    Args:
      settings: of the run.
      variant: "devices" makes a device for each core and spreads the rows over them.
    """

    def __init__(self, settings: program.Settings, variant: str | None = None) -> None:
        super().__init__(settings)
        self.devices = settings.threads if variant == DEVICES else 1
        jax.config.update("jax_enable_x64", settings.dtype == "float64")
        if settings.device == "cpu":
            jax.config.update("jax_platforms", "cpu")
            if self.devices > 1:
                jax.config.update("jax_num_cpu_devices", self.devices)
        else:
            jax.config.update("jax_default_matmul_precision", "highest")  # No TF32.
        if jax.default_backend() != settings.device:
            raise RuntimeError(f"JAX finds no {settings.device}, only {jax.devices()}")
        jnp.zeros(()).block_until_ready()  # Whatever starts at the first operation starts now.

    def network(self, case: Case) -> Network:
        """The layer of a case in mode "forward" or "train"."""
        raise NotImplementedError

    def stepper(self, case: Case) -> Stepper:
        """The cell of a case in mode "step" or "decode"."""
        raise NotImplementedError

    def clear(self) -> None:
        jax.clear_caches()

    def unsupported(self, case: Case) -> str | None:
        if case.batch % self.devices:
            return f"batch {case.batch} is not a multiple of {self.devices} devices"
        return None

    def program(self, case: Case, data: Data) -> "JaxProgram":
        dtype = jnp.dtype(self.settings.dtype)
        data = jax.tree.map(lambda a: a.astype(dtype) if a.dtype == float else a, data)
        if case.mode in ("step", "decode"):
            return _step_program(case, data, self.stepper(case))
        return _sequence_program(case, data, self.network(case), self.devices)


class JaxProgram:
    """A function compiled for its arguments; see `program.Program`."""

    def __init__(
        self, function: Callable[..., Any], args: Any, canonical: Callable[[Any], Any]
    ) -> None:
        """Compiles.

        Args:
          function: what is called.
          args: what with; NumPy arrays are moved to the device.
          canonical: result -> what `values` returns, as a pytree.
        """
        self.args = jax.block_until_ready(jax.tree.map(jnp.asarray, args))
        self.canonical = canonical
        self.function = jax.jit(function)
        start = time.perf_counter()
        # The calls below find what is compiled here: nothing compiles twice.
        compiled = self.function.lower(*self.args).compile()
        self.first_call = time.perf_counter() - start
        analysis = compiled.memory_analysis()
        self.memory = analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    def call(self) -> Any:
        return jax.block_until_ready(self.function(*self.args))

    def values(self) -> list[np.ndarray]:
        leaves = jax.tree.leaves(self.canonical(self.call()))
        # 16-bit floats widen exactly; tokens stay integers.
        return [np.asarray(a, int if a.dtype.kind == "i" else float) for a in leaves]


class _StepProgram(JaxProgram):
    """A loop in Python over a compiled step, as a server answers token by token."""

    def __init__(self, steps: int, *args: Any) -> None:
        super().__init__(*args)
        self.steps = steps

    def call(self) -> Any:
        params, carry, x = self.args
        for _ in range(self.steps):
            carry, y = self.function(params, carry, x)
        return jax.block_until_ready((carry, y))


def _sequence_program(case: Case, data: Data, network: Network, devices: int) -> JaxProgram:
    weights = jax.tree.map(jnp.asarray, data.weights)
    params, transpose = jax.vjp(jax.jit(network.convert), weights)

    def layout(array: Any) -> Any:
        return array.swapaxes(0, 1) if network.batch_major else array

    def train(params: Any, xs: Any, lengths: Any, cotangent: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(network.apply(params, xs, lengths)[1] * cotangent)

        result = jax.value_and_grad(loss)(params)
        return result if devices == 1 else lax.psum(result, DEVICES)

    rows = P(DEVICES) if network.batch_major else P(None, DEVICES)
    args = (params, layout(data.xs), data.lengths)
    in_specs = (P(), rows, P(DEVICES))
    if case.mode == "train":
        args, in_specs = (*args, layout(data.cotangent)), (*in_specs, rows)
        function, args = _spread(train, args, devices, in_specs, P())
        return JaxProgram(function, args, lambda result: transpose(result[1]))
    function, args = _spread(network.apply, args, devices, in_specs, (P(DEVICES), rows))
    # Padded outputs are a library's own affair.
    return JaxProgram(function, args, lambda result: (layout(result[1]) * data.mask, result[0]))


def _spread(
    function: Callable[..., Any], args: Any, devices: int, in_specs: Any, out_specs: Any
) -> tuple[Callable[..., Any], Any]:
    """The function on several devices, and its arguments there."""
    if devices == 1:
        return function, args
    mesh = jax.make_mesh((devices,), (DEVICES,), axis_types=(jax.sharding.AxisType.Auto,))
    # check_vma wants of a loop's initial state that it says on which devices it differs, which
    # only seqjax does.
    function = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    args = tuple(
        jax.device_put(arg, NamedSharding(mesh, spec))
        for arg, spec in zip(args, in_specs, strict=True)
    )
    return function, args


def _step_program(case: Case, data: Data, stepper: Stepper) -> JaxProgram:
    params = stepper.convert(jax.tree.map(jnp.asarray, data.weights[0][0]))
    carry = stepper.initial_carry
    if case.mode == "step":
        args = (params, carry, data.xs[0])
        return _StepProgram(case.time, stepper.step, args, lambda result: result[1])

    def decode(params: Any, carry: Any, embedding: jax.Array, head: jax.Array) -> jax.Array:
        def next_token(state: Any, _: None) -> tuple[Any, jax.Array]:
            carry, token = state
            carry, y = stepper.step(params, carry, embedding[token])
            token = jnp.argmax(y @ head, axis=-1)
            return (carry, token), token

        return lax.scan(next_token, (carry, jnp.zeros(1, int)), length=case.time)[1]

    return JaxProgram(decode, (params, carry, data.embedding, data.head), lambda tokens: tokens)
