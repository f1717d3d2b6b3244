"""A tiny predictor beside a frozen recurrent network: which updates it can do without."""

from torch import Tensor, nn

_HIDDEN = 10


class SkipPredictor(nn.Module):
    """Two hidden layers of ten on a step's input and the state before it: how far the update would move the state.

    In logarithms, in standard deviations from what is usual: an update is left out where that is below a threshold, and
    the threshold needs no training.
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
        """Returns distances `(n, 1)` for a step's input and the state before it, side by side, `(n, f + d)`."""
        distances: Tensor = self.layers(both)
        return distances
