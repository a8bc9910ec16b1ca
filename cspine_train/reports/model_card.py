"""What a trained model is, in a page for people who did not train it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cspine_data import Preprocessing
from cspine_train.metrics.overlap import MEASURES
from cspine_train.metrics.statistics import mean_interval, too_few
from cspine_train.run.evaluations import mean_over_patients, recorded_evaluations
from cspine_train.run.folder import CARD_NAME, METRICS_NAME, RECORD_NAME, write_text
from cspine_train.run.planes import PLANES
from cspine_train.run.record import RunRecord

_MARKS = re.compile(r"([\\`*_\[\]<>|~$&])")
# The library's name on the hub has hyphens.
_HEAD = """---
library_name: segmentation-models-pytorch
pipeline_tag: image-segmentation
tags:
- segmentation-models-pytorch
- image-segmentation
- medical-imaging
- mri
- spine
- cspine
---
"""
_USE = """On the command line, with `cspine` and its `train` extra installed; RUN is this folder:

```sh
cspine-train predict volume.nrrd --run RUN -o mask.nrrd
```

In Python:

```python
from cspine_data import read_volume, write_volume
from cspine_train import load_run

run = load_run("RUN")
mask = run.predict(read_volume("volume.nrrd"))  # on the volume's own grid
write_volume("mask.nrrd", mask)
```

The network alone, which wants slices prepared as above: `segmentation_models_pytorch.from_pretrained("RUN/model")`.
Its weights are safetensors; nothing that prediction reads is a pickle.
"""


def write_card(run: Path, record: RunRecord) -> Path:
    """Write a run's `MODEL_CARD.md`: what it is for, what it saw, how good it is, and what that does not say.

    Cases are counted, not named. Scores are those of the evaluations in the run folder that are of what the run
    keeps.

    Parameters
    ----------
    run : Path
        The run folder.
    record : RunRecord
        Its record.
    """
    sections = (
        ("What it is", _what(record)),
        ("Intended use", _intended()),
        ("Data", _data(record)),
        ("Training", _training(record)),
        ("Results", _results(run, record)),
        ("How to use it", _USE),
        ("Limits", _limits(record)),
        ("Versions and digests", _versions(record)),
    )
    settings = record.settings
    title = f"# Vertebrae in MRI: {escaped(settings.model)}, {escaped(settings.encoder)}, {_planes(record)} slices\n"
    text = "\n".join([_HEAD + title, *(f"## {name}\n\n{body.strip()}\n" for name, body in sections)])
    write_text(run / CARD_NAME, text)
    return run / CARD_NAME


def escaped(text: str) -> str:
    """Return a text as Markdown that shows it as it is, in one line: names and notes come from files."""
    return _MARKS.sub(r"\\\1", "".join(letter for letter in " ".join(text.split()) if letter.isprintable()))


def _patients(count: int) -> str:
    return f"{count} patient" if count == 1 else f"{count} patients"


def _marked(record: RunRecord) -> str:
    epoch = record.settings.schedule == "plateau"
    if len(record.label_values) > 1:
        told, chosen = "each voxel has its likeliest label", ["epoch"] if epoch else []
    else:
        told = f"voxels of a probability above {record.threshold:g} are marked"
        chosen = ["threshold", *(["epoch"] if epoch else [])]
    if not chosen:
        return told
    were = "were" if len(chosen) > 1 else "was"
    return f"{told}; {' and '.join(chosen)} {were} chosen on the same patients, so the figure flatters a little"


def _kept(record: RunRecord) -> str:
    most, steps = record.kept_components, []
    if most is not None:
        which = "largest connected component alone" if most == 1 else f"{most} largest connected components alone"
        steps.append(f"of each prediction the {which}")
    if record.filled_holes:
        steps.append("its holes filled")
    return f", {', '.join(steps)}, as was chosen on the validation patients" if steps else ""


def _planes(record: RunRecord) -> str:
    return _listed([PLANES[axis] for axis in record.settings.axes])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _what(record: RunRecord) -> str:
    settings = record.settings
    neighbours = f" with {settings.context} neighbours on each side" if settings.context else ""
    pixels = f"resampled to pixels of {settings.pixel_mm:g} mm" if settings.pixel_mm else "at their own pixel size"
    averaged = " Probabilities are averaged over the planes." if len(settings.axes) > 1 else ""
    labels = ", ".join(f"{value} is {escaped(meaning)}" for value, meaning in record.label_meaning.items())
    return (
        f"A 2-D segmentation network, {escaped(settings.model)} with encoder {escaped(settings.encoder)}, that marks "
        f"vertebrae in MRI of the spine. It sees {_planes(record)} slices{neighbours}, {pixels}, one after the other; "
        f"the slices' masks make the volume's.{averaged} In what it writes, {labels}."
    )


def _intended() -> str:
    return (
        "Research on spine MRI. **This is not a medical device**: it has been cleared for no use on patients by "
        "anyone, and must not be used to diagnose or to plan treatment. Somebody who can read the images has to look "
        "at what it marks."
    )


def _data(record: RunRecord) -> str:
    counts = (
        "| part | patients |\n|---|---|\n"
        f"| training | {len(record.train)} |\n"
        f"| validation | {len(record.validation)} |\n"
        f"| test | {len(record.test)} |"
    )
    # In quotes, so that a note cannot begin as a heading or a list does.
    notes = "".join(f'- "{escaped(note)}"\n' for note in record.notes)
    told = f"What the data are, in the words that came with them:\n\n{notes}\n" if notes else ""
    return (
        f"{counts}\n\nPatients are split before slices are cut. Which they are is in `{RECORD_NAME}`.\n\n{told}"
        f"Preparation, the same for every volume to predict: {_preparation(record.preprocessing)}. "
        "None of it needs a label map."
    )


def _preparation(preprocessing: Preprocessing) -> str:
    steps = ["turned to anatomical order"]
    if preprocessing.bias is None:
        steps.append("bias field left as it is")
    else:
        steps.append("bias field corrected with N4")
    if preprocessing.spacing_mm:
        steps.append(f"resampled to {' x '.join(f'{mm:g}' for mm in preprocessing.spacing_mm)} mm")
    steps.append(
        {
            "zscore": "intensities brought to mean 0 and deviation 1 over the tissue",
            "percentile": "intensities scaled by percentiles of the tissue",
            "nyul": "intensities matched to the cohort's landmarks (Nyul)",
        }[preprocessing.normalisation]
    )
    return ", ".join(steps) + f" ({escaped(preprocessing.description)}; every parameter is in `{RECORD_NAME}`)"


def _training(record: RunRecord) -> str:
    settings = record.settings
    fold = f", fold {settings.fold} of {settings.folds} tests" if settings.folds else ""
    start = escaped(record.caveats()[0])
    return (
        f"{start[0].upper()}{start[1:]}. At most {settings.epochs} epochs of batches of {settings.batch_size} slices, "
        f"largest learning rate {settings.learning_rate:g}, schedule {settings.schedule}, seed {settings.seed}{fold}. "
        f"What else was asked is in `{RECORD_NAME}`, every epoch in `{METRICS_NAME}` and `curves.png`."
    )


def _results(run: Path, record: RunRecord) -> str:
    told, several = [], len(record.label_values) > 1
    if record.kept_epoch is not None:
        dice = f"mean Dice{' by label' if several else ''} {record.kept_dice:.4f}"
        told.append(
            f"Validation, at the network's pixel size: {dice} over {_patients(len(record.validation))}, after epoch "
            f"{record.kept_epoch + 1}, whose weights these are, where {_marked(record)}."
        )
    if not record.finished:
        told.append("Training had not ended when this was written.")
    scores = dict(_scores(run, record))
    if scores:
        brackets = "; in brackets the 95 % confidence interval of the mean (Student's t)"
        shown = brackets if any(too_few(len(rows)) is None for rows in scores.values()) else ""
        told.append(f"Whole volumes, on the grid of their files, patient by patient{_kept(record)}{shown}:")
        told.append(_table({part: [row["dice"] for row in rows] for part, rows in scores.items()}, "vertebra or not"))
        if record.label_values:
            told.append(
                _table({part: [row["label_dice"] for row in rows] for part, rows in scores.items()}, "by label")
            )
        told.append(_measures(scores))
    told += [f"{few}." for part, rows in scores.items() if (few := too_few(len(rows), part))]
    if "test" not in scores:
        told.append("Test patients: **not evaluated yet** (`cspine-train evaluate RUN` does, and writes it here).")
    told += [f"Beside each of these figures: {'; '.join(map(escaped, record.caveats()))}."]
    return "\n\n".join(told)


def _table(scores: Mapping[str, Sequence[float]], what: str) -> str:
    rows = [
        f"| {part} | {len(dice)} | {mean_interval(dice, (0.0, 1.0)).told()} | {min(dice):.4f} | {max(dice):.4f} |"
        for part, dice in scores.items()
    ]
    return "\n".join([f"| part | patients | mean Dice, {what} | lowest | highest |", "|---|---|---|---|---|", *rows])


def _measures(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a table of the means of all short measures, but for Dice."""
    measures = [measure for measure in MEASURES if measure.brief and measure.name != "dice"]
    head = " | ".join(["part", *(escaped(measure.heading) for measure in measures)])
    rows = []
    for part, patients in scores.items():
        means = [(measure, mean_over_patients(patients, measure)) for measure in measures]
        rows.append(" | ".join([part, *("" if mean is None else mean.told(one.digits) for one, mean in means)]))
    return "\n".join(f"| {line} |" for line in (head, " | ".join(["---"] * (len(measures) + 1)), *rows))


