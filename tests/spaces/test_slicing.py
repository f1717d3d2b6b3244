"""Slicing the exported graph is pruning in torch: against torch-pruning itself, and against a fresh export."""

import copy
import warnings

import numpy as np
import onnx
import pytest
import torch
import torch_pruning
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from evaluators.artifact_builder import ArtifactBuilder
from evaluators.runtimes.onnxruntime_cpu import load
from spaces.dynamic.exit_network import ExitHead, ExitNetwork, feature_channels
from spaces.joint import JointSpace
from spaces.pruning.criteria import CRITERIA
from spaces.pruning.criteria.base import Evidence
from spaces.pruning.prunable import find_groups
from studies.digits.model import resnet20
from tests.helpers.tiny import sparsity_space


def outputs(builder: ArtifactBuilder, network: ExitNetwork, space: JointSpace, channels: dict, images: torch.Tensor):
    """Returns the logits of a pruned network's float artifact, and of the same network in torch."""
    candidate = space.candidate(space.uniform(1.0, "fp32") | {f"channels.{k}": v for k, v in channels.items()})
    pruned = space.apply(network, candidate)
    (stage,) = builder.build(pruned, candidate).deployed
    with torch.no_grad():
        return load(stage, 1)(images.numpy())[0], pruned(images)[-1].numpy()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_sliced_artifact_equals_the_network_pruned_in_torch(data, builder, network, space, images) -> None:
    channels = {group.name: data.draw(st.integers(1, group.channels // 4)) * 4 for group in space.sparsity.groups}
    dimensions = space.sparsity.dimensions()
    channels = {
        k: max(v, dimensions[f"channels.{k}"].low) for k, v in channels.items() if f"channels.{k}" in dimensions
    }
    ours, torchs = outputs(builder, network, space, channels, images)
    np.testing.assert_allclose(ours, torchs, atol=1e-5)


@pytest.mark.parametrize("make", ["tiny", "resnet20"])
def test_our_pruning_equals_that_of_torch_pruning(make: str, network: ExitNetwork) -> None:
    if make == "resnet20":
        torch.manual_seed(0)
        trunk, image = resnet20().eval(), torch.randn(1, 1, 32, 32)
        channels = feature_channels(trunk, ["stage1", "stage2"], image)
        dense = ExitNetwork(trunk, ["stage1", "stage2"], [ExitHead(count, 10, 4) for count in channels]).eval()
    else:
        dense, image = network, torch.randn(1, 1, 8, 8)
    groups = find_groups(dense, image).free
    sparsity = sparsity_space(dense, groups, step=4, minimum=0.25)
    kept = {group.name: group.channels // 2 // 4 * 4 for group in groups}
    ours = sparsity.apply(dense, kept)

    theirs = copy.deepcopy(dense)
    graph = torch_pruning.DependencyGraph().build_dependency(theirs, image)
    modules = dict(theirs.named_modules())
    for group in groups:
        root = modules[group.members[0].path]
        prune = torch_pruning.prune_conv_out_channels
        if isinstance(root, nn.Linear):
            prune = torch_pruning.prune_linear_out_channels
        gone = np.setdiff1d(np.arange(group.channels), sparsity.kept(kept)[group.name])
        graph.get_pruning_group(root, prune, idxs=gone.tolist()).prune()
    batch = torch.randn(4, *image.shape[1:])
    with torch.no_grad():
        for mine, yours in zip(ours(batch), theirs(batch), strict=True):
            torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-5)
    for name, parameter in theirs.named_parameters():
        assert ours.get_parameter(name).shape == parameter.shape


def test_the_dense_artifact_equals_a_fresh_export(builder, network, space, images, tmp_path) -> None:
    file = tmp_path / "reference.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network.trunk, (images,), str(file), dynamo=False, opset_version=17)
    reference = load(file.read_bytes(), 1)(images.numpy())[0]
    (stage,) = builder.build(network, space.dense()).deployed
    np.testing.assert_allclose(load(stage, 1)(images.numpy())[0], reference, atol=1e-6)


def test_the_dense_candidate_keeps_the_weights_bit_for_bit(network, space) -> None:
    same = space.apply(network, space.dense())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name


def test_artifacts_are_valid_onnx_and_the_same_each_time(builder, network, space) -> None:
    candidate = space.candidate(space.uniform(0.5, "int8", 0.8))
    pruned = space.apply(network, candidate)
    artifact = builder.build(pruned, candidate)
    for stage in (*artifact.stages, *artifact.deployed):
        onnx.checker.check_model(onnx.load_from_string(stage), full_check=True)
    assert builder.build(pruned, candidate).digest == artifact.digest


def test_importance_ranks_channels_by_their_norm(network, space) -> None:
    group = next(group for group in space.sparsity.groups if group.name == "inner.0")
    weakened = copy.deepcopy(network)
    for member in group.members:
        module = dict(weakened.named_modules())[member.path]
        if isinstance(module, nn.Conv2d):
            (module.weight.data if member.axis == "out" else module.weight.data.transpose(0, 1))[7] *= 1e-3
    assert np.argmin(CRITERIA["l2"](weakened, [group], Evidence(torch.empty(0), torch.empty(0)))[group.name]) == 7
    kept = sparsity_space(weakened, [group], step=4, minimum=0.25).kept({"inner.0": 20})
    assert 7 not in kept["inner.0"]


def test_a_space_offers_steps_of_the_target_and_the_dense_width(network, image) -> None:
    for step in (4, 5, 8):
        space = sparsity_space(network, find_groups(network, image).free, step, minimum=0.3)
        for group in space.groups:
            dimension = space.dimensions().get(f"channels.{group.name}")
            if dimension:
                assert dimension.high == group.channels
                assert dimension.low >= 0.3 * group.channels
                assert (dimension.high - dimension.low) % step == 0


def test_a_group_cannot_keep_nothing_or_more_than_it_has(space) -> None:
    for count in (0, 17):
        with pytest.raises(ValueError, match="keeps 1 to 16"):
            space.sparsity.kept({"stem.0": count})


def test_classes_and_image_channels_are_never_cut(network, image) -> None:
    for group in find_groups(network, image).free:
        for member in group.members:
            assert not (member.axis == "out" and "classifier" in member.path)
            assert not (member.axis == "in" and member.path == "trunk.stem.0")
