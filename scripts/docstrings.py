"""Docstrings as the documentation shows them: doctests and text blocks become fenced code.

An extension of griffe, which reads the docstrings for mkdocstrings (see kfacopt/docs/mkdocs.yml). Markdown takes `>>>`
for a quotation.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", re.MULTILINE)
_TEXT_BLOCK = re.compile(r"^( *)\.\. code-block:: text\n\n((?:(?:\1 +.*)?\n)+)", re.MULTILINE)


def fenced(docstring: str) -> str:
    r"""A docstring whose doctests and text blocks are fenced.

    >>> fenced("What it is.\n\n>>> x = 1\n>>> x + x\n2\n\nMore.")
    'What it is.\n\n```pycon\n>>> x = 1\n>>> x + x\n2\n```\n\nMore.'
    >>> fenced("As in\n\n.. code-block:: text\n\n    a <- b\n\n    c\n\nMore.")
    'As in\n\n```text\na <- b\n\nc\n```\n\nMore.'
    """

    def block(match: re.Match[str]) -> str:
        indent, lines = match[1], match[2].rstrip().splitlines()
        deeper = min(len(line) - len(line.lstrip()) for line in lines if line.strip()) - len(indent)
        inside = "\n".join(indent + line[len(indent) + deeper :] if line.strip() else "" for line in lines)
        return f"{indent}```text\n{inside}\n{indent}```\n\n"

    docstring = _DOCTEST.sub(lambda match: f"{match[1]}```pycon\n{match[0]}\n{match[1]}```", docstring)
    return _TEXT_BLOCK.sub(block, docstring)


class Docstrings(griffe.Extension):
    """Fences the code in every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change an object's docstring before it is parsed."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