def _scores(run: Path, record: RunRecord) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Iterate over the parts that were evaluated as the run predicts in the end, and their patients' rows."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for _, evaluation in recorded_evaluations(run, record):
        for row in evaluation["patients"]:
            found.setdefault(row["split"], {})[row["case"]] = row
    for part in ("train", "validation", "test"):
        if part in found:
            yield part, list(found[part].values())


def _limits(record: RunRecord) -> str:
    return (
        f"- {_patients(len(record.train))} to learn from, {len(record.validation)} to choose by and {len(record.test)} "
        "to test on: the next one can come out much better or worse than the mean.\n"
        "- Where the training data are of one scanner and one sequence, expect it to be worse, or to fail, on others, "
        "and look before you count.\n"
        "- It was not tested on implants, fractures, tumours, motion or children unless the data hold them.\n"
        "- It marks something in any volume, of whatever organ: it does not know when it does not know."
    )


def _versions(record: RunRecord) -> str:
    versions = ", ".join(f"{escaped(name)} {escaped(number)}" for name, number in record.versions.items())
    return (
        f"{versions}. Seed {record.settings.seed}. First weights: {escaped(record.weights_used)}. The digests of the "
        f"{len(record.digests)} prepared volumes are in `{RECORD_NAME}`. That file also names the cases and says where "
        "their store was, and `overlays` shows slices of them: look at both before you give this folder away."
    )
