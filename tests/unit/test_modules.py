"""Modules by themselves, in a small model: all that are wrong are named, and no others."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping

import pytest
import torch

from snapshot_tool.base.localisation import ModuleTrials
from snapshot_tool.base.protocol import Candidate, CaseInputs, Observer, Side
from snapshot_tool.diagnose.modules import Isolator, isolate, run_probes
from snapshot_tool.taps.hooks import tap_modules
from snapshot_tool.taps.sketches import Probe, probe_input, probe_shapes, relative_error, sketch

_WIDTH = 12
_NOISE = {"float32": 1e-7}
_IDS = CaseInputs(torch.arange(6)[None], torch.ones(1, 6, dtype=torch.int64))


class Block(torch.nn.Module):
    """A norm and an MLP under a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(_WIDTH)
        self.up = torch.nn.Linear(_WIDTH, 2 * _WIDTH)
        self.act = torch.nn.SiLU()
        self.down = torch.nn.Linear(2 * _WIDTH, _WIDTH)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x and what the MLP adds to it."""
        added: torch.Tensor = self.down(self.scale * self.act(self.up(self.norm(x))))
        return x + added


class Model(torch.nn.Module):
    """A table and three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, _WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the last block's output."""
        x: torch.Tensor = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return x


class Port(Candidate):
    """A candidate of such a model, with its modules under their own names."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def observe_forward(self, inputs: CaseInputs, observe: Observer) -> Mapping[str, str]:
        """Run the model."""
        with tap_modules(self.model, observe):
            self.model(inputs.input_ids)
        return {name: f"own.{name}" for name, _ in self.model.named_modules()}

    def run_module(self, module: str, given: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """Run one module."""
        with torch.no_grad():
            return module, self.model.get_submodule(module)(given)


@pytest.fixture(scope="module")
def reference() -> Model:
    """Build a model with random weights."""
    torch.manual_seed(0)
    return Model().eval()


def spoil(model: Model, module: str) -> None:
    """Change a module a little."""
    spoiled = model.get_submodule(module)
    with torch.no_grad():
        if isinstance(spoiled, Block):
            spoiled.scale = 1.001
        elif isinstance(spoiled, torch.nn.LayerNorm):
            spoiled.eps = 1e-3
        else:
            assert isinstance(spoiled.weight, torch.Tensor)
            spoiled.weight[1] *= 1.001


def run_isolated(reference: Model, port: Model) -> ModuleTrials:
    """Run a port on what the reference's modules took and returned."""
    recorded: dict[tuple[str, Side], torch.Tensor] = {}

    def keep(module: str, side: Side, tensor: torch.Tensor) -> None:
        recorded[module, side] = tensor.clone()

    with torch.no_grad():
        Port(reference).observe_forward(_IDS, keep)
    isolator = Isolator(recorded, 1, _IDS.attention_mask)
    return isolate(Port(port), _IDS, isolator, dict.fromkeys(recorded, 1e-6))


_MODULES = [
    "table",
    *(f"blocks.{i}{part}" for i in range(3) for part in ("", ".norm", ".up", ".down")),
]


@pytest.mark.parametrize("seed", range(8))
def test_all_wrong_modules_are_named_and_no_others(reference: Model, seed: int) -> None:
    """Two to five faults at once, those in a block's own code among them, in order of execution."""
    draw = random.Random(seed)
    wrong = draw.sample(_MODULES, draw.randint(2, 5))
    port = copy.deepcopy(reference)
    for module in wrong:
        spoil(port, module)
    found = run_isolated(reference, port)
    assert sorted(trial.module for trial in found.wrong) == sorted(wrong)
    assert all(trial.candidate == f"own.{trial.module}" for trial in found.wrong)
    blocks = [trial.module.split(".")[1] for trial in found.wrong if trial.module != "table"]
    assert blocks == sorted(blocks)


def test_no_module_of_the_same_model_is_wrong(reference: Model) -> None:
    """All are compared, the blocks as well."""
    found = run_isolated(reference, copy.deepcopy(reference))
    assert (found.tried, found.wrong, found.not_tried) == (16, (), ())


def probes(model: Model) -> list[Probe]:
    """Ask a model."""
    return [
        Probe(name, shape, size, sketch(Port(model).run_module(name, given)[1], seed=1), _NOISE)  # type: ignore[index]
        for name, module in model.named_modules()
        if not list(module.children())
        for shape, size in probe_shapes(module)
        for given in [probe_input(shape, size, seed=1)]
    ]


@pytest.mark.parametrize("module", ["blocks.1.norm", "blocks.2.up", "table"])
def test_a_probe_names_a_module_that_no_input_shows(reference: Model, module: str) -> None:
    """An epsilon shows with small inputs, a bias too, and a row of a table that no prompt has."""
    port = copy.deepcopy(reference)
    spoiled = port.get_submodule(module)
    with torch.no_grad():
        if isinstance(spoiled, torch.nn.LayerNorm):
            spoiled.eps = 1e-6
        elif isinstance(spoiled, torch.nn.Linear):
            spoiled.bias.add_(9e-6)
        else:
            port.table.weight[9] *= 1.001
    found = run_probes(Port(port), probes(reference), dtypes=("float32",), seed=1)
    assert [trial.module for trial in found.wrong] == [module]
    assert run_probes(Port(reference), probes(reference), dtypes=("float32",), seed=1).wrong == ()


def test_a_wrong_tail_of_an_activation_is_found(reference: Model) -> None:
    """A clamp at 20 changes nothing for the inputs of a small model."""
    port = copy.deepcopy(reference)
    block = port.blocks[0]
    assert isinstance(block, Block)
    block.act.register_forward_hook(lambda _module, _given, answer: answer.clamp(max=20))
    found = run_probes(Port(port), probes(reference), dtypes=("float32",), seed=1)
    assert [trial.module for trial in found.wrong] == ["blocks.0.act"]


def test_a_module_that_the_candidate_lacks_is_not_tried(reference: Model) -> None:
    """It is listed by name, and so is one that returns another shape."""
    port = copy.deepcopy(reference)
    block = port.blocks[0]
    assert isinstance(block, Block)
    block.up = torch.nn.Linear(_WIDTH, _WIDTH)
    block.norm = torch.nn.LayerNorm(3)
    found = run_probes(Port(port), probes(reference), dtypes=("float32",), seed=1)
    assert (found.not_tried, found.wrong) == (("blocks.0.norm", "blocks.0.up"), ())


def test_the_input_of_a_probe_is_the_same_everywhere() -> None:
    """It is made from a seed, since no file holds it."""
    one, other = (probe_input((1, 4, 8), 1e-4, seed=3) for _ in range(2))
    assert torch.equal(one, other)
    assert 1e-5 < one.std() < 1e-3
    assert relative_error(sketch(one, seed=1), sketch(other, seed=1)) == 0
    assert probe_input((1, 5), 0, seed=3).tolist() == [[0, 1, 2, 3, 4]]
