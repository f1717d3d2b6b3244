"""What is told of versions that lack blocks or take smaller images."""

import pytest

from search.pipeline.search_space import space_line
from search.report.describe import kept_channels, kept_share
from search.report.layers import LEFT_OUT, layers_of
from spaces.candidate import Candidate
from spaces.channels import SparsitySpace
from spaces.depth import BlockStage, DepthSpace
from spaces.input_size import InputSizeSpace
from spaces.joint import JointSpace
from spaces.precision import PrecisionSpace
from spaces.thresholds import ThresholdSpace

PRECISION = {"stem": "int8", "body.0.conv": "int8", "body.1.conv": "int8"}
DENSE = Candidate({"stem": 16, "body.0.conv": 16, "body.1.conv": 32}, dict.fromkeys(PRECISION, "fp32"))


def lacking(*blocks: str, **channels: int) -> Candidate:
    return Candidate(
        {**DENSE.channels, **channels}, PRECISION, removed_blocks=blocks, input_size=24 if blocks else None
    )


def test_blocks_that_are_left_out_are_no_cut_channels() -> None:
    assert kept_share(DENSE, DENSE) == 1
    assert kept_share(lacking("body.1"), DENSE) == 1
    assert kept_share(lacking("body.1", stem=8), DENSE) == pytest.approx(24 / 32)
    assert kept_channels(lacking("body.1", stem=8), DENSE) == "75% -1 @24"


def test_a_layer_of_a_block_that_is_left_out_is_called_so() -> None:
    told = {layer.name: str(layer) for layer in layers_of(lacking("body.1"), DENSE, {})}
    assert told == {"stem": "16/16 int8", "body.0.conv": "16/16 int8", "body.1.conv": LEFT_OUT}
    fixed = Candidate({}, PRECISION, removed_blocks=("body.1",))
    whole = Candidate({}, DENSE.precision)
    assert str(layers_of(fixed, whole, {})[2]) == LEFT_OUT, "a width that is no dimension is not told"


@pytest.mark.parametrize(
    ("stages", "sizes", "line"),
    [
        ((), (), "No residual block is left out."),
        ((BlockStage("body", ("body.1",), ("body.1",), (0.1,)),), (), "1 residual block in 1 stage can be left out."),
        ((), (16, 24, 32), "No residual block is left out; images of 16, 24 or 32 pixels."),
    ],
)
def test_what_may_vary_besides_channels_is_said_before_the_search(stages, sizes, line) -> None:
    parts = SparsitySpace([], {}, 8, 1.0, 8, 1), PrecisionSpace((), ("fp32",), {}, ()), ThresholdSpace((), 0.5, 0.05)
    assert space_line(JointSpace(*parts, depth=DepthSpace(stages), input_size=InputSizeSpace(sizes))) == line
