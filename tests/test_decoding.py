"""`seqjax.generate` and `seqjax.beam_search` against plain loops and exhaustive search."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import seqjax
import seqjax.nnx

VOCABULARY = 4
STOP = 0
KEY = jax.random.key(3)


class Model:
    """A recurrent layer over random embeddings; `step` is what the library gets."""

    def __init__(self, vocabulary: int = VOCABULARY, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.layer = seqjax.Stack([seqjax.GRUCell(5, 6), seqjax.LSTMCell(6, 6)])
        shapes = jax.eval_shape(self.layer.init, jax.random.key(0))
        self.params, self.embedding, self.readout = jax.tree.map(
            lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32),
            (shapes, jnp.zeros((vocabulary, 5)), jnp.zeros((6, vocabulary))),
        )

    def step(self, carry: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        carry, y = self.layer.step(self.params, carry, self.embedding[token])
        return carry, 2 * y @ self.readout

    def carry(self, batch: int) -> Any:
        return self.layer.initial_carry((batch,), jnp.float32)

    @functools.cached_property
    def jit_step(self) -> Any:
        return jax.jit(self.step)

    def read(self, tokens: list[int]) -> tuple[Any, np.ndarray]:
        """Carry and logits after some tokens, one row."""
        carry = self.carry(1)
        for token in tokens:
            carry, logits = self.jit_step(carry, jnp.array([token]))
        return carry, np.asarray(logits[0], np.float64)

    def log_probabilities(self, prompt: list[int], tokens: Sequence[int]) -> list[float]:
        """Of each token, given those before it."""
        found, (carry, logits) = [], self.read(prompt)
        for token in tokens:
            found.append(logits[token] - np.logaddexp.reduce(logits))
            carry, batched = self.jit_step(carry, jnp.array([token]))
            logits = np.asarray(batched[0], np.float64)
        return found

    def log_probability(self, prompt: list[int], tokens: Sequence[int]) -> float:
        return sum(self.log_probabilities(prompt, tokens))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def padded(prompts: list[list[int]]) -> tuple[jax.Array, list[int]]:
    return seqjax.pad_sequence([np.array(p) for p in prompts]), [len(p) for p in prompts]


PROMPTS = [[1, 2, 3], [3], [2, 2], [1, 1, 1]]


class TestGenerate:
    def test_greedy_equals_a_loop(self, model: Model) -> None:
        """Prompts of unequal length, rows that stop early and rows that do not."""
        expected = []
        for prompt in PROMPTS:
            carry, logits = model.read(prompt)
            tokens: list[int] = []
            while len(tokens) < 6 and STOP not in tokens:
                tokens.append(int(np.argmax(logits)))
                carry, batched = model.jit_step(carry, jnp.array([tokens[-1]]))
                logits = np.asarray(batched[0])
            expected.append((tokens, carry))
        lengths = [len(tokens) for tokens, _ in expected]
        assert min(lengths) < 6 == max(lengths), "choose another seed"

        prompt, prompt_lengths = padded(PROMPTS)
        got = jax.jit(
            lambda prompt, lengths: seqjax.generate(
                model.step,
                model.carry(4),
                prompt,
                max_tokens=6,
                temperature=0.0,
                stop_token=STOP,
                prompt_lengths=lengths,
            )
        )(prompt, jnp.array(prompt_lengths))
        assert got.lengths.tolist() == lengths
        for row, (tokens, carry) in enumerate(expected):
            assert got.tokens[:, row].tolist() == tokens + [STOP] * (6 - len(tokens))
            np.testing.assert_allclose(
                got.log_probabilities[:, row],
                model.log_probabilities(PROMPTS[row], tokens) + [0.0] * (6 - len(tokens)),
                atol=1e-5,
            )
            row_carry = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], got.carry)
            for a, b in zip(jax.tree.leaves(row_carry), jax.tree.leaves(carry), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)

    def test_going_on_from_the_carry(self, model: Model) -> None:
        """The last token is read, so the carry stands where the next one is written."""
        run = functools.partial(seqjax.generate, model.step, temperature=0.0)
        whole = run(model.carry(1), [[1]], max_tokens=6).tokens
        first = run(model.carry(1), [[1]], max_tokens=3)
        before = run(model.carry(1), [[1]], max_tokens=2)
        rest = run(before.carry, first.tokens[-1:], max_tokens=3).tokens
        assert jnp.concatenate([first.tokens, rest]).tolist() == whole.tolist()

    def test_same_key_same_tokens(self, model: Model) -> None:
        def run(key: jax.Array, **options: Any) -> list[list[int]]:
            prompt = jnp.ones((1, 8), int)
            return seqjax.generate(
                model.step, model.carry(8), prompt, max_tokens=9, key=key, **options
            ).tokens.tolist()

        assert run(KEY) == run(KEY)
        assert run(KEY) != run(jax.random.key(4))
        # The loop may end early: what was written before does not depend on how long it may last.
        assert run(KEY, temperature=1e-6) == run(jax.random.key(4), temperature=1e-6)
        assert jax.jit(run_with(model))(KEY, 0.5).tolist() == run(KEY, temperature=0.5)
        assert jax.jit(run_with(model))(KEY, 0.0).tolist() == run(KEY, temperature=0.0)

    @pytest.mark.parametrize(
        ("options", "weights"),
        [
            ({}, [0.1, 0.2, 0.3, 0.4]),
            ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
            ({"top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
            ({"top_k": 99}, [0.1, 0.2, 0.3, 0.4]),
            ({"top_p": 0.65}, [0, 0, 3 / 7, 4 / 7]),
            ({"top_p": 0.75}, [0, 2 / 9, 3 / 9, 4 / 9]),
            ({"top_p": 0.01}, [0, 0, 0, 1]),
            # At any temperature a token of probability 0 stays one, and the likeliest come first.
            ({"temperature": jnp.inf}, [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
            ({"temperature": 1e300}, [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
            ({"temperature": 1e-30}, [0, 0, 0, 1]),
            ({"temperature": jnp.inf, "top_k": 2}, [0, 0, 1 / 2, 1 / 2]),
            ({"temperature": 1e30, "top_p": 0.6}, [0, 1 / 3, 1 / 3, 1 / 3]),
            ({"top_p": 1e-300}, [0, 0, 0, 1]),
            # After the two likeliest are left, 4/7 of what remains is less than 0.6.
            ({"top_k": 2, "top_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),
            ({"top_k": 3, "top_p": 0.44}, [0, 0, 0, 1]),
        ],
    )
    def test_distribution(self, options: dict[str, Any], weights: list[float]) -> None:
        """20,000 draws: frequencies within five standard deviations. The last token has none."""
        draws = 20_000
        weights = [*weights, 0]
        logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4, 0.0]))

        def step(carry: Any, token: jax.Array) -> Any:
            return carry, jnp.broadcast_to(logits, (draws, 5))

        prompt = jnp.zeros((1, draws), int)
        tokens = seqjax.generate(step, (), prompt, max_tokens=1, key=KEY, **options).tokens
        counts = np.bincount(tokens[0], minlength=5) / draws
        spread = 5 * np.sqrt(np.array(weights) * (1 - np.array(weights)) / draws)
        assert (np.abs(counts - weights) <= spread).all(), counts

    @pytest.mark.parametrize("name", ["temperature", "top_p"])
    def test_numbers_of_each_row(self, name: str) -> None:
        """As many rows as tokens. A row's are those that it has where all rows have its number."""
        numbers = {"temperature": [0.0, 0.5, 1.0, 9.0], "top_p": [1e-9, 0.5, 0.9, 1.0]}[name]
        model = Model()

        @jax.jit
        def run(number: Any) -> jax.Array:
            prompt, options = jnp.ones((1, 4), int), {"max_tokens": 20, "key": KEY, name: number}
            return seqjax.generate(model.step, model.carry(4), prompt, **options).tokens

        tokens = run(jnp.array(numbers))
        assert len({tuple(row) for row in tokens.T.tolist()}) == 4
        for row, number in enumerate(numbers):
            assert tokens[:, row].tolist() == run(number)[:, row].tolist()

    def test_log_probabilities_are_the_models(self, model: Model) -> None:
        """Whatever the tokens were drawn from."""
        got = seqjax.generate(
            model.step, model.carry(2), [[1, 3]],
            max_tokens=5, key=KEY, temperature=3.0, top_k=3, top_p=0.9,
        )  # fmt: skip
        for row, prompt in enumerate([[1], [3]]):
            expected = model.log_probabilities(prompt, got.tokens[:, row].tolist())
            np.testing.assert_allclose(got.log_probabilities[:, row], expected, atol=1e-5)

    def test_ends_when_every_row_has(self) -> None:
        """Row r writes r + 2 tokens and then its own stop token: so many steps run, and no more."""
        steps: list[int] = []

        def step(count: jax.Array, token: jax.Array) -> Any:
            jax.debug.callback(lambda: steps.append(1))
            stop_now = count > jnp.arange(3) + 1
            return count + 1, jax.nn.one_hot(jnp.where(stop_now, jnp.array([7, 8, 9]), 1), 10)

        got = seqjax.generate(
            step,
            jnp.zeros(3, int),
            jnp.zeros((1, 3), int),
            max_tokens=100,
            temperature=0.0,
            stop_token=jnp.array([7, 8, 9]),
        )
        jax.effects_barrier()
        assert got.lengths.tolist() == [3, 4, 5]
        assert got.tokens[:5, 0].tolist() == [1, 1, 7, 7, 7]
        assert (got.tokens[5:] == jnp.array([7, 8, 9])).all()
        assert len(steps) == 1 + 5

    def test_states_of_a_module(self) -> None:
        """PyTorch's layout has the batch on the second axis of a state."""
        lstm = seqjax.nnx.LSTM(5, 6, num_layers=2, rngs=nnx.Rngs(0))
        model = Model()

        def step(carry: Any, token: jax.Array) -> Any:
            output, carry = lstm(model.embedding[token][None], carry)
            return carry, output[0] @ model.readout

        def run(prompts: list[list[int]]) -> list[list[int]]:
            prompt, lengths = padded(prompts)
            zeros = jnp.zeros((2, len(prompts), 6))
            return seqjax.generate(
                step,
                (zeros, zeros),
                prompt,
                max_tokens=5,
                temperature=0.0,
                prompt_lengths=lengths,
                carry_axis=1,
            ).tokens.T.tolist()

        assert run(PROMPTS) == [run([prompt])[0] for prompt in PROMPTS]


