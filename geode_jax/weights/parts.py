"""Rules of the parts that both models share, for the names of `remote.modeling_parts`.

`key` is the name of the part in PyTorch, `leaf` its path in the JAX model.
"""

from collections.abc import Sequence

from geode_jax.weights.rules import Rule, within


def matrix(key: str, leaf: str, axes: str = "o i -> i o", bias: str = "o -> o") -> tuple[Rule, ...]:
    """Returns the rules of a `Projection`; `bias` = "": it has no bias."""
    weight = Rule(f"{key}.weight", f"{leaf}.kernel", axes)
    return (weight, Rule(f"{key}.bias", f"{leaf}.bias", bias)) if bias else (weight,)


def layer_norm(key: str, leaf: str) -> tuple[Rule, ...]:
    """Returns the rules of a `LayerNorm`."""
    return (
        Rule(f"{key}.weight", f"{leaf}.scale", "d -> d"),
        Rule(f"{key}.bias", f"{leaf}.bias", "d -> d"),
    )


def mlp(key: str, leaf: str) -> tuple[Rule, ...]:
    """Returns the rules of an `Mlp`."""
    return (*matrix(f"{key}.up", f"{leaf}.up"), *matrix(f"{key}.down", f"{leaf}.down"))


def attention(
    key: str, leaves: Sequence[str], *, bias: bool = True, out_bias: bool = True
) -> tuple[Rule, ...]:
    """Returns the rules of an attention; `leaves` are the paths of query, key, value and out."""
    *inputs, out = leaves
    heads = "(h e) -> h e" if bias else ""
    return (
        *(
            rule
            for name, leaf in zip("qkv", inputs, strict=True)
            for rule in matrix(f"{key}.{name}_proj", leaf, "(h e) d -> d h e", heads)
        ),
        *matrix(f"{key}.o_proj", out, "d (h e) -> h e d", "d -> d" if out_bias else ""),
    )


def cross_attention(
    key: str, leaf: str, *, bias: bool = True, out_bias: bool = True
) -> tuple[Rule, ...]:
    """Returns the rules of a `CrossAttention`."""
    leaves = tuple(f"{leaf}.{name}" for name in ("q", "k", "v", "out"))
    return (
        *layer_norm(f"{key}.norm", f"{leaf}.norm"),
        *attention(f"{key}.attention", leaves, bias=bias, out_bias=out_bias),
    )


_SPATIAL = ("objects", "places", "gaps", "relations", "angle", "value")


def spatial_head(key: str, leaf: str) -> tuple[Rule, ...]:
    """Returns the rules of a `SpatialHead`."""
    rules = tuple(rule for name in _SPATIAL for rule in matrix(name, name))
    return within(rules, f"{key}.", f"{leaf}.")
