"""Applies known mistakes to copies of the project and shows that the tests notice each.

Run: python tests/mutation_check.py [NAME ...]

Each mistake is a piece of the source, what stands in its place, and the tests that should notice,
few and quick ones, which run on the copy until the first failure. A mistake that the tests let
pass, or whose piece of source or tests are gone, fails the check.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import conftest  # noqa: F401  (chooses XLA's flags, which the processes below inherit)
import pytest

ROOT = Path(__file__).parent.parent


class Mistake(NamedTuple):
    """In `file`, `right` becomes `wrong`; tests in the file `tests` should fail."""

    file: str
    right: str
    wrong: str
    tests: str
    only: str  # As pytest's option -k takes it.


MISTAKES = {
    "gates i and f swapped": Mistake(
        "seqjax/cells/lstm.py",
        '{"i": jax.nn.sigmoid, "f": jax.nn.sigmoid,',
        '{"f": jax.nn.sigmoid, "i": jax.nn.sigmoid,',
        "golden",
        "test_cells and lstm_cell-core",
    ),
    "gates g and o swapped": Mistake(
        "seqjax/cells/lstm.py",
        '"g": jnp.tanh, "o": jax.nn.sigmoid}',
        '"o": jax.nn.sigmoid, "g": jnp.tanh}',
        "golden",
        "test_cells and lstm_cell-core",
    ),
    "gates r and z swapped": Mistake(
        "seqjax/cells/gru.py",
        '{"r": jax.nn.sigmoid, "z": jax.nn.sigmoid,',
        '{"z": jax.nn.sigmoid, "r": jax.nn.sigmoid,',
        "golden",
        "test_cells and gru_cell-core",
    ),
    "z flipped": Mistake(
        "seqjax/cells/gru.py",
        "(1 - gates.z) * n + gates.z * h",
        "gates.z * n + (1 - gates.z) * h",
        "golden",
        "test_cells and gru_cell-core",
    ),
    "b_hn outside r": Mistake(
        "seqjax/cells/gated.py",
        "from_h = project(h, weights.w_hh, weights.b_hh)",
        "from_h = project(h, weights.w_hh)\n"
        "        from_x = from_x if weights.b_hh is None else from_x + weights.b_hh",
        "golden",
        "test_cells and gru_cell-core",
    ),
    "r acts on both parts of n": Mistake(
        "seqjax/cells/gru.py",
        "n_x + gates.r * n_h",
        "gates.r * (n_x + n_h)",
        "golden",
        "test_cells and gru_cell-core",
    ),
    "LSTM drops b_hh": Mistake(
        "seqjax/cells/gated.py",
        "project(h, weights.w_hh, weights.b_hh)",
        "project(h, weights.w_hh)",
        "golden",
        "test_cells and lstm_cell-core",
    ),
    "RNN drops b_ih": Mistake(
        "seqjax/cells/gated.py",
        "project(x, weights.w_ih, weights.b_ih)",
        "project(x, weights.w_ih)",
        "golden",
        "test_cells and rnn_cell_tanh-core",
    ),
    "parts of a gate swapped": Mistake(
        "seqjax/ops/gates.py",
        "(x, h) if activation is None",
        "(h, x) if activation is None",
        "golden",
        "test_cells and gru_cell-core",
    ),
    "hidden forget gate + 1": Mistake(
        "seqjax/cells/lstm.py",
        "gates.f * carry.c",
        "jax.nn.sigmoid(1 + jnp.log(gates.f / (1 - gates.f))) * carry.c",
        "golden",
        "test_cells and lstm_cell-core",
    ),
    "c carried in 16 bit": Mistake(
        "seqjax/cells/gated.py",
        "return self.join_carry(State(h, rest)), h",
        "rest = tuple(array.astype(x.dtype).astype(array.dtype) for array in rest)\n"
        "        return self.join_carry(State(h, rest)), h",
        "cells",
        "test_c_is_not_rounded_at_every_step",
    ),
    "products summed in 16 bit": Mistake(
        "seqjax/ops/precision.py",
        "jnp.matmul(x, weight, preferred_element_type=dtype)",
        "jnp.matmul(x, weight).astype(dtype)",
        "cells",
        "test_every_product_asks_for_float32",
    ),
    "lengths ignored": Mistake(
        "seqjax/torch_shape.py",
        "        return made\n",
        "        return None\n",
        "golden",
        "test_float32 and rnn_tanh-nnx",
    ),
    "padded outputs repeated": Mistake(
        "seqjax/ops/reference.py",
        "y = zero_padding(valid, y)",
        "y = where_valid(valid, y, jax.tree.leaves(carry)[0].astype(y.dtype))"
        " if jax.tree.leaves(carry)[0].shape == y.shape else y",
        "golden",
        "test_float32 and gru-core",
    ),
    "carry not frozen": Mistake(
        "seqjax/ops/reference.py",
        "new_carry = where_valid(valid, new_carry, carry)",
        "pass",
        "golden",
        "test_float32 and gru-core",
    ),
    "kernel: sigmoids without their shift": Mistake(
        "seqjax/ops/elementwise.py",
        "(1 - scale) + scale * jnp.tanh",
        "scale * jnp.tanh",
        "golden",
        "test_float32 and lstm-core",
    ),
    "kernel: parts of a gate swapped": Mistake(
        "seqjax/ops/elementwise.py",
        "gates += [x, gate] if activation",
        "gates += [gate, x] if activation",
        "golden",
        "test_float32 and gru-core",
    ),
    "kernel: tangents of a gate's parts swapped": Mistake(
        "seqjax/ops/elementwise.py",
        "inputs += [x, h] if activation",
        "inputs += [h, x] if activation",
        "golden",
        "gru_one_layer-ragged",
    ),
    "kernel: a slope is another activation's": Mistake(
        "seqjax/ops/elementwise.py",
        "jax.nn.sigmoid: lambda y: y * (1 - y)",
        "jax.nn.sigmoid: lambda y: 1 - y * y",
        "golden",
        "gru_one_layer-ragged",
    ),
    "kernel: relu passes gradients at zero": Mistake(
        "seqjax/ops/elementwise.py",
        "(y > 0).astype",
        "(y >= 0).astype",
        "golden",
        "rnn_relu_one_layer-ragged",
    ),
    "kernel: slopes one place too early behind a gate without activation": Mistake(
        "seqjax/ops/elementwise.py",
        "index += 2 if activation is None else 1",
        "index += 1",
        "user_cells",
        "mgu and check_agrees_with_scan",
    ),
    "kernel: an unknown activation applied twice": Mistake(
        "seqjax/ops/elementwise.py",
        "activation(x + h) if activation in SLOPES else x + h",
        "activation(x + h)",
        "user_cells",
        "coupled and check_agrees_with_scan",
    ),
    "kernel: an input of combine forgotten": Mistake(
        "seqjax/ops/elementwise.py",
        "for index in _read(program.jaxpr)",
        "for index in _read(program.jaxpr)[1:]",
        "golden",
        "gru_one_layer-ragged",
    ),
    "kernel: h follows the c before the step": Mistake(
        "seqjax/ops/elementwise.py",
        "follow(h_by, [*inputs, *rest])",
        "follow(h_by, [*inputs, *d.rest])",
        "golden",
        "lstm_one_layer-ragged",
    ),
    "kernel: two states followed for each other": Mistake(
        "seqjax/ops/elementwise.py",
        "invars=[*whole.jaxpr.invars, *rest]",
        "invars=[*whole.jaxpr.invars, *reversed(rest)]",
        "user_cells",
        "coupled and check_agrees_with_scan",
    ),
    "kernel: b_hh dropped": Mistake(
        "seqjax/ops/whole_sequence/forward.py",
        "params.b_hh if keeps_apart(cell) else None",
        "None",
        "golden",
        "test_float32 and gru-core",
    ),
    "kernel: b_hh counts as b_ih": Mistake(
        "seqjax/ops/whole_sequence/forward.py",
        "total(params.b_ih, params.b_hh)",
        "params.b_ih",
        "golden",
        "rnn_tanh_one_layer-ragged",
    ),
    "kernel: c not frozen": Mistake(
        "seqjax/ops/elementwise.py",
        "jnp.where(valid, new, old)",
        "new",
        "golden",
        "test_float32 and lstm-core",
    ),
    "kernel: what padding leaves makes NaN": Mistake(
        "seqjax/ops/whole_sequence/forward.py",
        "(steps, *leaf.shape), 0.5, leaf.dtype",
        "(steps, *leaf.shape), 0, leaf.dtype",
        "user_cells",
        "beside_padding",
    ),
    "kernel: a gate at padding read from the state": Mistake(
        "seqjax/ops/whole_sequence/forward.py",
        "elif h.dtype == wide_h.dtype and not rest:",
        "elif h.dtype == wide_h.dtype:",
        "user_cells",
        "divides",
    ),
    "kernel: sigmoids lose their tail": Mistake(
        "seqjax/ops/elementwise.py",
        "if s == 1 or _keeps_errors(cell, kept)",
        "if True",
        "user_cells",
        "divides and -20",
    ),
    "kernel: the final state's tangent is that after added steps": Mistake(
        "seqjax/ops/whole_sequence/tangents.py",
        "if plan.reverse else len(xs) - 1",
        "if plan.reverse else -1",
        "whole_sequence",
        "lacks_steps and gru-forward",
    ),
    "kernel: reversed, the chunk that lacks steps is the first run": Mistake(
        "seqjax/ops/whole_sequence/chunks.py",
        "where = (count, 0) if reverse else (0, count)",
        "where = (0, count)",
        "whole_sequence",
        "lacks_steps and gru-reverse",
    ),
    "kernel: a chunk that lacks steps reads its neighbour's again": Mistake(
        "seqjax/ops/whole_sequence/forward.py",
        "step - start) * rows",
        "step - first) * rows",
        "whole_sequence",
        "test_chunks_equal_the_plain_scan and gru-reverse-dense",
    ),
    "kernel: carry not frozen": Mistake(
        "seqjax/ops/whole_sequence/forward.py",
        "h if valid is None else where_valid(valid, h, state.h)",
        "h",
        "golden",
        "test_float32 and gru-core",
    ),
    "kernel: gradient not frozen": Mistake(
        "seqjax/ops/whole_sequence/tangents.py",
        "d_new = where_valid(valid, d_new, d_state)",
        "pass",
        "golden",
        "rnn_tanh_one_layer-ragged",
    ),
    "kernel: the state after a step saved for the one before": Mistake(
        "seqjax/ops/whole_sequence/forward.py",
        "Residuals(state, h, saved) if save",
        "Residuals(new_state, h, saved) if save",
        "whole_sequence",
        "test_chunks_equal_the_plain_scan and rnn_relu-forward-dense",
    ),
    "kernel: a skipped chunk runs another one": Mistake(
        "seqjax/ops/whole_sequence/chunks.py",
        "-numbers if reverse else numbers",
        "numbers",
        "whole_sequence",
        "test_chunks_of_padding_are_left_out",
    ),
    "kernel: 16-bit gradients summed in 16 bit": Mistake(
        "seqjax/ops/whole_sequence/tangents.py",
        "widen(jax.tree.map(_instantiate, (d_params, d_state)))",
        "jax.tree.map(_instantiate, (d_params, d_state))",
        "contract",
        "rnn_tanh-xla-check_dtypes_are_kept",
    ),
    "kernel: mapped writes land on another axis": Mistake(
        "seqjax/ops/whole_sequence/forward.py",
        "_put_along(axis + 1)",
        "_put_along(axis)",
        "whole_sequence",
        "test_gradients_under_vmap",
    ),
    "kernel: outputs at padding pass gradients": Mistake(
        "seqjax/ops/whole_sequence/tangents.py",
        "(zero_padding(valid, d_new.h), d_new if",
        "(d_new.h, d_new if",
        "golden",
        "rnn_tanh_one_layer-ragged",
    ),
    "sharding: a mask's rows are not seen": Mistake(
        "seqjax/ops/sharding.py",
        "for leaf in jax.tree.leaves((xs, mask))]",
        "for leaf in jax.tree.leaves(xs)]",
        "sharding",
        "single_device",
    ),
    "sharding: dropout of another type than what it drops": Mistake(
        "seqjax/layers.py",
        "shard_like(jax.random.bernoulli(key, 1 - rate, values.shape), values)",
        "jax.random.bernoulli(key, 1 - rate, values.shape)",
        "sharding",
        "single_device",
    ),
    "sharding: rows that were written are gathered": Mistake(
        "seqjax/ops/sharding.py",
        "{name: P(*[None] * axis, rows) for",
        "{name: P() for",
        "sharding",
        "single_device",
    ),
    "decoding: finished rows go on": Mistake(
        "seqjax/decoding.py",
        "carry=_where_valid(axes, ~ended, carry, written.carry),",
        "carry=carry,",
        "decoding",
        "test_greedy_equals_a_loop",
    ),
    "decoding: beams keep each other's state": Mistake(
        "seqjax/decoding.py",
        "step(_take_rows(axes, carry, rows), token.reshape(-1))",
        "step(carry, token.reshape(-1))",
        "decoding",
        "test_narrow_beams_equal_a_loop",
    ),
    "decoding: top_p drops the token that crosses it": Mistake(
        "seqjax/ops/sampling.py",
        "jnp.cumsum(probabilities, axis=-1) - probabilities",
        "jnp.cumsum(probabilities, axis=-1)",
        "decoding",
        "test_distribution",
    ),
    "decoding: temperatures scale tokens": Mistake(
        "seqjax/decoding_arguments.py",
        "return array.astype(dtype).reshape(-1, 1)",
        "return array.astype(dtype).reshape(1, -1)",
        "decoding",
        "test_numbers_of_each_row",
    ),
    "decoding: temperatures make tokens equal before they are compared": Mistake(
        "seqjax/ops/sampling.py",
        "_keep_most(logits, top_k)",
        "_keep_most(_temper(logits, temperature), top_k)",
        "decoding",
        "test_distribution",
    ),
    "decoding: log-probabilities at the drawn temperature": Mistake(
        "seqjax/decoding.py",
        "jax.nn.log_softmax(logits), token[:, None]",
        "jax.nn.log_softmax(logits / temperature), token[:, None]",
        "decoding",
        "test_log_probabilities_are_the_models",
    ),
    "decoding: beams keep each other's log-probabilities": Mistake(
        "seqjax/decoding.py",
        "log_probabilities=before.log_probabilities.at[index]",
        "log_probabilities=going_on.log_probabilities.at[index]",
        "decoding",
        "test_narrow_beams_equal_a_loop",
    ),
    "decoding: another axis fits, and nobody asks": Mistake(
        "seqjax/decoding_arguments.py",
        "if where in fitting and (not unsaid or len(fitting) == 1):",
        "if where in fitting:",
        "decoding",
        "test_asks_where_the_rows_are",
    ),
    "remat: a chunk that is filled up counts in full": Mistake(
        "seqjax/ops/rematerialization.py",
        "xs, mask = _fill_up(xs, mask)",
        "xs, _ = _fill_up(xs, mask)",
        "export",
        "test_gradients_of_any_number_of_steps",
    ),
    "remat forgets the carry": Mistake(
        "seqjax/ops/rematerialization.py",
        "        carry, first = run_whole(carry)\n        carry, last",
        "        _, first = run_whole(carry)\n        carry, last",
        "whole_sequence",
        "TestRemat and test_values_and_gradients_stay",
    ),
    "padded inputs not zeroed": Mistake(
        "seqjax/ops/reference.py",
        "x = zero_padding(valid, x)",
        "x = x",
        "contract",
        "rnn_tanh-scan-check_padding_never_leaks",
    ),
    "kernel: padded inputs not zeroed": Mistake(
        "seqjax/ops/whole_sequence/forward.py",
        "zero_padding(None if valid is None else valid.ravel(), inputs)",
        "inputs",
        "contract",
        "lstm-xla-check_padding_never_leaks",
    ),
    "kernel: padded inputs not zeroed for the weights": Mistake(
        "seqjax/ops/whole_sequence/tangents.py",
        "widen(zero_padding(valid, x))",
        "widen(x)",
        "contract",
        "rnn_tanh-xla-check_padding_never_leaks",
    ),
    "padded inputs not zeroed for a layer of one's own": Mistake(
        "seqjax/cells/base.py",
        "if not vars(owner)",
        "if False and vars(owner)",
        "recurrence",
        "TestLayersOfOnesOwn and test_layer",
    ),
    "backward direction runs forward": Mistake(
        "seqjax/layers.py",
        "reverse=not reverse",
        "reverse=reverse",
        "golden",
        "test_one_sequence_without_batch and rnn_tanh-core",
    ),
    "backward direction starts at T": Mistake(
        "seqjax/layers.py",
        "reverse=not reverse, key=backward_key, **options",
        "reverse=not reverse, key=backward_key, **options | {'mask': None}",
        "golden",
        "test_every_form_outside_jit and rnn_tanh_two_layers_bidirectional-core",
    ),
    "directions concatenated the wrong way round": Mistake(
        "seqjax/layers.py",
        "[forward_ys, backward_ys]",
        "[backward_ys, forward_ys]",
        "golden",
        "test_one_sequence_without_batch and rnn_tanh-core",
    ),
    "states ordered direction-major": Mistake(
        "seqjax/torch_shape.py",
        "states = [state for entry in carry for state in _directions(entry)]",
        "states = [state for group in zip(*map(_directions, carry)) for state in group]",
        "golden",
        "test_every_form_outside_jit and rnn_tanh_two_layers_bidirectional-nnx",
    ),
    "h0 used for layer 0 only": Mistake(
        "seqjax/torch_shape.py",
        "lambda s, i=i: s[i], hx)",
        "lambda s, i=i: s[i] * (i == 0), hx)",
        "golden",
        "test_every_form_outside_jit and rnn_tanh_two_layers_bidirectional-nnx",
    ),
    "dropout on the last layer, too": Mistake(
        "seqjax/layers.py",
        "return tuple(new_carry), xs\n\n\n@",
        "return tuple(new_carry), xs if key is None else _drop(key, xs, self.dropout)\n\n\n@",
        "dropout",
        "test_mask_and_scale and core",
    ),
    "dropout not scaled": Mistake(
        "seqjax/layers.py",
        "values / (1 - rate)",
        "values",
        "dropout",
        "test_mask_and_scale and core",
    ),
    "initial range by proj_size": Mistake(
        "seqjax/cells/gated.py",
        "draw_weights(key, self.hidden_size, dtype,",
        "draw_weights(key, self.output_size, dtype,",
        "initial_distribution",
        "nnx-LSTM-",
    ),
    "torch weights not transposed back": Mistake(
        "seqjax/interop/torch.py",
        'np.array(array.T, order="C")',
        'np.array(array.reshape(array.shape[::-1]), order="C")',
        "interop",
        "test_round_trip_of_params and lstm",
    ),
    "torch weights as a call before has made them": Mistake(
        "seqjax/interop/torch_modules.py",
        "                hook(torch_module, ())\n",
        "",
        "interop",
        "weights_in_effect and weight_norm and lstm_cell and Nnx",
    ),
    "torch module left in eval mode": Mistake(
        "seqjax/interop/torch_modules.py",
        "module.training = training",
        "pass",
        "interop",
        "weights_in_effect and orthogonal and lstm_cell and Nnx",
    ),
    "a prefix without its dot": Mistake(
        "seqjax/interop/state_dicts.py",
        'return prefix + "." if prefix and not prefix.endswith(".") else prefix',
        "return prefix",
        "interop",
        "test_prefix",
    ),
    "training: the carry is not restored": Mistake(
        "examples/common/training.py",
        "self.carry = self._group.split_whole(carry, self._carry_axis)",
        "del carry",
        "example_common",
        "test_run_restores_the_carry",
    ),
    "training: a run goes on one step too far": Mistake(
        "examples/common/training.py",
        'self.epoch, self.step = position["epoch"], position["step"]',
        'self.epoch, self.step = position["epoch"], position["step"] + 1',
        "example_common",
        "test_run_goes_on_from_its_last_checkpoint",
    ),
    "training: no more epochs than before": Mistake(
        "examples/common/training.py",
        'may_change={"--epochs"}',
        "may_change=()",
        "example_common",
        "test_more_epochs_go_on",
    ),
    "examples: a smoke run writes where the real one does": Mistake(
        "examples/common/options.py",
        'for mode in ("toy", "smoke")',
        'for mode in ("toy",)',
        "example_common",
        "test_runs_of_other_kinds",
    ),
    "training: the last weights in place of the best": Mistake(
        "examples/common/training.py",
        "if values[-1] > min(values):",
        "if values[-1] > max(values):",
        "example_common",
        "test_best_weights_are_kept",
    ),
    "checkpoints: damage is not noticed": Mistake(
        "examples/common/checkpoints.py",
        "if _checksum(checkpoint := Checkpoint(arrays, notes)) != checksum:",
        "if not (checkpoint := Checkpoint(arrays, notes)):",
        "example_common",
        "test_change_that_files_do_not_show",
    ),
    "language model: padding counts in evaluation": Mistake(
        "examples/language_network.py",
        "np.concatenate(losses)[:predicted]",
        "np.concatenate(losses)",
        "example_language_model",
        "evaluation",
    ),
    "language model: evaluation forgets its state": Mistake(
        "examples/language_network.py",
        "loss, state = token_losses(model, inputs, targets, state)",
        "loss, _ = token_losses(model, inputs, targets, state)",
        "example_language_model",
        "evaluation",
    ),
    "a step is given whatever there is": Mistake(
        "seqjax/cells/base.py",
        'if "step" in vars(cls):',
        'if "steps" in vars(cls):',
        "checks",
        "test_shape_of_carry",
    ),
    "parameters that the layer has not are left out": Mistake(
        "seqjax/cells/checks.py",
        "if want.keys() != got.keys():",
        "if want.keys() - got.keys():",
        "checks",
        "test_another_number_of_layers",
    ),
    "parameters of any shape": Mistake(
        "seqjax/cells/checks.py",
        "if got[name].shape != leaf.shape:",
        "if got[name].ndim != leaf.ndim:",
        "checks",
        "test_shape_of_a_bias",
    ),
    "parameters in nnx.Param are others": Mistake(
        "seqjax/cells/checks.py",
        ', is_leaf=lambda node: hasattr(node, "shape"))',
        ")",
        "checks",
        "test_parameters_of_a_module",
    ),
    "what is known of a layer is that of 32 bit": Mistake(
        "seqjax/cells/checks.py",
        "jnp.dtype(dtype), x64)",
        "jnp.dtype(dtype), False)",
        "checks",
        "test_x64",
    ),
    "the shapes of parameters are computed": Mistake(
        "seqjax/cells/checks.py",
        "jax.eval_shape(lambda: layer.init(jax.random.key(0)))",
        "jax.eval_shape(layer.init, jax.random.key(0))",
        "checks",
        "test_no_transfers",
    ),
    "layers that Linen's variables have besides": Mistake(
        "seqjax/linen.py",
        'k.startswith("layers_")',
        'k.startswith("layer_")',
        "checks",
        "test_linen_with_variables_of_more_layers",
    ),
    "parameter names found at every call": Mistake(
        "seqjax/cells/checks.py",
        "@functools.lru_cache\ndef abstract_params",
        "def abstract_params",
        "parameter_names",
        "shapes_once",
    ),
    "shapes of the state found at every call": Mistake(
        "seqjax/cells/checks.py",
        "return _abstract_carry(layer, batch_shape, jnp.dtype(dtype), x64)",
        "return jax.eval_shape(lambda: layer.initial_carry(batch_shape, dtype))",
        "parameter_names",
        "shapes_once",
    ),
    "initializers traced at every call": Mistake(
        "seqjax/linen.py",
        'if not self.has_variable("params", name):',
        "if True:",
        "parameter_names",
        "shapes_once",
    ),
    "a module's cell made without one of its arguments": Mistake(
        "seqjax/module_arguments.py",
        "names = self._kind.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()",
        'names = ("input_size", "hidden_size", "bias")',
        "module_arguments",
        "cell_has_its_arguments",
    ),
    "nonlinearity not where PyTorch has it": Mistake(
        "seqjax/module_arguments.py",
        "(LayerArguments[ArrayLike, jax.Array], _SizesAndNonlinearity[jax.Array])",
        "(_SizesAndNonlinearity[jax.Array], LayerArguments[ArrayLike, jax.Array])",
        "module_arguments",
        "test_constructor and RNN",
    ),
    "a module gives back a tuple": Mistake(
        "seqjax/module_arguments.py",
        "return OutputAndState(output, state)",
        "return output, state",
        "sequential",
        "becomes_the_next_layers and GRU",
    ),
    "every parameter draws all": Mistake(
        "seqjax/linen.py",
        "            if not drawn:",
        "            if True:",
        "linen",
        "draws_each_weight_once",
    ),
    "an argument that needs other weights is set": Mistake(
        "seqjax/nnx.py",
        "if changed._drawn() != self._drawn():",
        "if False:",
        "module_arguments",
        "what_weights_are_made_for",
    ),
    "every example is of an LSTM": Mistake(
        "seqjax/module_arguments.py",
        'example.replace("LSTM", name)',
        "example",
        "module_arguments",
        "test_help and GRU",
    ),
    "initial_state in the weights' dtype": Mistake(
        "seqjax/module_arguments.py",
        "return self.param_dtype if self.dtype is None else self.dtype",
        "return self.param_dtype",
        "initial_state",
        "test_carry_of_a_scan and GRUCell",
    ),
    "initial_state of layers side by side": Mistake(
        "seqjax/torch_shape.py",
        "return _join_state(carry) if isinstance(layer, Stack) else _without_names(carry)",
        "return _without_names(carry)",
        "initial_state",
        "test_by_itself",
    ),
    "all gates drawn as one matrix": Mistake(
        "seqjax/initial_parameters.py",
        "pieces = gates if value.ndim > 1 else 1",
        "pieces = 1",
        "initial_parameters",
        "test_every_gate_is_orthogonal",
    ),
    "parameters drawn with one key": Mistake(
        "seqjax/initial_parameters.py",
        "own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))",
        "own_key = key",
        "initial_parameters",
        "test_every_array_is_drawn_on_its_own",
    ),
    "hidden_size of a projection taken for its features": Mistake(
        "seqjax/initial_parameters.py",
        'params.get("w_hr", params.get("w_hh"))',
        'params.get("w_hh")',
        "initial_parameters",
        "test_a_projections_weights",
    ),
    "forget bias at gate i": Mistake(
        "seqjax/initializers.py",
        "zeros.at[hidden_size : 2 * hidden_size]",
        "zeros.at[:hidden_size]",
        "initial_parameters",
        "test_forget_bias",
    ),
    "initializers kept in NNX modules": Mistake(
        "seqjax/nnx.py",
        "vars(self)[name] = None",
        "pass",
        "initial_parameters",
        "test_nnx_keeps_no_initializer",
    ),
    "boxes lost in loading": Mistake(
        "seqjax/linen.py",
        "nn.meta.replace_boxed(boxes, loaded)",
        "loaded",
        "initial_parameters",
        "TestBoxes",
    ),
    "sharding lost in loading": Mistake(
        "seqjax/interop/torch.py",
        "jax.tree.map(_put_where, params, loaded)",
        "loaded",
        "initial_parameters",
        "TestBoxes",
    ),
}


# Forked off one process that has imported what is slow to import, but nothing of the project.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "jax", "flax.nnx", "flax.linen", "optax", "chex"])


def tests_notice(mistake: Mistake) -> bool:
    """Whether the tests fail on a copy of the project with this mistake."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("seqjax", "tests", "examples"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / mistake.file
        source = file.read_text()
        if mistake.right not in source:
            raise SystemExit(f"{mistake.file} has no {mistake.right!r} any more: adapt MISTAKES")
        file.write_text(source.replace(mistake.right, mistake.wrong))
        output = copy / "output.txt"
        process = PROCESSES.Process(target=_run_tests, args=(copy, mistake, output))
        process.start()
        process.join()
        if process.exitcode not in (0, 1):
            raise SystemExit(
                f"pytest ended with {process.exitcode} instead of failing:\n{output.read_text()}"
            )
    return process.exitcode == 1


def _run_tests(copy: Path, mistake: Mistake, output: Path) -> None:
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # For processes that tests start.
    sys.path.insert(0, str(copy))
    tests = str(copy / "tests" / f"test_{mistake.tests}.py")
    with (
        output.open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        # Its plugin would import Hypothesis, which tests that need it import themselves.
        without = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
        status = pytest.main(["-x", "-q", "-n0", *without, tests, "-k", mistake.only])
    os._exit(status)  # At once: XLA's threads have been seen to crash an interpreter that ends.


def main() -> None:
    """Tries every mistake, or those named, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mistakes to try (default: all)")
    names = parser.parse_args().names or list(MISTAKES)
    if unknown := set(names) - set(MISTAKES):
        parser.error(f"unknown {sorted(unknown)}; expected some of {list(MISTAKES)}")
    with ThreadPoolExecutor(max_workers=2) as pool:
        noticed = pool.map(lambda name: tests_notice(MISTAKES[name]), names)
        missed = []
        for name, was_noticed in zip(names, noticed, strict=True):
            print(f"{'noticed' if was_noticed else 'MISSED '}  {name}", flush=True)
            if not was_noticed:
                missed.append(name)
    print(f"{len(names) - len(missed)} of {len(names)} mistakes noticed")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
