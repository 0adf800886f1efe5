"""Open set domain adaptation by backpropagation (Saito, Yamamoto, Ushiku & Harada, ECCV 2018).

    min_C  L_s + L_adv        min_F  L_s - w · L_adv        L_adv = -t log p_u(x_t) - (1 - t) log(1 - p_u(x_t))

C has K + 1 outputs, the last of them for `unknown`, and p_u is its probability. L_s is the cross-entropy over all K + 1 outputs
of source samples, which are never unknown. C sets p_u of a target sample to t; F may move it either way, to a class that the
source has or to unknown. One update moves both, with a gradient reversal between F and C. `threshold` is t, `weight` is w (1 in
the paper).
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F

from transfer_cli.methods.adversarial.gradient_reversal import reverse_gradient
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class OSBP(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)
    label_spaces = ("open",)
    is_game = True

    def __init__(self, context: Context, *, weight: float = 1.0, threshold: float = 0.5) -> None:
        if context.label_space != "open":
            raise ValueError(f"it needs label_space=open, a target with classes of its own; not {context.label_space}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is a probability between 0 and 1, not {threshold}")
        super().__init__(replace(context, num_classes=context.num_classes + 1))
        self.weight, self.threshold = weight, threshold

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        logits = self.network.head(reverse_gradient(target.features, self.weight)).float()
        unknown = logits[:, -1] - logits[:, :-1].logsumexp(1)  # the logit of p_u
        t = self.threshold
        adversarial = (t * F.softplus(-unknown) + (1 - t) * F.softplus(unknown)).mean()
        return Losses(
            {"supervised": supervised, "adversarial": adversarial},
            {"unknown_probability": unknown.detach().sigmoid().mean()},
        )
