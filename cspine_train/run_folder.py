"""What lies in a run folder, by name."""

from __future__ import annotations

#: What was asked and what was fed: JSON, see `RunRecord`.
RECORD_NAME = "run.json"
#: The weights that the run keeps, safetensors beside a JSON: what SMP's own `from_pretrained` reads.
MODEL_FOLDER = "model"
#: A row an epoch.
METRICS_NAME = "metrics.csv"
#: What a killed run goes on from; needed for nothing else.
CHECKPOINT_FOLDER = "checkpoints"
#: Scores per patient, a file for what was scored.
EVALUATION_FOLDER = "evaluation"
