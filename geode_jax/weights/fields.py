"""Reads the fields of `config.json`, and refuses those that are not known.

An unknown field may change the computation in transformers, and ignoring it would silently give
another model. Each architecture therefore lists all fields that it knows. A field that is in no
list is refused unless it is null.
"""

import contextlib
import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from geode_jax.ranges import MOST_BLOCKS

MAX_LAYERS = 1024
MAX_BLOCKS = MOST_BLOCKS
MAX_WIDTH = 1 << 20
"""Maximum of widths, numbers of heads, patches along a side and similar sizes."""
MAX_VOCABULARY = 1 << 24
MAX_EPSILON = 1.0
"""Maximum epsilon of a norm; a larger one would drown the norm's input."""
MAX_PARAMETERS = 4 * 10**12
"""Maximum number of parameters, more than any published model has."""
PARAMETER_DTYPES = ("float32", "float16", "bfloat16")

_MAX_SHOWN = 5
"""Maximum number of fields in an error message."""


def names(text: str) -> frozenset[str]:
    """Returns the words of a text."""
    return frozenset(text.split())


_EVERYWHERE = names(
    # identity, origin, readers
    "_name_or_path name_or_path _commit_hash architectures auto_map transformers_version "
    "model_type torchscript torch_dtype dtype use_bfloat16 problem_type id2label label2id "
    "num_labels task_specific_params finetuning_task tokenizer_class processor_class prefix "
    # further outputs, and other ways to compute the same numbers
    "use_cache output_attentions output_hidden_states return_dict return_dict_in_generate "
    "output_scores attn_implementation _attn_implementation _attn_implementation_autoset "
    "_attn_implementation_internal _experts_implementation tf_legacy_loss "
    "chunk_size_feed_forward pretraining_tp use_flash_attn use_fa3 "
    # training
    "initializer_range initializer_factor attention_dropout hidden_dropout_prob dropout "
    "drop_path_rate projection_dropout layer_scale_init_value "
    # generation, whose settings are not read from config.json here
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_length "
    "min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature "
    "top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens"
)
"""Fields that change nothing in the forward pass of any architecture here."""

_OFF: Mapping[str, tuple] = {
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, True, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, [], None),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "is_causal": (True, None),
}
"""Switches of any architecture -> the values that leave them off."""


def check_fields(
    json: Mapping,
    honoured: frozenset[str],
    allowed: Mapping[str, tuple],
    irrelevant: frozenset[str] = frozenset(),
) -> None:
    """Refuses fields, and values of fields, that the models here do not support.

    Args:
        json: the config, or a part of it.
        honoured: fields that are read.
        allowed: field -> supported values; the first is the default of transformers, which holds
            for a config without the field.
        irrelevant: further fields that do not change what the model computes.

    Raises:
        ValueError: names the unsupported fields.
    """
    allowed = {**_OFF, **allowed}
    wrong = [
        f"{name} {json[name]!r}"
        for name, values in allowed.items()
        if name in json and not any(json[name] == v for v in values)
    ]
    if wrong:
        raise ValueError(f"not supported: {_some(wrong)}")
    known = honoured | allowed.keys() | irrelevant | _EVERYWHERE
    unknown = [repr(name) for name in json if name not in known and json[name] is not None]
    if unknown:
        raise ValueError(
            f"unknown: {_some(unknown)}; a model that needs it would be computed wrongly here. "
            "If it has no effect, remove it from the file"
        )


