"""Residual blocks that are left out: found, ordered by damage, counted by stage, and as part of a candidate."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evaluators.testing import space_of
from spaces.candidate import Candidate
from spaces.depth import (
    BlockStage,
    DepthSpace,
    damage,
    find_stages,
    measurements,
    ordered_by_damage,
    shortened,
)
from spaces.dynamic.exit_network import ExitHead, ExitNetwork
from spaces.dynamic.skippable_blocks import removable_blocks
from spaces.joint import JointSpace
from spaces.patterns import PatternSpace
from spaces.precision import PrecisionSpace
from spaces.pruning.prunable import find_groups
from spaces.testing import Block, SpaceContract, exit_network, pictures
from spaces.thresholds import Thresholds, ThresholdSpace
from tests.helpers import deep, skippable
from tests.helpers.deep import REMOVABLE

STAGE = BlockStage("body", ("body.0", "body.1", "body.2"), ("body.1", "body.2", "body.0"), (0.1, 0.3, 0.9))
REMOVED = st.lists(st.sampled_from(REMOVABLE), unique=True)


@pytest.fixture(scope="module")
def network() -> ExitNetwork:
    return deep.stages()


@pytest.fixture(scope="module")
def joint(network: ExitNetwork) -> JointSpace:
    layers = [path.removeprefix("trunk.") for path, each in network.named_modules() if isinstance(each, nn.Conv2d)]
    plain = space_of(network, layers)
    gates = ThresholdSpace((), 0.5, 0.05, skips=("stage1.1",), masks=("stage1.1", "stage2.0"))
    patterns = PatternSpace({"stage1.1.conv1": ("50%",), "stage2.0.conv1": ("50%",)})
    return JointSpace(plain.sparsity, plain.precision, gates, patterns, deep.space_of_depth(network))


class TestDepthSpace(SpaceContract):
    @pytest.fixture
    def part(self) -> DepthSpace:
        return DepthSpace([STAGE, BlockStage("layer2", ("layer2.1",), ("layer2.1",), (0.2,))])


@given(REMOVED)
def test_candidates_that_lack_blocks_round_trip(blocks: list[str]) -> None:
    candidate = Candidate({"a": 3}, {"a": "int8"}, Thresholds({"exit1": 0.9}), {"a": "2:4"}, tuple(blocks))
    again = Candidate.from_dict(json.loads(json.dumps(candidate.to_dict())))
    assert again == candidate
    assert again.key == candidate.key
    assert again == replace(candidate, removed_blocks=(*reversed(blocks), *blocks)), "order and repetition say nothing"
    assert (candidate.key == replace(candidate, removed_blocks=()).key) == (not blocks)


def test_whole_networks_are_written_as_they_were_before() -> None:
    candidate = Candidate({"stem": 8}, {"stem": "int8"}, Thresholds({"exit1": 0.9}))
    assert "removed_blocks" not in candidate.to_dict()
    assert candidate.key == "42bbd08c040d6209"


@pytest.mark.parametrize(
    ("name", "is_left_out"),
    [("body.1", True), ("body.1.conv1", True), ("body.10.conv1", False), ("body", False), ("other.body.1", False)],
)
def test_what_is_inside_a_block_goes_with_it(name: str, is_left_out: bool) -> None:
    assert Candidate({}, {}, removed_blocks=("body.1",)).lacks(name) == is_left_out
    assert not Candidate({}, {}).lacks(name)


def test_blocks_of_one_shape_and_place_are_a_stage_and_others_stay(network: ExitNetwork) -> None:
    found = find_stages(network, pictures(1))
    assert [(stage.name, stage.blocks) for stage in found] == [
        ("stage1", REMOVABLE[:3]),
        ("stage2", REMOVABLE[3:]),
    ]
    unnamed = find_stages(ExitNetwork(skippable.network().eval(), (), ()).eval(), pictures(1))
    assert [(stage.name, stage.blocks) for stage in unnamed] == [
        ("first-second", ("first", "second")),
        ("last", ("last",)),
    ]


def test_a_network_without_such_blocks_has_no_stage() -> None:
    assert find_stages(exit_network(), pictures(1)) == []
    assert DepthSpace(()).dimensions() == {}
    assert DepthSpace(()).removed({}) == ()


@pytest.mark.parametrize(
    ("after", "stays"),
    [
        (["stage1"], "stage1.2"),
        (["stage1.1"], "stage1.1"),
        (["stage2.2"], "stage2.2"),
        (["stage1.0.relu1"], "stage1.0"),
    ],
)
def test_a_block_that_an_exit_reads_stays(after: list[str], stays: str) -> None:
    assert set(removable_blocks(deep.stages().trunk, pictures(1), after)) == set(REMOVABLE) - {stays}


def test_a_block_that_a_file_cannot_do_without_stays(network: ExitNetwork) -> None:
    def proof(smaller: ExitNetwork) -> str | None:
        return "this one is needed" if "stage1.1" in smaller.removed_blocks else None

    found = find_stages(network, pictures(1), proof)
    assert [stage.blocks for stage in found] == [("stage1.0", "stage1.2"), REMOVABLE[3:]]
    assert find_stages(network, pictures(1), lambda _: "never") == []


@settings(deadline=None, max_examples=30)
@given(REMOVED)
def test_a_shortened_network_is_the_network_with_the_identity_in_place_of_blocks(blocks: list[str]) -> None:
    network, images = deep.with_exits(), pictures(4)
    expected = copy.deepcopy(network)
    for block in blocks:
        parent, _, name = block.rpartition(".")
        setattr(expected.trunk.get_submodule(parent), name, nn.Identity())
    before = set(network.state_dict())
    smaller = shortened(network, blocks)
    with torch.no_grad():
        for found, logits in zip(smaller(images), expected(images), strict=True):
            assert torch.equal(found, logits)
    assert smaller.removed_blocks == tuple(sorted(blocks))
    assert set(network.state_dict()) == before, "the network itself stays as it is"
    shared = {id(parameter) for parameter in network.parameters()}
    assert all(id(parameter) in shared for parameter in smaller.parameters())


def test_a_shortened_network_can_be_shortened_again_and_copied(network: ExitNetwork) -> None:
    twice = shortened(shortened(network, ["stage1.0"]), ["stage2.1"])
    assert twice.removed_blocks == ("stage1.0", "stage2.1")
    assert copy.deepcopy(twice).removed_blocks == twice.removed_blocks
    assert shortened(network, []) is network


def test_a_gate_goes_with_its_block() -> None:
    gated = skippable.gated()
    smaller = shortened(gated, ["second"])
    assert smaller.skip_blocks == ("first", "last")
    assert not any(name.startswith("skips.second") for name in smaller.state_dict())
    assert gated.skip_blocks == skippable.BLOCKS


@given(st.integers(1, 12), st.floats(0, 1))
def test_a_stage_keeps_at_least_its_share_of_blocks(count: int, minimum: float) -> None:
    blocks = tuple(f"body.{number}" for number in range(count))
    space = DepthSpace([BlockStage("body", blocks, blocks, (0.0,) * count)], minimum)
    fewest = int(minimum * count + 1e-9)
    assert len(space.removed({"body": fewest})) == count - fewest
    if fewest < count:
        dimension = space.dimensions()["depth.body"]
        assert (dimension.low, dimension.high) == (fewest, count)
        assert space.removed(space.read({"depth.body": dimension.high})) == ()
        assert space.removed(space.read({"depth.body": dimension.low})) == space.removed({"body": fewest})
    else:
        assert space.dimensions() == {}
    assert space.description == {"body": list(blocks[: count - fewest])}


def test_those_that_go_first_are_out_of_every_shorter_network() -> None:
    space = DepthSpace([STAGE])
    kept = [set(space.removed({"body": count})) for count in (3, 2, 1, 0)]
    assert kept == [set(), {"body.1"}, {"body.1", "body.2"}, set(STAGE.blocks)]
    assert space.removed({}) == ()


def silenced(trunk: nn.Module, block: str) -> None:
    """Turns a block into the identity, by the zero scale of its last batch normalisation."""
    last = trunk.get_submodule(block).bn2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


@pytest.mark.parametrize("block", REMOVABLE)
def test_a_block_that_does_nothing_goes_first_and_costs_nothing(block: str) -> None:
    network = deep.stages()
    silenced(network.trunk, block)
    space = deep.space_of_depth(network)
    stage = next(stage for stage in space.stages if block in stage.blocks)
    assert stage.leaving[0] == block
    assert stage.damage[0] == pytest.approx(0, abs=1e-6)
    assert stage.damage[1] > 1e-4


def test_damage_is_measured_again_as_blocks_go() -> None:
    """Two blocks that undo each other: alone, either is dear; once one has gone, the other goes next."""
    network = deep.stages()
    found = deep.space_of_depth(network).stages[0]
    images = pictures(16)
    with torch.no_grad():
        network.train()
        dense = network.trunk(images)
        network.eval()
    gone: list[str] = []
    for block in found.leaving:
        left = [each for each in found.blocks if each not in gone]
        costs = {each: damage(shortened(network, [*gone, each]), dense, images) for each in left}
        assert block == min(costs, key=costs.__getitem__)
        gone.append(block)


def test_damage_is_the_divergence_with_the_statistics_of_these_images(network: ExitNetwork) -> None:
    images, plain = pictures(32), copy.deepcopy(network)
    smaller = shortened(network, ["stage1.0"])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        dense = plain.trunk(images)
        found = damage(smaller, dense, images)
        logits = shortened(plain.train(), ["stage1.0"]).trunk(images)
    p, q = dense.softmax(1), logits.softmax(1)
    assert found == pytest.approx(float((p * (p.log() - q.log())).sum(1).mean()), rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("count", [1, 2, 6, 7, 13, 20])
def test_a_stage_of_many_blocks_is_measured_in_a_few_rounds(count: int) -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *(Block(4, 4) for _ in range(count)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    network = ExitNetwork(nn.Sequential(trunk, head).eval(), (), ()).eval()
    (stage,) = find_stages(network, pictures(1))
    passes = []
    hook = head.register_forward_hook(lambda *_: passes.append(1))
    (ordered,) = ordered_by_damage(network, [stage], pictures(2))
    hook.remove()
    assert sorted(ordered.leaving) == sorted(stage.blocks)
    assert list(ordered.damage) == sorted(ordered.damage)
    assert len(passes) == measurements(count) + 1, "once more for the dense network"
    assert measurements(count) <= 6 * count + count


def test_choices_in_blocks_that_are_left_out_make_no_different_candidates(joint: JointSpace) -> None:
    gone = joint.depth.stages[0]
    short = joint.uniform(1.0, "fp32", depth=1.0) | {"depth.stage1": 0}
    inside = [
        name
        for name in joint.dimensions()
        if any(f".{block}." in f".{name.split('.', 1)[1]}." or name.endswith(block) for block in gone.blocks)
    ]
    assert {name.split(".")[0] for name in inside} == {"channels", "precision", "threshold", "pattern"}
    candidate = joint.candidate(short)
    for end in (0, -1):
        values = dict(short)
        for name in inside:
            dimension = joint.dimensions()[name]
            choices = getattr(dimension, "choices", None)
            values[name] = choices[end] if choices else (dimension.low, dimension.high)[end]
        assert joint.candidate(values) == candidate
    assert not any(candidate.lacks(layer) for layer in candidate.patterns)
    assert joint.candidate({**short, "threshold.mask.stage2.0": 0.0}) != candidate
    assert joint.candidate({**short, "precision.stage2.0.conv1": "int8"}) != candidate


def test_a_share_of_the_depth_is_the_nearest_number_of_blocks(joint: JointSpace) -> None:
    for depth, kept in ((1.0, (3, 2)), (2 / 3, (2, 1)), (1 / 3, (1, 1)), (0.0, (0, 0))):
        values = joint.uniform(1.0, "fp32", depth=depth)
        assert (values["depth.stage1"], values["depth.stage2"]) == kept
    assert joint.candidate(joint.uniform(1.0, "fp32")) == joint.dense()


@settings(deadline=None, max_examples=30)
@given(REMOVED, st.sampled_from([0.25, 0.5, 1.0]))
def test_it_does_not_matter_whether_blocks_or_channels_go_first(
    network: ExitNetwork, joint: JointSpace, blocks: list[str], keep: float
) -> None:
    space = joint.sparsity
    channels = {group.name: max(round(group.channels * keep), 1) for group in space.groups}
    one = shortened(space.apply(network, channels), blocks)
    other = space.apply(shortened(network, blocks), channels)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_groups_inside_a_block_are_told_from_the_stream(network: ExitNetwork) -> None:
    groups = {group.name: group for group in find_groups(network, pictures(1)).free}
    assert groups["stage1.1.conv1"].is_inside(["stage1.1"])
    assert not groups["stage1.1.conv1"].is_inside(["stage1.0", "stage1.10"])
    assert not groups["stem.0"].is_inside(REMOVABLE)


def test_exits_after_a_stage_leave_the_depth_of_the_others_free() -> None:
    network = ExitNetwork(deep.stages().trunk, ["stage1"], [ExitHead(8, 4, 2)]).eval()
    found = find_stages(network, pictures(1))
    assert [stage.blocks for stage in found] == [REMOVABLE[:2], REMOVABLE[3:]]
    assert PrecisionSpace(("a",), ("fp32",)).dimensions() == {}


def test_answers_that_are_no_numbers_are_the_worst_damage_and_change_nothing() -> None:
    network = deep.with_exits()
    images = pictures(6)
    with torch.no_grad():
        dense = network.trunk(images)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        broken = shortened(network, ["stage1.0"])
        broken.trunk.stem[0].weight.mul_(float("nan"))
        found = damage(broken, dense, images)
        broken.trunk.stem[0].weight.copy_(before["trunk.stem.0.weight"])
    assert found == 100
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("share", ["module", "parameter"])
def test_blocks_that_share_weights_with_others_stay(share: str) -> None:
    network = deep.stages()
    first, second = network.trunk.stage1[0], network.trunk.stage1[1]
    if share == "module":
        second.conv1 = first.conv1
    else:
        second.conv1.weight = first.conv1.weight
    removable = {block for stage in find_stages(network, pictures(1)) for block in stage.blocks}
    assert removable == {"stage1.2", "stage2.1", "stage2.2"}


def test_damage_is_measured_on_a_single_image_too() -> None:
    """Behind the stem every channel has one value, of which batch norm cannot take the variance."""
    network = deep.stages()
    network.trunk.stem[0] = nn.Conv2d(1, 8, 8)
    image = pictures(1)
    stages = find_stages(network, image)
    assert all(len(stage.damage) == len(stage.blocks) for stage in ordered_by_damage(network, stages, image))
