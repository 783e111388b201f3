"""The demo's report: one HTML file, with the pictures in it."""
import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

__all__ = ['write_report']

_STYLE = '''
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.ours { font-weight: 600; background: #fdf0f2; }
.wide { overflow-x: auto; }
img { max-width: 100%; height: auto; }
figure { margin: 2rem 0; }
figcaption { color: #555; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
'''


def write_report(path: Path, title: str, setting: str, columns: Sequence[str], rows: Sequence[Sequence[str]],
                 ours: int, claims: Sequence[str], pictures: Sequence[tuple[Path, str]], code: str) -> None:
    """Write the report.

    Args:
        path: The file to write.
        title: Its heading.
        setting: What was trained on what.
        columns: The head of the table.
        rows: The cells of the table.
        ours: The row of the default head.
        claims: The sentences below the table.
        pictures: PNG files, each with its caption.
        code: How the model is loaded.
    """
    head = ''.join(f'<th>{escape(column)}</th>' for column in columns)
    body = ''.join(
        f'<tr{" class=ours" if number == ours else ""}>' + ''.join(f'<td>{escape(cell)}</td>' for cell in row) + '</tr>'
        for number, row in enumerate(rows))
    figures = ''.join(
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}"><figcaption>{escape(caption)}</figcaption></figure>\n'
        for picture, caption in pictures)
    path.write_text(f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>{escape(setting)}</p>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{''.join(f'<p>{escape(claim)}</p>' for claim in claims)}
{figures}<pre>{escape(code)}</pre>
</body></html>
''', encoding='utf-8')
