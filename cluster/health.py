"""How a cluster finds out that a process or a link is dead: Ray's settings, as environment variables, and why.

Every process must have them from its start, so the bring-up writes them into each host's environment; jobs' drivers
and workers inherit them from there. Times were taken in the lab (``tests/lab``) on Ray 2.60.
"""

CONTROL_STORE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""For the head: how the control store asks after raylets. A killed raylet is dead to it after 3 s, a raylet behind a
cut link after 9 to 10 s; with Ray's defaults it takes 15 s and a minute."""

CONNECTIONS = {
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
}
"""For every host alike: how a process finds out that the far end of its connection is gone.

A caller waits for a task on an open connection to the worker, and nothing travels on it while the task runs. When the
link is cut in silence the control store declares the node dead, but the caller still waits for the connection to fail:
Ray asks after it every 300 s and gives up 120 s later, so the task is tried again after up to 7 minutes. With these
values it is tried again about 24 s after the cut.

The patience, 10 s, is longer than the control store's: a caller that gives up on a node that is not declared dead
would start a task twice or fail an actor's call for a hiccup; a link that was away for 5 s costs nothing. The servers
of a process refuse clients that ask more often than its own RAY_grpc_client_keepalive_time_ms says, so no host may
have a smaller value than another.
"""
