"""Policy updates on two ranks (`two_ranks`) with several recipes.

The job has `model`, `table` and `recipes` (settings by name). With each a rank makes two policy updates from
the same beginning; weights and metrics by name are the result.
"""

from two_ranks import RANKS
from zero_worker import two_updates, whole_weights


def recipe_updates(job):
    results = {}
    for name, settings in job["recipes"].items():
        learner, metrics = two_updates(job["model"], job["table"], ranks=RANKS, **settings)
        results[name] = whole_weights(learner), metrics
    return results