def _some(names: list[str]) -> str:
    shown = [name if len(name) <= 100 else f"{name[:90]} ..." for name in names[:_MAX_SHOWN]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def part(json: Mapping, name: str) -> Mapping:
    """Returns a nested config.

    Raises:
        KeyError: the field is missing.
        ValueError: the field is not an object.
    """
    value = json[name]
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object, is {_shown(value)}")
    return value


@contextlib.contextmanager
def nested(name: str) -> Iterator[None]:
    """Adds the name of a nested config to the errors that are raised inside."""
    try:
        yield
    except KeyError as error:
        field = error.args[0]
        raise KeyError(field if field == name else f"{name}.{field}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def size(json: Mapping, name: str, most: int = MAX_WIDTH, least: int = 1) -> int:
    """Returns a field that is a whole number from `least` to `most`.

    Raises:
        KeyError: the field is missing.
        ValueError: the field has another value.
    """
    return _whole(name, json[name], least, most)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most:,}: {_shown(value)}")
    return value


def positive(json: Mapping, name: str, most: float = 1e12) -> float:
    """Returns a field that is a number above zero, at most `most`.

    Raises:
        KeyError: the field is missing.
        ValueError: the field has another value.
    """
    value = json[name]
    if type(value) not in (int, float) or not 0 < value <= most:
        raise ValueError(f"{name} must be a number above zero, at most {most:g}: {_shown(value)}")
    return float(value)


def flag(json: Mapping, name: str, default: bool) -> bool:
    """Returns a field that is true or false, or `default` if it is missing or null.

    Raises:
        ValueError: the field has another value.
    """
    value = json.get(name)
    value = default if value is None else value
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false: {_shown(value)}")
    return value


def whole_numbers(json: Mapping, name: str, length: int | None = None) -> tuple[int, ...]:
    """Returns a field that is a list of whole numbers >= 0; None: of any length.

    Raises:
        KeyError: the field is missing.
        ValueError: the field has another value.
    """
    value = json[name]
    if not isinstance(value, list) or (length is not None and len(value) != length):
        wanted = "a list" if length is None else f"a list of {length}"
        raise ValueError(f"{name} must be {wanted}: {_shown(value)}")
    return tuple(_whole(name, item, 0, MAX_VOCABULARY) for item in value)


def number_pair(json: Mapping, name: str) -> tuple[int, int]:
    """Returns a field that is a list of two whole numbers >= 0; errors as in `whole_numbers`."""
    first, second = whole_numbers(json, name, 2)
    return first, second


def dtype_of(json: Mapping) -> str:
    """Returns the dtype of a config; `dtype` takes precedence over the older `torch_dtype`.

    Raises:
        ValueError: parameters cannot have this dtype here.
    """
    given = (json.get(name) for name in ("dtype", "torch_dtype"))
    value = next((name for name in given if name is not None), "float32")
    if value not in PARAMETER_DTYPES:
        raise ValueError(f"not supported: dtype {_shown(value)}")
    return value


def sizes_of(kind: type, json: Mapping, where: str) -> Any:
    """Returns a dataclass of whole numbers and switches, such as a module's sizes.

    Args:
        kind: the dataclass; its fields are int or bool.
        json: field -> value.
        where: name of the entry, with which the message begins.

    Raises:
        ValueError: an entry is missing, unknown or of another kind.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types = typing.get_type_hints(kind)
    for name in json:
        if name not in fields:
            raise ValueError(f"unknown: {where}.{_shown(name)}")
    values = {}
    for name, field in fields.items():
        if name not in json:
            if field.default is dataclasses.MISSING:
                raise KeyError(f"{where}.{name}")
        elif types[name] is bool:
            values[name] = flag(json, name, False)
        else:
            most = MAX_BLOCKS if "layers" in name else MAX_WIDTH
            values[name] = _whole(f"{where}.{name}", json[name], 0, most)
    return kind(**values)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."


MAX_DEPTH = 12
"""Maximum depth of nesting in `config.json`."""


def check_depth(json: Mapping) -> None:
    """Refuses a config that is nested deeper than `MAX_DEPTH`.

    Raises:
        ValueError: the config is nested deeper.
    """
    level: list[Any] = [json]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, Mapping) else value)
            if isinstance(inner, Mapping | list)
        ]
    if level:
        raise ValueError("nested too deeply")


def layers_in(json: Mapping) -> Iterator[int]:
    """Yields the numbers of layers of a config and of its parts; values must be int to count."""
    for name, value in json.items():
        if isinstance(value, Mapping):
            yield from layers_in(value)
        elif name in ("num_hidden_layers", "layers", "detection_layers") and type(value) is int:
            yield value


def check_layers(json: Mapping, tensors: int) -> None:
    """Refuses more layers than a folder has tensors, before any layer is built.

    Args:
        json: content of `config.json`.
        tensors: number of tensors in the folder.

    Raises:
        ValueError: there are fewer tensors than layers.
    """
    most = max(layers_in(json), default=0)
    if most > max(tensors, 64):
        raise ValueError(f"{most:,} layers, but the folder has only {tensors:,} tensors")


def check_parameters(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a model of more than `MAX_PARAMETERS` parameters.

    Raises:
        ValueError: the model has more.
    """
    count = sum(math.prod(shape) for shape in shapes.values())
    if count > MAX_PARAMETERS:
        raise ValueError(f"a model of {count:,} parameters; the maximum is {MAX_PARAMETERS:,}")
