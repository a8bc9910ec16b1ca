"""nnU-Net v2 with its own fingerprint, plans, preprocessing, augmentation, trainer and predictor.

Option: ``2d`` or ``3d_fullres``. Without a time, it trains on a GPU with its own schedule of 1000 epochs, and nothing
is reduced. With a time, only these differ: the plans are made for `_MEMORY_GB` and voxels of the task's spacing, the
schedule of the learning rate follows the clock, and no time is spent on validation, which chooses nothing in nnU-Net.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from peers.task import Clock, Task, given_task

# With 8 GB, nnU-Net's default, patches and batches are as large as a GPU takes: a CPU would take too few steps.
_MEMORY_GB = 0.25
_NUMBER = 1


def train(task: Task, configuration: str) -> Any:
    """Plan, preprocess and train; return the trainer."""
    import torch
    from nnunetv2.experiment_planning import plan_and_preprocess_api as planning
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    class ClockTrainer(nnUNetTrainer):  # type: ignore[misc]
        """Ends by the clock; the learning rate falls polynomially with time, as it does with epochs in nnU-Net."""

        def run_training(self) -> None:
            self.on_train_start()
            self.network.train()
            clock, steps = Clock(task.minutes), 0
            while (share := clock.share()) < 1:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.initial_lr * (1 - share) ** 0.9
                self.train_step(next(self.dataloader_train))
                steps += 1
            print(f"{steps} steps of {self.batch_size} x {self.configuration_manager.patch_size}")
            self.on_train_end()

    timed = task.minutes is not None
    plans = "nnUNetPlansCPU" if timed else "nnUNetPlans"
    name = convert_id_to_dataset_name(_NUMBER)
    preprocessed = task.work / "preprocessed" / name
    with task.timed("prepare_s"):
        if not (preprocessed / f"{plans}.json").exists():
            planning.extract_fingerprints([_NUMBER], num_processes=1)
            planning.plan_experiments(
                [_NUMBER],
                gpu_memory_target_in_gb=_MEMORY_GB if timed else None,
                overwrite_target_spacing=(task.spacing_mm,) * 3 if timed else None,
                overwrite_plans_name=plans if timed else None,
            )
        files = preprocessed / f"{plans}_{configuration}"
        if not files.exists():
            planning.preprocess([_NUMBER], plans, [configuration], [1])
    task.reads(files)
    if timed:
        # Augmentation in this process: on one core, others would only compete with it. Planning does not work with 0.
        os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112
    read = planning.load_json
    trainer = (ClockTrainer if timed else nnUNetTrainer)(
        # Its own function adds this key; trainers need it.
        read(str(preprocessed / f"{plans}.json")) | {"continue_training": False},
        configuration, task.fold, read(str(preprocessed / "dataset.json")),
        torch.device("cpu" if timed and not torch.cuda.is_available() else "cuda"),
    )  # fmt: skip
    with task.timed("train_s"):
        trainer.run_training()
    return trainer


def predict(task: Task, trainer: Any) -> None:
    """Write the masks, from overlapping patches; mirrored too, which takes eight times as long, on a GPU only."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(device=trainer.device, use_mirroring=task.minutes is None, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, [trainer.network.state_dict()],
        trainer.dataset_json, type(trainer).__name__, trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    cases = task.cases("test")
    truncated = [str(task.masks / case) for case in cases]
    with task.timed("predict_s"):
        predictor.predict_from_files_sequential([[str(task.image(case))] for case in cases], truncated)


def main() -> None:
    with given_task() as task:
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(task.work / name)
        os.environ["nnUNet_compile"] = "f"  # noqa: SIM112
        raw = task.work / "raw" / f"Dataset{_NUMBER:03}_spine"
        if not raw.exists():
            raw.parent.mkdir(parents=True)
            raw.symlink_to(task.data.resolve())
        predict(task, train(task, *task.options))


if __name__ == "__main__":
    sys.exit(main())
