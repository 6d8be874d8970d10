"""How rows are packed: the values a user sets."""

import dataclasses


@dataclasses.dataclass
class PackConfig:
    """How rows become packed sequences. The tables bound the compiled shapes: one entry each is a single shape."""

    pack_length: int = 1024
    """Tokens a packed sequence holds. Raise it to the longest prompt plus completion."""

    microbatch_size: int = 1
    """Packed sequences in a microbatch; a mesh's batch axes must divide it. Raise it while memory allows."""

    share_prefixes: bool | None = None
    """Pack forests of shared prefixes (True) or rows side by side (False); None takes forests unless less than a tenth
    of the tokens is shared and rows side by side need less room."""

    length_buckets: tuple[int, ...] = ()
    """Lengths of a packed sequence (S), the last of them `pack_length`; empty is its quarters."""

    score_buckets: tuple[int, ...] = ()
    """Scored tokens of a packed sequence (K); empty is quarters of its length."""

    row_buckets: tuple[int, ...] = ()
    """Rows of a microbatch (B); empty is powers of two."""

    microbatch_buckets: tuple[int, ...] = ()
    """Microbatches of a minibatch (M); empty is powers of two. Those that hold nothing cost nothing."""

    trajectory_buckets: tuple[int, ...] = ()
    """Tokens of the longest trajectory of a rollout (T); empty is a table that fits any."""

    def check(self) -> None:
        """ValueError of one line for values that cannot work."""
        for name in ("pack_length", "microbatch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"config.update.{name}={value} must be at least 1")

        if self.length_buckets and max(self.length_buckets) != self.pack_length:
            raise ValueError(
                f"config.update.length_buckets={self.length_buckets} must end with pack_length={self.pack_length}"
            )
