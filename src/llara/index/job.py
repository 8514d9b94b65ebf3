"""The job `index`: builds an index folder, or changes one."""

from llara.config import IndexConfig
from llara.index.build import IndexResult, build_index
from llara.index.change import add_documents, delete_documents


def index(config: IndexConfig) -> IndexResult:
    """Builds an index; with `add` adds documents to one, with `delete` deletes documents from one.

    Raises what `build_index`, `add_documents` and `delete_documents` raise.
    """
    if config.add:
        return add_documents(config)
    if config.delete is not None:
        return delete_documents(config)
    return build_index(config)
