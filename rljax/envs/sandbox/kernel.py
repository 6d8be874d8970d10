"""What Linux offers to confine a process, through ctypes: namespaces, mounts, Landlock and seccomp.

Loaded by the sandbox server, which has nothing but the standard library. Every function raises OSError where the
kernel refuses.
"""

import ctypes
import os
import platform
import struct
import sys
from typing import Any

# Constants are those of Linux's headers, under their names.
NEWNS = 0x20000
NEWCGROUP = 0x2000000
NEWUTS = 0x4000000
NEWIPC = 0x8000000
NEWUSER = 0x10000000
NEWPID = 0x20000000
NEWNET = 0x40000000
_NAMESPACES = NEWNS | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | NEWCGROUP
_CLONE_THREAD = 0x10000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
_MNT_DETACH = 2
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

_libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
MACHINE = platform.machine()


def _check(result, what):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what, *arguments):
    return _check(_libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]), what)


def unshare(flags):
    _check(_libc.unshare(ctypes.c_int(flags)), f"unshare(0x{flags:x})")


def map_user(uid, gid):
    """Inside a fresh user namespace, keep the ids of outside."""
    for file, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{file}", "w") as f:
            f.write(line)


def map_user_at(proc, uid, gid):
    """The same where /proc is not mounted: `proc` is a descriptor of it."""
    for file, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        descriptor = os.open(f"{os.getpid()}/{file}", os.O_WRONLY, dir_fd=proc)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def mount(source, target, kind=None, flags=0, options=None):
    encode = lambda text: None if text is None else text.encode()  # noqa: E731
    result = _libc.mount(encode(source), encode(target), encode(kind), ctypes.c_ulong(flags), encode(options))
    _check(result, f"mount {source} at {target}")


def make_readonly(target, recursive):
    """Also ignore set-user-id bits, and device nodes where recursive."""
    flags = MS_RDONLY | MS_NOSUID | (MS_NODEV if recursive else 0)
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)
    what = f"mount_setattr {target}"
    _syscall(what, 442, _AT_FDCWD, target.encode(), _AT_RECURSIVE if recursive else 0, attributes, len(attributes))


def change_root(folder):
    """`folder`, a mount point, becomes the only file system there is."""
    os.chdir(folder)
    # the old root comes to lie on top of the new one, and is then taken away
    _syscall("pivot_root", {"x86_64": 155, "aarch64": 41}[MACHINE], b".", b".")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


def _prctl(option, value):
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl({option})")


def die_with_parent():
    _prctl(_PR_SET_PDEATHSIG, 9)


