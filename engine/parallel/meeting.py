"""How the processes of a run find each other, before JAX does.

JAX ends a process that waits in vain with a stack trace that names nobody. So all meet
first: process 0 listens at the coordinator's address, which JAX's own service takes
afterwards, and the others call. The connections stay: `Peers` talks over them.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from engine.errors import InputError, one_line

_PAUSE = 0.2  # seconds between two calls
_LONGEST = 2**22  # bytes of a message


class Place(NamedTuple):
    """Which process of how many this is, and where process 0 is met."""

    process: int
    processes: int
    address: str  # host:port

    def __str__(self) -> str:
        return f"process {self.process} of {self.processes}"

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The address in its parts; that it has them is checked."""
        host, port = self.address.rsplit(":", 1)
        return host.strip("[]"), int(port)


def check_place(place: Place) -> None:
    """Refuse numbers that fit no run.

    Raises:
        InputError: naming what was given.
    """
    host, _, port = place.address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"--coordinator: {place.address!r} is no HOST:PORT; give the machine of "
            "process 0 and a port that is free there, such as node001:8476"
        )
    if not 0 <= place.process < place.processes:
        raise InputError(
            f"--process-id {place.process}: {place.processes} processes are numbered "
            f"from 0 to {place.processes - 1}; give each its own number"
        )


class Line:
    """A connection that carries messages, each a JSON object on a line."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._reader = connection.makefile("rb")

    def send(self, message: Any) -> None:
        """Send one; from one thread at a time."""
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> Any:
        """The next message.

        Raises:
            OSError: none came in that time, or none will come any more.
        """
        self.connection.settimeout(seconds)
        text = self._reader.readline(_LONGEST)
        if not text.endswith(b"\n"):
            raise ConnectionError("the connection has ended")
        return json.loads(text)

    def close(self) -> None:
        """End it: the other side is told."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self._reader.close()
        self.connection.close()


def meet(place: Place, seconds: float) -> dict[int, Line]:
    """Lines to the others, by their numbers: of process 0 to all, else to process 0.

    Raises:
        InputError: who did not come in time, or came as somebody else.
    """
    check_place(place)
    return _await_all(place, seconds) if place.process == 0 else _call(place, seconds)


def _await_all(place: Place, seconds: float) -> dict[int, Line]:
    lines: dict[int, Line] = {}
    deadline = time.monotonic() + seconds
    with _listener(place) as listener:
        try:
            while len(lines) < place.processes - 1:
                left = deadline - time.monotonic()
                if left <= 0 or not _accept(listener, place, lines, left):
                    _refuse_missing(place, lines, seconds)
            for line in lines.values():
                line.send({"go": True})
        except InputError as error:
            for line in lines.values():
                with contextlib.suppress(OSError):
                    line.send({"error": str(error)})
                line.close()
            raise
    return lines


@contextlib.contextmanager
def _listener(place: Place) -> Iterator[socket.socket]:
    port = place.host_and_port[1]
    both = socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            ("", port),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=place.processes,
        )
    except OSError as error:
        raise InputError(
            f"{place} cannot listen at {place.address}: {one_line(error)}; give "
            "another port with --coordinator (or JAX_COORDINATOR_PORT)"
        ) from error
    with listener:
        yield listener


def _accept(
    listener: socket.socket, place: Place, lines: dict[int, Line], seconds: float
) -> bool:
    """Whether somebody called in time; one who is no process of a run is left out."""
    listener.settimeout(seconds)
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        return False
    line = Line(connection)
    try:
        hello = line.receive(min(seconds, 10.0))
        process, processes = int(hello["process"]), int(hello["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        line.close()
        return True
    wrong = None
    if processes != place.processes:
        wrong = (
            f"process {process} was started as one of {processes}, and process 0 as "
            f"one of {place.processes}; give all the same --num-processes"
        )
    elif process in lines or not 0 < process < processes:
        wrong = f"two processes were started as number {process}; give each its own"
    if wrong:
        with contextlib.suppress(OSError):
            line.send({"error": wrong})
        line.close()
        raise InputError(wrong)
    lines[process] = line
    return True


def _refuse_missing(place: Place, lines: dict[int, Line], seconds: float) -> None:
    missing = sorted(set(range(1, place.processes)) - set(lines))
    names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    of = "process" if len(missing) == 1 else "processes"
    raise InputError(
        f"{of} {names} of {place.processes} did not come to process 0 at "
        f"{place.address} within {seconds:g} s; look at their output, and at whether "
        "they can reach that address (--initialization-timeout gives more time)"
    )


def _call(place: Place, seconds: float) -> dict[int, Line]:
    deadline, why = time.monotonic() + seconds, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(place.host_and_port, min(left, 10.0))
        except OSError as error:
            why = f" ({one_line(error)})"
            time.sleep(min(_PAUSE, max(left, 0.0)))
            continue
        line = Line(connection)
        try:
            line.send({"process": place.process, "processes": place.processes})
            # Process 0 waits for all of us as long as we do for it.
            answer = line.receive(left + 10.0)
        except (OSError, ValueError) as error:
            why = f" ({one_line(error)})"
            line.close()
            time.sleep(_PAUSE)
            continue
        if "error" in answer:
            line.close()
            raise InputError(str(answer["error"]))
        return {0: line}
    raise InputError(
        f"{place}: the coordinator (process 0) at {place.address} did not answer "
        f"within {seconds:g} s{why}; look at its output, and at whether that address "
        "can be reached from here (--initialization-timeout gives more time)"
    )
