"""What a workload file may lack or get wrong, and what is read from a good one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mobilekit import exportable, workload
from mobilekit.errors import BadInputError
from mobilekit.types import Preprocessing

GOOD = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def example_input():
    return torch.zeros(1, 1, 6, 6)
"""
CALIBRATED = GOOD + "\ndef calibration_data():\n    return [torch.ones(3, 1, 6, 6), torch.zeros(2, 1, 6, 6)]\n"


def write(folder: Path, text: str, name: str = "net.py") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def changed(*lines: str) -> str:
    return CALIBRATED + "\n" + "\n".join(lines) + "\n"


# ---------------------------------------------------------------- good ones


def test_a_file(tmp_path: Path) -> None:
    spec = write(tmp_path, CALIBRATED)
    found = workload.load(spec)
    assert (found.spec, found.name, found.trusted, found.labelled) == (spec, "net", True, False)
    assert not found.module.training
    assert [len(batch) for batch in found.calibration] == [3, 2]
    assert found.accuracy_kind == workload.AGREEMENT_HELD_BACK
    assert found.train_data is found.evaluate is found.loss is found.preprocessing is found.labels is None
    assert "unlabelled" in found.data


def test_everything_it_may_offer(tmp_path: Path) -> None:
    more = [
        "def train_data(): return [(torch.zeros(2, 1, 6, 6), torch.zeros(2).long())]",
        "def evaluate(model): return 0.5",
        "def loss(output, target): return output.sum()",
        "def preprocessing(): return {'mean': [0.5]}",
        "def labels(): return ['a', 'b', 'c', 'd']",
    ]
    found = workload.load(write(tmp_path, changed(*more)))
    assert found.train_data is not None
    assert found.labelled
    assert found.evaluate is not None
    assert found.loss is not None
    assert found.preprocessing == Preprocessing(mean=(0.5,))
    assert found.labels == ("a", "b", "c", "d")
    assert found.accuracy_kind == "the workload's evaluate()"


def test_inputs_of_the_training_data_calibrate_where_there_is_nothing_else(tmp_path: Path) -> None:
    more = "def train_data():\n    while True:\n        yield torch.ones(100, 1, 6, 6), torch.zeros(100)\n"
    found = workload.load(write(tmp_path, GOOD + more))
    assert found.trusted
    assert sum(map(len, found.calibration)) == 600  # the batch that passes 512 is the last


def test_a_package_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets").mkdir()
    write(tmp_path / "my_nets", "", "__init__.py")
    write(tmp_path / "my_nets", CALIBRATED, "small.py")
    monkeypatch.syspath_prepend(tmp_path)
    found = workload.load("my_nets.small")
    assert (found.name, found.trusted) == ("small", True)


