"""How long a stopped job has for its last step and checkpoint, where nobody says so.

Ray's supervisor of a job, an actor, reads RAY_JOB_STOP_WAIT_TIME_S from its own environment when the job is
stopped, and kills the driver three seconds after SIGTERM where there is none. The environment is the node's
(`rlgaf up`, the chart and the images set it), and a job's own variables replace those of the node: what is
sent with a job can override a cluster's time, but not stand in for one that is missing. So the driver,
which inherits its supervisor's environment and sees whether there is one, sets it there.
"""

import json
import os

from services.jobs.cluster import STOP_WAIT_S

CALL_S = 60.0


def ensure_stop_wait() -> None:
    """Give this driver's job STOP_WAIT_S seconds if neither the job nor the node has a time of its own.

    Ray must be connected to the job's cluster. Without effect on a driver that is not a job's.
    """
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "null"))
    if job is None or "RAY_JOB_STOP_WAIT_TIME_S" in os.environ:
        return
    import ray
    from ray.dashboard.modules.job.common import (
        JOB_ACTOR_NAME_TEMPLATE,
        JOB_ID_METADATA_KEY,
        SUPERVISOR_ACTOR_RAY_NAMESPACE,
    )

    name = JOB_ACTOR_NAME_TEMPLATE.format(job_id=job["metadata"][JOB_ID_METADATA_KEY])
    try:
        supervisor = ray.get_actor(name, namespace=SUPERVISOR_ACTOR_RAY_NAMESPACE)
    except ValueError:  # the job is another cluster's than the one that the run is on
        return
    variable = ("RAY_JOB_STOP_WAIT_TIME_S", str(STOP_WAIT_S))
    ray.get(supervisor.__ray_call__.remote(lambda _: os.environ.setdefault(*variable)), timeout=CALL_S)
