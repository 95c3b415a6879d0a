"""Tables for the terminal and for text files."""

from collections.abc import Sequence

import tabulate


def text_table(rows: Sequence[Sequence[str]], headers: Sequence[str] = ()) -> str:
    """Returns an aligned table: the first column to the left, the others to the right.

    Args:
      rows: [n][columns] texts; a leading space indents. A row may be shorter: a heading.
      headers: [columns] titles; none: the rows alone, without a rule above.
    """
    columns = max(map(len, [*rows, headers]))
    text = tabulate.tabulate(
        [[*row, *[""] * (columns - len(row))] for row in rows],
        headers,
        tablefmt="simple" if headers else "plain",
        disable_numparse=True,  # the numbers are formatted already
        colalign=("left", *["right"] * (columns - 1)),
        headersalign=("left", *["right"] * (columns - 1)) if headers else None,
        preserve_whitespace=True,
    )
    return "\n".join(line.rstrip() for line in text.splitlines())
