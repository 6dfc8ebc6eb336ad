"""A recurrent layer of seqjax with a linear readout, trained on any task."""

import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from common import options, reporting

import seqjax
from tasks.base import Batch, Settings, Task

CELLS = {"lstm": seqjax.LSTMCell, "gru": seqjax.GRUCell, "rnn": seqjax.RNNCell}


class Params(NamedTuple):
    """Weights of the recurrent layer, and of the readout: `(hidden, outputs)`, `(outputs,)`."""

    cell: Any
    weight: jax.Array
    bias: jax.Array


def init(cell: seqjax.Cell, outputs: int, key: jax.Array, dtype: jnp.dtype) -> Params:
    """PyTorch's initial weights, but for the bias of an LSTM's forget gate, which is 1."""
    cell_key, weight_key = jax.random.split(key)
    weights = cell.init(cell_key, dtype)
    size = cell.output_size
    if isinstance(cell, seqjax.LSTMCell):
        # Gates in the order i f g o. The other of the two biases is small.
        weights = weights._replace(b_ih=weights.b_ih.at[size : 2 * size].set(1))
    draw = seqjax.initializers.torch_uniform(size)
    return Params(weights, draw(weight_key, (size, outputs), dtype), jnp.zeros(outputs, dtype))


def predict(
    cell: seqjax.Cell,
    params: Params,
    inputs: jax.Array,
    mask: jax.Array | None,
    compute: jnp.dtype,
) -> jax.Array:
    """Inputs `(T, batch, features)` to outputs `(T, batch, outputs)` in the parameters' dtype."""
    weights = jax.tree.map(lambda array: array.astype(compute), params.cell)
    _, states = seqjax.scan(cell, weights, inputs.astype(compute), mask=mask)
    # Not in 16 bits: the loss is exact where only the recurrence has them.
    return states.astype(params.weight.dtype) @ params.weight + params.bias[None, None]


def mean_loss(outputs: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy where targets are class numbers, else squared error; where they count."""
    if jnp.issubdtype(batch.targets.dtype, jnp.integer):
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch.targets)
    else:
        losses = (outputs[..., 0] - batch.targets) ** 2
    return jnp.mean(losses, where=batch.counts)


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    return optax.chain(optax.clip_by_global_norm(settings.clip), optax.adam(schedule))


class State(NamedTuple):
    """What changes in training."""

    params: Params
    optimizer: optax.OptState


@functools.partial(
    jax.jit, static_argnames=("task", "cell", "settings", "compute"), donate_argnames="state"
)
def train_chunk(
    state: State,
    key: jax.Array,
    data: Any,
    *,
    task: Task,
    cell: seqjax.Cell,
    settings: Settings,
    compute: jnp.dtype,
) -> tuple[State, jax.Array]:
    """Many updates in one compiled call, on batches made inside it, and their mean loss."""

    def update(state: State, key: jax.Array) -> tuple[State, jax.Array]:
        batch = task.sample(key, data, settings.batch_size)

        def loss_of(params: Params) -> jax.Array:
            return mean_loss(predict(cell, params, batch.inputs, batch.mask, compute), batch)

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, optimizer = make_optimizer(settings).update(gradients, state.optimizer)
        return State(optax.apply_updates(state.params, updates), optimizer), loss

    state, losses = jax.lax.scan(update, state, jax.random.split(key, settings.chunk))
    return state, losses.mean()


class Outcome(NamedTuple):
    """What a run gave. `losses` has the mean of each chunk of `settings.chunk` updates."""

    measures: dict[str, float]
    steps: int
    parameters: int
    seconds: float
    sequences_per_second: float
    losses: list[float]


def run(
    task: Task, cell_name: str, settings: Settings, seed: int, dtypes: options.DTypes
) -> Outcome:
    """Trains on a task from nothing, and measures.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    started = time.perf_counter()
    init_key, train_key = jax.random.split(jax.random.key(seed))
    data = jax.tree.map(jnp.asarray, task.load(seed))
    features = jax.eval_shape(lambda: task.sample(train_key, data, 1)).inputs.shape[-1]
    cell = CELLS[cell_name](features, settings.hidden_size)
    params = init(cell, task.outputs, init_key, dtypes.params)
    state = State(params, make_optimizer(settings).init(params))
    static = {"task": task, "cell": cell, "settings": settings, "compute": dtypes.compute}
    losses: list[float] = []
    with reporting.Meter(f"{task.name} {cell_name} seed {seed}", settings.steps) as meter:
        for chunk in range(settings.steps // settings.chunk):
            state, loss = train_chunk(state, jax.random.fold_in(train_key, chunk), data, **static)
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"{task.name} {cell_name} seed {seed}: the loss is {losses[-1]} after "
                    f"{(chunk + 1) * settings.chunk} steps"
                )
            meter.advance(settings.chunk * settings.batch_size, settings.chunk)
            meter.show(losses[-1])
            if losses[-1] < settings.solved_loss:
                break
    apply = jax.jit(functools.partial(predict, cell, compute=dtypes.compute))
    measures = task.evaluate(functools.partial(apply, state.params), seed)
    return Outcome(
        measures,
        len(losses) * settings.chunk,
        sum(array.size for array in jax.tree.leaves(params)),
        time.perf_counter() - started,
        meter.speed,
        losses,
    )
