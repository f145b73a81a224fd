"""Score documents and their samples on disk; imports no torch."""

from pathlib import Path
from typing import Any

import pandas as pd

from espalier.artefacts.store import atomic_file, read_json, write_json
from espalier.errors import UserError

FORMAT = "espalier.scores/1"


def save_scores(path: Path, document: dict[str, Any], samples: pd.DataFrame) -> None:
    """Write `{id}.parquet` with the samples, then `{id}.json`, which alone says that the scores are complete."""
    with atomic_file(path.with_suffix(".parquet")) as temporary:
        samples.to_parquet(temporary, index=False)
    write_json(path, document)


def load_scores(path: Path) -> dict[str, Any]:
    """Return the score document at `path`."""
    return read_json(path, FORMAT)


def load_samples(path: Path) -> pd.DataFrame:
    """Return the samples beside the score document `path`; UserError when they are missing or unreadable."""
    beside = path.with_suffix(".parquet")
    if not beside.exists():
        raise UserError(f"{beside}: no such file. Delete {path.name} and run again.")
    try:
        return pd.read_parquet(beside)
    except (OSError, ValueError) as error:  # pyarrow's own is a ValueError
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{beside}: cannot read it ({first}). Delete {path.name} and run again.") from None
