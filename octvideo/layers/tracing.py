"""What octave modules are to torch.fx, which keeps them whole, and to TorchScript, which cannot have them."""

from typing import Any, NoReturn

from torch import nn
from torch.fx import Proxy

from octvideo.errors import UserError


class OneNode(nn.Module):
    """A module whose Python depends on what it is given: one node of torch.fx's graphs, as torch's own layers are."""

    def _node(self, input: Proxy, **named: Any) -> Proxy:
        tracer = input.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), named)  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> NoReturn:  # torch.jit.script's question
        what = f"torch.jit.script cannot compile {type(self).__name__}, which may be given octave features"
        raise UserError(f"{what}: use torch.jit.trace or torch.export")