def test_a_package_in_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets_here").mkdir()
    write(tmp_path / "nets_here", CALIBRATED, "__init__.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert workload.load("nets_here").name == "nets_here"


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    write(tmp_path, "WIDTH = 4", "beside_the_workload.py")
    assert workload.load(write(tmp_path, "from beside_the_workload import WIDTH\n" + GOOD)).module is not None


def test_without_any_data_it_is_marked_untrusted(tmp_path: Path) -> None:
    spec = write(tmp_path, GOOD)
    found, again, other = workload.load(spec, 1), workload.load(spec, 1), workload.load(spec, 2)
    assert not found.trusted
    assert found.data == workload.NO_DATA
    assert found.calibration[0].shape == (32, 1, 6, 6)
    assert torch.equal(found.calibration[0], again.calibration[0])
    assert not torch.equal(found.calibration[0], other.calibration[0])


def test_the_key_follows_code_and_weights(tmp_path: Path) -> None:
    key = workload.load(write(tmp_path, CALIBRATED)).key
    assert workload.load(write(tmp_path, CALIBRATED, "other.py")).key == key
    assert workload.load(write(tmp_path, CALIBRATED + "# more\n", "code.py")).key != key
    (tmp_path / "seed").write_text("0")
    reading = CALIBRATED.replace("manual_seed(0)", f"manual_seed(len(Path({str(tmp_path / 'seed')!r}).read_text()))")
    first = workload.load(write(tmp_path, "from pathlib import Path\n" + reading, "reads.py")).key
    (tmp_path / "seed").write_text("more")
    assert workload.load(str(tmp_path / "reads.py")).key != first


def test_calibration_arrays_are_cut_into_batches(tmp_path: Path) -> None:
    more = "def calibration_data(): return [torch.full((50, 1, 6, 6), float(i)) for i in range(3)]"
    found = workload.load(write(tmp_path, changed(more)))
    arrays = found.calibration_arrays()
    assert [len(a) for a in arrays] == [32, 32, 32, 17]  # a quarter is held back
    assert arrays[0].dtype == np.float32
    assert [len(a) for a in found.calibration_arrays(40)] == [32, 8]


# ---------------------------------------------------------------- bad ones

BAD = {
    "no model": (GOOD.replace("def model", "def net"), r"does not define model\(\)$"),
    "no example": (GOOD.replace("def example_input", "def example"), r"does not define example_input\(\)$"),
    "model raises": (
        changed("def model(): raise ValueError('no such width')"),
        r"model\(\) in .* fails: no such width$",
    ),
    "model raises nothing": (changed("def model(): raise AssertionError"), r"model\(\) in .* fails: AssertionError$"),
    "model raises a key": (changed("def model(): return {}['fc']"), r"model\(\) in .* fails: KeyError 'fc'$"),
    "model needs a package": (
        changed("def model():", "    import no_such_package_x"),
        r"model\(\) in .* fails: No module named 'no_such_package_x'$",
    ),
    "model needs an argument": (changed("def model(width): pass"), r"model\(\) in .* fails: .*width"),
    "not a module": (changed("def model(): return lambda x: x"), r"must return a torch.nn.Module, not function$"),
    "not a function": (changed("model = nn.Sequential()"), r"model\(\) in .* fails: "),
    "state dict": (changed("def model(): return nn.Linear(1, 1).state_dict()"), "not OrderedDict$"),
    "dict output": (
        changed("class Net(nn.Module):", "    def forward(self, x): return {'out': x}", "model = Net"),
        "returns dict: it must return one tensor",
    ),
    "tuple output": (
        changed("class Net(nn.Module):", "    def forward(self, x): return x, x", "model = Net"),
        "returns tuple: it must return one tensor",
    ),
    "double": (
        changed("def model(): return nn.Conv2d(1, 4, 3).double()"),
        "has torch.float64 weights: give it in float32",
    ),
    "half": (changed("def model(): return nn.Conv2d(1, 4, 3).half()"), "has torch.float16 weights"),
    "example of another shape": (
        changed("def example_input(): return torch.zeros(1, 3, 6, 6)"),
        "fails on its example",
    ),
    "example without batch": (
        changed("def example_input(): return torch.zeros(1, 6, 6)"),
        r"must be a float32 tensor \(1,",
    ),
    "example of two": (changed("def example_input(): return torch.zeros(2, 1, 6, 6)"), "must have batch size 1, not 2"),
    "example of bytes": (
        changed("def example_input(): return torch.zeros(1, 1, 6, 6, dtype=torch.uint8)"),
        r"must be a float32 tensor \(1, C, H, W\), not \(1, 1, 6, 6\) torch.uint8",
    ),
    "example is an array": (changed("import numpy", "def example_input(): return numpy.zeros(3)"), "not ndarray$"),
    "nan": (
        changed("class Net(nn.Module):", "    def forward(self, x): return x / 0", "model = Net"),
        "returns values that are not finite",
    ),
    "unreadable weights": (
        changed("def model(): return torch.load(__file__)"),
        r"model\(\) in .* fails: \S+",
    ),
    "missing weights": (changed("def model(): return torch.load('/no/weights.pt')"), "No such file.*weights.pt"),
    "weights of another network": (
        changed("def model():", "    net = nn.Conv2d(1, 4, 3)", "    net.load_state_dict({'a': torch.ones(1)})"),
        r"fails: Error\(s\) in loading state_dict for Conv2d: Missing key",
    ),
    "missing package": (
        "import no_such_package_y\n" + GOOD,
        "needs the package 'no_such_package_y', which is missing$",
    ),
    "syntax": ("def model(:\n", "cannot be imported: "),
    "raises on import": ("raise RuntimeError('no gpu')\n", "cannot be imported: no gpu$"),
    "exits on import": ("import sys\nsys.exit(0)\n", "ends the program when imported"),
    "calibration of another shape": (
        changed("def calibration_data(): return [torch.zeros(2, 3, 6, 6)]"),
        r"calibration_data\(\) in .* must give input tensors \(N, 1, 6, 6\), not \(2, 3, 6, 6\)$",
    ),
    "calibration of pairs": (
        changed("def calibration_data(): return [(torch.zeros(2, 1, 6, 6), 1)]"),
        r"calibration_data\(\) in .* must give input tensors",
    ),
    "calibration is one tensor": (
        changed("def calibration_data(): return torch.zeros(8, 1, 6, 6)"),
        r"calibration_data\(\) in .* must give input tensors",
    ),
    "empty calibration": (changed("def calibration_data(): return []"), r"calibration_data\(\) in .* gives no inputs$"),
    "calibration of empty batches": (
        changed("def calibration_data(): return [torch.zeros(0, 1, 6, 6)]"),
        "gives no inputs$",
    ),
    "calibration of nothing": (changed("def calibration_data(): pass"), r"calibration_data\(\) in .* fails: "),
    "calibration raises": (changed("def calibration_data(): return open('/no/images')"), "fails: .*No such file"),
    "calibration raises later": (
        changed("def calibration_data():", "    yield torch.ones(1, 1, 6, 6)", "    raise OSError('no more')"),
        r"calibration_data\(\) in .* fails: no more$",
    ),
    "calibration with nan": (
        changed("def calibration_data(): return [torch.full((2, 1, 6, 6), float('nan'))]"),
        r"calibration_data\(\) in .* values that are not finite",
    ),
    "training without labels": (
        GOOD + "def train_data(): return [torch.zeros(4, 1, 6, 6)]\n",
        r"train_data\(\) in .* must give \(input, target\) pairs",
    ),
    "training of another shape": (
        GOOD + "def train_data(): return [(torch.zeros(4, 3, 6, 6), torch.zeros(4))]\n",
        r"train_data\(\) in .* must give .*\(N, 1, 6, 6\)",
    ),
    "empty training": (GOOD + "def train_data(): return []\n", r"train_data\(\) in .* gives no inputs$"),
    "preprocessing that is no JSON": (
        changed("def preprocessing(): return {'mean': torch.zeros(3)}"),
        r"preprocessing\(\) in .* must return a dict of plain numbers, strings and lists$",
    ),
    "preprocessing with a wrong value": (
        changed("def preprocessing(): return {'std': [0.0]}"),
        r"preprocessing\(\) in .* returns is wrong at std\[0\]: input should be greater than 0, got 0.0",
    ),
    "preprocessing that contradicts itself": (
        changed("def preprocessing(): return {'channel_order': 'BGR', 'mean': [0.5]}"),
        "the numbers of channels contradict each other: channel_order 3, mean 1$",
    ),
    "preprocessing that is no dict": (changed("def preprocessing(): return [1]"), "must return a dict"),
    "labels that are none": (changed("def labels(): return 10"), r"labels\(\) in .* must return a list of strings$"),
    "labels in one string": (changed("def labels(): return 'abc'"), r"labels\(\) in .* must return a list of strings$"),
    "labels of numbers": (changed("def labels(): return [1, 2]"), r"labels\(\) in .* must return a list of strings$"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(tmp_path: Path, case: str) -> None:
    text, sentence = BAD[case]
    spec = write(tmp_path, text)
    with pytest.raises(BadInputError, match=sentence) as caught:
        workload.load(spec)
    said = str(caught.value)
    assert "\n" not in said
    assert "net.py" in said
    assert len(said) < 400


@pytest.mark.parametrize(
    "spec", ["no_such_file.py", "no.such.module", "torch.no_such", "", "a b", "../x", "a/b", ".", "/"]
)
def test_what_does_not_exist(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError, match=r"^the workload '.*' does not exist: give a Python file or an importable"):
        workload.load(spec)


def test_a_folder_called_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "net.py").mkdir()
    with pytest.raises(BadInputError, match="does not exist"):
        workload.load(str(tmp_path / "net.py"))


def test_a_file_that_is_no_python(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"\x80\x02}q\x00")
    with pytest.raises(BadInputError, match="it is not a Python file"):
        workload.load(str(tmp_path / "net.pt"))


# ---------------------------------------------------------------- a module at hand


def test_a_module_at_hand_is_not_changed() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = exportable.of_module(module, torch.randn(1, 1, 6, 6), [], "net")
    assert module.training
    assert not found.module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not found.trusted


def test_calibration_of_a_module_at_hand() -> None:
    module, batches = nn.Conv2d(1, 4, 3), [np.ones((3, 1, 6, 6), np.float64)]
    found = exportable.of_module(module, torch.zeros(1, 1, 6, 6), batches, "net")
    assert found.trusted
    assert found.calibration[0][0].dtype == torch.float32
    with pytest.raises(BadInputError, match=r"calibration must give input tensors \(N, 1, 6, 6\)"):
        exportable.of_module(module, torch.zeros(1, 1, 6, 6), [np.ones((3, 1, 7, 7))], "net")


def test_a_network_of_one_output_is_judged_by_closeness(tmp_path: Path) -> None:
    from mobilekit.evaluate import accuracy

    one = "def model(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 1))"
    data = "def calibration_data(): return [torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))]"
    found = workload.load(write(tmp_path, changed(f"{one}\n{data}")))
    assert found.accuracy_kind.startswith("closeness")
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 1))
    assert accuracy(found, found.module) == 1.0
    assert accuracy(found, other) < 0.9
