"""The few things that this package asks of a tokenizer, without importing transformers."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from xcalib.data._sample import Tokens

__all__ = ["Encoder", "Tokenizer"]

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    def __call__(self, text: str, *, add_special_tokens: bool = ...) -> Mapping[str, Any]: ...


class Encoder:
    """Turns text into ids; ``prefix`` is the bos token if this tokenizer adds one, and counts towards lengths."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.prefix = self._bos()

    def ids(self, text: str) -> Tokens:
        """Ids of the text alone, shape (tokens,), int64; a lone surrogate, which no tokenizer takes, is a question mark."""
        if _SURROGATE.search(text):
            text = text.encode("utf-8", "replace").decode("utf-8")
        with _length_warning_silenced():
            return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64).reshape(-1)

    def with_prefix(self, ids: Tokens) -> Tokens:
        """The ids with bos in front when the tokenizer adds one."""
        return np.concatenate([self.prefix, ids])

    def _bos(self) -> Tokens:
        # build_inputs_with_special_tokens is gone from transformers 5: an empty text shows what is added in front.
        added = list(self.tokenizer("", add_special_tokens=True)["input_ids"])
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return np.asarray(added[:1] if bos is not None and added[:1] == [bos] else [], dtype=np.int64)


def _is_not_length_warning(record: logging.LogRecord) -> bool:
    return "longer than the specified maximum sequence length" not in record.getMessage()


@contextmanager
def _length_warning_silenced() -> Iterator[None]:
    # Texts are cut after they were encoded, so the tokenizer's warning would be wrong each time.
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addFilter(_is_not_length_warning)
    try:
        yield
    finally:
        logger.removeFilter(_is_not_length_warning)
