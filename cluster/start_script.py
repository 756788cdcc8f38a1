"""The script that a supervisor runs on a host: it tidies up after earlier Rays, then becomes ``ray start --block``.

    text = start_script(inventory, "system-a", ["--head", "--port=6379"])

POSIX sh, because a Mac's and a Linux's shell have that in common. Where files are it finds out itself, so that what is
rendered is the same wherever the user's home is.
"""

import shlex

from cluster.inventory import Inventory
from cluster.ssh import remote_path

LONGEST_TEMP = 36
"""Ray's sockets are 67 characters below its folder, and macOS allows a socket's path 103."""

TEMPLATE = r"""#!/bin/sh
# Ray on {host}, of the cluster '{cluster}'. Made by 'workbench cluster up', which overwrites changes.
set -eu
HOME=${{HOME:-$(eval echo "~$(id -un)")}}
export HOME
folder={folder}
environment={environment}

# What Ray says at start, and why it ended: one file, and the one before it.
log="$folder/ray.log"
[ ! -f "$log" ] || [ "$(wc -c <"$log")" -lt 1000000 ] || mv "$log" "$log.1"
(umask 077 && : >>"$log")
exec >>"$log" 2>&1 </dev/null
echo "--- start at $(date)"

set -a
. "$folder/ray.env"
set +a
PATH="$environment/bin:$PATH"
export PATH

# Ray's folder: sessions, sockets, logs. A socket's path has a limit, so a long home is stood in for.
temp="$folder/ray"
[ ${{#temp}} -le {longest_temp} ] || temp="/tmp/workbench-{cluster}-$(id -u)"
mkdir -p "$temp"
[ -O "$temp" ] || {{ echo "$temp belongs to somebody else"; exit 1; }}
chmod 700 "$temp"

# Nothing of this Ray runs now. A session that is not the newest goes when none of its files has changed for {days}
# days. Of the newest go log files that old, and what was unpacked or spilled for work that is no more.
newest=$(readlink "$temp/session_latest" || true)
for session in "$temp"/session_2*; do
    [ -d "$session" ] && [ ! -L "$session" ] && [ "$session" != "$newest" ] || continue
    [ -z "$(find "$session" -mtime -{days} -print 2>/dev/null | head -n 1)" ] || continue
    rm -rf "$session"
    echo "removed $session"
done
if [ -n "$newest" ] && [ -d "$newest" ]; then
    find "$newest/logs" -type f -mtime +{days} -delete 2>/dev/null || true
    rm -rf "$newest/sockets" "$newest/runtime_resources" "$newest"/ray_spilled_objects_*
fi
{keep_state}
# What runs: 'cluster up' compares it with what should.
fingerprint=$(cat {token} 2>/dev/null | {{ sha256sum 2>/dev/null || shasum -a 256; }} | cut -c1-16)
printf '%s %s\n' "$WORKBENCH_REVISION" "$fingerprint" >"$folder/running"
date +%s >"$folder/started"

cd "$temp"
exec "$environment/bin/python" -m ray.scripts.scripts start \
{arguments}
"""

KEEP_STATE = r"""
# The control store's state outlives the head. If the head dies five times in a row within a minute of its start, that
# state may be the reason: it is set aside, and the cluster starts without.
now=$(date +%s)
began=$(cat "$folder/started" 2>/dev/null || echo 0)
if [ $((now - began)) -lt 60 ]; then
    failures=$(($(cat "$folder/failures" 2>/dev/null || echo 0) + 1))
else
    failures=0
fi
if [ "$failures" -ge 5 ]; then
    rm -rf "$folder/gcs.set-aside"
    [ ! -d "$folder/gcs" ] || mv "$folder/gcs" "$folder/gcs.set-aside"
    echo "five short starts in a row: the control store's state is now in $folder/gcs.set-aside"
    failures=0
fi
echo "$failures" >"$folder/failures"
(umask 077 && mkdir -p "$folder/gcs")

# Ray looks after the jobs of before only once somebody asks its job manager for something: until then, a job that ended
# with the head is listed as running. So it is asked, for five minutes or as long as this process, about no job at all.
("$environment/bin/python" - {agent} $$ <<'END' &
import contextlib, os, sys, time, urllib.request
request = urllib.request.Request(sys.argv[1] + "/api/job_agent/jobs/none/logs")
if "RAY_AUTH_TOKEN_PATH" in os.environ:
    request.add_header("Authorization", "Bearer " + open(os.environ["RAY_AUTH_TOKEN_PATH"]).read().strip())
for second in range(300):
    time.sleep(1)
    try:
        os.kill(int(sys.argv[2]), 0)
    except ProcessLookupError:
        break
    with contextlib.suppress(OSError):  # not up yet; or 404, as it should be
        second % 5 or urllib.request.urlopen(request, timeout=10)
END
)
"""


def start_script(inventory: Inventory, name: str, environment: str, arguments: list[str]) -> str:
    """The script of host ``name``: ``environment`` is its virtual environment, ``arguments`` those of ``ray start``."""
    return TEMPLATE.format(
        host=name,
        cluster=inventory.name,
        folder=shell_path(inventory.hosts[name].folder),
        environment=shell_path(environment),
        token=shell_path(inventory.token_file),
        longest_temp=LONGEST_TEMP,
        days=inventory.keep_sessions_days,
        keep_state=KEEP_STATE.replace("{agent}", _agent(inventory)) if name == inventory.head else "",
        arguments=" \\\n".join(
            f"    {argument if argument.startswith('--temp-dir=') else shlex.quote(argument)}" for argument in arguments
        ),
    )


def _agent(inventory: Inventory) -> str:
    address = inventory.hosts[inventory.head].address
    return f"http://{f'[{address}]' if ':' in address else address}:{inventory.ports.agent}"


def shell_path(path: str) -> str:
    """``path`` for a POSIX script, with a leading ``~`` as ``$HOME``."""
    if path == "~":
        return '"$HOME"'
    return f'"$HOME"/{shlex.quote(path[2:])}' if path.startswith("~/") else remote_path(path)
