"""llara turns any Hugging Face decoder language model into a dense retriever.

Importing the package is cheap: torch, transformers and faiss load with the first thing that needs them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llara.retriever import Retriever

__version__ = "0.1.0"
__all__ = ["Retriever", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Retriever":
        from llara.retriever import Retriever

        return Retriever
    raise AttributeError(f"module 'llara' has no attribute {name!r}")
