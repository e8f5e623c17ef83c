"""Gemma 4's kinds of layers in small models: shared keys and values, embeddings for each layer, experts; what is
refused."""

from dataclasses import replace

import numpy as np
import pytest

from conftest import log_softmax, relative_error
from kqprefill.core import KeysValues, SharedKeysValues
from kqprefill.engine.model import open_model
from kqprefill.errors import ModelError
from kqprefill.gguf.types import GGML
from kqprefill.models import describe_model, read_model
from kqprefill.synthetic import Shape, SyntheticFile

MORE = {
    "attention.sliding_window_pattern": [True, False, True, False, True],
    "attention.head_count_kv": [2, 1, 2, 1, 2],
    "feed_forward_length": [64, 64, 96, 96, 96],
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "attention.shared_kv_layers": 3,
    "embedding_length_per_layer_input": 32,
}
SHAPE = Shape("gemma4", 5, 64, 4, 2, 32, 64, 256, 4096, 1e6, tied=True, window=20, experts=4, used=2, more=MORE)


def small(**more):
    """A model of all kinds of layers, with other metadata."""
    return SyntheticFile(replace(SHAPE, more={**MORE, **more}), lambda *_: GGML.F32, "small")


def test_layers_keep_what_is_their_own():
    assert read_model(small()).layer_states == (
        KeysValues(2, 16, 20),
        KeysValues(1, 32),
        SharedKeysValues(0),
        SharedKeysValues(1),
        SharedKeysValues(0),
    )


def test_pieces_and_packs_give_what_one_prompt_gives(rng):
    with open_model(small(), "cpu") as model:
        tokens = rng.integers(0, 256, 100)
        whole = model.prefill(tokens, logits="all").logits
        cache = model.new_cache(100)
        pieces = [model.prefill(tokens[a:b], logits="all", cache=cache).logits for a, b in ((0, 1), (1, 64), (64, 100))]
        assert relative_error(np.concatenate(pieces), whole) < 1e-5
        ids = tokens.tolist()
        ((first, _),) = model.score([{"tokens": ids[:60], "choices": [ids[60:], [5, 6]]}])
        expected = log_softmax(whole[59:99])[range(40), ids[60:]]
        assert np.abs(first.logprobs - expected).max() <= 1e-4


def test_keys_and_values_that_are_not_used_stay_in_the_file():
    file = small()
    for name, like in (("attn_k", 0), ("attn_k_norm", 0), ("attn_v", 0)):
        source = f"blk.{like}.{'attn_k' if name == 'attn_v' else name}.weight"
        file.tensors[f"blk.2.{name}.weight"] = replace(file.tensors[source], name=f"blk.2.{name}.weight")
    read_model(file)
    file.tensors["blk.2.attn_q.extra"] = file.tensors["blk.2.attn_v.weight"]
    with pytest.raises(ModelError, match=r"blk\.2\.attn_q\.extra has no place"):
        read_model(file)


@pytest.mark.parametrize(
    "more,words",
    [
        ({"attention.sliding_window_pattern": [True]}, "is not an array of at least 5 bools"),
        ({"attention.head_count_kv": [2, 1, 3, 1, 2]}, "not a multiple of"),
        ({"attention.head_count_kv": [2, 1, 0, 1, 2]}, "not an integer or an array of 5"),
        ({"feed_forward_length": [64, 64]}, "not an integer or an array of 5"),
        ({"attention.shared_kv_layers": 4}, "a kind of layer without keys and values"),
        ({"attention.shared_kv_layers": 9}, "a kind of layer without keys and values"),
        ({"attention.shared_kv_layers": 255}, "a kind of layer without keys and values"),
        ({"attention.value_length_swa": 8}, "value_length_swa differs from key_length_swa"),
        ({"rope.dimension_count_swa": 18}, "does not fit heads of 16"),
    ],
)
def test_numbers_that_contradict_are_named(more, words):
    with pytest.raises(ModelError, match=words):
        read_model(small(**more))
    metadata = small().metadata
    assert describe_model(metadata, "small", 256).config.head_count_kv == 2
