"""mimo-qat env: versions and hardware, for bug reports."""

from dataclasses import dataclass
from typing import Any

from mimo_qat.provenance import commit, hardware, versions


@dataclass(kw_only=True)
class EnvConfig:
    """Nothing to configure."""


def main(config: EnvConfig) -> dict[str, Any]:
    """Commit, package versions and hardware as one JSON document."""
    return {"commit": commit(), "versions": versions(), "hardware": hardware()}
