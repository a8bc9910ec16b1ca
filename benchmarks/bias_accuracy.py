"""How much of a known bias field each way of N4 leaves, and what it costs, on phantoms and on real volumes.

Run as ``python benchmarks/bias_accuracy.py [COHORT] [--cases N] [--peers] [--sweep] [--pictures FOLDER]``; with
``--coil [--run RUN]`` it simulates weak coils on the last case instead, see `weak_coil.py`.

On a phantom the true field is known; four more of known shapes are multiplied in, one after the other. On a real volume
it is not known, so that the difference of two estimates, with and without a known field multiplied into what lies
above air, is held against that field; each estimate finds its own air and tissue, as it would have to. What is left is
a share of the true field's deviation, over the tissue. An estimate that flattened everything would do well on real
volumes, which is why phantoms are beside them. "Image" is what is left in the two corrected volumes, after the best
affine match of their intensities, as a share of the deviation of their tissue. "CV" is the coefficient of variation
inside vertebrae after correction, over that before: of all of them together, and of each by itself. Seconds are of one
processor on one thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import weak_coil
from numpy.typing import NDArray

from cspine_data import Case, Orientation, bias_parameters, find_cases
from cspine_data.phantom.anatomy import make_case
from cspine_data.preprocessing.bias_field import correct, estimate_bias
from cspine_data.preprocessing.tissue import air_level, tissue_threshold
from cspine_data.sources.cases import load_case

Image = NDArray[np.float32]
Spacing = tuple[float, float, float]
Way = Callable[[Image, Spacing], Image]
KINDS = ("linear", "quadratic", "coil", "bumps")


def ours(preset: str = "default", **changes: object) -> Way:
    """Return our estimate as a preset has it, with some parameters changed."""
    parameters = bias_parameters(preset, **changes)
    return lambda image, spacing_mm: estimate_bias(image, spacing_mm, parameters).log_bias_xyz


def simpleitk_log_bias(image: sitk.Image, shrink: int, *, otsu: bool) -> sitk.Image:
    """Estimate a log field with four levels of 50 iterations on every few voxels, and evaluate it on all."""
    factors = [min(shrink, max(1, size // 8)) for size in image.GetSize()]
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([50] * 4)
    n4.SetConvergenceThreshold(1e-3)
    small = sitk.Shrink(image, factors)
    if otsu:
        n4.Execute(small, sitk.Shrink(sitk.OtsuThreshold(image, 0, 1, 200), factors))
    else:
        n4.Execute(small)
    return n4.GetLogBiasFieldAsImage(image)


def simpleitk(*, otsu: bool) -> Way:
    """Return SimpleITK's tutorial, every fourth voxel and four levels of 50, with Otsu's mask or the filter's own.

    MONAI and TorchIO have no N4: what their users wrap into a transform is this, mostly without the mask.
    """

    def estimate(image_xyz: Image, spacing_mm: Spacing) -> Image:
        image = sitk.GetImageFromArray(np.ascontiguousarray(image_xyz.transpose()))
        image.SetSpacing(spacing_mm)
        field = simpleitk_log_bias(image, 4, otsu=otsu)
        return np.ascontiguousarray(sitk.GetArrayFromImage(field).transpose())

    return estimate


def ants(image_xyz: Image, spacing_mm: Spacing) -> Image:
    """Estimate with ANTs as antspyx offers it: its own mask, every fourth voxel, four levels of 50, threshold 1e-7."""
    from ants import from_numpy, get_mask, n4_bias_field_correction

    image = from_numpy(image_xyz, spacing=spacing_mm)
    found = n4_bias_field_correction(image, mask=get_mask(image), return_bias_field=True)
    return np.log(np.maximum(found.numpy(), 1e-3)).astype(np.float32)


PEERS: dict[str, Way] = {
    "SimpleITK's tutorial: Otsu, shrink 4, 4 x 50": simpleitk(otsu=True),
    "as MONAI's and TorchIO's users wrap it: no mask, shrink 4, 4 x 50": simpleitk(otsu=False),
    "ANTs (antspyx): its mask, shrink 4, 4 x 50": ants,
}
PRESETS: dict[str, Way] = {name: ours(name) for name in ("fast", "default", "thorough")}
#: One parameter after the other, all others at their defaults.
SWEEPS: dict[str, dict[str, Way]] = {
    "iterations a level": {str(n): ours(iterations=(n,) * 4) for n in (12, 25, 50, 100, 200, 400)},
    "levels": {str(n): ours(iterations=(200,) * n) for n in (1, 2, 3, 4)},
    "finest elements, mm": {str(n): ours(spline_mm=n) for n in (30, 40, 50, 60, 80, 120)},
    "threshold": {f"{n:.0e}": ours(threshold=n) for n in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)},
    "working resolution, mm": {str(n): ours(resolution_mm=n) for n in (3, 4, 6, 8, 10, 12)},
    "bins": {str(n): ours(bins=n) for n in (50, 100, 200, 400)},
    "width": {str(n): ours(width=n) for n in (0.1, 0.15, 0.2, 0.25, 0.3)},
    "noise": {str(n): ours(noise=n) for n in (0.01, 0.03, 0.1, 0.3)},
    "masks found anew": {str(n): ours(mask_passes=n) for n in (0, 1, 2, 3, 5)},
}

DEFAULTS = dict(zip(SWEEPS, ("200", "4", "60", "1e-06", "6", "200", "0.2", "0.1", "3"), strict=True))


@dataclass
class Findings:
    """What one way left, of everything it was tried on."""

    phantoms: list[float] = field(default_factory=list)
    real: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    image: list[float] = field(default_factory=list)
    variation: list[tuple[float, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def of_real(self) -> list[float]:
        """The shares left on real volumes, of all fields."""
        return [share for shares in self.real.values() for share in shares]

    def row(self, name: str) -> str:
        """Return a line of the table."""
        cells = [name, f"{np.mean(self.seconds):.2f}", _mean_and_worst(self.phantoms)]
        if self.real:
            cells += [_mean_and_worst(self.of_real), *(f"{np.mean(self.real[kind]):.2f}" for kind in KINDS)]
            cells.append(f"{np.mean(self.image):.3f}")
        if self.variation:
            cells.append(" / ".join(f"{value:.2f}" for value in np.mean(self.variation, axis=0)))
        return f"| {' | '.join(cells)} |"


def _mean_and_worst(shares: list[float]) -> str:
    return f"{np.mean(shares):.2f} ({max(shares):.2f})" if shares else "-"


def known_fields(tissue: NDArray[np.bool_], deviation: float) -> Iterator[tuple[str, Image]]:
    """Yield smooth log fields of several shapes, of a given deviation over the tissue."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in tissue.shape], indexing="ij", sparse=True)
    shapes = {
        "linear": 0.5 * z + 0.3 * y + 0.2 * x,
        "quadratic": -((z - 0.2) ** 2) - 0.5 * (y + 0.1) ** 2 + 0.1 * x,
        "coil": -np.log(0.15 + ((y - 1.2) / 1.5) ** 2 + 0.4 * z**2 + 0.3 * x**2),
        "bumps": 0.4 * np.sin(2.2 * z + 0.5) * np.cos(1.7 * y) + 0.15 * x,
    }
    for kind in KINDS:
        shape = shapes[kind]
        yield kind, ((shape - shape[tissue].mean()) * deviation / shape[tissue].std()).astype(np.float32)


