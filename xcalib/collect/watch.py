"""How ranks learn at once that one of them died or gave up, wherever they are themselves.

Every rank holds one connection to rank 0, and a thread of its own listens on it. The system closes the connections of a
process that ends, however it ends, so a death is known within milliseconds, on other hosts too; of a host that vanished,
TCP's keep-alive tells within a minute. The same connections carry steps of progress and the message of a rank that gives up.
"""

import contextlib
import hmac
import json
import os
import platform
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from xcalib.progress import Progress

__all__ = ["KEPT", "LOST", "Watch", "own_name"]

LOST = 75  # exit code of a rank whose job another one's death ended
KEEP_ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}  # seconds, seconds, times
SAME_SECONDS = (
    5.0  # for rank 0 to meet the error that another rank reports: what all meet is said in rank 0's own words
)
PARENT_SECONDS = 1.0  # between looks whether the launcher still lives
KEPT = "what was finished is kept: run the same command with --resume, with any number of ranks"


class _Peer:
    """The connection to another rank, and what is known of it."""

    def __init__(self, connection: socket.socket, rank: int, name: str) -> None:
        self.connection = connection
        self.rank = rank
        self.name = name  # host and process
        self.parted = False
        self.rest = b""

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # gone: the listening thread finds out
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Whole messages that arrived; None at the end of the connection."""
        try:
            data = self.connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


class Watch:
    """One rank's connections: of rank 0 to all others, of these to rank 0."""

    def __init__(
        self, rank: int, peers: list[_Peer], *, silent: bool = False, says: Callable[[str], None] | None = None
    ) -> None:
        """Begin to listen.

        Args:
            rank: of this process.
            peers: open connections.
            silent: of deaths, since the launcher tells them.
            says: prints a line; default to stderr.
        """
        self._rank = rank
        self._peers = {peer.rank: peer for peer in peers}
        self._silent = silent
        self._says = says or _print
        self._code: int | None = None  # this process is to end with it, once rank 0 has
        self._parted = threading.Event()
        self._ending = threading.Lock()
        self._stage = 0
        self._early: dict[int, int] = {}  # steps of stages that others are in already
        self._advance: Callable[[int], None] | None = None
        self._drawing = threading.Lock()
        self._parent = os.getppid()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="xcalib ranks")
        self._thread.start()

    @staticmethod
    def listen(host: str) -> socket.socket:
        """Rank 0's open port; only on the loopback where all ranks are on this host."""
        if host in ("127.0.0.1", "localhost", "::1"):
            return socket.create_server((host, 0), family=socket.AF_INET6 if host == "::1" else socket.AF_INET)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", 0))

    @classmethod
    def accept(cls, listener: socket.socket, token: str, size: int, timeout: float, **options: Any) -> "Watch":
        """Rank 0: wait for the others, each of which must know the token.

        Raises:
            OSError: they did not come in time.
        """
        peers: dict[int, _Peer] = {}
        listener.settimeout(timeout)
        with listener:
            while len(peers) < size - 1:
                connection, _ = listener.accept()
                connection.settimeout(timeout)
                with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # a stranger's
                    hello = json.loads(connection.makefile("rb").readline(4096))
                    rank = int(hello["rank"])
                    if hmac.compare_digest(str(hello["token"]), token) and 0 < rank < size:
                        peers[rank] = _Peer(connection, rank, str(hello["name"]))
                        continue
                connection.close()
        for peer in peers.values():
            peer.send({"name": own_name()})
        return cls(0, [_settled(peer) for peer in peers.values()], **options)

    @classmethod
    def connect(cls, where: tuple[str, int], token: str, rank: int, timeout: float, **options: Any) -> "Watch":
        """Any other rank: connect to rank 0. Raises OSError."""
        connection = socket.create_connection(where, timeout)
        peer = _Peer(connection, 0, "")
        peer.send({"token": token, "rank": rank, "name": own_name()})
        hello = connection.makefile("rb", buffering=0).readline(4096)
        if not hello:
            raise OSError("rank 0 hung up")
        peer.name = str(json.loads(hello)["name"])
        return cls(rank, [_settled(peer)], **options)

    def progress(self, progress: Progress) -> Progress:
        """Rank 0 draws with the given one, the steps of others too, who send theirs."""
        return self._draw(progress) if self._rank == 0 else self._report

    def _draw(self, progress: Progress) -> Progress:
        @contextmanager
        def drawn(description: str, total: int) -> Iterator[Callable[[int], None]]:
            with progress(description, total) as advance:
                with self._drawing:
                    self._stage += 1
                    self._advance = advance
                    advance(self._early.pop(self._stage, 0))
                try:
                    yield advance
                finally:
                    with self._drawing:
                        self._advance = None

        return drawn

    @contextmanager
    def _report(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        del description, total  # rank 0 says them
        self._stage += 1
        stage = self._stage
        yield lambda steps: self._peers[0].send({"stage": stage, "steps": steps})

    def part(self) -> None:
        """The job is done: no end of another process concerns this one any more."""
        self._parted.set()
        for peer in self._peers.values():
            peer.send({"bye": True})

    def leave(self, code: int, message: str | None) -> None:
        """End the job with an exit code; on rank 0 the others wait for its end, and elsewhere this does not return.

        Args:
            code: of all ranks.
            message: that rank 0 prints; None if it prints one of its own.
        """
        if self._rank == 0:
            for peer in self._peers.values():
                peer.send({"stop": code})
            self._parted.set()
            return
        if message is None:
            self._code = code
            self.part()
        else:
            self._peers[0].send({"error": message, "code": code})
        self._thread.join()
        _end(code)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers.values():
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while selector.get_map():
                for key, _ in selector.select(PARENT_SECONDS):
                    messages = key.data.receive()
                    for message in messages or ():
                        self._handle(key.data, message)
                    if messages is None:
                        selector.unregister(key.fileobj)
                        key.data.connection.close()
                        self._ended(key.data)
                if os.getppid() != self._parent and not self._parted.is_set():
                    # nobody is left to end the ranks
                    self._finish(LOST, f"what started the ranks was killed; {KEPT}", said=self._rank == 0)

    def _handle(self, peer: _Peer, message: dict[str, Any]) -> None:
        if "steps" in message:
            with self._drawing:
                stage, steps = int(message["stage"]), int(message["steps"])
                if stage == self._stage and self._advance is not None:
                    self._advance(steps)
                elif stage > self._stage:
                    self._early[stage] = self._early.get(stage, 0) + steps
        elif "bye" in message:
            peer.parted = True
        elif "stop" in message:
            self._code = int(message["stop"])
        elif "error" in message and not self._parted.wait(SAME_SECONDS):
            self._finish(int(message["code"]), f"rank {peer.rank} on {peer.name}: {message['error']}", said=True)

    def _ended(self, peer: _Peer) -> None:
        """A connection has ended: in order, or with the process at its other end."""
        if self._code is not None:
            _end(self._code)
        if peer.parted or self._parted.is_set():
            return
        # of all ranks that see rank 0 die, one speaks
        speaks = not self._silent and self._rank in (0, 1)
        self._finish(LOST, f"rank {peer.rank} on {peer.name} died; {KEPT}", said=speaks)

    def _finish(self, code: int, line: str, *, said: bool) -> NoReturn:
        with self._ending:
            for peer in self._peers.values():
                peer.send({"stop": code})
            if said:
                self._says(line)
            _end(code)


def _settled(peer: _Peer) -> _Peer:
    peer.connection.settimeout(None)
    peer.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            peer.connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def own_name() -> str:
    """This process as messages name it: host and process number."""
    return f"{platform.node()} (process {os.getpid()})"


def _print(line: str) -> None:
    sys.stderr.write(f"error: {line}\n")


def _end(code: int) -> NoReturn:
    """End the process now, whatever its main thread does; files are whole or not there at any moment."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
