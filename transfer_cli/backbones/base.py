"""The contract of a backbone: a feature extractor that knows its width, its stages and what is frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transfer_cli.backbones.weights import load_into, load_state
from transfer_cli.data.inputs import InputSpec, Padded
from transfer_cli.errors import TransferError, suggest


class Backbone(nn.Module):
    """`forward`: inputs `(B, ...)`, images in [0, 1], to features `(B, out_features)`. The input normalisation that
    belongs to the weights is part of it.

    Constructor: `(spec: InputSpec, *, <keys of its YAML>)`.
    """

    version: ClassVar[int] = 1
    accepts: ClassVar[tuple[str, ...]] = ("image",)  # kinds of input
    preferred_size: ClassVar[int | None] = None  # image side taken when the configuration says auto
    minimum_size: ClassVar[int] = 1  # smaller images are enlarged to it when the configuration says auto
    preferred_channels: ClassVar[int | None] = None
    trivial: ClassVar[bool] = False  # True: computing its features costs no more than reading them from a file
    out_features: int

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        if spec.kind not in self.accepts:
            raise TransferError(f"backbone {type(self).__name__} takes {' or '.join(self.accepts)} inputs, not {spec}.")
        self._frozen: list[nn.Module] = []

    def forward(self, x: Any) -> Tensor:
        raise NotImplementedError

    def start_from(self, weights: str, freeze: str) -> None:
        """`weights`: `none`, a state dict or the checkpoint of a run; `freeze`: see `freeze`."""
        if weights != "none":
            load_into(self, load_state(weights), weights)
        self.freeze(freeze)

    def stages(self) -> dict[str, nn.Module]:
        """Its parts from input to output, by name: for freezing and layer-wise learning rates."""
        return dict(self.named_children())

    def stage_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter by stage; one outside all stages (a vision transformer's class token) goes with the first."""
        parameters = {name: list(stage.parameters()) for name, stage in self.stages().items()}
        inside = {p for stage in parameters.values() for p in stage}
        if parameters:
            next(iter(parameters.values())).extend(p for p in self.parameters() if p not in inside)
        return parameters

    def freeze(self, up_to: str) -> None:
        """Freeze `none`, `all`, or the stages up to and including one (`up-to-layer2`): no gradient, BatchNorm statistics fixed.

        Raises:
            TransferError: no stage of that name.
        """
        if up_to == "none":
            return
        stages = self.stages()
        names = list(stages)
        if up_to != "all":
            last = up_to.removeprefix("up-to-")
            if not up_to.startswith("up-to-") or last not in names:
                options = ["none", "all", *(f"up-to-{n}" for n in names)]
                raise TransferError(
                    f"backbone.freeze must be one of {', '.join(options)}; not '{up_to}'.{suggest(up_to, options)}"
                )
            names = names[: names.index(last) + 1]
        self._frozen = [stages[n] for n in names]
        parameters = self.stage_parameters()
        for name, module in zip(names, self._frozen, strict=True):
            for parameter in parameters[name]:
                parameter.requires_grad_(False)
            module.eval()

    def keep_frozen(self, copies: Mapping[nn.Module, nn.Module]) -> None:
        """What is frozen alone (`batchnorm=frozen`) stays so in a copy that stands beside it."""
        self._frozen += [copies[module] for module in self._frozen if module in copies]

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self


def build_checked(build: Callable[[InputSpec], Backbone], spec: InputSpec, name: str) -> Backbone:
    """Build a backbone and send two blank samples through it, before any work.

    Raises:
        TransferError: it cannot take such inputs, or does not give `(2, out_features)`.
    """
    if spec.kind == "sequence":
        dummy: Any = Padded(torch.zeros(2, 3, *spec.shape), torch.ones(2, 3, dtype=torch.bool))
    else:
        dummy = torch.zeros(2, *spec.shape)
    try:
        backbone = build(spec)
        with torch.no_grad():
            shape = tuple(backbone.eval()(dummy).shape)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TransferError(
            f"backbone {name} cannot take {spec} ({reason}). image.size or another key may help."
        ) from error
    if backbone.out_features < 1 or shape != (2, backbone.out_features):
        raise TransferError(f"backbone {name} says {backbone.out_features} features a sample, and gives {shape[1:]}.")
    return backbone.train()


def flat_width(shape: Sequence[int]) -> int:
    width = 1
    for n in shape:
        width *= n
    return width
