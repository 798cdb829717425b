"""Files that somebody damaged or made up: an error in one sentence, no crash, and nothing written beside the output.

Every attack takes a valid file, changes it (`hostile.py`), and calls what users call. `make test-slow` runs more than
ten thousand cases; the fast ones are some hundred of the same.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hostile
import networks
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_import import GOLDEN, SHA256
from test_manifest import written
from test_reports import sample_report

from mobilekit import bench, manifest, packing, pipeline, profiles, registry, workload
from mobilekit.devices.host import Host
from mobilekit.errors import MobilekitError
from mobilekit.network import trace
from mobilekit.pipeline import rounds
from mobilekit.pipeline._sweep_folders import from_bytes
from mobilekit.pipeline.request import open_job, read_plan, request_of
from mobilekit.types import Budget, Candidate, Estimate, Option, Plan
from mobilekit.types.plan import ChosenOption

CASES: Counter[str] = Counter()
FILES_AT_ONCE = 16
"""Of one measuring process."""


@dataclass(frozen=True)
class Valid:
    """Sound files to start from."""

    models: dict[str, Path]
    package: bytes
    manifest: Path
    profile: dict[str, Any]
    plan: dict[str, Any]
    report: dict[str, Any]
    result: dict[str, Any]
    workload: str
    candidate: Candidate


@dataclass(frozen=True)
class Yard:
    """A folder in which a case plays: `inside` holds its files, and the rest is nobody's business."""

    root: Path

    @property
    def inside(self) -> Path:
        return self.root / "inside"

    def everything(self) -> dict[str, object]:
        return {str(path.relative_to(self.root)): seen(path) for path in sorted(self.root.rglob("*"))}


def seen(path: Path) -> object:
    if path.is_symlink():
        return ("link", os.readlink(path))
    if path.is_file():
        return path.read_bytes()
    return "folder" if path.is_dir() else "pipe"


@contextmanager
def yard() -> Iterator[Yard]:
    before = Path.cwd()
    root = Path(tempfile.mkdtemp(prefix="yard-"))
    try:
        (root / "inside").mkdir()
        (root / "secret.json").write_text('{"schema": 1}')
        os.chdir(root)
        yield Yard(root)
    finally:
        os.chdir(before)
        shutil.rmtree(root)


def survives(place: Yard, call: Callable[[], object], *writes: str) -> bool:
    """Call it; whether it went well. Where it did not, nothing has changed; where it did, only what begins so."""
    before = place.everything()
    try:
        call()
    except MobilekitError as error:
        said = str(error)
        assert said
        assert said.isprintable(), ascii(said)
        assert len(said) < 400, said
        assert place.everything() == before
        return False
    after = place.everything()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert all(name.startswith(writes) for name in changed), changed
    return True


# ---------------------------------------------------------------- what there is to damage


@pytest.fixture(scope="module")
def valid(tiny: Path, host_profile: object, tmp_path_factory: pytest.TempPathFactory) -> Valid:
    folder = tmp_path_factory.mktemp("valid")
    net = networks.settled(torch.nn.Sequential(networks.conv_bn(3, 8, stride=2), networks.Head(8)))
    float_network = trace(net, networks.example(), "net")
    int8 = {operator.name: "int8" for operator in float_network.operators if operator.kind in ("conv", "linear")}
    models: dict[str, Path] = {}
    for precision, network in (("fp32", float_network), ("int8", float_network.with_precisions(int8))):
        for name in ("onnx", "tflite"):  # sketches are files as exports are, and come without the converters
            models[f"{name} {precision}"] = folder / f"{precision}.{name}"
            registry.runtime(name).sketch(network, models[f"{name} {precision}"])
    loaded = workload.load(str(tiny))
    network = trace(loaded.module, loaded.example_input, loaded.name)
    return Valid(
        models=models,
        package=Path(packing.pack(models["onnx int8"], folder / "net.mkpack").package).read_bytes(),
        manifest=written(folder / "manifest").parent,
        profile=json.loads(profiles.dump(profiles.load("pixel-4"))),
        plan=json.loads(plan_of(str(tiny), loaded.candidate(network)).model_dump_json()),
        report=json.loads(sample_report().model_dump_json(by_alias=True)),
        result={**json.loads(GOLDEN.read_text(encoding="utf-8")), "model_sha256": SHA256},
        workload=str(tiny),
        candidate=loaded.candidate(network),
    )


