"""Reading `log.txt` and `progress.txt`, also while a run appends to them.

log.txt       step stream value      stream: train, val, hella
progress.txt  step tokens seconds    totals at the end of the step, without evaluations
"""

from pathlib import Path


def read_fields(path: Path) -> list[list[str]]:
    """The three fields of each complete line; [] if there is no such file.

    A last line without its newline is still being written, or a kill has cut it: it is left out.
    Lines with another number of fields are left out as well. Raises OSError.
    """
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.split() for line in file if line.endswith("\n")]
    return [fields for fields in lines if len(fields) == 3]
