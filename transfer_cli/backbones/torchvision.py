"""Every torchvision classifier as a feature extractor: its last linear layer (or SqueezeNet's last convolution) removed."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal
from urllib.error import URLError

import torch
from torch import Tensor, nn

from transfer_cli.backbones.base import Backbone
from transfer_cli.backbones.weights import load_into, load_state
from transfer_cli.data.inputs import InputSpec
from transfer_cli.errors import TransferError, check_choice, suggest
from transfer_cli.registry import FilePath
from transfer_cli.torchvision_compat import models


class _Reached(Exception):
    """Carries a stage's output out of the network."""


IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Torchvision(Backbone):
    """Config group `backbone`, any name that torchvision knows.

    Args:
        model: torchvision's name.
        weights: `imagenet` (torchvision's default weights, fetched once), `none`, or a file (state dict, safetensors,
            or the checkpoint of a run, from which the backbone is taken).
        freeze: `none`, `all` or `up-to-<stage>`.
        batchnorm: `train`, or `frozen`: the weights' own statistics, as small target sets and folded weights want.
        stem: `imagenet`, or `small`: stride 1 and no pooling at the entrance, for inputs of about 32 pixels.
        layer: the stage whose output is taken for features (null: the last), averaged over positions;
            of a transformer the class token.
        mean, std, order: the input normalisation of the weights, on [0, 1] intensities; null takes ImageNet's.
    """

    preferred_size: ClassVar[int | None] = 224
    preferred_channels: ClassVar[int | None] = 3
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        spec: InputSpec,
        *,
        model: str,
        weights: FilePath = "imagenet",
        freeze: str = "none",
        batchnorm: Literal["train", "frozen"] = "train",
        stem: Literal["imagenet", "small"] = "imagenet",
        layer: str | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        order: Literal["rgb", "bgr"] = "rgb",
    ) -> None:
        super().__init__(spec)
        names = models.list_models(module=models)
        if model not in names:
            raise TransferError(f"torchvision has no classifier '{model}'.{suggest(model, names)}")
        if spec.shape[0] != 3:
            raise TransferError(f"backbone {model} takes 3 channels, not {spec.shape[0]}: set image.channels=3.")
        self.model = models.get_model(model, weights=None, **_construction(model, spec, weights))
        head = _last_layer(self.model)
        self.out_features = _remove(self.model, head)
        if stem == "small":
            _small_stem(self.model, model)
        self.flip = order == "bgr"
        self._load(model, weights, head)
        self.register_buffer("mean", torch.tensor(mean or self._published("mean", IMAGENET_MEAN)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std or self._published("std", IMAGENET_STD)).view(1, 3, 1, 1))
        self.layer = layer
        if layer is not None:
            check_choice(layer, self.stages(), "backbone.layer")
            with torch.no_grad():
                training = self.model.training
                self.out_features = self.eval()(torch.zeros(1, *spec.shape)).shape[1]
                self.train(training)
        self.freeze(freeze)
        if batchnorm == "frozen":
            self._frozen += [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]

    def forward(self, x: Tensor) -> Tensor:
        if self.flip:
            x = x.flip(1)
        x = (x - self.mean) / self.std
        return self.model(x).flatten(1) if self.layer is None else self._until(self.layer, x)

    def _until(self, layer: str, x: Tensor) -> Tensor:
        """The stage's output as `(B, D)`; what comes after it is not computed."""

        def stop(module: nn.Module, inputs: Any, output: Tensor) -> None:
            raise _Reached(output)

        handle = self.stages()[layer].register_forward_hook(stop)
        try:
            self.model(x)
        except _Reached as reached:
            output: Tensor = reached.args[0]
            if output.ndim == 4:
                return output.mean((2, 3))
            return output[:, 0] if output.ndim == 3 else output.flatten(1)
        finally:
            handle.remove()
        raise TransferError(f"backbone.layer={layer} is not on the way from input to output.")

    def stages(self) -> dict[str, nn.Module]:
        stages: dict[str, nn.Module] = {}
        for name, child in self.model.named_children():
            inner = child if name == "features" else getattr(child, "layers", None) if name == "encoder" else None
            if inner is None:
                stages[name] = child
            else:
                stages.update({f"{name}.{key}": part for key, part in inner.named_children()})
        if hasattr(
            self.model, "encoder"
        ):  # a vision transformer: the embedding comes first, the last norm belongs to the end
            stages["encoder.ln"] = self.model.encoder.ln
        return stages

    def _load(self, model: str, weights: str, head: str) -> None:
        self._transform: Any = None
        if weights == "none":
            return
        if weights == "imagenet":
            published = models.get_model_weights(model).DEFAULT
            self._transform = published.transforms()
            try:
                state = published.get_state_dict(progress=False, check_hash=True)
            except (URLError, OSError) as error:
                where = f"{torch.hub.get_dir()}/checkpoints/{published.url.rsplit('/', 1)[-1]}"
                raise TransferError(
                    f"the ImageNet weights of {model} are not at {where} and could not be fetched: place them there "
                    f"(from {published.url}), or set backbone.weights=PATH or none."
                ) from error
        else:
            state = load_state(weights)
            inner = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
            state = inner or state  # a run's own checkpoint
        load_into(self.model, state, weights, ignored=(head + ".", "aux", "AuxLogits"))

    def _published(self, key: str, fallback: list[float]) -> list[float]:
        if self._transform is not None and isinstance(self.model, models.GoogLeNet | models.Inception3):
            # torchvision's transform_input undoes ImageNet's normalisation in favour of this one, with which they were trained.
            return [0.5, 0.5, 0.5]
        return list(getattr(self._transform, key, fallback))


def _construction(model: str, spec: InputSpec, weights: str) -> dict[str, Any]:
    if model in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": weights == "none", "transform_input": False}
    if model.startswith("vit_") and spec.shape[1] != 224 and weights == "none":
        return {"image_size": spec.shape[1]}
    return {}


def _last_layer(model: nn.Module) -> str:
    """The name of the layer that makes ImageNet's logits: the last linear one, or SqueezeNet's 1 x 1 convolution."""
    layers = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and "classifier" in n)
    ]
    return layers[-1]


def _remove(model: nn.Module, name: str) -> int:
    """Replace the layer by the identity; its input width."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    layer: Any = parent.get_submodule(child)
    setattr(parent, child, nn.Identity())
    return int(layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features)


def _small_stem(network: Any, name: str) -> None:
    if isinstance(getattr(network, "conv1", None), nn.Conv2d) and hasattr(
        network, "maxpool"
    ):  # ResNet, ResNeXt, Wide ResNet
        network.conv1 = _same_but(network.conv1, kernel=3, stride=1)
        network.maxpool = nn.Identity()
    elif hasattr(network, "features") and hasattr(network.features, "conv0"):  # DenseNet
        network.features.conv0 = _same_but(network.features.conv0, kernel=3, stride=1)
        network.features.pool0 = nn.Identity()
    elif name.startswith(("mobilenet", "efficientnet", "mnasnet", "regnet")):
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        first.stride = (1, 1)
    else:
        raise TransferError(
            f"backbone {name} has no small stem: set backbone.stem=imagenet and image.size to 64 or more."
        )


def _same_but(conv: nn.Conv2d, kernel: int, stride: int) -> nn.Conv2d:
    new = nn.Conv2d(conv.in_channels, conv.out_channels, kernel, stride, kernel // 2, bias=conv.bias is not None)
    nn.init.normal_(
        new.weight, std=math.sqrt(2 / (kernel * kernel * conv.out_channels))
    )  # fan-out, as torchvision's ResNet
    return new