def plan_of(spec: str, candidate: Candidate) -> Plan:
    """A plan with an option of every lever that offers one."""
    entry = profiles.load("host").runtimes[0]
    offers: list[Option] = []
    for name in registry.names("transforms"):
        offers += list(registry.transform(name).options(candidate.network, entry))[:1]
    none = Estimate(
        latency_ms=1,
        low_ms=0.5,
        high_ms=2,
        size_bytes=1,
        basis="kernel table",
        runtime="onnx",
        operators=(),
        extrapolated=(),
    )
    return Plan(
        workload=spec, workload_key="k", profile="host", runtime="onnx", device=None, budget=Budget(speedup=2), seed=0,
        train=False, train_seconds=1, target_ms=1, estimate=none, baseline_estimate=none, rejected=(),
        chosen=tuple(ChosenOption(option=o, reason="r", saved_ms=None, damage=None) for o in offers),
    )  # fmt: skip


# ---------------------------------------------------------------- the attacks

Random = random.Random


def profile(place: Yard, rng: Random, v: Valid) -> None:
    path = place.inside / "own.json"
    hostile.put(rng, path, hostile.text(rng, v.profile), place.root)
    survives(place, lambda: profiles.load(path))


def manifests(place: Yard, rng: Random, v: Valid) -> None:
    for file in v.manifest.iterdir():
        shutil.copy(file, place.inside)
    path = place.inside / "manifest.json"
    if rng.random() < 0.8:
        document = json.loads(path.read_text(encoding="utf-8"))
        hostile.put(rng, path, hostile.text(rng, document), place.root)
    else:
        golden = place.inside / "golden.bin"
        hostile.put(rng, golden, hostile.damaged(rng, golden.read_bytes()), place.root)
    survives(place, lambda: manifest.read(place.inside))


def plans(place: Yard, rng: Random, v: Valid) -> None:
    """Everything of `apply` before the first stage, and the options of the plan on the network."""
    path = place.inside / "plan.json"
    document = json.loads(json.dumps(v.plan))
    if rng.random() < 0.7:  # one lever at a time, and wrong in its own part
        document["chosen"] = [rng.choice(document["chosen"])]
        document["chosen"][0]["option"] = json.loads(hostile.twisted(rng, document["chosen"][0]["option"]))
        path.write_text(json.dumps(document), encoding="utf-8")
    else:
        hostile.put(rng, path, hostile.text(rng, document), place.root)
    run: Any = SimpleNamespace(start=lambda _: v.candidate)

    def carried_out() -> None:
        plan = read_plan(path)
        open_job(request_of(plan, v.workload))
        for chosen in plan.chosen:
            registry.transform(chosen.option.transform).predict(v.candidate.network, chosen.option)
        rounds.apply_options(run, v.candidate.network, [c.option for c in plan.chosen], bare=True)

    survives(place, carried_out)


def reports(place: Yard, rng: Random, v: Valid) -> None:
    path = place.inside / "report.json"
    hostile.put(rng, path, hostile.text(rng, v.report), place.root)
    survives(place, lambda: pipeline.rerender(place.inside), "inside/report.")


def results(place: Yard, rng: Random, v: Valid) -> None:
    path, wrong = place.root / "result.json", rng.random()
    path.write_text(json.dumps(v.result), encoding="utf-8")
    report = place.inside / "report.json"
    report.write_text(json.dumps(v.report), encoding="utf-8")
    if wrong < 0.7:
        hostile.put(rng, path, hostile.text(rng, v.result), place.root)
    elif wrong < 0.85:
        hostile.put(rng, report, hostile.text(rng, v.report), place.root)
    else:
        lines = (json.dumps(v.result) + "\n").encode()
        hostile.put(rng, place.inside / "measurements.jsonl", hostile.damaged(rng, lines), place.root)
    survives(place, lambda: pipeline.import_result(path, place.inside), "inside/report.", "inside/measurements.jsonl")


def packages(place: Yard, rng: Random, v: Valid) -> None:
    path = place.root / "net.mkpack"
    content = hostile.damaged(rng, v.package) if rng.random() < 0.3 else hostile.resigned(rng, v.package)
    hostile.put(rng, path, content, place.root)
    out = place.inside / "net.onnx" if rng.random() < 0.5 else place.inside
    survives(place, lambda: packing.unpack(path, out), "inside/")


def archives(place: Yard, rng: Random, _: Valid) -> None:
    content = hostile.archive(rng)
    if rng.random() < 0.5:
        content = hostile.damaged(rng, content)
    survives(place, lambda: from_bytes(content, place.inside / "cell"), "inside/cell")


