"""Reads this project's docstrings as mkdocstrings expects them: a section `Example:` is one of examples."""
import re

import griffe


class Examples(griffe.Extension):
    """Renames the sections, so that their lines are shown as code."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = re.sub(r'^( *)Example:$', r'\1Examples:', obj.docstring.value, flags=re.MULTILINE)
