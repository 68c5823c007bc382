"""StepCache for ComfyUI: compute some of a sampler's evaluations, predict the rest, correct.

The work is done by the package stepcache (`pip install stepcache`), this folder holds its nodes. What the package
lacks is said when the nodes are loaded, so that the other nodes of a workflow stay usable.
"""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"
"""Help pages of the nodes."""

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
