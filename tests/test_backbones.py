"""Backbones: widths, stages and freezing, every family of torchvision's, input normalisation, and weights from files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from transfer_cli.backbones.base import Backbone
from transfer_cli.backbones.digits import LeNet, SmallCNN
from transfer_cli.backbones.torchvision import Torchvision
from transfer_cli.backbones.vectors import MLP, Identity
from transfer_cli.backbones.weights import load_into, load_state
from transfer_cli.config.torchvision_names import TORCHVISION_NAMES
from transfer_cli.data.inputs import InputSpec
from transfer_cli.errors import TransferError
from transfer_cli.torchvision_compat import models

VECTOR = InputSpec("vector", (10,))
SEQUENCE = InputSpec("sequence", (3,))


def image(size: int, channels: int = 3) -> InputSpec:
    return InputSpec("image", (channels, size, size))


def features(backbone: Backbone, spec: InputSpec, n: int = 2) -> Tensor:
    backbone.eval()
    with torch.no_grad():
        return backbone(torch.rand(n, *spec.shape))


# --- the small ones -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "spec", "width"),
    [
        (SmallCNN, image(16, 1), 128),
        (SmallCNN, image(28), 128),
        (lambda s: SmallCNN(s, widths=(4, 8), features=9, dropout=0.5), image(8, 1), 9),
        (LeNet, image(28, 1), 500),
        (LeNet, image(32), 500),
        (MLP, VECTOR, 128),
        (lambda s: MLP(s, hidden=(7,)), image(4), 7),
        (lambda s: MLP(s, hidden=()), VECTOR, 10),
        (Identity, VECTOR, 10),
        (Identity, image(4), 48),
    ],
)
def test_features_have_the_width_that_is_told(build: Any, spec: InputSpec, width: int) -> None:
    backbone = build(spec)
    assert backbone.out_features == width
    assert features(backbone, spec).shape == (2, width)


def test_identity_changes_nothing() -> None:
    x = torch.randn(3, 10)
    assert torch.equal(Identity(VECTOR)(x), x)


@pytest.mark.parametrize(("backbone", "spec"), [(SmallCNN, VECTOR), (LeNet, SEQUENCE), (MLP, SEQUENCE)])
def test_inputs_of_another_kind_are_refused(backbone: Any, spec: InputSpec) -> None:
    with pytest.raises(TransferError, match=f"backbone {backbone.__name__} takes .* inputs, not {spec.kind}"):
        backbone(spec)


@pytest.mark.parametrize("build", [SmallCNN, LeNet])
def test_small_networks_centre_their_input(build: Any) -> None:
    """Grey (0.5) is zero to the first convolution."""
    backbone = build(image(28, 1))
    seen: list[Tensor] = []
    first = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    backbone.eval()
    backbone(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 28, 28))
    assert [float(x.mean()) for x in seen[0]] == [-1, 0, 1]


# --- freezing -------------------------------------------------------------------------------------


def frozen_names(backbone: Backbone) -> set[str]:
    return {name for name, p in backbone.named_parameters() if not p.requires_grad}


def test_freezing_follows_the_stages() -> None:
    spec = image(16)
    assert frozen_names(SmallCNN(spec)) == set()
    backbone = SmallCNN(spec, freeze="up-to-block2")
    assert list(backbone.stages()) == ["block1", "block2", "block3", "project"]
    assert {n.rsplit(".", 2)[0] for n in frozen_names(backbone)} == {"blocks.0", "blocks.1"}
    backbone.train()
    assert [m.training for m in (*backbone.blocks, backbone.project)] == [False, False, True, True]
    assert not backbone.blocks[0][1].training, "BatchNorm inside keeps its statistics"  # type: ignore[index]
    everything = SmallCNN(spec, freeze="all")
    everything.train()
    assert frozen_names(everything) == {n for n, _ in everything.named_parameters()}
    assert not any(m.training for m in everything.stages().values())


def test_freezing_holds_inside_a_larger_module_and_a_copy() -> None:
    from copy import deepcopy

    outer = nn.Sequential(SmallCNN(image(16), freeze="up-to-block1"), nn.Linear(128, 2))
    copy = deepcopy(outer)
    copy.train()
    assert not copy[0].blocks[0].training and copy[0].blocks[1].training  # type: ignore[index, union-attr]


@pytest.mark.parametrize("wrong", ["up-to-blok2", "block2", "some", "up-to-"])
def test_an_unknown_stage_is_named_with_a_suggestion(wrong: str) -> None:
    with pytest.raises(TransferError) as caught:
        SmallCNN(image(16), freeze=wrong)
    assert "backbone.freeze must be one of none, all, up-to-block1" in str(caught.value) and f"'{wrong}'" in str(
        caught.value
    )
    if wrong == "up-to-blok2":
        assert "Did you mean 'up-to-block2'?" in str(caught.value)


def check_stages(backbone: Backbone) -> None:
    inside = [p for part in backbone.stage_parameters().values() for p in part]
    assert len(inside) == len(set(inside)) and set(inside) == set(backbone.parameters())
    backbone.freeze("all")
    assert frozen_names(backbone) == {n for n, _ in backbone.named_parameters()}


def test_every_parameter_belongs_to_one_stage() -> None:
    check_stages(Torchvision(image(32), model="resnet18", weights="none"))
    check_stages(SmallCNN(image(16)))
    check_stages(mlp())


def test_a_vision_transformers_class_token_and_positions_are_part_of_its_entrance() -> None:
    backbone = Torchvision(image(64), model="vit_b_32", weights="none", freeze="up-to-encoder.encoder_layer_0")
    frozen = frozen_names(backbone)
    assert {"model.class_token", "model.encoder.pos_embedding", "model.conv_proj.weight"} <= frozen
    kept = {name.split(".")[3] for name in frozen if "encoder_layer" in name}
    assert kept == {"encoder_layer_0"} and "model.encoder.ln.weight" not in frozen
    check_stages(backbone)


def test_batchnorm_can_be_frozen_alone() -> None:
    backbone = Torchvision(image(32), model="resnet18", weights="none", batchnorm="frozen")
    before = {n: b.clone() for n, b in backbone.named_buffers()}
    backbone.train()
    backbone(torch.rand(2, 3, 32, 32))
    assert all(torch.equal(before[n], b) for n, b in backbone.named_buffers())
    assert frozen_names(backbone) == set()
    plain = Torchvision(image(32), model="resnet18", weights="none")
    plain.train()
    plain(torch.rand(2, 3, 32, 32))
    assert int(plain.model.bn1.num_batches_tracked) == 1


# --- torchvision ----------------------------------------------------------------------------------

WIDTHS = {"resnet18": (32, 512), "squeezenet1_1": (32, 512), "mobilenet_v3_small": (32, 1024)}
LARGER = {
    "alexnet": (64, 4096), "convnext_tiny": (32, 768), "densenet121": (32, 1024), "efficientnet_b0": (32, 1280),
    "googlenet": (64, 1024), "inception_v3": (75, 2048), "maxvit_t": (224, 512), "mnasnet0_5": (32, 1280),
    "mobilenet_v2": (32, 1280), "regnet_y_400mf": (32, 440), "resnext50_32x4d": (32, 2048),
    "shufflenet_v2_x0_5": (32, 1024), "swin_t": (64, 768), "swin_v2_t": (64, 768), "vgg11": (32, 4096),
    "vit_b_16": (64, 768),
}  # fmt: skip


def check_width(model: str, size: int, width: int) -> None:
    backbone = Torchvision(image(size), model=model, weights="none")
    out = features(backbone, image(size))
    assert out.shape == (2, width) and backbone.out_features == width
    assert not any(isinstance(m, nn.Linear) and m.out_features == 1000 for m in backbone.modules())


@pytest.mark.parametrize(("model", "size", "width"), [(m, *v) for m, v in WIDTHS.items()])
def test_a_classifier_without_its_last_layer(model: str, size: int, width: int) -> None:
    check_width(model, size, width)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size", "width"), [(m, *v) for m, v in LARGER.items()])
def test_every_family_without_its_last_layer(model: str, size: int, width: int) -> None:
    check_width(model, size, width)


def test_the_list_of_names_is_torchvisions_own() -> None:
    assert list(TORCHVISION_NAMES) == sorted(models.list_models(module=models))


def test_features_are_what_the_last_layer_sees() -> None:
    torch.manual_seed(0)
    whole = models.resnet18(weights=None).eval()
    backbone = Torchvision(image(32), model="resnet18", weights="none")
    state = {k: v for k, v in whole.state_dict().items() if not k.startswith("fc.")}
    backbone.model.load_state_dict(state)
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    backbone.eval()
    with torch.no_grad():
        torch.testing.assert_close(whole.fc(backbone(x)), whole((x - mean) / std))


class Seen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def seen_by_the_network(**options: Any) -> Tensor:
    """What reaches the network of a picture whose channels are 0.2, 0.4 and 0.6."""
    backbone = Torchvision(image(1), model="squeezenet1_1", weights="none", **options)
    backbone.model = Seen()
    return backbone(torch.tensor([[0.2, 0.4, 0.6]]).view(1, 3, 1, 1))


def test_the_normalisation_of_the_weights_is_inside() -> None:
    wanted = [(0.2 - 0.485) / 0.229, (0.4 - 0.456) / 0.224, (0.6 - 0.406) / 0.225]
    assert seen_by_the_network()[0].tolist() == pytest.approx(wanted, rel=1e-5)
    own = seen_by_the_network(mean=[0.1, 0.2, 0.3], std=[1.0, 0.5, 0.25])
    assert own[0].tolist() == pytest.approx([0.1, 0.4, 1.2], rel=1e-5)


def test_bgr_weights_see_blue_first() -> None:
    found = seen_by_the_network(order="bgr", mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 1.0])
    assert found[0].tolist() == pytest.approx([0.5, 0.2, -0.1], rel=1e-5)  # mean and std are in the weights' order


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet81"}, "torchvision has no classifier 'resnet81'. Did you mean 'resnet18'?"),
        ({"model": "fasterrcnn_resnet50_fpn"}, "torchvision has no classifier"),
        ({"model": "squeezenet1_1", "stem": "small"}, "squeezenet1_1 has no small stem: set backbone.stem=imagenet"),
        ({"model": "shufflenet_v2_x0_5", "stem": "small"}, "backbone shufflenet_v2_x0_5 has no small stem"),
        ({"model": "resnet18", "freeze": "up-to-layer9"}, "not 'up-to-layer9'. Did you mean 'up-to-layer"),
    ],
)
def test_wrong_choices_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TransferError, match=re.escape(message)):
        Torchvision(image(32), weights="none", **options)


def test_three_channels_are_asked_for() -> None:
    with pytest.raises(TransferError, match=r"backbone resnet18 takes 3 channels, not 1: set image\.channels=3"):
        Torchvision(image(32, 1), model="resnet18", weights="none")


@pytest.mark.parametrize(
    "model", ["resnet18", "mobilenet_v3_small", pytest.param("densenet121", marks=pytest.mark.slow)]
)
def test_a_small_stem_keeps_the_resolution(model: str) -> None:
    def side(stem: Any) -> int:
        backbone = Torchvision(image(32), model=model, weights="none", stem=stem)
        sizes: list[int] = []
        convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
        convolutions[1].register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape[-1]))
        assert features(backbone, image(32)).shape == (2, backbone.out_features)
        return sizes[0]

    assert side("small") == 32 and side("imagenet") <= 16


@pytest.mark.parametrize("model", ["googlenet", "inception_v3"])
def test_torchvisions_weights_get_the_normalisation_that_they_were_trained_with(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were trained on inputs from -1 to 1, into which torchvision's `transform_input` turns ImageNet's scaling. Here it is a
    buffer, so that the network is the same when a checkpoint brings its weights."""
    published = models.get_model(model, weights=None, init_weights=False, aux_logits=True, transform_input=True).eval()
    monkeypatch.setattr(
        type(models.get_model_weights(model).DEFAULT), "get_state_dict", lambda *a, **k: published.state_dict()
    )
    backbone = Torchvision(image(96), model=model, weights="imagenet").eval()
    again = Torchvision(image(96), model=model, weights="none").eval()
    again.load_state_dict(backbone.state_dict())
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    normalised = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    published.fc = nn.Identity()
    with torch.no_grad():
        wanted = published(normalised)
        torch.testing.assert_close(backbone(x), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
        assert torch.equal(again(x), backbone(x))


def test_missing_imagenet_weights_say_where_they_belong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from urllib.error import URLError

    def fail(*arguments: Any, **options: Any) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(TransferError) as caught:
        Torchvision(image(32), model="squeezenet1_1")
    message = str(caught.value)
    assert f"{tmp_path}/hub/checkpoints/squeezenet1_1-" in message and "https://download.pytorch.org" in message
    assert "backbone.weights=PATH" in message


# --- weights from files -----------------------------------------------------------------------------


def mlp(**options: Any) -> MLP:
    return MLP(VECTOR, hidden=(6, 5), **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


WRAPPED = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "model": lambda s: {"model": s},
    "parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "lightning": lambda s: {"state_dict": {f"backbone.{k}": v for k, v in s.items()} | {"head.weight": torch.zeros(2)}},
    "run": lambda s: {
        "identity": "x",
        "step": 5,
        "method": {f"network.backbone.{k}": v for k, v in s.items()} | {"network.head.weight": torch.zeros(2, 5)},
    },
}


@pytest.mark.parametrize("form", list(WRAPPED))
def test_weights_load_from_every_wrapping(form: str, tmp_path: Path) -> None:
    trained, path = mlp(), tmp_path / "weights.pt"
    torch.save(WRAPPED[form](trained.state_dict()), path)
    fresh = mlp()
    assert not same(fresh, trained)
    assert same(mlp(weights=str(path)), trained)


def test_weights_load_from_safetensors(tmp_path: Path) -> None:
    trained, path = mlp(), tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), path)
    assert same(mlp(weights=str(path)), trained)


