"""minipaged: PagedAttention you can read in an afternoon, run on anything, and watch as it runs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minipaged.config import EngineConfig
    from minipaged.core.params import SamplingParams
    from minipaged.llm import LLM

__version__ = "0.2.0"
# Where the repository is public, such as "https://github.com/OWNER/minipaged". While it is empty, links and badges that
# need it are left out; setup.py takes the links of the package's page from it.
ADDRESS = ""
__all__ = ["LLM", "EngineConfig", "SamplingParams", "__version__"]

_HOMES = {"LLM": "minipaged.llm", "EngineConfig": "minipaged.config", "SamplingParams": "minipaged.core.params"}


def __getattr__(name: str) -> Any:
    # Imported at first use: torch takes seconds to import, and the core must run without the features.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
