"""Which devices there are."""

from snapshot_tool.base.errors import DeviceUnavailable

DEVICES = ("cpu", "cuda")


def require_device(device: str) -> None:
    """Raise DeviceUnavailable unless torch can compute on the device."""
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise DeviceUnavailable(
            f"--device {device}: torch {torch.__version__} ({built}) sees no GPU here",
            "use --device cpu, or a machine with a GPU and a CUDA build of torch",
        )
