"""Wasserstein distance guided representation learning (Shen, Qu, Zhang & Yu, AAAI 2018).

    max_w      W - γ · E (‖∇ f_w(h)‖ - 1)²        W = E_s f_w(F(x_s)) - E_t f_w(F(x_t))        `critic_steps` times
    min_{F,C}  CE(C(F(x_s)), y_s) + λ · W

f_w is the critic, and h the features of both domains and points at random on lines between pairs of them. `weight` is λ, `penalty`
is γ. The critic has one layer of `hidden` units, computes in float32, and learns at `critic_lr` times the configured rate: the
penalty's curvature of 2 γ makes it diverge under momentum SGD at rates well below the network's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transfer_cli.methods.adversarial.gradient_reversal import DomainDiscriminator
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.precision import in_full_precision
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update
from transfer_cli.methods.running_statistics import keep_statistics


class WDGRL(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    handles_target_labels = True  # the first update is the critic's, which has no use for them

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 0.1,
        penalty: float = 10.0,
        critic_steps: int = 5,
        hidden: int = 100,
        critic_lr: float = 0.1,
    ) -> None:
        super().__init__(context)
        if critic_steps < 1:
            raise ValueError(f"critic_steps is at least 1, not {critic_steps}")
        self.weight, self.penalty, self.critic_steps, self.critic_lr = weight, penalty, critic_steps, critic_lr
        self.critic = DomainDiscriminator(self.network.feature_dim, hidden, hidden_layers=1)

    def phases(self) -> list[Gradient]:
        critic = Moves.of(self.critic, lr_scale=self.critic_lr, player="critic")
        updates = [
            Update(self.critic_losses, [critic], repeats=self.critic_steps),
            Update(self.losses, [Moves.of(self.network)]),
        ]
        return [Gradient("adapt", updates)]

    def critic_losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        with torch.no_grad(), keep_statistics(self.network):
            source, target = (o.features for o in self.network.both(batch.source.x, batch.target))
        distance = wasserstein(source, target, self.critic)
        penalty = self.penalty * gradient_penalty(source, target, self.critic)
        return Losses({"critic": -distance, "gradient_penalty": penalty})

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        distance = wasserstein(source.features, target.features, self.critic)
        terms = {
            "supervised": self.network.supervised(source.logits, batch.source.y),
            "wasserstein": self.weight * distance,
        }
        if batch.target_labelled is not None:
            terms["target_supervised"] = self.supervised_loss(batch.target_labelled.x, batch.target_labelled.y)
        return Losses(terms, {"wasserstein_distance": distance.detach()})


@in_full_precision
def wasserstein(source: Tensor, target: Tensor, critic: nn.Module) -> Tensor:
    """W of features `(B, D)` and `(B', D)`: a lower bound of their 1-Wasserstein distance where the critic's slope is at most 1."""
    return critic(source).mean() - critic(target).mean()


@in_full_precision
def gradient_penalty(source: Tensor, target: Tensor, critic: nn.Module) -> Tensor:
    """Mean of `(‖∇ f(h)‖ - 1)²` (Gulrajani et al., NIPS 2017), h the features, and one point between each pair that the smaller
    of the batches allows.
    """
    n = min(len(source), len(target))
    share = torch.rand(n, 1, device=source.device, dtype=source.dtype)
    between = torch.lerp(target[:n], source[:n], share)
    points = torch.cat([source, target, between]).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    return (slopes.norm(dim=1) - 1).square().mean()
