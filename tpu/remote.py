"""The shell commands that Cloud TPU hosts run: install, start, stop, state, log. Each answers with a line a host.

A job lives in ~/vmm-jobs/NAME of every host: code/, log, pid, and exit (the exit code) once it has ended.
Training is put in the background with nohup and setsid, so that it needs no more of a host than a shell.
"""

from __future__ import annotations

import re
import shlex

from job import Job

# Whether the pid is still ours: after a reboot another process may have the number.
_HEAD = """job="$HOME/vmm-jobs/{name}"
answer() {{ echo "vmm-host $(hostname) $*"; }}
alive() {{ [ -s "$job/pid" ] && grep -qsz supervise "/proc/$(cat "$job/pid")/cmdline"; }}
"""
_STATE = """if alive; then answer running
elif [ -s "$job/exit" ]; then answer exit "$(cat "$job/exit")"
elif [ -e "$job/installed" ]; then answer stopped
else answer absent; fi
"""


def archive(name: str) -> str:
    """Returns the name of the packed code in the home folder of a host."""
    return f"vmm-{name}.tar.gz"


def install(name: str, python: str, setup: str) -> str:
    """Unpacks the code and makes its environment, but for where training runs. setup: the user's, run first.

    TPU images have Python 3.10; uv brings the one that vmm needs.
    """
    own = f"{setup}\n" if setup else ""
    return f"""set -e
{_HEAD.format(name=name)}if alive; then answer running; exit 0; fi
{own}rm -rf "$job/code" "$job/installed" && mkdir -p "$job/code"
tar -xzf "$HOME/{archive(name)}" -C "$job/code"
cd "$job/code"
python3 -m pip install --user --quiet --upgrade uv
"$HOME/.local/bin/uv" venv --quiet --python {shlex.quote(python)} .venv
"$HOME/.local/bin/uv" pip install --quiet --python .venv/bin/python -r requirements.txt 'jax[tpu]' -e '.[gcs]'
touch "$job/installed"
answer installed
"""


def start(job: Job) -> str:
    """Starts training in the background where it does not run; the answer is `running` either way."""
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in job.env.items())
    # The shell waits for the supervisor, so that its exit code is kept; the pid is the supervisor's, which saves
    # on SIGTERM. The words come after the script and so are never read as one.
    inner = '"$@" & echo $! > "$0/pid"; wait $!; echo $? > "$0/exit"'
    words = shlex.join(job.words(".venv/bin/vmm"))
    return f"""set -e
{_HEAD.format(name=job.name)}if ! alive; then
cd "$job/code"
rm -f "$job/pid" "$job/exit"
{exports}nohup setsid bash -c '{inner}' "$job" {words} >> "$job/log" 2>&1 < /dev/null &
for _ in $(seq 100); do if alive || [ -s "$job/exit" ]; then break; fi; sleep 0.1; done
fi
{_STATE}"""


def stop(name: str, seconds: int = 300) -> str:
    """Asks training to save and end, and waits for it so long."""
    return f"""{_HEAD.format(name=name)}if alive; then kill -TERM "$(cat "$job/pid")"; fi
for _ in $(seq {seconds}); do alive || break; sleep 1; done
{_STATE}"""


def state(name: str) -> str:
    """Answers running, exit CODE, stopped (installed, not running) or absent (not installed)."""
    return _HEAD.format(name=name) + _STATE


def log(name: str, lines: int, follow: bool) -> str:
    """Prints the end of the log."""
    return f'tail -n {lines} {"-F " if follow else ""}"$HOME/vmm-jobs/{name}/log"'


def read_answers(printed: str) -> list[str]:
    """Returns the answers of the hosts: `running`, `exit 42`, …, in the order they came."""
    return re.findall(r"^vmm-host \S+ (.+?)\s*$", printed, re.M)
