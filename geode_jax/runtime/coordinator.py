"""Checks the address of process 0 before JAX waits there for minutes."""

import contextlib
import socket
import time

from geode_jax.exports.files import UserError

ANSWER_SECONDS = 10
"""Time within which a running coordinator answers."""

# The start of an HTTP/2 connection: the client's preface and an empty SETTINGS frame. A server's
# first frame is a SETTINGS frame too: 3 bytes of length, then the type.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4


def host_and_port(address: str) -> tuple[str, int]:
    """Returns the parts of HOST:PORT; an IPv6 address is in brackets.

    Raises:
        UserError: the address has another form.
    """
    host, colon, port = address.rpartition(":")
    number = port.isascii() and port.isdigit() and len(port) < 6
    if not (colon and host and number and 0 < int(port) < 65536):
        raise UserError(f"--coordinator_address {address}: not HOST:PORT")
    return host.strip("[]"), int(port)


def refuse_unknown_host(address: str) -> None:
    """Refuses a host that no name service knows.

    Raises:
        UserError: the host is unknown, or the address is not HOST:PORT.
    """
    host, port = host_and_port(address)
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--coordinator_address {address}: host {host}: {reason}") from None


def refuse_taken_port(address: str) -> None:
    """Refuses, in process 0, a port on which another program listens.

    Raises:
        UserError: another program listens there.
    """
    _, port = host_and_port(address)
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not count
        try:
            s.bind(("", port))
        except OSError as error:
            raise UserError(
                f"--coordinator_address {address}: port {port}: {error.strerror}"
            ) from None


def wait_for_coordinator(address: str, seconds: float) -> None:
    """Waits, in the other processes, until process 0 listens; refuses any other program there.

    Args:
        address: HOST:PORT.
        seconds: time for process 0 to start.

    Raises:
        UserError: process 0 did not start in time, or another program answers.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection(host_and_port(address), timeout=ANSWER_SECONDS)
            break
        except OSError as error:
            if time.monotonic() > end:
                reason = error.strerror or error
                raise UserError(
                    f"processes: process 0 was not at {address} within {seconds:.0f} s: {reason}"
                ) from None
            time.sleep(0.2)
    with connection:
        frame = b""
        with contextlib.suppress(OSError):  # closed, or silent for too long
            connection.sendall(_HELLO)
            while len(frame) < 9 and (more := connection.recv(9 - len(frame))):
                frame += more
    if len(frame) < 9 or frame[3] != _SETTINGS or frame[:2] != b"\0\0":
        raise UserError(
            f"--coordinator_address {address}: the program that listens there is not process 0 of "
            "this run"
        )
