"""minipaged: PagedAttention you can read in an afternoon, run on anything, and watch as it runs."""

from typing import TYPE_CHECKING, Any

from minipaged.config import EngineConfig, SamplingParams

if TYPE_CHECKING:
    from minipaged.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and whoever reads a recording or asks for --help does not need it.
    if name == "LLM":
        from minipaged.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
