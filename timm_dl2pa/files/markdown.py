"""Markdown of texts that somebody else wrote: they are shown as they are, whatever markup they hold."""
import re
import unicodedata
from typing import Any

__all__ = ['code', 'escaped', 'table']

# The punctuation that can begin markup within a line, a link (also a bare one), an entity, a formula or HTML.
_MARKUP = re.compile(r'[!"#$%&*+.:;<=>?@\[\\\]^_`{|}~]')


def escaped(value: Any) -> str:
    """Return a value as text of one line without markup. Numbers are returned as they are.

    Example:
        >>> print(escaped('[fox](http://a.b) <b>'))
        \\[fox\\](http\\://a\\.b) \\<b\\>
    """
    if isinstance(value, (int, float)):
        return str(value)
    value = str(value)
    visible = ''.join(' ' if unicodedata.category(character) == 'Cc' else character for character in value)
    return _MARKUP.sub(r'\\\g<0>', ' '.join(visible.split()))


def code(name: str) -> str:
    """Return a name, such as that of a model or a licence, in the typeface of code, or escaped where it is no name."""
    return f'`{name}`' if re.fullmatch(r'[\w./@+-]+', name) else escaped(name)


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Return a table of cells that hold no unescaped text of somebody else's."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(' '.join(str(cell).split()) for cell in line) + ' |' for line in lines)
