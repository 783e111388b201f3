"""Makes a page of the site of each notebook, with its outputs as they are committed: nothing is executed."""
import base64
import json
import re
from pathlib import Path

from mkdocs.structure.files import File

# Of a notebook's folder, and of a link to one.
FOLDER = 'notebooks'


def on_files(files, config):
    """Add the pages and their pictures. The notebooks themselves are in the site too, to be downloaded."""
    for path in sorted(Path(config.docs_dir, FOLDER).glob('*.ipynb')):
        text, pictures = as_markdown(json.loads(path.read_text(encoding='utf-8')), path)
        files.append(File.generated(config, f'{FOLDER}/{path.stem}.md', content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f'{FOLDER}/{name}', content=picture))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let other pages' links to a notebook lead to its page."""
    if page.file.src_uri.startswith(f'{FOLDER}/'):
        return markdown
    return re.sub(rf'(\]\((?:\.\./)*{FOLDER}/\w+)\.ipynb', r'\1.md', markdown)


def as_markdown(notebook, path):
    """Return the text of a notebook's page and its pictures, as a dictionary from names to PNG files."""
    parts, pictures, heading = [], {}, path.stem
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(source)
            heading = (re.findall(r'^#+ (.*)$', source, re.MULTILINE) or [heading])[-1]
            if len(parts) == 1:
                parts.append(f'[Download this notebook]({path.name})')
            continue
        parts.append(f'```python\n{source}\n```')
        for output in cell['outputs']:
            if 'text' in output:
                parts.append('```text\n' + ''.join(output['text']).rstrip() + '\n```')
            elif 'image/png' in output['data']:
                name = f'{path.stem}-{len(pictures) + 1}.png'
                pictures[name] = base64.b64decode(''.join(output['data']['image/png']))
                parts.append(f'![Drawn by the code above: {heading}]({name})')
    return '\n\n'.join(parts) + '\n', pictures
