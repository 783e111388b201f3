"""Pieces of self-contained HTML pages: the pictures are in them, and texts of others are shown as they are."""
import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

__all__ = ['figure', 'page', 'paragraph', 'picture', 'preformatted', 'table']

_STYLE = '''
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.marked { font-weight: 600; background: #fdf0f2; }
.wide { overflow-x: auto; }
img, svg { max-width: 100%; height: auto; }
figure { margin: 2rem 0; }
figure.thumbnails img { height: 6rem; margin: .1rem; }
figcaption { color: #555; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
'''


def page(title: str, parts: Iterable[str]) -> str:
    """Return a whole page.

    Args:
        title: Its heading.
        parts: HTML, as the other functions return it.
    """
    body = '\n'.join(parts)
    return f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
{body}
</body></html>
'''


def paragraph(text: str, tag: str = 'p') -> str:
    """Return a paragraph, or a heading (`tag='h2'`)."""
    return f'<{tag}>{escape(text)}</{tag}>'


def preformatted(text: str) -> str:
    """Return text in the typeface of code, with its line breaks."""
    return f'<pre>{escape(text)}</pre>'


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], marked: int | None = None) -> str:
    """Return a table.

    Args:
        columns: The head of the table.
        rows: The cells, any values.
        marked: The number of the row that stands out. Default: none.
    """
    head = ''.join(f'<th>{escape(column)}</th>' for column in columns)
    body = ''.join(
        f'<tr{" class=marked" if number == marked else ""}>' + ''.join(f'<td>{escape(str(cell))}</td>' for cell in row)
        + '</tr>' for number, row in enumerate(rows))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(data: bytes, kind: str, description: str) -> str:
    """Return a picture that is part of the page.

    Args:
        data: The contents of its file.
        kind: 'png' or 'jpeg'.
        description: What it shows, for those who cannot see it.
    """
    return f'<img alt="{escape(description)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def figure(contents: Iterable[str], caption: str, *, thumbnails: bool = False) -> str:
    """Return pictures with a caption.

    Args:
        contents: Of `picture`, or SVG.
        caption: The text below.
        thumbnails: Whether they are small, side by side.
    """
    return (f'<figure{" class=thumbnails" if thumbnails else ""}>{"".join(contents)}'
            f'<figcaption>{escape(caption)}</figcaption></figure>')
