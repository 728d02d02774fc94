"""Common callbacks: `EarlyStopping`, `EMA`, `LearningRateMonitor`, `ModelStatistics`, `Profiler` and `SWA`.

All of them run on the loop's thread and read no number from the device in a step. Checkpoints contain their state.
"""

from trainer.callbacks.early_stopping import EarlyStopping as EarlyStopping
from trainer.callbacks.ema import EMA as EMA
from trainer.callbacks.lr_monitor import LearningRateMonitor as LearningRateMonitor
from trainer.callbacks.model_statistics import ModelStatistics as ModelStatistics
from trainer.callbacks.profiler import Profiler as Profiler
from trainer.callbacks.swa import SWA as SWA

__all__ = ["EMA", "SWA", "EarlyStopping", "LearningRateMonitor", "ModelStatistics", "Profiler"]
