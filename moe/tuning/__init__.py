"""What is fastest for a layer, a token count and a GPU: found by timing, kept in tables, looked up by `tuned_pipeline`."""

from moe.tuning.autotune import autotune
from moe.tuning.buckets import BUCKETS, bucket_of
from moe.tuning.choice import TuningChoice
from moe.tuning.gpu import GpuModel
from moe.tuning.lookup import forget_tables, is_tuned, look_up, remember
from moe.tuning.search import tune
from moe.tuning.table import LayerKey, TableEntry, TuningTable, load_table, merge_into, user_table_path
from moe.tuning.tuned import TunedPipeline, tuned_config, tuned_pipeline

__all__ = [
    "BUCKETS",
    "GpuModel",
    "LayerKey",
    "TableEntry",
    "TunedPipeline",
    "TuningChoice",
    "TuningTable",
    "autotune",
    "bucket_of",
    "forget_tables",
    "is_tuned",
    "load_table",
    "look_up",
    "merge_into",
    "remember",
    "tune",
    "tuned_config",
    "tuned_pipeline",
    "user_table_path",
]
