"""The pages of the documentation, README among them, and the Python in them."""
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = ['README.md', *sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'docs').glob('**/*.md'))]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}


def python_of(page: str) -> list[str]:
    """The blocks of Python of a page, in order."""
    return re.findall(r'```python\n(.*?)```', TEXTS[page], re.DOTALL)


WITH_PYTHON = [page for page in PAGES if python_of(page)]
