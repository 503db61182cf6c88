"""Statistics for comparing methods over tasks and seeds: aggregates, intervals, profiles, paired tests."""

from eva_rl.report.stats.aggregates import (
    Strata,
    interquartile_mean,
    mean,
    median,
    performance_profile,
    probability_of_improvement,
)
from eva_rl.report.stats.intervals import Estimate, bootstrap
from eva_rl.report.stats.paired import holm, mcnemar_test, sign_flip_test, stratified_sign_flip_test

__all__ = [
    "Estimate",
    "Strata",
    "bootstrap",
    "holm",
    "interquartile_mean",
    "mcnemar_test",
    "mean",
    "median",
    "performance_profile",
    "probability_of_improvement",
    "sign_flip_test",
    "stratified_sign_flip_test",
]