@pytest.mark.parametrize("form", ["torchvision", "run"])
def test_torchvision_takes_its_own_state_dicts_and_those_of_runs(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    if form == "torchvision":
        whole = models.squeezenet1_1(weights=None)
        torch.save(whole.state_dict(), path)  # its last layer is left over, and ignored
        wanted = whole.features.state_dict()
    else:
        trained = Torchvision(image(32), model="squeezenet1_1", weights="none")
        state = {f"network.backbone.{k}": v for k, v in trained.state_dict().items()}
        torch.save({"identity": "x", "method": state}, path)
        wanted = trained.model.features.state_dict()
    found = Torchvision(image(32), model="squeezenet1_1", weights=str(path)).model.features.state_dict()
    assert all(torch.equal(v, found[k]) for k, v in wanted.items())


def test_keys_that_do_not_match_are_reported(tmp_path: Path) -> None:
    state = mlp().state_dict()
    del state["layers.0.0.bias"], state["layers.1.0.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["layers.0.0.weight"] = torch.zeros(6, 11)
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(TransferError) as caught:
        mlp(weights=str(path))
    message = str(caught.value)
    assert f"{path} does not fit this backbone" in message
    assert "2 missing (layers.0.0.bias, layers.1.0.bias)" in message
    assert "1 not in the network (extra.weight)" in message
    assert "1 of another shape (layers.0.0.weight)" in message
    many = {f"extra{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(TransferError, match=r"9 not in the network \(extra0, extra1, extra2, \.\.\.\)"):
        load_into(mlp(), {**mlp().state_dict(), **many}, "x.pt")
    load_into(mlp(), {**mlp().state_dict(), "fc.weight": torch.zeros(1)}, "x.pt", ignored=("fc.",))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(mlp().state_dict(), path)
    else:
        save_file(mlp().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(TransferError) as caught:
        load_state(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(b"")
    with pytest.raises(TransferError, match="cannot be read"):
        load_state(str(path))


class NotATensor:
    pass


def test_files_that_hold_no_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"there is no file .*nothing\.pt"):
        load_state(str(tmp_path / "nothing.pt"))
    path = tmp_path / "other.pt"
    torch.save({"a": 1}, path)
    with pytest.raises(TransferError, match=r"other\.pt holds no tensors by name"):
        load_state(str(path))
    torch.save([1, 2], path)
    with pytest.raises(TransferError, match="holds no tensors by name"):
        load_state(str(path))
    torch.save({"a": NotATensor()}, path)  # would execute code on loading
    with pytest.raises(TransferError, match="is not a plain file of tensors"):
        load_state(str(path))


def test_weights_come_before_freezing(tmp_path: Path) -> None:
    trained, path = mlp(), tmp_path / "weights.pt"
    torch.save(trained.state_dict(), path)
    backbone = mlp(weights=str(path), freeze="up-to-layer1")
    assert same(backbone, trained) and frozen_names(backbone) == {"layers.0.0.weight", "layers.0.0.bias"}


@pytest.mark.parametrize(
    ("model", "layer"), [("resnet18", "layer2"), ("vit_b_32", "encoder.encoder_layer_1"), ("vgg11", "features.7")]
)
def test_an_earlier_layer_gives_features(model: str, layer: str) -> None:
    side = 224 if model.startswith("vit") else 64
    backbone = Torchvision(image(side), model=model, weights="none", layer=layer).eval()
    seen: list[Tensor] = []
    backbone.stages()[layer].register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = backbone(x)
    (output,) = seen
    assert found.shape == (2, backbone.out_features)
    torch.testing.assert_close(found, output.mean((2, 3)) if output.ndim == 4 else output[:, 0])
    assert set(backbone.state_dict()) == set(Torchvision(image(side), model=model, weights="none").state_dict())


def test_a_wrong_layer_names_those_there_are() -> None:
    with pytest.raises(TransferError, match=r"backbone.layer must be one of .*layer3.* Did you mean 'layer4'"):
        Torchvision(image(64), model="resnet18", weights="none", layer="layer5")
