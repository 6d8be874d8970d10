"""What a simulated run is told: a cluster, a schedule, and what each part of a step costs."""

import dataclasses
import difflib
import math

from rljax.settings import check_fields, field


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A run on a cluster, in numbers. Seconds, bytes and bytes a second; a host is a process with its devices."""

    devices: int = field(default=8, least=1)
    """Devices of the run. Several hosts have equal numbers of them."""
    devices_per_host: int = field(default=8, least=1)
    """Devices of one host. A run of fewer devices has one host."""
    rollout_devices: int = field(default=0, least=0)
    """Devices of each host that roll out while its others train, as `config.rollout.devices`; 0 lets all do both in
    turn."""
    staleness: int = field(default=0, least=0)
    """Updates between the weights that sample a rollout and those that learn from it, as `config.rollout.staleness`."""

    engines: int = field(default=0, least=0)
    """Engines in other processes, of one device each and none of `devices`, that sample in place of the run's devices;
    hosts share them equally. With `staleness` above 0 they do so beside updates."""

    groups: int = field(default=64, least=1)
    """Groups of a step. Host `h` plays groups `h`, `h + hosts`, and so on."""
    group_size: int = field(default=8, least=1)
    """Samples of a group."""
    groups_in_flight: int = field(default=0, least=0)
    """Groups that stay under way when a rollout is whole, as `config.actor.groups_in_flight`; a rollout takes the first
    that are complete. Hosts share them."""
    turns: float = field(default=1.0, least=1)
    """Mean turns of an episode, each a completion; between two of them a tool works. Of 1.6, three episodes of five
    have two and the others one."""
    tokens: float = field(default=256.0, above=0)
    """Mean new tokens of a turn; lognormal."""
    tokens_cv: float = field(default=0.0, least=0, most=100)
    """Standard deviation of the tokens of a turn over their mean."""
    max_tokens: int = field(default=2**31 - 1, least=1)
    """A turn is cut off here, as by `config.sampling.max_new_tokens`."""
    tool_s: float = field(default=0.0, least=0)
    """Mean seconds of a tool between two turns; lognormal."""
    tool_cv: float = field(default=1.0, least=0, most=100)
    """Standard deviation of the seconds of a tool over their mean."""

    rows: int = field(default=64, least=1)
    """Turns that a host decodes at once, or its engines do; more of them wait. A tool holds no row."""
    step_s: float = field(default=0.01, least=0)
    """Seconds of a decoding step, one token for every row, without what `step_row_s` adds: the weights are read."""
    step_row_s: float = field(default=0.0, least=0)
    """Seconds that each row of one device adds to a decoding step: its keys and values are read. A step computes all
    rows, whether they hold an episode or not."""
    prefill_s: float = field(default=0.0, least=0)
    """Device-seconds in which the prompt of a group is computed."""
    judge_s: float = field(default=0.0, least=0)
    """Host-seconds in which a sample is judged and made a trajectory, after the rollout."""

    update_s: float = field(default=1.0, least=0)
    """Device-seconds of scoring and updating by one rollout: half of it on twice the devices."""
    update_bytes: float = field(default=0.0, least=0)
    """Bytes that reach one device in the updates of a step: weights gathered, gradients scattered. They pass while it
    computes."""
    network_bandwidth: float = field(default=50e9, above=0)
    """Bytes a second that reach one device from the others that train."""
    update_fixed_s: float = field(default=0.0, least=0)
    """Seconds of a step that more devices do not shorten, such as packing on the host."""
    hand_over_bytes: float = field(default=0.0, least=0)
    """Bytes that one rollout device receives when weights are handed over."""
    hand_over_bandwidth: float = field(default=10e9, above=0)
    """Bytes a second that reach one rollout device."""
    trajectory_bytes: float = field(default=20.0, least=0)
    """Bytes of a token that hosts are told of each other: 20 of one turn, 40 over turns."""
    gather_bandwidth: float = field(default=1e9, above=0)
    """Bytes a second that leave process 0, which sends all trajectories to every other host."""

    checkpoint_every: int = field(default=0, least=0)
    """Steps between two checkpoints; 0 writes none."""
    checkpoint_bytes: float = field(default=0.0, least=0)
    """Bytes of a checkpoint, over all hosts."""
    checkpoint_bandwidth: float = field(default=1e9, above=0)
    """Bytes a second at which all hosts together write it, behind the steps that follow. A second checkpoint waits for
    the first."""
    checkpoint_stall_s: float = field(default=0.0, least=0)
    """Seconds in which training stands still while a checkpoint is copied off the devices."""
    failures: float = field(default=0.0, least=0)
    """Failures of a device in an hour. Any of them ends the processes of the run, which begin again."""
    restart_s: float = field(default=300.0, least=0)
    """Seconds from a failure to the first work after it: the job is placed, programs are compiled, the checkpoint is
    read. A failure within them begins them anew."""

    least_trainers: int = field(default=1, least=1)
    """Devices whose memory holds the training state; splits that leave fewer to training are refused."""
    least_rollout: int = field(default=1, least=1)
    """Devices of a host whose memory holds the decoder; splits that give it fewer are refused."""
    steps: int = field(default=1000, least=1, most=10**6)
    """Steps of the simulated run."""
    drawn: int = field(default=8, least=1)
    """Rollouts that are simulated sample by sample; the steps of the run meet them one after the other, again and
    again."""
    seed: int = field(default=0, least=0, below=2**31)
    """Enters lengths, tools and failures."""

    @property
    def hosts(self) -> int:
        return max(self.devices // self.devices_per_host, 1)

    @property
    def local_devices(self) -> int:
        """Devices of one host."""
        return self.devices // self.hosts

    @property
    def decoding_devices(self) -> int:
        """Devices of one host, or of its engines, that decode."""
        if self.engines:
            return max(self.engines // self.hosts, 1)
        return self.rollout_devices or self.local_devices

    @property
    def is_beside(self) -> bool:
        """Whether rollouts are made while the run trains."""
        return self.rollout_devices > 0 or (self.engines > 0 and self.staleness > 0)

    @property
    def training_devices(self) -> int:
        """Devices that train, over all hosts."""
        return self.devices - self.hosts * self.rollout_devices

    @property
    def token_s(self) -> float:
        """Seconds of one decoding step of a host."""
        return self.step_s + self.step_row_s * math.ceil(self.rows / self.decoding_devices)

    def check(self) -> None:
        """Raises a ValueError of one line for a value that cannot be, and for a split that the devices do not allow."""
        check_fields(self, "")
        if self.devices > self.devices_per_host and self.devices % self.devices_per_host:
            raise ValueError(
                f"devices={self.devices} must be a multiple of devices_per_host={self.devices_per_host}, or fewer"
            )
        if self.engines and self.rollout_devices:
            raise ValueError(
                f"rollout_devices={self.rollout_devices} has no effect with engines={self.engines}, which sample; set "
                "one of them to 0"
            )
        if self.rollout_devices >= self.local_devices:
            raise ValueError(
                f"rollout_devices={self.rollout_devices} must leave a device of a host's {self.local_devices} to "
                "training; 0 lets all of them do both"
            )
        if self.training_devices < self.least_trainers:
            raise ValueError(
                f"rollout_devices={self.rollout_devices} leaves {self.training_devices} devices to training, and the "
                f"state needs the memory of {self.least_trainers}; take fewer, or more devices"
            )
        if self.decoding_devices < self.least_rollout:
            raise ValueError(
                f"rollout_devices={self.rollout_devices} is too few for a decoder, which needs the memory of "
                f"{self.least_rollout} devices of a host"
            )


def replaced(scenario: Scenario, **values: int | float) -> Scenario:
    """The scenario with other values of some fields; fractions of whole numbers are cut off."""
    return dataclasses.replace(scenario, **{name: type(getattr(scenario, name))(x) for name, x in values.items()})


def with_values(scenario: Scenario, values: dict[str, str], flag: str) -> Scenario:
    """The scenario with fields replaced by what a command line says, field by field.

    ValueError, in one line that begins with `flag=field=value`, for a field that is none and a text that is no number.
    """
    known = {one.name: one for one in dataclasses.fields(scenario)}
    found: dict[str, int | float] = {}
    for name, text in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{flag}={name}={text}: no such number; {hint}there are {', '.join(known)}")
        whole = isinstance(getattr(Scenario(), name), int)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or (whole and number != int(number)):
            raise ValueError(f"{flag}={name}={text} must be {'a whole' if whole else 'a finite'} number")
        bounds = known[name].metadata["range"]
        if number not in bounds:
            raise ValueError(f"{flag}={name}={text} must be {bounds}")
        found[name] = number
    return replaced(scenario, **found)
