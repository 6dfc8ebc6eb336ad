"""What every layer and every implementation has to fulfil, one function a property.

`test_contract.py` runs all of them over `cases.LAYERS`; a layer or an implementation of your own
can be passed through the same functions.
"""

import functools
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import seqjax

PATTERNS = ["111111", "111000", "000111", "101010", "011001", "000000"]
"""A row of the mask each: full, right padding, left padding, gaps, gaps, length 0."""
MASK = np.array([[step == "1" for step in row] for row in PATTERNS]).T
STEPS, ROWS = MASK.shape
HALF_ROWS = [1, 2, 3, 4]
"""The rows of `HALF` valid steps, whatever their pattern."""
HALF = STEPS // 2
EMPTY_ROW = PATTERNS.index("000000")
ALL_VALID = np.ones_like(MASK)


class Case(NamedTuple):
    """Random arguments of `evaluate`."""

    params: Any
    xs: Any
    carry: Any
    cotangents: Any  # Of the results `(carry, ys)`.


class Evaluation(NamedTuple):
    """What `evaluate` gives."""

    carry: Any
    ys: Any
    grads: Any  # Of params, xs and carry, as a Case without cotangents.


def quick_jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` that compiles about four times as fast, to slower code."""
    return jax.jit(function, compiler_options=_quick_compiler_options(), **options)


@functools.cache
def _quick_compiler_options() -> dict[str, Any] | None:
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    }
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # Another XLA, without these options.
        return None
    return options


def scan(
    layer: seqjax.Layer, params: Any, xs: Any, carry: Any, *, implementation: str | None, **kw: Any
) -> tuple[Any, jax.Array]:
    """`seqjax.scan`; skips the test where a named implementation says that it does not apply."""
    try:
        return seqjax.scan(layer, params, xs, carry, implementation=implementation, **kw)
    except ValueError as error:
        # The plain scan and the default always apply, and any other message is a mistake.
        if implementation in (None, "scan") or repr(implementation) not in str(error):
            raise
        pytest.skip(f"{implementation} does not apply: {error}")


def _evaluate(
    layer: seqjax.Layer,
    case: Case,
    mask: Any = None,
    *,
    implementation: str | None = None,
    reverse: bool = False,
) -> Evaluation:
    """The results, and the gradients of their product with the case's cotangents."""

    def run(params: Any, xs: Any, carry: Any) -> Any:
        return scan(
            layer, params, xs, carry, mask=mask, implementation=implementation, reverse=reverse
        )

    (carry, ys), pullback = jax.vjp(run, *case[:3])
    return Evaluation(carry, ys, Case(*pullback(case.cotangents), None))


# A program is compiled once, whichever check asks for it first.
_compiled = quick_jit(_evaluate, static_argnums=0, static_argnames=("implementation", "reverse"))
_run = quick_jit(scan, static_argnums=0, static_argnames="implementation")


def evaluate(layer: seqjax.Layer, case: Case, mask: Any = None, **options: Any) -> Evaluation:
    """`_evaluate`, compiled, with NumPy arrays in and out."""
    return jax.device_get(_compiled(layer, case, mask, **options))


@functools.cache
def abstract_case(
    layer: seqjax.Layer, batch_shape: tuple[int, ...], steps: int, dtype: Any
) -> Case:
    """Shapes and dtypes of a case."""
    with jax.enable_x64(True):  # For float64; other dtypes are asked for by name and stay.
        params = jax.eval_shape(lambda: layer.init(jax.random.key(0), dtype))
        xs = jax.ShapeDtypeStruct((steps, *batch_shape, layer.input_size), dtype)
        carry = jax.eval_shape(lambda: layer.initial_carry(batch_shape, dtype))
        results = jax.eval_shape(functools.partial(seqjax.scan, layer), params, xs, carry)
    return Case(params, xs, carry, results)


@functools.cache
def make_case(
    layer: seqjax.Layer,
    batch_shape: tuple[int, ...] = (ROWS,),
    steps: int = STEPS,
    dtype: Any = jnp.float32,
) -> Case:
    """Random arguments for `evaluate`, as NumPy arrays: slicing them compiles nothing."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.7 * rng.standard_normal(leaf.shape)).astype(leaf.dtype),
        abstract_case(layer, batch_shape, steps, dtype),
    )


def with_value(leaf: np.ndarray, index: Any, value: float) -> np.ndarray:
    """A copy with something else in its place."""
    leaf = leaf.copy()
    leaf[index] = value
    return leaf


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, in structure and dtypes too."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_zero(values: Any) -> None:
    """Exact zeros, no -1e-30 and no NaN."""
    np.testing.assert_array_equal(np.asarray(values), 0)


def rows(tree: Any, index: Any) -> Any:
    """Some rows of a carry."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def check_agrees_with_scan(layer: seqjax.Layer, implementation: str | None) -> None:
    """The implementation means what the plain scan means: values and gradients."""
    case = make_case(layer)
    expected = evaluate(layer, case, MASK, implementation="scan")
    assert_close(evaluate(layer, case, MASK, implementation=implementation), expected)


def check_is_the_whole_sequence(layer: seqjax.Layer, implementation: str | None) -> None:
    """The same program as "xla", to the letter."""
    case = make_case(layer)

    def program(name: str | None) -> str:
        run = functools.partial(seqjax.scan, layer, implementation=name, mask=MASK)
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(run)(case.params, case.xs)))

    assert program(implementation) == program("xla") != program("scan")


# Padding.


def check_padding_never_leaks(layer: seqjax.Layer, implementation: str | None) -> None:
    """Whatever stands in padded inputs, or reaches the padded outputs' gradient, is not seen."""
    case = make_case(layer)
    run = functools.partial(evaluate, layer, implementation=implementation)
    clean = run(case, MASK)
    assert_zero(clean.ys[~MASK])
    assert_zero(clean.grads.xs[~MASK])
    assert np.all(np.any(clean.grads.xs[MASK] != 0, axis=-1))
    carry_cotangent, ys_cotangent = case.cotangents
    for garbage in (np.nan, np.inf, -1e30):
        dirty = case._replace(
            xs=with_value(case.xs, ~MASK, garbage),
            cotangents=(carry_cotangent, with_value(ys_cotangent, ~MASK, garbage)),
        )
        chex.assert_trees_all_equal(run(dirty, MASK), clean)


def check_rows_never_leak(layer: seqjax.Layer, implementation: str | None) -> None:
    """NaN in the inputs and state of one row changes no other row."""
    case = make_case(layer)
    clean = evaluate(layer, case, MASK, implementation=implementation)
    for bad in (0, 3):
        poisoned = case._replace(
            xs=with_value(case.xs, np.s_[:, bad], np.nan),
            carry=jax.tree.map(lambda leaf, bad=bad: with_value(leaf, bad, np.nan), case.carry),
        )
        dirty = evaluate(layer, poisoned, MASK, implementation=implementation)
        assert np.isnan(dirty.ys[:, bad][MASK[:, bad]]).all()
        others = np.arange(ROWS) != bad
        assert_close(dirty.ys[:, others], clean.ys[:, others], 1e-6)
        assert_close(dirty.grads.xs[:, others], clean.grads.xs[:, others], 1e-6)
        assert_close(rows(dirty.carry, others), rows(clean.carry, others), 1e-6)
        assert_close(rows(dirty.grads.carry, others), rows(clean.grads.carry, others), 1e-6)


def check_masked_rows_equal_rows_alone(layer: seqjax.Layer, implementation: str | None) -> None:
    """A masked row gives what its valid steps alone give: values and gradients."""
    case = make_case(layer)
    valid = np.stack([np.flatnonzero(MASK[:, row])[:HALF] for row in HALF_ROWS], axis=1)
    half = np.array(HALF_ROWS)

    def keep_half_rows(cotangents: Any) -> Any:
        """Without the other rows' share, so that the parameters' gradients can be compared."""
        chosen = np.isin(np.arange(ROWS), HALF_ROWS)
        carry, ys = cotangents
        carry = jax.tree.map(lambda leaf: leaf * chosen[:, None].astype(leaf.dtype), carry)
        return carry, ys * chosen[:, None].astype(ys.dtype)

    case = case._replace(cotangents=keep_half_rows(case.cotangents))
    masked = evaluate(layer, case, MASK, implementation=implementation)

    # The batch keeps its size, so that one program serves this check and others.
    steps = np.tile(np.arange(HALF)[:, None], ROWS)
    steps[:, half] = valid
    gather = functools.partial(np.take_along_axis, indices=steps[..., None], axis=0)
    short = case._replace(
        xs=gather(case.xs), cotangents=(case.cotangents[0], gather(case.cotangents[1]))
    )
    alone = evaluate(layer, short, implementation=implementation)

    assert_close(gather(masked.ys)[:, half], alone.ys[:, half])
    assert_close(rows(masked.carry, half), rows(alone.carry, half))
    assert_close(gather(masked.grads.xs)[:, half], alone.grads.xs[:, half])
    assert_close(rows(masked.grads.carry, half), rows(alone.grads.carry, half))
    assert_close(masked.grads.params, alone.grads.params)


def check_empty_rows_do_nothing(layer: seqjax.Layer, implementation: str | None) -> None:
    """Length 0: outputs are zero and the state comes out as it went in, bit for bit."""
    case = make_case(layer)
    some = evaluate(layer, case, MASK, implementation=implementation)
    assert_zero(some.ys[:, EMPTY_ROW])
    chex.assert_trees_all_equal(rows(some.carry, EMPTY_ROW), rows(case.carry, EMPTY_ROW))
    chex.assert_trees_all_equal(
        rows(some.grads.carry, EMPTY_ROW), rows(case.cotangents[0], EMPTY_ROW)
    )
    nothing = evaluate(layer, case, np.zeros_like(MASK), implementation=implementation)
    assert_zero(nothing.ys)
    chex.assert_trees_all_equal(nothing.carry, case.carry)
    jax.tree.map(assert_zero, nothing.grads.params)


# Time.


def check_reverse_equals_flipped(layer: seqjax.Layer, implementation: str | None) -> None:
    """`reverse` is flipping inputs, mask and outputs in time."""
    case = make_case(layer)
    carry_cotangent, ys_cotangent = case.cotangents
    flipped = evaluate(
        layer,
        case._replace(xs=case.xs[::-1], cotangents=(carry_cotangent, ys_cotangent[::-1])),
        MASK[::-1],
        implementation=implementation,
    )
    expected = flipped._replace(
        ys=flipped.ys[::-1], grads=flipped.grads._replace(xs=flipped.grads.xs[::-1])
    )
    reverse = evaluate(layer, case, MASK, implementation=implementation, reverse=True)
    assert_close(reverse, expected)


def check_chunks_equal_whole(layer: seqjax.Layer, implementation: str | None) -> None:
    """Two halves, the carry passed on, give what the whole gives: values and gradients."""
    case = make_case(layer)
    carry_cotangent, ys_cotangent = case.cotangents
    whole = evaluate(layer, case, ALL_VALID, implementation=implementation)
    run = functools.partial(evaluate, layer, implementation=implementation)
    unknown = jax.tree.map(np.zeros_like, carry_cotangent)  # Until the second half has run back.
    first = case._replace(xs=case.xs[:HALF], cotangents=(unknown, ys_cotangent[:HALF]))
    carry = run(first).carry
    second = run(Case(case.params, case.xs[HALF:], carry, (carry_cotangent, ys_cotangent[HALF:])))
    first = run(first._replace(cotangents=(second.grads.carry, ys_cotangent[:HALF])))

    assert_close(second.carry, whole.carry)
    assert_close(np.concatenate([first.ys, second.ys]), whole.ys)
    assert_close(np.concatenate([first.grads.xs, second.grads.xs]), whole.grads.xs)
    assert_close(first.grads.carry, whole.grads.carry)
    assert_close(jax.tree.map(np.add, first.grads.params, second.grads.params), whole.grads.params)


def check_step_equals_scan(layer: seqjax.Layer, implementation: str | None) -> None:
    """A loop over `step` gives what `scan` gives: values and gradients."""
    case = make_case(layer, steps=HALF)
    expected = jax.device_get(_loop(layer, case))
    assert_close(evaluate(layer, case, implementation=implementation), expected)


@functools.partial(quick_jit, static_argnums=0)
def _loop(layer: seqjax.Layer, case: Case) -> Evaluation:
    def run(params: Any, xs: Any, carry: Any) -> Any:
        ys = []
        for x in xs:
            carry, y = layer.step(params, carry, x)
            ys.append(y)
        return carry, jnp.stack(ys)

    (carry, ys), pullback = jax.vjp(run, *case[:3])
    return Evaluation(carry, ys, Case(*pullback(case.cotangents), None))


def check_no_step_says_why(layer: seqjax.Layer) -> None:
    """A layer that needs the whole sequence refuses to step, and gives the reason."""
    case = make_case(layer)
    with pytest.raises(ValueError, match="backward direction starts at the end of the sequence"):
        layer.step(case.params, case.carry, case.xs[0])


# Batches and transformations.


def check_batch_shapes(layer: seqjax.Layer, implementation: str | None) -> None:
    """Several batch dimensions, and none, give what one gives."""
    case = make_case(layer)
    batched = evaluate(layer, case, MASK, implementation=implementation)

    def fold(values: Any) -> Any:
        """`(T, ROWS, features) -> (T, 2, ROWS // 2, features)`, or the same of a carry."""
        return values.reshape(*values.shape[:-2], 2, ROWS // 2, values.shape[-1])

    folded = case._replace(
        **jax.tree.map(fold, {"xs": case.xs, "carry": case.carry, "cotangents": case.cotangents})
    )
    several = evaluate(
        layer, folded, MASK.reshape(STEPS, 2, ROWS // 2), implementation=implementation
    )
    assert_close(several.ys, fold(batched.ys))
    assert_close(several.carry, jax.tree.map(fold, batched.carry))
    assert_close(several.grads.xs, fold(batched.grads.xs))
    assert_close(several.grads.carry, jax.tree.map(fold, batched.grads.carry))
    assert_close(several.grads.params, batched.grads.params)

    for row in HALF_ROWS:
        carry, ys = _run(
            layer, case.params, case.xs[:, row], rows(case.carry, row), mask=MASK[:, row],
            implementation=implementation,
        )  # fmt: skip
        assert_close(ys, batched.ys[:, row])
        assert_close(carry, rows(batched.carry, row))


def check_vmap_equals_batch(layer: seqjax.Layer, implementation: str | None) -> None:
    """`vmap` over single sequences gives what the batch gives: values and gradients."""
    case = make_case(layer)
    batched = evaluate(layer, case, MASK, implementation=implementation)
    one = functools.partial(_evaluate, layer, implementation=implementation)
    case_axes = Case(params=None, xs=1, carry=0, cotangents=(0, 1))
    result_axes = Evaluation(0, 1, Case(params=0, xs=1, carry=0, cotangents=None))
    vmapped = quick_jit(jax.vmap(one, (case_axes, 1), result_axes))(case, MASK)
    vmapped = jax.device_get(vmapped)
    params_grad = jax.tree.map(lambda leaf: leaf.sum(axis=0), vmapped.grads.params)
    assert_close(vmapped._replace(grads=vmapped.grads._replace(params=params_grad)), batched)


def check_transformations_compose(layer: seqjax.Layer, implementation: str | None) -> None:
    """Inside `lax.scan` and `jax.checkpoint`, and unrolled, with traced lengths: the same."""
    case = make_case(layer)
    lengths = np.array([STEPS, 3, 0, 1, 5, 2])
    mask = np.arange(STEPS)[:, None] < lengths
    expected = evaluate(layer, case, mask, implementation=implementation)

    @quick_jit
    def nested(case: Case, lengths: jax.Array) -> Evaluation:
        @jax.checkpoint
        def group(params: Any, xs: Any, carry: Any, lengths: Any) -> Any:
            return scan(
                layer, params, xs, carry, mask=seqjax.lengths_to_mask(lengths, STEPS), unroll=2,
                implementation=implementation,
            )  # fmt: skip

        def run(params: Any, xs: Any, carry: Any) -> Any:
            """Rows 0 to 2, then rows 3 to 5: a scan over groups of sequences."""
            groups = jax.tree.map(
                lambda leaf: leaf.reshape(2, ROWS // 2, *leaf.shape[1:]),
                (jnp.swapaxes(xs, 0, 1), carry, lengths),
            )

            def body(_: Any, inputs: Any) -> Any:
                xs, carry, lengths = inputs
                carry, ys = group(params, jnp.swapaxes(xs, 0, 1), carry, lengths)
                return None, (carry, jnp.swapaxes(ys, 0, 1))

            _, results = lax.scan(body, None, groups)
            carry, ys = jax.tree.map(lambda leaf: leaf.reshape(ROWS, *leaf.shape[2:]), results)
            return carry, jnp.swapaxes(ys, 0, 1)

        (carry, ys), pullback = jax.vjp(run, *case[:3])
        return Evaluation(carry, ys, Case(*pullback(case.cotangents), None))

    assert_close(jax.device_get(nested(case, lengths)), expected)


def check_jit_equals_eager(layer: seqjax.Layer, implementation: str | None) -> None:
    """Outside jit as inside it; jit traces once for equal layers and shapes."""
    case = make_case(layer)
    zeros = jax.device_get(layer.initial_carry((ROWS,)))
    compiled_already = "xla" if implementation is None else implementation
    expected = evaluate(layer, case._replace(carry=zeros), MASK, implementation=compiled_already)
    expected = (expected.carry, expected.ys)
    options = {"mask": MASK, "implementation": implementation}
    assert_close(scan(layer, case.params, case.xs, None, **options), expected)

    chex.clear_trace_counter()  # It counts by function name, over all tests.
    traced_once = chex.assert_max_traces(scan, n=1)
    compiled = quick_jit(traced_once, static_argnums=0, static_argnames="implementation")
    for same in (layer, pickle.loads(pickle.dumps(layer))):
        assert_close(compiled(same, case.params, case.xs, None, **options), expected)
    compiled(layer, case.params, 2 * case.xs, None, **options)


# Descriptions and dtypes.


def check_layer_is_a_value(layer: seqjax.Layer) -> None:
    """Layers hash and compare by what they describe."""
    copy = pickle.loads(pickle.dumps(layer))
    assert copy is not layer
    assert copy == layer
    assert hash(copy) == hash(layer)


def check_dtypes_are_kept(layer: seqjax.Layer, implementation: str | None) -> None:
    """Outputs, states and gradients keep their dtype; what is kept beside h is float32 at least."""
    _check_dtypes(layer, implementation, jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)


def check_two_dtypes_are_kept(layer: seqjax.Layer, implementation: str | None) -> None:
    """The same, of a wide and a narrow dtype alone."""
    _check_dtypes(layer, implementation, jnp.float32, jnp.bfloat16)


def _check_dtypes(layer: seqjax.Layer, implementation: str | None, *dtypes: Any) -> None:
    with jax.enable_x64(True):
        for dtype in dtypes:
            case = abstract_case(layer, (ROWS,), STEPS, dtype)
            for path, leaf in jax.tree_util.tree_leaves_with_path(case.carry):
                wide = jax.tree_util.keystr(path).endswith((".c", ".written"))
                wanted = jnp.float32 if wide and jnp.finfo(dtype).bits == 16 else dtype
                assert leaf.dtype == wanted, path
            got = jax.eval_shape(
                functools.partial(_evaluate, layer, implementation=implementation), case, MASK
            )
            assert got.ys.dtype == dtype
            chex.assert_trees_all_equal_shapes_and_dtypes(got.carry, case.carry)
            chex.assert_trees_all_equal_shapes_and_dtypes(got.grads[:3], case[:3])


def check_16_bit_is_close_to_truth(layer: seqjax.Layer, implementation: str | None) -> None:
    """16-bit results are within a few roundings of the results in float64."""
    for dtype in (jnp.bfloat16, jnp.float16):
        case = make_case(layer, dtype=dtype)
        carry, ys = _run(layer, *case[:3], mask=MASK, implementation=implementation)
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), case[:3])
            expected = _run(layer, *exact, mask=MASK, implementation="scan")
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (carry, ys)),
            jax.tree.map(np.asarray, expected),
            rtol=3 * float(jnp.finfo(dtype).eps),
            atol=3 * float(jnp.finfo(dtype).eps),
        )
