"""Helper for tests of the command line: the error line of a failed command."""


def one_error(result: tuple[int, str, str]) -> str:
    """Returns the error line of a failed command, which must print nothing else."""
    status, out, err = result
    lines = [line for line in err.splitlines() if line.strip() and "scene/s" not in line]
    assert (status, out) == (2, "")
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]
