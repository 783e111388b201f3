"""The pages of the documentation, README among them, and the Python in them."""
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = ['README.md', *sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'docs').glob('**/*.md'))]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}


def blocks_of(text: str) -> list[str]:
    """The blocks of Python in a text, in order."""
    return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


def python_of(page: str) -> list[str]:
    """The blocks of Python of a page, in order."""
    return blocks_of(TEXTS[page])


WITH_PYTHON = [page for page in PAGES if python_of(page)]