def opened(place: Yard, rng: Random, v: Valid) -> None:
    """Model files in this process, as the pipeline does with those that it wrote."""
    name = rng.choice(sorted(v.models))
    runtime = registry.runtime(name.split()[0])
    path = damaged_model(place, rng, v.models[name], "net" + runtime.suffix)
    survives(place, lambda: runtime.describe(path))
    if runtime.name == "onnx":  # LiteRT crashes on some files, which only `measured` may hand to it
        survives(place, lambda: runtime.open(path)([np.zeros((1, 3, 16, 16), np.float32)]))
    survives(place, lambda: packing.pack(path, place.inside / "made.mkpack"), "inside/made.mkpack")


def measured(place: Yard, rng: Random, v: Valid) -> None:
    """A folder of model files, some of them sound, in the measuring process."""
    for index in range(FILES_AT_ONCE):
        name = rng.choice(sorted(v.models))
        damaged_model(place, rng, v.models[name], f"{index}{v.models[name].suffix}")
    asked = {path.name for path in place.inside.iterdir()}

    def everything() -> None:
        found = pipeline.measure_files([place.inside], [Host()], pipeline.Timing(runs=3))
        assert asked <= {m.model for m in found.measurements} | {f.subject for f in found.failures}
        for failure in found.failures:
            assert failure.message
            assert failure.remedy
            assert len(failure.message) < 700
            assert "\n" not in failure.message + failure.remedy
            assert "time was over" not in failure.message

    survives(place, everything)


def damaged_model(place: Yard, rng: Random, source: Path, name: str) -> Path:
    target = place.inside / name
    if not source.is_dir():
        hostile.put(rng, target, hostile.model(rng, source), place.root)
        return target
    shutil.copytree(source, target)
    part = rng.choice(sorted(p for p in target.rglob("*") if p.is_file()))
    hostile.put(rng, part, hostile.damaged(rng, part.read_bytes()), place.root)
    return target


def core_ml(place: Yard, rng: Random, v: Valid) -> None:
    """Packages that are read back: nothing here runs them."""
    path = damaged_model(place, rng, v.models["coreml fp32"], "net.mlpackage")
    survives(place, lambda: registry.runtime("coreml").describe(path))
    survives(place, lambda: packing.pack(path, place.inside / "made.mkpack"), "inside/made.mkpack")


Attack = Callable[[Yard, Random, Valid], None]
ATTACKS: dict[str, tuple[Attack, int, int]] = {
    "profile": (profile, 40, 2000),
    "manifest": (manifests, 40, 2000),
    "plan": (plans, 40, 2000),
    "report": (reports, 30, 1000),
    "result": (results, 30, 1000),
    "package": (packages, 40, 2000),
    "archive": (archives, 40, 1500),
    "opened": (opened, 25, 1000),
    "measured": (measured, 4, 60),
}
"""What is called, how often in a hurry, and how often with time."""


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COMPARE", {**bench.COMPARE, "max_seconds": 0.2, "warmup": 1})
    monkeypatch.setattr(os, "fsync", lambda _: None)  # waiting for the disk thousands of times takes most of the time


def storm(name: str, valid: Valid, count: int, attack: Attack) -> None:
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.randoms(use_true_random=False))
    def case(rng: Random) -> None:
        with yard() as place:
            attack(place, rng, valid)
        CASES[name] += FILES_AT_ONCE if name == "measured" else 1

    case()


@pytest.mark.parametrize("name", ATTACKS)
def test_some_hostile_files(name: str, valid: Valid) -> None:
    attack, count, _ = ATTACKS[name]
    storm(name, valid, count, attack)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_many_hostile_files(name: str, valid: Valid) -> None:
    attack, _, count = ATTACKS[name]
    storm(name, valid, count, attack)


@pytest.mark.slow
def test_many_hostile_core_ml_packages(valid: Valid, tmp_path: Path) -> None:
    net = networks.settled(torch.nn.Sequential(networks.conv_bn(3, 8, stride=2), networks.Head(8)))
    (made,) = pipeline.export(net, networks.example(), to=["coreml"], precision="fp32", out=tmp_path)
    storm("core ml", replace(valid, models={"coreml fp32": Path(made.path)}), 300, core_ml)


@pytest.mark.slow
def test_there_were_ten_thousand_cases() -> None:
    if not set(CASES) >= set(ATTACKS):
        pytest.skip("counts what the tests above did")
    print(sum(CASES.values()), dict(CASES))
    assert sum(CASES.values()) >= 10_000
