"""Light and dark style sheets for browsers that do not know `light-dark()`.

The sheets of this folder name both colors in one place, as `light-dark(LIGHT, DARK)`. Browsers know
that function since spring 2024; what is written to a page says the same in rules that older ones
read: the light colors, and below them the dark ones for a reader whose system is dark and for the
page's own switch (`data-theme`). JupyterLab's theme counts where a view stands in a notebook. Print
is light, so all rules of dark colors are rules of the screen.
"""

from __future__ import annotations

import re

BOTH = re.compile(r"light-dark\(([^(),]+),\s*([^(),]+)\)")
"""Two colors, each without parentheses of its own."""
RULE = re.compile(r"(?P<selector>[^{}@;]+)\{(?P<body>[^{}@]*light-dark\([^{}@]*)\}")
"""A rule that names two colors."""


def themed(sheet: str) -> str:
    """A style sheet in which every rule with `light-dark()` is followed by its dark colors.

    Args:
        sheet: CSS; the rules with `light-dark()` stand outside of media queries, and their
            selectors are single ones.

    Returns:
        CSS without `light-dark()`.
    """
    return RULE.sub(lambda rule: _rules(rule["selector"].strip(), rule["body"]), sheet)


def _rules(selector: str, body: str) -> str:
    light = BOTH.sub(r"\1", body).strip()
    both = [part.strip() for part in body.split(";") if "light-dark(" in part]
    lights = "; ".join(BOTH.sub(r"\1", part) for part in both)
    dark = "; ".join(BOTH.sub(r"\2", part) for part in both)
    inside = "" if selector == ":root" else f" {selector}"
    system = ':root:not([data-theme="light"])'
    system = f":where({system}){inside}" if inside else system
    rules = [
        f"@media screen and (prefers-color-scheme: dark) {{ {system} {{ {dark} }} }}",
        f'@media screen {{ :root[data-theme="dark"]{inside} {{ {dark} }} }}',
    ]
    if inside:
        rules += [
            f'@media screen {{ [data-jp-theme-light="false"]{inside} {{ {dark} }}'
            f' [data-jp-theme-light="true"]{inside} {{ {lights} }} }}'
        ]
    return "\n".join([f"\n{selector} {{ {light} }}", *rules])