def run_with(model: Model) -> Any:
    def run(key: jax.Array, temperature: jax.Array) -> jax.Array:
        return seqjax.generate(
            model.step,
            model.carry(8),
            jnp.ones((1, 8), int),
            max_tokens=9,
            key=key,
            temperature=temperature,
        ).tokens

    return run


def every_sequence(length: int, stop: int | None) -> list[tuple[int, ...]]:
    """All that end with their only stop token, or are cut off."""
    found = []
    for n in range(1, length + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=n):
            inside, last = tokens[:-1], tokens[-1]
            if stop not in inside and (n == length or last == stop):
                found.append(tokens)
    return found


class TestBeamSearch:
    @pytest.mark.parametrize(
        ("stop", "length_penalty"),
        # With nothing to stop at, all lengths are equal, and a penalty changes no order.
        [(STOP, 0.0), (STOP, 0.8), (STOP, 2.0), (None, 0.8)],
    )
    def test_wide_beams_find_the_best_of_all(
        self, model: Model, stop: int | None, length_penalty: float
    ) -> None:
        """Beams for every prefix: nothing is lost, so the search is exhaustive."""
        prompts, length, best = [[1, 2], [3]], 4, 12
        prompt, prompt_lengths = padded(prompts)
        beams = jax.jit(
            lambda prompt: seqjax.beam_search(
                model.step,
                model.carry(2),
                prompt,
                max_tokens=length,
                num_beams=VOCABULARY ** (length - 1),
                stop_token=stop,
                length_penalty=length_penalty,
                prompt_lengths=prompt_lengths,
            )
        )(prompt)
        for row, one in enumerate(prompts):
            scored = {
                tokens: model.log_probability(one, tokens)
                / ((5 + len(tokens)) / 6) ** length_penalty
                for tokens in every_sequence(length, stop)
            }
            expected = sorted(scored, key=lambda tokens: -scored[tokens])[:best]
            np.testing.assert_allclose(
                beams.scores[row, :best], [scored[tokens] for tokens in expected], atol=1e-4
            )
            for beam, tokens in enumerate(expected):
                assert beams.lengths[row, beam] == len(tokens)
                filled = list(tokens) + [STOP] * (length - len(tokens))
                assert beams.tokens[:, row, beam].tolist() == filled

    @pytest.mark.parametrize("num_beams", [1, 2, 3])
    @pytest.mark.parametrize("length_penalty", [0.0, 1.0])
    def test_narrow_beams_equal_a_loop(
        self, model: Model, num_beams: int, length_penalty: float
    ) -> None:
        length = 7
        prompt, prompt_lengths = padded(PROMPTS)
        got = jax.jit(
            lambda prompt, lengths, penalty: seqjax.beam_search(
                model.step,
                model.carry(4),
                prompt,
                max_tokens=length,
                num_beams=num_beams,
                stop_token=STOP,
                length_penalty=penalty,
                prompt_lengths=lengths,
            )
        )(prompt, jnp.array(prompt_lengths), length_penalty)
        for row, one in enumerate(PROMPTS):
            expected = beams_by_a_loop(model, one, length, num_beams, length_penalty)
            for beam, (score, tokens) in enumerate(expected):
                assert got.tokens[: len(tokens), row, beam].tolist() == list(tokens)
                np.testing.assert_allclose(got.scores[row, beam], score, atol=1e-4)
                np.testing.assert_allclose(
                    got.log_probabilities[:, row, beam],
                    model.log_probabilities(one, tokens) + [0.0] * (length - len(tokens)),
                    atol=1e-4,
                )

    def test_one_beam_is_greedy(self, model: Model) -> None:
        prompt, lengths = padded(PROMPTS)
        options = {"max_tokens": 8, "prompt_lengths": lengths}
        greedy = seqjax.generate(model.step, model.carry(4), prompt, temperature=0.0, **options)
        beams = seqjax.beam_search(model.step, model.carry(4), prompt, num_beams=1, **options)
        assert beams.tokens[..., 0].tolist() == greedy.tokens.tolist()

    @pytest.mark.parametrize("length_penalty", [0.0, np.inf])
    def test_fewer_sequences_than_beams(self, model: Model, length_penalty: float) -> None:
        """All of one token, which no penalty changes."""
        beams = seqjax.beam_search(
            model.step, model.carry(1), [[1]],
            max_tokens=1, num_beams=6, stop_token=STOP, length_penalty=length_penalty,
        )  # fmt: skip
        assert jnp.isfinite(beams.scores[0]).sum() == VOCABULARY
        assert sorted(beams.tokens[0, 0, :VOCABULARY].tolist()) == list(range(VOCABULARY))
        np.testing.assert_allclose(jnp.exp(beams.scores[0]).sum(), 1, atol=1e-5)


