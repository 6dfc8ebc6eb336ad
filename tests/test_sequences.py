"""Lengths, masks, padding and unpadding."""

import functools
from typing import Any

import chex
import contract
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import seqjax

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
examples = settings(deadline=None, derandomize=True, max_examples=40)
few_examples = settings(deadline=None, derandomize=True, max_examples=8)
each_layout = pytest.mark.parametrize("batch_first", [False, True])


def expected_mask(lengths: Any, max_length: int) -> np.ndarray:
    """`(*batch, T)`, from the definition."""
    lengths = np.asarray(lengths, np.int64)
    mask = np.zeros((*lengths.shape, max_length), bool)
    for index in np.ndindex(lengths.shape):
        mask[index][: lengths[index]] = True
    return mask


class TestLengthsToMask:
    @examples
    @given(data=st.data(), max_length=st.integers(0, 6), batch_first=st.booleans())
    def test_any_lengths(self, data: st.DataObject, max_length: int, batch_first: bool) -> None:
        shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
        elements = st.integers(0, max_length)
        lengths = data.draw(hnp.arrays(np.int64, shape, elements=elements))
        mask = seqjax.lengths_to_mask(lengths, max_length, batch_first=batch_first)
        assert isinstance(mask, jax.Array)
        assert mask.dtype == jnp.bool_
        expected = expected_mask(lengths, max_length)
        np.testing.assert_array_equal(
            mask, expected if batch_first else np.moveaxis(expected, -1, 0)
        )

    @pytest.mark.parametrize("dtype", INTEGERS)
    def test_every_integer_dtype(self, dtype: str) -> None:
        """T is above what an int8 holds: lengths are compared without overflow."""
        lengths = np.array([0, 1, 127, 100], dtype)
        mask = seqjax.lengths_to_mask(lengths, 300, batch_first=True)
        np.testing.assert_array_equal(mask, expected_mask(lengths, 300))

    @pytest.mark.parametrize("dtype", INTEGERS)
    def test_every_integer_dtype_traced(self, dtype: str, x64: None) -> None:
        lengths = np.array([0, 1, 127, 100], dtype)
        run = jax.jit(functools.partial(seqjax.lengths_to_mask, max_length=300, batch_first=True))
        np.testing.assert_array_equal(run(lengths), expected_mask(lengths, 300))

    @pytest.mark.parametrize(
        "lengths", [[1, 3, 0], (1, 3, 0), np.array([1, 3, 0]), jnp.array([1, 3, 0])],
        ids=lambda lengths: type(lengths).__name__,
    )  # fmt: skip
    def test_every_container(self, lengths: Any) -> None:
        mask = seqjax.lengths_to_mask(lengths, 3, batch_first=True)
        np.testing.assert_array_equal(mask, expected_mask([1, 3, 0], 3))

    def test_one_length(self) -> None:
        np.testing.assert_array_equal(seqjax.lengths_to_mask(2, 3), [True, True, False])

    def test_no_rows(self) -> None:
        assert seqjax.lengths_to_mask(np.zeros(0, int), 3).shape == (3, 0)

    def test_under_vmap(self) -> None:
        lengths = np.array([[1, 2], [3, 0]])
        mask = jax.vmap(lambda row: seqjax.lengths_to_mask(row, 3, batch_first=True))(lengths)
        np.testing.assert_array_equal(mask, expected_mask(lengths, 3))

    @pytest.mark.parametrize("bad", [[1, -1], [4, 1], [300, 0]], ids=repr)
    def test_out_of_range(self, bad: list[int]) -> None:
        message = f"between 0 and .* 3, got: min {min(bad)} and max {max(bad)}"
        with pytest.raises(ValueError, match=message):
            seqjax.lengths_to_mask(bad, 3)

    def test_concrete_lengths_are_checked_inside_jit(self) -> None:
        with pytest.raises(ValueError, match=r"between 0 and .* 3, got: min 1 and max 4"):
            jax.jit(lambda: seqjax.lengths_to_mask(np.array([1, 4]), 3))()

    @pytest.mark.parametrize("dtype", ["float32", "bool", "complex64"])
    def test_no_integers(self, dtype: str) -> None:
        lengths = np.array([1, 0], dtype)
        message = f"lengths should be of an integer dtype, got: {dtype}"
        with pytest.raises(TypeError, match=message):
            seqjax.lengths_to_mask(lengths, 3)
        with pytest.raises(TypeError, match=message):
            jax.jit(lambda lengths: seqjax.lengths_to_mask(lengths, 3))(lengths)

    @pytest.mark.parametrize("max_length", [3.0, "3", None], ids=repr)
    def test_max_length_no_int(self, max_length: Any) -> None:
        with pytest.raises(TypeError, match=type(max_length).__name__):
            seqjax.lengths_to_mask([1], max_length)


