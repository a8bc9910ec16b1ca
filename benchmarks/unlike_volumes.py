"""How often `predict` warns of unlike volumes: false alarms in a cohort, detections of other cohorts and disturbances.

Run as ``python benchmarks/unlike_volumes.py STORE COHORT [STORE COHORT]``: each store beside the folder that it was
prepared from. False alarms are on patients left out of their cohort's ranges, also for ranges of a few random patients.
Disturbances are those of `robustness`, each of a few patients: preparing a disturbed volume takes seconds.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from robustness import DISTURBANCES, SEED, disturbed_volume

from cspine_data import CaseRecord, find_cases, open_cohort, preprocess_volume, read_volume
from cspine_train.run.cohort_range import CohortLooks, differences, looks_of, looks_of_record

REPEATS = 200


def alarm_rate(records: dict[str, CaseRecord], patients: int) -> float:
    """Return the share of warnings about other patients, over random training patients."""
    rng, alarms = random.Random(SEED), []
    for _ in range(REPEATS):
        trained = set(rng.sample(sorted(records), patients))
        looks = CohortLooks.of(records[case] for case in trained)
        alarms += [
            bool(differences(looks, looks_of_record(one))) for case, one in records.items() if case not in trained
        ]
    return sum(alarms) / len(alarms)


def about_intensities(lines: Iterable[str]) -> bool:
    return any("intensities" in line for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cohorts", nargs="+", metavar="STORE COHORT")
    parser.add_argument("--patients", type=int, default=3, help="Patients of each disturbance; 0: no disturbances.")
    arguments = parser.parse_args()
    pairs = list(zip(arguments.cohorts[::2], map(Path, arguments.cohorts[1::2]), strict=True))
    of_all = {}
    for store, folder in pairs:
        cohort = open_cohort(store)
        of_all[folder.name] = {case: cohort.record(case, "n4") for case in cohort.cases}
    for name, records in of_all.items():
        for patients in (2, 4, 8, len(records) - 1):
            print(
                f"{name}: warnings with {patients} training patients: {alarm_rate(records, patients):.3f}", flush=True
            )
        looks = CohortLooks.of(records.values())
        for other in of_all.keys() - {name}:
            lines = [differences(looks, looks_of_record(one)) for one in of_all[other].values()]
            both = sum(map(bool, lines)), sum(map(about_intensities, lines))
            print(f"{name}: of {len(lines)} volumes of {other}, {both[0]} give a warning, {both[1]} by intensities")
    for _, folder in pairs if arguments.patients else ():
        records, found = of_all[folder.name], Counter[str]()
        cases = sorted(find_cases(folder).cases, key=lambda case: case.id)
        for number, (name, change) in enumerate(list(DISTURBANCES.items())[1:]):
            for case in (cases[(number + 5 * step) % len(cases)] for step in range(arguments.patients)):
                volume = disturbed_volume(read_volume(case.volume), change)
                looks = CohortLooks.of(one for other, one in records.items() if other != case.id)
                prepared = preprocess_volume(volume, records[case.id].preprocessing)
                found[name] += bool(differences(looks, looks_of(prepared)))
            print(f"{folder.name}: {name}: {found[name]} of {arguments.patients}", flush=True)


if __name__ == "__main__":
    main()