def adopt_orphans():
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def drop_privileges(uid=None, gid=None):
    """Become another user if told, and give up every capability, for good."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    header = struct.pack("Ii", 0x20080522, 0)
    nothing = bytes(24)  # no capability in any of the three sets
    _syscall("capset", {"x86_64": 126, "aarch64": 91}[MACHINE], header, nothing)


# Landlock: rights of files that the kernel's version knows, by ABI
_ABI_RIGHTS = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 5: 1 << 16}  # one past the highest right
_READ = 0b1101  # execute, read a file, list a folder
_CREATE_RULESET = 444
_ADD_RULE = 445
_RESTRICT_SELF = 446


def landlock(readable, writable):
    """From here on open nothing but what lies below `readable` (for reading) and `writable` (no devices)."""
    abi = _syscall("Landlock", _CREATE_RULESET, 0, 0, 1)
    known = max(bits for version, bits in _ABI_RIGHTS.items() if version <= abi) - 1

    # ports from ABI 4 on, scopes (signals, abstract sockets) from 6 on: nothing is allowed of either
    ruleset = struct.pack("QQQ", known, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    rules = _syscall("Landlock", _CREATE_RULESET, ruleset, size, 0)

    devices = (1 << 6) | (1 << 11)  # making character and block devices
    allowed = [(path, _READ) for path in readable] + [(path, known & ~devices) for path in writable]
    for path, rights in allowed:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # what is not there needs no rule
        if not os.path.isdir(path):  # the kernel refuses rights of folders on a file
            rights &= 0b111 | (1 << 14) | (1 << 15)
        _syscall(f"Landlock {path}", _ADD_RULE, rules, 1, struct.pack("<Qi", rights & known, descriptor), 0)
        os.close(descriptor)

    _syscall("Landlock", _RESTRICT_SELF, rules, 0)
    os.close(rules)


# System calls by number (x86-64, aarch64); -1 where there is none. Sockets of a pair, and pages spliced into pipes,
# hold memory that no limit counts; datagrams reach sockets in the file system; watches show what others open.
_NEVER = {
    "socket": (41, 198), "socketpair": (53, 199), "vmsplice": (278, 75), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97),
    "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
    "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "mq_open": (240, 180), "mq_unlink": (241, 181),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "iopl": (172, -1), "ioperm": (173, -1),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58), "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440), "move_pages": (279, 239), "migrate_pages": (256, 238),
    "fanotify_init": (300, 262), "inotify_init": (253, -1), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "modify_ldt": (154, -1), "personality": (135, 92), "lookup_dcookie": (212, 18),
}  # fmt: skip
# Where no namespace hides other processes and files: nothing that starts, signals or re-schedules a process, and
# nothing that changes a file without opening it (Landlock does not see these).
_NEVER_WITHOUT_NAMESPACES = {
    "fork": (57, -1), "vfork": (58, -1), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "sched_setaffinity": (203, 122), "setpriority": (141, 140), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30), "chmod": (90, -1),
    "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, -1), "fchown": (93, 55),
    "lchown": (94, -1), "fchownat": (260, 54), "utime": (132, -1), "utimes": (235, -1), "futimesat": (261, -1),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_KILL = (62, 129)
_TGKILL = (234, 131)
_PRLIMIT = (302, 261)
_FCNTL = (72, 25)
# Commands of it: signals to other processes (F_SETOWN, F_SETSIG, F_SETOWN_EX), a lease, which holds up whoever opens
# the file, a watch on a folder, and a larger pipe.
_FCNTL_NEVER = (8, 10, 15, 1024, 1026, 1031)
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LAST_KNOWN = 470

# Instructions of the filter, and what it may return.
_LOAD = 0x20
_EQUAL = 0x15
_AT_LEAST = 0x35
_ANY_BIT = 0x45
_RETURN = 0x06
_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_ERROR = 0x00050000
_EPERM = 1
_ENOSYS = 38


def seccomp(has_namespaces):
    """Refuse the system calls that the lists above name; call it last, after `drop_privileges`."""
    if MACHINE not in _AUDIT_ARCH:
        raise OSError(_ENOSYS, f"no table of system calls for {MACHINE}")
    column = list(_AUDIT_ARCH).index(MACHINE)

    # (instruction, lines to jump over if true, if false, operand)
    program = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _AUDIT_ARCH[MACHINE]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, _LAST_KNOWN + 1),  # also the 32-bit forms of x86-64
        (_RETURN, 0, 0, _ERROR | _ENOSYS),
        (_EQUAL, 0, 1, _CLONE3[column]),  # its flags cannot be read here; the C library then takes clone
        (_RETURN, 0, 0, _ERROR | _ENOSYS),
    ]

    denied = _NEVER if has_namespaces else {**_NEVER, **_NEVER_WITHOUT_NAMESPACES}
    for numbers in denied.values():
        if numbers[column] >= 0:
            program += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ERROR | _EPERM)]
    program += _if_second_is(_FCNTL[column], _FCNTL_NEVER)

    if has_namespaces:
        program += _unless(_CLONE[column], (_ANY_BIT, 0, 1, _NAMESPACES))
    else:
        # threads, but no processes; signals and limits of its own process alone
        program += _unless(_CLONE[column], (_ANY_BIT, 1, 0, _CLONE_THREAD))
        program += _unless(_KILL[column], (_EQUAL, 1, 0, os.getpid()))
        program += _unless(_TGKILL[column], (_EQUAL, 1, 0, os.getpid()))
        program += _unless(_PRLIMIT[column], (_EQUAL, 1, 0, 0))
    program.append((_RETURN, 0, 0, _ALLOW))

    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    _check(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), filter_, 0, 0), "seccomp")


def _if_second_is(number, values):
    """Refuse the call if its second argument is one of the values; reload the number."""
    last = len(values) - 1
    tests = [(_EQUAL, last - i, 1 if i == last else 0, value) for i, value in enumerate(values)]
    refuse = (_RETURN, 0, 0, _ERROR | _EPERM)
    return [(_EQUAL, 0, len(tests) + 3, number), (_LOAD, 0, 0, 24), *tests, refuse, (_LOAD, 0, 0, 0)]


def _unless(number, test):
    """Refuse the call unless `test` of its first argument jumps over the refusal; reload the number."""
    return [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, 16), test, (_RETURN, 0, 0, _ERROR | _EPERM), (_LOAD, 0, 0, 0)]
