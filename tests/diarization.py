"""The models of the diarizer that `make diarization-models` makes, for the tests that need them."""

import os
from pathlib import Path

import pytest

from tests.conftest import IN_CI

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
MODELS_DIRECTORY = _CACHE / "cesar-mqtt" / "models"
"""What `models.directory` may be set to; the folder in it that the models are in is `DIARIZATION`."""
DIARIZATION = MODELS_DIRECTORY / "diarization"

needs_diarization = pytest.mark.skipif(
    not (DIARIZATION / "embedding.onnx").is_file() and not IN_CI,
    reason="left out: run `make diarization-models` first",
)
