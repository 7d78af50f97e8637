"""Schedulers by name: one of the catalogue's for any model, with the model's own noise schedule."""

from __future__ import annotations

import inspect
from typing import Any

from marble.errors import MarbleError
from marble.noise.levels import FLOWS, prediction_of


def make_scheduler(name: str, own: Any) -> Any:
    """One of the catalogue's `SCHEDULERS` for a model that comes with the scheduler `own`, with its noise schedule.

    Raises:
        MarbleError: there is none of the name, or not for flow models.
    """
    import diffusers

    if name == "own":
        return own
    config, flow = dict(own.config), prediction_of(own) in FLOWS
    shift = config.get("shift", config.get("flow_shift", 1.0))
    if name == "dpm++" and prediction_of(own) == "reversed_flow_prediction":
        raise MarbleError(f"scheduler dpm++ cannot count levels upwards as {type(own).__name__} does here; use own")
    if name == "dpm++":
        changes: dict[str, Any] = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
        changes |= {"final_sigmas_type": "zero", "thresholding": False}
        if config.get("use_dynamic_shifting") and config.get("time_shift_type", "exponential") != "exponential":
            raise MarbleError(
                f"scheduler dpm++ cannot shift its levels as {type(own).__name__} does here "
                f"(time_shift_type {config['time_shift_type']}); use own or euler"
            )
        if flow:
            changes |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        return _taking_sigmas(diffusers.DPMSolverMultistepScheduler.from_config(config, **changes))
    if name == "euler" and flow:
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
    if name == "euler":
        return diffusers.EulerDiscreteScheduler.from_config(config)
    if name == "sde":
        from marble.noise.sde import FlowSDE, StochasticDDIM

        if flow:
            return FlowSDE.from_config(config, shift=shift)
        return StochasticDDIM.from_config(config, clip_sample=False, thresholding=False)
    if name == "ddim" and not flow:
        return diffusers.DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
    raise MarbleError(
        f'scheduler "{name}" is not for models that come with {type(own).__name__}; use own, dpm++ or euler'
    )


def _taking_sigmas(scheduler: Any) -> Any:
    """Let a scheduler that makes its own levels be called by pipelines that always hand some over (QwenImage's)."""
    plain = scheduler.set_timesteps
    if "sigmas" in inspect.signature(plain).parameters:
        return scheduler

    def set_timesteps(
        num_inference_steps: int | None = None,
        device: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
    ) -> None:
        count = len(sigmas) if sigmas is not None else num_inference_steps
        extra = {} if mu is None or not scheduler.config.get("use_dynamic_shifting") else {"mu": mu}
        plain(count, device=device, timesteps=timesteps, **extra)

    scheduler.set_timesteps = set_timesteps
    return scheduler
