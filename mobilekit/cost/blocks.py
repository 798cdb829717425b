"""Fits a cost table to a published table of block latencies of one device."""

from __future__ import annotations

import csv
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mobilekit.cost import fit
from mobilekit.cost.block_keys import operators
from mobilekit.cost.features import PICTURE, basis, features
from mobilekit.cost.tabular import opened
from mobilekit.errors import BadInputError
from mobilekit.stats import median
from mobilekit.types import CostTable, OperatorShape, Provenance

COLUMNS = ("source", "device", "processor", "runtime", "precision", "threads", "block_key", "latency_ms")
"""Columns that a table must have; further ones are not read."""
SETTING = {"processor": "cpu", "runtime": "tflite", "precision": "fp32"}
FEWEST = 20
"""Blocks that a table is fitted to at least: four in each fold."""
SEED = 0
"""Order of the blocks before they take turns in the folds: tables are sorted, and a fold must not be one size."""
METHOD = "five-fold over published blocks"
_PLAIN = OperatorShape(kind="conv", in_channels=16, out_channels=16)
WIDE = frozenset(features(_PLAIN, "fp32")) | frozenset(features(_PLAIN.model_copy(update={"kind": "avg_pool"}), "fp32"))
"""Every feature there is: many blocks tell apart what the few minutes of timing on a host do not."""
MANY = 300
"""Blocks from which every feature is used; fewer take those of a timed host. On random parts of once-for-all's table
the two are equally good at 200 blocks."""

LEAST = 0.02
"""Share of a row's largest operator from which a feature is fitted. Channels that fill no block, say, occur only in the
gates of some tables, on maps of one pixel: what they cost there is noise, and would be dear on a large map."""


class Block(NamedTuple):
    """A timed block: its first row in the file and the key there, its operators, and how long they took."""

    row: int
    key: str
    operators: tuple[OperatorShape, ...]
    repeats_us: tuple[float, ...]
    """Microseconds, one figure for each row with these operators."""

    @property
    def us(self) -> float:
        """The median of the repeats, in microseconds."""
        return median(self.repeats_us)


class Fitted(NamedTuple):
    """A cost table, and predicted over measured time of each block by a fit to the other folds; shape (blocks)."""

    table: CostTable
    left_out: np.ndarray


def read(path: Path, device: str, source: str = "") -> list[Block]:
    """The blocks of one device and one source in a table of blocks (CSV, or CSV in gzip), in the order of the file.

    Rows with the same operators are repeats of one block: as two, one would be judged by having seen the other.

    The columns are `COLUMNS`; `threads` is empty or begins with 1. Raises BadInputError for a file that is no such
    table, an unknown device, a device with several sources where `source` names none, and, with the row's number
    (the line with the names is row 1), for a latency that is not a positive number, a key that is no known block, or
    a setting other than float32 on one thread of the CPU in TFLite.
    """
    rows = [(number, row) for number, row in _rows(path) if row["device"] == device]
    if not rows:
        known = ", ".join(sorted({row["device"] for _, row in _rows(path)}))
        raise BadInputError(f"{path} has no blocks of {device!r}; it has: {known or 'no rows'}")
    sources = sorted({row["source"] for _, row in rows})
    if source not in sources and (source or len(sources) > 1):
        raise BadInputError(f"{path} has blocks of {device!r} from {', '.join(sources)}; choose one of these sources")
    blocks: dict[tuple[OperatorShape, ...], Block] = {}
    for number, row in rows:
        if source in ("", row["source"]):
            found = _block(path, number, row)
            old = blocks.get(found.operators)
            repeats = (*old.repeats_us, *found.repeats_us) if old else found.repeats_us
            blocks[found.operators] = (old or found)._replace(repeats_us=repeats)
    return list(blocks.values())


def setups(path: Path) -> list[tuple[str, str]]:
    """Device and source of every set-up in a table, in alphabetical order; errors as in `read`."""
    return sorted({(row["device"], row["source"]) for _, row in _rows(path)})


def table(blocks: Sequence[Block], provenance: Sequence[Provenance] = ()) -> CostTable:
    """The cost table of these blocks (TFLite, fp32, one thread) with the errors of `fitted` as its validation."""
    return fitted(blocks, provenance).table


