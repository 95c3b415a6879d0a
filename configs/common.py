"""What every config shares: reading the argument after the colon."""

from geode_jax.errors import UserError


def parse_arg(arg: str | None, switches: dict[str, tuple]) -> dict[str, object]:
    """`"full,thinking=0"` -> {"size": "full", "thinking": 0, ...} with defaults filled in.

    Args:
        arg: what stands after `--config=FILE:`; comma-separated `name=value`, or a bare word that
            is one of the first switch's choices.
        switches: name -> (default, choices or type). A tuple of choices admits just those; a type
            converts.

    Raises:
        UserError: an unknown name or value.
    """
    values = {name: default for name, (default, _) in switches.items()}
    first = next(iter(switches))
    for part in filter(None, (arg or "").split(",")):
        name, _, text = part.partition("=") if "=" in part else (first, "", part)
        if name not in switches:
            raise UserError(f"config: {name}: no such switch; there are {', '.join(switches)}")
        _, allowed = switches[name]
        if isinstance(allowed, tuple):
            kind = type(allowed[0])
            choices = ", ".join(str(choice) for choice in allowed)
            try:
                value = kind(text)
            except ValueError:
                value = None
            if value not in allowed:
                raise UserError(f"config: {name}={text}: not one of {choices}")
        else:
            try:
                value = allowed(text)
            except ValueError:
                raise UserError(f"config: {name}={text}: not a {allowed.__name__}") from None
        values[name] = value
    return values
