"""Losses, augmentations, architectures and metrics of a plug-in package, and what its absence does."""

from __future__ import annotations

import csv
import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from pydantic import ValidationError

from cspine_data import (
    InputError,
    Preprocessing,
    find_cases,
    label_name,
    open_cohort,
    prepare,
    preprocess_volume,
    read_volume,
    write_volume,
)
from cspine_data.tools import ExtensionPoint
from cspine_train import RunError, RunSettings, load_run, train
from cspine_train.data.augmentation import Augmentation, Stream, sample_seeds
from cspine_train.errors import ModelError
from cspine_train.extensions import ARCHITECTURES, AUGMENTATIONS, LOSSES
from cspine_train.metrics.overlap import MEASURES, agreement, measures
from cspine_train.models.build import architectures, build_model, load_model, save_model
from cspine_train.run.record import load_record
from cspine_train.study.results import tidy
from cspine_train.study.tables import findings, rendered
from cspine_train.training.losses import SegmentationLoss
from tests.conftest import ball, write_case
from tests.test_tables import row

pytestmark = pytest.mark.usefixtures("without_pictures")

PLUG_IN = """
import functools
import numpy as np
import segmentation_models_pytorch as smp
from cspine_data import Geometry, Volume

class Npy:
    @staticmethod
    def read(path):
        array = np.load(path, allow_pickle=False)
        directions = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
        grid = Geometry(size=array.shape, spacing_mm=(1, 1, 1), directions=directions, origin_mm=(0, 0, 0))
        return Volume(array, grid, path)

from cspine_data import Case, Found, Layout

def listed(folder):
    return "it holds index.txt" if (folder / "index.txt").is_file() else None

def cases_of(folder, wanted):
    names = (folder / "index.txt").read_text().split()
    return Found(cases=[Case(name, folder / "all" / f"{name}.nii", patient="one") for name in names])

INDEXED = Layout(listed, cases_of)

def robust(tissue, standard):
    return tissue.at((2, 98)), (0.0, 1.0)
from cspine_train import MaskMeasure

def squared_error(logits, shares, counted):
    return ((logits.sigmoid() - shares) ** 2).mean()

def offset(images, masks, stream):
    return images + stream.normal(1).view(-1, 1, 1, 1), masks

unet_scse = functools.partial(smp.Unet, decoder_attention_type="scse")

def volume_ml(pair):
    return pair.found.sum() * pair.spacing_mm[0] * pair.spacing_mm[1] * pair.spacing_mm[2] / 1000

volume = MaskMeasure("volume_ml", "volume found", "ml", 3, (0, float("inf")), "zero", compute=volume_ml)
"""
ENTRY_POINTS = """
[cspine.formats]
npy = cspine_plug_in:Npy
nrrd = cspine_plug_in:Npy

[cspine.layouts]
indexed = cspine_plug_in:INDEXED

[cspine.normalisations]
robust = cspine_plug_in:robust
zscore = cspine_plug_in:robust

[cspine.losses]
squared_error = cspine_plug_in:squared_error
dice = cspine_plug_in:squared_error
../up = cspine_plug_in:squared_error
broken = cspine_plug_in_that_is_missing:loss

[cspine.augmentations]
offset = cspine_plug_in:offset

[cspine.architectures]
unet-scse = cspine_plug_in:unet_scse

[cspine.metrics]
volume_ml = cspine_plug_in:volume
dice = cspine_plug_in:volume
"""
CHOICES = {"model": "unet-scse", "loss": "squared_error", "augment": "light+offset"}
SMALL = {"encoder": "tu-test_resnet", "weights": "none", "pixel_mm": 12.0, "precision": "32", "epochs": 1}
SMALL |= {"context": 0, "crop_margin_mm": "whole"}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Install the plug-in as pip would: a module, and its metadata beside it."""

    def installed() -> None:
        site = tmp_path / "site-packages"
        metadata = site / "cspine_plug_in-1.0.dist-info"
        metadata.mkdir(parents=True)
        (site / "cspine_plug_in.py").write_text(PLUG_IN)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cspine-plug-in\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
        monkeypatch.syspath_prepend(site)
        measures.cache_clear()

    monkeypatch.delitem(sys.modules, "cspine_plug_in", raising=False)
    yield installed
    measures.cache_clear()


@pytest.mark.parametrize("group", [LOSSES, AUGMENTATIONS, ARCHITECTURES])
def test_what_the_project_has_is_there_without_a_plug_in(group: ExtensionPoint) -> None:
    assert group.names()[: len(group.built_in)] == tuple(group.built_in)
    assert all(group.load(name) is not None for name in group.built_in)


def test_a_plug_in_adds_names_and_replaces_none(install: Callable[[], None]) -> None:
    assert "squared_error" not in LOSSES.names()
    with pytest.raises(RunError, match=r"cspine\.losses: 'squared_error' is unknown"):
        LOSSES.load("squared_error")
    install()
    assert set(LOSSES.names()) - set(LOSSES.built_in) == {"squared_error", "broken"}
    assert LOSSES.load("dice").__module__ == "cspine_train.training.losses"
    with pytest.raises(RunError, match=r"plug-in 'broken' of cspine\.losses: cannot be imported .*missing"):
        LOSSES.load("broken")


@pytest.mark.parametrize(
    ("field", "value"),
    [("loss", "squared_error"), ("augment", "light+offset"), ("augment", "offset"), ("augment", "offset+light")],
)
def test_settings_accept_the_names_of_installed_plug_ins_only(
    field: str, value: str, install: Callable[[], None]
) -> None:
    with pytest.raises(ValidationError, match="is unknown.*install its plug-in"):
        RunSettings(**{field: value})
    install()
    assert getattr(RunSettings(**{field: value}), field) == value
    for other in ("", "nothing", f"{value}+", f"{value}+nothing", "os:system"):
        with pytest.raises(ValidationError, match="is unknown"):
            RunSettings(**{field: other})


def test_a_plug_ins_loss_is_computed_in_float32_without_ignored_pixels(install: Callable[[], None]) -> None:
    install()
    logits, shares = torch.zeros(1, 1, 2, 2).bfloat16(), torch.ones(1, 2, 2, 2)
    shares[:, 1, 0] = 0
    # Of four pixels two count; the other two are background beyond doubt, and right.
    assert SegmentationLoss("squared_error")(logits, shares).item() == pytest.approx(2 * 0.25 / 4)


def test_a_plug_ins_change_comes_last_and_leaves_the_others_as_they_were(install: Callable[[], None]) -> None:
    install()
    images, seeds = torch.rand(4, 1, 32, 32), sample_seeds(0, 0, 4)
    arguments = images, images.clone(), torch.zeros(4, dtype=torch.int64), seeds
    light, light_masks = Augmentation("light")(*arguments)
    changed, masks = Augmentation("light+offset")(*arguments)
    expected = Stream(seeds, "offset", images.device).normal(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(changed, light + expected)
    assert torch.equal(masks, light_masks)
    alone, _ = Augmentation("offset")(*arguments)
    torch.testing.assert_close(alone, images + expected)
    with pytest.raises(RunError, match="more than one level"):
        Augmentation("light+strong")


def test_an_alias_is_built_saved_and_loaded(
    install: Callable[[], None], tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    import segmentation_models_pytorch as smp

    with pytest.raises(ModelError, match="'unet-scse'"):
        build_model("unet-scse", "resnet18")
    install()
    assert "unet-scse" in architectures()
    assert "unet-scse" in run_train("models").stdout
    network, _ = build_model("unet-scse", "resnet18")
    plain, _ = build_model("unet", "resnet18")
    assert any("attention" in name for name in network.state_dict().keys() - plain.state_dict().keys())
    save_model(network, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["decoder_attention_type"] == "scse"
    images = torch.rand(1, 1, 32, 32)
    with torch.inference_mode():
        expected = network.eval()(images)
        assert torch.equal(load_model("unet-scse", "resnet18", tmp_path / "model")(images), expected)
        assert torch.equal(smp.from_pretrained(str(tmp_path / "model")).eval()(images), expected)


def test_a_run_with_a_plug_in_needs_it_to_be_read(
    install: Callable[[], None], phantom_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(sys, "path", list(sys.path))
        install()
        assert train(phantom_store, tmp_path / "run", RunSettings(**CHOICES, **SMALL)).finished
        assert isinstance(ARCHITECTURES.load("unet-scse"), functools.partial)
        assert load_run(tmp_path / "run").record.settings.model == "unet-scse"
        site = sys.path[0]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != site])
    assert "offset" not in AUGMENTATIONS.names()
    with pytest.raises(RunError, match=r"settings\.loss: .*'squared_error' is unknown"):
        load_record(tmp_path / "run")


def test_a_plug_ins_metric_is_in_every_table(
    install: Callable[[], None], phantom_store: Path, tmp_path: Path, run_train: Callable[..., Result]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    record = train(phantom_store, run, RunSettings(**SMALL))
    install()
    done = run_train("evaluate", run)
    assert done.exit_code == 0, done.output
    assert "volume found, ml" in done.output
    with (run / "evaluation" / "test.csv").open(newline="") as file:
        (scored,) = csv.DictReader(file)
    found = int(scored["true_positive_voxels"]) + int(scored["false_positive_voxels"])
    assert float(scored["volume_ml"]) >= 0
    assert bool(float(scored["volume_ml"])) == bool(found)
    # Names of the project's own are not replaced.
    assert 0 <= float(scored["dice"]) <= 1
    for page in ("report.html", "MODEL_CARD.md"):
        assert "volume found, ml" in (run / page).read_text(encoding="utf-8")
    shutil.copytree(run, other)
    compared = run_train("compare", run, other, "--measure", "volume_ml")
    assert compared.exit_code == 0, compared.output
    assert "mean volume found, ml" in compared.output
    of_study = findings(tidy([row("unet", "n4", record.test[0], 0.9, volume_ml=7.0)]))
    assert "volume found, ml" in rendered(of_study, "markdown")
    (line,) = csv.DictReader(rendered(of_study, "csv").splitlines())
    assert float(line["volume_ml"]) == 7


def test_a_plug_ins_metric_that_fails_is_one_error(
    install: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    mask = np.ones((2, 3, 5), bool)
    assert agreement(mask, mask, (1.0, 2.0, 5.0)).figures["volume_ml"] == pytest.approx(0.3)
    plug_in = sys.modules["cspine_plug_in"]
    for compute, problem in ((lambda _: float("nan"), "is nan"), (lambda _: 1 / 0, "fails .division by zero")):
        monkeypatch.setattr(plug_in, "volume", functools.partial(plug_in.MaskMeasure, compute=compute)("", "volume"))
        measures.cache_clear()
        with pytest.raises(RunError, match=f"measure volume_ml: {problem}.*plug-in"):
            agreement(mask, mask, (1.0, 1.0, 1.0))
    assert measures()[: len(MEASURES)] == MEASURES


def test_a_misspelt_name_is_refused_with_the_nearest(phantom_store: Path, run_train: Callable[..., Result]) -> None:
    for option, name, nearest in (("--loss", "dice_bec", "dice_bce"), ("--augment", "ligth", "light")):
        result = run_train("run", "--store", phantom_store, option, name)
        assert result.exit_code == 2
        assert option in result.stderr
        assert f"did you mean {nearest}?" in result.stderr


def test_a_format_is_read_and_found_by_its_suffix(install: Callable[[], None], tmp_path: Path) -> None:
    path, (ours, _) = tmp_path / "raw" / "A.npy", ball()
    path.parent.mkdir()
    np.save(path, ours.array)
    with pytest.raises(InputError, match="volume by its name"):
        read_volume(path)
    install()
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, ours.array)
    assert volume.geometry.orientation_code == "LPS"
    (case,) = find_cases(path.parent).cases
    assert (case.id, case.volume) == ("A", path)
    assert label_name(path) == "A-label.nrrd"
    with pytest.raises(InputError, match="name for a volume"):
        write_volume(tmp_path / "B.npy", volume)
    # Its other format has the suffix of one of the project's, which stays.
    write_volume(tmp_path / "B.nrrd", volume)
    np.testing.assert_array_equal(read_volume(tmp_path / "B.nrrd").array, ours.array)


def test_a_layout_is_recognised_after_the_projects_own(install: Callable[[], None], tmp_path: Path) -> None:
    (tmp_path / "index.txt").write_text("A B")
    with pytest.raises(InputError, match="holds no volume"):
        find_cases(tmp_path)
    install()
    listing = find_cases(tmp_path)
    assert listing.notes[0] == "layout indexed: it holds index.txt"
    assert [(case.id, case.patient) for case in listing.cases] == [("A", "one"), ("B", "one")]
    assert find_cases(tmp_path, layout="indexed").cases == listing.cases


def test_a_store_with_a_plug_ins_normalisation_is_read_without_it(
    install: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_case(tmp_path / "raw", "A")
    store, robust = tmp_path / "s.zarr", Preprocessing(bias=None, normalisation="robust")
    with pytest.raises(InputError, match="'robust' is unknown.*install"):
        prepare(tmp_path / "raw", store, preprocessing=robust)
    assert not store.exists()
    with monkeypatch.context() as patches:
        patches.setattr(sys, "path", list(sys.path))
        install()
        assert prepare(tmp_path / "raw", store, preprocessing=robust).done == ("A",)
        volume = read_volume(tmp_path / "raw" / "A.nrrd")
        expected = preprocess_volume(volume, robust)
        site = sys.path[0]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != site])
    cohort = open_cohort(store)
    assert cohort.record("A").preprocessing == robust
    assert cohort.record("A").normalisation.values == (0.0, 1.0)
    np.testing.assert_array_equal(cohort.prepared("A").levels_xyz, expected.levels_xyz)
    with pytest.raises(InputError, match="'robust' is unknown"):
        preprocess_volume(volume, robust)


def test_a_misspelt_normalisation_is_refused_with_the_nearest(tmp_path: Path, run_data: Callable[..., Result]) -> None:
    write_case(tmp_path / "raw", "A")
    result = run_data("prepare", tmp_path / "raw", "--store", tmp_path / "s.zarr", "--normalisation", "z-score")
    assert result.exit_code == 1
    assert "did you mean zscore?" in result.stderr
