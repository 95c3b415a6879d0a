"""The one exception whose message is meant for the user: entry points print it and exit with 2."""


class UserError(Exception):
    """Bad input, said in one line: what, where, which rule."""