def beams_by_a_loop(
    model: Model, prompt: list[int], length: int, num_beams: int, length_penalty: float
) -> list[tuple[float, tuple[int, ...]]]:
    """The published algorithm, with lists: scores and tokens, best first."""

    def score(log_probability: float, n: int) -> float:
        return log_probability / ((5 + n) / 6) ** length_penalty

    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    complete: list[tuple[float, tuple[int, ...]]] = []
    for n in range(1, length + 1):
        candidates = []
        for total, tokens in live:
            logits = model.read(prompt + list(tokens))[1]
            logits = logits - np.logaddexp.reduce(logits)
            candidates += [(total + logits[t], (*tokens, t)) for t in range(VOCABULARY)]
        candidates = sorted(candidates, reverse=True)[: 2 * num_beams]
        ended = [(score(total, n), tokens) for total, tokens in candidates if tokens[-1] == STOP]
        complete = sorted(complete + ended, reverse=True)[:num_beams]
        live = [c for c in candidates if c[1][-1] != STOP][:num_beams]
        enough = len(complete) == num_beams
        if enough and complete[-1][0] >= score(live[0][0], length):
            return complete
    cut_off = [(score(total, length), tokens) for total, tokens in live]
    return sorted(complete + cut_off, reverse=True)[:num_beams]


