"""Prompt files and a chat template that several tests of prompts and rollouts share."""

import json

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt"
    " %}[go]{% endif %}{{ mark | default('') }}"
)
"""Writes `[role]content` for each message, `[go]` to ask for the reply, and `mark` at the end."""


def jsonl(path, *rows):
    """The path, after one JSON object per row was written to it."""
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path
