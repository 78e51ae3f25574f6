"""What a result depends on beside its inputs."""

from __future__ import annotations

import platform

LIBRARIES = ("numpy", "torch", "diffusers", "transformers", "peft", "av")


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    import spatialalign

    found = {"spatialalign": spatialalign.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "platform": f"{platform.system()} {platform.machine()}"}
