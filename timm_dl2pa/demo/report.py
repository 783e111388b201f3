"""The demo's report: one HTML file, with the pictures in it."""
from collections.abc import Sequence
from pathlib import Path

from ..files.html import figure, page, paragraph, picture, preformatted, table

__all__ = ['write_report']


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
    figures = (figure([picture(file.read_bytes(), 'png', caption)], caption) for file, caption in pictures)
    path.write_text(page(title, [paragraph(setting), table(columns, rows, marked=ours), *map(paragraph, claims),
                                 *figures, preformatted(code)]), encoding='utf-8')