FUNCTIONS = {
    "generate": functools.partial(seqjax.generate, temperature=0.0),
    "beam_search": functools.partial(seqjax.beam_search, num_beams=3),
}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)

TABLE = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)


def table_step(carry: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A model of two lines, as many features as tokens."""
    logits = jnp.asarray(TABLE, carry.dtype)[token] + jnp.sin(carry)
    return 0.5 * carry + logits, logits


def rows(number: int) -> jax.Array:
    """Its first state."""
    return jnp.zeros((number, VOCABULARY))


class TestCarryAxis:
    @each_function
    def test_asks_where_the_rows_are(self, function: Any) -> None:
        """Two rows of a model of two layers, in PyTorch's layout: both axes fit, one is right."""
        run = functools.partial(function, max_tokens=5)

        def step(carry: Any, token: jax.Array) -> Any:
            state, logits = table_step(carry["layers"][0], token)
            return {"layers": jnp.stack([state, carry["layers"][1] + state])}, logits

        def carry(number: int) -> Any:
            return {"layers": jnp.zeros((2, number, VOCABULARY))}

        message = r"carry\['layers'\] should .* \(2, 2, 4\), .* fit are \[0, 1\]. Give carry_axis"
        with pytest.raises(ValueError, match=message):
            run(step, carry(2), [[1, 3]])
        got = run(step, carry(2), [[1, 3]], carry_axis={"layers": -2})
        for row, token in enumerate((1, 3)):
            alone = run(step, carry(1), [[token]], carry_axis=1)
            np.testing.assert_array_equal(got.tokens[:, row], alone.tokens[:, 0])
            np.testing.assert_allclose(
                got.log_probabilities[:, row], alone.log_probabilities[:, 0], atol=1e-5
            )

    @each_function
    def test_0_is_taken_as_said(self, function: Any) -> None:
        """As many features as rows: an error where nothing is said."""
        run = functools.partial(function, table_step, max_tokens=3)
        with pytest.raises(ValueError, match=r"carry should have 4 rows.* on no other axis"):
            run(rows(4), [[0, 1, 2, 3]])
        got = run(rows(4), [[0, 1, 2, 3]], carry_axis=0)
        np.testing.assert_array_equal(got.tokens[:, :3], run(rows(3), [[0, 1, 2]]).tokens)

    @each_function
    def test_leaves_without_rows(self, function: Any) -> None:
        """A counter, a key, and memory that looks like rows: as if they were no part of it."""
        memory = jnp.array([0.1, 0.7])

        def noisy(state: Any, token: Any, count: Any, key: Any, memory: Any) -> Any:
            state, logits = table_step(state, token)
            noise = jax.random.normal(jax.random.fold_in(key, count), (1, VOCABULARY))
            return state, logits + memory.sum() * noise

        def step(carry: Any, token: Any) -> Any:
            (state, count), shared, nothing = carry
            state, logits = noisy(state, token, count, **shared)
            return ((state, count + 1), shared, nothing), logits

        def step_of_rows(carry: Any, token: Any) -> Any:
            state, logits = noisy(carry[0], token, carry[1][0], KEY, memory)
            return (state, carry[1] + 1), logits

        run = functools.partial(function, prompt=[[1, 3]], max_tokens=4)
        shared = {"key": KEY, "memory": memory}
        got = run(step, ((rows(2), 0), shared, None), carry_axis=((0, None), None, None))
        expected = run(step_of_rows, (rows(2), jnp.zeros(2, int)))
        np.testing.assert_array_equal(got.tokens, expected.tokens)
        np.testing.assert_allclose(got.log_probabilities, expected.log_probabilities, atol=1e-6)
        with pytest.raises(ValueError, match=r"carry\[0\]\[1\] should have 2 rows.* \(\), .*\[\]"):
            run(step, ((rows(2), 0), shared, None))

    @pytest.mark.parametrize(
        ("carry_axis", "error", "message"),
        [
            (
                1,
                ValueError,
                r"carry\['h'\] should have 2 rows, as the prompt, on axis 1, got shape",
            ),
            (-3, ValueError, "on axis -3"),
            ({"h": 0, "c": None}, ValueError, "carry_axis should be .* as in_axes of jax.vmap"),
            ((0,), ValueError, "carry_axis should be .* as in_axes of jax.vmap"),
            ("last", TypeError, r"an int or None for carry\['h'\], got: 'last'"),
            (True, TypeError, "an int or None"),
            (0.0, TypeError, "an int or None"),
        ],
    )
    @each_function
    def test_bad(self, function: Any, carry_axis: Any, error: type, message: str) -> None:
        def step(carry: Any, token: jax.Array) -> Any:
            state, logits = table_step(carry["h"], token)
            return {"h": state}, logits

        with pytest.raises(error, match=message):
            function(step, {"h": rows(2)}, [[1, 2]], max_tokens=3, carry_axis=carry_axis)


@jax.tree_util.register_pytree_node_class
class State:
    """Compared by identity."""

    def __init__(self, h: jax.Array) -> None:
        self.h = h

    def tree_flatten(self) -> Any:
        return (self.h,), None

    @classmethod
    def tree_unflatten(cls, _: Any, leaves: Any) -> "State":
        return cls(*leaves)


@each_function
def test_carry_of_any_type(function: Any) -> None:
    def step(carry: State, token: jax.Array) -> Any:
        state, logits = table_step(carry.h, token)
        return State(state), logits

    got = function(step, State(rows(2)), [[1, 3]], max_tokens=3)
    assert (
        got.tokens.tolist() == function(table_step, rows(2), [[1, 3]], max_tokens=3).tokens.tolist()
    )


class TestNoTokens:
    def test_generate(self, model: Model) -> None:
        """What is left is the state after the prompts."""
        prompt, lengths = padded(PROMPTS)
        got = seqjax.generate(
            model.step, model.carry(4), prompt,
            max_tokens=0, key=KEY, stop_token=STOP, prompt_lengths=lengths,
        )  # fmt: skip
        assert got.tokens.shape == got.log_probabilities.shape == (0, 4)
        assert got.lengths.tolist() == [0, 0, 0, 0]
        for row, one in enumerate(PROMPTS):
            row_carry = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], got.carry)
            chex.assert_trees_all_close(row_carry, model.read(one)[0], atol=1e-5)

    def test_beam_search(self) -> None:
        """One sequence, the empty one, which is certain."""
        got = seqjax.beam_search(table_step, rows(2), [[1, 3]], max_tokens=0, num_beams=2)
        assert got.tokens.shape == got.log_probabilities.shape == (0, 2, 2)
        assert got.scores.tolist() == [[0, -np.inf]] * 2
        assert got.lengths.tolist() == [[0, 0]] * 2


