"""A linear head on frozen features: extracted once, solved to the optimum in float64, no epochs of SGD.

    min_{W,b}  mean_s CE(W z + b, y) + mean_t CE(W z + b, y) + (l2 / 2) ‖W‖²        z = (F(x) - μ) / σ

The means run over the labels at hand: the source's (where its classes are the head's) and the granted target ones;
`labels` restricts them. μ and σ are those of the samples used. In regression, ridge. `solver`: as in `heads/logistic.py`; it ends
on the gradient's norm.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context, Needs
from transfer_cli.methods.feature_method import FeatureMethod
from transfer_cli.methods.heads.logistic import Logistic
from transfer_cli.methods.heads.ridge import Ridge
from transfer_cli.methods.math.softmax import Solver
from transfer_cli.methods.phases import ClosedForm, FeatureTask


class LinearProbe(FeatureMethod):
    version: ClassVar[int] = 2  # another solver; in regression, another variance
    needs = Needs(any_labels=True)
    uses_head: ClassVar[bool] = False  # it brings its own

    def __init__(
        self,
        context: Context,
        *,
        l2: float = 1e-3,
        labels: Literal["all", "source", "target"] = "all",
        solver: Solver = "auto",
    ) -> None:
        head: Logistic | Ridge
        if context.kind == "classification":
            head = Logistic(context.kind, context.outputs, l2=l2, solver=solver)
        else:
            head = Ridge(context.kind, context.outputs, l2=l2)
        super().__init__(context, head=head)
        self.labels, self.l2 = labels, l2
        self.use_source = context.source_labels_fit_head and labels != "target"
        if not self.use_source and (labels == "source" or not context.has_target_labels):
            raise TransferError("linear_probe finds no labels for its head: set target_labels=N, or method.labels=all.")

    def phases(self) -> list[ClosedForm]:
        labelled = {"source": self.use_source, "target_labelled": self.labels != "source"}
        return [ClosedForm("probe", self.fit, parts=[name for name, used in labelled.items() if used])]

    def fit_head(self, task: FeatureTask) -> None:
        assert isinstance(self.head, Logistic | Ridge)  # which averages over the domains; the formula sums over them
        self.head.l2 = self.l2 / sum(part is not None for part in (task.source, task.target_labelled))
        super().fit_head(task)
