"""What every implementation of an interface has to keep; subclass one and fill in the fixture."""

import numpy as np
import pytest

from evaluators.deployed import Evaluator, Subject
from evaluators.diagnosis.taps import find_taps, watched
from evaluators.measurement import METRICS, Measurement
from evaluators.runtimes.base import Runtime, TimedBatch, deployed_stages
from evaluators.runtimes.paired_timing import Protocol
from spaces.dimensions import Choice, Integer, Real, Space


class EvaluatorContract:
    """An evaluator measures one known metric, says how, and says the same of the same subject."""

    repeats_exactly = True

    @pytest.fixture
    def evaluator(self) -> Evaluator:
        raise NotImplementedError

    def test_measures_its_metric_and_says_how(self, evaluator: Evaluator, subject: Subject) -> None:
        found = evaluator.measure(subject)
        assert found.metric == evaluator.metric
        assert found.metric in METRICS
        assert np.isfinite(found.value)
        assert found.value > 0
        assert found.n >= 1
        assert found.spread >= 0
        assert found.protocol
        assert found.target

    def test_round_trips_through_json(self, evaluator: Evaluator, subject: Subject) -> None:
        import json

        found = evaluator.measure(subject)
        assert Measurement.from_dict(json.loads(json.dumps(found.to_dict()))) == found

    def test_every_statistic_of_a_budget_is_there(self, evaluator: Evaluator, subject: Subject) -> None:
        found = evaluator.measure(subject)
        for statistic in METRICS[evaluator.metric].statistics:
            assert found.statistic_value(statistic) > 0

    def test_measures_the_same_twice(self, evaluator: Evaluator, subject: Subject) -> None:
        if self.repeats_exactly:
            assert evaluator.measure(subject).value == evaluator.measure(subject).value