class TestMaskToLengths:
    @few_examples
    @given(data=st.data(), max_length=st.integers(0, 6), batch_first=st.booleans())
    def test_round_trip(self, data: st.DataObject, max_length: int, batch_first: bool) -> None:
        shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3))
        elements = st.integers(0, max_length)
        lengths = data.draw(hnp.arrays(np.int32, shape, elements=elements))
        mask = seqjax.lengths_to_mask(lengths, max_length, batch_first=batch_first)
        got = seqjax.mask_to_lengths(mask, batch_first=batch_first)
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, lengths)

    @examples
    @given(mask=hnp.arrays(bool, (5, 2)))
    def test_any_pattern(self, mask: np.ndarray) -> None:
        """Right padding gives its lengths; anything else is refused, not miscounted."""
        lengths = mask.sum(axis=0)
        if np.array_equal(mask, expected_mask(lengths, 5).T):
            np.testing.assert_array_equal(seqjax.mask_to_lengths(mask), lengths)
        else:
            with pytest.raises(ValueError, match="left padding or a gap"):
                seqjax.mask_to_lengths(mask)

    @each_layout
    def test_traced(self, batch_first: bool) -> None:
        mask = expected_mask([1, 3, 0], 4)
        run = jax.jit(functools.partial(seqjax.mask_to_lengths, batch_first=batch_first))
        np.testing.assert_array_equal(run(mask if batch_first else mask.T), [1, 3, 0])

    def test_long_sequences(self) -> None:
        np.testing.assert_array_equal(seqjax.mask_to_lengths(np.ones((300, 2), bool)), [300, 300])

    def test_not_bool(self) -> None:
        for convert in (np.asarray, jnp.asarray):
            with pytest.raises(TypeError, match="mask should be of dtype bool, got: int32"):
                seqjax.mask_to_lengths(convert(np.ones((3, 2), np.int32)))

    def test_no_time(self) -> None:
        with pytest.raises(ValueError, match=r"time dimension, got shape \(\)"):
            seqjax.mask_to_lengths(np.array(True))


@st.composite
def ragged(draw: st.DrawFn) -> list[np.ndarray]:
    """One to four float32 sequences of zero to five steps, of one feature shape."""
    features = draw(hnp.array_shapes(min_dims=0, max_dims=2, min_side=1, max_side=3))
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return [rng.standard_normal((length, *features)).astype(np.float32) for length in lengths]


class TestPadSequence:
    @examples
    @given(
        sequences=ragged(),
        batch_first=st.booleans(),
        value=st.sampled_from([0.0, -1.5, float("nan"), float("inf")]),
        side=st.sampled_from(["left", "right"]),
    )
    def test_any_sequences(
        self, sequences: list[np.ndarray], batch_first: bool, value: float, side: str
    ) -> None:
        padded = seqjax.pad_sequence(sequences, batch_first, value, side)
        assert isinstance(padded, jax.Array)
        assert padded.dtype == jnp.float32
        longest = max(map(len, sequences))
        expected = np.full((len(sequences), longest, *sequences[0].shape[1:]), value, np.float32)
        for row, sequence in enumerate(sequences):
            start = longest - len(sequence) if side == "left" else 0
            expected[row, start : start + len(sequence)] = sequence
        np.testing.assert_array_equal(
            padded, expected if batch_first else np.swapaxes(expected, 0, 1)
        )

    @few_examples
    @given(sequences=ragged(), batch_first=st.booleans())
    def test_jax_arrays_give_the_same(self, sequences: list[np.ndarray], batch_first: bool) -> None:
        got = seqjax.pad_sequence([jnp.asarray(array) for array in sequences], batch_first)
        expected = seqjax.pad_sequence(sequences, batch_first)
        chex.assert_trees_all_equal(got, expected, strict=True)

    @pytest.mark.parametrize(
        "dtype", ["int32", "uint8", "bool", "float16", "bfloat16", "complex64"]
    )
    def test_dtype_is_kept(self, dtype: str) -> None:
        sequences = [np.ones(2, jnp.dtype(dtype)), np.ones(3, jnp.dtype(dtype))]
        padded = seqjax.pad_sequence(sequences, padding_value=0)
        assert padded.dtype == dtype
        expected = np.array([[1, 1], [1, 1], [0, 1]]).astype(padded.dtype)
        np.testing.assert_array_equal(padded, expected)

    def test_iterators_and_lists(self) -> None:
        padded = seqjax.pad_sequence(iter([[1, 2], [3]]))
        np.testing.assert_array_equal(padded, [[1, 3], [2, 0]])

    def test_under_jit_and_grad(self) -> None:
        """JAX arrays may be traced; their gradient is their part of the padded array's."""
        first, second = jnp.ones((2, 3)), jnp.ones((4, 3))
        weights = jnp.arange(24.0).reshape(4, 2, 3)

        @jax.jit
        def loss(first: jax.Array, second: jax.Array) -> jax.Array:
            return (weights * seqjax.pad_sequence([first, second])).sum()

        gradients = jax.grad(loss, argnums=(0, 1))(first, second)
        np.testing.assert_array_equal(gradients[0], weights[:2, 0])
        np.testing.assert_array_equal(gradients[1], weights[:, 1])

    def test_nothing(self) -> None:
        with pytest.raises(ValueError, match="empty list of sequences"):
            seqjax.pad_sequence([])

    def test_no_iterable(self) -> None:
        with pytest.raises(TypeError, match=r"Expected iterable .*<class 'int'>"):
            seqjax.pad_sequence(5)  # type: ignore[arg-type]

    def test_scalars(self) -> None:
        with pytest.raises(ValueError, match=r"sequences\[1\] should have a time dimension"):
            seqjax.pad_sequence([np.ones(1), np.float64(1)])

    def test_differing_dtypes(self) -> None:
        with pytest.raises(TypeError, match="one dtype, got: float32 and int32"):
            seqjax.pad_sequence([np.ones(1, np.float32), np.ones(1, np.int32)])

    def test_differing_features(self) -> None:
        with pytest.raises(ValueError, match=r"one feature shape, got: \(2,\) and \(3,\)"):
            seqjax.pad_sequence([np.ones((1, 2)), np.ones((1, 3))])

    @pytest.mark.parametrize("side", ["centre", "", None], ids=repr)
    def test_unknown_side(self, side: Any) -> None:
        with pytest.raises(ValueError, match=f"'left' or 'right', got: {side!r}"):
            seqjax.pad_sequence([np.ones(1)], padding_side=side)


