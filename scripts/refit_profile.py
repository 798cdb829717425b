"""Fits a measured profile's tables again, from the raw samples beside it, with the present features.

.venv/bin/python scripts/refit_profile.py PROFILE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mobilekit import profiles
from mobilekit.cost.measure import Sample
from mobilekit.cost.tables import fitted
from mobilekit.files import appearing


def main(path: Path) -> None:
    """Replace the profile's tables; everything else stays."""
    profile = profiles.load(path)
    lines = path.with_suffix(".samples.jsonl").read_text(encoding="utf-8").splitlines()
    fusions = {(table.runtime, table.precision): table.fusions for table in profile.tables}
    tables = tuple(fitted([Sample.of_record(json.loads(line)) for line in lines], fusions))
    errors = [table.validation.median_error for table in tables if table.validation is not None]
    changed = profile.model_copy(update={"tables": tables, "validation_error": sum(errors) / len(errors)})
    with appearing(path) as draft:
        draft.write_text(profiles.dump(changed), encoding="utf-8")
    for table in tables:
        error = "not checked" if table.validation is None else f"{table.validation.median_error:.1%}"
        print(f"{table.title}: left-out median error {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
