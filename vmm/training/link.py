"""A line between process 0 and every other of a job: they wait for each other at the start, and notice a death at once.

Plain sockets: the kernel closes those of a killed process, whatever held it, and keeps asking a silent machine. JAX's own
service ends a process by abort() with a C++ stack, and does not say who is missing.
"""

import contextlib
import ctypes
import json
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from vmm.errors import PeerError
from vmm.training.cluster import Place, listening_host

_SILENT = 10  # seconds after which a machine that answers nothing is gone


class Link:
    """The lines of one process: process 0 has one to each other, the others have one to process 0.

    Messages are mappings, sent as a line of JSON. hosts: process → host name, where they are known.
    """

    def __init__(self, place: Place, bind: str, timeout: float):
        """Waits until all processes are there. bind: address that process 0 listens at.

        Raises:
          PeerError: they are not within `timeout` seconds; the line says who is missing.
        """
        self.place = place
        self.hosts: dict[int, str] = {place.process: socket.gethostname()}
        deadline = time.monotonic() + timeout
        if place.process == 0:
            self.lines = _gather(place, bind, deadline, timeout, self.hosts)
        else:
            self.lines = {0: _reach(place, deadline, timeout, self.hosts)}
        for line in self.lines.values():
            _watch_closely(line)
        self.sending = threading.Lock()

    def start(self, receive: Callable, gone: Callable) -> None:
        """Calls receive(process, message) and gone(process), once, from a thread of its own."""
        threading.Thread(target=self._read, args=(receive, gone), name="vmm-link", daemon=True).start()

    def send(self, message: dict, besides: int | None = None) -> None:
        """Sends to process 0, or from there to all others (besides one); what cannot be sent is lost."""
        data = (json.dumps(message) + "\n").encode()
        with self.sending:
            for process, line in list(self.lines.items()):
                if process != besides:
                    with contextlib.suppress(OSError):  # the reader will notice
                        line.sendall(data)

    def _read(self, receive: Callable, gone: Callable) -> None:
        with selectors.DefaultSelector() as selector:
            for process, line in self.lines.items():
                selector.register(line, selectors.EVENT_READ, (process, _Lines(line)))
            while selector.get_map():
                for key, _ in selector.select():
                    process, lines = key.data
                    messages = lines.read()
                    for message in messages or []:
                        receive(process, message)
                    if messages is None:
                        selector.unregister(key.fileobj)
                        self.lines.pop(process, None)
                        gone(process)

    def drain(self, seconds: float) -> None:
        """Waits until the others have closed their ends."""
        deadline = time.monotonic() + seconds
        while self.lines and time.monotonic() < deadline:
            time.sleep(0.02)


class _Lines:
    """Whole lines of a socket as messages; what is not JSON is left out."""

    def __init__(self, line: socket.socket):
        self.line, self.rest = line, b""

    def read(self) -> list[dict] | None:
        """One recv: the messages that it completes; None: the other end is closed."""
        try:
            data = self.line.recv(65536)
        except OSError:
            data = b""
        if not data:
            return None
        *whole, self.rest = (self.rest + data).split(b"\n")
        if len(self.rest) > 1 << 20:  # not one of ours
            return None
        messages = []
        for text in whole:
            try:
                message = json.loads(text)
            except ValueError:
                continue
            messages += [message] if isinstance(message, dict) else []
        return messages


def _gather(place: Place, bind: str, deadline: float, timeout: float, hosts: dict) -> dict[int, socket.socket]:
    """Process 0: takes the hello of every other, then tells all to go."""
    port = int(place.coordinator.rsplit(":", 1)[1])
    try:
        server = socket.create_server(
            (bind, port), family=socket.AF_INET6 if ":" in bind else socket.AF_INET, backlog=4096,
            dualstack_ipv6=bind == "::",
        )  # fmt: skip
    except OSError as error:
        raise PeerError(
            f"process 0: cannot listen at {bind}:{port} ({error.strerror}); is another job there? Set JAX_COORDINATOR_PORT "
            "or JAX_COORDINATOR_ADDRESS on all processes"
        ) from None
    there: dict[int, socket.socket] = {}
    with server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while len(there) < place.processes - 1:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = [process for process in range(1, place.processes) if process not in there]
                line = _not_there(missing, place, timeout)
                _tell(there.values(), {"refused": line})
                raise PeerError(line)
            for key, _ in ready:
                if key.fileobj is server:
                    line, _ = server.accept()
                    selector.register(line, selectors.EVENT_READ, _Lines(line))
                    continue
                line, messages = key.fileobj, key.data.read()
                known = [process for process, other in there.items() if other is line]
                if messages is None:  # gone before it began: its next life may come
                    selector.unregister(line)
                    line.close()
                    for process in known:
                        del there[process]
                for hello in messages or []:
                    process, count = hello.get("process"), hello.get("processes")
                    if count != place.processes or process not in range(1, place.processes):
                        _tell(
                            [line],
                            {"refused": f"process 0 counts {place.processes} processes, process {process} {count}"},
                        )
                        continue
                    if process in there:
                        _tell([there[process]], {"refused": f"another process came as number {process}, too"})
                    there[process], hosts[process] = line, str(hello.get("host"))
    _tell(there.values(), {"go": hosts[0]})
    return there


def _reach(place: Place, deadline: float, timeout: float, hosts: dict) -> socket.socket:
    """Another process: says hello to process 0 until that tells it to go."""
    host, port = place.coordinator.rsplit(":", 1)
    why = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 10))
            _tell([line], {"process": place.process, "processes": place.processes, "host": hosts[place.process]})
            lines = _Lines(line)
            # Process 0 tells who is missing at its own deadline; it may have begun a little later.
            line.settimeout(left + 30)
            while (messages := lines.read()) is not None:
                for answer in messages:
                    if "refused" in answer:
                        raise PeerError(str(answer["refused"]))
                    if "go" in answer:
                        line.settimeout(None)
                        hosts[0] = str(answer["go"])
                        return line
            why = "it closes the line: another program, or a job that is ending"
            line.close()
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(0.5)
    raise PeerError(
        f"process {place.process} of {place.processes}: process 0 is not at {place.coordinator} after {timeout:.0f} s ({why}); "
        "start it, or correct JAX_COORDINATOR_ADDRESS; JAX_COORDINATOR_BIND_ADDRESS says where it listens"
    )


def _not_there(missing: list, place: Place, timeout: float) -> str:
    names = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return (
        f"process {names} of {place.processes} did not come to {place.coordinator} within {timeout:.0f} s; see what became "
        "of it on its host, or whether a firewall stands between"
    )


def _tell(lines, message: dict) -> None:
    for line in lines:
        with contextlib.suppress(OSError):
            line.sendall((json.dumps(message) + "\n").encode())


def _watch_closely(line: socket.socket) -> None:
    """The kernel asks a silent machine every 2 s and gives it up after _SILENT."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 4),
        ("TCP_KEEPINTVL", 2),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", _SILENT * 1000),
    ):
        if hasattr(socket, name):  # Linux
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def abort_late() -> None:
    """An abort() of this process waits for 6 s: where process 0 is gone JAX's client aborts at once, and the link has a line to say.

    The handler is sleep() of the C library, called with the signal's number as the seconds: no Python runs in it.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        library.signal.restype = ctypes.c_void_p
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def bind_address(place: Place, told: str | None) -> str:
    """Returns the address that process 0 listens at. told: JAX_COORDINATOR_BIND_ADDRESS, which wins."""
    return (
        told.rsplit(":", 1)[0].strip("[]") if told else listening_host(place.coordinator.rsplit(":", 1)[0].strip("[]"))
    )
