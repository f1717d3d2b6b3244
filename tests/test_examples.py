"""The pages of docs/extending and the docstrings that they repeat: their code runs, and keeps the contract it names."""

import inspect
import re
import sys
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from optuna.samplers import BaseSampler
from torch import nn

from evaluators.quantization.calibration import CALIBRATORS
from evaluators.quantization.calibration.base import Calibrator
from evaluators.runtimes.local import LocalRuntime
from evaluators.runtimes.registry import RUNTIMES, runtime
from evaluators.testing import MaskFileContract
from search.config.registries import SAMPLERS
from search.config.study import Study, StudyError
from search.samplers.base import SamplerFactory, SearchKnowledge
from search.samplers.hypervolume.observations import observe_values
from spaces.dynamic.block_gates import BLOCK_GATES
from spaces.dynamic.block_gates.base import BlockGate
from spaces.dynamic.masks.base import Mask, masks_of
from spaces.dynamic.masks.residual_blocks import Site
from spaces.pruning.criteria import CRITERIA
from spaces.pruning.criteria.base import Criterion
from spaces.registry import Registry, UnknownNameError
from tests.helpers import tiny

PAGES = sorted((Path(__file__).parent.parent / "docs" / "extending").glob("*.md"))
KINDS: Mapping[str, tuple[type, Registry[Any]]] = {
    "block-gate": (BlockGate, BLOCK_GATES),
    "calibrator": (Calibrator, CALIBRATORS),
    "criterion": (Criterion, CRITERIA),
    "runtime": (LocalRuntime, RUNTIMES),
    "sampler": (SamplerFactory, SAMPLERS),
}


def blocks(page: Path, language: str) -> list[str]:
    """Returns the fenced blocks of a page in some language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def line(page: Path) -> tuple[str, str]:
    """Returns the name and the reference that a page adds to its registry."""
    (block,) = blocks(page, "diff")
    (found,) = re.findall(r'^\+ +"([\w-]+)": "([\w.]+:\w+)",$', block, re.MULTILINE)
    return found


def example(owner: type) -> str:
    """Returns the code in a docstring's example."""
    return textwrap.dedent(str(inspect.getdoc(owner)).split("Example:\n")[1]).strip()


def imported(code: str, name: str) -> ModuleType:
    """Returns code as the module that it would be in its file."""
    module = sys.modules[name] = ModuleType(name)
    exec(compile(code, name, "exec"), vars(module))
    return module


def page_tests(page: Path) -> dict[str, type]:
    """Returns the test classes of a page, whose implementation is named by its place: it has no line in the table."""
    found: dict[str, type] = {}
    for code in blocks(page, "python"):
        path = code.partition("\n")[0].removeprefix("# ").removesuffix(".py")
        module = imported(code, path.replace("/", ".").replace("tests.", "examples."))
        found |= {name: item for name, item in vars(module).items() if name.startswith("Test")}
    return {name: type(name, (test,), {"name": line(page)[1]}) for name, test in found.items()}


for each in PAGES:
    globals().update(page_tests(each))  # pytest finds them here


def test_every_kind_has_its_page() -> None:
    assert [page.stem for page in PAGES] == sorted(KINDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
class TestPage:
    def test_its_code_is_that_of_the_docstring(self, page: Path) -> None:
        assert blocks(page, "python")[0].partition("\n")[2].strip() == example(KINDS[page.stem][0])

    def test_its_line_fits_the_registry(self, page: Path) -> None:
        registry, (name, reference) = KINDS[page.stem][1], line(page)
        longer = Registry[Any](registry.kind, dict.fromkeys(registry, reference) | {name: reference})
        assert longer.known(name) == name
        assert longer[name] is registry[reference]
        assert callable(longer[name])
        file = blocks(page, "diff")[0].partition("\n")[0].removeprefix("# ")
        assert f'"{next(iter(registry))}": ' in (PAGES[0].parent.parent.parent / file).read_text()

    def test_a_study_may_name_it(self, page: Path) -> None:
        name, reference = line(page)
        for text in blocks(page, "toml"):
            named = re.sub(rf'"({name}|mine\.\w+:\w+)"', f'"{reference}"', text)
            content = tomllib.loads(tiny.STUDY)
            for section, keys in tomllib.loads(named).items():
                content[section] = content.get(section, {}) | keys
            Study.model_validate(content).check_extensions()

    def test_what_it_says_is_there_is_there(self, page: Path) -> None:
        root = PAGES[0].parent.parent.parent
        for path in re.findall(r"`((?:spaces|evaluators|search|tests|studies)/[\w/.]+)`", page.read_text()):
            assert (root / path).exists(), path
        for module in re.findall(r"python -m (studies\.[\w.]+)", page.read_text()):
            assert (root / f"{module.replace('.', '/')}.py").exists(), module


class TestBranchMask(MaskFileContract):
    """The example of masks, which have no page of their own."""

    name = f"{imported(example(Mask), 'examples.branch_mask').__name__}:BranchMask"

    @staticmethod
    def undecided(network: nn.Module) -> nn.Module:
        for number, mask in enumerate(masks_of(network)):
            nn.init.constant_(mask.decide[-1].bias, (-50.0, 50.0)[number % 2])
        return network

    def closed(self, site: Site, number: int) -> float:
        return 0.0

    def multiplications(self, mask: Mask, number: int, image: int) -> int:
        conv = mask.site.convs[number]
        return round(float(mask.decision[image])) * 9 * conv.inputs * conv.outputs * conv.size[0] * conv.size[1]


def test_a_name_of_ones_own_that_is_not_there_is_told_before_anything_is_trained() -> None:
    for name in ("mine.nowhere:scores", "spaces.pruning.criteria.l1:nothing"):
        study = Study.parse(tiny.STUDY + f'\nspace = {{criterion = "{name}"}}', "test")
        with pytest.raises(UnknownNameError, match=f"a criterion that is named .* got '{name}'.*start from the folder"):
            study.check_extensions()
    with pytest.raises(StudyError, match=r"package\.module:attribute"):
        Study.parse(tiny.STUDY + '\nspace = {criterion = "mine/criteria.py:scores"}', "test")


def test_a_target_may_be_ones_own() -> None:
    assert runtime("evaluators.runtimes.onnxruntime_cpu:OnnxRuntime").name == "onnxruntime"
    with pytest.raises(UnknownNameError, match=r"mine\.runtimes:Mine"):
        runtime("mine.runtimes:Mine")


def test_the_sampler_is_made_as_a_search_makes_it() -> None:
    (page,) = (page for page in PAGES if page.stem == "sampler")
    knowledge = SearchKnowledge(lambda: pytest.fail("it does not ask for the prior"), observe_values)
    assert isinstance(Registry[Any]("a sampler", dict([line(page)]))[line(page)[0]](0, knowledge), BaseSampler)
