"""What tests of the command share: running it, and the one line that it fails with."""


def one_error(result: tuple[int, str, str]) -> str:
    """The error line of a failed command, which said nothing else."""
    status, out, err = result
    lines = [line for line in err.splitlines() if line.strip() and "scene/s" not in line]
    assert (status, out) == (2, "")
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]
