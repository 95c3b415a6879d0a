"""Whether process 0 is where the others look for it, before JAX waits for it for minutes."""

import contextlib
import socket
import time

from geode_jax.exports.files import UserError

ANSWER_SECONDS = 10
"""A coordinator that is there answers within so long."""

# HTTP/2's opening: the client's preface and its empty SETTINGS frame. A server's own first frame is
# of the same kind, after 3 bytes of its length.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of HOST:PORT; an IPv6 address stands in brackets.

    Raises:
        UserError: it is none.
    """
    host, colon, port = address.rpartition(":")
    number = port.isascii() and port.isdigit() and len(port) < 6
    if not (colon and host and number and 0 < int(port) < 65536):
        raise UserError(f"--coordinator_address {address}: not HOST:PORT")
    return host.strip("[]"), int(port)


def refuse_unknown_host(address: str) -> None:
    """Refuses a host that no name service knows.

    Raises:
        UserError: it is one, or the address is no HOST:PORT.
    """
    host, port = host_and_port(address)
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--coordinator_address {address}: host {host}: {reason}") from None


def refuse_taken_port(address: str) -> None:
    """For process 0: refuses a port on which another program listens.

    Raises:
        UserError: one does.
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
    """For the other processes: waits until process 0 listens, and refuses whoever else does.

    Args:
        address: HOST:PORT.
        seconds: so long it may take to start.

    Raises:
        UserError: nobody came, or another program answers.
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
