"""Settings objects whose fields callers may also give as keywords.

A function takes one frozen dataclass, e.g. `bootstrap: Bootstrap = Bootstrap()`, so that each
default is written once, in that class. With the decorator its callers may write
`f(x, draws=200)` for `f(x, bootstrap=Bootstrap(draws=200))`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable


def with_settings(config_class: type) -> Callable[[Callable], Callable]:
    """Let a function take the fields of its settings object as keywords too.

    The settings object is the parameter whose default is an instance of the class. A field given
    as a keyword replaces that field of the object. `inspect.signature` shows the fields with their
    defaults.

    Args:
        config_class: A frozen dataclass, every field of which has a default.

    Returns:
        A decorator for functions with such a parameter.

    Raises:
        TypeError: When the function is decorated, if no parameter has such a default, or a
            parameter bears the name of a field.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        settings = _settings_parameter(signature, config_class, function.__name__)

        @functools.wraps(function)
        def call(*args, **keywords):
            given = {name: keywords.pop(name) for name in fields if name in keywords}
            if given:
                bound = signature.bind_partial(*args, **keywords)
                base = bound.arguments.get(settings.name, settings.default)
                bound.arguments[settings.name] = dataclasses.replace(base, **given)
                args, keywords = bound.args, bound.kwargs
            return function(*args, **keywords)

        call.__signature__ = _expanded(signature, fields.values())  # type: ignore[attr-defined]
        return call

    return decorate


def _settings_parameter(
    signature: inspect.Signature, config_class: type, function: str
) -> inspect.Parameter:
    """The parameter whose default is an instance of the settings class."""
    found = [p for p in signature.parameters.values() if isinstance(p.default, config_class)]
    if len(found) != 1:
        raise TypeError(
            f"{function} has {len(found)} parameters with a {config_class.__name__} for a default;"
            " give it one."
        )
    return found[0]


def _expanded(signature: inspect.Signature, fields) -> inspect.Signature:
    """The signature with the fields as keyword-only parameters behind the others."""
    shortcuts = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=field.type,
        )
        for field in fields
    ]
    own = list(signature.parameters.values())
    last = [p for p in own if p.kind is inspect.Parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*(p for p in own if p not in last), *shortcuts, *last])


def _default(field: dataclasses.Field):
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()
