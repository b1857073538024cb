"""The configuration: typed, frozen, read from YAML with dotted overrides,
unknown keys refused with a suggestion."""

from dbtrain.config.cluster import ClusterConfig
from dbtrain.config.evaluation import EvaluationConfig
from dbtrain.config.load import load_config, parse_config
from dbtrain.config.run import Config
from dbtrain.config.training import AugmentationConfig, OptimizerConfig, TrainingConfig

__all__ = [
    "AugmentationConfig",
    "ClusterConfig",
    "Config",
    "EvaluationConfig",
    "OptimizerConfig",
    "TrainingConfig",
    "load_config",
    "parse_config",
]
