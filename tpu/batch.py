"""The batch script of a SLURM job: one task a node with all its GPUs, or one a GPU; requeued when it was preempted."""

from __future__ import annotations

import shlex

from job import PREEMPTED, Job


def script(job: Job, args) -> str:
    """Returns the script.

    args: nodes, gpus (a node), task_per_gpu, cpus (a task, 0: whole nodes), time, partition, account, qos,
    constraint, mem, grace (seconds before the time limit), logs, directory and setup.
    """
    tasks = args.gpus if args.task_per_gpu else 1
    flags = {
        "job-name": job.name,
        "nodes": args.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": args.gpus,
        "cpus-per-task": args.cpus,
        "exclusive": not args.cpus,
        # Of whole nodes all: the share of one CPU would not hold a loader.
        "mem": args.mem or ("" if args.cpus else "0"),
        "time": args.time,
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "constraint": args.constraint,
        "chdir": args.directory,
        "output": f"{args.logs}/%x-%j.log",
        "open-mode": "append",  # a requeued job goes on in its log
        "requeue": True,
        "signal": f"TERM@{args.grace}",  # to the tasks, so long before the time limit
    }
    lines = [
        f"#SBATCH --{flag}" + ("" if value is True else f"={quote(value)}") for flag, value in flags.items() if value
    ]
    head = "\n".join(lines)
    exports = [f"export {key}={shlex.quote(value)}" for key, value in job.env.items()]
    if not args.task_per_gpu:
        # JAX gives a SLURM task the one GPU of its number, unless told.
        exports.append(f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(args.gpus)))}")
    setup = f"{{ {args.setup}\n}} || exit 2\n" if args.setup else ""
    cpus = f"--cpus-per-task={args.cpus}" if args.cpus else "--cpu-bind=none"
    step = ["srun", "--kill-on-bad-exit=0", "--wait=600", cpus, *job.words()]
    return f"""#!/bin/bash
{head}

# Written by tpu/slurm.py for {job.name}.
{setup}{"".join(f"{line}{chr(10)}" for line in exports)}
# SIGTERM to srun would kill its tasks at once (SIGKILL); scancel hands the signal to them, and they save.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM
{shlex.join(step)} &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
wait "$step"; again=$?
if [ "$again" -ne 127 ]; then code=$again; fi

# {PREEMPTED}: preempted or out of time, and saved. `delete` forbids the requeue.
if [ "$code" -eq {PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def quote(value: str | int) -> str:
    """Quotes a value of an #SBATCH line where it has blanks: sbatch splits the line at them."""
    text = str(value)
    return f'"{text}"' if any(c.isspace() for c in text) else text