def fitted(blocks: Sequence[Block], provenance: Sequence[Provenance] = ()) -> Fitted:
    """Prices of operators such that the operators of each block add up to its time, and a constant for each run.

    Non-negative least squares on the relative error. Families of blocks (`family`) weigh as the square root of their
    number, so that thousands of one kind do not rule the few of another. Validated five-fold, blocks in a random order.
    Raises BadInputError for fewer than `FEWEST` blocks.
    """
    if len(blocks) < FEWEST:
        raise BadInputError(f"{len(blocks)} blocks are too few to fit prices to: {FEWEST} are needed")
    order = random.Random(SEED).sample(range(len(blocks)), len(blocks))  # noqa: S311 -- nothing secret
    observations = _observations([blocks[number] for number in order])
    seen = _seen(observations)
    design = fit.Design.of(observations, chosen=lambda row: seen[row] & WIDE if len(blocks) >= MANY else basis(row))
    ratios = fit.left_out(design, fit.folds(observations))
    coefficients = dict(zip(design.terms, fit.solve(design), strict=True))
    made = fit.assembled(("tflite", "fp32", 1), observations, coefficients, ratios, METHOD)
    left_out = np.empty(len(blocks))
    left_out[order] = ratios
    return Fitted(made.model_copy(update={"provenance": tuple(provenance)}), left_out)


def family(key: str) -> str:
    """What kind of block a key names.

    >>> family("transds_16_16_48_2_4"), family("expanded_conv-input:7x7x192")
    ('transds', 'expanded')
    """
    return re.split(r"[_\-\d]", key, maxsplit=1)[0]


def _observations(blocks: Sequence[Block]) -> list[fit.Observation]:
    counts = Counter(family(block.key) for block in blocks)
    # Scaled so that the weights are 1 on average and the ridge keeps its meaning.
    scale = len(blocks) / sum(math.sqrt(count) for count in counts.values())
    found = [
        fit.Observation.of(block.operators, "fp32", block.us)._replace(
            weight=scale / math.sqrt(counts[family(block.key)])
        )
        for block in blocks
    ]
    dense = [part for observation in found for part in observation.parts if part.row == "dense"]
    return found if any(part.channels.inputs > PICTURE for part in dense) else [_without_dense(o) for o in found]


def _without_dense(observation: fit.Observation) -> fit.Observation:
    """First convolutions as pointwise ones, which runtimes compute by the same matrix product.

    Their three input channels say nothing of a MAC's price in another dense convolution: a row of their own would make
    those many times too cheap. Without one they are priced as pointwise too, and told to be extrapolated.
    """
    parts = (part._replace(row="pointwise") if part.row == "dense" else part for part in observation.parts)
    return observation._replace(parts=tuple(parts))


def _seen(observations: Sequence[fit.Observation]) -> dict[str, frozenset[str]]:
    """Row of the table -> the features of which some operator has enough to tell their price."""
    largest: dict[str, dict[str, float]] = defaultdict(dict)
    for part, precision in {(part, o.precision) for o in observations for part in o.parts}:
        own = largest[part.row]
        for feature, amount in fit.amounts(part, precision):
            own[feature] = max(amount, own.get(feature, 0.0))
    written = max(own.get("out_bytes", 0.0) for own in largest.values())
    for row, own in largest.items():
        # An activation that is only fused into gates cannot be told from them, and costs next to nothing.
        if "+" in row and own.get("out_bytes", 0.0) < LEAST * written:
            own.clear()
    return {row: frozenset(f for f in own if own[f] >= LEAST * _most(f, own)) for row, own in largest.items()}


def _most(feature: str, own: Mapping[str, float]) -> float:
    """The most that a row's operators have of what the feature is a part of: bytes, MACs or pixels; else 0."""
    for word, whole in (
        ("bytes", ("in_bytes", "out_bytes", "weight_bytes")),
        ("macs", ("macs",)),
        ("pixels", ("pixels",)),
    ):
        if word in feature:
            return max(own.get(name, 0.0) for name in whole)
    return 0.0


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Every row with its number in the file; the line with the names is row 1."""
    with opened(path, "table of blocks") as file:
        reader = csv.DictReader(file, restkey="", restval="", strict=True)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise BadInputError(f"{path} is no table of blocks: it has no column {', '.join(missing)}")
        for row in reader:
            yield reader.line_num, row


def _block(path: Path, number: int, row: Mapping[str, str]) -> Block:
    where = f"{path}, row {number}"
    for name, only in SETTING.items():
        if row[name] != only:
            raise BadInputError(f"{where}: {name} is {row[name]!r}, and only {only!r} can be fitted")
    if row["threads"].split(" ")[0] not in ("", "1"):
        raise BadInputError(f"{where}: threads is {row['threads']!r}, and only 1 can be fitted")
    try:
        latency_ms = float(row["latency_ms"])
    except ValueError:
        latency_ms = math.nan
    if not (math.isfinite(latency_ms) and latency_ms > 0):
        raise BadInputError(f"{where}: latency_ms is {row['latency_ms']!r}, not a positive number of milliseconds")
    try:
        return Block(number, row["block_key"], operators(row["block_key"]), (latency_ms * 1e3,))
    except ValueError as error:
        raise BadInputError(f"{where}: {error}") from error
