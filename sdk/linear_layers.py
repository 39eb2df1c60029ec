"""Let the linear layers of a model compute few rows by the kernel in C.

A decode step reads every weight once, so its speed is the memory's - where the products of a row and a matrix keep up.
torch's on a CPU do not (``kernels/linear``).
"""

from __future__ import annotations

from types import MethodType

from torch import nn

from thinkkv.kernels.dispatch import choose_for


class LinearLayers:
    """Linear layers of one model with a forward of ours, until they are restored.

    Only plain ``nn.Linear`` with the forward of its class: what another library has replaced or wrapped stays its own.
    Where the kernel does not run, nothing is changed.

    Args:
        model: its layers are changed, instance by instance.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[nn.Linear] = []
        device = next(model.parameters()).device
        if choose_for("linear", device).backend != "native":
            return
        from thinkkv.kernels.linear.native import forward  # compiled when it is first needed

        self._layers = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
        self._forward = forward
        for layer in self._layers:
            vars(layer)["forward"] = MethodType(forward, layer)  # bound, so that a deep copy is changed on its own

    def restore(self) -> None:
        """Give the layers the forward of their class again, unless somebody has put another one in its place."""
        for layer in self._layers:
            if getattr(vars(layer).get("forward"), "__func__", None) is self._forward:
                del vars(layer)["forward"]
