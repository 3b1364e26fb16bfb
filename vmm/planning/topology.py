"""Devices that are not there: the environment that they need before JAX starts, and the devices themselves."""

import importlib.util
import os
import sys
from pathlib import Path

from vmm.errors import UserError
from vmm.planning.chips import Target

# For libtpu on a machine without a TPU: ask no metadata server who it is, and let several processes load it.
_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # of this host, not of the plan: without one it complains
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def libtpu_folder() -> Path | None:
    """Returns the folder that holds libtpu: the environment's packages, or `libtpu` beside them, which `make` fills.

    There it is out of the way of all other programs: where JAX finds libtpu, it looks for TPUs first.
    """
    beside = Path(sys.prefix) / "libtpu"
    if (beside / "libtpu" / "__init__.py").is_file():
        return beside
    found = importlib.util.find_spec("libtpu")
    return Path(found.origin).parent.parent if found and found.origin else None


def prepare(target: Target) -> None:
    """Sets what JAX reads when it starts.

    Raises:
      UserError: JAX has started already with fewer CPU devices, or what compiles for the target is not installed.
    """
    if target.platform == "cpu":
        _prepare_cpu(target.devices)
        return
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if target.platform == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        if not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13) if _has("jax_plugins")):
            raise UserError(f'{target.name}: compiling for NVIDIA GPUs takes their plugin; pip install "jax[cuda13]"')
        return
    folder = libtpu_folder()
    if folder is None:
        raise UserError(f"{target.name}: compiling for TPUs takes libtpu; run `make libtpu`, or pip install vmm[plan]")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    for name, value in _TPU.items():
        os.environ.setdefault(name, value)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _prepare_cpu(devices: int) -> None:
    if "jax" not in sys.modules:
        flag = f"--xla_force_host_platform_device_count={devices}"
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def devices(target: Target) -> list:
    """Returns the target's devices, to compile for; call `prepare` before JAX is imported.

    Raises:
      UserError: the compiler knows no such slice, or there are fewer virtual devices.
    """
    import jax
    from jax.experimental import topologies

    if target.platform == "cpu":
        here = jax.devices("cpu")
        if len(here) < target.devices:
            raise UserError(
                f"{target.name}: JAX has started with {len(here)} CPU devices; plan in a process of its own"
            )
        return here[: target.devices]
    try:
        if target.platform == "cuda":
            topology = f"1x{target.slices}x{target.chips}"
            return list(topologies.get_topology_desc("", "cuda", target_config=_gpu(target), topology=topology).devices)
        more = {"num_slices": target.slices} if target.slices > 1 else {}
        if target.chip.kind == "TPU v4":
            more["chip_config_name"] = "megacore"  # as Cloud TPU runs them: one device a chip
        if target.chips < 4:
            more["chips_per_host_bounds"] = [1, 1, 1]
        name = f"{_FAMILIES[target.chip.kind]}:{target.topology}"
        return list(topologies.get_topology_desc(name, "tpu", **more).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"{target.name}: the compiler has no such machine ({str(error).splitlines()[0]})") from None


_FAMILIES = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}


def _gpu(target: Target) -> str:
    """The text by which XLA knows a Hopper GPU: compute capability 9.0, from CUDA's device queries of these cards."""
    memory = {"NVIDIA H100": 84_929_347_584, "NVIDIA H200": 150_121_545_728}[target.chip.kind]
    values = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472, "threads_per_core_limit": 2048, "core_count": 132, "fpus_per_core": 128,
        "block_dim_limit_x": 2147483647, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "memory_bandwidth": int(target.chip.bandwidth), "l2_cache_size": 52428800, "clock_rate_ghz": 1.98,
        "device_memory_size": memory, "shared_memory_per_block_optin": 232448, "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }  # fmt: skip
    lines = "\n".join(f"  {name}: {value}" for name, value in values.items())
    return (
        f"gpu_device_info {{\n{lines}\n  cuda_compute_capability {{ major: 9 }}\n}}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 }\nruntime_version { major: 12 minor: 9 }\n'
        f'device_description_str: "{target.chip.kind}"\n'
    )
