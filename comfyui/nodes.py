"""The nodes StepCache, StepCache plan and StepCache calibrate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import ComfyExtension, io

try:
    from stepcache import EasyCache, Hindsight, LeMiCa, Off, PlanFile, Uniform
    from stepcache.core.strategy import Policy
    from stepcache.hosts.comfyui import Patch, patched
    from stepcache.methods.lemica_schedules import SCHEDULES
    from stepcache.planning.calibration import Calibration, Recorder
except ImportError as error:
    raise ImportError(
        "the StepCache nodes need the package stepcache 0.3 or newer; in ComfyUI's Python: pip install stepcache"
    ) from error

CATEGORY = "advanced/stepcache"
MODEL = "The diffusion model, after LoRA, model sampling (shift) and compile nodes."
BUDGET = (
    "How much is computed: a share of the sampler's evaluations above 0 and up to 1 (0.5: half the time), or their "
    "number, 2 or more. Samplers in a row each have their own budget."
)


def advanced(put: Any) -> Any:
    """An input among the advanced ones, where the page supports that."""
    put.extra_dict = {**(getattr(put, "extra_dict", None) or {}), "advanced": True}
    return put


def computed(budget: float, evaluations: int) -> int:
    """Evaluations that a budget stands for; ValueError if it is out of range, or more than the sampler makes."""
    if not (0 < budget <= 1 or (budget >= 2 and budget == int(budget))):
        raise ValueError(
            f"the budget is {budget:g}; expected a share above 0 and up to 1, or a whole number from 2 on."
        )
    count = int(budget) if budget > 1 else max(2, round(budget * evaluations))
    if count > evaluations > 1:
        raise ValueError(f"the budget is {count} evaluations, but this sampler makes {evaluations} of them here.")
    return count


def policies(method: str, budget: float, threshold: float, table: str) -> Callable[[int], Policy]:
    """A run's number of evaluations -> the policy for it."""

    def policy(evaluations: int) -> Policy:
        if method == "easycache":
            return EasyCache(threshold)
        count = computed(budget, evaluations)
        if count >= evaluations:
            return Off()
        if method == "lemica":
            return LeMiCa(count, table)
        if method == "hindsight":  # it knows how much of few steps is reliable
            return Hindsight(budget if budget < 1 else count)
        return Uniform(count)

    return policy


class StepCache(io.ComfyNode):
    """Speed up every sampler that uses this model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as the page shows it."""
        return io.Schema(
            node_id="StepCache",
            display_name="StepCache",
            category=CATEGORY,
            description="Compute some of the sampler's evaluations of the model and predict the others. "
            "Goes between the model and the sampler.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL),
                io.Combo.Input(
                    "method",
                    options=["hindsight", "uniform", "lemica", "easycache"],
                    default="hindsight",
                    tooltip="hindsight: forecasts, and corrects them at every computed evaluation; the closest in our "
                    "measurements. uniform: even steps, the last output is reused. lemica: published "
                    "steps of one model and step count (advanced inputs). easycache: decides while running, by a "
                    "threshold.",
                ),
                io.Float.Input("budget", default=0.5, min=0.0, max=1000.0, step=0.05, tooltip=BUDGET),
                io.Boolean.Input("enabled", default=True, tooltip="Off: the model passes through."),
                advanced(
                    io.Float.Input(
                        "threshold",
                        default=0.05,
                        min=0.001,
                        max=5.0,
                        step=0.005,
                        tooltip="easycache only, used instead of the budget: a larger one skips more.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "table",
                        options=sorted(SCHEDULES),
                        default="wan2.1-t2v-1.3B",
                        tooltip="lemica only: the model whose published steps are used.",
                    )
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, accelerated.")],
        )

    @classmethod
    def execute(
        cls, model: Any, method: str, budget: float, enabled: bool, threshold: float = 0.05, table: str = ""
    ) -> io.NodeOutput:
        """The patched model; ValueError for a budget or model that does not fit."""
        if not enabled:
            return io.NodeOutput(model)
        if method != "easycache":
            computed(budget, 0)
        return io.NodeOutput(patched(model, Patch(policies(method, budget, threshold, table))))


class StepCachePlan(io.ComfyNode):
    """Follow a plan file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as the page shows it."""
        return io.Schema(
            node_id="StepCachePlan",
            display_name="StepCache plan",
            category=CATEGORY,
            description="Follow a plan that `stepcache plan` made. It fits one model, sampler and step count.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL),
                io.String.Input(
                    "plan", default="plan.json", tooltip="A file in ComfyUI's input folder, or its full path."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, accelerated.")],
        )

    @classmethod
    def execute(cls, model: Any, plan: str) -> io.NodeOutput:
        """The patched model; ValueError or FileNotFoundError for the file."""
        path = Path(plan) if Path(plan).is_absolute() else Path(folder_paths.get_input_directory()) / plan
        followed = PlanFile.load(path)
        return io.NodeOutput(patched(model, Patch(lambda evaluations: followed, followed.model or None)))


class StepCacheCalibrate(io.ComfyNode):
    """Record uncached runs for `stepcache plan`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as the page shows it."""
        return io.Schema(
            node_id="StepCacheCalibrate",
            display_name="StepCache calibrate",
            category=CATEGORY,
            description="Compute every step and add the recorded run to a calibration, from which "
            "`stepcache plan` makes plans. Queue it once per prompt; eight are enough.",
            inputs=[
                io.Model.Input("model", tooltip=MODEL),
                io.String.Input("prompt", default="", multiline=True, tooltip="Identifies the run in the file."),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, tooltip="The sampler's seed, likewise."),
                io.String.Input("file", default="calibration.json", tooltip="In ComfyUI's output folder."),
            ],
            outputs=[io.Model.Output(tooltip="The model, with recording.")],
        )

    @classmethod
    def execute(cls, model: Any, prompt: str, seed: int, file: str) -> io.NodeOutput:
        """The patched model; the file is written when a sampler's run ends."""
        path = Path(folder_paths.get_output_directory()) / file

        def ended(recorder: Policy) -> None:
            if not isinstance(recorder, Recorder):
                return
            found = recorder.finish((prompt, seed))
            (Calibration.load(path).merged(found) if path.exists() else found).save(path)

        return io.NodeOutput(patched(model, Patch(lambda evaluations: Recorder(), ended=ended)))


class Nodes(ComfyExtension):
    """All of them."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """For ComfyUI."""
        return [StepCache, StepCachePlan, StepCacheCalibrate]


async def comfy_entrypoint() -> ComfyExtension:
    """For ComfyUI."""
    return Nodes()
