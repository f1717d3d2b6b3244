"""A tiny predictor beside a frozen recurrent network: which updates it can do without."""

from torch import Tensor, nn

_HIDDEN = 10


class SkipPredictor(nn.Module):
    """Two hidden layers of ten on a step's input and the state before it: the logit of an update being needed.

    Source: Tao et al., Skipping RNN State Updates without Retraining the Original Model, 2019.

    Args:
        features: of a step.
        hidden: width of the state.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features + hidden, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, 1),
        )

    def forward(self, both: Tensor) -> Tensor:
        """Returns logits `(n, 1)` for a step's input and the state before it, side by side, `(n, f + d)`."""
        logits: Tensor = self.layers(both)
        return logits
