"""The contract of a method, and the network that gradient methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_cli.backbones.weights import load_into
from transfer_cli.data.inputs import InputSpec
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.domain_batchnorm import DomainSwitch
from transfer_cli.methods.phases import Phase

if TYPE_CHECKING:
    from transfer_cli.methods.bayes.artefact import SourcePosterior
    from transfer_cli.methods.heads.base import Head


@dataclass(frozen=True)
class FeatureOptions:
    """What is done to frozen features before a method sees them (`methods/preprocessing.py`)."""

    normalise: Sequence[str] = ()
    reduce: str = "none"
    components: int = 50
    whiten: bool = False


@dataclass(frozen=True)
class Needs:
    """What a method cannot do without; checked before any work."""

    source_labels: bool = False
    source_of_any_classes: bool = False  # a labelled source, be its classes those of the target or not
    source_labels_or_model: bool = False  # a labelled source, or the model of one (`source_model`)
    target_inputs: bool = False
    target_labels: bool = False
    any_labels: bool = False  # of either domain, that fit the head


@dataclass(frozen=True)
class Context:
    """What a method is built from.

    `source_classes` differs from `num_classes` only where the label spaces are separate and the head is the target's.
    `label_mean` and `label_std` `(T,)` are those of the training labels (regression).
    """

    backbone: nn.Module  # (B, ...) -> (B, feature_dim)
    feature_dim: int
    kind: str  # classification | regression
    num_classes: int
    source_classes: int
    has_source: bool
    has_target_labels: bool
    source_labels_fit_head: bool
    target_width: int = 0
    label_mean: Tensor | None = None
    label_std: Tensor | None = None
    label_space: str = "closed"  # closed | partial | open | separate
    bottleneck: int | None = None
    domain_batches: str = "joint"  # joint | separate | domain_specific
    source_model: Mapping[str, Tensor] | None = None  # the network of another run, from which this one's starts
    features: FeatureOptions = field(default_factory=FeatureOptions)
    make_head: Callable[[], Head] | None = None  # a new one each time; None: the method has no use for it
    input: InputSpec | None = None  # what a sample is, for a method that looks at inputs themselves
    prior: SourcePosterior | None = None  # of another run, in the place of a source
    class_names: tuple[str, ...] = ()  # names of those that the head predicts
    fingerprint: Callable[[], str] | None = None  # of the backbone as it is, its weights and its input
    about: Mapping[str, str] = field(default_factory=dict)  # the backbone's name and input, for people
    labelled: Mapping[str, int] = field(default_factory=dict)  # labelled samples to train on, by part
    make_backbone: Callable[[], nn.Module] | None = None  # another one each time, initialised anew

    @property
    def outputs(self) -> int:
        return self.num_classes if self.kind == "classification" else self.target_width


class Method(nn.Module):
    """Phases that train, and a prediction for any input. All state is parameters, buffers and `Fitted` tensors."""

    version: ClassVar[int] = 1
    needs: ClassVar[Needs] = Needs()
    kinds: ClassVar[tuple[str, ...]] = ("classification", "regression")
    handles_target_labels: ClassVar[bool] = False  # True: the gradient loop adds no supervised target term
    uses_head: ClassVar[bool] = False  # True: the group `head` is part of the configuration
    uses_strong: ClassVar[bool] = False  # True: the group `strong` is, the augmentation of strong views
    # True: players that work against one another share one objective and one name of a player (by reversed gradients).
    is_game: ClassVar[bool] = False
    frozen_backbone: ClassVar[bool] = False  # True: never trained, so features are extracted once and kept
    last_only: ClassVar[bool] = False  # True: what it leaves of the backbone serves its own predictions alone
    takes_prior: ClassVar[tuple[str, ...]] = ()  # kinds of a source's posterior that it takes in the place of a source
    representation_only: ClassVar[bool] = False  # True: it predicts nothing, so another method must follow (`then`)
    # The settings that it is made for: one that reads target inputs in another is run, after a word of warning.
    label_spaces: ClassVar[tuple[str, ...]] = ("closed",)

    def phases(self) -> Sequence[Phase]:
        raise NotImplementedError

    def features(self, x: Any) -> Tensor:
        """Inputs `(B, ...)` to the representation `(B, D)` that the method predicts from."""
        raise NotImplementedError

    def features_source(self, x: Any) -> Tensor:
        """The same for source samples, where a method treats the domains differently."""
        return self.features(x)

    def predict(self, x: Any) -> Prediction:
        """Inputs `(B, ...)` to a distribution a sample."""
        raise NotImplementedError

    def predict_source(self, x: Any) -> Prediction:
        """The same for source samples, where a method treats the domains differently."""
        return self.predict(x)

    def predict_and_features(self, x: Any, domain: str) -> tuple[Prediction, Tensor | None]:
        """What `predict` and `features` (or those of the source) say, where one pass finds both; else no features."""
        return (self.predict_source(x) if domain == "source" else self.predict(x)), None

    def functions(self, x: Any, n: int, seed: int = 0) -> Tensor:
        """`(n, B, T)`: functions drawn from the posterior, without noise, at target inputs `(B, ...)`; the same for a seed.

        Raises:
            TransferError: the method is no distribution over functions.
        """
        raise TransferError("only gp draws functions: run method=gp.")

    def supervised_loss(self, x: Any, y: Tensor) -> Tensor:
        """The loss of granted target labels, which the gradient loop adds unless the method handles them."""
        raise NotImplementedError

    def artefacts(self) -> Mapping[str, bytes]:
        """Files that the trained method leaves in the run's folder, by name."""
        return {}

    def pictures(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Images that a method makes of some of either domain, all `(N, C, H, W)` in [0, 1], for the report to show.

        Named `panel/row`; the n-th images of a panel's rows belong together.
        """
        return {}


class Outputs(NamedTuple):
    features: Tensor  # (B, D), after the bottleneck
    logits: Tensor  # (B, K), or (B, T) standardised means in regression


class Network(nn.Module):
    """Backbone, bottleneck if the configuration asks for one, and a linear head.

    `domain` (`source` or `target`) tells which BatchNorm layers to use where each domain has its own.
    """

    label_mean: Tensor
    label_std: Tensor

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.kind = context.kind
        self.domain_batches = context.domain_batches
        self.backbone = context.backbone
        self.feature_dim = context.bottleneck or context.feature_dim
        self.bottleneck: nn.Module = nn.Identity()
        if context.bottleneck:
            self.bottleneck = nn.Sequential(
                nn.Linear(context.feature_dim, context.bottleneck), nn.BatchNorm1d(context.bottleneck), nn.ReLU()
            )
        self.head = nn.Linear(self.feature_dim, context.outputs)
        if context.kind == "regression":
            assert context.label_mean is not None and context.label_std is not None
            self.register_buffer("label_mean", context.label_mean)
            self.register_buffer("label_std", context.label_std)
            self.log_noise = nn.Parameter(torch.zeros(context.outputs))  # log variance, standardised units
        if context.source_model is not None:
            load_into(self, dict(context.source_model), "the run's network", key="source_model")
        self.switch = DomainSwitch(self.backbone, self.bottleneck) if self.domain_batches == "domain_specific" else None

    def features(self, x: Any, domain: str = "target") -> Tensor:
        if self.switch is not None:
            self.switch(domain)
        return self.bottleneck(self.backbone(x))

    def forward(self, x: Any, domain: str = "target") -> Outputs:
        features = self.features(x, domain)
        return Outputs(features, self.head(features))

    def both(self, source: Any, target: Any) -> tuple[Outputs, Outputs]:
        """Source and target outputs: one forward over both, so that BatchNorm statistics are shared, or one each,
        as `trainer.domain_batches` says."""
        if self.domain_batches != "joint" or not isinstance(source, Tensor):
            return self(source, "source"), self(target, "target")
        features, logits = self(torch.cat([source, target]))
        n = len(source)
        return Outputs(features[:n], logits[:n]), Outputs(features[n:], logits[n:])

    @property
    def averaged_outputs(self) -> int:
        """The outputs that `supervised` is a mean over, so that a prior's share of it is of as many parts."""
        return 1 if self.kind == "classification" else self.head.out_features

    def supervised(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy, or the Gaussian negative log-likelihood of standardised targets with a learnt noise."""
        if self.kind == "classification":
            return F.cross_entropy(logits, y)
        residual = (y - self.label_mean) / self.label_std - logits
        return 0.5 * (residual.square() * torch.exp(-self.log_noise) + self.log_noise).mean()

    def predict(self, x: Any, domain: str = "target") -> Prediction:
        return self.prediction(self(x, domain).logits)

    def prediction(self, logits: Tensor) -> Prediction:
        """What the head's outputs `(B, K)` or `(B, T)` say."""
        if self.kind == "classification":
            return Prediction.from_logits(logits)
        variance = torch.exp(self.log_noise) * self.label_std.square()
        return Prediction(mean=self.label_mean + self.label_std * logits.float(), variance=variance.expand_as(logits))


ONE_PASS = ("predict", "predict_source", "features", "features_source")  # that a network's outputs are, as they stand


class NetworkMethod(Method):
    """A method that trains a `Network` by gradients and predicts with it."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.network = Network(context)

    def features(self, x: Any) -> Tensor:
        return self.network.features(x)

    def features_source(self, x: Any) -> Tensor:
        return self.network.features(x, "source")

    def predict(self, x: Any) -> Prediction:
        return self.network.predict(x)

    def predict_source(self, x: Any) -> Prediction:
        return self.network.predict(x, "source")

    def predict_and_features(self, x: Any, domain: str) -> tuple[Prediction, Tensor | None]:
        own = {name: getattr(type(self), name) is getattr(NetworkMethod, name) for name in ONE_PASS}
        if not all(own.values()) or type(self.network) is not Network:  # a method with a prediction of its own
            return super().predict_and_features(x, domain)
        features, logits = self.network(x, domain)
        return self.network.prediction(logits), features

    def supervised_loss(self, x: Any, y: Tensor) -> Tensor:
        return self.network.supervised(self.network(x).logits, y)
