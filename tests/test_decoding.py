"""`seqjax.generate` and `seqjax.beam_search` against plain loops and exhaustive search."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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

    def log_probability(self, prompt: list[int], tokens: tuple[int, ...]) -> float:
        total, carry, logits = 0.0, *self.read(prompt)
        for token in tokens:
            total += logits[token] - np.logaddexp.reduce(logits)
            carry, batched = self.jit_step(carry, jnp.array([token]))
            logits = np.asarray(batched[0], np.float64)
        return total


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
            # After the two likeliest are left, 4/7 of what remains is less than 0.6.
            ({"top_k": 2, "top_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),
            ({"top_k": 3, "top_p": 0.44}, [0, 0, 0, 1]),
        ],
    )
    def test_distribution(self, options: dict[str, Any], weights: list[float]) -> None:
        """20,000 draws: frequencies within five standard deviations."""
        draws = 20_000
        logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))

        def step(carry: Any, token: jax.Array) -> Any:
            return carry, jnp.broadcast_to(logits, (draws, 4))

        prompt = jnp.zeros((1, draws), int)
        tokens = seqjax.generate(step, (), prompt, max_tokens=1, key=KEY, **options).tokens
        counts = np.bincount(tokens[0], minlength=4) / draws
        spread = 5 * np.sqrt(np.array(weights) * (1 - np.array(weights)) / draws)
        assert (np.abs(counts - weights) <= spread).all(), counts

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
            lambda prompt: seqjax.beam_search(
                model.step,
                model.carry(4),
                prompt,
                max_tokens=length,
                num_beams=num_beams,
                stop_token=STOP,
                length_penalty=length_penalty,
                prompt_lengths=prompt_lengths,
            )
        )(prompt)
        for row, one in enumerate(PROMPTS):
            expected = beams_by_a_loop(model, one, length, num_beams, length_penalty)
            for beam, (score, tokens) in enumerate(expected):
                assert got.tokens[: len(tokens), row, beam].tolist() == list(tokens)
                np.testing.assert_allclose(got.scores[row, beam], score, atol=1e-4)

    def test_one_beam_is_greedy(self, model: Model) -> None:
        prompt, lengths = padded(PROMPTS)
        options = {"max_tokens": 8, "prompt_lengths": lengths}
        greedy = seqjax.generate(model.step, model.carry(4), prompt, temperature=0.0, **options)
        beams = seqjax.beam_search(model.step, model.carry(4), prompt, num_beams=1, **options)
        assert beams.tokens[..., 0].tolist() == greedy.tokens.tolist()

    def test_fewer_sequences_than_beams(self, model: Model) -> None:
        beams = seqjax.beam_search(
            model.step, model.carry(1), [[1]], max_tokens=1, num_beams=6, stop_token=STOP
        )
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
    with pytest.raises(error, match=message):
        getattr(seqjax, function)(model.step, model.carry(2), given.pop("prompt"), **given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "generate needs a key to draw tokens with: pass key, or temperature=0.0"),
        (
            {"key": KEY, "temperature": -1.0},
            ValueError,
            "temperature should be at least 0, got: -1",
        ),
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


def test_bad_model(model: Model) -> None:
    def run(step: Any) -> None:
        seqjax.generate(step, jnp.zeros((2, 3)), [[1, 2]], max_tokens=3, temperature=0.0)

    with pytest.raises(ValueError, match=r"logits of shape \(2, vocabulary\), got: \(4,\)"):
        run(lambda carry, token: (carry, jnp.zeros(4)))
    with pytest.raises(TypeError, match=r"same structure, shapes and dtypes.*float32.*bfloat16"):
        run(lambda carry, token: (carry.astype(jnp.bfloat16), jnp.zeros((2, 4))))
