"""BatchNorm layers of each domain's own: statistics, scale and shift (Chang et al., CVPR 2019)."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from transfer_cli.backbones.base import Backbone

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class DomainBatchNorm(nn.Module):
    """Two layers, of which `domain` names the one that is used. Both start as the given one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.source, self.target = layer, copy.deepcopy(layer)
        self.domain = "target"

    def forward(self, x: Tensor) -> Tensor:
        return self.source(x) if self.domain == "source" else self.target(x)


class DomainSwitch:
    """Replaces every BatchNorm layer inside the modules; called with a domain's name, it turns them all to it."""

    def __init__(self, *modules: nn.Module) -> None:
        self.layers: list[DomainBatchNorm] = []
        for module in modules:
            there = [m for m in module.modules() if isinstance(m, DomainBatchNorm)]  # of an earlier method in a chain
            inside = {id(layer) for pair in there for layer in (pair.source, pair.target)}
            new = []
            for parent in list(module.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, BATCHNORMS) and id(child) not in inside:
                        pair = DomainBatchNorm(child)
                        setattr(parent, name, pair)
                        new.append(pair)
            if isinstance(module, Backbone):
                module.keep_frozen({pair.source: pair.target for pair in new})
            self.layers += [*there, *new]

    def __call__(self, domain: str) -> None:
        for layer in self.layers:
            layer.domain = domain