class RuntimeContract:
    """A runtime loads what it says is deployable, and answers for any batch size that it promises."""

    @pytest.fixture
    def runtime(self) -> Runtime:
        raise NotImplementedError

    def test_tells_what_it_is(self, runtime: Runtime) -> None:
        assert runtime.missing() is None
        assert runtime.name in runtime.version()
        assert runtime.device()
        able = runtime.capabilities()
        assert able.precisions[0] == "fp32"
        assert set(able.precisions) <= set(able.channel_steps)
        assert min(able.channel_steps.values()) >= 1

    def test_runs_what_it_deploys(self, runtime: Runtime, builder, network, space, images) -> None:
        for precision in runtime.capabilities().precisions:
            candidate = space.candidate(space.uniform(1.0, precision, 1.0))
            (stage,) = builder.build(network, candidate).stages
            opened = runtime.open([runtime.deployable(stage)], [], 1)
            logits, exits = opened.answer(images.numpy(), batch=5)
            assert logits.shape == (len(images), 4)
            assert not exits.any()
            one, _ = opened.answer(images.numpy(), batch=1)
            np.testing.assert_allclose(one, logits, atol=1e-4)
            taken = opened.seconds(images.numpy()[:4], 3)
            assert len(taken) == 3
            assert all(spent.work > 0 and spent.wall > 0 for spent in taken)
            assert all(seconds > 0 for seconds in opened.launches(images.numpy()[:4]).values())
            assert not opened.proof(images.numpy()[:4], {}).remarks()

    def test_exits_answer_and_take_turns(self, runtime: Runtime, builder, network, space, images) -> None:
        candidate = space.candidate(space.uniform(1.0, "fp32", 0.6))
        artifact = builder.build(network, candidate)
        deployed = [runtime.deployable(stage) for stage in artifact.stages]
        opened = runtime.open(deployed, artifact.thresholds, 1)
        reference = runtime.open([runtime.deployable(builder.build(network, space.dense()).stages[0])], [], 1)
        logits, exits = opened.answer(images.numpy(), batch=4)
        assert set(exits) <= {0, 1, 2}
        every = opened.all_logits(images.numpy(), batch=4)
        assert every.shape == (len(images), 3, 4)
        np.testing.assert_allclose(every[np.arange(len(images)), exits], logits, atol=1e-4)
        strict = runtime.open(deployed, [0.999] * 2, 1, "margin")
        assert set(strict.answer(images.numpy(), batch=4)[1]) == {2}
        batches = [TimedBatch(0, 4), TimedBatch(4, 4), TimedBatch(0, 4, longest=True), TimedBatch(0, 4, exit=0)]
        take_turn = opened.turns(images.numpy(), batches, reference, 2, Protocol(burst_s=0))
        for candidate_first in (True, False):
            turn = take_turn(candidate_first)
            assert all(ratio > 0 for ratio in turn.ratios)
            assert [len(wall) for wall in turn.walls] == [1, 1, 1, 1]

    def test_int8_stages_answer_as_the_whole_does(self, runtime: Runtime, builder, network, space, images) -> None:
        cut, whole = (
            builder.build(network, space.candidate(space.uniform(1.0, "int8", threshold))) for threshold in (0.6, 1.0)
        )
        stages = deployed_stages(runtime, cut.stages, skips=False)
        for batch in (1, 5, len(images)):
            found = runtime.open(stages, [2.0] * len(cut.exits), 1).answer(images.numpy(), batch)[0]
            wanted = runtime.open([runtime.deployable(whole.stages[0])], [], 1).answer(images.numpy(), batch)[0]
            np.testing.assert_allclose(found, wanted, atol=0.02 * np.ptp(wanted))

    def test_what_is_inside_a_file_can_be_seen(self, runtime: Runtime, builder, network, space, images) -> None:
        float_file = builder.build(network, space.candidate(space.uniform(1.0, "fp32", 1.0))).stages[0]
        taps = find_taps(float_file)
        for precision in runtime.capabilities().precisions:
            candidate = space.candidate(space.uniform(1.0, precision, 1.0))
            (stage,) = builder.build(network, candidate).stages
            model, names = watched(runtime.deployable(stage), [tap.tensor for tap in taps])
            tensors = runtime.tensors(model)(images.numpy())
            assert set(names) == {tap.tensor for tap in taps}
            for tap in taps:
                assert tensors[names[tap.tensor]].dtype == np.float32
                assert len(tensors[names[tap.tensor]]) == len(images)
            logits, _ = runtime.open([runtime.deployable(stage)], [], 1).answer(images.numpy(), len(images))
            # Other outputs may move a rounding in int8: by a small part of what the logits span, never by more.
            close = 1e-4 if precision == "fp32" else 0.01 * np.ptp(logits)
            np.testing.assert_allclose(tensors["logits"], logits, atol=close)

    def test_deployable_leaves_a_float_model_alone(self, runtime: Runtime, builder, network, space) -> None:
        (stage,) = builder.build(network, space.dense()).stages
        assert runtime.deployable(stage) == stage


class SpaceContract:
    """A space reads every corner of its dimensions into its part of a candidate."""

    @pytest.fixture
    def part(self) -> Space:
        raise NotImplementedError

    def test_names_are_prefixed_and_ranges_are_not_empty(self, part: Space) -> None:
        for name, dimension in part.dimensions().items():
            assert "." in name
            assert isinstance(dimension, Integer | Real | Choice)
            if isinstance(dimension, Choice):
                assert len(dimension.choices) > 1
            else:
                assert dimension.low < dimension.high

    @pytest.mark.parametrize("end", ["low", "high"])
    def test_reads_both_ends(self, part: Space, end: str) -> None:
        values = {
            name: dimension.choices[0 if end == "low" else -1]
            if isinstance(dimension, Choice)
            else getattr(dimension, end)
            for name, dimension in part.dimensions().items()
        }
        found = part.read(values)
        assert {name.split(".", 1)[1] for name in values} <= set(found)
        for name, value in values.items():
            assert found[name.split(".", 1)[1]] == value

    def test_a_missing_value_is_an_error(self, part: Space) -> None:
        with pytest.raises(KeyError):
            part.read({})