def try_on_phantom(index: int, ways: dict[str, Way], findings: dict[str, Findings], deviation: float) -> None:
    """Estimate a phantom's own field, and that times each known field."""
    case = make_case(0, index)
    image = case.image_xyz.astype(np.float32)
    tissue = image > tissue_threshold(image, case.spacing_mm)
    truths = [case.log_bias_xyz, *(case.log_bias_xyz + known for _, known in known_fields(tissue, deviation))]
    for truth in truths:
        biased = image * np.exp(truth - case.log_bias_xyz)
        for name, way in ways.items():
            left = (way(biased, case.spacing_mm) - truth)[tissue].std() / truth[tissue].std()
            findings[name].phantoms.append(float(left))


def try_on_real(
    image: Image, spacing_mm: Spacing, label: NDArray[np.generic] | None, ways: dict[str, Way],
    findings: dict[str, Findings], deviation: float,
) -> None:  # fmt: skip
    """Estimate one real volume's field, and that times each known field."""
    threshold = tissue_threshold(image, spacing_mm)
    air = np.float32(air_level(image, threshold))
    tissue = image > threshold
    without = {}
    for name, way in ways.items():
        started = time.process_time()
        without[name] = way(image, spacing_mm)
        findings[name].seconds.append(time.process_time() - started)
        if label is not None:
            findings[name].variation.append(_variation(image, correct(image, without[name], float(air)), label, air))
    for kind, log_bias in known_fields(tissue, deviation):
        biased = np.where(image > air, air + (image - air) * np.exp(log_bias), image)
        for name, way in ways.items():
            found = way(biased, spacing_mm)
            left = (found - without[name] - log_bias)[tissue].std() / deviation
            findings[name].real[kind].append(float(left))
            pair = [correct(one, bias, float(air))[tissue] for one, bias in ((image, without[name]), (biased, found))]
            findings[name].image.append(_after_affine_match(*pair))


def _after_affine_match(first: Image, second: Image) -> float:
    """Return what is left of one image when the other, times a factor and plus a constant, is taken off."""
    return float(np.sqrt(max(0.0, 1 - np.corrcoef(first, second)[0, 1] ** 2)))