def test_traced_top_p() -> None:
    """0 and less, which no check can see, leave the likeliest."""

    @jax.jit
    def run(top_p: Any) -> jax.Array:
        options = {"max_tokens": 9, "key": KEY, "top_p": top_p}
        return seqjax.generate(table_step, rows(3), [[1, 2, 3]], **options).tokens

    def concrete(**options: Any) -> jax.Array:
        return seqjax.generate(table_step, rows(3), [[1, 2, 3]], max_tokens=9, **options).tokens

    for top_p in (0.5, 1.0):
        assert run(top_p).tolist() == concrete(key=KEY, top_p=top_p).tolist()
    assert run(1.0).tolist() == concrete(key=KEY).tolist()
    for top_p in (0.0, -1.0):
        assert run(top_p).tolist() == concrete(temperature=0.0).tolist()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_export_for_any_prompts(name: str) -> None:
    """Of any length and number, with numbers that are arguments of the program."""
    pytest.importorskip("flatbuffers")  # What jax.export writes with.

    def run(prompt: Any, lengths: Any, number: Any) -> Any:
        options = {
            "generate": {"key": KEY, "temperature": number, "top_p": number, "top_k": 3},
            "beam_search": {"num_beams": 2, "length_penalty": number},
        }[name]
        return getattr(seqjax, name)(
            table_step, jnp.zeros((prompt.shape[1], VOCABULARY)), prompt,
            max_tokens=4, prompt_lengths=lengths, stop_token=STOP, **options,
        )  # fmt: skip

    scope = export.SymbolicScope()
    shapes = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype)
        for shape, dtype in (
            ("length, batch", jnp.int32),
            ("batch", jnp.int32),
            ("batch", jnp.float32),
        )
    ]
    exported = export.deserialize(export.export(jax.jit(run))(*shapes).serialize())
    rng = np.random.default_rng(1)
    for length, batch in ((2, 3), (5, 2)):
        prompt = rng.integers(1, VOCABULARY, (length, batch)).astype(np.int32)
        lengths = rng.integers(1, length + 1, batch).astype(np.int32)
        numbers = np.linspace(0.3, 0.9, batch, dtype=np.float32)
        got = exported.call(prompt, lengths, numbers)
        chex.assert_trees_all_close(got, run(prompt, lengths, numbers), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_64_bit_types_and_no_rank_promotion(name: str, dtype: str) -> None:
    """What comes of it without, dtypes promoted strictly as everywhere."""
    numbers = np.array([0.0, 0.5, 2.0])
    options = {
        "generate": {"key": KEY, "temperature": numbers, "top_p": 1 - numbers / 9, "top_k": 3},
        "beam_search": {"num_beams": 2, "length_penalty": numbers},
    }[name]

    def run(dtype: str) -> Any:
        return getattr(seqjax, name)(
            table_step,
            rows(3).astype(dtype),
            np.array([[1, 2, 3], [3, 3, 3]]),
            max_tokens=4,
            stop_token=np.array([0, 1, 0]),
            prompt_lengths=np.array([2, 1, 2]),
            **options,
        )

    expected = run("float32" if dtype == "float64" else dtype)
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        got = run(dtype)
    assert (got.tokens.dtype, got.lengths.dtype) == (jnp.int64, jnp.int32)
    assert got.log_probabilities.dtype == ("float64" if dtype == "float64" else "float32")
    # In 64 bits other numbers are drawn: of those rows, the first alone takes the likeliest.
    same = slice(0, 1) if dtype == "float64" else slice(None)
    np.testing.assert_array_equal(got.tokens[:, same], expected.tokens[:, same])
    np.testing.assert_allclose(
        got.log_probabilities[:, same], expected.log_probabilities[:, same], atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"prompt": [1, 2]},
            ValueError,
            r"prompt should have shape \(length, batch\).*got: \(2,\)",
        ),
        ({"prompt": jnp.zeros((0, 2), int)}, ValueError, "at least one token a row"),
        ({"prompt": [[1.0, 2.0]]}, TypeError, "prompt should hold integers, got dtype: float32"),
        ({"prompt_lengths": [1, 0]}, ValueError, "prompt_lengths should be at least 1"),
        ({"prompt_lengths": [1, 2]}, ValueError, "lengths"),
        (
            {"prompt_lengths": [1]},
            ValueError,
            r"prompt_lengths should have shape \(2,\), got: \(1,\)",
        ),
        ({"max_tokens": -1}, ValueError, "max_tokens should be at least"),
        ({"max_tokens": 1.5}, TypeError, "max_tokens should be an int, got: 1.5"),
        ({"max_tokens": True}, TypeError, "max_tokens should be an int, got: True"),
        ({"stop_token": VOCABULARY}, ValueError, "one of the 4 tokens that step .*, got: 4"),
        ({"stop_token": [0, -1]}, ValueError, r"one of the 4 tokens that step .*, got: \[0, -1\]"),
        ({"stop_token": 0.0}, TypeError, "stop_token should be an integer"),
        ({"stop_token": [1, 2, 3]}, ValueError, r"stop_token should have shape \(\) or \(2,\)"),
        ({"carry_axis": 1}, ValueError, "should have 2 rows, as the prompt, on axis 1"),
    ],
)
@pytest.mark.parametrize("function", ["generate", "beam_search"])
def test_bad_input(
    model: Model, function: str, options: dict[str, Any], error: type, message: str
) -> None:
    own = {"temperature": 0.0} if function == "generate" else {"num_beams": 2}
    given = {"prompt": [[1, 2]], "max_tokens": 3} | own | options
    for inside in (lambda call: call(), lambda call: jax.jit(call)()):
        with pytest.raises(error, match=message):
            inside(lambda: getattr(seqjax, function)(model.step, model.carry(2), **given))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "generate needs a key to draw tokens with: pass key, or temperature=0.0"),
        (
            {"key": KEY, "temperature": -1.0},
            ValueError,
            "temperature should be at least 0, got: -1",
        ),
        ({"key": KEY, "temperature": [0.5, 1.0]}, ValueError, r"shape \(\) or \(1,\), got: \(2,\)"),
        ({"key": KEY, "temperature": float("nan")}, ValueError, "temperature should be at least 0"),
        ({"key": KEY, "temperature": None}, TypeError, "temperature should be a number, got: None"),
        ({"key": KEY, "temperature": True}, TypeError, "temperature should be a number, got: True"),
        ({"key": KEY, "top_p": [0.5] * VOCABULARY}, ValueError, r"top_p should have shape \(\) or"),
        ({"key": KEY, "top_p": "0.5"}, TypeError, "top_p should be a number, got: '0.5'"),
        ({"key": 0}, TypeError, r"key should be a random key, as from jax.random.key\(0\), got: 0"),
        ({"key": jax.random.split(KEY)}, TypeError, "key should be a random key"),
        ({"key": KEY, "top_k": True}, TypeError, "top_k should be an int, got: True"),
        ({"key": KEY, "top_p": 0.0}, ValueError, r"top_p should be in \(0, 1\], got: 0.0"),
        ({"key": KEY, "top_k": 0}, ValueError, "top_k should be at least 1, got: 0"),
    ],
)
def test_bad_sampling(model: Model, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        seqjax.generate(model.step, model.carry(1), [[1]], max_tokens=3, **options)


def test_bad_beams(model: Model) -> None:
    run = functools.partial(seqjax.beam_search, model.step, model.carry(1), [[1]], max_tokens=3)
    with pytest.raises(ValueError, match="num_beams should be at least 1, got: 0"):
        run(num_beams=0)
    with pytest.raises(ValueError, match="length_penalty should be at least 0, got: -1"):
        run(num_beams=2, length_penalty=-1.0)
    with pytest.raises(ValueError, match=r"length_penalty should have shape \(\) or \(1,\), got"):
        run(num_beams=2, length_penalty=jnp.ones((1, 2)))


def test_bad_model(model: Model) -> None:
    def run(step: Any) -> None:
        seqjax.generate(step, jnp.zeros((2, 3)), [[1, 2]], max_tokens=3, temperature=0.0)

    with pytest.raises(ValueError, match=r"logits of shape \(2, vocabulary\), got: \(4,\)"):
        run(lambda carry, token: (carry, jnp.zeros(4)))
    with pytest.raises(TypeError, match=r"same structure, shapes and dtypes.*float32.*bfloat16"):
        run(lambda carry, token: (carry.astype(jnp.bfloat16), jnp.zeros((2, 4))))
    with pytest.raises(TypeError, match="int8 does not hold all of the 200 that step returns"):
        seqjax.generate(
            lambda carry, token: (carry, jnp.zeros((2, 200))),
            (), np.ones((1, 2), np.int8), max_tokens=3, temperature=0.0,
        )  # fmt: skip
    with pytest.raises(TypeError, match="logits of a floating dtype, got: int32"):
        run(lambda carry, token: (carry, jnp.zeros((2, 4), int)))
    with pytest.raises(TypeError, match=r"should return \(carry, logits\), got: ShapeDtypeStruct"):
        run(lambda carry, token: jnp.zeros((2, 4)))
    with pytest.raises(TypeError, match="logits an array, got: dict"):
        run(lambda carry, token: (jnp.zeros((2, 4)), {"h": carry}))
