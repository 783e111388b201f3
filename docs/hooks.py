"""Puts files that are outside docs/ into the site: pages link to them as they lie in the repository."""
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Pictures and a page, where the benchmarks write them.
OUTSIDE = [f'benchmarks/results/{name}' for name in ('demo.png', 'accuracy.png', 'accuracy_trials.md')]


def on_files(files, config):
    """Add the files."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let a page's links to them lead into the site."""
    for name in OUTSIDE:
        markdown = markdown.replace(f'](../{name}', f']({name}')
    return markdown