def _variation(before: Image, after: Image, label: NDArray[np.generic], air: np.float32) -> tuple[float, float]:
    def of(image: Image, inside: NDArray[np.bool_]) -> float:
        signal = image[inside] - air
        return float(signal.std() / signal.mean())

    each = [label == value for value in np.unique(label[label > 0])]
    ratios = [of(after, inside) / of(before, inside) for inside in each if inside.sum() > 1]
    return of(after, label > 0) / of(before, label > 0), float(np.mean(ratios))


def draw(found: dict[str, Findings], folder: Path) -> None:
    """Draw what is left, and the seconds beneath, one picture a parameter."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(3, 3, figsize=(12, 11), sharey=True, layout="constrained")
    for panel, (parameter, values) in zip(panels.flat, SWEEPS.items(), strict=True):
        of_sweep = [found[f"{parameter}: {value}"] for value in values]
        for kind, shares in (
            ("real, worst", [max(one.of_real) for one in of_sweep]),
            ("real, mean", [np.mean(one.of_real) for one in of_sweep]),
            ("phantoms, mean", [np.mean(one.phantoms) for one in of_sweep]),
        ):
            panel.plot(range(len(values)), shares, "o-", label=kind)
        seconds = [f"{value}\n{np.mean(one.seconds):.2f} s" for value, one in zip(values, of_sweep, strict=True)]
        panel.set_xticks(range(len(values)), seconds)
        panel.axvline(list(values).index(DEFAULTS[parameter]), linestyle=":", color="grey", label="default")
        panel.set_title(parameter)
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel("share of the field left")
    panels[0, 0].legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "n4-accuracy.png", dpi=80)


def in_anatomical_order(case: Case) -> tuple[Image, Spacing, NDArray[np.generic] | None]:
    """Read a case: its image (x, y, z), voxel spacing, and label map."""
    loaded = load_case(case)
    orientation = Orientation.of(loaded.image.geometry)
    image = np.ascontiguousarray(orientation.to_anatomical(loaded.image.array)).astype(np.float32)
    label = orientation.to_anatomical(loaded.label.array) if loaded.label else None
    return image, orientation.geometry_xyz(loaded.image.geometry).spacing_mm, label


def try_coils(case: Case, ways: dict[str, Way], run: str | None) -> None:
    """Print what each way leaves of the fields of simulated weak coils."""
    image, spacing_mm, label = in_anatomical_order(case)
    assert label is not None or run is None, "Dice needs a label map"
    dice = weak_coil.dice_of(run, spacing_mm, label > 0) if run and label is not None else None
    print(f"{case.id}, a coil behind the patient, Rician noise, 8 bits")
    for row in weak_coil.rows(image, spacing_mm, ways, dice):
        print(row, flush=True)


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", type=Path, nargs="?", help="folder of real volumes")
    parser.add_argument("--cases", type=int, default=4, help="how many of them, spread evenly")
    parser.add_argument("--phantoms", type=int, default=4, help="how many phantoms")
    parser.add_argument("--deviation", type=float, default=0.244, help="of the known log fields")
    parser.add_argument(
        "--peers", action="store_true", help="SimpleITK and ANTs as they are used, too: minutes a volume"
    )
    parser.add_argument("--sweep", action="store_true", help="one parameter after the other, too")
    parser.add_argument("--pictures", type=Path, help="folder for the sweeps' curves")
    parser.add_argument("--coil", action="store_true", help="simulate weak coils on the cohort's last case instead")
    parser.add_argument("--run", help="with --coil: run folder whose Dice is reported")
    arguments = parser.parse_args()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    ways = dict(PRESETS)
    if arguments.peers:
        ways = {**PEERS, **ways}
    if arguments.coil:
        try_coils(find_cases(arguments.cohort).cases[-1], ways, arguments.run)
        return
    if arguments.sweep or arguments.pictures:
        ways.update({f"{name}: {value}": way for name, values in SWEEPS.items() for value, way in values.items()})
    findings: dict[str, Findings] = defaultdict(Findings)
    for index in range(arguments.phantoms):
        print(f"phantom {index + 1}", file=sys.stderr)
        try_on_phantom(index, ways, findings, arguments.deviation)
    cases = find_cases(arguments.cohort).cases if arguments.cohort else ()
    for case in cases[:: max(1, len(cases) // arguments.cases)][: arguments.cases]:
        print(case.id, file=sys.stderr)
        try_on_real(*in_anatomical_order(case), ways, findings, arguments.deviation)
    print("| way | s a volume | phantoms: left, mean (worst) | real: left, mean (worst) | " + " | ".join(KINDS), end="")
    print(" | image | CV together / each |\n" + "|---" * (6 + len(KINDS)) + "|")
    for name in ways:
        print(findings[name].row(name))
    if arguments.pictures:
        draw(findings, arguments.pictures)


if __name__ == "__main__":
    main()
