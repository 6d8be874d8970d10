"""The settings of a run's device mesh."""

import dataclasses
import math


@dataclasses.dataclass
class MeshConfig:
    """Devices per mesh axis; -1 (one axis at most) takes what the others leave."""

    data: int = 1
    """Replicas of the weights, each with a part of the batch. Raise it when weights fit a part of the devices."""
    fsdp: int = -1
    """Devices over which weights, optimizer state and batch are split. On a TPU leave each of them 128 columns of the
    model's width or more, and raise `data` for the rest: its compiler makes narrow products of narrower parts, and
    reduces their gradients whole."""
    tensor: int = 1
    """Devices over which heads, MLP and vocabulary are split. Raise it when a layer's weights do not fit a device."""
    sequence: int = 1
    """Devices that share each packed sequence in training, and the weights too; rollouts give them prompts of their own
    instead. Raise it when one sequence (`config.update.pack_length` tokens) does not fit a device."""
    expert: int = 1
    """Devices over which the experts of a mixture are split, and the batch too; it divides their number. Raise it where
    a layer's experts do not fit a device, or where gathering them takes longer than sending tokens to them."""

    def check(self, device_count: int | None = None) -> None:
        """Raises a ValueError of one line for sizes that cannot be, or do not multiply to `device_count`."""
        sizes = dataclasses.asdict(self)
        known = [size for size in sizes.values() if size != -1]
        shape = " x ".join(f"{name}={size}" for name, size in sizes.items())
        if any(size < 1 for size in known) or len(sizes) - len(known) > 1:
            raise ValueError(f"config.mesh {shape}: sizes must be positive, and at most one may be -1")
        if device_count is None:
            return

        product = math.prod(known)
        is_whole = len(known) == len(sizes)
        if (product != device_count) if is_whole else device_count % product:
            raise ValueError(
                f"config.mesh {shape} does not multiply to the {device_count} devices here; "
                "set one axis to -1, or change the sizes"
            )
