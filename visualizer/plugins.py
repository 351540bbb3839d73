"""Plug-ins for the page: a Python file with settings for the engine and, if it likes, a scenario to play.

    SETTINGS = {"admission_policy": MyPolicy, "num_blocks": 24}     # keywords of `LLM`
    SCENARIO = {"name": "…", "watch": "…", "arrivals": [{"step": 0, "prompt": "Once upon a time"}, …]}

The other keys of an arrival are the fields of `visualizer.scenarios.Arrival`. ``examples/`` has four plug-ins.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from minipaged.config import EngineConfig
from minipaged.errors import InvalidConfig
from visualizer.scenarios import SCENARIOS, Arrival, Scenario

KEY = "plugin"  # of the plug-in's scenario in the page's menu


def load_plugin(path: Path) -> tuple[dict[str, Any], Scenario | None]:
    """The settings of a plug-in, and its scenario, which is put into the page's menu.

    Raises `InvalidConfig` for a file that cannot be read or imported, or whose names are not what they should be.
    """
    if not path.is_file():
        raise InvalidConfig(f"--plugin {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InvalidConfig(f"--plugin {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as for an imported file: dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InvalidConfig(f"--plugin {path} cannot be imported: {type(error).__name__}: {error}") from error
    settings = getattr(module, "SETTINGS", None)
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise InvalidConfig(f"--plugin {path}: it must define SETTINGS, a dict of keyword arguments for LLM")
    if unknown := set(settings) - {one.name for one in fields(EngineConfig)} | ({"model"} & set(settings)):
        hint = "choose the model with --model" if "model" in unknown else "see minipaged.EngineConfig"
        raise InvalidConfig(f"--plugin {path}: SETTINGS cannot have {', '.join(sorted(unknown))}; {hint}")
    told = getattr(module, "SCENARIO", None)
    if told is None:
        return settings, None
    SCENARIOS[KEY] = scenario = _scenario(path, told)
    return settings, scenario


def _scenario(path: Path, told: Any) -> Scenario:
    try:
        told = dict(told)
        dicts = [dict(arrival) for arrival in told.pop("arrivals")]
        arrivals = [Arrival(one.pop("step"), one.pop("prompt"), **one) for one in dicts]
        scenario = Scenario(told.pop("name"), tuple(arrivals), KEY, told.pop("watch"), **told)
        for arrival in arrivals:
            arrival.params()
    except (TypeError, ValueError, KeyError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else error
        raise InvalidConfig(f"--plugin {path}: SCENARIO is not one: {missing}; see visualizer/plugins.py") from None
    if not arrivals or list(arrivals) != sorted(arrivals, key=lambda arrival: arrival.at_step):
        raise InvalidConfig(f"--plugin {path}: SCENARIO needs arrivals, in the order of their steps")
    return scenario
