"""A definition of an operator: a text with parts to be filled in, as a model-local function."""

from __future__ import annotations

import onnx
import onnx.parser

from thinkkv.export.onnx.domain import Overload


def definition(text: str, overload: Overload, **parts: str) -> onnx.FunctionProto:
    """The function that a text defines.

    Args:
        text: with ``%NAME%`` where a part goes; parts may have such places themselves, for parts behind them.
        overload: the way of using the operator that it defines.
        parts: by name.
    """
    for name, part in parts.items():
        text = text.replace(f"%{name}%", part)
    function = onnx.parser.parse_function(text)
    function.overload = overload.name
    return function
