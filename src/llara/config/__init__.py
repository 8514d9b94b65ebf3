"""One frozen dataclass per job: the function's argument, the command's flags and the TOML file are the same thing.

A field's docstring is its `--help` text. A configuration checks itself when it is made and reports every fault at once.
"""

from llara.config.base import Backend as Backend
from llara.config.base import Dtype as Dtype
from llara.config.base import JobConfig as JobConfig
from llara.config.base import ModelConfig as ModelConfig
from llara.config.base import to_plain as to_plain
from llara.config.base import to_toml as to_toml
from llara.config.indexing import IndexConfig as IndexConfig
from llara.config.others import ConvertConfig as ConvertConfig
from llara.config.others import DemoConfig as DemoConfig
from llara.config.others import ExplainConfig as ExplainConfig
from llara.config.others import VerifyConfig as VerifyConfig
from llara.config.retrieval import EncodeConfig as EncodeConfig
from llara.config.retrieval import EvaluateConfig as EvaluateConfig
from llara.config.retrieval import FuseConfig as FuseConfig
from llara.config.retrieval import MineConfig as MineConfig
from llara.config.retrieval import RerankConfig as RerankConfig
from llara.config.retrieval import SearchConfig as SearchConfig
from llara.config.training import AdaptConfig as AdaptConfig
from llara.config.training import FinetuneConfig as FinetuneConfig
from llara.config.training import TrainConfig as TrainConfig
