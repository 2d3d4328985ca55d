"""Write the files that are committed: the items of the tasks and the texts for calibration and perplexity.

python -m experiments.reference.write
"""

import json
from itertools import islice
from pathlib import Path

from .items import all_rows
from .world import documents

HERE = Path(__file__).parent
TEXTS = {"calibration": 1800, "recovery": 4500, "heldout": 450}
"""Documents of each text, about 1 MB, 2.6 MB and 250 KB; their seeds are no training seed."""


def files() -> dict[Path, str]:
    """Content of every committed file, by its path below this folder."""
    written = {
        Path("tasks/data") / f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows)
        for name, rows in all_rows().items()
    }
    for name, count in TEXTS.items():
        written[Path("data") / f"{name}.txt"] = "".join(f"{text}\n" for text in islice(documents(name), count))
    return written


if __name__ == "__main__":
    for path, content in files().items():
        (HERE / path).parent.mkdir(exist_ok=True, parents=True)
        (HERE / path).write_text(content)
        print(f"{path}: {len(content.encode()) / 1000:.0f} kB")
