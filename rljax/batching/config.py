"""How the rows of a minibatch are packed."""

import dataclasses

from rljax.settings import check_fields, field

_TABLES = (
    "length_buckets",
    "score_buckets",
    "row_buckets",
    "token_buckets",
    "microbatch_buckets",
    "trajectory_buckets",
)


@dataclasses.dataclass
class PackConfig:
    """How rows become packed sequences, and the tables that bound the shapes which are compiled.

    An empty table is automatic: it fits anything, with few shapes. Tables of one entry each make a single shape.
    Microbatches that hold nothing cost nothing.
    """

    pack_length: int = field(default=1024, least=1)
    """Tokens that a packed sequence holds. Raise it to the longest prompt plus completion."""
    microbatch_size: int = field(default=1, least=1)
    """Packed sequences in a microbatch. More fill a device better; a multiple of the devices that split the batch."""
    share_prefixes: bool | None = None
    """Pack forests, in which shared prefixes stand once (True), or rows side by side (False). None takes forests unless
    less than a tenth of the tokens is shared and rows side by side, which fill sequences better, need less room."""
    length_buckets: tuple[int, ...] = ()
    """Lengths of a packed sequence, in tokens; the last is `pack_length`. Automatic: `pack_length`, or
    the shortest quarter of it that holds everything in one microbatch."""
    score_buckets: tuple[int, ...] = ()
    """Numbers of scored tokens of a packed sequence. Automatic: quarters of its length; halves, where
    there are several microbatches."""
    row_buckets: tuple[int, ...] = ()
    """Numbers of rows of a microbatch; of one device's part, where devices split it. Automatic: 32, 128,
    512, and so on."""
    microbatch_buckets: tuple[int, ...] = ()
    """Numbers of microbatches of a minibatch. Automatic: powers of two."""
    token_buckets: tuple[int, ...] = ()
    """Numbers of loss tokens of those rows. Automatic: as many as they can have where `score_buckets` and `row_buckets`
    are set; else as many as are scored, times a power of two for rows that share them."""
    trajectory_buckets: tuple[int, ...] = ()
    """Lengths of the longest trajectory of a rollout, in tokens. Automatic: `rljax.batching.LENGTH_BUCKETS`."""

    def check(self) -> None:
        """Raises ValueError for values that no rows can be packed by."""
        check_fields(self, "config.update")
        for name in _TABLES:
            table = getattr(self, name)
            if list(table) != sorted(set(table)) or (table and table[0] < 1):
                raise ValueError(
                    f"config.update.{name}={table} must be increasing positive numbers; () makes the table by itself"
                )

        if self.length_buckets and self.length_buckets[-1] != self.pack_length:
            raise ValueError(
                f"config.update.length_buckets={self.length_buckets} must end with "
                f"config.update.pack_length={self.pack_length}"
            )
