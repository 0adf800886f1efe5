"""Cycle-consistent adversarial domain adaptation (Hoffman et al., ICML 2018), with a translator conditioned on the class.

    source      min_f  CE(f(x_s), y_s); a copy is kept as f_S
    translate   min_G  w · ( V(D_T(x_s→t)) + V(D_S(x_t→s)) )
                       + λ · ( |G_ts(x_s→t, y_s) - x_s| + |G_st(x_t→s, p_t) - x_t| )
                       + μ · ( CE(f_S(x_s→t), y_s) + CE(f_S(x_t→s), argmax p_t) )
                       x_s→t = G_st(x_s, y_s)        x_t→s = G_ts(x_t, p_t)        p_t = softmax f_S(x_t)
                min_D  ½ ( V(D_T(x_t)) + V̄(D_T(x_s→t)) ) + ½ ( V(D_S(x_s)) + V̄(D_S(x_t→s)) )
    adapt       min_f max_D  CE(f(x_s→t), y_s) - λ(p) · v · BCE(D(F(x)), domain)        over x_s→t and x_t, as in DANN

V(d) and V̄(d) are (d - 1)² and d² (`game: least_squares`, as CycleGAN: Zhu et al., ICCV 2017) or -log σ(d) and -log σ(-d).
`adversarial` is w, `cycle` λ (10 in CycleGAN), `semantic` μ, `feature_weight` v (0: pixels alone); the paper's sum has all but λ
at 1. `gamma`, `hidden`, `dropout` and `feature_discriminator_lr` are DANN's. The paper's G know no class, and its semantic term
takes f_S's prediction for y_s. Rates of the translators and of their critics are `generator_lr` and `critic_lr` times the
configured one (2e-4 with Adam in CycleGAN).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.adversarial.gradient_reversal import DomainDiscriminator, domain_loss, reverse_gradient
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.generative.translator import (
    SMALLEST,
    Game,
    Norm,
    PatchCritic,
    Translator,
    critic_loss,
    verdict,
)
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update
from transfer_cli.methods.teacher import Teacher


class CyCADA(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(
        self,
        context: Context,
        *,
        adversarial: float = 1.0,
        cycle: float = 10.0,
        semantic: float = 1.0,
        game: Game = "least_squares",
        width: int = 32,
        blocks: int = 2,
        critic_width: int = 32,
        critic_norm: Norm = "instance",
        generator_lr: float = 0.2,
        critic_lr: float = 0.2,
        feature_weight: float = 1.0,
        gamma: float = 10.0,
        hidden: int = 512,
        dropout: float = 0.5,
        feature_discriminator_lr: float = 10.0,
        source_steps: int | None = None,
        translate_steps: int | None = None,
        adapt_steps: int | None = None,
    ) -> None:
        spec = context.input
        if spec is None or spec.kind != "image" or min(spec.shape[1:]) < SMALLEST:
            raise TransferError(
                f"cycada translates images of at least {SMALLEST} pixels a side, and this task has {spec}."
            )
        if width < 1 or blocks < 0 or critic_width < 1:
            raise ValueError("width and critic_width are at least 1, blocks at least 0")
        if any(steps is not None and steps < 1 for steps in (source_steps, translate_steps, adapt_steps)):
            raise ValueError("source_steps, translate_steps and adapt_steps are at least 1, or null for the trainer's")
        if context.domain_batches == "domain_specific" and not feature_weight:
            raise ValueError(
                "trains no BatchNorm layers of the target without feature_weight: set trainer.domain_batches"
            )
        super().__init__(context)
        self.adversarial, self.cycle, self.semantic, self.game = adversarial, cycle, semantic, game
        self.generator_lr, self.critic_lr = generator_lr, critic_lr
        self.feature_weight, self.gamma = feature_weight, gamma
        self.feature_discriminator_lr = feature_discriminator_lr
        self.source_steps, self.translate_steps, self.adapt_steps = source_steps, translate_steps, adapt_steps
        self.trained_before, self.classes = context.source_model is not None, context.num_classes
        channels = spec.shape[0]
        self.to_target = Translator(channels, self.classes, width, blocks)  # G_st
        self.to_source = Translator(channels, self.classes, width, blocks)  # G_ts
        self.target_critic = PatchCritic(channels, critic_width, critic_norm)  # D_T
        self.source_critic = PatchCritic(channels, critic_width, critic_norm)  # D_S
        self.discriminator = DomainDiscriminator(self.network.feature_dim, hidden, dropout=dropout)
        self.labeller = Teacher(self.network)  # f_S

    def train(self, mode: bool = True) -> CyCADA:
        super().train(mode)
        self.labeller.eval()
        return self

    def phases(self) -> list[Gradient]:
        source = Update(self.source_losses, [Moves.of(self.network)])
        translate = [
            Update(
                self.translator_losses,
                [Moves.of(self.to_target, self.to_source, lr_scale=self.generator_lr, player="generator")],
            ),
            Update(
                self.critic_losses,
                [Moves.of(self.target_critic, self.source_critic, lr_scale=self.critic_lr, player="critic")],
            ),
        ]
        adapt = [Moves.of(self.network)]
        if self.feature_weight:
            adapt.append(Moves.of(self.discriminator, lr_scale=self.feature_discriminator_lr, player="discriminator"))
        labelled, both = ("source", "target_labelled"), ("source", "target")
        phases = [
            Gradient("source", [source], steps=self.source_steps, parts=labelled),
            Gradient(
                "translate",
                translate,
                steps=self.translate_steps,
                parts=both,
                on_start=self.keep_labeller,
                predicts=False,
            ),
            Gradient("adapt", [Update(self.losses, adapt)], steps=self.adapt_steps),
        ]
        return phases[1:] if self.trained_before else phases

    def keep_labeller(self) -> None:
        self.labeller.copy(self.network)

    def source_losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        logits = self.network(batch.source.x, "source").logits
        return Losses({"supervised": self.network.supervised(logits, batch.source.y)})

    def label(self, x: Tensor) -> Tensor:
        """f_S's logits; gradients reach `x`."""
        return self.labeller.module(x, "source").logits.float()

    def believed(self, x: Tensor) -> Tensor:
        """f_S's class probabilities, without gradients."""
        with torch.no_grad():
            return self.label(x).softmax(1)

    def known(self, y: Tensor) -> Tensor:
        return F.one_hot(y, self.classes).float()

    def translator_losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None and batch.target is not None
        x_s, y_s, x_t = batch.source.x, batch.source.y, batch.target
        c_s, c_t = self.known(y_s), self.believed(x_t)
        as_target, as_source = self.to_target(x_s, c_s), self.to_source(x_t, c_t)
        fooling = verdict(judged(self.target_critic, as_target), True, self.game)
        fooling = fooling + verdict(judged(self.source_critic, as_source), True, self.game)
        back = F.l1_loss(self.to_source(as_target, c_s), x_s) + F.l1_loss(self.to_target(as_source, c_t), x_t)
        meaning = F.cross_entropy(self.label(as_target), y_s)
        meaning = meaning + F.cross_entropy(self.label(as_source), c_t.argmax(1))
        return Losses(
            {"adversarial": self.adversarial * fooling, "cycle": self.cycle * back, "semantic": self.semantic * meaning}
        )

    def critic_losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None and batch.target is not None
        x_s, x_t = batch.source.x, batch.target
        with torch.no_grad():
            as_target = self.to_target(x_s, self.known(batch.source.y))
            as_source = self.to_source(x_t, self.believed(x_t))
        target, right_t = critic_loss(self.target_critic(x_t), self.target_critic(as_target), self.game)
        source, right_s = critic_loss(self.source_critic(x_s), self.source_critic(as_source), self.game)
        return Losses(
            {"target_critic": target, "source_critic": source}, {"discriminator_accuracy": 0.5 * (right_t + right_s)}
        )

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        with torch.no_grad():
            translated = self.to_target(batch.source.x, self.known(batch.source.y))
        if not self.feature_weight:
            logits = self.network(translated, "source").logits
            return Losses({"supervised": self.network.supervised(logits, batch.source.y)})
        source, target = self.network.both(translated, batch.target)
        strength = self.feature_weight * ramp(progress.p, self.gamma)
        domain, accuracy = domain_loss(
            self.discriminator(reverse_gradient(source.features, strength)),
            self.discriminator(reverse_gradient(target.features, strength)),
        )
        supervised = self.network.supervised(source.logits, batch.source.y)
        return Losses({"supervised": supervised, "domain": domain}, {"discriminator_accuracy": accuracy})

    def predict_source(self, x: Any) -> Prediction:
        """Of the translation, which is what the network was trained on."""
        return self.network.predict(self.to_target(x, self.believed(x)), "source")

    def pictures(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        c_s, c_t = self.believed(source), self.believed(target)
        as_target, as_source = self.to_target(source, c_s), self.to_source(target, c_t)
        return {
            "source to target/source": source,
            "source to target/translated": as_target,
            "source to target/and back": self.to_source(as_target, c_s),
            "target to source/target": target,
            "target to source/translated": as_source,
            "target to source/and back": self.to_target(as_source, c_t),
        }


def judged(critic: nn.Module, images: Tensor) -> Tensor:
    """The critic's logits, with gradients for the images alone."""
    return functional_call(critic, {name: p.detach() for name, p in critic.named_parameters()}, (images,))