class TestUnpadSequence:
    @few_examples
    @given(sequences=ragged(), batch_first=st.booleans())
    def test_round_trip(self, sequences: list[np.ndarray], batch_first: bool) -> None:
        padded = seqjax.pad_sequence(sequences, batch_first, padding_value=float("nan"))
        lengths = [len(sequence) for sequence in sequences]
        got = seqjax.unpad_sequence(padded, lengths, batch_first)
        assert isinstance(got, list)
        assert all(isinstance(row, jax.Array) for row in got)
        chex.assert_trees_all_equal(got, [jnp.asarray(row) for row in sequences], strict=True)

    @pytest.mark.parametrize("dtype", INTEGERS)
    def test_every_integer_dtype(self, dtype: str) -> None:
        rows = seqjax.unpad_sequence(np.ones((3, 2)), np.array([3, 1], dtype))
        assert [row.shape for row in rows] == [(3,), (1,)]

    def test_a_layers_outputs(self) -> None:
        """What scan gives for a padded batch is what it gives for each sequence alone."""
        cell = seqjax.GRUCell(3, 5)
        case = contract.make_case(cell, (3,))
        lengths = np.array([4, 6, 1])
        mask = seqjax.lengths_to_mask(lengths, contract.STEPS)
        _, ys = seqjax.scan(cell, *case[:2], mask=mask)
        zeros = np.zeros((1, cell.hidden_size), np.float32)
        for row, got in enumerate(seqjax.unpad_sequence(ys, lengths)):
            xs = case.xs[: lengths[row], row : row + 1]
            _, expected = numpy_reference.run(cell, case.params, xs, zeros)
            np.testing.assert_allclose(got, expected[:, 0], atol=1e-5)

    def test_traced_array(self) -> None:
        rows = jax.jit(lambda padded: seqjax.unpad_sequence(padded, [3, 1]))(np.ones((3, 2, 4)))
        assert [row.shape for row in rows] == [(3, 4), (1, 4)]

    def test_traced_lengths(self) -> None:
        with pytest.raises(TypeError, match="concrete lengths, got a traced array"):
            jax.jit(lambda lengths: seqjax.unpad_sequence(np.ones((3, 2)), lengths))(
                np.array([3, 1])
            )

    def test_too_few_dimensions(self) -> None:
        with pytest.raises(ValueError, match=r"at least 2 dimensions.*got shape \(3,\)"):
            seqjax.unpad_sequence(np.ones(3), [3])

    @each_layout
    @pytest.mark.parametrize("lengths", [[3], [3, 3, 3], [[3, 3]], 3], ids=repr)
    def test_one_length_a_row(self, lengths: Any, batch_first: bool) -> None:
        padded = np.ones((2, 3) if batch_first else (3, 2))
        with pytest.raises(ValueError, match=r"got shape \(.*\(batch_size=2\)"):
            seqjax.unpad_sequence(padded, lengths, batch_first)

    @pytest.mark.parametrize("lengths", [[4, 1], [-1, 1]], ids=repr)
    def test_out_of_range(self, lengths: list[int]) -> None:
        with pytest.raises(ValueError, match=r"between 0 and .* 3, got: min"):
            seqjax.unpad_sequence(np.ones((3, 2)), lengths)

    @pytest.mark.parametrize("lengths", [[1.0, 2.0], [True, False]], ids=repr)
    def test_no_integers(self, lengths: Any) -> None:
        with pytest.raises(TypeError, match=r"integer dtype, got: (float64|bool)"):
            seqjax.unpad_sequence(np.ones((3, 2)), lengths)
