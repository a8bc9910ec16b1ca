"""How often vertebrae are named correctly in volumes that show only four, and how often wrong names are uncertain.

Run as ``python benchmarks/cropped_views.py STORE RUN [RUN ...]``, with runs that were trained on levels, such as those
of all folds. Each test volume is cropped to four consecutive vertebrae, at every offset. A crop ends halfway to the
next vertebra. Preprocessing uses the whole volume.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from cspine_data import open_cohort
from cspine_train import load_run
from cspine_train.levels.sequence import find_sequence, sequence_name
from cspine_train.metrics.calibration import CERTAIN
from cspine_train.prediction.level_calibration import ValidationVolume

MOST_VERTEBRAE = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--vertebrae", type=int, default=4)
    arguments = parser.parse_args()
    cohort, tally = open_cohort(arguments.store), Counter[tuple[bool, bool]]()
    print("| case | true | named | probability |\n|---|---|---|---|")
    for run in map(load_run, arguments.runs):
        record = run.record
        for case in record.test:
            for sample in ValidationVolume(run, cohort, case).samples(range(MOST_VERTEBRAE), arguments.vertebrae):
                if len(sample.levels) > arguments.vertebrae:
                    continue
                found = find_sequence(sample.evidence, record.levels, sample.distances_mm, record.level_temperature)
                tally[found.levels == sample.levels, found.probability < CERTAIN] += 1
                names = sequence_name(sample.levels), sequence_name(found.levels)
                print(f"| {case} | {' | '.join(names)} | {found.probability:.2f} |", flush=True)
    correct, wrong = (tally[one, True] + tally[one, False] for one in (True, False))
    print(
        f"{correct} of {correct + wrong} crops are named correctly; {tally[False, True]} of {wrong} wrong ones and "
        f"{tally[True, True]} of {correct} correct ones are uncertain"
    )


if __name__ == "__main__":
    main()
