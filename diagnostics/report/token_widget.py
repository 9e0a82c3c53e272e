"""A token view as a Jupyter widget, where anywidget is installed: clicks come back to Python."""

from __future__ import annotations

from typing import Any

from diagnostics.core.errors import DiagnosticsError

RENDER = """
export default {
  render({ model, el }) {
    el.innerHTML = model.get("fragment");
    globalThis.opdTokenView(el.querySelector(".tokenview"));
    el.addEventListener("tokenview-select", (event) => {
      const before = event.detail.adds ? model.get("selection") : [];
      model.set("selection", [...before, event.detail.chosen]);
      model.save_changes();
    });
  },
};
"""
"""What the widget's module does beside the view's own script."""


def token_widget(fragment: str, style: str, script: str) -> Any:
    """The widget of a view.

    Args:
        fragment: The view as an element.
        style: Its style sheet.
        script: Its script.

    Returns:
        An anywidget with the traits fragment and selection (list of dictionaries with context_id,
        position and token).

    Raises:
        DiagnosticsError: anywidget is not installed.
    """
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise DiagnosticsError(
            f"A token widget needs anywidget ({error}). Install it with `pip install anywidget`, or"
            " this package with its extra `notebook`; the view itself, without selections that come"
            " back, needs nothing."
        ) from error

    class TokenWidget(anywidget.AnyWidget):
        """A token view whose clicks come back to Python."""

        _esm = script + RENDER
        _css = style
        fragment = traitlets.Unicode().tag(sync=True)
        selection = traitlets.List().tag(sync=True)

    return TokenWidget(fragment=fragment)
