"""Bytes that should be text, read in pieces: what is not is found by its line and its place in the file."""

import codecs

__all__ = ["NotTextError", "TextChecker"]


class NotTextError(ValueError):
    """Bytes are not text.

    Attributes:
        reason: why.
        place: the line, counted from 1, and the byte, counted from 0.
    """

    def __init__(self, reason: str, line: int, byte: int) -> None:
        super().__init__(reason, line, byte)
        self.reason = reason
        self.place = f"line {line} byte {byte}"


class TextChecker:
    """Decodes UTF-8 piece by piece.

    Attributes:
        position: bytes of the file before the next piece.
        line: of the next piece's first byte, counted from 1.
    """

    def __init__(self, position: int = 0, line: int = 1) -> None:
        self.position = position
        self.line = line
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def text(self, data: bytes, *, final: bool = False) -> str:
        """The next piece as text; what it ends in the middle of comes with the next.

        Raises:
            NotTextError: it holds a NUL byte, or bytes that are not UTF-8.
        """
        pending = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            raise self._error("not UTF-8", pending + data, error.start, len(pending)) from error
        nul = data.find(b"\0")
        if nul >= 0:
            raise self._error("not text: a NUL byte", data, nul, 0)
        self.position += len(data)
        self.line += data.count(b"\n")
        return text

    def _error(self, reason: str, data: bytes, at: int, pending: int) -> NotTextError:
        return NotTextError(reason, self.line + data.count(b"\n", 0, at), self.position - pending + at)
