"""The configuration: typed, frozen, read from YAML with dotted overrides, unknown keys refused with a suggestion."""

from dbtrain.config.cluster import ClusterConfig
from dbtrain.config.evaluation import EvaluationConfig
from dbtrain.config.load import load_config, parse_config
from dbtrain.config.run import Config
from dbtrain.config.training import OptimizerConfig, TrainingConfig

__all__ = [
    "ClusterConfig",
    "Config",
    "EvaluationConfig",
    "OptimizerConfig",
    "TrainingConfig",
    "load_config",
    "parse_config",
]
