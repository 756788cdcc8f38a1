"""Ray's job client with the cluster's token in hand."""

import logging
from typing import TYPE_CHECKING

from workbench.errors import UserError
from workbench.session import ClusterAddress, use_cluster

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


def job_client(cluster: ClusterAddress) -> "JobSubmissionClient":
    """A client of the cluster's job API. Raises UserError when nothing answers there or the token is refused."""
    use_cluster(cluster)
    from ray._raylet import AuthenticationTokenLoader
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient  # heavy, and reads the variables set by use_cluster

    AuthenticationTokenLoader.instance().reset_cache()  # the file may hold another token than when it was last read
    for chatty in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(chatty).setLevel(logging.ERROR)  # notes on every upload and every ignored file
    try:
        return JobSubmissionClient(cluster.dashboard)
    except ConnectionError as error:
        raise UserError(f"no cluster answers at {cluster.dashboard}: {error}") from None
    except AuthenticationError:
        whose = f"the token in {cluster.token_file}" if cluster.token_file else "a request without the cluster's token"
        raise UserError(f"{cluster.dashboard} refused {whose}; RAY_AUTH_TOKEN_PATH names another") from None
    except RuntimeError as error:
        raise UserError(f"{cluster.dashboard} refused the request: {error}") from None
