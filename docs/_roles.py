"""Docstrings name other objects as Sphinx does, :func:`xcalib.load_profile`; on the site that is plain code."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`|(``.+?``|`[^`]+`)|\]\[")


def _plain(found: re.Match[str]) -> str:
    if found[0] == "][":  # [layer][head] is no link
        return "]\\["
    return found[3] or f"`{found[2].rpartition('.')[2] if found[1] else found[2]}`"


class Roles(griffe.Extension):
    """Turns the roles of every docstring into code, and keeps indices from being read as links."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for every module, class, function and attribute."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_plain, obj.docstring.value)
